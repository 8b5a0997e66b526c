"""A worker that nobody uses finds out that its steps are shorter than it believes; it costs next to nothing, and nothing of its pool."""

from collections.abc import Callable

import pytest
from harness.fake_cluster import FakeCluster
from harness.worker_turns import PROMPT, ROLES, ask, route_to, turn

from diptych.decode_worker.worker import DecodeWorker
from diptych.engine.block_pool import chain_hashes
from diptych.engine.engine import Engine, EngineLimits
from diptych.engine.fake_runner import FakeRunner, fake_layout
from diptych.engine.idle_refresh import IDLE_SHARE, LONGEST_S, REST_S, IdleRefresh
from diptych.engine.model_runner import StepOutputs
from diptych.engine.predictor import coefficients, features_of, model_with
from diptych.engine.scheduler import StepPlan
from diptych.engine.step_watch import StepWatch
from diptych.engine.worker import Worker
from diptych.kvtransfer.fake import FakeFabric
from diptych.messages.ids import BlockId
from diptych.messages.steps import StepFeatures, StepModel
from diptych.prefill_worker.probe import Floor
from diptych.prefill_worker.worker import PrefillWorker

TRUTH = StepModel(4.5e-3, 100e-6, 2e-9, 200e-6, 1e-6, error=0.03, num_observed=9)
LIMITS = EngineLimits(block_size=16, max_model_len=512, max_step_tokens=256, max_sequences=8)
NUM_BLOCKS = 32
TURN_S = 0.05


def times(factor: float, truth: StepModel = TRUTH) -> StepModel:
    return model_with((factor * each for each in coefficients(truth)), truth.error, truth.num_observed)


class TimedRunner(FakeRunner):
    """A step takes as long as `truth` says; every other one `held_up` times as long."""

    def __init__(self, truth: StepModel = TRUTH, held_up: float = 1.0) -> None:
        self.pool = FakeFabric().transport("here").allocate(fake_layout(LIMITS.block_size), NUM_BLOCKS)
        super().__init__(self.pool)
        self.truth, self.held_up = truth, held_up
        self.now, self.busy_s = 1000.0, 0.0
        self.steps: list[StepFeatures] = []

    def launch(self, plan: StepPlan, on_layer: Callable[[int], None] | None) -> StepOutputs:
        features = features_of(plan)
        step_s = self.truth.step_s(features) * (self.held_up if len(self.steps) % 2 == 0 else 1.0)
        self.now += step_s
        self.busy_s += step_s
        self.steps.append(features)
        return super().launch(plan, on_layer)


class Idle:
    """An engine that has nothing to do but to look."""

    def __init__(self, runner: TimedRunner, learned: StepModel) -> None:
        self.runner, self.steps = runner, StepWatch(learned)
        self.engine = Engine(runner, NUM_BLOCKS, LIMITS)
        self.refresh = IdleRefresh(self.engine, self.steps, lambda: runner.now)

    def rest(self, seconds: float) -> None:
        end = self.runner.now + seconds
        while self.runner.now < end:
            self.refresh.look(self.runner.now)
            self.runner.now += TURN_S


@pytest.mark.parametrize("held_up", [1.0, 3.0])
@pytest.mark.parametrize("factor", [2.0, 4.0, 15.0])
def test_a_model_that_is_too_slow_becomes_right_within_a_minute(factor: float, held_up: float) -> None:
    idle = Idle(TimedRunner(held_up=held_up), times(factor))
    idle.rest(60.0)
    for step in (StepFeatures(0, 0, 1, 17), StepFeatures(0, 0, 4, 400), StepFeatures(64, 2080), StepFeatures(128, 8256)):
        assert idle.steps.model.step_s(step) == pytest.approx(TRUTH.step_s(step), rel=0.3)
    assert idle.steps.prefill_share.at(idle.runner.now) == 0.0, "no prompt of anybody's was computed"


