"""A network namespace joined to this one by a veth pair: two hosts and the cable between them, which can be cut."""

import ctypes
import os
import subprocess
from pathlib import Path

CLONE_NEWNET, CLONE_NEWNS = 0x40000000, 0x00020000
MS_REC, MS_SLAVE = 0x4000, 0x80000


class Cable:
    def __init__(self) -> None:
        self.name = f"dx{os.getpid()}"
        self.device = f"{self.name}a"                   # this side's

    def _ip(self, *words: str) -> None:
        try:
            subprocess.run(["ip", *words], check=True, capture_output=True, text=True, timeout=10)
        except subprocess.CalledProcessError as error:
            raise OSError(f"ip {' '.join(words)}: {error.stderr.strip()}") from None

    def lay(self) -> None:
        """Raises OSError: no `ip`, or namespaces are not allowed."""
        far = f"{self.name}b"
        self._ip("netns", "add", self.name)
        self._ip("link", "add", self.device, "type", "veth", "peer", "name", far, "netns", self.name)
        self._ip("addr", "add", "198.18.77.1/24", "dev", self.device)
        self._ip("-n", self.name, "addr", "add", "198.18.77.2/24", "dev", far)
        self._ip("-n", self.name, "link", "set", far, "up")
        self.join()

    def cut(self) -> None:
        self._ip("link", "set", self.device, "down")

    def join(self) -> None:
        self._ip("link", "set", self.device, "up")

    def remove(self) -> None:
        """The veth pair goes with its namespace."""
        if Path("/run/netns", self.name).exists():
            self._ip("netns", "del", self.name)


def enter_network(name: str) -> None:
    """This process goes into a named network namespace, with a /sys of its own: UCX looks there for its devices."""
    libc = ctypes.CDLL(None, use_errno=True)
    with Path("/run/netns", name).open() as namespace:
        calls = [
            libc.setns(namespace.fileno(), CLONE_NEWNET),
            libc.unshare(CLONE_NEWNS),
            libc.mount(b"none", b"/", None, MS_REC | MS_SLAVE, None),
            libc.mount(name.encode(), b"/sys", b"sysfs", 0, None),
        ]
    if any(calls):
        raise OSError(ctypes.get_errno(), f"network namespace {name}: {calls}")
    os.environ["UCX_NET_DEVICES"] = f"{name}b"
