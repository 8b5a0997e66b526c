"""`diptych bench gateway`, with real processes for a moment, and its stub engine alone."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from diptych.cluster.bench.command import app
from diptych.cluster.bench.stub_engine import StubEngine
from diptych.messages.fake_post import FakeNetwork
from diptych.messages.ids import RequestId
from diptych.messages.requests import Abort, FinishReason, GenerateRequest, LoadUpdate, Route, SamplingParams, StepTokens


class Stage:
    def __init__(self) -> None:
        self.network = FakeNetwork()
        self.gateways = [self.network.post("g0"), self.network.post("g1")]
        self.engine = StubEngine(self.network.post("engine"), [post.address for post in self.gateways])

    def request(self, name: str, gateway: int, max_tokens: int, prior: tuple[int, ...] = ()) -> GenerateRequest:
        return GenerateRequest(
            request_id=RequestId(name),
            gateway=self.gateways[gateway].address,
            token_ids=(7, 8, 9, *prior),
            sampling=SamplingParams(max_tokens, 0),
            route=Route(self.engine.ref),
            timeout_s=1.0,
            num_prior_outputs=len(prior),
        )

    def sent(self) -> list[StepTokens]:
        """By the engine since the last call."""
        letters, self.network.in_flight = self.network.in_flight, []
        return [letter.message for letter in letters if isinstance(letter.message, StepTokens)]


def test_the_first_token_does_not_wait_for_a_step():
    stage = Stage()
    stage.engine.take([stage.request("r", 0, 2)])
    [message] = stage.sent()
    assert [(delta.index, delta.token_ids, delta.finish) for delta in message.deltas] == [(0, (7,), None)]


def test_a_step_is_one_message_a_gateway():
    stage = Stage()
    stage.engine.take([stage.request(name, gateway, 3) for name, gateway in (("a", 0), ("b", 1), ("c", 0))])
    stage.sent()
    stage.engine.step()
    messages = stage.sent()
    assert sorted(sorted(delta.request_id for delta in message.deltas) for message in messages) == [["a", "c"], ["b"]]
    assert all(message.load is not None and message.load.work.num_decoding == 3 for message in messages)


@pytest.mark.parametrize("prior", [(), (7,), (7, 8)])
def test_an_answer_has_the_tokens_that_were_asked_for(prior):
    stage = Stage()
    stage.engine.take([stage.request("r", 0, 4, prior)])
    for _ in range(6):
        stage.engine.step()
    deltas = [delta for message in stage.sent() for delta in message.deltas]
    assert [delta.index for delta in deltas] == list(range(len(prior), 4))
    assert [delta.finish for delta in deltas] == [None] * (3 - len(prior)) + [FinishReason.LENGTH]


def test_an_aborted_request_gets_no_more():
    stage = Stage()
    stage.engine.take([stage.request("r", 0, 9), stage.request("s", 0, 9)])
    stage.sent()
    stage.engine.take([Abort(RequestId("r"))])
    stage.engine.step()
    assert [delta.request_id for message in stage.sent() for delta in message.deltas] == ["s"]


def test_every_gateway_hears_its_heart():
    stage = Stage()
    stage.engine.beat()
    heard = [(letter.to, type(letter.message)) for letter in stage.network.in_flight]
    assert heard == [(post.address, LoadUpdate) for post in stage.gateways]


def test_the_command_measures_two_gateways_on_one_port(tmp_path: Path):
    options = ["--gateways", "2", "--connections", "4", "--seconds", "0.3", "--stream-tokens", "20", "--rate", "100"]
    done = CliRunner().invoke(app, ["gateway", *options, "--json", str(tmp_path / "gateway.json")])
    assert done.exit_code == 0, done.output
    phases = json.loads((tmp_path / "gateway.json").read_text())
    assert [phase["name"] for phase in phases] == ["first", "short", "streams", "latency"]
    assert [phase["tokens"] for phase in phases] == [phase["requests"] * each for phase, each in zip(phases, (1, 16, 20, 16), strict=True)]
    assert phases[-1]["requests"] <= 60
    assert all(phase["requests"] > 0 and phase["ttft_ms"][0] <= phase["e2e_ms"][1] for phase in phases)


def test_a_folder_without_a_tokenizer_is_a_usage_error(tmp_path: Path):
    done = CliRunner().invoke(app, ["gateway", str(tmp_path)])
    assert done.exit_code == 2
    assert "config.json" in done.output
