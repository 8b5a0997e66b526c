"""When links are measured, whatever happens to the probes: soon, not too often, and not beside handoffs without need."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule

from diptych.messages.ids import Address, Epoch, WorkerId
from diptych.messages.requests import WorkerRef
from diptych.prefill_worker.probe_times import REPEAT_S, RETRY_S, ProbeTimes

REFS = [WorkerRef(WorkerId(f"decode-{i}"), Epoch(1), Address("")) for i in range(3)]
A, B, _ = REFS


def test_an_end_that_drains_is_passed_over() -> None:
    times = ProbeTimes()
    times.met(A, 0.0)
    times.met(B, 1.0)
    assert times.begin(1.0, True, among=[B]) == B
    assert times.begin(1.0, True, among=REFS) == A


def test_failures_in_a_row_are_waited_for_longer_and_longer() -> None:
    times, now, waits = ProbeTimes(), 0.0, []
    times.met(A, now)
    for _ in range(8):
        since = now
        while times.begin(now, True, REFS) is None:
            now += 0.25
        waits.append(now - since)
        times.failed(A, now)
    assert waits == [0.0, 1.0, 2.0, 4.0, 8.0, 16.0, REPEAT_S, REPEAT_S]
    times.measured(A, now, enough=False, alone=True)
    times.failed(A, now)
    assert times.begin(now + RETRY_S, True, REFS) == A, "they were no longer in a row"


def test_a_link_found_anew_under_load_is_measured_under_load() -> None:
    times = ProbeTimes()
    times.met(A, 0.0)
    assert times.begin(REPEAT_S, False, REFS) == A
    times.measured(A, REPEAT_S, enough=True, alone=False)
    assert times.begin(1000.0, False, REFS) is None, "what was fast enough waits for a quiet moment"
    for second in range(1000, 1000 + int(REPEAT_S)):
        times.met(A, float(second))
    assert times.begin(1000.0 + REPEAT_S, False, REFS) == A


class Chaos(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.times = ProbeTimes()
        self.wanted: dict[WorkerRef, float] = {}             # links that are to be measured, since when
        self.begun: dict[WorkerRef, float] = {}              # when they last were
        self.is_enough: set[WorkerRef] = set()               # but a figure taken alone is wanted

    @rule(ref=st.sampled_from(REFS))
    def meet(self, ref: WorkerRef) -> None:
        self.times.met(ref, self.now)
        if ref in self.is_enough:                            # its link is another one now
            self.is_enough.discard(ref)
            self.wanted[ref] = self.now
        self.wanted.setdefault(ref, self.now)

    @rule(refs=st.sets(st.sampled_from(REFS)))
    def keep(self, refs: set[WorkerRef]) -> None:
        self.times.keep(refs)
        self.wanted = {ref: since for ref, since in self.wanted.items() if ref in refs}
        self.is_enough &= refs

    @rule(seconds=st.sampled_from([RETRY_S / 2, RETRY_S, REPEAT_S / 2, REPEAT_S]))
    def pass_time(self, seconds: float) -> None:
        self.now += seconds

    @rule(is_quiet=st.booleans(), end=st.sampled_from(["busy", "failed", "given up", "short", "enough"]))
    def probe(self, is_quiet: bool, end: str) -> None:
        ref = self.times.begin(self.now, is_quiet, REFS)
        if ref is None:
            self.assert_nobody_has_waited_too_long(is_quiet)
            return
        assert ref in self.wanted
        assert is_quiet or (self.now >= self.wanted[ref] + REPEAT_S and ref not in self.is_enough)
        self.begun[ref] = self.now
        match end:
            case "failed":
                self.times.failed(ref, self.now)
                self.wanted[ref] = self.now
            case "given up":
                self.times.give_up(ref)
            case "short" | "enough":
                self.times.measured(ref, self.now, enough=end == "enough", alone=is_quiet)
                self.wanted[ref] = self.now
        if end == "given up" or (end == "enough" and is_quiet):
            del self.wanted[ref]
        if end != "busy":
            self.is_enough.discard(ref)
        if end == "enough" and not is_quiet:
            self.is_enough.add(ref)

    def assert_nobody_has_waited_too_long(self, is_quiet: bool) -> None:
        for ref, since in self.wanted.items():
            last = max(since, self.begun.get(ref, since))
            assert self.now - last < (REPEAT_S if is_quiet else 2 * REPEAT_S) or (ref in self.is_enough and not is_quiet)


Chaos.TestCase.settings = settings(max_examples=60, stateful_step_count=40)
TestChaos = Chaos.TestCase
