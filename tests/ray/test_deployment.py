"""A deployment on real Ray: it comes up, heals, says why it cannot, and leaves nothing behind."""

import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil
import pytest
from harness.ports import shared_by_a_stranger

from diptych.cluster import ray_session, records
from diptych.cluster.controller import Phase
from diptych.cluster.ray_session import is_serving
from diptych.cluster.records import Record
from diptych.messages.errors import ClusterError, SpecError
from diptych.models.embedded.path import embedded_model_path

from .conftest import Cluster, StartCluster

SMALL = {"workers": 1, "kv_memory": "32MiB"}
SHM = Path("/dev/shm")


def segments(name: str) -> list[str]:
    return sorted(path.name for path in SHM.glob(f"diptych-{name}-*"))


def test_killed_workers_and_gateway_come_back_and_answer_alike(cluster: StartCluster) -> None:
    served = cluster()
    assert httpx.get(f"{served.endpoint}/ready").status_code == 200
    text = served.complete()["choices"][0]["text"]
    for name in ("decode-0", "prefill-0"):
        before = served.kill(name)
        after = served.wait_until_back(before)
        assert after.pid != before.pid
        assert after.num_restarts == 1
        assert served.complete()["choices"][0]["text"] == text
    assert len(segments(served.status.name)) == 2, "the dead workers' segments are swept"
    served.wait_until_back(served.kill("gateway-0"))
    assert served.status.endpoint == served.endpoint, "clients know it, though the spec says any port"
    assert served.complete()["choices"][0]["text"] == text


def test_down_gives_the_places_back(cluster: StartCluster) -> None:
    import ray

    def held() -> list[str]:
        entries = ray.util.placement_group_table().values()
        return [entry["name"] for entry in entries if entry["name"].startswith(f"diptych-{name}/") and entry["state"] != "REMOVED"]

    served = cluster(pools={"decode": SMALL})
    name = served.status.name
    assert held() == [f"diptych-{name}/decode-0"]
    served.deployment.stop()
    assert held() == []


def test_stopped_worker_is_replaced_after_the_answer_timeout(cluster: StartCluster) -> None:
    served = cluster(pools={"decode": SMALL}, timeouts={"answer_s": 2.0})
    before = served.kill("decode-0", signal.SIGSTOP)
    after = served.wait_until_back(before)
    assert before.pid is not None
    assert not psutil.pid_exists(before.pid) or psutil.Process(before.pid).status() == psutil.STATUS_ZOMBIE
    assert after.num_restarts == 1
    served.complete()


def test_a_new_controller_adopts_what_lives(colocated: Cluster) -> None:
    served = colocated
    pids, controller_pid = served.pids, served.status.pid
    psutil.Process(controller_pid).kill()
    served.complete()                                         # nobody needs it for that
    status = served.wait_for(lambda status: status.pid != controller_pid and is_serving(status))
    assert {place.name: place.pid for place in status.places} == pids
    served.complete()
    served.wait_until_back(served.kill("decode-0"))           # and it heals
    served.complete()


def test_a_new_controller_replaces_who_has_stopped_before_it(cluster: StartCluster) -> None:
    """Such a life is known to the others and has never answered this controller: only its trace says which process to wait for."""
    served = cluster(pools={"decode": SMALL}, timeouts={"answer_s": 2.0})
    controller_pid = served.status.pid
    before = served.kill("decode-0", signal.SIGSTOP)
    psutil.Process(controller_pid).kill()
    served.wait_for(lambda status: status.pid != controller_pid and served.place("decode-0").error == "no answer for 2 s")
    after = served.wait_until_back(before)
    assert before.pid is not None
    assert not psutil.pid_exists(before.pid) or psutil.Process(before.pid).status() == psutil.STATUS_ZOMBIE
    assert after.pid != before.pid
    served.complete()


def test_a_controller_that_stood_still_kills_nobody(cluster: StartCluster) -> None:
    served = cluster(pools={"decode": SMALL}, timeouts={"answer_s": 2.0})
    pids, controller = served.pids, psutil.Process(served.status.pid)
    controller.suspend()
    time.sleep(4.0)
    controller.resume()
    for _ in range(20):
        assert {place.name: place.pid for place in served.status.places} == pids
        time.sleep(0.1)
    served.complete()


def test_stopping_leaves_no_process_and_no_segment(cluster: StartCluster) -> None:
    served = cluster(router={"port": 0, "processes": 1})
    name, pids = served.status.name, [*served.pids.values(), served.status.pid]
    assert segments(name)
    served.deployment.stop()
    _, alive = psutil.wait_procs([psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)], timeout=5.0)
    assert [process for process in alive if process.status() != psutil.STATUS_ZOMBIE] == []
    assert segments(name) == []


def test_a_controller_that_dies_while_it_stops_is_followed_by_one_that_goes_on(cluster: StartCluster) -> None:
    served = cluster(pools={"decode": SMALL}, timeouts={"answer_s": 60.0, "drain_s": 60.0})
    controller_pid, pids, name = served.status.pid, served.pids, served.status.name
    served.kill("gateway-0", signal.SIGSTOP)                  # nothing leaves before it does
    ray_session._ask(served.deployment.controller.stop)
    served.wait_for(lambda status: status.phase is Phase.STOPPING)
    psutil.Process(controller_pid).kill()
    served.wait_for(lambda status: status.pid != controller_pid and status.phase is Phase.STOPPING)
    psutil.Process(pids["gateway-0"]).resume()
    status = served.wait_for(lambda status: status.phase is Phase.STOPPED or not set(served.pids.items()) <= set(pids.items()))
    assert status.phase is Phase.STOPPED, "it started somebody"
    served.deployment.stop()
    cluster(pools={"decode": SMALL}, name=name).complete()    # what is over for one is over for the next


