"""From the spec's `slo` to what the router is asked and the workers are told."""

from pathlib import Path

import pytest
from harness.gateway import House, in_loop

from diptych.cluster.gateway.generation import Generation, Prompt
from diptych.cluster.places import PlaceKind, PlaceName, gateway_config
from diptych.cluster.router.policy import NO_OBJECTIVES, Explanation, Objectives, Queue, Refuse
from diptych.cluster.spec import parse_spec
from diptych.messages.ids import Address, Epoch, WorkerId
from diptych.messages.requests import Route, SamplingParams, WorkerRef

ROUTE = Route(decode=WorkerRef(WorkerId("d0"), Epoch(1), Address("fake://d0")))
SLO = Objectives(ttft_s=0.3, tpot_s=0.03)


def generation(objectives: Objectives) -> Generation:
    prompt = Prompt("cmpl-0", (1, 2, 3), SamplingParams(max_tokens=10, seed=1), deadline=700.0, objectives=objectives)
    return Generation(prompt, wake=lambda: None, arrived_at=100.0)


def test_the_router_is_asked_with_objectives_and_arrival():
    asked = generation(SLO).routing_request()
    assert (asked.objectives, asked.arrived_at, asked.may_be_late) == (SLO, 100.0, False)


def test_workers_are_told_what_is_left():
    request = generation(SLO).start_attempt(ROUTE, Address("fake://g"), now=100.1)
    assert request.ttft_slo_s == pytest.approx(0.2)
    assert request.tpot_slo_s == 0.03


def test_a_retry_may_be_late_and_goes_first():
    waiting = generation(SLO)
    waiting.start_attempt(ROUTE, Address("fake://g"), now=100.1)
    assert waiting.routing_request().may_be_late
    assert waiting.ttft_slack_s(now=101.0) == pytest.approx(-0.7)


def test_without_objectives_none_are_told():
    request = generation(NO_OBJECTIVES).start_attempt(ROUTE, Address("fake://g"), now=100.1)
    assert (request.ttft_slo_s, request.tpot_slo_s) == (None, None)


def test_the_spec_names_policy_and_objectives():
    tree = {
        "name": "x",
        "model": {"path": "embedded"},
        "pools": {"decode": {"workers": 1}},
        "slo": {"ttft_ms": 300, "tpot_ms": 30},
        "router": {"policy": "goodput", "processes": 2},
    }
    configs = [gateway_config(parse_spec(tree, Path()), PlaceName(PlaceKind.GATEWAY, index)) for index in range(2)]
    assert all((each.policy, each.objectives) == ("goodput", SLO) for each in configs)
    assert configs[0].policy_options.seed != configs[1].policy_options.seed, "equal draws would be a herd"


@in_loop
async def test_goodput_serves_what_it_can_in_time(tmp_path):
    async with House(tmp_path, policy="goodput", objectives=Objectives(ttft_s=10.0, tpot_s=1.0)) as house:
        reply = await house.post("/v1/completions", {"prompt": "Hi", "max_tokens": 50})
        assert (reply.status, reply.json["choices"][0]["text"]) == (200, "Hello there")


@in_loop
async def test_goodput_refuses_what_it_cannot_with_retry_after(tmp_path):
    async with House(tmp_path, policy="goodput", objectives=Objectives(ttft_s=1e-6, tpot_s=1.0)) as house:
        reply = await house.post("/v1/completions", {"prompt": "Hi", "max_tokens": 50})
        assert reply.status == 429
        assert int(reply.headers["retry-after"]) >= 1
        assert "first token is due" in reply.error["message"]
        assert not any(worker.received for worker in house.workers)


class Full:
    """After its first route, a policy that says `word` until there is none."""

    def __init__(self, house: House, monkeypatch: pytest.MonkeyPatch) -> None:
        policy = house.core.dispatcher._policy
        self._decide, self._num_asked = policy.decide, 0
        self.word: Queue | Refuse | None = Queue("no room", 1.0)
        monkeypatch.setattr(policy, "decide", self.decide)

    def decide(self, *question) -> Explanation:
        self._num_asked += 1
        return self._decide(*question) if self._num_asked == 1 or self.word is None else Explanation(self.word)


@in_loop
async def test_a_choice_that_is_refused_while_another_streams_refuses_the_request(tmp_path, monkeypatch):
    async with House(tmp_path) as house:
        policy, house.pause_at = Full(house, monkeypatch), 3
        client = house.open("POST", "/v1/completions", {"model": "tiny", "prompt": "Hi", "max_tokens": 50, "n": 2, "stream": True})
        await house.until(lambda: any(index == 3 for worker in house.workers for _, index in worker.decoding.values()))
        assert client.writes == []
        policy.word = Refuse("full", 7.0)
        reply = await client.reply()
        assert (reply.status, reply.error["code"], reply.headers["retry-after"]) == (429, "overloaded", "7")
        await house.until(lambda: len(house.worker("decode-0").aborted) == 1)
        assert house.core.dispatcher.num_running == 0


@pytest.mark.parametrize("first_ends", [False, True])
@in_loop
async def test_the_head_leaves_when_every_choice_has_a_route(tmp_path, monkeypatch, first_ends):
    """What came before it is not lost."""
    async with House(tmp_path) as house:
        policy, house.pause_at = Full(house, monkeypatch), 100 if first_ends else 3
        client = house.open("POST", "/v1/completions", {"model": "tiny", "prompt": "Hi", "max_tokens": 50, "n": 2, "stream": True})
        if first_ends:
            await house.until(lambda: house.core.metrics.outcomes["finished"] == 1)
        else:
            await house.until(lambda: any(index == 3 for worker in house.workers for _, index in worker.decoding.values()))
        assert client.writes == []
        policy.word = None
        await house.until(lambda: client.writes != [])
        house.pause_at = 100
        reply = await client.reply()
        assert (reply.status, reply.complete, reply.events[-1]) == (200, True, "[DONE]")
        chunks = [choice for event in reply.events[:-1] for choice in event["choices"]]
        for index in range(2):
            assert "".join(chunk["text"] for chunk in chunks if chunk["index"] == index) == "Hello there"
