"""So many requests and tokens a minute for each key."""

import math
from pathlib import Path

import pytest
from harness.gateway import House, in_loop, tokens_of
from hypothesis import given
from hypothesis import strategies as st

from diptych.cluster.gateway.config import Limits
from diptych.cluster.gateway.errors import RateLimited
from diptych.cluster.gateway.rate_limits import RateLimiter, RateLimits
from diptych.cluster.places import PlaceKind, PlaceName, gateway_config
from diptych.cluster.router.policy import Explanation, Queue, Refuse
from diptych.cluster.spec import parse_spec
from diptych.messages.errors import SpecError
from diptych.messages.requests import FailureKind

ASK = {"prompt": "Hi", "max_tokens": 8}
KEYS = frozenset({"one", "two"})


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def wait_of(limiter: RateLimiter, num_tokens: int) -> float | None:
    """None: it was let in."""
    try:
        limiter.admit(b"key", 1, num_tokens)
    except RateLimited as refusal:
        return refusal.retry_after_s
    return None


@given(st.lists(st.tuples(st.floats(0, 30), st.integers(1, 400)), max_size=60), st.integers(1, 60), st.integers(1, 1000))
def test_no_window_holds_more_than_a_full_bucket_and_its_refill(asked, requests, tokens):
    now, granted = 0.0, []
    limiter = RateLimiter(RateLimits(requests, tokens), lambda: now)
    for gap, amount in asked:
        now += gap
        refused_s = wait_of(limiter, amount)
        if refused_s is not None:
            assert refused_s > 0
            assert math.isfinite(refused_s) == (amount <= tokens)
        else:
            granted.append((now, amount))
    for i, (start, _) in enumerate(granted):
        for j in range(i, len(granted)):
            minutes = 1 + (granted[j][0] - start) / 60
            assert j - i + 1 <= requests * minutes + 1e-6
            assert sum(amount for _, amount in granted[i : j + 1]) <= tokens * minutes + 1e-6


@given(st.integers(1, 60), st.integers(1, 500), st.lists(st.integers(1, 500), min_size=1, max_size=30))
def test_whoever_waits_as_told_is_let_in(requests, tokens, amounts):
    now = 0.0
    limiter = RateLimiter(RateLimits(requests, tokens), lambda: now)
    for amount in [min(amount, tokens) for amount in amounts]:
        refused_s = wait_of(limiter, amount)
        if refused_s is not None:
            now += refused_s + 1e-6
            limiter.admit(b"key", 1, amount)


@in_loop
async def test_a_key_that_has_used_its_minute_is_a_429_and_others_go_on(tmp_path):
    async with House(tmp_path, api_keys=KEYS, rate_limits=RateLimits(2, None)) as house:
        replies = [await house.post("/v1/completions", ASK, bearer("one")) for _ in range(3)]
        assert [reply.status for reply in replies] == [200, 200, 429]
        assert [reply.headers["x-ratelimit-remaining-requests"] for reply in replies] == ["1", "0", "0"]
        assert replies[2].headers["retry-after"] == "30"
        assert replies[2].error["code"] == "rate_limit_exceeded"
        refusals = 'diptych_refusals_total{gateway="gateway-0",reason="rate_limited"} 1.0'
        assert refusals in (await house.get("/metrics")).body.decode().splitlines()
        assert (await house.post("/v1/completions", ASK, bearer("two"))).status == 200
        house.now += 30
        assert (await house.post("/v1/completions", ASK, bearer("one"))).status == 200


@in_loop
async def test_tokens_count_prompts_and_what_may_come(tmp_path):
    async with House(tmp_path, rate_limits=RateLimits(None, 50)) as house:
        reply = await house.post("/v1/completions", ASK | {"n": 3, "stream": True})
        assert (reply.status, reply.headers["x-ratelimit-remaining-tokens"]) == (200, "20")
        assert (await house.post("/v1/completions", ASK | {"n": 3})).status == 429
        never = await house.post("/v1/completions", ASK | {"n": 6})
        assert (never.status, "retry-after" in never.headers) == (429, False)
        assert "60 tokens are asked for" in never.error["message"]


@in_loop
async def test_who_is_refused_has_used_up_nothing(tmp_path):
    async with House(tmp_path, rate_limits=RateLimits(2, 50), limits=Limits(max_live_choices=0)) as house:
        replies = [await house.post("/v1/completions", ASK) for _ in range(4)]
        assert [(reply.status, reply.error["code"]) for reply in replies] == [(429, "overloaded")] * 4
        assert {reply.headers["x-ratelimit-remaining-requests"] for reply in replies} == {"2"}
        assert {reply.headers["x-ratelimit-remaining-tokens"] for reply in replies} == {"50"}


@in_loop
async def test_an_answer_of_which_a_part_has_come_is_not_given_back(tmp_path, monkeypatch):
    """Of two choices one is under way when the other, which has waited, is refused."""
    async with House(tmp_path, rate_limits=RateLimits(10, 50)) as house:
        policy = house.core.dispatcher._policy
        decide, asked = policy.decide, []

        def once(*question):
            asked.append(question)
            if len(asked) == 1:
                return decide(*question)
            has_begun = any(worker.decoding for worker in house.workers)
            return Explanation(Refuse("full", 1.0) if has_begun else Queue("no room", 1.0))

        monkeypatch.setattr(policy, "decide", once)
        house.pause_at = 2
        reply = await house.post("/v1/completions", ASK | {"n": 2})
        assert reply.status == 429, reply.body
        assert reply.headers["x-ratelimit-remaining-requests"] == "9"


