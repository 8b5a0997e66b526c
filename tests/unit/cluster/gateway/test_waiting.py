"""Requests that find no route at once: who looks at them and when, on a virtual clock, with a policy that says what the test wants."""

import math
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diptych.cluster.gateway.config import Limits
from diptych.cluster.gateway.dispatch import Dispatcher
from diptych.cluster.gateway.errors import NoRoute, Overloaded
from diptych.cluster.gateway.generation import Generation, GenerationState, Prompt
from diptych.cluster.router.load_view import LoadView
from diptych.cluster.router.policy import ClusterView, Decision, Explanation, Objectives, Queue, Refuse, RoutingRequest
from diptych.messages.fake_post import FakeNetwork
from diptych.messages.ids import Epoch, WorkerId
from diptych.messages.membership import Member, Membership, Role
from diptych.messages.requests import (
    FailureKind,
    FinishReason,
    LoadReport,
    LoadUpdate,
    RequestFailed,
    Route,
    SamplingParams,
    StepTokens,
    TokenDelta,
    WorkerRef,
)

PATIENCE_S = 0.04
QUEUE_TIMEOUT_S = Limits().queue_timeout_s


class Room:
    """A policy with so much room: a route takes one; without any, a request is worth asking for during PATIENCE_S."""

    def __init__(self, worker: WorkerRef) -> None:
        self.room = 0
        self.num_asked = 0
        self._worker = worker

    def choose(self, request: RoutingRequest, view: ClusterView, now: float) -> Decision:
        self.num_asked += 1
        if self.room > 0:
            self.room -= 1
            return Route(decode=self._worker)
        assert request.arrived_at is not None
        left_s = request.arrived_at + PATIENCE_S - now
        return Queue("no room", left_s, retry_after_s=7.0) if left_s > 1e-9 else Refuse("no room", 7.0)

    def decide(self, request: RoutingRequest, view: ClusterView, now: float) -> Explanation:
        return Explanation(self.choose(request, view, now))


class Nobody:
    """Counts nothing."""

    def __getattr__(self, name: str) -> object:
        return lambda *_: None


@dataclass
class Scene:
    now: float = 100.0
    wake_at: float = math.inf
    generations: list[Generation] = field(default_factory=list)
    ended_at: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        network = FakeNetwork()
        self.worker = WorkerRef(WorkerId("d0"), Epoch(1), network.post("d0").address)
        self.policy = Room(self.worker)
        loads = LoadView(silent_after_s=1e9)
        limits = Limits(max_live_choices=10_000)
        self.dispatcher = Dispatcher(network.post("gateway"), self.policy, loads, limits, Nobody(), lambda: self.now)
        self.dispatcher.wake_at = self._alarm
        self.dispatcher.update_membership(Membership(1, (Member(self.worker, Role.DECODE, "layout", 16, 100, 1000),), ()))

    def _alarm(self, at: float) -> None:
        self.wake_at = min(self.wake_at, at)

    def arrive(self, ttft_s: float = 0.4) -> Generation:
        name = f"r{len(self.generations)}"
        prompt = Prompt(name, (1, 2, 3), SamplingParams(4, 7), self.now + 600, Objectives(ttft_s, 0.02))
        generation = Generation(prompt, lambda: self._ended(name), self.now)
        self.generations.append(generation)
        self.dispatcher.start(generation)
        return generation

    def _ended(self, name: str) -> None:
        self.ended_at.setdefault(name, self.now)

    def report(self) -> None:
        self.dispatcher.handle([LoadUpdate(LoadReport(self.worker, 0, 0, 0, 0, 100, 100, 16))])

    def sleep(self, seconds: float) -> None:
        """As the loop does: wakes at each moment that was asked for, and at no other."""
        end = self.now + seconds
        while self.wake_at <= end:
            self.now, self.wake_at = max(self.now, self.wake_at), math.inf
            self.dispatcher.look()
        self.now = end

    def finish(self, generation: Generation) -> None:
        assert generation.attempt is not None
        delta = TokenDelta(generation.attempt.request_id, 0, (5,), FinishReason.LENGTH)
        self.policy.room += 1
        self.dispatcher.handle([StepTokens(self.worker, (delta,))])


