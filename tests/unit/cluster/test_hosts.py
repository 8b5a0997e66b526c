"""What workers ask of Ray, and what is said where hosts do not have it."""

from itertools import product
from pathlib import Path
from typing import Any

import pytest

from diptych.cluster.hosts import CPUS_PER_ACTOR, actor_options, bundle_of, reserving_order, what_is_missing
from diptych.cluster.spec import Spec, parse_spec

ROOMY = {"CPU": 64.0}


def spec_of(device: str = "cuda", hosts: str = "any", **pools: dict[str, Any]) -> Spec:
    tree = {
        "name": "tiny",
        "model": {"path": "embedded", "device": device},
        "hosts": hosts,
        "pools": {"decode": {"workers": 1}} | {name: {"workers": 1} | pool for name, pool in pools.items()},
        "transfer": {"transports": ["ucx"]},
    }
    return parse_spec(tree, Path())


def gpu_hosts(*counts: int, node: str | None = None) -> list[dict[str, float]]:
    return [ROOMY | {"GPU": float(count)} | ({node: 1.0} if node else {}) for count in counts]


@pytest.mark.parametrize("tp", [1, 4])
def test_a_worker_reserves_the_gpus_of_its_ranks_on_one_host(tp: int) -> None:
    spec = spec_of(decode={"tp": tp, "node": "rack"})
    bundle = bundle_of(spec, spec.pools.decode, "10.0.0.1")
    assert (bundle["GPU"], bundle["CPU"], bundle["rack"] > 0) == (tp, CPUS_PER_ACTOR, True)
    assert actor_options(spec, spec.pools.decode) == {"num_cpus": CPUS_PER_ACTOR, "num_gpus": tp}

    at_home = spec_of(hosts="one", decode={"tp": tp})
    assert bundle_of(at_home, at_home.pools.decode, "10.0.0.1").keys() == {"CPU", "GPU", "node:10.0.0.1"}
    assert bundle_of(at_home, at_home.pools.decode, "10.0.0.1")["GPU"] == tp


def test_on_a_cpu_it_reserves_the_threads_of_its_ranks_where_there_are_hosts_to_choose_from() -> None:
    pool = {"tp": 2, "num_threads": 3}
    spread, at_home = spec_of("cpu", decode=pool), spec_of("cpu", "one", decode=pool)
    assert bundle_of(spread, spread.pools.decode, "10.0.0.1") == {"CPU": 6.0}
    assert bundle_of(at_home, at_home.pools.decode, "10.0.0.1")["CPU"] == CPUS_PER_ACTOR
    assert actor_options(spread, spread.pools.decode) == {"num_cpus": CPUS_PER_ACTOR, "num_gpus": 0}


def test_room_is_asked_for_first_where_it_is_hardest_to_find() -> None:
    racks, others = gpu_hosts(4, 4, node="rack"), gpu_hosts(4)

    def order(offers: list[dict[str, float]], **pools: dict[str, Any]) -> list[str]:
        return [str(place) for place in reserving_order(spec_of(**pools), offers)]

    assert order(others, prefill={"tp": 2, "workers": 2}) == ["prefill-0", "prefill-1", "decode-0"]
    assert order(others, prefill={}, decode={"tp": 2}) == ["decode-0", "prefill-0"]
    asked = order([*racks, *others], prefill={"tp": 2}, decode={"node": "rack"})
    assert asked == ["decode-0", "prefill-0"], "else it may find its hosts taken"
    asked = order(racks, prefill={"tp": 4}, decode={"node": "rack", "workers": 2})
    assert asked == ["prefill-0", "decode-0", "decode-1"], "what all hosts offer keeps nobody from any"


TWO_WIDE: dict[str, dict[str, Any]] = {"prefill": {"workers": 2, "tp": 4}, "decode": {"workers": 4}}
TOO_FEW = "model.device: cuda: the workers need 12 GPU(s), prefill 2 × 4, decode 4 × 1;"


