"""A decode step as one CUDA graph: inputs unpacked, the model, sampling; one graph for each of some batch sizes.

    upload (host, pinned) ──copy──► upload ──► [ decode_inputs ─► model ─► sample ] ──► sampled ──copy──► host
                                                      ▲                                    │
                                                      └── tokens that the host has not seen ┘

A batch takes the next larger graph; the rows over are padding, which reads and writes no block. All graphs share one memory pool.
"""

from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..kernels.context_shares import share_tokens
from ..kernels.decode_inputs import HEADER, decode_inputs
from ..kernels.ops import Paging
from ..kernels.sampling import Draws, sample
from ..kvtransfer.transport import KVPool
from ..models.batch import ForwardBatch
from ..models.transformer import Transformer
from .decode_rows import PADDING, DecodeRow, pack_decodes
from .graph_results import begin_capture, standing
from .staging import Staging

SMALL_BATCHES = (1, 2, 4, 8)
WARM_UPS = 2                    # compile and choose algorithms before capture


def batch_sizes(max_sequences: int) -> list[int]:
    """Which batches get a graph: steps of 8, from 128 on of 16, from 256 on of 32, so that little of a step is padding."""
    stepped = [*range(16, 128, 8), *range(128, 256, 16), *range(256, max_sequences + 32, 32)]
    return sorted({min(size, max_sequences) for size in (*SMALL_BATCHES, *stepped)})


class DecodeGraphs:
    """`sampled` [max_sequences] int64: the tokens of the step before; -1 where logits were not finite. If not `samples`, it is another
    rank's, which writes it."""

    def __init__(
        self, model: Transformer, pool: KVPool, sampled: Tensor, max_sequences: int, max_model_len: int, samples: bool = True
    ) -> None:
        self._model, self._pool, self._sampled, self._samples = model, pool, sampled, samples
        self._sizes = batch_sizes(max_sequences)
        device, widest = pool.tensor.device, self._sizes[-1]
        self._max_blocks = -(-max_model_len // pool.layout.block_size)
        num_ints = widest * (len(HEADER) + self._max_blocks)
        self._upload = torch.zeros(num_ints, dtype=torch.int32, device=device)
        self._staging = Staging(4 * num_ints, device)
        self._token_ids, self._positions, self._slots = (torch.zeros(widest, dtype=torch.int64, device=device) for _ in range(3))
        self._contexts = torch.zeros(widest, dtype=torch.int32, device=device)
        self._tables = torch.zeros(widest, self._max_blocks, dtype=torch.int32, device=device)
        self._num_sms = torch.cuda.get_device_properties(device).multi_processor_count
        self._starts = torch.arange(widest + 1, dtype=torch.int32, device=device)
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}

    @property
    def max_batch(self) -> int:
        return self._sizes[-1]

    @torch.inference_mode()
    def capture(self) -> None:
        """All graphs, the largest first: the others fit into its memory."""
        pool, stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()      # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for size in reversed(self._sizes):
                self._capture(size, pool, stream)
        torch.cuda.current_stream().wait_stream(stream)

    def _capture(self, size: int, memory: Any, stream: torch.cuda.Stream) -> None:
        for _ in range(WARM_UPS):
            self._step(size)
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        begin_capture(graph, memory)
        logits = self._step(size)
        graph.capture_end()
        self._graphs[size] = graph, standing(logits)

    def replay(self, rows: list[DecodeRow]) -> Tensor:
        """Queues the step → logits [len(rows), vocab], until the next replay; tokens are in `sampled`."""
        size = self._sizes[bisect_left(self._sizes, len(rows))]
        self._stage(rows, size)
        graph, logits = self._graphs[size]
        graph.replay()
        return logits[: len(rows)]

    def rouse(self) -> None:
        """Uploads a step of padding, which is not computed."""
        self._stage([PADDING], self._sizes[0])

    def replay_last(self, num_rows: int) -> None:
        graph, _ = self._graphs[self._sizes[bisect_left(self._sizes, num_rows)]]
        graph.replay()

    def _stage(self, rows: Sequence[DecodeRow], size: int) -> None:
        host = self._staging.next().view(torch.int32)
        share = share_tokens([row.context for row in rows], self._pool.layout.rank_heads, self._num_sms, size)
        end = pack_decodes(rows, size, share, host.numpy())
        self._upload[:end].copy_(host[:end], non_blocking=True)

    def _step(self, size: int) -> Tensor:
        share = self._column("share", size)[:1]
        paging = Paging(self._starts[: size + 1], self._contexts[:size], self._tables[:size], share_tokens=share)
        token_ids, positions, slots = self._token_ids[:size], self._positions[:size], self._slots[:size]
        decode_inputs(token_ids, positions, slots, paging, self._upload, self._sampled, self._pool.layout.block_size)
        batch = ForwardBatch(
            token_ids, positions, slots, paging.query_starts, paging.context_lens, paging.block_tables, None, share_tokens=share
        )
        logits = self._model.forward(batch, self._pool.tensor)
        if self._samples:
            sample(logits, self._draws(size), refuse_infinite=True, out=self._sampled[:size])
        return logits

    def _draws(self, size: int) -> Draws:
        real = torch.float32
        return Draws(
            temperature=self._column("temperature", size).view(real),
            top_k=self._column("top_k", size),
            top_p=self._column("top_p", size).view(real),
            min_p=self._column("min_p", size).view(real),
            fraction=self._column("fraction", size).view(real),
        )

    def _column(self, name: str, size: int) -> Tensor:
        start = HEADER.index(name) * size
        return self._upload[start : start + size]
