"""Random histories of a dispatcher: messages lost, doubled, reordered and late, workers that die seen and unseen, clients that leave.

After any of them: each generation ended exactly once, and what it delivered is the answer's beginning, without a gap or a repeat. What had
an attempt left when the faults ceased is finished.
"""

from collections import Counter
from dataclasses import dataclass, field
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diptych.cluster.gateway.config import Limits
from diptych.cluster.gateway.dispatch import Dispatcher
from diptych.cluster.gateway.generation import Generation, GenerationState, Prompt
from diptych.cluster.router.load_view import LoadView
from diptych.cluster.router.registry import PolicyOptions, make_policy
from diptych.messages.codec import Message
from diptych.messages.fake_post import FakeNetwork
from diptych.messages.ids import Epoch, WorkerId
from diptych.messages.membership import Member, Membership, Role
from diptych.messages.requests import (
    FailureKind,
    FinishReason,
    GenerateRequest,
    LoadReport,
    LoadUpdate,
    RequestFailed,
    RequestSpan,
    SamplingParams,
    StepTokens,
    TokenDelta,
    WorkerRef,
)

LIMITS = Limits(request_timeout_s=200.0, queue_timeout_s=20.0, stall_timeout_s=10.0, max_attempts=4)
PROMPT = (1, 2, 3)
NAMES = ("p0", "p1", "d0", "d1")


def token_at(index: int) -> int:
    """The one right answer."""
    return 1000 + index