@pytest.mark.parametrize(
    ("hosts", "pools", "offers", "said"),
    [
        ("one", TWO_WIDE, gpu_hosts(12), ""),
        ("one", TWO_WIDE, gpu_hosts(8), f"{TOO_FEW} this host has 8"),
        ("any", TWO_WIDE, gpu_hosts(8, 4), ""),
        ("any", TWO_WIDE, gpu_hosts(6, 6), ""),
        ("any", TWO_WIDE, gpu_hosts(8, 3), f"{TOO_FEW} this Ray cluster has 11"),
        (
            "any",
            TWO_WIDE,
            gpu_hosts(3, 3, 7),
            "pools.prefill.workers: 2 need 4 GPU(s) of one host each, and this Ray cluster has room for 1",
        ),
        (
            "any",
            {"decode": {"workers": 2, "tp": 2, "node": "rack"}},
            [*gpu_hosts(8), *gpu_hosts(3, node="rack")],
            "pools.decode.workers: 2 need 2 GPU(s) of one host each, and the hosts that offer 'rack' have room for 1",
        ),
        ("any", {"decode": {"node": "rack"}}, gpu_hosts(1, 1), "pools.decode.node: none of the 2 hosts of this Ray cluster offers 'rack'"),
        ("any", {"prefill": {"workers": 2, "tp": 2}, "decode": {"workers": 2, "tp": 4}}, gpu_hosts(4, 6, 3), ""),
        (
            "any",
            {"prefill": {"tp": 2}, "decode": {"workers": 2, "tp": 4}},
            gpu_hosts(5, 5, 1),
            "pools.prefill.workers: 1 need 2 GPU(s) of one host each; beside pools.decode there is room for 0",
        ),
        ("any", {"prefill": {"tp": 2}, "decode": {"workers": 2, "node": "rack"}}, [*gpu_hosts(2), *gpu_hosts(2, node="rack")], ""),
        (
            "any",
            {"prefill": {"tp": 2, "workers": 2}, "decode": {"node": "rack"}},
            [*gpu_hosts(3), *gpu_hosts(2, node="rack")],
            "pools.decode.workers: 1 need 1 GPU(s) of one host each; beside pools.prefill there is room for 0",
        ),
    ],
)
def test_gpus(hosts: str, pools: dict[str, dict[str, Any]], offers: list[dict[str, float]], said: str) -> None:
    assert what_is_missing(spec_of("cuda", hosts, **pools), offers) == said


def test_one_host_without_cpus() -> None:
    spec = spec_of("cpu", "one", decode={"workers": 2})
    said = "hosts: one: Ray has 0 CPUs to give on this host, and 2 worker(s) take 0.02 (`--num-cpus`)"
    assert what_is_missing(spec, [{"CPU": 0.0}]) == what_is_missing(spec, [{}]) == said
    assert what_is_missing(spec, [{"CPU": 1.0}]) == ""


@pytest.mark.parametrize(("prefill_tp", "decode_tp"), [(1, 1), (4, 2), (1, 3), (2, 6)])
@pytest.mark.parametrize("nodes", [(None, None), ("rack", None), (None, "rack"), ("rack", "rack")])
def test_there_is_room_exactly_if_some_placement_has_it(prefill_tp: int, decode_tp: int, nodes: tuple[str | None, str | None]) -> None:
    prefill, decode = {"workers": 2, "tp": prefill_tp, "node": nodes[0]}, {"workers": 2, "tp": decode_tp, "node": nodes[1]}
    spec = spec_of(prefill=prefill, decode=decode)
    for anywhere, here, there in product(range(8), repeat=3):
        offers = [*gpu_hosts(anywhere), *gpu_hosts(here, there, node="rack")]
        asked = [(pool["tp"], 1 if pool["node"] else 0) for pool in (prefill, prefill, decode, decode)]
        assert (what_is_missing(spec, offers) == "") == all_find_room(asked, (anywhere, here, there)), offers


def all_find_room(asked: list[tuple[int, int]], free: tuple[int, ...]) -> bool:
    """By trying every host for each. `asked`: GPUs, and the first host that will do."""
    if not asked:
        return True
    (size, first), *others = asked
    left = [(*free[:i], count - size, *free[i + 1 :]) for i, count in enumerate(free) if count >= size and i >= first]
    return any(all_find_room(others, each) for each in left)


@pytest.mark.parametrize(
    ("pool", "said"),
    [
        ({"num_threads": 64}, ""),
        ({"num_threads": 65}, "pools.decode.num_threads: 65, but no host has more than 64 CPUs that Ray may give"),
        ({"num_threads": 16, "tp": 4}, ""),
        (
            {"num_threads": 17, "tp": 4},
            "pools.decode.num_threads: 17 for each of 4 ranks, but no host has more than 64 CPUs that Ray may give",
        ),
    ],
)
def test_cpus(pool: dict[str, Any], said: str) -> None:
    assert what_is_missing(spec_of("cpu", decode=pool), [ROOMY, {"CPU": 1.0}]) == said
