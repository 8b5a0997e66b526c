"""The controller's process: a loop of poll, observe, decide, act, a few times a second, and what people may ask of it meanwhile.

If it dies, Ray starts it again with the same arguments; it then adopts the actors that it finds by name and goes on. If its loop
raises, it dies: workers and gateways serve on without it, only the healing waits.
"""

import logging
import os
import threading
import time

import msgspec

from ..messages.errors import ClusterError
from ..messages.ids import Epoch
from ..messages.zmq_post import Keyring
from .controller import Controller, Phase, Timeouts
from .lives import Place
from .places import PlaceKind, places_of, pool_of
from .pulse import DeploymentStatus, PlaceStatus
from .ray_runtime import RayRuntime, is_to_stop, write_stop
from .spec import Spec
from .turn_clock import TurnClock

logger = logging.getLogger(__name__)

TICK_S = 0.1
EXIT_FAULT = 70


class ControllerShell:
    def __init__(self, spec_json: str, keyring: Keyring, node_id: str, node_ip: str) -> None:
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
        self._spec = Spec.model_validate_json(spec_json)
        self._runtime = RayRuntime(self._spec, keyring, node_id, node_ip)
        self._stopping = threading.Event()
        timeouts = self._spec.timeouts
        started_ms = time.time_ns() // 1_000_000              # epochs and versions of a later controller are larger
        self._controller = Controller(
            desired=places_of(self._spec),
            timeouts=Timeouts(timeouts.start_s, timeouts.answer_s, timeouts.stall_s, timeouts.drain_s),
            next_epoch=Epoch(started_ms),
            next_version=started_ms,
        )
        self._clock = TurnClock(time.monotonic())
        self._status = self._describe(self._clock.now_s)
        threading.Thread(target=self._live, name="controller", daemon=True).start()

    def status(self) -> bytes:
        return msgspec.msgpack.encode(self._status)

    def stop(self) -> None:
        """Takes everything down in order; `status` tells when that is done. A controller that takes over goes on with it."""
        write_stop(self._spec.name)
        self._stopping.set()

    def _live(self) -> None:
        try:
            if is_to_stop(self._spec.name):
                self._stopping.set()
            else:
                self._runtime.reserve()
            for event in self._runtime.adopt():
                self._controller.observe(event, self._clock.now_s)
            while self._status.phase is not Phase.STOPPED:
                self._turn(self._clock.turn(time.monotonic()))
                time.sleep(TICK_S)
        except BaseException:
            logger.exception("ended by a fault")
            os._exit(EXIT_FAULT)

    def _turn(self, now_s: float) -> None:
        if self._stopping.is_set():
            self._controller.desired = frozenset()
        for event in self._runtime.poll(now_s):
            self._controller.observe(event, now_s)
        for action in self._controller.decide(now_s):
            self._runtime.act(action, now_s)
        if self._controller.phase is Phase.STOPPED:
            self._runtime.close()                     # before anybody hears of it: who waits for that ends this process
        self._status = self._describe(now_s)

    def _describe(self, now_s: float) -> DeploymentStatus:
        places = tuple(self._describe_place(place, now_s) for _, place in sorted(self._controller.places.items()))
        return DeploymentStatus(
            name=self._spec.name,
            phase=self._controller.phase,
            model=self._spec.model.served_name,
            policy=self._spec.router.policy,
            host=self._spec.router.host,
            port=next((place.gateway.port for place in places if place.gateway is not None), None),
            pid=os.getpid(),
            drain_s=self._spec.timeouts.drain_s,
            places=places,
        )

    def _describe_place(self, place: Place, now_s: float) -> PlaceStatus:
        life = place.life
        pulse = self._runtime.pulse(place.name, life.epoch) if life else None
        return PlaceStatus(
            name=str(place.name),
            kind=place.name.kind,
            state=life.state if life else None,
            epoch=life.epoch if life else None,
            pid=pulse.pid if pulse else None,
            state_for_s=now_s - life.since_s if life else 0.0,
            num_restarts=place.num_restarts,
            error=place.error,
            failed=place.failed,
            load=pulse.load if pulse else None,
            gateway=pulse.gateway if pulse else None,
            links=pulse.links if pulse else (),
            host=pulse.host if pulse else "",
            tp=None if place.name.kind is PlaceKind.GATEWAY else pool_of(self._spec, place.name.kind).tp,
        )


def decode_status(encoded: bytes) -> DeploymentStatus:
    try:
        return msgspec.msgpack.decode(encoded, type=DeploymentStatus)
    except msgspec.DecodeError as error:
        raise ClusterError(f"the controller runs another version of diptych: {error}") from None
