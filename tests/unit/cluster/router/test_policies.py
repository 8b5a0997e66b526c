import math

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diptych.cluster.router import prefix_aware
from diptych.cluster.router.pickers import decode_load, prefill_load
from diptych.cluster.router.policy import ClusterView, Path, Queue, Refuse, RoutingRequest, WorkerLoad
from diptych.cluster.router.prefix_aware import PrefixAware, PrefixIndex, chain
from diptych.cluster.router.registry import POLICIES, PolicyOptions, make_policy
from diptych.messages.errors import SpecError
from diptych.messages.ids import Address, Epoch, WorkerId
from diptych.messages.requests import Route, WorkerRef

REQUEST = RoutingRequest(tuple(range(100)), max_new_tokens=10)


def load(name: str, requests: int = 0, waiting_tokens: int = 0, free: int = 100) -> WorkerLoad:
    return WorkerLoad(WorkerRef(WorkerId(name), Epoch(1), Address(f"fake://{name}")), requests, waiting_tokens, 100, free, block_size=10)


def pool(name: str, count: int) -> tuple[WorkerLoad, ...]:
    return tuple(load(f"{name}-{i}") for i in range(count))


def routes(policy, view: ClusterView, count: int, request: RoutingRequest = REQUEST) -> list[Route]:
    chosen = [policy.choose(request, view, 0.0) for _ in range(count)]
    assert all(isinstance(each, Route) for each in chosen)
    return chosen


@pytest.mark.parametrize("name", [name for name in POLICIES if name != "goodput"])
class TestEveryPolicyPerPool:
    def test_splits_where_there_is_a_prefill_pool(self, name):
        view = ClusterView(pool("prefill", 2), pool("decode", 2))
        for route in routes(make_policy(name, PolicyOptions()), view, 20):
            assert route.prefill in [worker.ref for worker in view.prefill]
            assert route.decode in [worker.ref for worker in view.decode]

    def test_is_local_without_prefill_workers_or_when_told(self, name):
        for options, prefill in ((PolicyOptions(), ()), (PolicyOptions(local_path=True), pool("prefill", 2))):
            assert routes(make_policy(name, options), ClusterView(prefill, pool("decode", 2)), 1)[0].prefill is None

    @pytest.mark.parametrize("local_path", [False, True])
    def test_goes_the_way_that_a_request_asks_for(self, name, local_path):
        view, policy = ClusterView(pool("prefill", 2), pool("decode", 2)), make_policy(name, PolicyOptions(local_path=local_path))
        for path in Path:
            asked = msgspec.structs.replace(REQUEST, path=path)
            assert {route.prefill is None for route in routes(policy, view, 10, asked)} == {path is not Path.SPLIT}

    def test_waits_for_a_prefill_worker_if_a_request_asks_for_one(self, name):
        asked = msgspec.structs.replace(REQUEST, path=Path.SPLIT)
        decision = make_policy(name, PolicyOptions()).choose(asked, ClusterView((), pool("decode", 2)), 0.0)
        assert decision == Queue("no prefill worker is alive beside a decode worker, and the request asks for one")

    def test_says_whom_it_waits_for_if_a_request_asks_for_a_prefill_worker_alone(self, name):
        asked = msgspec.structs.replace(REQUEST, path=Path.ALONE)
        decision = make_policy(name, PolicyOptions()).choose(asked, ClusterView((), ()), 0.0)
        assert decision == Queue("no prefill worker is alive and takes requests")

    def test_says_at_least_its_choice(self, name):
        view = ClusterView(pool("prefill", 2), pool("decode", 2))
        explanation = make_policy(name, PolicyOptions()).decide(REQUEST, view, 0.0)
        assert explanation.decision == make_policy(name, PolicyOptions()).choose(REQUEST, view, 0.0)
        assert (explanation.predictions, explanation.chosen) == ((), None)

    def test_queues_without_decode_workers(self, name):
        decision = make_policy(name, PolicyOptions()).choose(REQUEST, ClusterView(pool("prefill", 2), ()), 0.0)
        assert isinstance(decision, Queue)

    @pytest.mark.parametrize("full", ["prefill", "decode"])
    def test_refuses_when_a_pool_is_full(self, name, full):
        options = PolicyOptions(max_requests_per_worker=5)
        pools = {each: (load(f"{each}-0", 5), load(f"{each}-1", 5 if each == full else 4)) for each in ("prefill", "decode")}
        decision = make_policy(name, options).choose(REQUEST, ClusterView(**pools), 0.0)
        assert isinstance(decision, Refuse)
        assert full in decision.reason
        assert decision.retry_after_s > 0

    def test_never_gives_to_a_full_worker(self, name):
        options = PolicyOptions(max_requests_per_worker=5)
        view = ClusterView((), (load("decode-0", 5), load("decode-1", 4)))
        assert {route.decode.worker_id for route in routes(make_policy(name, options), view, 20)} == {"decode-1"}

    def test_avoids_where_it_failed_if_there_is_another(self, name):
        workers = pool("decode", 2)
        once_failed = msgspec.structs.replace(REQUEST, avoid=frozenset({workers[0].ref}))
        policy = make_policy(name, PolicyOptions())
        assert {route.decode for route in routes(policy, ClusterView((), workers), 20, once_failed)} == {workers[1].ref}
        assert routes(policy, ClusterView((), workers[:1]), 1, once_failed)[0].decode == workers[0].ref


