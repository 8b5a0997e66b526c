"""From the spec's `slo` to what the router is asked and the workers are told."""

from pathlib import Path

import pytest
from harness.gateway import House, in_loop

from diptych.cluster.gateway.generation import Generation, Prompt
from diptych.cluster.places import PlaceKind, PlaceName, gateway_config
from diptych.cluster.router.policy import NO_OBJECTIVES, Objectives
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