@dataclass
class History:
    random: Random
    now: float = 0.0
    calm: bool = False                        # no more faults
    version: int = 0
    lives: Counter[str] = field(default_factory=Counter)
    in_flight: list[Message] = field(default_factory=list)
    delivered: dict[str, list[int]] = field(default_factory=dict)
    ends: Counter[str] = field(default_factory=Counter)
    generations: list[Generation] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.network = FakeNetwork()
        post = self.network.post("gateway")
        policy = make_policy("random", PolicyOptions(seed=self.random.randrange(1000)))
        self.dispatcher = Dispatcher(post, policy, LoadView(LIMITS.silent_after_s), LIMITS, self, lambda: self.now)
        self.alive = {name: self._born(name) for name in NAMES}
        self.announce()

    def ended(self, generation: Generation) -> None:
        self.ends[generation.prompt.name] += 1

    def retried(self, reason: str) -> None: ...

    def span(self, span: RequestSpan) -> None: ...

    def start(self) -> None:
        name = f"g{len(self.generations)}"
        prompt = Prompt(name, PROMPT, SamplingParams(max_tokens=self.random.randint(1, 8), seed=1), self.now + LIMITS.request_timeout_s)
        self.generations.append(Generation(prompt, lambda: None, self.now))
        self.dispatcher.start(self.generations[-1])

    def work(self) -> None:
        """Workers that live take their requests and answer all of each, as messages in flight."""
        letters, self.network.in_flight = self.network.in_flight, []
        addresses = {ref.address for ref in self.alive.values()}
        for letter in letters:
            if isinstance(letter.message, GenerateRequest) and letter.to in addresses:
                self._answer(letter.message)

    def _answer(self, request: GenerateRequest) -> None:
        assert request.token_ids == (*PROMPT, *map(token_at, range(request.num_prior_outputs))), "a retry carries what was delivered"
        route, last = request.route, request.sampling.max_tokens - 1
        for index in range(request.num_prior_outputs, last + 1):
            worker = route.first if index == request.num_prior_outputs else route.decode
            finish = FinishReason.LENGTH if index == last else None
            self.in_flight.append(StepTokens(worker, (TokenDelta(request.request_id, index, (token_at(index),), finish),)))
        if route.prefill is not None and last > request.num_prior_outputs:
            self.in_flight.append(RequestSpan(request.request_id, route.prefill, route.decode.worker_id, "fake", 1, 1, 0, 0.1, 0.1))
        if self.random.random() < 0.1 and not self.calm:
            kind = self.random.choice(list(FailureKind))
            worker = self.random.choice([route.first, route.decode])
            self.in_flight.append(RequestFailed(request.request_id, kind, "x", self.random.random() < 0.8, worker))

    def deliver(self) -> None:
        if self.in_flight:
            index = self.random.randrange(min(4, len(self.in_flight)))
            self._hand_over(self.in_flight.pop(index))

    def double(self) -> None:
        if self.in_flight:
            self.in_flight.append(self.random.choice(self.in_flight))

    def drop(self) -> None:
        if self.in_flight:
            self.in_flight.pop(self.random.randrange(len(self.in_flight)))

    def kill(self) -> None:
        """What the dead had sent may still arrive; what it had not, never does."""
        name = self.random.choice(NAMES)
        dead = self.alive.pop(name, None)
        if dead is not None:
            kept = self.random.random()
            self.in_flight = [m for m in self.in_flight if getattr(m, "worker", None) != dead or self.random.random() < kept]

    def restart(self) -> None:
        for name in NAMES:
            if name not in self.alive:
                self.alive[name] = self._born(name)
        self.announce()

    def announce(self) -> None:
        self.version += 1
        roles = {"p": Role.PREFILL, "d": Role.DECODE}
        members = tuple(Member(ref, roles[name[0]], "layout", 16, 100, 1000) for name, ref in self.alive.items())
        self.dispatcher.update_membership(Membership(self.version, members, ()))

    def leave(self) -> None:
        if self.generations:
            self.dispatcher.abort(self.random.choice(self.generations))

    def pass_time(self, seconds: float | None = None) -> None:
        self.now += self.random.choice([0.1, 0.5, 2.0]) if seconds is None else seconds
        self.dispatcher.handle([LoadUpdate(LoadReport(ref, 0, 0, 0, 0, 100, 100, 16)) for ref in self.alive.values()])
        self.dispatcher.watch()

    def _hand_over(self, message: Message) -> None:
        self.dispatcher.handle([message])
        for generation in self.generations:
            got = self.delivered.setdefault(generation.prompt.name, [])
            fresh = [token_id for delta in generation.take() for token_id in delta.token_ids]
            assert not fresh or generation.state in (GenerationState.RUNNING, GenerationState.FINISHED)
            got += fresh

    def _born(self, name: str) -> WorkerRef:
        self.lives[name] += 1
        return WorkerRef(WorkerId(name), Epoch(self.lives[name]), self.network.post(f"{name}/{self.lives[name]}").address)

    def become_calm(self) -> list[Generation]:
        """Returns who must finish now."""
        self.calm = True
        self.in_flight = [message for message in self.in_flight if not isinstance(message, RequestFailed)]
        return [each for each in self.generations if not each.ended and each.num_attempts < LIMITS.max_attempts]

    def check(self) -> None:
        for generation in self.generations:
            name = generation.prompt.name
            assert generation.ended, f"{name} hangs in {generation.state}"
            assert self.ends[name] == 1
            got = self.delivered.get(name, [])
            assert got == generation.outputs == [token_at(index) for index in range(len(got))]
            if generation.state is GenerationState.FINISHED:
                assert len(got) == generation.prompt.sampling.max_tokens
            assert (generation.error is not None) == (generation.state in (GenerationState.FAILED, GenerationState.REFUSED))
        assert (self.dispatcher.num_running, self.dispatcher.num_queued) == (0, 0)


WEIGHTS = {
    "start": 4, "work": 20, "deliver": 60, "double": 4, "drop": 2, "kill": 1, "restart": 2, "announce": 2, "leave": 1, "pass_time": 8,
}  # fmt: skip


@settings(max_examples=150)
@given(st.integers(0, 1 << 32), st.integers(1, 300))
def test_any_history_ends_well(seed, num_events):
    history = History(Random(seed))
    for event in history.random.choices(list(WEIGHTS), list(WEIGHTS.values()), k=num_events):
        getattr(history, event)()
    hopeful = history.become_calm()
    for _ in range(20):
        history.restart()
        history.work()
        while history.in_flight:
            history.deliver()
        history.pass_time(2.0)
    history.check()
    assert {generation.state for generation in hopeful} <= {GenerationState.FINISHED}


@pytest.mark.parametrize("seed", range(5))
def test_without_faults_all_finish(seed):
    history = History(Random(seed))
    for _ in range(20):
        history.start()
    history.work()
    while any(isinstance(message, StepTokens) for message in history.in_flight):
        history.in_flight = [message for message in history.in_flight if not isinstance(message, RequestFailed)]
        history.deliver()
    assert {generation.state for generation in history.generations} == {GenerationState.FINISHED}
    history.check()
