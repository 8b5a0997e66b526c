"""The command as a user has it: options in, exit code, table, JSON and PNG out."""

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import typer
from tokenizers import Tokenizer, models, pre_tokenizers
from typer.testing import CliRunner, Result

from diptych.cluster.bench.command import app

FAST = ["--output-mean", "3", "--prompt-mean", "8", "--ttft-ms", "1000", "--tpot-ms", "500"]


def invoke(*arguments: object) -> Result:
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, [str(argument) for argument in arguments])


def queue_of(behaviour, service_s: float):
    """One server, one request at a time: TTFT grows once requests come faster than 1/service_s."""
    free_at_s = 0.0

    def behave(index: int):
        nonlocal free_at_s
        now_s = time.monotonic()
        free_at_s = max(now_s, free_at_s) + service_s
        return behaviour(ttft_s=free_at_s - now_s)

    return behave


def test_one_run_of_a_trace(stub, tmp_path: Path) -> None:
    trace, report = tmp_path / "azure.csv", tmp_path / "report.json"
    rows = "".join(f"2023-11-16 18:15:{second:02}.5,{100 * second + 1},4\n" for second in range(20))
    trace.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n" + rows)
    result = invoke("--url", stub.url, "--trace", trace, "--rate", 50, "--max-context", 64, "--scale-lengths", "--json", report, *FAST[4:])
    assert result.exit_code == 0, result.output
    assert "TTFT ≤ 1000 ms & TPOT ≤ 500 ms" in result.output
    content = json.loads(report.read_text())
    (run,) = content["runs"]
    assert (run["ok"], run["wrong_length"], run["wrong_prompt_length"]) == (20, 0, 0)
    assert run["rate_asked"] == 50
    assert run["attainment"]["share"] == 1.0
    assert content["workload"]["source"] == "azure.csv"
    assert max(len(body["prompt"]) + body["max_tokens"] for body in stub.bodies) <= 64


@pytest.mark.parametrize("command", ["serve", "gateway", "engine", "transfer", "split"])
def test_a_report_that_could_not_be_written_is_refused_before_anything_is_measured(command: str, tmp_path: Path) -> None:
    needed = {"serve": ("--url", "http://127.0.0.1:1"), "split": ("--url", "http://127.0.0.1:1"), "engine": (tmp_path,)}.get(command, ())
    result = invoke(command, *needed, "--json", tmp_path / "nowhere" / "report.json")
    assert result.exit_code == 2
    assert "there is no folder" in result.output


def test_serve_is_the_default_and_json_alone_goes_to_the_standard_output(stub) -> None:
    result = invoke("serve", "--url", stub.url, "--requests", 5, "--rate", 100, "--json", "-", *FAST)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["runs"][0]["ok"] == 5
    assert "serve" in invoke("--help").stdout


def test_sweep_with_a_picture_and_new_prompts_at_each_rate(stub, tmp_path: Path) -> None:
    picture = tmp_path / "a.png"
    result = invoke("--url", stub.url, "--requests", 5, "--rates", "50,100", "--json", "-", "--png", picture, *FAST)
    assert result.exit_code == 0, result.output
    assert [run["rate_asked"] for run in json.loads(result.stdout)["runs"]] == [50, 100]
    assert picture.read_bytes().startswith(b"\x89PNG")
    prompts = {tuple(body["prompt"]) for body in stub.bodies}
    assert len(prompts) == 10


def test_the_server_is_told_the_objective_where_that_is_asked_for(stub) -> None:
    def told(*options: object) -> list[tuple[str | None, str | None]]:
        before = len(stub.headers)
        result = invoke("--url", stub.url, "--requests", 3, "--rate", 100, *FAST[:4], *options)
        assert result.exit_code == 0, result.output
        names = ("x-diptych-ttft-ms", "x-diptych-tpot-ms")
        return [tuple(headers.get(name) for name in names) for headers in stub.headers[before + 1 :]]

    assert told("--ttft-ms", 200, "--tpot-ms", 12.5, "--tell-objective") == [("200", "12.5")] * 3
    assert told("--tpot-ms", 12.5, "--tell-objective") == [(None, "12.5")] * 3
    assert told("--ttft-ms", 200, "--tpot-ms", 12.5) == [(None, None)] * 3
    assert invoke("--url", stub.url, "--requests", 3, "--tell-objective", *FAST[:4]).exit_code == 2


