"""The dispatcher on a virtual clock, message by message: retries, deadlines, ends."""

from dataclasses import dataclass, field

import pytest

from diptych.cluster.gateway.config import Limits
from diptych.cluster.gateway.dispatch import Dispatcher
from diptych.cluster.gateway.errors import GenerationFailed, NoRoute, Overloaded, SlowClient
from diptych.cluster.gateway.generation import TRANSITIONS, Generation, GenerationState, Prompt
from diptych.cluster.router.load_view import LoadView
from diptych.cluster.router.registry import PolicyOptions, make_policy
from diptych.messages.fake_post import FakeNetwork
from diptych.messages.ids import Epoch, WorkerId
from diptych.messages.membership import Member, Membership, Role
from diptych.messages.requests import (
    Abort,
    FailureKind,
    FinishReason,
    GenerateRequest,
    LoadReport,
    LoadUpdate,
    RequestFailed,
    RequestSpan,
    Route,
    SamplingParams,
    ServiceClass,
    StepTokens,
    TokenDelta,
    TokenLogprobs,
    WorkerRef,
)

LIMITS = Limits(request_timeout_s=600.0, queue_timeout_s=60.0, stall_timeout_s=30.0, silent_after_s=3.0, max_attempts=3, max_live_choices=4)
DEFAULTS = PolicyOptions()
State = GenerationState


@dataclass
class Bench:
    """A dispatcher, its network, its clock, and what its observer saw."""

    limits: Limits = LIMITS
    policy: str = "least_loaded"
    options: PolicyOptions = DEFAULTS
    now: float = 100.0
    ends: list[State] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    wakes: int = 0
    version: int = 0
    num_started: int = 0
    waiting_tokens: int = 0                   # in every heartbeat

    def __post_init__(self) -> None:
        self.network = FakeNetwork()
        self.post = self.network.post("gateway")
        self.workers: dict[str, WorkerRef] = {}
        policy = make_policy(self.policy, self.options)
        self.dispatcher = Dispatcher(self.post, policy, LoadView(self.limits.silent_after_s), self.limits, self, lambda: self.now)

    def ended(self, generation: Generation) -> None:
        self.ends.append(generation.state)

    def retried(self, reason: str) -> None:
        self.reasons.append(reason)

    def span(self, span: RequestSpan) -> None:
        self.reasons.append("span")

    def alive(self, *names: str, epoch: int = 1) -> None:
        for name in names:
            known = self.workers.get(name)
            if known is None or known.epoch != epoch:
                self.workers[name] = WorkerRef(WorkerId(name), Epoch(epoch), self.network.post(f"{name}/{epoch}").address)
        self.workers = {name: self.workers[name] for name in names}
        self.version += 1
        roles = {name: Role.PREFILL if name.startswith("p") else Role.DECODE for name in names}
        members = tuple(Member(ref, roles[name], "layout", 16, 100, 1000) for name, ref in self.workers.items())
        self.dispatcher.update_membership(Membership(self.version, members, ()))

    def start(self, service_class: ServiceClass = ServiceClass.DEFAULT, **sampling: object) -> Generation:
        params = SamplingParams(**({"max_tokens": 10, "seed": 7} | sampling))
        self.num_started += 1
        deadline = self.now + self.limits.request_timeout_s
        prompt = Prompt(f"cmpl-{self.num_started}-0", (1, 2, 3), params, deadline, service_class=service_class)
        generation = Generation(prompt, self._wake, self.now)
        self.dispatcher.start(generation)
        return generation

    def sent(self) -> list[tuple[str, object]]:
        """What has left since the last call, by worker."""
        names = {ref.address: name for name, ref in self.workers.items()}
        letters, self.network.in_flight = self.network.in_flight, []
        return [(names.get(letter.to, letter.to), letter.message) for letter in letters]

    def request(self) -> GenerateRequest:
        [(_, message)] = [letter for letter in self.sent() if isinstance(letter[1], GenerateRequest)]
        return message

    def tokens(self, request: GenerateRequest, worker: str, index: int, *token_ids: int, **fields: object) -> None:
        delta = TokenDelta(request.request_id, index, token_ids, **fields)
        ref = request.route.prefill if worker == "prefill" else request.route.decode if worker == "decode" else self.workers[worker]
        self.dispatcher.handle([StepTokens(ref, (delta,))])

    def failed(self, request: GenerateRequest, ref: WorkerRef, kind: FailureKind, *, retryable: bool) -> None:
        self.dispatcher.handle([RequestFailed(request.request_id, kind, "because", retryable, ref)])

    def span_of(self, request: GenerateRequest) -> None:
        decode_id = request.route.decode.worker_id
        self.dispatcher.handle([RequestSpan(request.request_id, request.route.prefill, decode_id, "fake", 1, 1, 0, 0.1, 0.1)])

    def pass_time(self, seconds: float, *beating: str) -> None:
        """In steps of a second; `beating` workers send their heartbeats."""
        end = self.now + seconds
        while self.now < end:
            self.now = min(end, self.now + 1.0)
            reports = [LoadReport(self.workers[name], 0, self.waiting_tokens, 0, 0, 100, 100, 16) for name in beating]
            self.dispatcher.handle(map(LoadUpdate, reports))
            self.dispatcher.watch()

    def _wake(self) -> None:
        self.wakes += 1


