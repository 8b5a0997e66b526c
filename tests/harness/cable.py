"""Two network namespaces joined by a veth pair: two hosts and the cable between them, which can be cut.

Both are apart from this machine's own network: a UCX that starts meanwhile would take an interface there for one of its ways, and lose it.
"""

import ctypes
import os
import subprocess
from pathlib import Path

CLONE_NEWNET, CLONE_NEWNS = 0x40000000, 0x00020000
MS_REC, MS_SLAVE = 0x4000, 0x80000


class Cable:
    def __init__(self) -> None:
        self.near, self.far = f"dx{os.getpid()}a", f"dx{os.getpid()}b"       # the namespaces, and the interface in each

    def _ip(self, *words: str) -> None:
        try:
            subprocess.run(["ip", *words], check=True, capture_output=True, text=True, timeout=10)
        except subprocess.CalledProcessError as error:
            raise OSError(f"ip {' '.join(words)}: {error.stderr.strip()}") from None

    def lay(self, is_whole_host: bool = False) -> None:
        """`is_whole_host`: with a loopback, and a way to everywhere. Raises OSError: no `ip`, or namespaces are not allowed."""
        for name in (self.near, self.far):
            self._ip("netns", "add", name)
        self._ip("link", "add", self.near, "netns", self.near, "type", "veth", "peer", "name", self.far, "netns", self.far)
        for name, address in ((self.near, "198.18.77.1/24"), (self.far, "198.18.77.2/24")):
            self._ip("-n", name, "addr", "add", address, "dev", name)
            self._ip("-n", name, "link", "set", name, "up")
            if is_whole_host:
                self._ip("-n", name, "link", "set", "lo", "up")
                self._ip("-n", name, "route", "add", "default", "dev", name)

    def cut(self) -> None:
        self._ip("-n", self.near, "link", "set", self.near, "down")

    def join(self) -> None:
        self._ip("-n", self.near, "link", "set", self.near, "up")

    def remove(self) -> None:
        """The veth pair goes with a namespace."""
        for name in (self.near, self.far):
            if Path("/run/netns", name).exists():
                self._ip("netns", "del", name)


def enter_network(name: str) -> None:
    """This thread and those that it starts go into a cable's namespace, with a /sys of their own: UCX looks there for its devices."""
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
    os.environ["UCX_NET_DEVICES"] = name
