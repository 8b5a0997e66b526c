"""`GET /explain/ID` and the debug headers, over the whole token path."""

import msgspec
import pytest
from harness.gateway import House, in_loop

from diptych.cluster.gateway.decisions import DecisionKind, RequestExplanation
from diptych.cluster.gateway.generation import GenerationState
from diptych.cluster.router.policy import Objectives

ASK = {"prompt": "Hi", "max_tokens": 50}
SLO = Objectives(ttft_s=10.0, tpot_s=1.0)
OURS = '{gateway="gateway-0"}'
DEBUG = {"x-diptych-route", "x-diptych-predicted-ttft-ms", "x-diptych-predicted-tpot-ms"}


async def explained(house: House, some_id: str) -> RequestExplanation:
    reply = await house.get(f"/explain/{some_id}")
    assert reply.status == 200, reply.body
    return msgspec.json.decode(reply.body, type=RequestExplanation)


class TestExplain:
    @pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
    @in_loop
    async def test_goodput_says_what_it_looked_at_and_what_came(self, tmp_path, path):
        async with House(tmp_path, policy="goodput", objectives=SLO, explain=5) as house:
            body = ASK | {"messages": [{"role": "user", "content": "Hi"}], "n": 2}
            reply = await house.post(path, body, {"x-request-id": "mine"})
            found = await explained(house, reply.json["id"])
            assert (found.response_id, found.request_id) == (reply.json["id"], "mine")
            assert found == await explained(house, "mine")
            assert [choice.index for choice in found.choices] == [0, 1]
            for choice in found.choices:
                [attempt] = choice.attempts
                assert (choice.state, choice.kept_objectives, choice.num_outputs) == (GenerationState.FINISHED, True, 12)
                assert {(each.prefill, each.decode) for each in attempt.candidates} == {("prefill-0", "decode-0"), (None, "decode-0")}
                [chosen] = [each for each in attempt.candidates if each.chosen]
                assert (chosen.prefill, chosen.decode) == (attempt.prefill, attempt.decode)
                assert chosen.keeps_ttft
                assert choice.path == ("split" if attempt.prefill else "local")

    @in_loop
    async def test_a_stream_and_another_policy_say_the_choice(self, tmp_path):
        async with House(tmp_path, explain=5) as house:
            reply = await house.post("/v1/completions", ASK | {"stream": True})
            [choice] = (await explained(house, reply.events[0]["id"])).choices
            assert [(each.kind, each.prefill, each.decode, each.candidates) for each in choice.attempts] == [
                (DecisionKind.ROUTE, "prefill-0", "decode-0", ())
            ]

    @in_loop
    async def test_a_refusal_is_found_by_the_id_of_its_header(self, tmp_path):
        async with House(tmp_path, policy="goodput", objectives=Objectives(ttft_s=1e-6), explain=5) as house:
            reply = await house.post("/v1/completions", ASK)
            assert reply.status == 429
            [choice] = (await explained(house, reply.headers["x-request-id"])).choices
            assert (choice.state, choice.error) == (GenerationState.REFUSED, reply.error["message"])
            assert choice.attempts[0].kind is DecisionKind.REFUSE
            assert not any(each.keeps_ttft for each in choice.attempts[0].candidates)

    @in_loop
    async def test_a_retry_is_seen_with_why_it_was_needed(self, tmp_path):
        async with House(tmp_path, decode=2, explain=5) as house:
            house.pause_at = 3
            asking = house.open("POST", "/v1/completions", {"model": "tiny", **ASK}, {"x-request-id": "mine"})
            await house.until(lambda: any(worker.decoding for worker in house.workers))
            victim = next(worker.ref.worker_id for worker in house.workers if worker.decoding)
            house.kill(victim)
            house.tell_membership()
            house.pause_at = 1 << 30
            assert (await asking.reply()).status == 200
            first, second = (await explained(house, "mine")).choices[0].attempts
            assert (first.decode, second.decode != victim) == (victim, True)
            assert victim in first.failure
            assert second.failure == ""

    @pytest.mark.parametrize(("kept", "code"), [(0, "explain_off"), (5, "request_not_found")])
    @in_loop
    async def test_unknown_and_off_are_404(self, tmp_path, kept, code):
        async with House(tmp_path, explain=kept) as house:
            reply = await house.get("/explain/cmpl-none")
            assert (reply.status, reply.error["type"], reply.error["code"]) == (404, "invalid_request_error", code)
            assert (await house.send("POST", "/explain/cmpl-none")).status == 405
            assert (await house.get("/explain/")).status == 404

    @in_loop
    async def test_only_the_last_are_kept(self, tmp_path):
        async with House(tmp_path, explain=2) as house:
            ids = [(await house.post("/v1/completions", ASK)).json["id"] for _ in range(3)]
            assert [(await house.get(f"/explain/{each}")).status for each in ids] == [404, 200, 200]

    @in_loop
    async def test_it_needs_a_key_as_answers_do(self, tmp_path):
        async with House(tmp_path, explain=2, api_keys=frozenset({"secret"})) as house:
            assert (await house.get("/explain/cmpl-none")).status == 401
            assert (await house.get("/explain/cmpl-none", {"authorization": "Bearer secret"})).status == 404

    @in_loop
    async def test_a_prefill_worker_that_decodes_is_alone_without_being_asked_for(self, tmp_path):
        async with House(tmp_path, explain=5) as house:
            house.kill("decode-0")
            house.tell_membership()
            reply = await house.post("/v1/completions", ASK)
            [choice] = (await explained(house, reply.json["id"])).choices
            assert (choice.path, choice.attempts[0].decode) == ("alone", "prefill-0")
            paths = {"split": 0, "local": 0, "alone": 1}
            told = {f'diptych_paths_total{{gateway="gateway-0",path="{path}"}} {n}.0' for path, n in paths.items()}
            assert told <= set((await house.get("/metrics")).body.decode().splitlines())


