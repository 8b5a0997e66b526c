"""Commands as they are typed, with their exit codes; what needs a cluster is in tests/ray."""

import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import msgspec
import psutil
import pytest
from rich.console import Console

from diptych.cluster import cli, records
from diptych.cluster.controller import Phase
from diptych.cluster.gateway.decisions import AttemptExplanation, Candidate, ChoiceExplanation, DecisionKind, RequestExplanation
from diptych.cluster.gateway.generation import GenerationState
from diptych.cluster.lives import LifeState
from diptych.cluster.places import PlaceKind
from diptych.cluster.processes import began_s
from diptych.cluster.pulse import DeploymentStatus, PlaceStatus
from diptych.cluster.ray_head import Head
from diptych.cluster.records import Record
from diptych.cluster.tables import deployment_view, duration, size
from diptych.messages.errors import ClusterError, TakenDown
from diptych.messages.ids import Address, Epoch, WorkerId
from diptych.messages.requests import LinkFigures, LinkMeasured, LoadReport, WorkerRef

from .conftest import ScriptedEndpoint


@pytest.fixture(autouse=True)
def own_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))           # where a running Ray would be noted
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def typed(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["diptych", *words])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert isinstance(ended.value.code, int)
    return ended.value.code


def test_help_needs_neither_ray_nor_torch() -> None:
    code = "import sys, diptych.cluster.cli; sys.exit(bool({'ray', 'torch', 'httpx'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0


