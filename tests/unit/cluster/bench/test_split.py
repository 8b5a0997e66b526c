"""`diptych bench split`: who is asked when and how, and what the figures are made of."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from diptych.cluster.bench import split_bench
from diptych.cluster.bench.command import app
from diptych.cluster.bench.record import Chunk, Outcome, RequestRecord
from diptych.cluster.bench.split_bench import WARM_UPS, summary


@pytest.fixture(autouse=True)
def cold_stub(stub, behaviour, monkeypatch: pytest.MonkeyPatch) -> None:
    stub.behave = lambda index: behaviour(tpot_s=0.002, cached_share=0.0)
    monkeypatch.setattr(split_bench, "PAUSE_S", 0.0)


def invoke(*arguments: object) -> Result:
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, ["split", *map(str, arguments)])


def record(ttft_ms: float, *gaps_ms: float) -> RequestRecord:
    at_s = [ttft_ms / 1e3]
    for gap_ms in gaps_ms:
        at_s.append(at_s[-1] + gap_ms / 1e3)
    chunks = tuple(Chunk(each, 1) for each in at_s)
    return RequestRecord(8, len(chunks), 0.0, 0.0, at_s[-1], Outcome.OK, chunks=chunks, last_token_s=at_s[-1], output_tokens=len(chunks))


def test_the_difference_is_taken_within_rounds() -> None:
    """The machine becomes slower by 100 ms a round, which the difference does not see."""
    split = [record(100 * i + 13, 9, 5, 5) for i in range(5)]
    local, alone = ([record(100 * i + ttft, 6, 5, 4) for i in range(5)] for ttft in (10, 12))
    row = summary(1024, {"split": split, "local": local, "alone": alone})
    assert (row.prompt_tokens, row.rounds) == (1024, 5)
    assert (row.split.ttft_p50, row.split.second_p50, row.split.later_p50) == pytest.approx((213, 9, 5))
    assert [other.name for other in row.others] == ["local", "alone"]
    for other, difference, ttft_p90 in zip(row.others, (3, 1), (370, 372), strict=True):
        assert (other.difference_ms, other.difference_p25_ms, other.difference_p75_ms) == pytest.approx((difference,) * 3)
        assert (other.latencies.ttft_p90, other.latencies.second_p90, other.latencies.later_p50) == pytest.approx((ttft_p90, 6, 4.5))


def test_two_tokens_have_no_later_ones() -> None:
    row = summary(8, {"split": [record(2, 1)], "local": [record(2, 1)]})
    assert row.split.later_p50 != row.split.later_p50


def test_ways_take_turns_with_prompts_of_their_own(stub, tmp_path: Path) -> None:
    result = invoke("--url", stub.url, "--lengths", "8,16", "--rounds", 3, "--output-tokens", 4, "--json", tmp_path / "split.json")
    assert result.exit_code == 0, result.output
    paths = [headers["x-diptych-path"] for headers in stub.headers if "x-diptych-path" in headers]
    assert len(paths) == 2 * 3 * (WARM_UPS + 3)
    assert paths[:9] == ["split", "local", "alone", "split", "alone", "local", "local", "split", "alone"]
    orders = [tuple(paths[i : i + 3]) for i in range(0, 18, 3)]
    assert len(set(orders)) == 6
    prompts = [tuple(body["prompt"]) for body in stub.bodies]
    assert len(set(prompts)) == len(prompts)
    assert [len(prompt) for prompt in prompts] == [8] * 3 * (WARM_UPS + 3) + [16] * 3 * (WARM_UPS + 3)
    report = json.loads((tmp_path / "split.json").read_text())
    assert [(row["prompt_tokens"], row["rounds"]) for row in report["rows"]] == [(8, 3), (16, 3)]
    assert (report["split_url"], report["colocated_url"]) == (stub.url, None)
    assert [other["name"] for other in report["rows"][0]["others"]] == ["local", "alone"]


def test_each_run_has_prompts_that_no_cache_knows(stub) -> None:
    for _ in range(2):
        assert invoke("--url", stub.url, "--lengths", "8", "--rounds", 1).exit_code == 0
    prompts = [tuple(body["prompt"]) for body in stub.bodies]
    assert len(set(prompts)) == len(prompts)


def test_a_second_deployment_needs_no_header(stub) -> None:
    """Both names lead to the stub here."""
    other = stub.url.replace("127.0.0.1", "localhost")
    assert invoke("--url", stub.url, "--colocated-url", other, "--lengths", "8", "--rounds", 2).exit_code == 0
    assert not any("x-diptych-path" in headers for headers in stub.headers)
    hosts = [headers["host"].split(":")[0] for headers in stub.headers[2:]]
    assert hosts == ["127.0.0.1", "localhost", "localhost", "127.0.0.1"] * (WARM_UPS // 2 + 1)


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ({"status": 400}, "http_error"),
        ({"per_chunk": 8}, "answer in 1 chunks"),
        ({"tpot_s": 0.002, "cached_share": 0.5}, "4 of 8 tokens cached"),
    ],
    ids=["refused", "no second token", "cached"],
)
def test_what_cannot_be_compared_ends_the_run(stub, behaviour, fault, said) -> None:
    stub.behave = lambda index: behaviour(**{"cached_share": 0.0} | fault)
    result = invoke("--url", stub.url, "--lengths", "8", "--rounds", 1)
    assert result.exit_code == 2
    assert said in result.output


@pytest.mark.parametrize(
    ("lengths", "said"),
    [
        ("1k", "--lengths '1k': numbers from 1 on"),
        ("", "--lengths names no length"),
        (",", "--lengths names no length"),
        ("8,4089", "--lengths 4089 and --output-tokens 8 are 4097 tokens, 'stub' takes 4096: prompts of up to 4088 fit"),
    ],
)
def test_lengths_that_cannot_be_measured_are_a_usage_error(stub, lengths: str, said: str) -> None:
    result = invoke("--url", stub.url, "--lengths", lengths, "--rounds", 1)
    assert result.exit_code == 2
    assert said in result.output
    assert not stub.bodies, "load was sent"