@pytest.mark.parametrize("is_now", [1.0, 3.0], ids=["right", "disturbed now"])
def test_what_requests_have_taught_stays(is_now: float) -> None:
    """However long the worker is idle, and however slow its neighbours make it meanwhile."""
    idle = Idle(TimedRunner(times(is_now)), TRUTH)
    idle.rest(3600.0)
    assert idle.runner.steps
    assert idle.steps.model is TRUTH


@pytest.mark.parametrize("factor", [1.0, 4.0])
def test_it_takes_a_small_share_of_the_time(factor: float) -> None:
    idle = Idle(TimedRunner(), times(factor))
    for _ in range(10):
        before, began_at = idle.runner.busy_s, idle.runner.now
        idle.rest(60.0)
        assert idle.runner.busy_s - before < (idle.runner.now - began_at) / IDLE_SHARE + LONGEST_S / IDLE_SHARE


def test_only_after_a_rest() -> None:
    idle = Idle(TimedRunner(), TRUTH)
    idle.rest(REST_S - TURN_S)
    idle.refresh.put_off(idle.runner.now)
    idle.rest(REST_S - TURN_S)
    assert not idle.runner.steps
    for _ in range(2):                                         # the second time from the beginning again
        idle.runner.steps.clear()
        idle.rest(2 * TURN_S)
        assert set(idle.runner.steps) == {StepFeatures(0, 0, 1, 17)}
        assert len(idle.runner.steps) <= 2
        idle.refresh.put_off(idle.runner.now)
        idle.rest(REST_S - TURN_S)
    idle.rest(3 * IDLE_SHARE * 0.04)
    assert len(set(idle.runner.steps)) == 3, "all kinds"


def test_what_comes_makes_no_pause_shorter() -> None:
    idle = Idle(TimedRunner(times(20.0)), times(20.0))
    idle.rest(REST_S + TURN_S)
    (step,) = idle.runner.steps
    for _ in range(2):
        idle.rest(0.4 * IDLE_SHARE * idle.runner.truth.step_s(step))
        idle.refresh.put_off(idle.runner.now)
    assert idle.runner.steps == [step]


def test_what_may_take_long_is_left_alone() -> None:
    """Unless what was run before it took far shorter than predicted, too."""
    believed = StepModel(LONGEST_S / 2, LONGEST_S / 100, 0.0, 0.0, 0.0)
    for truth, kinds in ((believed, {1, 8}), (TRUTH, {1, 0, 8})):
        idle = Idle(TimedRunner(truth), believed)
        idle.rest(300.0)
        assert {step.num_decoding for step in idle.runner.steps} == kinds
    idle = Idle(TimedRunner(), StepModel(1.1 * LONGEST_S, 0.0, 0.0, 0.0, 0.0))
    idle.rest(300.0)
    assert not idle.runner.steps


def test_a_runner_that_runs_ahead_is_left_alone() -> None:
    runner = TimedRunner()
    runner.runs_ahead = True
    idle = Idle(runner, times(4.0))
    idle.rest(300.0)
    assert not runner.steps