def test_a_later_command_makes_new_prompts_of_the_same_lengths_unless_it_is_told_which(stub) -> None:
    def prompts(*options: object) -> list[tuple[int, ...]]:
        before = len(stub.bodies)
        result = invoke("--url", stub.url, "--requests", 5, "--rate", 100, "--prompt-sigma", 0.5, "--json", "-", *FAST, *options)
        assert result.exit_code == 0, result.output
        seeds.append((json.loads(result.stdout)["seed"], json.loads(result.stdout)["prompt_seed"]))
        return sorted(tuple(body["prompt"]) for body in stub.bodies[before:])

    seeds: list[tuple[int, int]] = []
    first, second = prompts("--seed", 3), prompts("--seed", 3)
    assert sorted(map(len, first)) == sorted(map(len, second))
    assert not set(first) & set(second)
    assert prompts("--seed", 3, "--prompt-seed", seeds[0][1]) == first
    assert [seed for seed, _ in seeds] == [3, 3, 3]
    assert seeds[2] == seeds[0]


def test_goodput_of_a_server_with_a_queue(stub, behaviour, tmp_path: Path) -> None:
    stub.behave = queue_of(behaviour, 0.01)
    search = ["--goodput", "--rate", 40, "--requests", 400, "--probe-s", 1, "--resolution", 0.5, "--gpus", 2]
    result = invoke("--url", stub.url, *search, "--json", "-", "--png", tmp_path / "a.png", "--output-mean", 1, "--ttft-ms", 100)
    assert result.exit_code == 0, result.output
    goodput = json.loads(result.stdout)["goodput"]
    assert goodput["search"]["phase"] == "found"
    assert 10 <= goodput["search"]["rate"] <= 150                   # 100/s is all that 10 ms a request can give for long
    assert goodput["per_gpu"] == goodput["search"]["rate"] / 2
    assert (tmp_path / "a.png").exists()
    assert "requests/s/GPU" in result.stderr


def test_goodput_of_a_generated_workload_takes_as_many_requests_as_its_probes_need(stub, behaviour) -> None:
    stub.behave = queue_of(behaviour, 0.004)
    search = ["--goodput", "--rate", 150, "--probe-s", 0.5, "--resolution", 1, "--ttft-ms", 100]
    result = invoke("--url", stub.url, *search, "--json", "-", "--prompt-mean", 8, "--output-mean", 1)
    content = json.loads(result.stdout)
    assert content["workload"]["requests"] == max(run["planned"] for run in content["runs"])
    assert all(run["planned"] >= run["rate_asked"] * 0.5 for run in content["runs"])


def test_goodput_beyond_a_short_workload_is_not_told(stub, behaviour) -> None:
    """All of 20 requests at 40/s would be answered in time, at 20/s for long."""
    stub.behave = queue_of(behaviour, 0.05)
    search = ["--goodput", "--rate", 40, "--requests", 20, "--probe-s", 2]
    result = invoke("--url", stub.url, *search, "--prompt-mean", 8, "--output-mean", 1, "--ttft-ms", 3000)
    assert result.exit_code == 0, result.output
    text = " ".join(result.output.split())
    assert "goodput at least 10 requests/s/GPU" in text
    assert "too short to tell above that: 20 requests/s for --probe-s takes 40 requests" in text
    assert "surely" not in text


def test_a_search_is_refused_at_once_if_a_later_probe_would_not_fit(stub) -> None:
    lengths = ["--prompt-mean", 1000, "--prompt-sigma", 0.5, "--output-mean", 1]
    result = invoke("--url", stub.url, "--goodput", "--probe-s", 0.1, "--ttft-ms", 1000, *lengths)
    assert result.exit_code == 2
    assert "give --max-context 4096" in result.output
    assert not stub.bodies


def test_goodput_of_a_server_that_refuses_all_gives_1(stub, behaviour) -> None:
    stub.behave = lambda index: behaviour(status=429)
    result = invoke("--url", stub.url, "--goodput", "--rate", 500, "--requests", 40, "--probe-s", 0, *FAST)
    assert result.exit_code == 1
    assert "not even at 31.2 requests/s 90% of requests met both" in result.output


