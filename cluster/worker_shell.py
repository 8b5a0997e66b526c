"""A prefill or decode worker's process."""

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec

from ..engine.config import WorkerConfig
from ..messages.membership import Membership, Role
from ..messages.requests import LoadReport
from ..messages.zmq_post import Keyring, ZmqPost
from .garbage import settle
from .processes import Standing, nowhere
from .pulse import Pulse
from .shell import Shell

if TYPE_CHECKING:
    from ..engine.worker import Worker

logger = logging.getLogger(__name__)


class WorkerShell(Shell):
    _worker: "Worker"

    def __init__(self, role: Role, config: WorkerConfig, keyring: Keyring, here: Callable[[], Standing] = nowhere) -> None:
        self._role = role
        self._config = config
        super().__init__(keyring, config.host, here)

    def build(self, post: ZmqPost) -> None:
        self._worker = make_worker(self._role, self._config, post)
        settle()
        logger.info("%s epoch %d serves at %s", self._config.worker_id, self._config.epoch, post.address)

    def run(self) -> None:
        self._worker.run()

    def close(self) -> None:
        self._worker.close()

    def stop(self) -> None:
        self._worker.stop()

    def begin_drain(self) -> None:
        self._worker.drain()

    def tell(self, membership: Membership) -> None:
        self._worker.update_membership(membership)

    def describe(self, pulse: Pulse) -> Pulse:
        status = self._worker.status()
        return msgspec.structs.replace(
            pulse,
            member=self._worker.member,
            load=status.load,
            drained=status.draining and is_idle(status.load),
            still_s=self._worker.still_s,
            links=status.links,
        )


def make_worker(role: Role, config: WorkerConfig, post: ZmqPost) -> "Worker":
    """Imports torch, which is why it does so here: the controller names the shell's class and has no use for the rest."""
    from ..decode_worker.worker import DecodeWorker
    from ..prefill_worker.worker import PrefillWorker

    return {Role.PREFILL: PrefillWorker, Role.DECODE: DecodeWorker}[role](config, post)


def is_idle(load: LoadReport) -> bool:
    return load.num_waiting == load.num_running == load.num_reserved == 0
