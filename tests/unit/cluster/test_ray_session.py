"""What commands leave of themselves, whatever ends them. Ray is played: by a process that sleeps, and by nothing at all."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness.ports import shared_by_a_stranger

from diptych.cluster import ray_head, ray_join, ray_session, records
from diptych.cluster.controller import Phase
from diptych.cluster.pulse import DeploymentStatus
from diptych.cluster.ray_head import Head, stop_head
from diptych.cluster.ray_session import Deployment
from diptych.cluster.records import Record
from diptych.cluster.spec import RouterSpec, Spec, parse_spec
from diptych.messages.errors import ClusterError, SpecError, TakenDown

ADDRESS = "127.0.0.1:1"
LIMIT_S = 30.0
SLEEP = [sys.executable, "-c", "import time; time.sleep(60)"]
UP = """
import signal, sys
signal.signal(signal.SIGHUP, signal.SIG_DFL)          # the tests' own process may run under nohup
from diptych.cluster import cli, ray_head
ray_head._command = lambda folder, num_cpus: [sys.executable, "-c", "import time; time.sleep(60)"]
sys.argv = ["diptych", "up", sys.argv[1]]
cli.main()
"""


@pytest.fixture(autouse=True)
def own_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in [name for name in os.environ if name.startswith("RAY_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))           # where a running Ray would be noted
    yield
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    for record in records.read_all():
        if record.head is not None:
            stop_head(record.head)


@pytest.fixture
def spec() -> Spec:
    return parse_spec({"name": "tiny", "model": {"path": "embedded"}, "pools": {"decode": {"workers": 1}}}, Path())


@pytest.fixture
def heads(monkeypatch: pytest.MonkeyPatch) -> list[Head]:
    """Those that have been started; each has its address at once."""
    started: list[Head] = []

    def wait_for_address(folder: Path, process: "subprocess.Popen[bytes]") -> str:
        record = records.find("tiny")
        assert record is not None, "before anything slow"
        assert record.head is not None
        assert (record.address, record.head.pid) == ("", process.pid)
        started.append(record.head)
        return ADDRESS

    monkeypatch.setattr(ray_head, "_command", lambda folder, num_cpus: SLEEP)
    monkeypatch.setattr(ray_head, "_wait_for_address", wait_for_address)
    return started


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_session, "join", lambda record: None)
    monkeypatch.setattr(ray_session, "_find_controller", lambda name: None)
    monkeypatch.setattr(ray_session, "_check_hosts", lambda spec: None)
    monkeypatch.setattr(ray_session, "_start_controller", lambda spec: object())


def test_a_head_is_recorded_before_it_has_an_address(spec: Spec, heads: list[Head], no_ray: None) -> None:
    record = ray_session.launch(spec).record
    assert records.find("tiny") == record
    assert record.address == ADDRESS
    assert record.head is not None
    assert record.head.pid == heads[0].pid


@pytest.mark.parametrize("error", [ClusterError("no room"), SystemExit(143)])
def test_a_launch_that_fails_leaves_no_head_and_no_record(
    error: BaseException, spec: Spec, heads: list[Head], no_ray: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(record: Record) -> None:
        raise error

    monkeypatch.setattr(ray_session, "join", fail)
    with pytest.raises(type(error)):
        ray_session.launch(spec)
    assert not heads[0].is_alive
    assert records.read_all() == []


def test_one_command_at_a_time_starts_a_deployment(spec: Spec, heads: list[Head], no_ray: None) -> None:
    with records.hold("tiny"), pytest.raises(SpecError, match=r"another command is starting or stopping a deployment 'tiny'$"):
        ray_session.launch(spec)
    with records.hold("other"):
        ray_session.launch(spec)
    assert len(heads) == 1


def test_what_another_start_has_written_stays(tmp_path: Path) -> None:
    mine, theirs = (Record("tiny", ADDRESS, Head(os.getpid(), began, ADDRESS, str(tmp_path))) for began in (1.0, 2.0))
    records.write(theirs)
    records.remove(mine)
    assert (records.folder() / "tiny.json").exists()
    records.remove(theirs)
    assert not (records.folder() / "tiny.json").exists()


def test_without_a_folder_for_records_nothing_is_started(
    spec: Spec, heads: list[Head], no_ray: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", "/proc/nope")
    with pytest.raises(ClusterError, match=r"^/proc/nope.*: No such file or directory"):
        ray_session.launch(spec)
    assert heads == []


@pytest.fixture
def starting(tmp_path: Path) -> Iterator[tuple["subprocess.Popen[str]", Record]]:
    """An `up` whose head has no address yet."""
    path = tmp_path / "tiny.yaml"
    path.write_text("{name: tiny, model: {path: embedded}, pools: {decode: {workers: 1}}}")
    up = subprocess.Popen([sys.executable, "-c", UP, str(path)], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + LIMIT_S
    while (record := records.find("tiny")) is None:
        assert time.monotonic() < deadline
        assert up.poll() is None, up.communicate()
        time.sleep(0.05)
    yield up, record
    up.kill()
    up.communicate()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_what_up_has_started(number: signal.Signals, starting: tuple["subprocess.Popen[str]", Record]) -> None:
    up, record = starting
    up.send_signal(number)
    assert up.wait(LIMIT_S) == 128 + number
    assert record.head is not None
    assert not record.head.is_alive
    assert records.read_all() == []


def test_ray_takes_no_commands_handler_away() -> None:
    heard: list[str] = []
    before = signal.signal(signal.SIGTERM, lambda *_: heard.append("ours"))
    try:
        with ray_join._own_sigterm():
            signal.signal(signal.SIGTERM, lambda *_: heard.append("Ray's"))
            signal.pthread_kill(threading.get_ident(), signal.SIGTERM)
            assert heard == [], "it waits"
        assert heard == ["ours"]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_down_stops_the_head_of_an_up_that_was_killed(starting: tuple["subprocess.Popen[str]", Record]) -> None:
    up, record = starting
    with pytest.raises(SpecError, match="another command is starting"), records.hold("tiny"):
        pass
    up.kill()
    up.wait(LIMIT_S)
    ray_session.take_down("tiny", lambda status: None)
    assert record.head is not None
    assert not record.head.is_alive
    assert records.read_all() == []


def test_a_port_is_shared_with_no_stranger(spec: Spec) -> None:
    with shared_by_a_stranger() as stranger:
        port = stranger.getsockname()[1]
        shared = spec.model_copy(update={"router": RouterSpec(port=port, processes=2)})
        with pytest.raises(ClusterError, match=f"cannot listen on 127.0.0.1:{port}: Address already in use"):
            ray_session._check_port(shared, 0.0)
        threading.Timer(0.2, stranger.close).start()
        ray_session._check_port(shared, LIMIT_S)
    with socket.create_server(("127.0.0.1", port)):
        pass


def test_our_own_head_is_joined_with_its_own_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = Record("tiny", ADDRESS, Head(os.getpid(), 0.0, ADDRESS, str(tmp_path)))
    for record, kept in ((Record("tiny", ADDRESS, None), "another"), (ours, None)):
        monkeypatch.setattr(os, "environ", {"RAY_AUTH_TOKEN": "another"})
        ray_join._set_environment(record)
        assert os.environ.get("RAY_AUTH_TOKEN") == kept
    assert os.environ["RAY_AUTH_TOKEN_PATH"] == str(tmp_path / "token")


class TestWaiting:
    """For a deployment that another command takes down meanwhile."""

    @pytest.fixture
    def waiting(self) -> Deployment:
        record = Record("tiny", ADDRESS, None)
        records.write(record)
        return Deployment(record, None)

    def tell(self, monkeypatch: pytest.MonkeyPatch, status: DeploymentStatus | ClusterError) -> None:
        def answer(deployment: Deployment) -> DeploymentStatus:
            if isinstance(status, ClusterError):
                raise status
            return status

        monkeypatch.setattr(Deployment, "status", answer)

    @pytest.mark.parametrize("phase", [Phase.STOPPING, Phase.STOPPED])
    def test_which_is_stopping(self, phase: Phase, waiting: Deployment, monkeypatch: pytest.MonkeyPatch) -> None:
        self.tell(monkeypatch, DeploymentStatus("tiny", phase, "m", "p", "h", 1, pid=1, drain_s=1.0, places=()))
        with pytest.raises(TakenDown, match="tiny is being taken down by another command"):
            waiting.wait_until_ready(LIMIT_S)

    def test_whose_controller_is_gone(self, waiting: Deployment, monkeypatch: pytest.MonkeyPatch) -> None:
        self.tell(monkeypatch, ClusterError("the actor died"))
        with pytest.raises(ClusterError, match="the actor died"):
            waiting.wait_until_ready(LIMIT_S)
        taken_down = pytest.raises(TakenDown, match="tiny was taken down by another command")
        with records.hold("tiny"), taken_down:
            waiting.wait_until_ready(LIMIT_S)
        records.remove(waiting.record)
        with taken_down:
            waiting.wait_until_ready(LIMIT_S)


@pytest.fixture
def orphan() -> Iterator[Path]:
    """Shared memory of `tiny` whose owner is dead."""
    segment = records.SHM / f"diptych-tiny-decode-0-{os.getpid()}"
    segment.write_bytes(b"kv")
    yield segment
    segment.unlink(missing_ok=True)


SWEPT = r"; 1 segment\(s\) of its shared memory removed$"


class TestSharedRay:
    """One that somebody else has started; it is gone, or another by now."""

    @pytest.fixture(autouse=True)
    def recorded(self, no_ray: None, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(ray_session, "_clear_away", lambda name: 0)
        records.write(Record("tiny", ADDRESS, None))

    def test_which_is_gone_is_forgotten_by_down(self, spec: Spec, heads: list[Head], orphan: Path) -> None:
        with pytest.raises(SpecError, match=f"Ray at {ADDRESS}, where nothing listens; `diptych down tiny` forgets it"):
            ray_session.launch(spec)
        said = ray_session.take_down("tiny", lambda status: None)
        assert re.search(f"tiny is forgotten: nothing listens at {ADDRESS}, where its Ray was{SWEPT}", said)
        assert (records.read_all(), orphan.exists()) == ([], False)
        ray_session.launch(spec)
        assert len(heads) == 1

    def test_which_has_no_such_controller_is_forgotten_by_down(self, orphan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(ray_session, "accepts", lambda address: True)
        said = ray_session.take_down(None, lambda status: None)
        assert re.search(f"tiny is forgotten: Ray at {ADDRESS} has no controller of it{SWEPT}", said)
        assert (records.read_all(), orphan.exists()) == ([], False)

    @pytest.mark.parametrize(
        ("typed", "named"), [("here/bin/diptych", "here/bin/diptych"), ("/bin/pytest", "diptych"), ("/on/path/diptych", "diptych")]
    )
    def test_the_command_is_named_as_it_was_typed(self, typed: str, named: str, spec: Spec, monkeypatch: pytest.MonkeyPatch) -> None:
        """After `make demo` it is not on the user's PATH."""
        monkeypatch.setattr(sys, "argv", [typed, "up", "spec.yaml"])
        monkeypatch.setattr(shutil, "which", lambda name: "/on/path/diptych")
        with pytest.raises(SpecError, match=f"; `{named} down tiny` forgets it"):
            ray_session.launch(spec)
        with pytest.raises(ClusterError, match=f"; `{named} down tiny` stops it"):
            ray_join.join(Record("tiny", "", None))
        monkeypatch.setattr(ray_session, "accepts", lambda address: True)
        monkeypatch.setattr(ray_session, "_find_controller", lambda name: object())
        with pytest.raises(SpecError, match=f"; `{named} down tiny` stops it"):
            ray_session.launch(spec)

    def test_which_has_no_such_controller_is_no_reason_to_refuse(
        self, spec: Spec, heads: list[Head], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(ray_session, "accepts", lambda address: True)
        monkeypatch.setattr(ray_session, "_find_controller", lambda name: object())
        with pytest.raises(SpecError, match="a deployment 'tiny' is running already; `diptych down tiny` stops it"):
            ray_session.launch(spec)
        monkeypatch.setattr(ray_session, "_find_controller", lambda name: None)
        assert ray_session.launch(spec).record.head is not None


def test_with_a_dead_head_goes_the_shared_memory(tmp_path: Path, orphan: Path) -> None:
    records.write(Record("tiny", ADDRESS, Head(os.getpid(), 0.0, ADDRESS, str(tmp_path / "ray"))))
    assert records.read_all() == []
    assert not orphan.exists()


def test_down_sweeps_the_shared_memory_of_what_is_not_there(orphan: Path) -> None:
    with pytest.raises(ClusterError, match=f"no deployment tiny is running{SWEPT}"):
        ray_session.take_down("tiny", lambda status: None)
    assert not orphan.exists()
