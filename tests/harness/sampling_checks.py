"""The sampling kernel against `engine/sampler.py`, which decides in fp64: fp32 may decide otherwise only next to a boundary."""

import torch
from harness.kernel_checks import Device
from torch import Tensor

from diptych.engine.sampler import _probabilities
from diptych.kernels.sampling import Draws, sample
from diptych.messages.requests import SamplingParams

NEAR = 2e-5       # of all weight: what fp32 sums may be off by

# No p times a number of equal tokens is a whole number here: which token such a boundary keeps is a matter of rounding.
FILTERS = [
    {},
    {"temperature": 0.0},
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 10**6},
    {"top_p": 0.7137},
    {"top_p": 0.0},
    {"top_p": 0.9991, "temperature": 1.5},
    {"min_p": 0.1, "temperature": 0.3},
    {"top_k": 20, "top_p": 0.77},
    {"top_k": 20, "top_p": 0.77, "min_p": 0.05, "temperature": 2.0},
]


def check_sampling(
    vocab: int, device: Device, tile: int | None, rows_of_each: int, dtype: torch.dtype, filters: list[dict[str, float]] = FILTERS
) -> None:
    """Every combination of filters, `rows_of_each` times over rows of distinct, many equal or masked logits, and once over equal ones.

    Equal logits with the fraction 1 give the last token that is kept: one too many or too few at a cut shows.
    """
    generator = device.generator()
    params = [SamplingParams(max_tokens=1, seed=0, **options) for _ in range(rows_of_each + 1) for options in filters]
    logits = (torch.randn(len(params), vocab, generator=generator) * 3).to(dtype).float()
    logits[1::3] = logits[1::3].round()
    logits[2::3, ::2] = -torch.inf
    logits[2::3, vocab // 2] = 0.0          # one at least is left
    logits[1::6][logits[1::6] == 0] *= -1   # -0 is 0
    fractions = torch.rand(len(params), generator=generator)
    fractions[::7], fractions[3::7] = 0.0, 1.0
    logits[-len(filters) :], fractions[-len(filters) :] = -1.5, 1.0
    found = sample(logits.to(device.name, dtype), draws_of(params, fractions, device), tile).tolist()
    for i, (row, token) in enumerate(zip(params, found, strict=True)):
        low, high = interval(logits[i], row, token)
        place = f"{row}: token {token} holds {low} to {high}, not {fractions[i]}; seed {device.seed}"
        assert low - NEAR <= float(fractions[i]) <= high + NEAR, place


def check_refusal(vocab: int, device: Device, tile: int | None) -> None:
    """Logits that are no numbers give -1, wherever they are, and disturb no other row."""
    rows = torch.randn(7, vocab, generator=device.generator())
    for row, place, value in ((1, 0, torch.nan), (3, vocab - 1, torch.inf), (5, vocab // 2, -torch.inf)):
        rows[row, place] = value
    params = [SamplingParams(max_tokens=1, seed=0, temperature=0.0)] * len(rows)
    draws = draws_of(params, torch.zeros(len(rows)), device)
    found = sample(rows.to(device.name), draws, tile, refuse_infinite=True).tolist()
    expected = rows.argmax(1).tolist()
    assert found == [-1 if row in (1, 3, 5) else expected[row] for row in range(len(rows))]


def check_sharing(vocab: int, device: Device, dtype: torch.dtype) -> None:
    """However many programs share a row, and whoever is in the batch, tokens are the same; time and again, for they meet."""
    generator = device.generator()
    params = [SamplingParams(max_tokens=1, seed=0, **options) for options in FILTERS]
    logits = (torch.randn(len(params), vocab, generator=generator) * 2).to(device.name, dtype)
    logits[3, vocab // 2] = torch.nan
    most = torch.cuda.get_device_properties(device.name).multi_processor_count // len(params)
    fitting = [count for count in (2, 4, 8) if count <= most]
    for _ in range(20):
        fractions = torch.rand(len(params), generator=generator)
        draws = draws_of(params, fractions, device)
        alone = sample(logits, draws, refuse_infinite=True, programs=1).tolist()
        for count in fitting:
            assert sample(logits, draws, refuse_infinite=True, programs=count).tolist() == alone, f"{count} programs, seed {device.seed}"
        assert alone[3] == -1
        many = draws_of(params * 20, fractions.repeat(20), device)
        assert sample(logits.repeat(20, 1), many, refuse_infinite=True).tolist() == alone * 20, f"seed {device.seed}"
        one = draws_of(params[:1], fractions[:1], device)
        assert sample(logits[:1], one, refuse_infinite=True).tolist() == alone[:1]


def draws_of(params: list[SamplingParams], fractions: Tensor, device: Device) -> Draws:
    def column(name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.tensor([getattr(row, name) for row in params], dtype=dtype, device=device.name)

    return Draws(column("temperature"), column("top_k", torch.int32), column("top_p"), column("min_p"), fractions.to(device.name))


def interval(logits: Tensor, params: SamplingParams, token: int) -> tuple[float, float]:
    """The fractions for which the reference draws this token; for a greedy row all, if it is the largest's lowest id."""
    if params.temperature == 0:
        return (0.0, 1.0) if token == int(logits.argmax()) else (2.0, 2.0)
    weights = _probabilities(logits.double(), params)
    share = weights / weights.sum()
    assert float(share[token]) > 0, f"{params}: token {token} was filtered out"
    high = float(share[: token + 1].sum())
    return high - float(share[token]), high