@pytest.fixture
def scene() -> Scene:
    return Scene()


def test_who_finds_a_route_wakes_nobody_for_those_that_wait(scene):
    scene.arrive()
    scene.wake_at = math.inf
    scene.sleep(0.01)
    scene.policy.room = 1
    assert scene.arrive().state is GenerationState.RUNNING
    assert scene.wake_at == pytest.approx(100.0 + PATIENCE_S)


def test_it_is_refused_at_its_last_useful_moment_without_any_message(scene):
    generation = scene.arrive()
    scene.sleep(PATIENCE_S - 0.001)
    assert generation.state is GenerationState.QUEUED
    scene.sleep(0.002)
    assert generation.state is GenerationState.REFUSED
    assert scene.ended_at["r0"] == pytest.approx(100.0 + PATIENCE_S)
    assert isinstance(generation.error, Overloaded)
    assert generation.error.retry_after_s == 7.0
    assert scene.policy.num_asked == 1, "nobody has to be asked for a refusal that was announced"


def test_a_load_report_is_looked_at_when_it_comes(scene):
    generation = scene.arrive()
    scene.sleep(0.01)
    scene.policy.room = 1
    scene.report()
    assert (generation.state, generation.routed_at) == (GenerationState.RUNNING, 100.01)


def test_a_finished_request_makes_room_at_once(scene):
    scene.policy.room = 1
    first, second = scene.arrive(), scene.arrive()
    assert second.state is GenerationState.QUEUED
    scene.sleep(0.01)
    scene.finish(first)
    assert (second.state, second.routed_at) == (GenerationState.RUNNING, 100.01)


def test_so_does_a_client_that_leaves(scene):
    scene.policy.room = 1
    first, second = scene.arrive(), scene.arrive()
    scene.policy.room = 1
    scene.dispatcher.abort(first)
    scene.sleep(0.0)
    assert second.state is GenerationState.RUNNING


def test_the_most_urgent_goes_first(scene):
    patient, urgent = scene.arrive(ttft_s=1.0), scene.arrive(ttft_s=0.3)
    scene.policy.room = 1
    scene.report()
    assert (patient.state, urgent.state) == (GenerationState.QUEUED, GenerationState.RUNNING)


def test_a_token_message_without_load_asks_for_nobody(scene):
    scene.arrive()
    scene.dispatcher.handle([StepTokens(scene.worker, ())])
    assert scene.policy.num_asked == 1


def test_what_a_worker_failed_and_the_policy_refuses_since_waits_as_long_as_for_any_route(scene):
    scene.policy.room = 1
    generation = scene.arrive()
    scene.dispatcher.handle([RequestFailed(generation.attempt.request_id, FailureKind.PEER_LOST, "gone", True, scene.worker)])
    scene.sleep(QUEUE_TIMEOUT_S - 0.01)
    assert generation.state is GenerationState.QUEUED
    scene.now += 0.02
    scene.dispatcher.look()
    assert (generation.state, str(generation.error)) == (GenerationState.FAILED, "no room; waited 60 s")
    assert isinstance(generation.error, NoRoute)
    assert scene.dispatcher.num_queued == 0


@settings(max_examples=50)
@given(st.lists(st.tuples(st.sampled_from(["arrive", "report", "finish", "leave"]), st.floats(0, 0.03)), min_size=1, max_size=60))
def test_whatever_comes_nobody_is_refused_late_and_nobody_hangs(events):
    scene = Scene()
    scene.policy.room = 3
    for event, gap_s in events:
        running = [each for each in scene.generations if each.state is GenerationState.RUNNING]
        match event:
            case "arrive":
                scene.arrive()
            case "report":
                scene.report()
            case "finish" if running:
                scene.finish(running[0])
            case "leave" if scene.generations:
                scene.dispatcher.abort(scene.generations[-1])
        scene.sleep(gap_s)
    scene.sleep(PATIENCE_S * 1.01)
    for generation in scene.generations:
        assert generation.state is not GenerationState.QUEUED
        if generation.state is GenerationState.REFUSED:
            assert scene.ended_at[generation.prompt.name] <= generation.arrived_at + PATIENCE_S * 1.01
