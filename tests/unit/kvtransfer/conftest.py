"""Two workers of a cluster on `shm`; none of its segments may be left."""

from collections.abc import Iterator
from uuid import uuid4

import pytest
from harness.shm_process import fill
from harness.shm_sides import Side

from diptych.kvtransfer.shm import SHM


@pytest.fixture
def cluster() -> Iterator[str]:
    name = f"test{uuid4().hex[:8]}"
    yield name
    left = list(SHM.glob(f"diptych-{name}*"))
    for path in left:
        path.unlink()
    assert not left, "segments left behind"


@pytest.fixture
def sides(cluster: str) -> Iterator[tuple[Side, Side]]:
    writer, receiver = Side(cluster, "prefill-0"), Side(cluster, "decode-0")
    fill(writer.pool.tensor)
    yield writer, receiver
    writer.transport.close()
    receiver.transport.close()
