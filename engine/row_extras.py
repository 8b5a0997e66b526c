"""What rows of a step want beside a draw: changed logits, log-probabilities. Pure: chunks in, arrays for the device out.

    changes ── biases, penalties, stop tokens masked until min_tokens ──► what kernels/logit_changes.py is given
    scores ─── log-probabilities of sampled and of prompt tokens ──────► what kernels/logprobs.py is given

Penalties go by counts on the device, a row of a table for each sequence. `CountSlots` says which: one that was sampled in the step before
keeps its row, into which the kernels have counted that step's token; any other is counted anew, from the tokens that the host knows.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..kernels.token_counts import IN_PROMPT, MOST_COUNTED
from .model_runner import logit_span, scored_prompt
from .sampler import Sampled
from .scheduler import Chunk
from .sequence import Sequence as Seq

NO_SLOT = -1


@dataclass(frozen=True)
class Fresh:
    """What the table of counts (kernels/token_counts.py) lacks: rows to clear, and then places to set, row · vocab + token."""

    slots: NDArray[np.int64]
    places: NDArray[np.int64]
    counts: NDArray[np.int16]


class CountSlots:
    def __init__(self, num_slots: int) -> None:
        self._num_slots = num_slots
        self._held: dict[Seq, tuple[int, int]] = {}        # of the step before: slot, and how many tokens have been counted

    def assign(self, sequences: Sequence[Seq]) -> tuple[list[int], dict[Seq, int]]:
        """A slot for each, of a step that samples for all of them; and which of these slots are to be counted anew."""
        assert len(sequences) <= self._num_slots, f"{len(sequences)} sequences, {self._num_slots} slots"
        kept = {s: self._held[s][0] for s in sequences if s in self._held and self._held[s][1] == len(s.token_ids)}
        taken = set(kept.values())
        free = (slot for slot in range(self._num_slots) if slot not in taken)
        fresh = {s: next(free) for s in sequences if s not in kept}
        slot_of = kept | fresh
        self._held = {s: (slot_of[s], len(s.token_ids) + 1) for s in sequences}
        return [slot_of[s] for s in sequences], fresh


def counted(fresh: Mapping[Seq, int], vocab: int) -> Fresh:
    """What is to be in their slots. It takes a millisecond for 8192 tokens: better done while the device computes."""
    ids, counts = zip(*(_counts_of(sequence) for sequence in fresh), strict=True)
    return Fresh(
        slots=np.array(list(fresh.values()), dtype=np.int64),
        places=np.concatenate([each + slot * vocab for each, slot in zip(ids, fresh.values(), strict=True)]),
        counts=np.concatenate(counts),
    )


def _counts_of(sequence: Seq) -> tuple[NDArray[np.int64], NDArray[np.int16]]:
    """Its distinct tokens, and what stands for each in the table."""
    assert not sequence.is_pending, "its newest token is not known, and it was not sampled in the step before"
    ids, which = np.unique(np.array(sequence.token_ids, dtype=np.int64), return_inverse=True)
    prompt, outputs = np.split(which, [sequence.num_prompt_tokens])
    counts = np.minimum(np.bincount(outputs, minlength=len(ids)), MOST_COUNTED)
    counts[prompt] |= IN_PROMPT
    return ids, counts.astype(np.int16)


@dataclass(frozen=True)
class ChangedRows:
    """Fields, shapes and types of LogitChanges, and the S sequences themselves."""

    sequences: tuple[Seq, ...]
    rows: NDArray[np.int32]    # of what is sampled
    slots: NDArray[np.int32]
    penalties: NDArray[np.float32]    # [3, S]: repetition, presence, frequency
    bias_starts: NDArray[np.int32]
    bias_ids: NDArray[np.int32]
    biases: NDArray[np.float32]

    @property
    def arrays(self) -> tuple[NDArray[Any], ...]:
        """In the order of LogitChanges' fields."""
        return self.rows, self.slots, *self.penalties, self.bias_starts, self.bias_ids, self.biases