@pytest.fixture
def bench() -> Bench:
    made = Bench()
    made.alive("p0", "d0")
    return made


def taken(generation: Generation) -> list[int]:
    return [token_id for delta in generation.take() for token_id in delta.token_ids]


class TestThePlainWay:
    def test_the_request_goes_to_the_first_worker_with_all_it_needs(self, bench):
        bench.start()
        [(to, request)] = bench.sent()
        assert to == "p0"
        assert request.gateway == bench.post.address
        assert (request.token_ids, request.num_prior_outputs, request.sampling.seed) == ((1, 2, 3), 0, 7)
        assert (request.route.prefill, request.route.decode) == (bench.workers["p0"], bench.workers["d0"])
        assert request.timeout_s == 600.0

    def test_tokens_arrive_in_order_and_the_end_is_the_end(self, bench):
        generation = bench.start()
        request = bench.request()
        bench.tokens(request, "decode", 1, 11)
        assert taken(generation) == []
        bench.tokens(request, "prefill", 0, 10)
        assert taken(generation) == [10, 11]
        bench.tokens(request, "decode", 2, 12, finish=FinishReason.STOP)
        assert (taken(generation), generation.state, bench.ends) == ([12], State.FINISHED, [State.FINISHED])
        assert bench.sent() == []
        assert bench.dispatcher.num_running == 0

    def test_tokens_of_strangers_are_not_believed(self, bench):
        bench.alive("p0", "d0", "d1")
        generation = bench.start()
        request = bench.request()
        stranger = "d1" if request.route.decode == bench.workers["d0"] else "d0"
        bench.tokens(request, stranger, 0, 66)
        assert taken(generation) == []

    def test_an_early_finish_tells_both_workers(self, bench):
        generation = bench.start()
        request = bench.request()
        bench.tokens(request, "prefill", 0, 10)
        bench.dispatcher.finish(generation)
        assert bench.sent() == [("p0", Abort(request.request_id)), ("d0", Abort(request.request_id))]
        assert bench.ends == [State.FINISHED]

    def test_an_abort_tells_both_workers_once(self, bench):
        generation = bench.start()
        request = bench.request()
        bench.dispatcher.abort(generation)
        bench.dispatcher.abort(generation)
        assert bench.sent() == [("p0", Abort(request.request_id)), ("d0", Abort(request.request_id))]
        assert bench.ends == [State.ABORTED]

    def test_late_tokens_are_answered_with_another_abort(self, bench):
        generation = bench.start()
        request = bench.request()
        bench.dispatcher.abort(generation)
        bench.sent()
        bench.tokens(request, "decode", 1, 11)
        assert bench.sent() == [("d0", Abort(request.request_id))]
        assert taken(generation) == []

    def test_without_a_prefill_pool_it_is_local(self):
        bench = Bench()
        bench.alive("d0")
        bench.start()
        request = bench.request()
        assert (request.route.first, request.route.prefill) == (bench.workers["d0"], None)


