"""A deployment on two hosts: network namespaces with a cable between them, a Ray node in each. `test_two_hosts.py` runs this."""

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from harness.cable import Cable, enter_network
from harness.ucx import needs_ucx

from diptych.cluster import ray_session
from diptych.cluster.pulse import DeploymentStatus
from diptych.cluster.ray_head import OBJECT_STORE_BYTES, head_environment
from diptych.cluster.ray_join import join
from diptych.cluster.ray_session import is_serving
from diptych.cluster.records import Record
from diptych.cluster.spec import Spec, parse_spec
from diptych.messages.errors import ClusterError

from .conftest import Cluster

NEAR, FAR = "198.18.77.1", "198.18.77.2"
GCS = f"{NEAR}:6479"
IMPATIENT = {"RAY_health_check_initial_delay_ms": "0", "RAY_health_check_period_ms": "500", "RAY_health_check_timeout_ms": "1000"}
"""Or Ray takes half a minute and more to give up a host that it does not reach."""

PROMPTS = ["The for statement", "import os\n" * 30]

pytestmark = needs_ucx


class RayNode:
    """`ray start` in a namespace, with a resource of its own; all its processes are one session."""

    def __init__(self, network: str, address: str, folder: Path, *role: str) -> None:
        self._command = [
            "ip", "netns", "exec", network, sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats",
            *role, f"--node-ip-address={address}", "--num-cpus=2", f"--object-store-memory={OBJECT_STORE_BYTES}",
            f"--resources={json.dumps({network[-1]: 1})}",
        ]  # fmt: skip
        self._environment = os.environ | {"UCX_NET_DEVICES": network}
        self._log = folder / f"{network}.log"
        self.start()

    def start(self) -> None:
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(self._command, env=self._environment, stdout=log, stderr=log, start_new_session=True)

    def vanish(self) -> None:
        """As a host that loses its power: all of its processes at once. Also tidies up."""
        for pid in [int(each.name) for each in Path("/proc").iterdir() if each.name.isdecimal()]:
            try:
                if os.getsid(pid) == self._process.pid:
                    os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self._process.wait(10)


@dataclass
class TwoHosts:
    cable: Cable
    far: RayNode
    cluster: Cluster


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoHosts]:
    """A deployment with its prefill pool on one and its decode pool on the other."""
    cable, nodes = Cable(), list[RayNode]()
    try:
        cable.lay(is_whole_host=True)
        enter_network(cable.near)                            # for good: this process runs nothing else
    except OSError as error:
        cable.remove()
        pytest.skip(f"no network namespaces here: {error}")
    folder = Path("/tmp") / f"dx{os.getpid()}"               # short: Ray puts Unix sockets below it
    try:
        with pytest.MonkeyPatch.context() as patch:
            yield from _laid(cable, folder, nodes, patch)
    finally:
        import ray

        ray.shutdown()
        for node in reversed(nodes):
            node.vanish()
        cable.remove()
        shutil.rmtree(folder, ignore_errors=True)


def _laid(cable: Cable, folder: Path, nodes: list[RayNode], patch: pytest.MonkeyPatch) -> Iterator[TwoHosts]:
    folder.mkdir()
    (folder / "token").write_text(secrets.token_hex(32))
    environment = head_environment(folder) | IMPATIENT | {"UCX_TLS": "tcp,self", "RAY_ADDRESS": GCS, "XDG_STATE_HOME": str(folder)}
    del environment["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"]     # which keeps Ray to the loopback
    for name, value in environment.items():
        patch.setenv(name, value)
    options = ("--head", "--port=6479", f"--temp-dir={folder}", "--include-dashboard=false", "--include-log-monitor=false")
    nodes.append(RayNode(cable.near, NEAR, folder, *options))
    wait_until(lambda: ray_session.running_ray()[0] is not None, 60)
    nodes.append(RayNode(cable.far, FAR, folder, f"--address={GCS}"))
    cluster = serve(folder)
    yield TwoHosts(cable, nodes[1], cluster)
    cluster.deployment.stop()


