"""Workers die, clients leave, and the client that stays sees a pause at most."""


import pytest
from harness.gateway import EOS, FakeWorker, House, in_loop, tokens_of

from diptych.cluster.gateway import responder
from diptych.cluster.gateway.config import Limits
from diptych.cluster.router.registry import POLICIES
from diptych.messages.membership import Role
from diptych.messages.requests import FailureKind, GenerateRequest

TEXT = "The quick brown fox jumps over the lazy dog"
ASK = {"prompt": "Hi", "max_tokens": 100}
STREAM = ASK | {"stream": True}


def outcomes(house: House) -> dict[str, int]:
    return {outcome: count for outcome, count in house.core.metrics.outcomes.items() if count}


class TestDeath:
    @pytest.mark.parametrize("stream", [False, True])
    @pytest.mark.parametrize("at", [0, 1, 2, 20])
    @pytest.mark.parametrize("victim", ["prefill", "decode"])
    @in_loop
    async def test_of_a_worker_costs_a_pause(self, tmp_path, victim, at, stream):
        """At output index `at` everything stands still, the worker dies, and the text goes on without a seam."""
        async with House(tmp_path, prefill=2, decode=2) as house:
            house.says, house.pause_at = [*tokens_of(TEXT), EOS], at
            connection = house.open("POST", "/v1/completions", {"model": "tiny"} | ASK | {"stream": stream, "seed": 3, "logprobs": 0})
            await house.until(lambda: any(worker.received for worker in house.workers))
            await house.until(lambda: any(index >= at for worker in house.workers for _, index in worker.decoding.values()))
            [request] = [request for worker in house.workers for request in worker.received]
            lost = getattr(request.route, victim).worker_id
            house.kill(lost)
            house.pause_at = 1 << 30
            house.tell_membership()
            reply = await connection.reply()
            assert reply.complete
            assert (reply.text if stream else reply.json["choices"][0]["text"]) == TEXT
            bodies = reply.events[:-1] if stream else [reply.json]
            assert "".join(token for body in bodies for token in body["choices"][0]["logprobs"]["tokens"]) == TEXT
            assert outcomes(house) == {"finished": 1}
            again = [r for worker in house.workers for r in worker.received if r.request_id != request.request_id]
            assert all(r.sampling == request.sampling for r in again)
            if victim == "decode":
                assert len(again) == 1
                assert again[0].token_ids == (*request.token_ids, *tokens_of(TEXT)[: again[0].num_prior_outputs])

    @in_loop
    async def test_of_many_at_once(self, tmp_path):
        async with House(tmp_path, prefill=1, decode=3, policy="round_robin") as house:
            house.says, house.pause_at = [*tokens_of(TEXT), EOS], 10
            streams = [house.open("POST", "/v1/completions", {"model": "tiny"} | STREAM) for _ in range(12)]
            await house.until(lambda: sum(index == 10 for worker in house.workers for _, index in worker.decoding.values()) == 12)
            house.kill("decode-0")
            house.kill("decode-1")
            house.pause_at = 1 << 30
            house.tell_membership()
            assert [(await stream.reply()).text for stream in streams] == [TEXT] * 12
            assert house.core.metrics.num_retries == 8

    @in_loop
    async def test_of_all_waits_for_the_restarted(self, tmp_path):
        async with House(tmp_path) as house:
            house.says, house.pause_at = [*tokens_of(TEXT), EOS], 5
            stream = house.open("POST", "/v1/completions", {"model": "tiny"} | STREAM)
            await house.until(lambda: any(index == 5 for worker in house.workers for _, index in worker.decoding.values()))
            house.kill("decode-0")
            house.kill("prefill-0")
            house.tell_membership()
            await house.until(lambda: house.core.dispatcher.num_queued == 1)
            assert (await house.get("/ready")).status == 503
            house.pause_at = 1 << 30
            house.add("decode-0", Role.DECODE, epoch=2)
            house.tell_membership()
            assert (await stream.reply()).text == TEXT

    @pytest.mark.parametrize("policy", POLICIES)
    @in_loop
    async def test_of_all_that_decode_leaves_it_to_those_that_prefill(self, tmp_path, policy):
        async with House(tmp_path, prefill=2, policy=policy) as house:
            house.says, house.pause_at = [*tokens_of(TEXT), EOS], 5
            stream = house.open("POST", "/v1/completions", {"model": "tiny"} | STREAM)
            await house.until(lambda: any(index == 5 for worker in house.workers for _, index in worker.decoding.values()))
            house.kill("decode-0")
            house.tell_membership()
            await house.until(lambda: any(request.route.prefill is None for worker in house.workers for request in worker.received))
            again = next(request for worker in house.workers for request in worker.received if request.route.prefill is None)
            assert again.num_prior_outputs == 5
            house.add("decode-0", Role.DECODE, epoch=2)            # that it is back moves nobody
            house.pause_at = 1 << 30
            house.tell_membership()
            assert (await stream.reply()).text == TEXT
            assert house.core.metrics.num_retries == 1
            for worker in house.workers:
                worker.received.clear()
            await house.post("/v1/completions", ASK)
            assert {request.route.decode.worker_id for worker in house.workers for request in worker.received} == {"decode-0"}

    @in_loop
    async def test_that_nobody_announces(self, tmp_path):
        async with House(tmp_path, decode=2) as house:
            house.says, house.pause_at = [*tokens_of(TEXT), EOS], 5
            stream = house.open("POST", "/v1/completions", {"model": "tiny"} | STREAM)
            await house.until(lambda: any(index == 5 for worker in house.workers for _, index in worker.decoding.values()))
            [victim] = [worker for worker in house.workers if worker.decoding]
            victim.frozen = True
            house.pause_at = 1 << 30
            house.now += 5.0
            assert (await stream.reply()).text == TEXT
            await house.until(lambda: victim.aborted != [])


