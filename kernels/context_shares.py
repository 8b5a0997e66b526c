"""Into how many shares attention cuts a step's contexts, so that they fill a GPU.

Decode attention's items are one for each sequence, KV head and share:

    on the host, each step:  contexts ──► share_tokens: about how long a share is ──► the device; each sequence is cut into even shares
    in a captured graph:     most_shares: how many there can be at most; num_programs: who computes them

Measured on an H200 (docs/benchmarks.md): a program reads some 64 keys a microsecond, so none should have more than a multiprocessor's part
of all keys; and each cut costs a part of the merge, so nothing shorter than that gains. Where a multiprocessor has several programs, which
share its bandwidth, whoever has a long context among short ones would still end last by far: so what is longer than most is cut, too.

Prefill attention's tiles are enough for a GPU in all but a step's chunks of few tokens. For these there is `chunk_cut`, from shapes alone;
the lengths of shares follow on the device, from what the step's sequences are (`prefill_shares.py`).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

RESIDENT = (3, 4)           # programs that a multiprocessor has at once, of the larger and of the smaller tile (decode_attention.py)
SLACK = 1.1                 # over a multiprocessor's part: batches as long as each other should not be cut for a token
CUT_COST = 0.15             # of a step's attention, for each share
UNEVEN = 1.25               # times the mean context: nothing that is longer stays whole
MOST_ITEMS = 4              # for each multiprocessor: with more, those that there are are listed
FEWEST_SORTED = 2           # more (sequence, KV head) pairs for each multiprocessor than that: the longest shares are listed first
MOST_LISTED = 8             # (sequence, KV head) pairs for each multiprocessor: of more, nothing is listed
MOST_PARTS = 64             # for each multiprocessor: of partial answers there is room for that many
EVEN_SHARES = 8             # of a context: with fewer, a long one among short ones holds up a step
FEWEST_TOKENS = 128         # of a share of the longest context

FEWEST_KEYS = 512           # of a share of a chunk's context: with fewer, beginning it and merging it take as long as it does
MOST_CHUNK_SHARES = 32      # of one tile: the merge has all their sums in registers


@dataclass(frozen=True)
class ChunkCut:
    """How a launch of prefill attention may cut contexts."""

    room: int                           # shares for each KV head that the GPU computes at once; with fewer than two nothing is cut
    fewest_keys: int = FEWEST_KEYS      # of a share


def share_tokens(contexts: Sequence[int], kv_heads: int, num_sms: int, num_sequences: int = 0) -> int:
    """About how many tokens a share is to have, for sequences with these contexts, in a launch that has room for `num_sequences`."""
    if not contexts:
        return 1
    total, pairs = sum(contexts), max(num_sequences, len(contexts)) * kv_heads
    part, mean = SLACK * total * kv_heads / num_sms, total / len(contexts)
    if pairs <= MOST_LISTED * num_sms:
        return max(1, math.ceil(min(part, UNEVEN * mean)))
    _, shares = _whole_waves(pairs, num_sms)
    return max(1, math.ceil(min(part, mean / shares) if shares > 1 else part))


def most_shares(num_sequences: int, kv_heads: int, max_context: int, num_sms: int) -> int:
    """Of one context of a batch: what `share_tokens` can lead to, unless the batch keeps a GPU busy however long one of them is."""
    pairs = max(1, num_sequences * kv_heads)
    most, looked_at = math.ceil(num_sms / kv_heads), MOST_ITEMS * num_sms // pairs
    if pairs > MOST_LISTED * num_sms:
        most = _whole_waves(pairs, num_sms)[1]
    elif looked_at >= EVEN_SHARES:
        most = min(most, looked_at)
    else:
        most = min(most, MOST_PARTS * num_sms // pairs)
    return max(1, min(most, max_context // FEWEST_TOKENS))


def are_listed(pairs: int, splits: int, num_sms: int) -> bool:
    """Whether the shares that there are are listed, for there can be too many to look at them all."""
    return splits > 1 and pairs <= MOST_LISTED * num_sms and pairs * splits > MOST_ITEMS * num_sms


def are_sorted(pairs: int, num_sms: int) -> bool:
    """Whether the longest of listed shares come first. Of few sequences nearly all are cut, into shares about as long as each other."""
    return pairs > FEWEST_SORTED * num_sms


def chunk_cut(fewest_tiles: int, kv_heads: int, max_context: int, num_programs: int) -> ChunkCut:
    """For a GPU that runs `num_programs` at once, and at least so many tiles of query rows for each KV head.

    Nothing is cut where a tile can be but one share: two would take more programs than run at once, or leave too few keys for each.
    """
    room = num_programs // kv_heads
    return ChunkCut(room if room >= 2 * fewest_tiles and max_context >= 2 * FEWEST_KEYS else 0)


def num_programs(pairs: int, splits: int, num_sms: int, is_listed: bool = False) -> int:
    """As few on each multiprocessor as contexts that are not cut need; all that it can have at once, where the first of them take the
    shares that are listed; one for each item where the GPU has to come back for more anyway."""
    if is_listed:
        return resident(pairs, num_sms) * num_sms
    if splits == 1 or pairs > resident(pairs, num_sms) * num_sms:
        return pairs * splits
    return min(pairs * splits, math.ceil(pairs / num_sms) * num_sms)


def resident(pairs: int, num_sms: int) -> int:
    """How many programs a multiprocessor had best have at once, for as many (sequence, KV head) pairs."""
    return _whole_waves(pairs, num_sms)[0]


def _whole_waves(pairs: int, num_sms: int) -> tuple[int, int]:
    """The tile, by its resident programs, and the cut of all contexts after which the last wave of programs is nearly full."""
    if pairs <= RESIDENT[0] * num_sms:
        return RESIDENT[0], 1

    def cost(choice: tuple[int, int]) -> float:
        programs, shares = choice
        waves = pairs * shares / (programs * num_sms)
        return math.ceil(waves) / waves + CUT_COST * shares

    return min(((programs, shares) for programs in RESIDENT for shares in range(1, 5)), key=cost)