def test_chat(stub, tmp_path: Path) -> None:
    vocab = {token: index for index, token in enumerate(["?", *(f"Ġ{word}" for word in ("red", "green", "blue"))])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    result = invoke("--url", stub.url, "--requests", 3, "--rate", 100, "--mode", "chat", "--tokenizer", tmp_path, "--json", "-", *FAST)
    assert result.exit_code == 0, result.output
    assert [len(body["messages"][0]["content"].split()) for body in stub.bodies] == [8, 8, 8]
    assert {body["path"] for body in stub.bodies} == {"/v1/chat/completions"}


def test_failed_requests_give_1(stub, behaviour) -> None:
    stub.behave = lambda index: behaviour(status=500) if index == 2 else behaviour()
    result = invoke("--url", stub.url, "--requests", 5, "--rate", 100, *FAST)
    assert result.exit_code == 1
    assert "4 ok, 1 http_error" in result.output
    assert "said no" in result.output


def test_answers_of_another_length_are_told(stub, behaviour) -> None:
    stub.behave = lambda index: behaviour(tokens=2)
    assert "5 answers of another length" in invoke("--url", stub.url, "--requests", 5, "--rate", 100, *FAST).output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--goodput"], "needs an objective"),
        (["--goodput", "--rates", "1,2", "--ttft-ms", "1"], "takes no --rates"),
        (["--rates", "1;2"], "numbers with commas"),
        (["--rates", "1", "--rate", "1"], "not both"),
        (["--rates", "4,0"], "rate must be > 0 requests/s, and finite: got 0.0"),
        (["--rates", "50,inf"], "got inf"),
        (["--rates", "50,-1"], "got -1.0"),
        (["--rates", "50,nan"], "got nan"),
        (["--goodput", "--rate", "0", "--ttft-ms", "1"], "rate must be > 0"),
        (["--rate", "inf"], "got inf"),
        (["--rate", "0"], "rate must be > 0"),
        (["--rate", "nan"], "rate must be > 0"),
        (["--scale-lengths"], "needs --max-context"),
        (["--prompt-mean", "5000"], "give --max-context 4096"),
        (["--trace", "absent.csv"], "cannot be read"),
        (["--arrivals", "uniform"], "uniform"),
        (["--mode", "chat"], "need --tokenizer"),
        (["--prefix-tokens", "-1"], "prefix-tokens"),
    ],
)
def test_bad_usage_gives_2(stub, arguments: list[str], message: str) -> None:
    result = invoke("--url", stub.url, "--requests", 5, *arguments)
    assert result.exit_code == 2
    assert message in result.output
    assert not stub.bodies, "load was sent"


def test_an_unusable_endpoint_gives_3(stub) -> None:
    stub.models_status = 500
    assert invoke("--url", stub.url).exit_code == 3
    assert invoke("--url", "nowhere").exit_code == 3


def test_an_unwritable_report_is_told(stub, tmp_path: Path) -> None:
    result = invoke("--url", stub.url, "--requests", 2, "--rate", 100, "--json", tmp_path, *FAST)
    assert result.exit_code == 2
    assert "the report cannot be written" in result.output


def test_ctrl_c_prints_the_partial_report(stub, behaviour) -> None:
    stub.behave = lambda index: behaviour() if index < 3 else behaviour(hang_after=1)

    def press_ctrl_c() -> None:
        deadline_s = time.monotonic() + 20
        while len(stub.bodies) < 5 and time.monotonic() < deadline_s:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=press_ctrl_c)
    thread.start()
    result = invoke("--url", stub.url, "--requests", 20, "--rate", 5, "--json", "-", *FAST)
    thread.join()
    assert result.exit_code == 130, result.output
    (run,) = json.loads(result.stdout)["runs"]
    assert run["interrupted"]
    assert run["planned"] == 20
    assert run["outcomes"]["ok"] == 3
    assert run["outcomes"]["cancelled"] >= 2
    assert "interrupted after" in result.stderr


def test_it_hangs_as_a_group_under_another_application(stub) -> None:
    outer = typer.Typer()
    outer.command("other")(lambda: None)
    outer.add_typer(app, name="bench")
    result = CliRunner().invoke(outer, ["bench", "--url", stub.url, "--requests", "2", "--rate", "100", *FAST])
    assert result.exit_code == 0, result.output