class TestRetry:
    def test_a_lost_decode_worker_continues_elsewhere_exactly_there(self, bench):
        bench.alive("p0", "d0", "d1")
        generation = bench.start(prompt_logprobs=None)
        first = bench.request()
        bench.tokens(first, "prefill", 0, 10)
        bench.tokens(first, "decode", 1, 11)
        bench.tokens(first, "decode", 3, 13)                          # 12 is on its way
        lost = first.route.decode.worker_id
        bench.alive("p0", *({"d0", "d1"} - {lost}))
        letters = bench.sent()
        [second] = [message for _, message in letters if isinstance(message, GenerateRequest)]
        assert ("p0", Abort(first.request_id)) in letters
        assert all(name in ("p0", "d0", "d1") for name, _ in letters), "nobody writes to the dead"
        assert second.request_id != first.request_id
        assert (second.token_ids, second.num_prior_outputs) == ((1, 2, 3, 10, 11), 2)
        assert second.sampling == first.sampling
        assert second.route.decode.worker_id != lost
        bench.tokens(first, "prefill", 2, 66)                         # a late word of the old attempt
        bench.tokens(second, "prefill", 2, 12)
        bench.tokens(second, "decode", 3, 13, finish=FinishReason.LENGTH)
        assert (taken(generation), bench.ends, bench.reasons) == ([10, 11, 12, 13], [State.FINISHED], ["worker_lost"])

    def test_a_restart_under_the_same_name_is_a_death(self, bench):
        bench.start()
        first = bench.request()
        bench.alive("p0", "d0", epoch=2)
        assert bench.request().route.decode.epoch == first.route.decode.epoch + 1

    def test_the_prefill_worker_matters_until_the_decode_worker_has_the_kv(self, bench):
        bench.alive("p0", "p1", "d0")
        bench.start()
        first = bench.request()
        bench.tokens(first, "prefill", 0, 10)                         # comes before the KV has landed
        bench.alive(*({"p0", "p1"} - {first.route.prefill.worker_id}), "d0")
        assert bench.request().num_prior_outputs == 1

    def test_and_until_its_token_is_here(self, bench):
        """It said so to the decode worker, and died before it could tell us."""
        bench.alive("p0", "p1", "d0", "d1")
        generation = bench.start()
        first = bench.request()
        bench.tokens(first, "decode", 1, 11)
        bench.alive(*({"p0", "p1", "d0", "d1"} - {first.route.prefill.worker_id}))
        again = bench.request()
        assert (again.num_prior_outputs, bench.reasons) == (0, ["worker_lost"])
        bench.tokens(again, "prefill", 0, 10)
        bench.tokens(again, "decode", 1, 11, finish=FinishReason.LENGTH)
        assert (taken(generation), bench.ends) == ([10, 11], [State.FINISHED])

    @pytest.mark.parametrize("sign", ["span", "token"])
    def test_and_not_after(self, bench, sign):
        generation = bench.start()
        request = bench.request()
        bench.tokens(request, "prefill", 0, 10)
        if sign == "span":
            bench.span_of(request)
        else:
            bench.tokens(request, "decode", 1, 11)
        bench.failed(request, request.route.prefill, FailureKind.TIMEOUT, retryable=True)
        bench.alive("d0")
        assert bench.sent() == []
        assert generation.state is State.RUNNING

    def test_silence_is_a_death_and_the_silent_are_told(self, bench):
        bench.start()
        first = bench.request()
        bench.pass_time(4.0, "p0")
        sent = bench.sent()
        assert ("d0", Abort(first.request_id)) in sent
        assert bench.reasons == ["worker_lost"]
        [again] = [message for _, message in sent if isinstance(message, GenerateRequest)]
        assert again.route == Route(decode=bench.workers["p0"])                # which stands in

    def test_a_retryable_failure_waits_a_little_and_avoids_the_place(self, bench):
        bench.alive("p0", "p1", "d0", "d1")
        bench.start()
        first = bench.request()
        bench.failed(first, first.route.prefill, FailureKind.REFUSED, retryable=True)
        bench.sent()
        bench.dispatcher.watch()
        assert bench.sent() == []
        bench.pass_time(1.0, "p0", "p1", "d0", "d1")
        second = bench.request()
        assert second.route.prefill != first.route.prefill
        assert second.route.decode != first.route.decode

    def test_attempts_are_bounded(self, bench):
        generation = bench.start()
        for _ in range(LIMITS.max_attempts):
            request = bench.request()
            bench.failed(request, request.route.decode, FailureKind.PEER_LOST, retryable=True)
            bench.pass_time(2.0, "p0", "d0")
        assert bench.ends == [State.FAILED]
        assert isinstance(generation.error, GenerationFailed)
        assert (generation.error.kind, str(generation.error)) == (FailureKind.PEER_LOST, "attempt 3 of 3 failed: d0: because")
        assert bench.dispatcher.num_queued == 0

    def test_a_failure_that_is_final_is_final(self, bench):
        generation = bench.start()
        request = bench.request()
        bench.failed(request, request.route.prefill, FailureKind.INVALID, retryable=False)
        assert (bench.ends, generation.error.kind) == ([State.FAILED], FailureKind.INVALID)
        assert ("d0", Abort(request.request_id)) in bench.sent()

    def test_no_progress_is_a_failure(self, bench):
        bench.start()
        first = bench.request()
        bench.pass_time(20.0, "p0", "d0")
        bench.tokens(first, "prefill", 0, 10)
        bench.pass_time(30.0, "p0", "d0")
        assert bench.sent() == []
        bench.pass_time(1.0, "p0", "d0")
        assert bench.request().num_prior_outputs == 1
        assert bench.reasons == ["stalled"]

    def test_waiting_for_its_turn_is_none(self, bench):
        generation = bench.start()
        request = bench.request()
        bench.waiting_tokens = 1000
        bench.pass_time(100.0, "p0", "d0")
        assert (bench.sent(), generation.state) == ([], State.RUNNING)
        bench.tokens(request, "prefill", 0, 10)
        bench.pass_time(31.0, "p0", "d0")
        assert bench.reasons == ["stalled"]

    def test_batch_work_that_gives_way_is_not_stalled(self, bench):
        generation = bench.start(service_class=ServiceClass.BATCH)
        bench.tokens(bench.request(), "prefill", 0, 10)
        bench.pass_time(500.0, "p0", "d0")
        assert (generation.state, bench.reasons) == (State.RUNNING, [])
        bench.pass_time(101.0, "p0", "d0")
        assert (generation.state, generation.error.kind) == (State.FAILED, FailureKind.TIMEOUT)

    def test_prompt_logprobs_are_asked_for_once(self, bench):
        bench.start(logprobs=1, prompt_logprobs=1)
        first = bench.request()
        assert first.sampling.prompt_logprobs == 1
        bench.tokens(first, "prefill", 0, 10, logprobs=(TokenLogprobs(10, -1.0),))
        bench.failed(first, first.route.decode, FailureKind.PEER_LOST, retryable=True)
        bench.sent()
        bench.pass_time(1.0, "p0", "d0")
        assert bench.request().sampling.prompt_logprobs is None

    def test_missing_logprobs_are_not_passed_on(self, bench):
        generation = bench.start(logprobs=1)
        bench.tokens(bench.request(), "prefill", 0, 10)
        assert (taken(generation), bench.reasons) == ([], ["malformed"])