class TestDebugHeaders:
    @pytest.mark.parametrize("stream", [False, True])
    @in_loop
    async def test_they_tell_the_route_and_what_was_predicted(self, tmp_path, stream):
        async with House(tmp_path, policy="goodput", objectives=SLO, debug_headers=True) as house:
            headers = (await house.post("/v1/completions", ASK | {"stream": stream})).headers
            assert headers["x-diptych-route"] in ("prefill-0>decode-0", "decode-0")
            assert float(headers["x-diptych-predicted-ttft-ms"]) > 0
            assert float(headers["x-diptych-predicted-tpot-ms"]) > 0

    @in_loop
    async def test_how_far_off_the_prediction_was_is_counted(self, tmp_path):
        async with House(tmp_path, policy="goodput", objectives=SLO, debug_headers=True) as house:
            headers = (await house.post("/v1/completions", ASK)).headers
            text = house.core.render_metrics().decode().replace(OURS, "")
            lines = dict(line.rsplit(" ", 1) for line in text.splitlines() if line[0] != "#")
            predicted_s, came_s = float(headers["x-diptych-predicted-ttft-ms"]) / 1e3, float(lines["diptych_ttft_seconds_sum"])
            assert lines["diptych_ttft_prediction_error_count"] == "1.0"
            assert float(lines["diptych_ttft_prediction_error_sum"]) == pytest.approx(abs(came_s / predicted_s - 1), abs=0.05)

    @in_loop
    async def test_other_policies_have_only_a_route(self, tmp_path):
        async with House(tmp_path, debug_headers=True) as house:
            headers = (await house.post("/v1/completions", ASK)).headers
            assert headers.keys() & DEBUG == {"x-diptych-route"}
            assert headers["x-diptych-route"] == "prefill-0>decode-0"

    @in_loop
    async def test_they_are_off_by_default(self, tmp_path):
        async with House(tmp_path, policy="goodput", objectives=SLO) as house:
            assert not (await house.post("/v1/completions", ASK)).headers.keys() & DEBUG

    @pytest.mark.parametrize("policy", ["least_loaded", "goodput"])
    @in_loop
    async def test_a_request_can_name_its_path(self, tmp_path, policy):
        async with House(tmp_path, policy=policy, debug_headers=True) as house:
            for path, route in (("split", "prefill-0>decode-0"), ("local", "decode-0"), ("alone", "prefill-0")) * 2:
                reply = await house.post("/v1/completions", ASK, {"x-diptych-path": path})
                assert (reply.status, reply.headers["x-diptych-route"]) == (200, route)

    @pytest.mark.parametrize(
        ("on", "path", "why"),
        [(True, "sideways", "must be one of split, local, alone, not 'sideways'"), (False, "local", "router.debug_headers")],
    )
    @in_loop
    async def test_a_path_that_cannot_be_asked_for_is_refused(self, tmp_path, on, path, why):
        async with House(tmp_path, debug_headers=on) as house:
            reply = await house.post("/v1/completions", ASK, {"x-diptych-path": path})
            assert (reply.status, reply.error["param"]) == (400, "x-diptych-path")
            assert why in reply.error["message"]
            assert not any(worker.received for worker in house.workers)