def test_a_model_that_cannot_be_served_is_said_at_once(cluster: StartCluster, tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(embedded_model_path(), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["NoSuchForCausalLM"], "model_type": "no_such"}))
    with pytest.raises(ClusterError, match=r"(prefill|decode)-0: UnsupportedModel: ") as caught:
        cluster(model={"path": str(folder)})
    assert "no_such" in str(caught.value) or "NoSuchForCausalLM" in str(caught.value)


def test_whichever_gateway_had_a_request_explains_it(cluster: StartCluster) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    running = cluster(pools={"decode": SMALL}, router={"port": port, "processes": 2, "explain": 10})
    ids = [running.complete()["id"] for _ in range(8)]        # each over a connection of its own: the kernel spreads them
    running.wait_for(lambda status: sum(place.gateway.outcomes["finished"] for place in status.places if place.gateway) == len(ids))
    found = [running.deployment.explain(each) for each in ids]
    assert [each and each.response_id for each in found] == ids
    assert {each.choices[0].attempts[0].decode for each in found if each} == {"decode-0"}
    assert running.deployment.explain("cmpl-none") is None


def test_a_scrape_of_any_gateway_tells_of_all_and_of_a_later_life_too(cluster: StartCluster) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    running = cluster(pools={"decode": SMALL}, router={"port": port, "processes": 2})
    both = {f'diptych_gateway_scraped{{gateway="gateway-{i}"}} 1.0' for i in range(2)}
    assert all(both <= scraped(running) for _ in range(4))
    running.wait_until_back(running.kill("gateway-1"))
    assert all(both <= scraped(running) for _ in range(4))


def scraped(running: Cluster) -> set[str]:
    """Lines, over a connection of its own: the kernel spreads them."""
    return set(httpx.get(f"{running.endpoint}/metrics", timeout=20, trust_env=False).text.splitlines())


def test_a_taken_port_is_said_at_once(cluster: StartCluster) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ClusterError, match=f"gateway-0 cannot listen on 127.0.0.1:{port}"):
            cluster(pools={"decode": SMALL}, router={"port": port})


def test_a_port_that_a_stranger_would_share_is_said_at_once(cluster: StartCluster) -> None:
    with shared_by_a_stranger() as stranger:
        port = stranger.getsockname()[1]
        with pytest.raises(ClusterError, match=f"the gateways cannot listen on 127.0.0.1:{port}"):
            cluster(pools={"decode": SMALL}, router={"port": port, "processes": 2})


def test_a_deployment_without_its_controller_is_cleared_away_by_the_next(
    cluster: StartCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    first = cluster(pools={"decode": SMALL})
    pids, name = first.pids, first.status.name
    ray.kill(first.deployment.controller)                     # for good
    with monkeypatch.context() as unrecorded:                 # as the next one finds it whose folder of records is another
        unrecorded.setenv("XDG_STATE_HOME", str(tmp_path))
        with pytest.raises(ClusterError, match=f"no deployment '{name}' is running"):
            ray_session.take_down(name, lambda status: None)
    second = cluster(name=name, pools={"decode": SMALL})
    assert not set(second.pids.values()) & set(pids.values())
    second.complete()


def test_a_deployment_without_its_controller_is_cleared_away_by_down(cluster: StartCluster) -> None:
    import ray

    running = cluster(pools={"decode": SMALL})
    pids, name = running.pids, running.status.name
    ray.kill(running.deployment.controller)                   # for good
    text = ray_session.take_down(name, lambda status: None)
    assert "has no controller of it; 2 member(s) that it has left are ended; 1 segment(s) of its shared memory removed" in text
    assert (records.find(name), segments(name)) == (None, [])
    _, alive = psutil.wait_procs([psutil.Process(pid) for pid in pids.values() if psutil.pid_exists(pid)], timeout=5.0)
    assert [process for process in alive if process.status() != psutil.STATUS_ZOMBIE] == []


@pytest.mark.parametrize(
    ("listens", "reason"), [(False, "nothing listens there, asked for 2 s"), (True, r"tried for \d+ s: Failed to connect")]
)
def test_a_head_that_does_not_answer_is_said_in_time(listens: bool, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's own patience is minutes, at whose end it sends the command a SIGTERM."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    with socket.create_server(("127.0.0.1", 0)) as mute:
        address = f"127.0.0.1:{mute.getsockname()[1]}"
        records.write(Record("chat", address, None))
        if not listens:
            mute.close()
        command = [sys.executable, "-c", "from diptych.cluster.cli import main; main()", "status", "chat"]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=60.0, check=False)
    assert ended.returncode == 1
    assert re.search(f"cannot join Ray at {address}[:,] {reason}", " ".join(ended.stderr.split()))


def test_a_name_is_used_once(colocated: Cluster, cluster: StartCluster) -> None:
    assert colocated.status.phase is Phase.READY
    with pytest.raises(SpecError, match="is running already"):
        cluster(name=colocated.status.name, pools={"decode": SMALL})
