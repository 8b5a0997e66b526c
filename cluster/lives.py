"""A place and the life that stands there: its states, what may happen to it, and what comes of that. Values; the clock is an argument."""

import math
from dataclasses import dataclass, replace
from enum import StrEnum

from msgspec import Struct

from ..messages.errors import IllegalTransition
from ..messages.ids import Address, Epoch
from ..messages.membership import Member
from .places import PlaceName

FIRST_BACKOFF_S = 0.25
MAX_BACKOFF_S = 15.0
STABLE_S = 60.0
"""A life that served so long starts the count of failures anew."""

MAX_FIRST_STARTS = 3
"""A place that never came up and died so often has a fault that another start will not cure."""


class LifeState(StrEnum):
    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"                     # finishes what it has, takes nothing new
    STOPPING = "stopping"                     # killed; not yet known to be gone


TRANSITIONS = {
    LifeState.STARTING: {LifeState.READY, LifeState.STOPPING},
    LifeState.READY: {LifeState.DRAINING, LifeState.STOPPING},
    LifeState.DRAINING: {LifeState.STOPPING},
    LifeState.STOPPING: set[LifeState](),
}


@dataclass(frozen=True)
class Life:
    epoch: Epoch
    state: LifeState
    since_s: float                            # in this state
    answered_s: float                         # when it last answered
    still_s: float = 0.0                      # how long its loop had stood still by then
    ready_s: float = math.inf                 # when it became ready
    presence: Member | Address | None = None  # a worker's or a gateway's, once it is ready
    drained: bool = False
    fault: str = ""                           # why it cannot serve, in its own words
    unheard: bool = False                     # an earlier controller's that has served, and it has not answered this one yet

    def moved(self, state: LifeState, now_s: float) -> "Life":
        if state not in TRANSITIONS[self.state]:
            raise IllegalTransition(f"epoch {self.epoch}: {self.state} → {state}")
        return replace(self, state=state, since_s=now_s)


@dataclass(frozen=True)
class Place:
    name: PlaceName
    life: Life | None = None
    num_failures: int = 0                     # in a row
    num_restarts: int = 0
    retry_at_s: float = 0.0
    was_ready: bool = False
    error: str = ""                           # why the last life ended, if it was not asked to
    failed: bool = False                      # given up

    @property
    def is_ready(self) -> bool:
        return self.life is not None and self.life.state is LifeState.READY


# what may happen


class Heard(Struct, frozen=True):
    """Of the last membership that a member was told, perhaps by an earlier controller."""

    version: int
    next_epoch: Epoch


NOTHING_HEARD = Heard(-1, Epoch(0))


@dataclass(frozen=True)
class Answered:
    name: PlaceName
    epoch: Epoch
    presence: Member | Address | None = None  # once it is ready
    drained: bool = False                     # it was asked to drain and has nothing left
    still_s: float = 0.0                      # for how long its loop has not moved: the answer is another thread's
    heard: Heard = NOTHING_HEARD


@dataclass(frozen=True)
class StartFailed:
    """The process says why it cannot serve; `hopeless`: it would say so again."""

    name: PlaceName
    epoch: Epoch
    why: str
    hopeless: bool


@dataclass(frozen=True)
class Died:
    """The process no longer exists."""

    name: PlaceName
    epoch: Epoch
    why: str


@dataclass(frozen=True)
class Adopted:
    """A life that an earlier controller has started."""

    name: PlaceName
    epoch: Epoch
    served: bool                              # so members may know it; or else it was starting, and nobody does


Event = Answered | StartFailed | Died | Adopted


def backoff_s(num_failures: int) -> float:
    return min(MAX_BACKOFF_S, FIRST_BACKOFF_S * 2.0 ** min(num_failures - 1, 16))


def after(place: Place, life: Life, event: Answered | StartFailed | Died, now_s: float) -> Place:
    """The place once that has happened to the life that stands there."""
    match event:
        case Answered():
            life = replace(life, answered_s=now_s, still_s=event.still_s, drained=event.drained, unheard=False)
            if life.state is LifeState.STARTING and event.presence is not None:
                life = replace(life.moved(LifeState.READY, now_s), presence=event.presence, ready_s=now_s)
                return replace(place, life=life, was_ready=True, error="")
            return replace(place, life=life)
        case StartFailed():
            return replace(place, life=replace(life, fault=event.why), failed=event.hopeless and not place.was_ready)
        case Died():
            return _vacated(place, life, event.why, now_s)


def _vacated(place: Place, life: Life, why: str, now_s: float) -> Place:
    num_failures = 1 if now_s - life.ready_s > STABLE_S else place.num_failures + 1
    gives_up = not place.was_ready and num_failures >= MAX_FIRST_STARTS
    return replace(
        place,
        life=None,
        error=place.error if life.state is LifeState.STOPPING else place.error or why,
        num_failures=num_failures,
        num_restarts=place.num_restarts + 1,
        retry_at_s=now_s + backoff_s(num_failures),
        failed=place.failed or gives_up,
    )
