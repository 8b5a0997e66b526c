"""What follows on a step's drawn tokens on a GPU: rows whose logits are changed first are drawn again, and log-probabilities are taken.

    logits ──► change_logits ──► sample ──► settle: into `sampled`, into the counts        if `ChangedRows`
       └─────► token_logprobs of `sampled` and of prompts ──► pinned host memory           if `ScoredRows`

Queued like the rest of the step: nothing here needs the host. A row that is drawn again has been drawn greedily before, within the step.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels.logit_changes import LogitChanges, change_logits, settle
from ..kernels.logprobs import token_logprobs
from ..kernels.sampling import Draws, sample
from .draw import columns, draw_of
from .row_extras import ChangedRows, Fresh, ScoredRows
from .sampler import Sampled
from .staging import DEPTH, Staging

FIRST_BYTES = 1 << 16    # of the buffers, which grow with what is asked for


@dataclass(frozen=True)
class Scores:
    """On their way to the host; there when the step's event has passed."""

    rows: ScoredRows
    logprobs: Tensor    # [S, 1 + most_top] fp32, pinned
    ids: Tensor         # [S, most_top] int32, pinned

    def of_chunks(self, sampled: Sequence[int]) -> Iterator[tuple[tuple[Sampled, ...], Sampled | None]]:
        """Of each chunk: its prompt's and its sampled token's. `sampled`: the tokens of all that sample."""
        return self.rows.of_chunks(self.logprobs.numpy(), self.ids.numpy(), sampled)


class DeviceSampler:
    """`sampled` [max_sequences] int64 on the device: the tokens of a step; -1 where logits were not finite."""

    def __init__(self, sampled: Tensor, vocab: int) -> None:
        self._sampled = sampled
        self._counts = torch.zeros(len(sampled), vocab, dtype=torch.int16, device=sampled.device)
        self._changes, self._fresh, self._scored = (Staging(FIRST_BYTES, sampled.device) for _ in range(3))     # each used once a step
        self._back = [torch.empty(FIRST_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(DEPTH)]
        self._turn = 0

    def draw_changed(self, logits: Tensor, changed: ChangedRows) -> None:
        """logits [R, vocab], row by row what is sampled."""
        real, top_k = columns([draw_of(sequence) for sequence in changed.sequences])
        arrays = [changed.rows, changed.slots, *changed.penalties, changed.bias_starts, changed.bias_ids, changed.biases]
        *there, k, temperature, top_p, min_p, fraction = self._changes.upload([*arrays, top_k, *real])
        changes = LogitChanges(*there)
        tokens = sample(change_logits(logits, self._counts, changes), Draws(temperature, k, top_p, min_p, fraction))
        settle(self._sampled, tokens, self._counts, changes)

    def count(self, fresh: Fresh) -> None:
        """Of sequences that were not in the step before."""
        slots, places, counts = self._fresh.upload([fresh.slots, fresh.places, fresh.counts])
        self._counts.index_fill_(0, slots, 0)
        self._counts.view(-1).index_copy_(0, places, counts)

    def score(self, logits: Tensor, scored: ScoredRows) -> Scores:
        """logits: of the chunks' spans."""
        rows, tokens, num_top = self._scored.upload([scored.rows, scored.tokens, scored.num_top])
        logprobs, ids = token_logprobs(logits, rows, tokens, self._sampled, num_top, scored.most_top)
        self._turn = (self._turn + 1) % DEPTH
        there = self._pinned(logprobs.nbytes + ids.nbytes)
        logprobs_there, ids_there = there[: logprobs.nbytes], there[logprobs.nbytes : logprobs.nbytes + ids.nbytes]
        return Scores(scored, _copied(logprobs, logprobs_there), _copied(ids, ids_there))

    def _pinned(self, num_bytes: int) -> Tensor:
        if num_bytes > len(self._back[self._turn]):
            self._back[self._turn] = torch.empty(2 * num_bytes, dtype=torch.uint8, pin_memory=True)
        return self._back[self._turn]


def _copied(source: Tensor, target: Tensor) -> Tensor:
    """Queues the copy into `target`, bytes on the host."""
    shaped: Tensor = target.view(source.dtype).view(source.shape)
    shaped.copy_(source, non_blocking=True)
    return shaped
