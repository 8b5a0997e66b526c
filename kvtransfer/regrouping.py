"""Which tokens of a sender's blocks make up a receiver's blocks, where the two hold different numbers of them: pure.

    sender's blocks of 4 tokens      │ 0 1 2 3 │ 4 5 6 7 │ 8 9 · · │
    receiver's blocks of 6 tokens    │ 0 1 2 3 4 5 │ 6 7 8 9 · · │         runs of gcd(4, 6) = 2 tokens lie together in both
"""

import math
from dataclasses import dataclass

import numpy as np

from .transport import IdArray


@dataclass(frozen=True)
class Runs:
    """Run i goes from place `src_places[i]` of the sender's block `src_blocks[i]` to place `places[i]` of the asked block `asked[i]`."""

    asked: IdArray                 # index into what was asked for
    places: IdArray                # in runs from the block's start
    src_blocks: IdArray            # index into the prompt's blocks
    src_places: IdArray


@dataclass(frozen=True)
class Regrouping:
    """Of a prompt's tokens from blocks of `src_size` into blocks of `dst_size`."""

    src_size: int
    dst_size: int

    @property
    def run_tokens(self) -> int:
        return math.gcd(self.src_size, self.dst_size)

    def runs_into(self, blocks: IdArray, num_src_blocks: int) -> Runs:
        """`blocks` [n]: the receiver's, by index in the prompt. Places past the sender's last block are left out: no token is there."""
        per_block, per_src_block = self.dst_size // self.run_tokens, self.src_size // self.run_tokens
        places = np.arange(per_block)
        run = blocks[:, None] * per_block + places                    # [n, per_block]: in the prompt
        asked, place = np.nonzero(run < num_src_blocks * per_src_block)
        wanted = run[asked, place]
        return Runs(asked, place, wanted // per_src_block, wanted % per_src_block)
