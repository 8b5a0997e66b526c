"""One Ray head for the whole run, and deployments on it: `cluster(pools={…})` starts one and returns once it serves.

`colocated`, a decode worker alone, is started once for all tests: whoever takes one of its processes away waits until it is back.
"""

import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from diptych.cluster import ray_session, records
from diptych.cluster.pulse import DeploymentStatus, PlaceStatus
from diptych.cluster.ray_head import start_head, stop_head
from diptych.cluster.ray_session import Deployment, is_serving
from diptych.cluster.spec import parse_spec

START_TIMEOUT_S = 90.0
POLL_S = 0.1


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.ray)


@pytest.fixture(scope="session")
def ray_head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Its address; everything in this process joins it."""
    head = start_head(num_cpus=2)
    state = tmp_path_factory.mktemp("state")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**head.environment, "RAY_ADDRESS": head.address, "XDG_STATE_HOME": str(state)}.items():
            patch.setenv(name, value)
        yield head.address
        import ray

        ray.shutdown()
    stop_head(head)


@dataclass
class Cluster:
    """A deployment under test."""

    deployment: Deployment
    endpoint: str                             # http://host:port
    model: str

    @property
    def status(self) -> DeploymentStatus:
        return self.deployment.status()

    @property
    def pids(self) -> dict[str, int]:
        return {place.name: place.pid for place in self.status.places if place.pid is not None}

    def place(self, name: str) -> PlaceStatus:
        return next(place for place in self.status.places if place.name == name)

    def kill(self, name: str, signal_number: int = signal.SIGKILL) -> PlaceStatus:
        """Signals the process of a place (or `controller`); returns what the place was."""
        before = self.place(name)
        assert before.pid is not None
        os.kill(before.pid, signal_number)
        return before

    def wait_for(self, condition: Callable[[DeploymentStatus], bool], timeout_s: float = START_TIMEOUT_S) -> DeploymentStatus:
        deadline = time.monotonic() + timeout_s
        status = None
        while time.monotonic() < deadline:
            if condition(status := self.status):
                return status
            time.sleep(POLL_S)
        raise AssertionError(f"not within {timeout_s} s: {status}")

    def wait_until_back(self, before: PlaceStatus, timeout_s: float = START_TIMEOUT_S) -> PlaceStatus:
        """Until a later life stands at the place and all serve."""
        assert before.epoch is not None
        self.wait_for(lambda status: is_serving(status) and (self.place(before.name).epoch or 0) > before.epoch, timeout_s)
        return self.place(before.name)

    def complete(self, prompt: str = "The for statement", **fields: Any) -> dict[str, Any]:
        body = {"model": self.model, "prompt": prompt, "max_tokens": 12, "temperature": 0, "ignore_eos": True, **fields}
        reply = httpx.post(f"{self.endpoint}/v1/completions", json=body, timeout=60.0, trust_env=False)
        assert reply.status_code == 200, reply.text
        answer: dict[str, Any] = reply.json()
        return answer


StartCluster = Callable[..., Cluster]


def serve(name: str, folder: Path, **sections: Any) -> Iterator[Cluster]:
    """For a fixture; at the end no block is held by anybody."""
    tree = {"name": f"{name}-{os.getpid()}", "model": {"path": "embedded"}, "router": {"port": 0}, **sections}
    deployment = ray_session.launch(parse_spec(tree, folder))
    try:
        status = deployment.wait_until_ready(START_TIMEOUT_S)
        assert status.endpoint is not None
        cluster = Cluster(deployment, status.endpoint, status.model)
        yield cluster
        cluster.wait_for(nothing_is_held, 20)
    finally:
        deployment.stop()


def nothing_is_held(status: DeploymentStatus) -> bool:
    """free + cached = total on every worker."""
    return all(place.load is None or place.load.num_free_blocks == place.load.num_blocks for place in status.places)


@pytest.fixture(scope="session")
def colocated(ray_head: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    pools = {"decode": {"workers": 1, "kv_memory": "32MiB", "max_step_tokens": 64}}
    yield from serve("colocated", tmp_path_factory.mktemp("colocated"), pools=pools)


@pytest.fixture
def cluster(ray_head: str, tmp_path: Path) -> Iterator[StartCluster]:
    """Start a deployment of the embedded model, 1 + 1 workers unless the sections given say otherwise."""
    started: list[Deployment] = []

    def start(**sections: Any) -> Cluster:
        small = {"workers": 1, "kv_memory": "32MiB"}
        name = f"test-{os.getpid()}-{len(started)}"
        tree = {"name": name, "model": {"path": "embedded"}, "pools": {"prefill": small, "decode": small}, "router": {"port": 0}}
        deployment = ray_session.launch(parse_spec(tree | sections, tmp_path))
        started.append(deployment)
        status = deployment.wait_until_ready(START_TIMEOUT_S)
        assert status.endpoint is not None
        return Cluster(deployment, status.endpoint, status.model)

    yield start
    for name in {deployment.record.name for deployment in started}:
        if records.find(name) is not None:
            ray_session.find(name).stop()
