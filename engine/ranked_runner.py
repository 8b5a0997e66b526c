"""One step in all ranks of a worker. Rank 0 samples and answers; the others compute their part of the layers.

    on CPUs:  rank 0: layer 0 ─────► layer 1 ─────► … ─► sample ─► outputs
              rank 1: layer 0 ──┐    layer 1
                                └─► on_layer(0), once all ranks are through with it

    on GPUs:  all ranks: every layer queued ─► on_layer(0), on_layer(1), … on streams that wait for that layer of each rank

What `on_layer` does may wait for any of the devices. On GPUs it must not do so while rank 0 has not queued all of its step: another
device's kernels wait for what comes next from rank 0.
"""

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch

from .model_runner import ModelRunner, StepOutputs
from .ranks import Ranks
from .scheduler import StepPlan

LOOK_S = 0.1                    # whether a rank has failed

OnLayer = Callable[[int], None]


class RankFailed(Exception):
    """Another rank has failed, and says why."""


class RankedRunner:
    """`runners`: of each rank, alike but for who samples."""

    def __init__(self, ranks: Ranks, runners: Sequence[ModelRunner]) -> None:
        assert len(ranks) == len(runners)
        self._ranks, self.runners = ranks, tuple(runners)
        self.runs_ahead = runners[0].runs_ahead
        self._streams = [torch.cuda.Stream(device) for device in ranks.devices if device.type == "cuda"]      # type: ignore[no-untyped-call]

    @property
    def padded_rows(self) -> Sequence[int]:
        return self.runners[0].padded_rows

    def launch(self, plan: StepPlan, on_layer: OnLayer | None) -> StepOutputs:
        if on_layer is None:
            return self._ranks.run(lambda rank: self.runners[rank].launch(plan, None))[0]
        layers = _QueuedLayers(on_layer, self._streams) if self._streams else _ComputedLayers(on_layer, self._ranks)
        outputs = self._ranks.run(lambda rank: self.runners[rank].launch(plan, lambda layer: layers.finished(rank, layer)))
        layers.launched()
        return outputs[0]

    def rouse(self) -> None:
        self._ranks.run(lambda rank: self.runners[rank].rouse())


class _Layers(ABC):
    """Of one step: tells `on_layer` of each when all ranks have it."""

    @abstractmethod
    def finished(self, rank: int, layer: int) -> None:
        """In the rank's thread."""
        ...

    def launched(self) -> None:
        """In the thread of rank 0, after all."""
        return


class _ComputedLayers(_Layers):
    def __init__(self, on_layer: OnLayer, ranks: Ranks) -> None:
        self._on_layer, self._ranks = on_layer, ranks
        self._num_done = [0] * len(ranks)
        self._changed = threading.Condition()

    def finished(self, rank: int, layer: int) -> None:
        with self._changed:
            self._num_done[rank] = layer + 1
            self._changed.notify()
            if rank:
                return
            while min(self._num_done) <= layer:
                if self._ranks.has_failed:
                    raise RankFailed(f"layer {layer} is computed in rank 0 alone")
                self._changed.wait(LOOK_S)
        self._on_layer(layer)


class _QueuedLayers(_Layers):
    """`streams`: of each rank, on which `on_layer` finds itself."""

    def __init__(self, on_layer: OnLayer, streams: Sequence[torch.cuda.Stream]) -> None:
        self._on_layer, self._streams = on_layer, streams
        self._events: list[dict[int, Any]] = [{} for _ in streams]          # torch.cuda.Event, whose methods have no types

    def finished(self, rank: int, layer: int) -> None:
        self._events[rank][layer] = event = torch.cuda.Event()              # type: ignore[no-untyped-call]
        event.record()

    def launched(self) -> None:
        for layer in self._events[0]:
            with ExitStack() as current:
                for stream, events in reversed(list(zip(self._streams, self._events, strict=True))):        # rank 0's device stays current
                    current.enter_context(torch.cuda.stream(stream))
                    stream.wait_event(events[layer])
                self._on_layer(layer)
