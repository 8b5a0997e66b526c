"""One step's input to a model: T tokens of B sequences, packed without padding."""

from dataclasses import dataclass

from torch import Tensor

from ..kernels.ops import Paging


@dataclass(frozen=True)
class ForwardBatch:
    """All tensors are on the model's device. Sequence i owns rows query_starts[i] to query_starts[i+1] of T."""

    token_ids: Tensor         # [T] int64
    positions: Tensor         # [T] int64: each token's index in its sequence
    slots: Tensor             # [T] int64: where each token's KV goes, block_id * block_size + offset
    query_starts: Tensor      # [B+1] int32: cumulative query lengths, from 0
    context_lens: Tensor      # [B] int32: KV length after this step, this step's tokens included
    block_tables: Tensor      # [B, max_blocks] int32: padded with 0; never used past the context
    logit_rows: Tensor | None         # [R] int64: which of the T rows need logits; None: all
    has_single_rows: bool = True      # False: no sequence has exactly one row
    is_whole_prompt: bool = False     # one sequence, more than one row, and its rows are all of its context
    share_tokens: Tensor | None = None    # [1] int32: see Paging

    @property
    def paging(self) -> Paging:
        flags = self.has_single_rows, self.is_whole_prompt
        return Paging(self.query_starts, self.context_lens, self.block_tables, *flags, self.share_tokens)
