"""A cluster on a fake network and clock, and a worker of it, in either role."""

import pytest
from harness.fake_cluster import FakeCluster
from harness.worker_turns import ROLES

from diptych.engine.worker import Worker


@pytest.fixture
def cluster() -> FakeCluster:
    return FakeCluster()


@pytest.fixture(params=ROLES)
def worker(request: pytest.FixtureRequest, cluster: FakeCluster) -> Worker:
    return cluster.workers[request.param]
