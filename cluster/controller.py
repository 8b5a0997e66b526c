"""What to do next so that the observed deployment becomes the desired one. Values in, values out; the clock is an argument.

    a life:   STARTING ──Ready──► READY ──► DRAINING ──► STOPPING ──Died──► (gone; the place is free)
                  └── start timeout ──┴─ silent, hung ─┴─────►┘                 │
                  └────────────────── Died ────────────────────────────────────►┘  backoff, then the next epoch

The runtime reports events with `observe`, asks `decide` for actions, and does them. Two rules carry the handoff's safety:
a place has at most one life, and it is free only once its runtime has confirmed that the process no longer exists (`Died`).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum

import msgspec

from ..messages.ids import Address, Epoch
from ..messages.membership import Member, Membership
from .lives import Adopted, Answered, Event, Life, LifeState, Place, after
from .places import PlaceKind, PlaceName


@dataclass(frozen=True)
class Timeouts:
    start_s: float
    answer_s: float
    stall_s: float
    drain_s: float


# actions


@dataclass(frozen=True)
class Start:
    name: PlaceName
    epoch: Epoch


@dataclass(frozen=True)
class Drain:
    name: PlaceName
    epoch: Epoch


@dataclass(frozen=True)
class Kill:
    name: PlaceName
    epoch: Epoch
    why: str


@dataclass(frozen=True)
class Publish:
    membership: Membership


Action = Start | Drain | Kill | Publish


class Phase(StrEnum):
    STARTING = "starting"
    READY = "ready"
    DEGRADED = "degraded"                     # was ready; something is being restarted
    FAILED = "failed"                         # some place will not come up
    STOPPING = "stopping"
    STOPPED = "stopped"


@dataclass
class Controller:
    """The state machine of one deployment. `next_epoch` and `next_version` should be larger than all of earlier controllers; they become so
    by what adopted members have heard, if the clock that they come from was set back."""

    desired: frozenset[PlaceName]
    timeouts: Timeouts
    next_epoch: Epoch
    next_version: int
    places: dict[PlaceName, Place] = field(default_factory=dict)
    published: Membership | None = None
    was_ready: bool = False

    def observe(self, event: Event, now_s: float) -> None:
        """What concerns no present life is late news, and ignored."""
        place = self.places.get(event.name, Place(event.name))
        if isinstance(event, Adopted):
            assert place.life is None, f"{place.name} is adopted twice"
            self.next_epoch = max(self.next_epoch, Epoch(event.epoch + 1))
            life = Life(event.epoch, LifeState.STARTING, now_s, now_s, unheard=event.served)
            self.places[place.name] = replace(place, life=life, was_ready=event.served)
        elif place.life is not None and place.life.epoch == event.epoch:
            if isinstance(event, Answered):
                self.next_epoch = max(self.next_epoch, event.heard.next_epoch)
                self.next_version = max(self.next_version, event.heard.version + 1)
            self.places[place.name] = after(place, place.life, event, now_s)

    def decide(self, now_s: float) -> list[Action]:
        """Actions in order; they count as begun once returned."""
        for name in self.desired - self.places.keys():
            self.places[name] = Place(name)
        for place in [place for place in self.places.values() if place.life is None and place.name not in self.desired]:
            del self.places[place.name]
        actions = [action for place in sorted(self.places.values(), key=lambda p: p.name) for action in self._decide(place, now_s)]
        self.was_ready = self.was_ready or self.phase is Phase.READY
        return [*actions, *self._publish()]

    @property
    def phase(self) -> Phase:
        if not self.desired:
            return Phase.STOPPING if self.places else Phase.STOPPED
        if any(place.failed for place in self.places.values()):
            return Phase.FAILED
        if all(name in self.places and self.places[name].is_ready for name in self.desired):
            return Phase.READY
        return Phase.DEGRADED if self.was_ready else Phase.STARTING

    def _decide(self, place: Place, now_s: float) -> list[Action]:
        life = place.life
        if life is None:
            return self._start(place, now_s) if not place.failed and now_s >= place.retry_at_s else []
        if life.state is LifeState.STOPPING:
            return []
        if why := self._reason_to_kill(place, life, now_s):
            return self._kill(place, life, why, now_s)
        if place.name not in self.desired and life.state is not LifeState.DRAINING and self._may_leave(place.name):
            return [] if life.unheard else self._dismiss(place, life, now_s)         # it may be serving: its answer will tell
        return []

    def _start(self, place: Place, now_s: float) -> list[Action]:
        epoch = self.next_epoch
        self.next_epoch = Epoch(epoch + 1)
        self.places[place.name] = replace(place, life=Life(epoch, LifeState.STARTING, now_s, now_s))
        return [Start(place.name, epoch)]

    def _kill(self, place: Place, life: Life, why: str, now_s: float) -> list[Action]:
        error = place.error if life.state is LifeState.DRAINING else why
        self.places[place.name] = replace(place, life=life.moved(LifeState.STOPPING, now_s), error=error)
        return [Kill(place.name, life.epoch, why)]

    def _dismiss(self, place: Place, life: Life, now_s: float) -> list[Action]:
        if life.state is LifeState.STARTING:
            return self._kill(place, life, "no longer wanted", now_s)
        self.places[place.name] = replace(place, life=life.moved(LifeState.DRAINING, now_s))
        return [Drain(place.name, life.epoch)]

    def _may_leave(self, name: PlaceName) -> bool:
        """When all goes down, gateways finish their answers before the workers leave."""
        if self.desired or name.kind is PlaceKind.GATEWAY:
            return True
        return not any(place.name.kind is PlaceKind.GATEWAY for place in self.places.values())

    def _reason_to_kill(self, place: Place, life: Life, now_s: float) -> str:
        limits = self.timeouts
        if life.fault:
            return life.fault
        if life.state is LifeState.STARTING and now_s - life.since_s > limits.start_s:
            return f"not ready within {limits.start_s:g} s"
        if life.drained:                      # and takes nothing new any more, though an earlier controller has asked for it
            return "drained"
        if life.state is LifeState.DRAINING and now_s - life.since_s > limits.drain_s:
            return f"not drained within {limits.drain_s:g} s"
        if (life.state is not LifeState.STARTING or life.unheard) and now_s - life.answered_s > limits.answer_s:
            return f"no answer for {limits.answer_s:g} s"
        if life.still_s > limits.stall_s:
            return f"its loop has stood still for {life.still_s:.0f} s"
        return ""

    def _publish(self) -> list[Action]:
        """Not before every adopted life that members may know is heard or dead: whoever is absent from a membership counts as dead."""
        if any(place.life is not None and place.life.unheard for place in self.places.values()):
            return []
        workers, gateways = present(self.places)
        if self.published is not None and (self.published.workers, self.published.gateways) == (workers, gateways):
            return []
        self.published = Membership(self.next_version, workers, gateways, self.next_epoch, unlisted(self.places))
        self.next_version += 1
        return [Publish(self.published)]


def present(places: Mapping[PlaceName, Place]) -> tuple[tuple[Member, ...], tuple[Address, ...]]:
    """Everybody who has been ready and is not confirmed dead; those on their way out count as draining."""
    workers: list[Member] = []
    gateways: list[Address] = []
    for _, place in sorted(places.items()):
        if place.life is None:
            continue
        match place.life.presence:
            case Member() as member:
                draining = place.life.state is not LifeState.READY
                workers.append(msgspec.structs.replace(member, draining=draining))
            case str() as address:
                gateways.append(address)
    return tuple(workers), tuple(gateways)


def unlisted(places: Mapping[PlaceName, Place]) -> tuple[Epoch, ...]:
    """Of lives that may exist and have never been ready."""
    return tuple(sorted(place.life.epoch for place in places.values() if place.life is not None and place.life.presence is None))