def changed_rows(sampling: Sequence[Seq], slots: CountSlots) -> tuple[ChangedRows | None, dict[Seq, int]]:
    """Of the sequences that a step samples for, in order, and whose slots are to be `counted` before they are drawn. To be asked in every
    step: `slots` go by the step before."""
    chosen = [(row, s) for row, s in enumerate(sampling) if not s.is_plain and s.request.sampling.changes_logits(s.num_outputs)]
    penalised = [s for _, s in chosen if s.request.sampling.is_penalised]
    assigned, fresh = slots.assign(penalised)
    if not chosen:
        return None, {}
    slot_of = dict(zip(penalised, assigned, strict=True))
    biases = [_biases(s) for _, s in chosen]
    params = [s.request.sampling for _, s in chosen]
    penalties = [p.repetition_penalty for p in params], [p.presence_penalty for p in params], [p.frequency_penalty for p in params]
    changed = ChangedRows(
        sequences=tuple(s for _, s in chosen),
        rows=np.array([row for row, _ in chosen], dtype=np.int32),
        slots=np.array([slot_of.get(s, NO_SLOT) for _, s in chosen], dtype=np.int32),
        penalties=np.array(penalties, dtype=np.float32),
        bias_starts=np.array([0, *accumulate(map(len, biases))], dtype=np.int32),
        bias_ids=np.array([token for each in biases for token in each], dtype=np.int32),
        biases=np.array([value for each in biases for value in each.values()], dtype=np.float32),
    )
    return changed, fresh


def _biases(sequence: Seq) -> dict[int, float]:
    sampling = sequence.request.sampling
    masked = sampling.stop_token_ids if sampling.masks_stops(sequence.num_outputs) else ()
    return sampling.logit_bias | dict.fromkeys(masked, -np.inf)


@dataclass(frozen=True)
class ScoredRows:
    """S tokens whose log-probabilities are wanted, chunk by chunk: those of its prompt, then the one that it samples."""

    rows: NDArray[np.int32]      # of the logits
    tokens: NDArray[np.int32]    # -1 - i: the one that is sampled i-th
    num_top: NDArray[np.int32]
    num_prompt: tuple[int, ...]     # of each chunk
    is_sampled: tuple[bool, ...]    # of each chunk: whether the one that it samples is among them

    @property
    def most_top(self) -> int:
        return int(self.num_top.max())

    def of_chunks(
        self, logprobs: NDArray[np.float32], ids: NDArray[np.int32], sampled: Sequence[int]
    ) -> Iterator[tuple[tuple[Sampled, ...], Sampled | None]]:
        """Of each chunk: its prompt's and its sampled token's. logprobs [S, 1 + most_top], ids [S, most_top], `sampled` all that were."""
        tokens = [sampled[-1 - token] if token < 0 else token for token in self.tokens.tolist()]
        columns = tokens, self.num_top.tolist(), logprobs[:, 0].tolist(), logprobs[:, 1:].tolist(), ids.tolist()
        scores = (_score(*row) for row in zip(*columns, strict=True))
        for num_prompt, is_sampled in zip(self.num_prompt, self.is_sampled, strict=True):
            prompt = tuple(islice(scores, num_prompt))
            yield prompt, next(scores) if is_sampled else None


def scored_rows(chunks: Sequence[Chunk], vocab: int) -> ScoredRows | None:
    """None: nobody wants any."""
    if all(chunk.sequence.is_plain for chunk in chunks):
        return None
    rows, tokens, num_top = list[int](), list[int](), list[int]()
    num_prompt, is_sampled = list[int](), list[bool]()
    first, num_sampled = 0, 0
    for chunk in chunks:
        sampling, span = chunk.sequence.request.sampling, logit_span(chunk)
        following = scored_prompt(chunk)
        wants_sampled = chunk.samples and sampling.logprobs is not None
        rows += [*range(first, first + len(following)), *([first + len(span) - 1] if wants_sampled else [])]
        tokens += [*following, *([-1 - num_sampled] if wants_sampled else [])]
        num_top += [min(sampling.prompt_logprobs or 0, vocab)] * len(following) + [min(sampling.logprobs or 0, vocab)] * wants_sampled
        num_prompt.append(len(following))
        is_sampled.append(wants_sampled)
        first += len(span)
        num_sampled += chunk.samples
    if not rows:
        return None
    at, which, counts = (np.array(each, dtype=np.int32) for each in (rows, tokens, num_top))
    return ScoredRows(at, which, counts, tuple(num_prompt), tuple(is_sampled))


def _score(token: int, num_top: int, logprob: float, logprobs: list[float], ids: list[int]) -> Sampled:
    return Sampled(token, logprob, tuple(zip(ids[:num_top], logprobs[:num_top], strict=True)))
