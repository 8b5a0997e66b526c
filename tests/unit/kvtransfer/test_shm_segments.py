"""Real segments in /dev/shm: who makes and removes them, which of them are orphans, and descriptors that lie."""

import fcntl
import os
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import msgspec
import pytest
from harness.shm_process import LAYOUT, NUM_BLOCKS, NUM_PAGES
from harness.shm_sides import IMM, Side, landed, wait_for

from diptych.kvtransfer.shm import HEADER_BYTES, SHM, ShmTransport, host_identity, sweep_orphans
from diptych.messages.errors import ClusterError, LayoutMismatch, PeerGone
from diptych.messages.ids import Epoch, WorkerId
from diptych.messages.membership import MemoryDescriptor

# Peers that are not there, or not what they say

def change(descriptor: MemoryDescriptor, **fields: Any) -> MemoryDescriptor:
    return msgspec.structs.replace(descriptor, **fields)


def test_a_dead_peer_is_gone(sides: tuple[Side, Side]) -> None:
    writer, receiver = sides
    receiver.transport.close()
    with pytest.raises(PeerGone, match=r"decode-0-1: No such file"):
        writer.transport.connect(receiver.descriptor)


def test_writes_to_a_peer_that_dies_later_do_no_harm(sides: tuple[Side, Side], cluster: str) -> None:
    """Its memory lives on until we let go of it; its successor's is another."""
    writer, receiver = sides
    peer = writer.transport.connect(receiver.descriptor)
    receiver.transport.close()
    successor = Side(cluster, "decode-0", epoch=2)
    writer.transport.write_pages(peer, [0], [0], IMM)
    assert wait_for(lambda: writer.transport.stats.num_pages == 1) is None
    assert successor.transport.num_landed(IMM) == 0
    assert not successor.pages.any()
    successor.transport.close()


@pytest.mark.parametrize(
    "location",
    [
        b"", b".", b"..", b"diptych-", b"/etc/passwd", b"../etc/passwd", b"diptych-x/../../etc/passwd", b"diptych-x/..",
        b"/dev/shm/diptych-x", b"/tmp/diptych-x", b"other", b"diptych-\0", b"diptych-\xff\xfe", b"diptych-a\n", b"diptych-" + b"x" * 300,
    ],
)  # fmt: skip
def test_locations_that_lead_elsewhere_are_refused(sides: tuple[Side, Side], location: bytes) -> None:
    writer, receiver = sides
    with pytest.raises(PeerGone):
        writer.transport.connect(change(receiver.descriptor, location=location))


def test_a_link_is_not_followed(sides: tuple[Side, Side], cluster: str) -> None:
    writer, receiver = sides
    link = SHM / f"diptych-{cluster}-link"
    link.symlink_to(receiver.path)
    try:
        with pytest.raises(PeerGone, match="link"):
            writer.transport.connect(change(receiver.descriptor, location=link.name.encode()))
    finally:
        link.unlink()


def test_another_hosts_memory_is_out_of_reach(sides: tuple[Side, Side]) -> None:
    """Although a segment of that very name is here: the same deployment may run on both."""
    writer, receiver = sides
    assert receiver.descriptor.host == host_identity()
    with pytest.raises(PeerGone, match="elsewhere"):
        writer.transport.connect(change(receiver.descriptor, host="elsewhere"))


def test_other_page_sizes_are_refused(sides: tuple[Side, Side]) -> None:
    writer, receiver = sides
    with pytest.raises(LayoutMismatch, match=rf"pages of {LAYOUT.page_bytes * 2} bytes there, {LAYOUT.page_bytes} here"):
        writer.transport.connect(change(receiver.descriptor, page_bytes=LAYOUT.page_bytes * 2))


@pytest.mark.parametrize("num_pages", [0, 1, NUM_PAGES - 1, NUM_PAGES + 1, -1, 1 << 40])
def test_a_segment_of_another_size_than_announced_is_refused(sides: tuple[Side, Side], num_pages: int) -> None:
    writer, receiver = sides
    with pytest.raises(LayoutMismatch, match=str(HEADER_BYTES + NUM_BLOCKS * LAYOUT.block_bytes)):
        writer.transport.connect(change(receiver.descriptor, num_pages=num_pages))


def test_an_empty_file_is_refused(sides: tuple[Side, Side], cluster: str) -> None:
    writer, receiver = sides
    path = SHM / f"diptych-{cluster}-empty"
    path.touch()
    try:
        with pytest.raises(LayoutMismatch, match="0 bytes"):
            writer.transport.connect(change(receiver.descriptor, location=path.name.encode()))
    finally:
        path.unlink()


