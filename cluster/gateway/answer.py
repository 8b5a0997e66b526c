"""A job's generations, joined into one answer.

    Job ──► one Generation and one Choice per index ──► dispatcher
    dispatcher ── wake(index) ──► news, once until it is taken ──► take(): the pieces of all choices that have something new
"""

from collections.abc import Callable
from functools import partial

from ...messages.errors import DiptychError
from ..router.policy import Objectives, Path
from .choice import Choice, Piece, make_choice
from .detokenizer import Vocabulary
from .dialects import PromptTokensDetails, Usage
from .dispatch import Dispatcher
from .exchange import nothing
from .generation import Generation, Prompt
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
        """The dispatcher ends every generation by its deadline, so there is always news in the end."""
        self._job = job
        self._dispatcher = dispatcher
        self._woken: dict[int, None] = {}
        self._on_news: Callable[[], None] = nothing
        self._choices: list[Choice] = []
        self._generations: list[Generation] = []
        self.num_open = job.num_choices       # that have not come to their end
        self._cached_tokens = [0] * self.num_open
        for index in range(self.num_open):
            asked = job.prompt_of(index)
            prompt = Prompt(
                name=f"{job.response_id}-{index}",
                token_ids=asked.token_ids,
                sampling=job.sampling_of(index),
                deadline=deadline,
                objectives=objectives,
                service_class=job.service_class,
                path=path,
            )
            self._choices.append(make_choice(job, asked, vocabulary))
            self._generations.append(Generation(prompt, partial(self._wake, index), arrived_at))
            if self.num_open > 1:
                self._generations[-1].routed = self._on_routed

    def start(self, on_news: Callable[[], None]) -> None:
        """`on_news` is called when there is something to take, again when that has been taken, and whenever a choice ends."""
        self._on_news = on_news
        for generation in self._generations:
            self._dispatcher.start(generation)

    def close(self) -> None:
        """Nobody is told of news any more. What has not ended is aborted."""
        self._on_news = nothing
        for generation in self._generations:
            generation.wake = generation.routed = nothing     # so a cycle of references ends, which the collector would have to find
            self._dispatcher.abort(generation)

    def fail(self, error: DiptychError) -> None:
        """One choice has failed, and with it the answer: the others fail, too, and nobody is told of news any more."""
        self._on_news = nothing
        for generation in self._generations:
            self._dispatcher.drop(generation, error)

    @property
    def error(self) -> DiptychError | None:
        """Of a choice that failed."""
        return next((each.error for each in self._generations if each.error is not None), None)

    def take(self) -> list[tuple[int, Piece]]:
        """What is new, by choice. Raises the error of a choice that failed: then there is no answer."""
        woken, self._woken = self._woken, {}
        return [(index, self._advance(index)) for index in woken if self._choices[index].finish is None]

    @property
    def first(self) -> Generation:
        return self._generations[0]

    @property
    def has_begun(self) -> bool:
        """Some token has come, be it told or not."""
        return any(generation.outputs for generation in self._generations)

    @property
    def may_be_told(self) -> bool:
        """Every choice has gone to some worker, so that none is refused any more; or one has failed."""
        return all(generation.num_attempts for generation in self._generations) or self.error is not None

    @property
    def num_tokens(self) -> int:
        """Of all choices that a worker was asked for: the prompt's, and what has come."""
        asked = [each for each in self._generations if each.num_attempts]
        return sum(len(each.prompt.token_ids) + len(each.outputs) for each in asked)

    def usage(self) -> Usage:
        prompt_tokens = self._job.num_prompt_tokens
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
        piece = choice.push(deltas)
        if piece.finish is not None:
            self.num_open -= 1
            self._dispatcher.finish(generation)       # a stop string, which the workers do not know of
        return piece

    def _on_routed(self) -> None:
        if self._woken and self.may_be_told:
            self._on_news()

    def _wake(self, index: int) -> None:
        is_news = not self._woken or self._generations[index].ended
        self._woken[index] = None
        if is_news:
            self._on_news()
