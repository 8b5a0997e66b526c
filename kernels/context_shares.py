"""Into how many shares decode attention cuts a step's contexts, so that its items, one for each sequence, KV head and share, fill a GPU.

    on the host, each step:  contexts ──► share_tokens: about how long a share is ──► the device; each sequence is cut into even shares
    in a captured graph:     most_shares: how many there can be at most; num_programs: who computes them

Measured on an H200 (docs/benchmarks.md): a program reads some 64 keys a microsecond, so none should have more than a multiprocessor's part
of all keys; and each cut costs a part of the merge, so nothing shorter than that gains.
"""

import math
from collections.abc import Sequence

RESIDENT = 3                # programs that a multiprocessor has at once
SLACK = 1.1                 # over a multiprocessor's part: batches as long as each other should not be cut for a token
CUT_COST = 0.15             # of a step's attention, for each share
MOST_ITEMS = 4              # for each multiprocessor, with those where nothing is to be done, unless uncut contexts are more
FEWEST_TOKENS = 128         # of a share of the longest context


def share_tokens(contexts: Sequence[int], kv_heads: int, num_sms: int) -> int:
    """About how many tokens a share is to have, for sequences with these contexts."""
    if not contexts:
        return 1
    total, pairs = sum(contexts), len(contexts) * kv_heads
    share, waves = SLACK * total * kv_heads / num_sms, _shares_for_whole_waves(pairs, num_sms)
    return max(1, math.ceil(min(share, total / len(contexts) / waves) if waves > 1 else share))


def most_shares(num_sequences: int, kv_heads: int, max_context: int, num_sms: int) -> int:
    """Of one context of a batch: what `share_tokens` can lead to, as far as looking for work does not take longer than is won."""
    pairs = max(1, num_sequences * kv_heads)
    most = min(math.ceil(num_sms / kv_heads), MOST_ITEMS * num_sms // pairs)
    return max(1, min(max(most, _shares_for_whole_waves(pairs, num_sms)), max_context // FEWEST_TOKENS))


def num_programs(num_sequences: int, kv_heads: int, splits: int, num_sms: int) -> int:
    """As few on each multiprocessor as contexts that are not cut need; one for each item where the GPU has to come back for more anyway."""
    pairs = max(1, num_sequences * kv_heads)
    return pairs * splits if splits == 1 or pairs > RESIDENT * num_sms else min(pairs * splits, math.ceil(pairs / num_sms) * num_sms)


def _shares_for_whole_waves(pairs: int, num_sms: int) -> int:
    """The cut of all contexts after which the last wave of programs is nearly full; 1 if all are resident at once."""
    slots = RESIDENT * num_sms
    if pairs <= slots:
        return 1
    return min(range(1, 5), key=lambda shares: math.ceil(pairs * shares / slots) / (pairs * shares / slots) + CUT_COST * shares)