# Making and removing segments

def test_no_room_names_the_sizes_and_leaves_nothing(cluster: str) -> None:
    transport = ShmTransport(cluster, WorkerId("decode-0"), Epoch(1))
    num_blocks = (1 << 50) // LAYOUT.block_bytes
    with pytest.raises(ClusterError, match=rf"decode-0-1: {HEADER_BYTES + (1 << 50)} bytes of shared memory wanted, \d+ free"):
        transport.allocate(replace(LAYOUT), num_blocks)
    assert not list(SHM.glob(f"diptych-{cluster}*"))


def test_a_name_that_lives_is_refused_and_left_alone(sides: tuple[Side, Side], cluster: str) -> None:
    """Two processes with one worker id and epoch: the second fails, and its end does not remove the first one's segment."""
    writer, receiver = sides
    double = ShmTransport(cluster, WorkerId("decode-0"), Epoch(1))
    with pytest.raises(ClusterError, match="File exists"):
        double.allocate(LAYOUT, NUM_BLOCKS)
    double.close()
    peer = writer.transport.connect(receiver.descriptor)
    writer.transport.write_pages(peer, [0], [0], IMM)
    landed(receiver, IMM, 1)


def test_close_removes_ones_own_segment_and_ends_the_thread(cluster: str) -> None:
    before = set(threading.enumerate())
    side = Side(cluster, "decode-0")
    assert side.path.stat().st_mode & 0o777 == 0o600
    assert sweep_orphans(cluster) == []
    side.transport.close()
    side.transport.close()
    assert not side.path.exists()
    assert set(threading.enumerate()) == before


def test_close_leaves_a_successor_of_the_same_name_alone(cluster: str) -> None:
    first = Side(cluster, "decode-0")
    first.transport.close()
    second = Side(cluster, "decode-0")
    first.transport.close()
    assert second.path.exists()
    second.transport.close()


def test_live_segments_of_clusters_with_alike_names_are_left_alone(cluster: str) -> None:
    long, short = Side(f"{cluster}-b", "decode-0"), Side(cluster, "b-decode-0", epoch=2)
    try:
        assert sweep_orphans(cluster) == sweep_orphans(f"{cluster}-b") == []
        other = Side(cluster, "decode-0")
        assert long.path.exists()
        assert short.path.exists()
        other.transport.close()
    finally:
        long.transport.close()
        short.transport.close()


def test_a_lock_is_what_keeps_a_segment(cluster: str) -> None:
    path = SHM / f"diptych-{cluster}-decode-9-1"
    with path.open("wb") as owner:
        fcntl.flock(owner, fcntl.LOCK_EX)
        assert sweep_orphans(cluster) == []
    assert sweep_orphans(cluster) == [path.name]


def before_first(monkeypatch: pytest.MonkeyPatch, module: Any, name: str, act: Callable[[], object], after: bool = False) -> None:
    """`act` happens right before (or after) the first call of a system function, as if another process had done it."""
    real, calls = getattr(module, name), []

    def called(*args: Any) -> Any:
        calls.append(args)
        first = len(calls) == 1
        if first and not after:
            act()
        result = real(*args)
        if first and after:
            act()
        return result

    monkeypatch.setattr(module, name, called)


def test_a_sweep_between_making_and_lock_does_no_harm(cluster: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """For that moment a new segment looks like an orphan; two workers of one host do start at the same time."""
    swept: list[str] = []
    before_first(monkeypatch, os, "open", lambda: swept.extend(sweep_orphans(cluster)), after=True)
    side = Side(cluster, "decode-0")
    assert swept == [side.path.name]
    assert side.path.exists()
    assert sweep_orphans(cluster) == []
    side.transport.close()


def test_two_sweeps_of_one_orphan_leave_its_successor_alone(cluster: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The slower one has opened the orphan; when it gets the lock the name is a new life's."""
    (SHM / f"diptych-{cluster}-decode-0-1").touch()
    successors: list[Side] = []
    before_first(monkeypatch, fcntl, "flock", lambda: successors.append(Side(cluster, "decode-0")))
    assert sweep_orphans(cluster) == []
    assert successors[0].path.exists()
    successors[0].transport.close()


def test_a_segment_that_cannot_be_opened_does_not_stop_a_start(cluster: str) -> None:
    """A directory stands for anything that is not ours to open: another user's segment, say."""
    odd = SHM / f"diptych-{cluster}-odd"
    odd.mkdir()
    try:
        Side(cluster, "decode-0").transport.close()
    finally:
        odd.rmdir()
