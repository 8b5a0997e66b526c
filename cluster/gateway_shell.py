"""A gateway's process.

Its loop is asked how it is by a thread of its own: Ray's thread must not wait for it, or a slow loop would look like a dead process.
"""

import logging
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec

from ..messages.errors import ClusterError
from ..messages.membership import Membership
from ..messages.zmq_post import Keyring, ZmqPost
from .places import PlaceName, gateway_config, mailbox_host
from .processes import Standing, nowhere
from .pulse import Pulse, ShellState
from .shell import Shell
from .spec import Spec

if TYPE_CHECKING:
    from .gateway.server import Gateway

logger = logging.getLogger(__name__)

LISTEN_PERIOD_S = 0.4


class GatewayShell(Shell):
    _gateway: "Gateway"

    def __init__(
        self, spec: Spec, place: PlaceName, keyring: Keyring, here: Callable[[], Standing] = nowhere, last_port: int = 0
    ) -> None:
        """`last_port`: of the place's life before, which clients know; 0: there was none."""
        self._spec = spec
        self._place = place
        self._last_port = last_port
        super().__init__(keyring, mailbox_host(spec), here)

    def build(self, post: ZmqPost) -> None:
        """Imports the HTTP server and the tokenizer here: the controller names this class and has no use for them."""
        from .gateway.server import Gateway

        self._post = post
        try:
            self._gateway = Gateway(gateway_config(self._spec, self._place, self._last_port), post)
        except ClusterError:
            if self._spec.router.port or not self._last_port:
                raise
            self._gateway = Gateway(gateway_config(self._spec, self._place), post)         # somebody else has it by now
        self._last_status = self._gateway.status(), time.monotonic()
        threading.Thread(target=self._listen, name="listener", daemon=True).start()

    def _listen(self) -> None:
        while True:
            try:
                self._last_status = self._gateway.status(), time.monotonic()
            except TimeoutError:
                pass                                 # the loop is busy with something long, or hangs: the last one grows old
            except Exception:
                logger.exception("%s has no status to tell", self._place)
            time.sleep(LISTEN_PERIOD_S)

    def run(self) -> None:
        self._gateway.run()

    def close(self) -> None:
        pass                                     # its port is closed when `run` returns

    def stop(self) -> None:
        self._gateway.stop()

    def begin_drain(self) -> None:
        self._gateway.stop()                     # open answers end first

    def tell(self, membership: Membership) -> None:
        self._gateway.update_membership(membership)

    def explain(self, some_id: str) -> bytes:
        """A RequestExplanation or nil, MessagePack: for a command, through Ray."""
        serving = self._state is ShellState.SERVING
        return msgspec.msgpack.encode(self._gateway.explain(some_id) if serving else None)

    def describe(self, pulse: Pulse) -> Pulse:
        status, answered_at = self._last_status
        return msgspec.structs.replace(pulse, address=self._post.address, gateway=status, still_s=time.monotonic() - answered_at)
