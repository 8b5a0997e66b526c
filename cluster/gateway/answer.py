"""A job's generations, joined into one answer.

    Job ──► one Generation and one Choice per index ──► dispatcher
    dispatcher ── wake(index) ──► wait() returns ──► take(): the pieces of all choices that have something new
"""

import asyncio
from collections.abc import Callable
from functools import partial

from ..router.policy import Objectives, Path
from .choice import Choice, Piece
from .detokenizer import Vocabulary
from .dialects import PromptTokensDetails, Usage
from .dispatch import Dispatcher
from .errors import SlowClient
from .generation import Generation, GenerationState, Prompt
from .jobs import Job


class Answer:
    def __init__(
        self,
        job: Job,
        dispatcher: Dispatcher,
        vocabulary: Vocabulary,
        arrived_at: float,
        deadline: float,
        objectives: Objectives,
        path: Path | None = None,
    ) -> None:
        self._job = job
        self._dispatcher = dispatcher
        self._woken: dict[int, None] = {}
        self._waiter: asyncio.Future[None] | None = None
        self._aborted = False
        self._on_slow: Callable[[], None] | None = None
        self._choices = [Choice(job, job.prompt_of(index), vocabulary) for index in range(job.num_choices)]
        self._num_open = job.num_choices
        self._cached_tokens = [0] * job.num_choices
        self._generations = [
            Generation(
                prompt=Prompt(
                    name=f"{job.response_id}-{index}",
                    token_ids=job.prompt_of(index).token_ids,
                    sampling=job.sampling_of(index),
                    deadline=deadline,
                    objectives=objectives,
                    service_class=job.service_class,
                    path=path,
                ),
                wake=partial(self._wake, index),
                arrived_at=arrived_at,
            )
            for index in range(job.num_choices)
        ]

    def start(self) -> None:
        for generation in self._generations:
            self._dispatcher.start(generation)

    def abort(self) -> None:
        """Everywhere; without effect on what has ended."""
        for generation in self._generations:
            self._dispatcher.abort(generation)

    @property
    def done(self) -> bool:
        return self._num_open == 0

    @property
    def aborted(self) -> bool:
        return self._aborted

    def on_slow(self, call: Callable[[], None]) -> None:
        """`call` is made when tokens pile up because the client does not read: a write may be waiting for it."""
        self._on_slow = call

    async def wait(self) -> None:
        """Until something is there to take. The dispatcher ends every generation by its deadline, so this returns."""
        if not self._woken:
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None

    def take(self) -> list[tuple[int, Piece]]:
        """What is new, by choice. Raises the error of a choice that failed: then there is no answer."""
        woken, self._woken = self._woken, {}
        return [(index, self._advance(index)) for index in woken]

    @property
    def first(self) -> Generation:
        return self._generations[0]

    def usage(self) -> Usage:
        prompt_tokens = sum(len(prompt.token_ids) for prompt in self._job.prompts)
        completion_tokens = sum(choice.num_tokens for choice in self._choices)
        cached = sum(self._cached_tokens[:: self._job.n])             # of each prompt's first choice: the others may find it there
        return Usage(prompt_tokens, completion_tokens, prompt_tokens + completion_tokens, PromptTokensDetails(cached))

    def _advance(self, index: int) -> Piece:
        generation, choice = self._generations[index], self._choices[index]
        error = generation.error
        if error is not None:
            raise error
        deltas = generation.take()
        if deltas and deltas[0].index == 0:
            self._cached_tokens[index] = deltas[0].num_cached_tokens
        was_open = choice.finish is None
        piece = choice.push(deltas)
        if was_open and piece.finish is not None:
            self._num_open -= 1
            self._dispatcher.finish(generation)       # a stop string, which the workers do not know of
        return piece

    def _wake(self, index: int) -> None:
        self._woken[index] = None
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
        generation = self._generations[index]
        if generation.ended:
            self._aborted = self._aborted or generation.state is GenerationState.ABORTED
            if self._on_slow is not None and isinstance(generation.error, SlowClient):
                self._on_slow()


def join(pieces: list[Piece]) -> Piece:
    return Piece("".join(piece.text for piece in pieces), tuple(token for piece in pieces for token in piece.tokens), pieces[-1].finish)