def test_an_unknown_policy_is_refused_with_the_known_ones():
    with pytest.raises(SpecError, match=r"goodest.*least_loaded"):
        make_policy("goodest", PolicyOptions())


def test_round_robin_takes_turns_in_each_pool_apart():
    chosen = routes(make_policy("round_robin", PolicyOptions()), ClusterView(pool("p", 2), pool("d", 3)), 6)
    assert [route.prefill.worker_id for route in chosen] == ["p-0", "p-1"] * 3
    assert [route.decode.worker_id for route in chosen] == ["d-0", "d-1", "d-2"] * 2


def test_random_uses_all_and_repeats_with_its_seed():
    view = ClusterView(pool("p", 3), pool("d", 3))
    first, again, other = (routes(make_policy("random", PolicyOptions(seed=seed)), view, 50) for seed in (1, 1, 2))
    assert first == again != other
    assert {route.decode for route in first} == {worker.ref for worker in view.decode}


def test_least_loaded_looks_at_what_each_pool_is_short_of():
    prefill = (load("p-0", requests=1, waiting_tokens=900), load("p-1", requests=9, waiting_tokens=100))
    decode = (load("d-0", requests=1, free=10), load("d-1", requests=9, free=60))
    [route] = routes(make_policy("least_loaded", PolicyOptions()), ClusterView(prefill, decode), 1)
    assert (route.prefill.worker_id, route.decode.worker_id) == ("p-1", "d-1")


def test_power_of_two_never_takes_the_worst_and_spreads():
    workers = tuple(load(f"d-{i}", free=100 - 10 * i) for i in range(5))
    chosen = {route.decode.worker_id for route in routes(make_policy("power_of_two", PolicyOptions()), ClusterView((), workers), 200)}
    assert "d-4" not in chosen
    assert len(chosen) >= 3


