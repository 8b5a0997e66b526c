"""A Ray of our own where none is running: one head process tree, on the loopback, with its own token and folder.

    start_head() ──► `ray start --head --block` in a session of its own ──► it outlives the command that started it
    stop_head()  ──► SIGTERM to its leader, SIGKILL to what is left of that session, folder removed; nobody else is touched

No import of Ray: it is started as anybody would start it.
"""

import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil
from msgspec import Struct, structs

from ..messages.errors import ClusterError
from .processes import began_s, find_process, is_dead, kill

START_TIMEOUT_S = 60.0
TERM_GRACE_S = 1.0                            # Ray's own way down may take longer; there is nothing in it to be saved
KILL_TIMEOUT_S = 8.0
KILL_PERIOD_S = 0.5
OBJECT_STORE_BYTES = 80 << 20                 # Ray's smallest that works well; nothing of ours goes through it
SERVES_AS_OTHERS_DO = {"RAY_worker_niceness": "0"}           # by default Ray's processes give way to every other on their host


class Head(Struct, frozen=True):
    pid: int                                  # of the session's leader
    began_s: float                            # since boot
    address: str                              # host:port of Ray's GCS
    folder: str                               # Ray's sessions and logs, the token

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs to join."""
        return head_environment(Path(self.folder))

    @property
    def is_alive(self) -> bool:
        leader = find_process(self.pid, self.began_s)
        return leader is not None and not is_dead(leader)


def head_environment(folder: Path) -> dict[str, str]:
    return {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(folder / "token"),
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",             # despite its name: on any system, makes Ray listen on the loopback alone
        "RAY_USAGE_STATS_ENABLED": "0",
    }


def start_head(num_cpus: int | None = None, begun: Callable[[Head], None] = lambda head: None) -> Head:
    """`begun` hears of the head as soon as its process is there, seconds before it has an address. Raises ClusterError with the end of
    Ray's own output."""
    folder = Path(tempfile.mkdtemp(prefix="diptych-ray-"))    # short: Ray puts Unix sockets below it
    (folder / "token").touch(mode=0o600)
    (folder / "token").write_text(secrets.token_hex(32))
    log = (folder / "head.log").open("wb")
    process = subprocess.Popen(
        _command(folder, num_cpus or os.cpu_count() or 1),
        env=_clean_environment() | SERVES_AS_OTHERS_DO | head_environment(folder),
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    head = Head(process.pid, began_s(process.pid), "", str(folder))
    try:
        begun(head)
        return structs.replace(head, address=_wait_for_address(folder, process))
    except BaseException:
        stop_head(head)
        raise


def stop_head(head: Head) -> None:
    """Also tidies up after one that has died. Raises ClusterError if some process of it survives."""
    members = _members(head)
    for process in members:
        if process.pid == head.pid:
            process.terminate()                               # Ray's own way down
    _wait_until_gone(members, TERM_GRACE_S)
    deadline = time.monotonic() + KILL_TIMEOUT_S
    while alive := _members(head):                            # listed again each time: some start others on their way down
        if time.monotonic() > deadline:
            raise ClusterError(f"processes of Ray's head {head.address} survive SIGKILL: {[process.pid for process in alive]}")
        for process in alive:
            kill(process)
        _wait_until_gone(alive, KILL_PERIOD_S)
    shutil.rmtree(head.folder, ignore_errors=True)


def _command(folder: Path, num_cpus: int) -> list[str]:
    options = {
        "node-ip-address": "127.0.0.1",
        "port": "0",                          # any
        "temp-dir": str(folder),
        "num-cpus": str(num_cpus),
        "object-store-memory": str(OBJECT_STORE_BYTES),
        "include-dashboard": "false",
        "include-log-monitor": "false",
    }
    flags = [f"--{name}={value}" for name, value in options.items()]
    return [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats", *flags]


def _clean_environment() -> dict[str, str]:
    """Nothing of another Ray's."""
    return {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}


def _wait_for_address(folder: Path, process: "subprocess.Popen[bytes]") -> str:
    """Ray writes it once it accepts connections."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            address = (folder / "ray_current_cluster").read_text().strip()
        except FileNotFoundError:
            address = ""
        if address:
            return address
        time.sleep(0.05)
    how = "did not start" if process.poll() is None else f"exited with {process.returncode}"
    output = (folder / "head.log").read_text(errors="replace")[-2000:]
    raise ClusterError(f"Ray's head {how} within {START_TIMEOUT_S:g} s:\n{output}")


def _wait_until_gone(processes: list[psutil.Process], timeout_s: float) -> list[psutil.Process]:
    """Those that are still alive at the deadline. Zombies are dead, though nobody may ever reap them: not every PID 1 does."""
    deadline = time.monotonic() + timeout_s
    while processes and time.monotonic() < deadline:
        time.sleep(0.05)
        processes = [process for process in processes if not is_dead(process)]
    return processes


def _members(head: Head) -> list[psutil.Process]:
    """The living of the head's session, with or without its leader: the kernel keeps a session's number while somebody is in it."""
    if psutil.pid_exists(head.pid) and find_process(head.pid, head.began_s) is None:
        return []                                             # the number is somebody else's by now
    members = []
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == head.pid and not is_dead(process):
                members.append(process)
        except ProcessLookupError:
            continue
    return members
