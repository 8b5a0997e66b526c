"""An engine over FakeRunner, whose every token depends on all KV that it read: whatever happens, each token is the right one."""

from dataclasses import dataclass

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diptych.engine.block_pool import chain_hashes
from diptych.engine.engine import Engine, EngineLimits, SequenceStep
from diptych.engine.fake_runner import FakeRunner, fake_layout, kv_of, next_token
from diptych.engine.sequence import Sequence, SequenceState
from diptych.kvtransfer.fake import FakeFabric
from diptych.kvtransfer.transport import KVPool
from diptych.messages.errors import ContextOverflow, PoolTooSmall
from diptych.messages.ids import Address, BlockId, Epoch, RequestId, WorkerId
from diptych.messages.requests import FinishReason, GenerateRequest, Route, SamplingParams, TokenDelta, WorkerRef

BLOCK_SIZE = 4
HERE = Route(WorkerRef(WorkerId("decode-0"), Epoch(1), Address("fake://d")))


def make_engine(num_blocks: int = 32, **limits: int | bool) -> tuple[Engine, KVPool]:
    pool = FakeFabric().transport("w").allocate(fake_layout(BLOCK_SIZE), num_blocks)
    plain = {"block_size": BLOCK_SIZE, "max_model_len": num_blocks * BLOCK_SIZE, "max_step_tokens": 8, "max_sequences": 4}
    return Engine(FakeRunner(pool), num_blocks, EngineLimits(**(plain | limits))), pool


def request(name: str, prompt: list[int], max_tokens: int = 5, num_prior: int = 0, **sampling: object) -> GenerateRequest:
    params = SamplingParams(**({"max_tokens": max_tokens, "seed": 0} | sampling))
    return GenerateRequest(RequestId(name), Address("fake://g"), tuple(prompt), params, HERE, timeout_s=9.0, num_prior_outputs=num_prior)


def correct(prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]


def step(engine: Engine) -> list[SequenceStep]:
    return engine.execute(engine.plan())


def finish_all(engine: Engine) -> dict[str, list[TokenDelta]]:
    deltas: dict[str, list[TokenDelta]] = {}
    for _ in range(500):
        if not engine.has_work:
            return deltas
        for done in step(engine):
            if done.delta is not None:
                deltas.setdefault(done.sequence.id, []).append(done.delta)
    raise AssertionError("no end within 500 steps")


def tokens_of(deltas: list[TokenDelta]) -> list[int]:
    return [token for delta in deltas for token in delta.token_ids]


# Exactness

@dataclass(frozen=True)
class Visit:
    """A request's life, in steps of the engine."""

    prompt: list[int]
    max_tokens: int
    arrives: int
    aborted_at: int | None
    adopted: bool


visits = st.builds(
    Visit,
    prompt=st.lists(st.integers(0, 1), min_size=1, max_size=12),
    max_tokens=st.integers(2, 10),
    arrives=st.integers(0, 10),
    aborted_at=st.none() | st.integers(1, 20),
    adopted=st.booleans(),
)


