"""What a member's process answers its controller, and the controller a person. MessagePack; neither needs torch to read."""

from enum import StrEnum

from msgspec import Struct

from ..messages.ids import Address, Epoch
from ..messages.membership import Member
from ..messages.requests import LinkMeasured, LoadReport
from .controller import Phase
from .gateway.status import GatewayStatus
from .lives import NOTHING_HEARD, Heard, LifeState
from .places import PlaceKind


class ShellState(StrEnum):
    STARTING = "starting"
    SERVING = "serving"
    FAILED = "failed"                         # at its start; `error` says why
    ENDED = "ended"                           # it was asked to, and has finished what it had


class Pulse(Struct, frozen=True):
    pid: int
    began_s: float                            # when the process began, since boot: with the pid it names one process for ever
    state: ShellState
    heard: Heard = NOTHING_HEARD
    node_id: str = ""                         # Ray's, of the host that it stands on
    host: str = ""                            # where its mailbox is
    error: str = ""
    is_typed: bool = False                    # `error` is one of ours: a new start would say the same
    member: Member | None = None              # a worker's, once it serves
    address: Address | None = None            # a gateway's mailbox, once it serves
    load: LoadReport | None = None
    gateway: GatewayStatus | None = None
    drained: bool = False
    still_s: float = 0.0                      # for how long its loop has not moved
    links: tuple[LinkMeasured, ...] = ()      # a prefill worker's


class PlaceStatus(Struct, frozen=True):
    name: str
    kind: PlaceKind
    state: LifeState | None                   # None: no process, for now or (if `failed`) for good
    epoch: Epoch | None
    pid: int | None
    state_for_s: float
    num_restarts: int
    error: str                                # why the last life ended
    failed: bool
    load: LoadReport | None
    gateway: GatewayStatus | None
    links: tuple[LinkMeasured, ...] = ()      # a prefill worker's, to the decode workers that it has met
    host: str = ""                            # where its mailbox is; empty: not known
    tp: int | None = None                     # a worker's ranks


class DeploymentStatus(Struct, frozen=True):
    name: str
    phase: Phase
    model: str
    policy: str
    host: str
    port: int | None                          # None: no gateway is ready yet
    pid: int                                  # the controller's
    drain_s: float                            # how long each member may take to leave
    places: tuple[PlaceStatus, ...]

    @property
    def endpoint(self) -> str | None:
        """The URL that clients use; a wildcard host is reachable at the loopback too."""
        if self.port is None:
            return None
        host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(self.host, f"[{self.host}]" if ":" in self.host else self.host)
        return f"http://{host}:{self.port}"

    @property
    def errors(self) -> list[str]:
        return [f"{place.name}: {place.error}" for place in self.places if place.error]