def test_version(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert typed(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == f"diptych {metadata.version('diptych')}\n"
    assert typed(monkeypatch) == cli.EXIT_USAGE, "a command is still wanted"


def test_a_wrong_spec_is_exit_2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    spec = tmp_path / "spec.yaml"
    spec.write_text("{name: a, model: {path: embedded}, pools: {decode: {workers: 0}}}")
    assert typed(monkeypatch, "up", str(spec)) == cli.EXIT_USAGE
    assert "pools.decode.workers: must be >= 1" in capsys.readouterr().err


def test_up_leaves_alone_what_another_command_takes_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def wait(*_: object) -> None:
        raise TakenDown("a was taken down by another command")

    def stop() -> None:
        raise ClusterError("the actor died")

    spec = tmp_path / "spec.yaml"
    spec.write_text("{name: a, model: {path: embedded}, pools: {decode: {workers: 1}}}")
    monkeypatch.setattr("diptych.cluster.ray_session.launch", lambda spec: SimpleNamespace(wait_until_ready=wait, stop=stop))
    assert typed(monkeypatch, "up", str(spec)) == cli.EXIT_FAILED
    assert capsys.readouterr().err == "a was taken down by another command\n"


@pytest.mark.parametrize("command", ["down", "status", "probe", "top", "chat"])
def test_without_a_deployment_exit_1(command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert typed(monkeypatch, command) == cli.EXIT_FAILED
    assert "no deployment" in capsys.readouterr().err


def test_unknown_option_is_exit_2(monkeypatch: pytest.MonkeyPatch) -> None:
    assert typed(monkeypatch, "status", "--colour") == cli.EXIT_USAGE


def test_a_dead_ray_address_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    assert typed(monkeypatch, "status", "x") == cli.EXIT_FAILED
    assert "RAY_ADDRESS=127.0.0.1:1: nothing listens there" in capsys.readouterr().err


@pytest.mark.parametrize("address", ["auto", "local", "ray://127.0.0.1:10001", "6379"])
def test_a_ray_address_is_host_and_port(address: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    assert typed(monkeypatch, "status", "x") == cli.EXIT_FAILED
    assert f"RAY_ADDRESS={address}: host:port is wanted" in capsys.readouterr().err


def test_one_shot_chat(endpoint: ScriptedEndpoint, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    endpoint.answers("Hello", " [there]")
    assert typed(monkeypatch, "chat", "Hi", "--url", endpoint.url) == 0
    assert capsys.readouterr().out == "Hello [there]\n"


@pytest.mark.parametrize("command", ["chat", "explain"])
@pytest.mark.parametrize(
    ("url", "api_key", "said"),
    [
        ("http://[::1", "secret", "'http://[::1' is not a URL"),
        ("http://999.1.1.1", "secret", "'http://999.1.1.1' is not a URL"),
        ("localhost:8000", "secret", "not of the form http://host:port"),
        ("http://127.0.0.1:1", "schlüssel", "the API key holds characters"),
    ],
)
def test_an_endpoint_that_cannot_be_asked_is_told(
    command: str, url: str, api_key: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DIPTYCH_API_KEY", api_key)
    assert typed(monkeypatch, command, "x", "--url", url) == cli.EXIT_FAILED
    assert said in capsys.readouterr().err


def an_explanation() -> RequestExplanation:
    candidates = (
        Candidate("prefill-0", "decode-1", 0.1234, 0.13, 0.015, 0.25, 1.5, keeps_ttft=True, keeps_tpot=True, chosen=True),
        Candidate(None, "decode-1", None, None, 0.05, 0.25, 9.0, keeps_ttft=False, keeps_tpot=False, chosen=False),
    )
    first = AttemptExplanation(0.01, DecisionKind.ROUTE, "prefill-0", "decode-1", "", 2, candidates, 128.0, 0.39, "decode-1: [lost]")
    second = AttemptExplanation(0.5, DecisionKind.QUEUE, None, None, "no worker is alive", 7, (), None, None)
    choice = ChoiceExplanation(0, "default", 5, 0.4, 0.02, (first, second), GenerationState.QUEUED, "split", 0.2, None, 1, None, "")
    return RequestExplanation("cmpl-a", "mine", (choice,))


class TestExplain:
    def test_as_tables(self, endpoint: ScriptedEndpoint, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        endpoint.pages["/explain/cmpl-a"] = (200, msgspec.json.encode(an_explanation()).decode())
        monkeypatch.setattr(cli, "console", Console(width=200))
        assert typed(monkeypatch, "explain", "cmpl-a", "--url", endpoint.url, "--api-key", "secret") == 0
        assert endpoint.authorizations == ["Bearer secret"]
        shown = capsys.readouterr().out
        for text in (
            "cmpl-a", "mine", "►", "prefill-0 → decode-1", "decode-1 alone", "123.4 ms", "25%", "TTFT and TPOT", "neither",
            "200.0 ms / 400.0 ms", "given up: decode-1: [lost]", "queue: no worker is alive", "found no route 7 times before",
        ):  # fmt: skip
            assert text in shown, text

    def test_as_json(
        self, endpoint: ScriptedEndpoint, monkeypatch: pytest.MonkeyPatch, capsysbinary: pytest.CaptureFixture[bytes]
    ) -> None:
        endpoint.pages["/explain/cmpl-a"] = (200, msgspec.json.encode(an_explanation()).decode())
        assert typed(monkeypatch, "explain", "cmpl-a", "--url", endpoint.url, "--json") == 0
        assert msgspec.json.decode(capsysbinary.readouterr().out, type=RequestExplanation) == an_explanation()

    def test_an_id_is_one_part_of_the_path(self, endpoint: ScriptedEndpoint, monkeypatch: pytest.MonkeyPatch) -> None:
        endpoint.pages["/explain/a%2Fb%3Fc"] = (404, "{}")
        assert typed(monkeypatch, "explain", "a/b?c", "--url", endpoint.url) == cli.EXIT_UNKNOWN
        assert endpoint.paths == ["/explain/a%2Fb%3Fc"]

    @pytest.mark.parametrize(
        ("status", "code", "text"), [(404, cli.EXIT_UNKNOWN, "router.explain"), (401, 1, "HTTP 401"), (200, 1, "no gateway")]
    )
    def test_what_is_not_found_has_its_own_code(
        self, status: int, code: int, text: str,
        endpoint: ScriptedEndpoint, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    ) -> None:  # fmt: skip
        endpoint.pages["/explain/x"] = (status, "{}")
        assert typed(monkeypatch, "explain", "x", "--url", endpoint.url) == code
        assert text in capsys.readouterr().err

    def test_nobody_there(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert typed(monkeypatch, "explain", "x") == cli.EXIT_FAILED
        assert typed(monkeypatch, "explain", "x", "--url", "http://127.0.0.1:1") == cli.EXIT_FAILED
        assert typed(monkeypatch, "explain") == cli.EXIT_USAGE


def test_records_come_and_go() -> None:
    one = Record("one", "127.0.0.1:1", head=None, endpoint="http://127.0.0.1:8000")
    records.write(one)
    assert records.find(None) == records.find("one") == one
    assert records.find("two") is None
    records.write(Record("two", "127.0.0.1:1", head=None))
    with pytest.raises(ClusterError, match="which deployment\\? one, two"):
        records.find(None)
    records.remove(msgspec.structs.replace(one, address="127.0.0.1:2"))
    assert records.find("one") == one, "another start's"
    records.remove(one)
    assert [record.name for record in records.read_all()] == ["two"]


def test_a_record_of_a_dead_head_is_forgotten(tmp_path: Path) -> None:
    alive = psutil.Process()
    records.write(Record("dead", "127.0.0.1:1", Head(alive.pid, began_s(alive.pid) - 1000, "127.0.0.1:1", str(tmp_path))))
    records.write(Record("alive", "127.0.0.1:1", Head(alive.pid, began_s(alive.pid), "127.0.0.1:1", str(tmp_path))))
    assert [record.name for record in records.read_all()] == ["alive"]
    assert records.find("dead") is None


def test_a_damaged_record_is_named() -> None:
    records.write(Record("bad", "127.0.0.1:1", head=None))
    (records.folder() / "bad.json").write_text("{")
    with pytest.raises(ClusterError, match=r"bad\.json"):
        records.read_all()


def a_status(**changes: object) -> DeploymentStatus:
    ref = WorkerRef(WorkerId("decode-0"), Epoch(3), Address("tcp://127.0.0.1:5"))
    load = LoadReport(ref, 1, 20, 2, 0, num_blocks=64, num_free_blocks=60, block_size=16)
    ready = PlaceStatus("decode-0", PlaceKind.DECODE, LifeState.READY, Epoch(3), 77, 61.0, 1, "", False, load, None)
    down = PlaceStatus("decode-1", PlaceKind.DECODE, None, None, None, 0.0, 3, "ModelError: no [weights]", True, None, None)
    status = DeploymentStatus("a", Phase.FAILED, "tiny", "random", "0.0.0.0", 80, pid=1, drain_s=1.0, places=(ready, down))
    return msgspec.structs.replace(status, **changes)


def test_the_view_shows_states_loads_and_errors(capsys: pytest.CaptureFixture[str]) -> None:
    Console(width=200).print(deployment_view(a_status()))
    text = capsys.readouterr().out
    for shown in ("decode-0", "ready", "1m01s", "4/64", "failed", "ModelError: no [weights]", "http://127.0.0.1:80"):
        assert shown in text


def test_the_view_shows_hosts_where_there_are_several(capsys: pytest.CaptureFixture[str]) -> None:
    one, other = a_status().places
    places = [msgspec.structs.replace(place, host=host) for place, host in ((one, "10.0.0.1"), (other, "10.0.0.2"))]
    for shown, seen in ((places, True), (places[:1], False)):
        Console(width=200).print(deployment_view(a_status(places=tuple(shown))))
        assert ("10.0.0.1" in capsys.readouterr().out) is seen


def a_link(gbps: float, min_gbps: float = 0.0, *others: LinkFigures) -> LinkMeasured:
    ref = WorkerRef(WorkerId("prefill-0"), Epoch(3), Address("tcp://127.0.0.1:5"))
    return LinkMeasured(ref, WorkerId("decode-0"), "shm", 2e-5, gbps, 1 << 20, min_gbps, gbps < min_gbps, others)


def answer_with(monkeypatch: pytest.MonkeyPatch, *links: LinkMeasured, num_decode: int = 1) -> None:
    def place(kind: PlaceKind, index: int) -> PlaceStatus:
        return PlaceStatus(f"{kind}-{index}", kind, LifeState.READY, Epoch(3), 77, 61.0, 0, "", False, None, None)

    prefill = msgspec.structs.replace(place(PlaceKind.PREFILL, 0), links=links)
    places = (*(place(PlaceKind.DECODE, i) for i in range(num_decode)), prefill)
    deployment = SimpleNamespace(status=lambda: a_status(places=places))
    monkeypatch.setattr("diptych.cluster.ray_session.find", lambda name: deployment)


@pytest.mark.parametrize(
    ("links", "num_decode", "code", "shown"),
    [
        ([a_link(12.5)], 1, 0, "shm 12.50 GB/s 20 µs"),
        ([a_link(12.5, 0.0, LinkFigures("ucx", 9e-5, 3.25))], 1, 0, "ucx 3.25 GB/s 90 µs"),
        ([a_link(12.5)], 2, cli.EXIT_NOT_READY, "not measured"),
        ([a_link(12.5, min_gbps=40)], 2, cli.EXIT_BELOW_FLOOR, "refused"),
    ],
)
def test_probe_prints_the_matrix_and_ends_with_its_verdict(
    links: list[LinkMeasured],
    num_decode: int,
    code: int,
    shown: str,
    monkeypatch: pytest.MonkeyPatch,
    capsysbinary: pytest.CaptureFixture[bytes],
) -> None:
    answer_with(monkeypatch, *links, num_decode=num_decode)
    monkeypatch.setattr(cli, "console", Console(width=200))
    assert typed(monkeypatch, "probe") == code
    assert shown in capsysbinary.readouterr().out.decode()
    assert typed(monkeypatch, "probe", "--json") == code
    tree = json.loads(capsysbinary.readouterr().out)
    assert (tree[0]["prefill"], tree[0]["decode"], tree[0]["link"]["gbps"], len(tree)) == ("prefill-0", "decode-0", 12.5, num_decode)


def test_json_is_the_whole_status(capsysbinary: pytest.CaptureFixture[bytes]) -> None:
    cli._show(a_status(), as_json=True)
    tree = json.loads(capsysbinary.readouterr().out)
    assert [place["state"] for place in tree["places"]] == ["ready", None]


@pytest.mark.parametrize(
    ("host", "port", "endpoint"),
    [("127.0.0.1", 8, "http://127.0.0.1:8"), ("::", 8, "http://[::1]:8"), ("::1", 8, "http://[::1]:8"), ("0.0.0.0", None, None)],
)
def test_endpoint(host: str, port: int | None, endpoint: str | None) -> None:
    assert a_status(host=host, port=port).endpoint == endpoint


def test_sizes_and_durations() -> None:
    assert [size(n) for n in (0, 1536, 5 << 30)] == ["0 B", "1.5 KiB", "5.0 GiB"]
    assert [duration(s) for s in (5.9, 61, 7260)] == ["5s", "1m01s", "2h01m"]
