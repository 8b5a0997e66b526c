"""Logits to tokens. A draw is a pure function of the request and its tokens so far, so any worker continues the same stream.

    raw logits ── logit_bias ── repetition ── presence, frequency ── min_tokens ──► temperature 0? the largest
                                                                                     else ÷ temperature ── top_k ── top_p ── min_p ── draw

The randomness of output i is a hash of (seed, i): neither batch mates nor chunking, retries or the worker's role can shift it. The draw
inverts the cumulative distribution in vocabulary order in fp64, so that a last-bit difference in a logit almost never moves it.
Log-probabilities are the raw model's, before any step above.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from msgspec import Struct
from torch import Tensor

from ..messages.requests import SamplingParams


@dataclass(frozen=True)
class SamplingRow:
    """What one row of logits is sampled with. Its output index is len(output_ids)."""

    params: SamplingParams
    prompt_ids: Sequence[int]
    output_ids: Sequence[int]


class Sampled(Struct, frozen=True):
    token_id: int
    logprob: float | None = None                 # None: params.logprobs was None
    top: tuple[tuple[int, float], ...] = ()      # the most likely tokens, best first; equal ones by id


def sample(logits: Tensor, rows: Sequence[SamplingRow]) -> list[Sampled]:
    """One token for each row: logits [R, vocab] fp32, raw from the model; len(rows) == R.

    repetition_penalty r: a token of prompt or output has its logit divided by r if positive, else multiplied (CTRL, arXiv 1909.05858).
    presence p, frequency f: a token that is c > 0 times in the output loses p + c·f. min_tokens: until so many are out, no stop token.
    top_k: the k largest logits. top_p: the shortest run of the most likely tokens, after top_k, whose probability reaches p (nucleus,
    arXiv 1904.09751). min_p: tokens at least min_p times as likely as the likeliest. Ties go to the lower id throughout.
    """
    assert logits.shape[0] == len(rows), f"{logits.shape[0]} rows of logits for {len(rows)} sequences"
    token_ids: list[int] = torch.argmax(logits, dim=-1).tolist()        # the whole answer for plain greedy rows
    for i, row in enumerate(rows):
        if not _is_plain_greedy(row):
            token_ids[i] = _choose(logits[i].to(torch.float64, copy=True), row)
    wanted = [i for i, row in enumerate(rows) if row.params.logprobs is not None]
    sampled = [Sampled(token_id) for token_id in token_ids]
    if wanted:
        scores = score(logits[wanted], [token_ids[i] for i in wanted], [rows[i].params.logprobs or 0 for i in wanted])
        for i, scored in zip(wanted, scores, strict=True):
            sampled[i] = scored
    return sampled


def score(logits: Tensor, token_ids: Sequence[int], num_top: Sequence[int]) -> list[Sampled]:
    """Raw log-probabilities of given tokens (a prompt's, or just sampled) and of each row's num_top likeliest: logits [R, vocab]."""
    return [_score(row.double(), token_id, count) for row, token_id, count in zip(logits, token_ids, num_top, strict=True)]


def _score(logits: Tensor, token_id: int, num_top: int) -> Sampled:
    logprobs = torch.log_softmax(logits, dim=-1)
    top = tuple((int(i), float(logprobs[i])) for i in _best(logprobs, num_top))
    return Sampled(token_id, float(logprobs[token_id]), top)


def uniform(seed: int, index: int) -> float:
    """A number in [0, 1) from (seed, output index), the upper 53 bits of two rounds of SplitMix64 (Steele et al., OOPSLA 2014)."""
    return (_mix(_mix(seed) + index) >> 11) * 2.0**-53


def _mix(x: int) -> int:
    """SplitMix64's step: a bijection of 64 bits in which every input bit moves every output bit."""
    mask = 2**64 - 1
    x = (x + 0x9E3779B97F4A7C15) & mask
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    return x ^ (x >> 31)


def _is_plain_greedy(row: SamplingRow) -> bool:
    return row.params.temperature == 0 and not row.params.changes_logits(len(row.output_ids))


def _choose(logits: Tensor, row: SamplingRow) -> int:
    """logits [vocab] fp64, which is overwritten."""
    logits = _adjusted(logits, row)
    if row.params.temperature == 0:
        return int(torch.argmax(logits))
    return _draw(_probabilities(logits, row.params), uniform(row.params.seed, len(row.output_ids)))


def _adjusted(logits: Tensor, row: SamplingRow) -> Tensor:
    params = row.params
    if params.logit_bias:
        logits[list(params.logit_bias)] += logits.new_tensor(list(params.logit_bias.values()))
    if params.repetition_penalty != 1:
        seen = sorted({*row.prompt_ids, *row.output_ids})
        logits[seen] = torch.where(logits[seen] > 0, logits[seen] / params.repetition_penalty, logits[seen] * params.repetition_penalty)
    if (params.presence_penalty or params.frequency_penalty) and row.output_ids:
        counts = Counter(row.output_ids)
        logits[list(counts)] -= params.presence_penalty + params.frequency_penalty * logits.new_tensor(list(counts.values()))
    if params.masks_stops(len(row.output_ids)):
        logits[list(params.stop_token_ids)] = -torch.inf
    return logits


def _probabilities(logits: Tensor, params: SamplingParams) -> Tensor:
    """The filtered distribution, not normalised: [vocab] fp64, 0 where a filter cut."""
    weights = torch.exp((logits - logits.max()) / params.temperature)       # the likeliest weighs 1; dividing first could overflow
    if 0 < params.top_k < len(weights):
        weights = _keep(weights, _best(logits, params.top_k))
    if params.top_p < 1:
        weights = _keep(weights, _nucleus(weights, params.top_p))
    return torch.where(weights >= params.min_p, weights, 0.0)


def _nucleus(weights: Tensor, top_p: float) -> Tensor:
    """Ids of the shortest run of the heaviest tokens that holds `top_p` of all weight, at least one."""
    candidates = torch.nonzero(weights)[:, 0]
    ranked, order = torch.sort(weights[candidates], descending=True, stable=True)
    before = ranked.cumsum(0) - ranked                                      # weight of all heavier tokens
    kept = before < top_p * ranked.sum()
    kept[0] = True
    return candidates[order[kept]]


def _keep(weights: Tensor, ids: Tensor) -> Tensor:
    return torch.zeros_like(weights).index_copy_(0, ids, weights[ids])


def _best(values: Tensor, count: int) -> Tensor:
    """Ids of the `count` largest, best first, the lower id first among equals (which topk alone does not promise)."""
    count = min(count, len(values))
    if count == 0:
        return torch.empty(0, dtype=torch.int64, device=values.device)
    candidates = torch.nonzero(values >= torch.topk(values, count).values[-1])[:, 0]
    order = torch.sort(values[candidates], descending=True, stable=True).indices
    return candidates[order[:count]]


def _draw(weights: Tensor, fraction: float) -> int:
    """The first token whose cumulative weight exceeds `fraction` of the total; never one of weight 0."""
    kept = torch.nonzero(weights)[:, 0]
    cumulative = weights[kept].cumsum(0)
    target = cumulative[-1] * fraction
    place = int(torch.searchsorted(cumulative, target, right=True))
    return int(kept[min(place, len(kept) - 1)])      # the product may round up to the total