class TestFailure:
    @pytest.mark.parametrize("stream", [False, True])
    @pytest.mark.parametrize(
        ("kind", "status", "error_type"),
        [
            (FailureKind.INVALID, 400, "invalid_request_error"), (FailureKind.REFUSED, 429, "rate_limit_error"),
            (FailureKind.INTERNAL, 500, "server_error"), (FailureKind.PEER_LOST, 503, "server_error"),
            (FailureKind.TIMEOUT, 504, "server_error"),
        ],
    )  # fmt: skip
    @in_loop
    async def test_before_the_first_byte_is_a_status(self, tmp_path, kind, status, error_type, stream):
        def fail(worker: FakeWorker, request: GenerateRequest) -> bool:
            worker.fail(request, kind, "the reason", retryable=False)
            return True

        async with House(tmp_path) as house:
            house.on_request = fail
            reply = await house.post("/v1/completions", ASK | {"stream": stream, "n": 2})
            assert (reply.status, reply.error["type"], reply.error["code"]) == (status, error_type, kind)
            assert "the reason" in reply.error["message"]
            assert ("retry-after" in reply.headers) == (status == 429)
            await house.until(lambda: house.core.dispatcher.num_running == 0)

    @in_loop
    async def test_after_it_is_an_event_and_no_done(self, tmp_path):
        async with House(tmp_path) as house:
            house.pause_at = 4
            stream = house.open("POST", "/v1/completions", {"model": "tiny"} | STREAM | {"n": 2})
            decode = house.worker("decode-0")
            await house.until(lambda: [index for _, index in decode.decoding.values()] == [4, 4])
            [(request, _), _] = decode.decoding.values()
            decode.fail(request, FailureKind.INTERNAL, "the reason", retryable=False)
            reply = await stream.reply()
            assert (reply.status, reply.complete) == (200, True)
            assert "the reason" in reply.events[-1]["error"]["message"]
            assert "[DONE]" not in reply.events
            await house.until(lambda: len(decode.aborted) == 2)
            assert outcomes(house) == {"failed": 2}, "the client has not left"

    @in_loop
    async def test_a_failure_that_may_pass_is_tried_again_unseen(self, tmp_path):
        def fail_once(worker: FakeWorker, request: GenerateRequest) -> bool:
            if request.request_id.endswith("-1"):
                worker.fail(request, FailureKind.REFUSED, "no memory", retryable=True)
                return True
            return False

        async with House(tmp_path) as house:
            house.on_request = fail_once
            asked = house.open("POST", "/v1/completions", {"model": "tiny"} | ASK)
            await house.until(lambda: house.core.metrics.num_retries == 1)
            house.now += 0.1
            assert (await asked.reply()).json["choices"][0]["text"] == "Hello there"

    @in_loop
    async def test_no_worker_ever_is_503_with_retry_after(self, tmp_path):
        async with House(tmp_path, prefill=0, decode=0) as house:
            waiting = house.open("POST", "/v1/completions", {"model": "tiny"} | ASK)
            await house.until(lambda: house.core.dispatcher.num_queued == 1)
            house.now += 61.0
            reply = await waiting.reply()
            assert (reply.status, reply.error["code"], reply.headers["retry-after"]) == (503, "no_route", "5")
            assert outcomes(house) == {"refused": 1}

    @in_loop
    async def test_too_many_are_429_with_retry_after(self, tmp_path):
        async with House(tmp_path, limits=Limits(max_live_choices=2)) as house:
            house.pause_at = 1
            held = house.open("POST", "/v1/completions", {"model": "tiny"} | ASK | {"n": 2})
            await house.until(lambda: house.core.dispatcher.num_running == 2)
            reply = await house.post("/v1/completions", ASK)
            assert (reply.status, reply.error["code"], reply.headers["retry-after"]) == (429, "overloaded", "1")
            house.pause_at = 1 << 30
            assert (await held.reply()).status == 200

    @in_loop
    async def test_the_deadline_is_504(self, tmp_path):
        async with House(tmp_path, limits=Limits(request_timeout_s=100.0)) as house:
            house.on_request = lambda worker, request: True
            waiting = house.open("POST", "/v1/completions", {"model": "tiny"} | ASK)
            await house.until(lambda: house.core.dispatcher.num_running == 1)
            house.now += 101.0
            reply = await waiting.reply()
            assert (reply.status, "100 s" in reply.error["message"]) == (504, True)