def adopt(engine: Engine, pool: KVPool, asked: GenerateRequest) -> Sequence | None:
    """As the decode role does: the prompt's KV is written into reserved blocks by somebody else."""
    blocks = engine.pool.take(-(-len(asked.token_ids) // BLOCK_SIZE))
    if blocks is None or len(engine.scheduler.running) >= engine.limits.max_sequences:
        engine.pool.release(blocks or [])
        return None
    for position, token_id in enumerate(asked.token_ids):
        for layer in range(pool.layout.num_layers):
            pool.tensor[blocks[position // BLOCK_SIZE], layer, :, 0, position % BLOCK_SIZE, 0] = kv_of(token_id, position, layer)
    return engine.adopt(asked, TokenDelta(asked.request_id, 0, (next_token(asked.token_ids),)), blocks, now=0.0)


@settings(max_examples=120)
@given(
    visits=st.lists(visits, min_size=1, max_size=7),
    num_blocks=st.integers(6, 14),
    max_step_tokens=st.sampled_from([1, 3, 8, 64]),
    max_sequences=st.integers(1, 5),
    prefix_cache=st.booleans(),
)
def test_tokens_are_right_under_any_arrivals_aborts_and_pools(
    visits: list[Visit], num_blocks: int, max_step_tokens: int, max_sequences: int, prefix_cache: bool
) -> None:
    engine, pool = make_engine(
        num_blocks, max_step_tokens=max_step_tokens, max_sequences=max_sequences, max_model_len=24, prefix_cache=prefix_cache
    )
    got: dict[str, list[int]] = {}
    wanted: dict[str, Visit] = {}
    now = 0
    while now <= 20 or engine.has_work:
        assert now < 1500, "no end"
        for number, visit in enumerate(visits):
            name = f"r{number}"
            if visit.arrives == now:
                asked = request(name, visit.prompt, visit.max_tokens)
                if visit.adopted and (adopted := adopt(engine, pool, asked)) is not None:
                    got[name], wanted[name] = adopted.token_ids[len(visit.prompt) :], visit
                elif not visit.adopted:
                    engine.add(asked, now=0.0)
                    got[name], wanted[name] = [], visit
            sequence = engine.find(RequestId(name))
            if visit.aborted_at == now and sequence is not None:
                engine.finish(sequence)
                del wanted[name]
        for done in step(engine) if engine.has_work else []:
            if done.delta is not None:
                assert done.delta.index == len(got[done.sequence.id])
                got[done.sequence.id] += done.delta.token_ids
        now += 1
    for name, tokens in got.items():
        visit = visits[int(name[1:])]
        expected = correct(visit.prompt, min(visit.max_tokens, 24 - len(visit.prompt)))
        assert tokens == expected if name in wanted else tokens == expected[: len(tokens)]
    assert engine.pool.num_held == 0
    assert engine.sequences == []


def test_a_wrong_page_gives_a_wrong_token() -> None:
    """What all these tests rest on."""
    engine, pool = make_engine()
    engine.add(request("r", [1, 2, 3, 4, 5]), now=0.0)
    step(engine)
    [sequence] = engine.sequences
    pool.tensor[sequence.blocks[0], 1, 0, 0, 2, 0] += 1
    assert tokens_of(finish_all(engine)["r"])[0] != correct([1, 2, 3, 4, 5], 2)[1]


def test_on_layer_is_told_once_for_each_layer_of_a_step() -> None:
    engine, pool = make_engine()
    engine.add(request("r", [1, 2, 3]), now=0.0)
    layers: list[int] = []
    engine.execute(engine.plan(), layers.append)
    assert layers == list(range(pool.layout.num_layers))


# Limits

def test_a_pool_that_cannot_hold_one_sequence_is_refused_with_the_numbers() -> None:
    with pytest.raises(PoolTooSmall, match=r"max_model_len 33 needs 9 blocks of 4 tokens, the pool has 8"):
        make_engine(8, max_model_len=33)
    make_engine(8, max_model_len=32)


@pytest.mark.parametrize("num_tokens", [0, 33])
def test_prompts_outside_of_the_context_are_refused_with_the_numbers(num_tokens: int) -> None:
    engine, _ = make_engine(8)
    with pytest.raises(ContextOverflow, match=f"{num_tokens} tokens; this worker takes 1 to 32"):
        engine.add(request("r", [1] * num_tokens), now=0.0)
    assert engine.sequences == []
    assert not engine.has_work


def test_the_longest_prompt_gets_one_token_and_a_sequence_ends_at_the_context() -> None:
    engine, _ = make_engine(8)
    for name, num_tokens in (("full", 32), ("nearly", 29)):
        engine.add(request(name, [1] * num_tokens, max_tokens=100), now=0.0)
    deltas = finish_all(engine)
    assert tokens_of(deltas["full"]) == correct([1] * 32, 1)
    assert tokens_of(deltas["nearly"]) == correct([1] * 29, 3)
    assert deltas["full"][-1].finish is deltas["nearly"][-1].finish is FinishReason.LENGTH


def test_no_tokens_wanted_is_one_delta_without_any() -> None:
    engine, _ = make_engine()
    engine.add(request("r", [1, 2, 3], max_tokens=0), now=0.0)
    [delta] = finish_all(engine)["r"]
    assert (delta.token_ids, delta.finish, delta.index) == ((), FinishReason.LENGTH, 0)


def test_a_stop_token_is_delivered_and_ends_it() -> None:
    expected = correct([1, 2, 3], 5)
    engine, _ = make_engine()
    engine.add(request("r", [1, 2, 3], stop_token_ids=(expected[2], 996)), now=0.0)
    deltas = finish_all(engine)["r"]
    assert tokens_of(deltas) == expected[:3]
    assert [delta.finish for delta in deltas] == [None, None, FinishReason.STOP]


@pytest.mark.parametrize(("min_tokens", "stops"), [(0, True), (2, True), (3, False), (5, False)])
def test_a_stop_token_counts_once_min_tokens_are_out(min_tokens: int, stops: bool) -> None:
    """As in the sampler, which masks it until then: with three tokens to come first, the third cannot be a stop."""
    expected = correct([1, 2, 3], 5)
    engine, _ = make_engine()
    engine.add(request("r", [1, 2, 3], stop_token_ids=(expected[2],), min_tokens=min_tokens), now=0.0)
    assert tokens_of(finish_all(engine)["r"]) == expected[: 3 if stops else 5]


def test_a_stop_that_is_the_last_token_too_is_a_stop() -> None:
    expected = correct([1, 2, 3], 5)
    engine, _ = make_engine()
    engine.add(request("r", [1, 2, 3], stop_token_ids=(expected[4],)), now=0.0)
    assert finish_all(engine)["r"][-1].finish is FinishReason.STOP


def test_a_retry_continues_where_the_client_is() -> None:
    expected = correct([1, 2, 3], 5)
    engine, _ = make_engine()
    engine.add(request("again", [1, 2, 3, *expected[:2]], num_prior=2), now=0.0)
    deltas = finish_all(engine)["again"]
    assert [delta.index for delta in deltas] == [2, 3, 4]
    assert tokens_of(deltas) == expected[2:]


def test_cached_tokens_are_told_with_the_first_delta_alone() -> None:
    engine, _ = make_engine()
    engine.add(request("cold", [1] * 9), now=0.0)
    cold = finish_all(engine)["cold"]
    engine.add(request("warm", [1] * 9), now=0.0)
    warm = finish_all(engine)["warm"]
    assert [delta.num_cached_tokens for delta in cold] == [0] * 5
    assert [delta.num_cached_tokens for delta in warm] == [8, 0, 0, 0, 0]
    assert tokens_of(warm) == tokens_of(cold)


# Handing off and adopting

def test_a_sequence_that_hands_off_is_parked_with_its_blocks() -> None:
    engine, _ = make_engine()
    sequence = engine.add(request("r", [1, 2, 3, 4, 5]), now=0.0, hands_off=True)
    [done] = step(engine)
    assert done.delta is not None
    assert done.delta.finish is None
    assert sequence.state is SequenceState.PARKED
    assert not engine.has_work
    assert engine.pool.num_held == 2
    engine.finish(sequence)
    assert (engine.pool.num_held, engine.pool.num_cached) == (0, 1)


def test_a_sequence_that_ends_with_its_first_token_is_not_parked() -> None:
    engine, _ = make_engine()
    engine.add(request("r", [1, 2, 3], max_tokens=1), now=0.0, hands_off=True)
    step(engine)
    assert engine.sequences == []
    assert engine.pool.num_held == 0


def test_adopted_blocks_are_matched_by_others() -> None:
    engine, pool = make_engine()
    adopt(engine, pool, request("theirs", [1] * 9))
    [first] = engine.execute(engine.plan())
    engine.add(request("ours", [1] * 9), now=0.0)
    deltas = finish_all(engine)
    assert deltas["ours"][0].num_cached_tokens == 8
    assert first.delta is not None
    assert [*first.delta.token_ids, *tokens_of(deltas["theirs"])] == tokens_of(deltas["ours"])[1:]


@pytest.mark.parametrize("adopted", [False, True])
def test_what_was_computed_is_matched_once_its_tokens_are_out(adopted: bool) -> None:
    """A client waits for a step's tokens; the prefix cache is asked when the next step is planned."""
    engine, pool = make_engine()
    asked = request("r", [1] * 9, max_tokens=2 + adopted)
    adopt(engine, pool, asked) if adopted else engine.add(asked, now=0.0)
    hashes = chain_hashes(asked.token_ids, BLOCK_SIZE)
    step(engine)
    if not adopted:
        assert engine.pool.match(hashes) == []
        step(engine)                                  # 8 tokens a step, and the last one
    assert len(engine.pool.match(hashes)) == (0 if adopted else 2)
    engine.plan()
    assert len(engine.pool.match(hashes)) == 2
    engine.finish(engine.sequences[0])
    assert engine.pool.num_cached == 2


def test_who_ends_leaves_what_it_computed_to_others() -> None:
    engine, pool = make_engine()
    adopt(engine, pool, request("r", [1] * 9, max_tokens=2))
    step(engine)
    assert engine.sequences == []
    assert engine.pool.num_cached == 2


def test_what_is_adopted_is_checked_like_what_is_added() -> None:
    engine, _ = make_engine(8)
    with pytest.raises(ContextOverflow):
        engine.adopt(request("r", [1] * 33), TokenDelta(RequestId("r"), 0, (1,)), [BlockId(0)], now=0.0)
    assert engine.sequences == []


def test_deadlines_are_on_the_engines_clock() -> None:
    engine, _ = make_engine()
    plain = engine.add(request("plain", [1]), now=100.0)
    hurried = engine.add(msgspec.structs.replace(request("hurried", [1]), ttft_slo_s=0.5), now=100.0)
    assert (plain.deadline, plain.ttft_deadline) == (109.0, float("inf"))
    assert hurried.ttft_deadline == 100.5
    assert [s.id for s in engine.scheduler.waiting] == ["hurried", "plain"]