class TestPrefixAware:
    def test_a_prefix_returns_to_its_worker(self):
        picker = PrefixAware(prefill_load)
        workers = [load("p-0", waiting_tokens=5), load("p-1")]
        assert picker.pick(REQUEST, workers).ref.worker_id == "p-1"
        busier = [workers[0], load("p-1", waiting_tokens=500)]
        assert picker.pick(REQUEST, busier).ref.worker_id == "p-1"
        assert picker.pick(RoutingRequest(tuple(range(1, 101)), 10), busier).ref.worker_id == "p-0"

    def test_the_longest_match_wins(self):
        index = PrefixIndex()
        workers = [load("p-0"), load("p-1"), load("p-2")]
        hashes = chain(REQUEST.token_ids, 10)
        for worker, depth in zip(workers, (3, 8, 5), strict=True):
            index.insert(hashes[:depth], worker.ref)
        assert PrefixAware(prefill_load, index).pick(REQUEST, workers).ref.worker_id == "p-1"

    def test_not_above_its_share(self):
        index = PrefixIndex()
        workers = [load("p-0", requests=4), load("p-1", requests=1)]
        index.insert(chain(REQUEST.token_ids, 10), workers[0].ref)
        assert PrefixAware(prefill_load, index).pick(REQUEST, workers).ref.worker_id == "p-1"       # cap: 1.25 · 6 / 2, rounded up

    def test_pools_do_not_share_an_index(self):
        policy = make_policy("prefix_aware", PolicyOptions())
        same = pool("both", 2)
        routes(policy, ClusterView((), same), 1)
        view = ClusterView((load("both-0", waiting_tokens=9), load("both-1")), same)
        assert routes(policy, view, 1)[0].prefill.worker_id == "both-1"

    def test_a_restarted_worker_has_forgotten(self):
        picker = PrefixAware(decode_load)
        picker.pick(REQUEST, [load("d-0", free=50)])
        newborn = msgspec.structs.replace(load("d-0", free=50), ref=WorkerRef(WorkerId("d-0"), Epoch(2), Address("fake://x")))
        assert picker.pick(REQUEST, [newborn, load("d-1", free=60)]).ref.worker_id == "d-1"

    def test_a_prefix_in_use_does_not_collect_dead_lives(self):
        index, hashes = PrefixIndex(), chain(tuple(range(20)), 10)
        lives = [WorkerRef(WorkerId(f"d-{i}"), Epoch(epoch), Address("fake://x")) for epoch in range(5) for i in range(2)]
        for life in lives:
            index.insert(hashes, life)
        held = index.held(hashes)
        assert [held.depth(life) for life in lives] == [0] * 8 + [2, 2]

    def test_the_index_is_bounded_and_forgets_tails_first(self):
        index = PrefixIndex(max_chunks=6)
        old, new = chain(tuple(range(50)), 10), chain(tuple(range(500, 540)), 10)
        worker = load("p-0").ref
        index.insert(old, worker)
        index.insert(new, worker)
        assert len(index) == 6
        assert index.held(old).depth(worker) == 2
        assert index.held(new).depth(worker) == 4

    @given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 4), st.integers(0, 2), st.integers(0, 1)), max_size=30))
    def test_what_was_sent_again_is_recent_whoever_held_it(self, sent):
        """Against a list: of each chunk the lives that hold it, the least recent first."""
        index, believed = PrefixIndex(max_chunks=9), list[tuple[int, set[WorkerRef]]]()
        for start, depth, number, epoch in sent:
            hashes = chain(tuple(range(start // 2 * 100, start // 2 * 100 + 10 * depth)), 10)
            life = WorkerRef(WorkerId(f"d-{number}"), Epoch(epoch), Address("fake://x"))
            index.insert(hashes, life)
            for chunk in reversed(hashes):
                holders = {each for each in dict(believed).get(chunk, set()) if each.worker_id != life.worker_id} | {life}
                believed = [each for each in believed if each[0] != chunk] + [(chunk, holders)]
            believed = believed[-9:]
            bits = {bit: ref for ref, bit in index._bits.items()}
            assert [(chunk, {ref for bit, ref in bits.items() if held & bit}) for chunk, held in index._holders.items()] == believed

    def test_with_very_many_lives_the_index_begins_anew(self, monkeypatch):
        monkeypatch.setattr(prefix_aware, "MAX_LIVES", 4)
        index, hashes = PrefixIndex(), chain(tuple(range(20)), 10)
        lives = [WorkerRef(WorkerId("d-0"), Epoch(epoch), Address("fake://x")) for epoch in range(6)]
        for life in lives[:4]:
            index.insert(hashes, life)
        index.insert(hashes, lives[3])
        assert index.held(hashes).depth(lives[3]) == 2, "nobody is new"
        index.insert(hashes[:1], lives[4])
        index.insert(hashes[:1], lives[5])
        assert [index.held(hashes).depth(life) for life in lives] == [0, 0, 0, 0, 0, 1]
        assert max(index._holders.values()) < 1 << 4

    @given(
        st.lists(st.tuples(st.sets(st.integers(0, 3), min_size=1), st.integers(0, 5)), max_size=12),
        st.lists(st.integers(0, 3), unique=True),
        st.lists(st.integers(0, 2), min_size=4, max_size=4),
    )
    def test_depths_are_those_of_what_was_sent(self, sent, asked, num_requests):
        index, hashes = PrefixIndex(), chain(tuple(range(50)), 10)
        workers = [load(f"p-{i}", requests=number) for i, number in enumerate(num_requests)]
        depths = [0] * 4
        for indices, depth in sent:
            index.insert(hashes[:depth], *(workers[i].ref for i in indices))
            depths = [max(old, depth) if i in indices else old for i, old in enumerate(depths)]
        held = index.held(hashes)
        assert [held.depth(worker.ref) for worker in workers] == depths
        for limit, usable in ((math.inf, asked), (2, [i for i in asked if num_requests[i] < 2])):
            most = max((depths[i] for i in usable), default=0)
            first = next((workers[i] for i in usable if depths[i] == most > 0), None)
            assert held.deepest([workers[i] for i in asked], limit) is first


@given(st.lists(st.integers(0, 3), max_size=60), st.lists(st.integers(0, 3), max_size=60), st.integers(1, 7))
def test_chains_agree_exactly_as_far_as_the_tokens_do(left, right, chunk_tokens):
    common = next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))
    agreeing = sum(a == b for a, b in zip(chain(tuple(left), chunk_tokens), chain(tuple(right), chunk_tokens), strict=False))
    assert agreeing == common // chunk_tokens


@given(st.lists(st.integers(0, 50), min_size=1, max_size=8), st.integers(0, 7))
def test_somebody_is_always_below_the_cap(requests, loved):
    workers = [load(f"p-{i}", requests=count) for i, count in enumerate(requests)]
    index = PrefixIndex()
    index.insert(chain(REQUEST.token_ids, 10), workers[loved % len(workers)].ref)
    chosen = PrefixAware(prefill_load, index).pick(REQUEST, workers)
    assert chosen.num_requests < 1.25 * (sum(requests) + 1) / len(requests) + 1
