"""What `bench transfer` says of work beside the pages: who is called when, and how the figures come of it. GPUs are faked."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import pytest
import torch

from diptych.cluster.bench import transfer_load
from diptych.cluster.bench.transfer_bench import LOAD_ROUNDS, Pair
from diptych.cluster.bench.transfer_peer import Computed, Path, Remote, Written


class Event:
    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        return None

    synchronize = record

    def elapsed_time(self, _: object) -> float:
        return 30.0


@dataclass
class Calls:
    made: list[str]
    write: Callable[[], None]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """What was called, in order; what is called beside the stream of the work has a star."""
    made: list[str] = []
    stars = [""]

    @contextmanager
    def stream(_: object) -> Iterator[None]:
        stars.append("*")
        yield
        stars.pop()

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "Stream", object)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: made.append("start"))
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(transfer_load, "_work", lambda kind: lambda: made.append(kind + stars[-1]))
    return Calls(made, lambda: made.append("write" + stars[-1]))


@pytest.mark.parametrize(
    ("beside", "in_order", "expected"),
    [(False, False, ["work"] * 2), (True, True, ["work", "write"] * 2), (True, False, ["write*", "work"] * 2)],
    ids=["alone", "pages follow the work", "pages wait for nothing"],
)
def test_pages_leave_after_their_work_or_without_waiting(calls: Calls, beside: bool, in_order: bool, expected: list[str]) -> None:
    assert transfer_load.compute_ms("work", 2, calls.write if beside else None, in_order) == 15.0
    assert calls.made[calls.made.index("start") + 1 :] == expected


class Answering:
    """A remote end that computes in 2 ms alone, in 2.1 beside what it writes, and has counted 1000 pages more at each look."""

    def __init__(self) -> None:
        self.prepared: list[int] = []
        self.counted = 0

    def tell(self, method: str, *arguments: object) -> None:
        return None

    def answer(self) -> None:
        return None

    def call(self, method: str, *arguments: Any) -> Any:
        match method:
            case "prepare":
                self.prepared.append(len(arguments[0]))
            case "compute":
                _, num_times, writes_each, _ = arguments
                return Computed(2.1 if writes_each else 2.0, num_times * writes_each * 0.001)
            case "num_counted":
                self.counted += 1000
                return self.counted
            case "write":
                return Written(0.0, 0.0)
        return None


def test_slow_downs_and_speeds() -> None:
    writer, receiver = Answering(), Answering()
    layer, flood, arriving = Pair(Path("nvlink", "nvlink", "cuda"), cast(Remote, writer), cast(Remote, receiver)).loads()
    assert writer.prepared == [128, 2048], "the KV of 2048 tokens in one layer, then a flood"
    assert [round(row.slow_down, 6) for row in (layer, flood, arriving)] == [0.05, 0.05, 0.0]
    assert layer.gbps == pytest.approx(128 * 65_536 / 0.001 / 1e9)
    assert flood.gbps == pytest.approx(2048 * 65_536 / 0.001 / 1e9)
    assert arriving.gbps > 0
    assert receiver.counted == 2 * 1000 * LOAD_ROUNDS
