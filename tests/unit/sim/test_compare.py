"""The command that compares policies: what it prints, and what it refuses before it simulates anything."""

import json
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from diptych.sim.compare import app

SMALL = ("--workers", "2", "--gateways", "1", "--requests", "60", "--warm-s", "0")


def invoke(*options: object) -> Result:
    return CliRunner().invoke(app, [str(each) for each in options])


def test_it_says_who_keeps_how_much_and_by_how_much_goodput_is_ahead(tmp_path: Path) -> None:
    result = invoke(*SMALL, "--rates", "10,80", "--policies", "goodput,round_robin", "--stretches", 2, "--json", tmp_path / "points.json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert set(found) == {f"{policy}, {plant}" for policy in ("goodput", "round_robin") for plant in ("1P+1D", "2 colocated")}
    assert "goodput beside the best of the other policies" in result.stderr
    points = json.loads((tmp_path / "points.json").read_bytes())
    assert {point["attainment"]["total"] for point in points} == {120}


def test_without_goodput_nothing_is_beside_it() -> None:
    result = invoke(*SMALL, "--rates", "5", "--policies", "round_robin", "--plants", "colocated")
    assert result.exit_code == 0, result.output
    assert "beside" not in result.stderr


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--rates", "5,inf"), "finite"),
        (("--rates", "nan"), "finite"),
        (("--rates", "5,5"), "rising"),
        (("--rates", "0,5"), "positive"),
        (("--rates", "five"), "numbers"),
        (("--policies", "fastest"), "known"),
        (("--plants", "merged"), "known"),
        (("--machine", "abacus"), "known"),
        (("--rates", "5,60", "--warm-s", "2"), "at 60/s"),
        (("--json", "/nowhere/points.json"), "there is no folder"),
        (("--png", "/nowhere/curves.png"), "there is no folder"),
        (("--long", "--trace", __file__), "--long is a workload of its own"),
        (("--trace", __file__), "before it simulates anything"),
    ],
)
def test_what_cannot_be_compared_is_refused_at_once(options: tuple[str, ...], said: str) -> None:
    result = invoke(*SMALL, *options)
    assert result.exit_code == 2, result.output
    assert said in " ".join(result.stderr.replace("│", " ").split())


def test_a_stretch_must_lie_within_the_trace(tmp_path: Path) -> None:
    trace = tmp_path / "conv.csv"
    lines = [f"2023-11-16 18:15:{i:02}.0000000,100,10" for i in range(40)]
    trace.write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *lines]))
    options = ("--workers", 2, "--warm-s", 0, "--rates", 5, "--policies", "goodput", "--plants", "colocated", "--trace", trace)
    assert invoke(*options, "--requests", 20, "--stretches", 2).exit_code == 0
    for more, said in ((("--skip", 40), "holds 40 requests"), (("--requests", 21, "--stretches", 2), "2 stretches of 20 requests")):
        result = invoke(*options, *more)
        assert result.exit_code == 2
        assert said in " ".join(result.stderr.replace("│", " ").split())