@pytest.mark.parametrize("num_free", [0, 2, NUM_BLOCKS // 2])
def test_only_free_blocks_are_written(num_free: int) -> None:
    """Cached ones may be matched again: two are enough for one decode alone."""
    idle = Idle(TimedRunner(), times(4.0))
    pool, tensor = idle.engine.pool, idle.runner.pool.tensor
    tensor.fill_(7)
    hashes = chain_hashes(range(NUM_BLOCKS * LIMITS.block_size), LIMITS.block_size)
    kept = pool.take(NUM_BLOCKS - num_free) or []
    for block, block_hash in zip(kept, hashes, strict=False):
        pool.publish(block, block_hash)
    pool.release(kept)
    idle.rest(120.0)
    assert pool.match(hashes) == kept
    assert (tensor[kept] == 7).all()
    assert (pool.num_free, pool.num_held) == (num_free, 0)
    assert sorted({step.num_decoding for step in idle.runner.steps}) == {0: [], 2: [1]}.get(num_free, [0, 1, 8])


# In a worker

def looks(monkeypatch: pytest.MonkeyPatch, look: Callable[[IdleRefresh], None]) -> None:
    monkeypatch.setattr(IdleRefresh, "look", lambda refresh, now: look(refresh))


@pytest.mark.parametrize("prefill", ["prefill-0", None], ids=["split", "local"])
def test_never_while_a_request_or_a_handoff_is_under_way(
    cluster: FakeCluster, monkeypatch: pytest.MonkeyPatch, prefill: str | None
) -> None:
    """Stopped anywhere, for any time."""
    looked = set[IdleRefresh]()
    looks(monkeypatch, looked.add)
    cluster.submit(PROMPT, 4, prefill)
    for _ in range(60):
        looked.clear()
        busy = {worker._idle_refresh for worker in cluster.workers.values() if worker.engine.sequences or worker.num_handoffs()}
        cluster.turn()
        still_busy = {worker._idle_refresh for worker in cluster.workers.values() if worker.engine.sequences or worker.num_handoffs()}
        assert not looked & busy & still_busy
        if cluster.network.in_flight:
            cluster.network.deliver()
        else:
            cluster.fabric.land_all()
    cluster.settle()
    assert looked == {worker._idle_refresh for worker in cluster.workers.values()}, "at last all may"


def test_never_while_a_link_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster, seen = FakeCluster(floor=Floor(0.0, True)), {True: 0, False: 0}
    prefill, decode = (cluster.workers[each] for each in ROLES)
    assert isinstance(prefill, PrefillWorker)
    assert isinstance(decode, DecodeWorker)

    def look(refresh: IdleRefresh) -> None:
        assert not (prefill._prober.is_probing if refresh is prefill._idle_refresh else len(decode._probes))

    looks(monkeypatch, look)
    for _ in range(60):
        for _ in range(3):                                     # nothing comes meanwhile
            cluster.turn()
            seen[prefill._prober.is_probing and len(decode._probes) > 0] += 1
        if cluster.network.in_flight:
            cluster.network.deliver()
        else:
            cluster.fabric.land_all()
    assert min(seen.values()) > 0


def computed_for_nobody(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> list[list[BlockId]]:
    """The blocks of each step that is no request's."""
    launch, found = worker.engine.runner.launch, list[list[BlockId]]()

    def spy(plan: StepPlan, on_layer: Callable[[int], None] | None) -> StepOutputs:
        found.extend(chunk.sequence.blocks for chunk in plan.chunks if worker.engine.find(chunk.sequence.id) is None)
        return launch(plan, on_layer)

    monkeypatch.setattr(worker.engine.runner, "launch", spy)
    return found


def test_an_idle_worker_looks_and_serves_on(cluster: FakeCluster, worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    found = computed_for_nobody(worker, monkeypatch)
    answer = cluster.submit(PROMPT, 4)
    cluster.settle()
    assert answer.complete
    assert not found, "it has just computed something"
    num_steps, cached = worker._num_steps, worker.engine.pool.num_cached
    cluster.now += REST_S
    cluster.turn()
    assert len(found) in (1, 2)
    assert (worker._num_steps, worker.engine.pool.num_cached) == (num_steps, cached)
    cluster.assert_nothing_leaked()
    again = cluster.submit([*PROMPT, 3], 9)
    cluster.settle()
    assert again.complete, "and each token is checked, those from cached blocks too"


def test_a_message_puts_it_off(cluster: FakeCluster, worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    found = computed_for_nobody(worker, monkeypatch)
    for number in range(4):
        cluster.now += 0.7 * REST_S
        ask(cluster, route_to(cluster, worker), f"r{number}", prompt=[1] * 65)      # refused
        turn(cluster, worker)
        turn(cluster, worker)
    assert not found
    cluster.now += REST_S
    turn(cluster, worker)
    assert found