class TestWithoutARoute:
    def test_it_waits_and_goes_when_a_worker_comes(self):
        bench = Bench()
        generation = bench.start()
        bench.pass_time(59.0)
        assert generation.state is State.QUEUED
        bench.alive("d0")
        assert bench.request().route.decode == bench.workers["d0"]

    def test_but_not_for_ever(self):
        bench = Bench()
        generation = bench.start()
        bench.pass_time(61.0)
        assert bench.ends == [State.REFUSED]
        assert isinstance(generation.error, NoRoute)
        assert "no worker is alive and takes requests; waited 60 s" in str(generation.error)

    def test_after_an_attempt_that_is_a_failure_not_a_refusal(self, bench):
        bench.start()
        bench.alive()
        bench.pass_time(61.0)
        assert bench.ends == [State.FAILED]

    def test_a_queued_one_can_be_aborted(self):
        bench = Bench()
        bench.dispatcher.abort(bench.start())
        assert (bench.ends, bench.dispatcher.num_queued) == ([State.ABORTED], 0)


class TestRouterFault:
    def test_it_is_the_one_generations_that_it_was_asked_for(self, bench, monkeypatch, caplog):
        """In line, too: or nobody behind it would be looked at, and its gateway would stop."""
        bench.alive()
        asked, others = bench.start(max_tokens=5), [bench.start(), bench.start()]
        decide = bench.dispatcher._policy.decide

        def fails_for_one(request, view, now):
            return 1 / 0 if request.max_new_tokens == 5 else decide(request, view, now)

        monkeypatch.setattr(bench.dispatcher._policy, "decide", fails_for_one)
        bench.alive("p0", "d0")
        assert (asked.state, asked.error.kind) == (State.FAILED, FailureKind.INTERNAL)
        assert "the router failed" in caplog.text
        assert [other.state for other in others] == [State.RUNNING, State.RUNNING]


