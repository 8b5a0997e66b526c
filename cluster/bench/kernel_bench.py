"""Each kernel at shapes of a model, against what it must move or compute. Attention reads the engine's own pool.

Kernels are timed as CUDA graphs, as the engine runs them: launched one by one, short ones would show the host.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ...kernels.context_shares import share_tokens
from ...kernels.logprobs import token_logprobs
from ...kernels.ops import Ops, Paging
from ...kernels.sampling import Draws, sample
from ...kernels.selection import ops_for
from ...models.config import ModelConfig
from .engine_rows import Ceilings, Row, floor

WARM_UPS, RUNS = 5, 25


def time_ms(run: Callable[[], object], device: torch.device) -> float:
    """Median. On a GPU between events, a run's launches queued behind the run before."""
    for _ in range(WARM_UPS):
        run()
    if device.type != "cuda":
        return 1e3 * statistics.median(_seconds(run) for _ in range(RUNS))
    events = [torch.cuda.Event(enable_timing=True) for _ in range(RUNS + 1)]     # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    events[0].record()
    for event in events[1:]:
        run()
        event.record()
    torch.cuda.synchronize()
    return float(statistics.median(a.elapsed_time(b) for a, b in pairwise(events)))


def _seconds(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def _graph_ms(run: Callable[[], object], device: torch.device) -> float:
    run()                                   # compiles and plans
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return time_ms(graph.replay, device)


def kernel_rows(model: ModelConfig, pool: Tensor, ceilings: Ceilings, quick: bool) -> tuple[list[Row], dict[str, float]]:
    """Rows, and cuDNN's milliseconds for the prefill attention's shapes."""
    ops = ops_for(pool.device, model.head_dim, pool.shape[4], pool.dtype)
    bench = _Kernels(model, pool, ceilings, ops)
    decodes = [(2, 64)] if quick else [(64, 1024), (64, 4096), (256, 1024)]
    lengths = [64] if quick else [1024, 2048, 8192, 16_384]
    lengths = [length for length in lengths if -(-length // pool.shape[4]) <= len(pool)]
    rows = [bench.decode_attention(*shape) for shape in decodes] + [bench.prefill_attention(length) for length in lengths]
    rows += [row for tokens in (64, 8192) for row in bench.elementwise(8 if quick else tokens)]
    rows += [row for batch in ((2,) if quick else (1, 64, 256)) for row in bench.sampling(batch)]
    return rows, {f"s {length}": bench.cudnn(length) for length in lengths}


class _Kernels:
    def __init__(self, model: ModelConfig, pool: Tensor, ceilings: Ceilings, ops: Ops) -> None:
        self._model, self._pool, self._ceilings, self._ops = model, pool, ceilings, ops
        self._device, self._dtype = pool.device, pool.dtype

    def decode_attention(self, batch: int, context: int) -> Row:
        """Contexts are cut as in a step of the engine."""
        num_sms = torch.cuda.get_device_properties(self._device).multi_processor_count
        share = torch.tensor([share_tokens([context] * batch, self._model.num_kv_heads, num_sms)], dtype=torch.int32, device=self._device)
        paging = self._ops.begin_step(replace(self._paging(batch, context, 1), share_tokens=share), self._pool)
        q = self._random(batch, self._model.num_heads, self._model.head_dim)
        num_bytes = batch * context * 2 * self._model.num_kv_heads * self._model.head_dim * self._dtype.itemsize
        return self._row("decode attention", f"b{batch} ctx {context}", lambda: self._attend(q, paging), num_bytes, 0)

    def prefill_attention(self, length: int) -> Row:
        paging, q = self._paging(1, length, length), self._random(length, self._model.num_heads, self._model.head_dim)
        flops = 2 * length * (length + 1) * self._model.num_heads * self._model.head_dim
        return self._row("prefill attention", f"s {length}", lambda: self._attend(q, paging), 0, flops)

    def cudnn(self, length: int) -> float:
        q, k, v = self._random(3, 1, self._model.num_heads, length, self._model.head_dim)
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return _graph_ms(lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True), self._device)

    def elementwise(self, tokens: int) -> list[Row]:
        model, size = self._model, self._dtype.itemsize
        x, residual = self._random(2, tokens, model.hidden_size)
        weight = self._random(model.hidden_size)
        gate_up = self._random(tokens, 2 * model.intermediate_size)
        heads = model.num_heads + 2 * model.num_kv_heads
        q, k, v = torch.split(self._random(tokens, heads, model.head_dim), [model.num_heads, model.num_kv_heads, model.num_kv_heads], dim=1)
        positions, slots = torch.arange(tokens, device=self._device), torch.arange(tokens, device=self._device)
        angles = torch.rand(tokens, model.head_dim, device=self._device)
        shape, ops = f"T {tokens}", self._ops
        return [
            self._row("add + norm", shape, lambda: ops.add_rms_norm(x, residual, weight, 1e-5), 4 * tokens * model.hidden_size * size, 0),
            self._row("silu · mul", shape, lambda: ops.silu_mul(gate_up), 3 * tokens * model.intermediate_size * size, 0),
            self._row(
                "rope + KV write", shape, lambda: ops.rope_write_kv(q, k, v, None, positions, angles, self._pool, 0, slots),
                2 * tokens * heads * model.head_dim * size, 0,
            ),
        ]  # fmt: skip

    def sampling(self, batch: int) -> list[Row]:
        """Greedily, from all tokens, and with top-k, top-p and min-p; and the log-probabilities of what came and of five likeliest."""
        logits = self._random(batch, self._model.vocab_size)
        at, tokens = torch.arange(batch, dtype=torch.int32, device=self._device), torch.zeros(batch, dtype=torch.int64, device=self._device)
        five = torch.full_like(at, 5)
        score = lambda: token_logprobs(logits, at, -1 - at, tokens, five, 5)      # noqa: E731

        def draw(heat: float, top_k: int, top_p: float, min_p: float) -> Callable[[], Tensor]:
            ones = torch.ones(batch, device=self._device)
            draws = Draws(heat * ones, torch.full_like(at, top_k), top_p * ones, min_p * ones, 0.5 * ones)
            return lambda: sample(logits, draws, refuse_infinite=True)

        runs = {"greedy": draw(0, 0, 1, 0), "all": draw(0.8, 0, 1, 0), "filtered": draw(0.8, 50, 0.9, 0.02)}
        rows = [self._row(f"sampling, {name}", f"b{batch}", run, logits.nbytes, 0) for name, run in runs.items()]
        return [*rows, self._row("log-probabilities", f"b{batch}", score, logits.nbytes, 0)]

    def _row(self, kind: str, shape: str, run: Callable[[], object], num_bytes: float, flops: float) -> Row:
        floor_ms, bound = floor(num_bytes, flops, self._ceilings)
        return Row(kind, shape, _graph_ms(run, self._device), floor_ms, bound)

    def _attend(self, q: Tensor, paging: Paging) -> Tensor:
        return self._ops.paged_attention(q, self._pool, 0, paging, self._model.head_dim**-0.5, None)

    def _paging(self, batch: int, context: int, rows: int) -> Paging:
        """Shuffled blocks; a pool that is too small for all sequences is used several times."""
        per_sequence = -(-context // self._pool.shape[4])
        blocks = torch.cat([torch.randperm(len(self._pool)) for _ in range(-(-batch * per_sequence // len(self._pool)))])
        tables = blocks[: batch * per_sequence].view(batch, per_sequence).to(self._device, torch.int32)
        starts = torch.arange(0, batch * rows + 1, rows, dtype=torch.int32, device=self._device)
        contexts = torch.full((batch,), context, dtype=torch.int32, device=self._device)
        return Paging(starts, contexts, tables, has_single_rows=rows == 1, is_whole_prompt=batch == 1 and 1 < rows == context)

    def _random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, device=self._device, dtype=self._dtype)
