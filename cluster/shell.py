"""The process around one member: its own thread lives the member's life, Ray's thread answers the controller.

    member thread:  Post ─► build (load the model, bind the port) ─► run ─────────────► close ─► ENDED
                              │ fails: FAILED, the text is kept       │ raises: logged, exit at once
    Ray's thread:   pulse()   update_membership()   drain()   leave()

That Ray's thread answers proves nothing about the member's, so the pulse says for how long that one has not moved (`still_s`).

Fail-closed: a member in doubt about its own state does not go on. Ray carries these four calls, a gateway's `explain`, and nothing else.
"""

import logging
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable

import msgspec

from ..messages.errors import DiptychError
from ..messages.membership import Membership
from ..messages.zmq_post import Keyring, ZmqPost
from .lives import NOTHING_HEARD, Heard
from .processes import Standing, began_s, nowhere
from .pulse import Pulse, ShellState

logger = logging.getLogger(__name__)

EXIT_FAULT = 70                               # EX_SOFTWARE


class Shell(ABC):
    def __init__(self, keyring: Keyring, host: str | None, here: Callable[[], Standing] = nowhere) -> None:
        """`host`: the interface for messages; None: at the address of the host, which `here` tells."""
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
        self._keyring = keyring
        standing = here()
        self._node_id, self._host = standing.node_id, host or standing.address
        self._began_s = began_s(os.getpid())
        self._state = ShellState.STARTING
        self._heard = NOTHING_HEARD
        self._error: DiptychError | Exception | None = None
        threading.Thread(target=self._live, name="member", daemon=True).start()

    # called by the controller through Ray

    def pulse(self) -> bytes:
        pulse = Pulse(os.getpid(), self._began_s, self._state, self._heard, node_id=self._node_id, host=self._host)
        if self._state is ShellState.FAILED:
            text = f"{type(self._error).__name__}: {self._error}"
            pulse = msgspec.structs.replace(pulse, error=text, is_typed=isinstance(self._error, DiptychError))
        elif self._state is ShellState.SERVING:
            pulse = self.describe(pulse)
        elif self._state is ShellState.ENDED:
            pulse = msgspec.structs.replace(pulse, drained=True)
        return msgspec.msgpack.encode(pulse)

    def update_membership(self, encoded: bytes) -> None:
        if self._state is ShellState.SERVING:
            membership = msgspec.msgpack.decode(encoded, type=Membership)
            self.tell(membership)
            self._heard = Heard(membership.version, membership.next_epoch)

    def drain(self) -> None:
        if self._state is ShellState.SERVING:
            self.begin_drain()

    def leave(self) -> None:
        """Frees what the member holds; the process is killed once it has ENDED, or soon in any case."""
        if self._state is ShellState.SERVING:
            self.stop()

    # the member thread

    def _live(self) -> None:
        try:
            post = ZmqPost(self._keyring, self._host)
            self.build(post)
        except Exception as error:
            logger.exception("cannot start")
            self._error, self._state = error, ShellState.FAILED
            return
        self._state = ShellState.SERVING
        try:
            self.run()
            self.close()
            post.close()
        except BaseException:
            logger.exception("ended by a fault")
            os._exit(EXIT_FAULT)
        self._state = ShellState.ENDED

    # a role's own

    @abstractmethod
    def build(self, post: ZmqPost) -> None: ...
    @abstractmethod
    def run(self) -> None: ...
    @abstractmethod
    def close(self) -> None: ...
    @abstractmethod
    def stop(self) -> None: ...
    @abstractmethod
    def begin_drain(self) -> None: ...
    @abstractmethod
    def tell(self, membership: Membership) -> None: ...
    @abstractmethod
    def describe(self, pulse: Pulse) -> Pulse:
        """`pulse` with what the controller needs to know of a serving member."""