def wait_until(condition: Any, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            if condition():
                return
        except Exception:
            if time.monotonic() > deadline:
                raise
        assert time.monotonic() < deadline, f"not within {timeout_s} s"
        time.sleep(0.2)


def serve(folder: Path) -> Cluster:
    small = {"workers": 1, "kv_memory": "32MiB"}
    tree: dict[str, Any] = {
        "name": f"two-{os.getpid()}",
        "model": {"path": "embedded"},
        "hosts": "any",
        "pools": {"prefill": small | {"node": "a"}, "decode": small | {"node": "b"}},
        "router": {"port": 0, "debug_headers": True},
        "transfer": {"transports": ["ucx"]},
    }
    spec = parse_spec(tree, folder)
    join(Record("two", GCS, None))
    wait_until(lambda: "offers 'b'" not in why_not(spec), 60)                     # its host is still joining
    deployment = ray_session.launch(spec)
    status = deployment.wait_until_ready(90)
    assert status.endpoint is not None
    return Cluster(deployment, status.endpoint, status.model)


def answers(cluster: Cluster, path: str) -> list[str]:
    def ask(prompt: str) -> str:
        body = {"model": cluster.model, "prompt": prompt, "max_tokens": 24, "temperature": 0.8, "seed": 3, "ignore_eos": True}
        url, headers = f"{cluster.endpoint}/v1/completions", {"x-diptych-path": path}
        reply = httpx.post(url, json=body, headers=headers, timeout=60.0, trust_env=False)
        assert reply.status_code == 200, reply.text
        return str(reply.json()["choices"][0]["text"])

    return [ask(prompt) for prompt in PROMPTS]


def transports(status: DeploymentStatus) -> set[str]:
    gateways = [place.gateway for place in status.places if place.gateway is not None]
    return {totals.transport for gateway in gateways for totals in gateway.transfers}


def why_not(spec: Spec) -> str:
    try:
        ray_session._check_hosts(spec)
    except ClusterError as error:
        return str(error)
    return ""


def test_pages_go_from_host_to_host_and_deaths_are_seen_on_both(hosts: TwoHosts) -> None:
    cluster = hosts.cluster
    assert {place.name: place.host for place in cluster.status.places} == {"prefill-0": NEAR, "decode-0": FAR, "gateway-0": NEAR}
    expected = answers(cluster, "local")
    assert answers(cluster, "split") == expected
    cluster.wait_for(lambda status: transports(status) == {"ucx"}, 10)
    cluster.wait_until_back(cluster.kill("decode-0"))                             # told by the warden of its host
    assert answers(cluster, "split") == expected
    controller = cluster.status.pid
    os.kill(controller, signal.SIGKILL)                                           # the next one has wardens of its own
    cluster.wait_for(lambda status: status.pid != controller and is_serving(status))
    cluster.wait_until_back(cluster.kill("decode-0"))
    assert answers(cluster, "split") == expected


def test_a_host_that_vanishes_and_comes_back(hosts: TwoHosts) -> None:
    cluster, expected, before = hosts.cluster, answers(hosts.cluster, "local"), hosts.cluster.place("decode-0")
    hosts.far.vanish()
    cluster.wait_for(lambda status: cluster.place("decode-0").epoch != before.epoch)
    assert answers(cluster, "alone") == expected, "the prefill worker stands in"
    hosts.far.start()
    cluster.wait_until_back(before)
    assert answers(cluster, "split") == expected


def test_a_host_that_is_cut_off(hosts: TwoHosts) -> None:
    """What was under way there ends elsewhere. The processes that nobody reaches any more end with their Ray node, and a new one serves."""
    cluster, expected, before = hosts.cluster, answers(hosts.cluster, "local"), hosts.cluster.place("decode-0")
    with ThreadPoolExecutor() as threads:
        under_way = [threads.submit(cluster.complete, PROMPTS[0], max_tokens=600) for _ in range(4)]
        time.sleep(0.5)
        hosts.cable.cut()
        ended = [each.result(timeout=120)["choices"][0]["text"] for each in under_way]
    assert len(set(ended)) == 1
    cluster.wait_for(lambda status: cluster.place("decode-0").epoch != before.epoch)
    assert answers(cluster, "alone") == expected
    hosts.cable.join()
    assert before.pid is not None
    wait_until(lambda: not Path(f"/proc/{before.pid}").exists(), 60)
    hosts.far.vanish()
    hosts.far.start()
    cluster.wait_until_back(before)
    assert answers(cluster, "split") == expected
    assert cluster.complete(PROMPTS[0], max_tokens=600)["choices"][0]["text"] == ended[0]
