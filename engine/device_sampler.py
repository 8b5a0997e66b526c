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
from ..messages.requests import MAX_LOGPROBS
from .draw import columns, draw_of
from .row_extras import ChangedRows, Fresh, ScoredRows
from .sampler import Sampled
from .scheduler import MAX_SCORED_TOKENS
from .staging import DEPTH, Staging

CHANGED_BYTES = 1 << 16    # of a step's rows and biases; a buffer grows if there are more
COUNT_BYTES = 10           # of a token that is counted: where, and how often
ROW_BYTES = 12             # of a score asked for


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

    def __init__(self, sampled: Tensor, vocab: int, max_model_len: int) -> None:
        self._sampled = sampled
        most_scored = MAX_SCORED_TOKENS + len(sampled)
        self._counts = torch.zeros(len(sampled), vocab, dtype=torch.int16, device=sampled.device)
        sizes = CHANGED_BYTES, COUNT_BYTES * max_model_len + CHANGED_BYTES, ROW_BYTES * most_scored + CHANGED_BYTES
        self._changes, self._fresh, self._scored = (Staging(size, sampled.device) for size in sizes)     # each used once a step
        most_back = 4 * most_scored * (1 + 2 * MAX_LOGPROBS)
        self._back = [torch.empty(most_back, dtype=torch.uint8, pin_memory=True) for _ in range(DEPTH)]
        self._turn = 0

    def draw_changed(self, logits: Tensor, changed: ChangedRows) -> None:
        """logits [R, vocab], row by row what is sampled."""
        real, top_k = columns([draw_of(sequence) for sequence in changed.sequences])
        *there, k, temperature, top_p, min_p, fraction = self._changes.upload([*changed.arrays, top_k, *real])
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
        there, split, end = self._back[self._turn], logprobs.nbytes, logprobs.nbytes + ids.nbytes
        return Scores(scored, _copied(logprobs, there[:split]), _copied(ids, there[split:end]))


def _copied(source: Tensor, target: Tensor) -> Tensor:
    """Queues the copy into `target`, bytes on the host."""
    shaped: Tensor = target.view(source.dtype).view(source.shape)
    shaped.copy_(source, non_blocking=True)
    return shaped