@given(st.lists(st.tuples(st.floats(0, 30), st.integers(1, 300), st.integers(0, 600)), max_size=60), st.integers(1, 500))
def test_what_is_used_beyond_a_guess_is_owed(asked, tokens):
    """Of answers of unsaid length, each over when it begins: no more is used than the bucket held and took in, but for the last one's."""
    now, used, biggest = 0.0, 0, 0
    limiter = RateLimiter(RateLimits(None, tokens), lambda: now)
    for gap, prompt, came in asked:
        now += gap
        guessed = limiter.guess(prompt, prompt + 600, 1)
        assert guessed <= limiter.guess(prompt, prompt + 600, 9) <= max(prompt, tokens)
        assert prompt <= guessed <= max(prompt, tokens)
        if wait_of(limiter, guessed) is None:
            limiter.give_back(b"key", 0, guessed - prompt - came)
            used, biggest = used + prompt + came, max(biggest, prompt + came)
            assert used <= tokens * (1 + now / 60) + biggest + 1e-6
            assert 0 <= int(dict(limiter.headers(b"key"))["x-ratelimit-remaining-tokens"]) <= tokens


@pytest.mark.parametrize("stream", [False, True])
@in_loop
async def test_a_chat_of_unsaid_length_is_let_in_and_pays_for_what_it_used(tmp_path, stream):
    """Its context, 128, is more than a minute's 100. Of these a quarter is taken beside the prompt, until it is known what came."""
    async with House(tmp_path, rate_limits=RateLimits(None, 100)) as house:
        chat = {"messages": [{"role": "user", "content": "Hi"}], "stream": stream}
        prompt = 4
        first = await house.post("/v1/chat/completions", chat)
        assert (first.status, first.headers["x-ratelimit-remaining-tokens"]) == (200, str(100 - prompt - 25))
        house.says = tokens_of("x" * 80)
        second = await house.post("/v1/chat/completions", chat)
        assert second.headers["x-ratelimit-remaining-tokens"] == str(100 - (prompt + 12) - prompt - 25), "of the first, 12 had come"
        owing = await house.post("/v1/completions", ASK)
        assert (owing.status, owing.headers["x-ratelimit-remaining-tokens"]) == (429, "0"), "the second took all that was left"
        house.now += 60
        assert (await house.post("/v1/completions", ASK)).status == 200


@in_loop
async def test_a_prompt_of_more_than_a_minute_is_never_let_in(tmp_path):
    async with House(tmp_path, rate_limits=RateLimits(None, 20)) as house:
        reply = await house.post("/v1/chat/completions", {"messages": [{"role": "user", "content": "x" * 30}]})
        assert (reply.status, "retry-after" in reply.headers) == (429, False)


@in_loop
async def test_what_does_not_come_is_given_back(tmp_path):
    """Of 50 and a prompt of 2: an end of its own, a stop string, a worker that fails it."""

    def fail(worker, request):
        worker.fail(request, FailureKind.INTERNAL, "broken", retryable=False)
        return True

    async with House(tmp_path, rate_limits=RateLimits(None, 100)) as house:
        ask = {"prompt": "Hi", "max_tokens": 50}
        left = [(await house.post("/v1/completions", ask | {"stream": True})).headers["x-ratelimit-remaining-tokens"]]
        house.pause_at = 2
        stopped = await house.post("/v1/completions", ask | {"stop": "e"})
        left.append(stopped.headers["x-ratelimit-remaining-tokens"])
        house.on_request = fail
        failed = await house.post("/v1/completions", ask)
        assert (failed.status, failed.headers["x-ratelimit-remaining-tokens"]) == (500, str(100 - 14 - 4 - 2))
        assert left == [str(100 - 52), str(100 - 14 - 52)]


@in_loop
async def test_who_leaves_gets_back_what_had_not_come(tmp_path):
    async with House(tmp_path, rate_limits=RateLimits(None, 100)) as house:
        house.pause_at = 3
        client = house.open("POST", "/v1/completions", {"model": "tiny", "prompt": "Hi", "max_tokens": 50, "stream": True})
        await house.until(lambda: any(index == 3 for worker in house.workers for _, index in worker.decoding.values()))
        client.leave()
        await house.until(lambda: house.core.dispatcher.num_running == 0)
        house.pause_at = 100
        again = await house.post("/v1/completions", ASK)
        assert again.headers["x-ratelimit-remaining-tokens"] == str(100 - 5 - 10)


@in_loop
async def test_without_limits_nothing_is_told(tmp_path):
    async with House(tmp_path) as house:
        reply = await house.post("/v1/completions", ASK)
        assert not [name for name in reply.headers if name.startswith("x-ratelimit")]


def test_gateways_share_what_the_spec_gives():
    tree = {
        "name": "x",
        "model": {"path": "embedded"},
        "pools": {"decode": {"workers": 1}},
        "router": {"processes": 4},
        "security": {"requests_per_minute": 100},
    }
    config = gateway_config(parse_spec(tree, Path()), PlaceName(PlaceKind.GATEWAY, 0))
    assert config.rate_limits == RateLimits(25.0, None)
    for name in ("requests_per_minute", "tokens_per_minute"):
        tree["security"] = {name: 3}
        with pytest.raises(SpecError, match=f"security.{name}: must be >= 4, not 3"):
            parse_spec(tree, Path())
