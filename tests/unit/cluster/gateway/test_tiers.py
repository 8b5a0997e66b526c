"""service_tier: who is told what, promised what, and refused or late."""

from pathlib import Path

import pytest
from harness.gateway import House, in_loop

from diptych.cluster.gateway.metrics import Metrics
from diptych.cluster.places import PlaceKind, PlaceName, gateway_config
from diptych.cluster.router.policy import Objectives
from diptych.cluster.spec import parse_spec
from diptych.messages.errors import SpecError
from diptych.messages.ids import Address, Epoch, WorkerId
from diptych.messages.requests import LoadReport, ServiceClass, WorkerRef
from diptych.messages.steps import StepModel

ASK = {"prompt": "Hi", "max_tokens": 50}
CHAT = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 50}
DEPLOYMENT = Objectives(ttft_s=10.0, tpot_s=1.0)


@pytest.mark.parametrize(("tier", "told", "is_a"), [
    (None, "default", "default"), ("auto", "default", "default"), ("default", "default", "default"),
    ("priority", "priority", "priority"), ("flex", "flex", "batch"), ("batch", "batch", "batch"),
])  # fmt: skip
@in_loop
async def test_workers_are_told_the_class_and_clients_the_tier(tmp_path, tier, told, is_a):
    async with House(tmp_path, objectives=DEPLOYMENT) as house:
        for path, ask in (("/v1/completions", ASK), ("/v1/chat/completions", CHAT)):
            reply = await house.post(path, ask | {"service_tier": tier})
            assert reply.json["service_tier"] == told
            streamed = await house.post(path, ask | {"service_tier": tier, "stream": True})
            assert all(event["service_tier"] == told for event in streamed.events if event != "[DONE]")
        received = [request for worker in house.workers for request in worker.received]
        assert {request.service_class for request in received} == {ServiceClass(is_a)}
        assert {request.tpot_slo_s for request in received} == {None if is_a == "batch" else 1.0}


@in_loop
async def test_an_unknown_tier_is_refused(tmp_path):
    async with House(tmp_path) as house:
        reply = await house.post("/v1/completions", ASK | {"service_tier": "gold"})
        assert (reply.status, reply.error["param"]) == (400, "service_tier")


@in_loop
async def test_a_class_has_its_own_objectives_and_a_request_too(tmp_path):
    classes = {ServiceClass.PRIORITY: Objectives(0.2, 0.01)}
    async with House(tmp_path, objectives=DEPLOYMENT, class_objectives=classes) as house:
        await house.post("/v1/completions", ASK | {"service_tier": "priority"})
        await house.post("/v1/completions", ASK | {"service_tier": "priority"}, {"x-diptych-tpot-ms": "35"})
        await house.post("/v1/completions", ASK | {"service_tier": "batch"}, {"x-diptych-ttft-ms": "5000"})
        first = house.worker("prefill-0").received
        assert [(round(request.ttft_slo_s, 6), request.tpot_slo_s) for request in first] == [(0.2, 0.01), (0.2, 0.035), (5.0, None)]


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "fast", "", "1_000"])
@in_loop
async def test_an_objective_that_is_none_is_a_400(tmp_path, value):
    async with House(tmp_path) as house:
        reply = await house.post("/v1/completions", ASK, {"x-diptych-ttft-ms": value})
        assert (reply.status, reply.error["param"]) == (400, "x-diptych-ttft-ms")


@in_loop
async def test_batch_is_late_where_others_are_refused(tmp_path):
    impossible = {"x-diptych-ttft-ms": "0.001"}
    async with House(tmp_path, policy="goodput", objectives=DEPLOYMENT) as house:
        assert (await house.post("/v1/completions", ASK, impossible)).status == 429
        assert (await house.post("/v1/completions", ASK | {"service_tier": "flex"}, impossible)).status == 200


def test_the_spec_names_objectives_by_class():
    tree = {
        "name": "x",
        "model": {"path": "embedded"},
        "pools": {"decode": {"workers": 1}},
        "slo": {"ttft_ms": 300, "classes": {"batch": {"tpot_ms": 500}}},
    }
    config = gateway_config(parse_spec(tree, Path()), PlaceName(PlaceKind.GATEWAY, 0))
    assert config.class_objectives == {ServiceClass.BATCH: Objectives(None, 0.5)}
    tree["slo"]["classes"] = {"gold": {"tpot_ms": 1}}
    with pytest.raises(SpecError, match=r"slo\.classes\.gold"):
        parse_spec(tree, Path())


@in_loop
async def test_metrics_and_status_tell_who_was_in_time(tmp_path):
    impossible = {"x-diptych-ttft-ms": "0.001"}
    async with House(tmp_path, policy="goodput", objectives=DEPLOYMENT) as house:
        await house.post("/v1/completions", ASK)
        await house.post("/v1/completions", ASK | {"service_tier": "priority"}, impossible)
        await house.post("/v1/completions", ASK | {"service_tier": "batch"})
        lines = (await house.get("/metrics")).body.decode().splitlines()
        for line in (
            'diptych_goodput_requests_total{class="default",gateway="gateway-0"} 1.0',
            'diptych_goodput_requests_total{class="batch",gateway="gateway-0"} 1.0',
            'diptych_requests_total{class="priority",gateway="gateway-0",outcome="refused"} 1.0',
            'diptych_requests_total{class="batch",gateway="gateway-0",outcome="finished"} 1.0',
            'diptych_refusals_total{gateway="gateway-0",reason="overloaded"} 1.0',
        ):
            assert line in lines, line
        paths = [float(line.split()[-1]) for line in lines if line.startswith("diptych_paths_total")]
        assert sum(paths) == 2
        status = house.core.status(port=1)
        assert status.by_class == {"default": 1, "priority": 1, "batch": 1}
        assert status.good_by_class == {"default": 1, "batch": 1}


def test_every_series_begins_at_nothing():
    """Or a ratio of goodput had no value before the first request that was in time, and a rate missed it."""
    lines = set(Metrics("gateway-0").render().decode().splitlines())
    classes, ours = ("priority", "default", "batch"), 'gateway="gateway-0"'
    outcomes = ("finished", "aborted", "refused", "failed")
    assert {f'diptych_goodput_requests_total{{class="{each}",{ours}}} 0.0' for each in classes} <= lines
    assert {f'diptych_requests_total{{class="{c}",{ours},outcome="{o}"}} 0.0' for c in classes for o in outcomes} <= lines
    assert {f'diptych_choices_total{{{ours},outcome="{each}"}} 0.0' for each in outcomes} <= lines
    reasons = ("overloaded", "no_route", "rate_limited")
    assert {f'diptych_refusals_total{{{ours},reason="{each}"}} 0.0' for each in reasons} <= lines


def test_each_workers_prediction_error_is_told():
    ref = WorkerRef(WorkerId("decode-0"), Epoch(1), Address("fake://d"))
    model = StepModel(5e-3, 0.0, 0.0, 0.0, 0.0, error=0.25, num_observed=9)
    report = LoadReport(ref, 0, 0, 0, 0, num_blocks=64, num_free_blocks=64, block_size=16, step_model=model)
    metrics = Metrics("gateway-0")
    assert 'diptych_predictor_error{gateway="gateway-0",worker="decode-0"} 0.25' in metrics.render([report]).decode().splitlines()
    assert "decode-0" not in metrics.render([]).decode(), "a worker that has gone is forgotten"