class TestClient:
    @pytest.mark.parametrize("stream", [False, True])
    @in_loop
    async def test_that_leaves_aborts_everywhere(self, tmp_path, stream):
        async with House(tmp_path) as house:
            house.pause_at = 4
            connection = house.open("POST", "/v1/completions", {"model": "tiny"} | ASK | {"stream": stream, "n": 2})
            prefill, decode = house.worker("prefill-0"), house.worker("decode-0")
            await house.until(lambda: [index for _, index in decode.decoding.values()] == [4, 4])
            connection.leave()
            await connection.over()
            await house.until(lambda: len(prefill.aborted) == len(decode.aborted) == 2)
            assert outcomes(house) == {"aborted": 2}
            assert not decode.decoding

    @in_loop
    async def test_that_leaves_while_queued(self, tmp_path):
        async with House(tmp_path, prefill=0, decode=0) as house:
            connection = house.open("POST", "/v1/completions", {"model": "tiny"} | STREAM)
            await house.until(lambda: house.core.dispatcher.num_queued == 1)
            connection.leave()
            await house.until(lambda: house.core.dispatcher.num_queued == 0)
            assert outcomes(house) == {"aborted": 1}

    @pytest.mark.parametrize("n", [1, 3])
    @in_loop
    async def test_that_does_not_read_is_dropped_and_nobody_waits_for_it(self, tmp_path, n):
        async with House(tmp_path, limits=Limits(max_buffered_tokens=20)) as house:
            house.says = tokens_of("x" * 100)
            slow = house.open("POST", "/v1/completions", {"model": "tiny"} | STREAM | {"n": n})
            slow.stop_reading()
            quick = await house.post("/v1/completions", STREAM)
            assert quick.text == "x" * 100
            await slow.over()
            counts = outcomes(house)
            assert counts.pop("finished") == 1
            assert counts["failed"] + counts.get("aborted", 0) == n
            await house.until(lambda: len(house.worker("decode-0").aborted) == n)

    @in_loop
    async def test_that_does_not_read_until_the_deadline_is_dropped(self, tmp_path, monkeypatch):
        monkeypatch.setattr(responder, "WRITE_GRACE_S", 0.02)
        async with House(tmp_path, limits=Limits(request_timeout_s=0.02)) as house:
            house.says = tokens_of("x" * 100)
            slow = house.open("POST", "/v1/completions", {"model": "tiny"} | STREAM)
            slow.stop_reading()
            assert not await slow.over()
            await house.until(lambda: house.core.dispatcher.num_running == 0)
            assert outcomes(house) in ({"finished": 1}, {"aborted": 1})

    @in_loop
    async def test_that_reads_slowly_gets_all_of_it_in_fewer_writes(self, tmp_path):
        async with House(tmp_path) as house:
            house.says = tokens_of("x" * 100)
            slow = house.open("POST", "/v1/completions", {"model": "tiny"} | STREAM)
            slow.stop_reading()
            await house.until(lambda: house.core.metrics.outcomes["finished"] == 1)
            slow.read_on()
            reply = await slow.reply()
            assert reply.text == "x" * 100
            assert len(slow.writes) < 10

    @in_loop
    async def test_each_step_is_one_write(self, tmp_path):
        async with House(tmp_path) as house:
            stream = house.open("POST", "/v1/completions", {"model": "tiny"} | STREAM | {"n": 3})
            assert (await stream.reply()).complete
            assert len(stream.writes) <= 12 + 1
            assert stream.writes[2].count(b"data: ") == 3


@in_loop
async def test_a_draining_worker_gets_nothing_new_and_finishes_what_it_has(tmp_path):
    async with House(tmp_path, decode=2) as house:
        house.pause_at = 3
        stream = house.open("POST", "/v1/completions", {"model": "tiny"} | STREAM)
        await house.until(lambda: any(index == 3 for worker in house.workers for _, index in worker.decoding.values()))
        [busy] = [worker for worker in house.workers if worker.decoding]
        house.tell_membership(draining=frozenset({busy.ref.worker_id}))
        house.pause_at = 1 << 30
        for _ in range(4):
            assert (await house.post("/v1/completions", ASK)).status == 200
        assert (await stream.reply()).text == "Hello there"
        decoded_by_busy = [r for r in house.worker("prefill-0").received if r.route.decode == busy.ref]
        assert len(decoded_by_busy) == 1
        assert house.core.metrics.num_retries == 0