class TestLimits:
    def test_the_deadline_holds_over_all_attempts(self, bench):
        generation = bench.start()
        request = bench.request()
        for index in range(24):
            bench.tokens(request, "decode" if index else "prefill", index, 10)
            bench.pass_time(25.0, "p0", "d0")
        assert bench.ends == [State.FAILED]
        assert (generation.error.kind, "600 s: 24 tokens out, attempt 1" in str(generation.error)) == (FailureKind.TIMEOUT, True)

    def test_a_retry_has_only_the_time_that_is_left(self, bench):
        bench.start()
        first = bench.request()
        bench.pass_time(10.0, "p0", "d0")
        bench.failed(first, first.route.decode, FailureKind.REFUSED, retryable=True)
        bench.sent()
        bench.pass_time(1.0, "p0", "d0")
        assert bench.request().timeout_s == 589.0

    def test_a_full_gateway_refuses_at_once(self, bench):
        for _ in range(LIMITS.max_live_choices):
            bench.start()
        generation = bench.start()
        assert generation.state is State.REFUSED
        assert isinstance(generation.error, Overloaded)
        assert "4 choices" in str(generation.error)

    def test_a_full_cluster_refuses_at_once(self):
        bench = Bench(options=PolicyOptions(max_requests_per_worker=1))
        bench.alive("d0")
        bench.start()
        generation = bench.start()
        assert isinstance(generation.error, Overloaded)

    def test_but_never_what_it_has_begun(self):
        bench = Bench(options=PolicyOptions(max_requests_per_worker=1))
        bench.alive("d0", "d1")
        first, second = bench.start(), bench.start()
        bench.sent()
        bench.alive("d0")
        assert {first.state, second.state} == {State.RUNNING, State.QUEUED}

    def test_unread_tokens_are_bounded(self):
        bench = Bench(limits=Limits(max_buffered_tokens=5))
        bench.alive("d0")
        generation = bench.start(max_tokens=100)
        request = bench.request()
        for index in range(6):
            bench.tokens(request, "decode", index, 10)
        assert isinstance(generation.error, SlowClient)
        assert bench.sent() == [("d0", Abort(request.request_id))]


def test_every_end_is_final_and_every_state_reachable():
    ends = {state for state, successors in TRANSITIONS.items() if not successors}
    assert ends == {State.FINISHED, State.ABORTED, State.REFUSED, State.FAILED}
    assert set().union(*TRANSITIONS.values()) == set(State)
