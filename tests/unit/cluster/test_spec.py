"""What a spec may say, and what is said of one that is wrong."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from diptych.cluster.places import PlaceKind, PlaceName, gateway_config, num_gpus, places_of, pool_of, worker_config
from diptych.cluster.spec import load_spec, parse_spec
from diptych.engine.config import ReceiverPool
from diptych.messages.errors import SpecError
from diptych.messages.ids import Epoch

GOOD = """
name: llama-8b
model: {path: weights, dtype: bfloat16, name: llama}
slo: {ttft_ms: 300, tpot_ms: 30, attainment: 0.9}
pools:
  prefill: {workers: 2, max_step_tokens: 64}
  decode:  {workers: 3, kv_memory: 8MiB, num_threads: 4}
router: {policy: round_robin, host: 0.0.0.0, port: 8001, processes: 2, local_path: true, explain: 500, debug_headers: true,
         max_connections: 50}
transfer: {transports: [shm], handoff_timeout_s: 5}
security: {api_keys_file: keys.txt}
timeouts: {request_s: 33}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "weights").mkdir()
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / "weights" / name).write_text("{}")
    (tmp_path / "keys.txt").write_text("# ours\nfirst\n\nsecond\n")
    (tmp_path / "spec.yaml").write_text(GOOD)
    return tmp_path


BOTH = {"prefill": {"workers": 1}, "decode": {"workers": 1}}


def minimal(**sections: Any) -> dict[str, Any]:
    return {"name": "tiny", "model": {"path": "weights"}, "pools": {"decode": {"workers": 1}}, **sections}


def refusal(tree: dict[str, Any], folder: Path) -> str:
    with pytest.raises(SpecError) as caught:
        parse_spec(tree, folder)
    return str(caught.value)


def test_a_whole_spec_becomes_configs(folder: Path) -> None:
    spec = load_spec(folder / "spec.yaml")
    assert Counter(place.kind for place in places_of(spec)) == {PlaceKind.PREFILL: 2, PlaceKind.DECODE: 3, PlaceKind.GATEWAY: 2}

    decode = worker_config(spec, PlaceName(PlaceKind.DECODE, 2), Epoch(7))
    assert (decode.worker_id, decode.epoch, decode.cluster) == ("decode-2", 7, "llama-8b")
    assert (decode.num_threads, decode.handoff_timeout_s) == (4, 5)
    assert (decode.engine.kv_memory_bytes, decode.engine.dtype, decode.engine.max_step_tokens) == (8 << 20, "bfloat16", 512)
    assert decode.engine.model_path == str(folder / "weights")
    assert worker_config(spec, PlaceName(PlaceKind.PREFILL, 0), Epoch(7)).engine.max_step_tokens == 64

    gateway = gateway_config(spec, PlaceName(PlaceKind.GATEWAY, 1))
    assert (gateway.gateway_id, gateway.model_name, gateway.policy, gateway.reuse_port) == ("gateway-1", "llama", "round_robin", True)
    assert gateway.api_keys == {"first", "second"}
    assert gateway.policy_options.local_path
    assert (gateway.explain, gateway.debug_headers) == (500, True)
    assert (gateway.limits.request_timeout_s, gateway.limits.max_connections) == (33, 50)
    assert gateway.limits.grace_s == spec.timeouts.drain_s, "answers under way end as workers do"
    assert [gateway_config(spec, PlaceName(PlaceKind.GATEWAY, 0), any_port=9).port, gateway.port] == [gateway.port] * 2


def test_the_smallest_spec_is_colocated_and_on_the_loopback(folder: Path) -> None:
    spec = parse_spec(minimal(), folder)
    assert {place.kind for place in places_of(spec)} == {PlaceKind.DECODE, PlaceKind.GATEWAY}
    assert spec.router.host == "127.0.0.1"
    assert spec.model.served_name == "weights"


def test_workers_of_any_host_listen_at_its_address(folder: Path) -> None:
    d0, p0 = PlaceName(PlaceKind.DECODE, 0), PlaceName(PlaceKind.PREFILL, 0)
    assert worker_config(parse_spec(minimal(), folder), d0, Epoch(7)).host == "127.0.0.1"
    pools = {"prefill": {"workers": 1, "node": "rack"}, "decode": {"workers": 1}}
    spec = parse_spec(minimal(hosts="any", transfer={"transports": ["shm", "ucx"]}, pools=pools), folder)
    assert worker_config(spec, d0, Epoch(7)).host is None
    assert [pool_of(spec, place.kind).node for place in (p0, d0)] == ["rack", None]
    assert parse_spec(minimal(hosts="any"), folder).transports == ("shm",), "nothing moves without a prefill pool"


def test_the_floor_of_links(folder: Path) -> None:
    def floor(**transfer: Any) -> tuple[bool, float, bool]:
        config = worker_config(parse_spec(minimal(transfer=transfer), folder), PlaceName(PlaceKind.DECODE, 0), Epoch(1))
        return config.probe_links, config.min_gbps, config.refuse_below_floor

    assert floor() == (True, 0.0, True)
    assert floor(min_gbps=10) == (True, 10.0, True)
    assert floor(min_gbps=10, below_floor="warn") == (True, 10.0, False)


def test_prefill_workers_know_how_the_decode_pool_holds_kv(folder: Path) -> None:
    pools = {"prefill": {"workers": 1, "block_size": 64}, "decode": {"workers": 1, "kv_dtype": "fp8_e4m3"}}
    spec = parse_spec(minimal(pools=pools), folder)
    prefill, decode = (worker_config(spec, PlaceName(kind, 0), Epoch(1)) for kind in (PlaceKind.PREFILL, PlaceKind.DECODE))
    assert (prefill.engine.block_size, prefill.engine.kv_dtype) == (64, "auto")
    assert (decode.engine.block_size, decode.engine.kv_dtype) == (16, "fp8_e4m3")
    assert (prefill.receiver, decode.receiver) == (ReceiverPool(16, "fp8_e4m3"), None)


def test_ranks(folder: Path) -> None:
    def ranks(**tp: int) -> list[tuple[int, int]]:
        spec = parse_spec(minimal(pools={name: {"workers": 1, "tp": size} for name, size in tp.items()}), folder)
        configs = [worker_config(spec, PlaceName(PlaceKind(name), 0), Epoch(1)) for name in tp]
        return [(config.engine.tp, config.finest_tp) for config in configs]

    assert ranks(decode=3) == [(3, 3)]
    assert ranks(prefill=2, decode=1) == [(2, 2), (1, 2)], "the other pool's may be the finest"
    assert ranks(prefill=2, decode=6) == [(2, 6), (6, 6)]


def test_gpus_are_counted_by_rank(folder: Path) -> None:
    pools = {"prefill": {"workers": 3, "tp": 2}, "decode": {"workers": 2, "tp": 4}}
    assert num_gpus(parse_spec(minimal(pools=pools), folder)) == 0
    model = {"path": "weights", "device": "cuda"}
    assert num_gpus(parse_spec(minimal(model=model, pools=pools), folder)) == 3 * 2 + 2 * 4
    assert num_gpus(parse_spec(minimal(model=model), folder)) == 1


def test_embedded_model(tmp_path: Path) -> None:
    spec = parse_spec(minimal(model={"path": "embedded"}), tmp_path)
    assert (Path(spec.model.path) / "config.json").is_file()


def test_survives_the_way_to_the_controller(folder: Path) -> None:
    spec = load_spec(folder / "spec.yaml")
    assert type(spec).model_validate_json(spec.model_dump_json()) == spec


@pytest.mark.parametrize(
    ("sections", "text"),
    [
        ({"pools": {"decode": {"workers": 0}}}, "pools.decode.workers: must be >= 1, not 0"),
        ({"pools": {"decode": {"workers": 1, "tp": 0}}}, "pools.decode.tp: must be >= 1, not 0"),
        ({"pools": {"decode": {"workers": 1, "tp": 1.5}}}, "pools.decode.tp: Input should be a valid integer, not 1.5"),
        (
            {"pools": {"prefill": {"workers": 1, "tp": 3}, "decode": {"workers": 1, "tp": 2}}},
            "pools.prefill.tp: 3, and pools.decode.tp is 2: one must be a multiple of the other",
        ),
        ({"pools": {"decode": {"workers": 1, "node": "rack"}}}, "pools.decode.node: needs hosts: any"),
        ({"hosts": "any", "pools": BOTH}, "hosts: any: transfer.transports must name ucx, not only shm"),
        ({"hosts": "any", "pools": {"decode": {"workers": 1, "node": "CPU"}}}, "pools.decode.node: 'CPU' is a resource of Ray's own"),
        ({"hosts": "some"}, "hosts: Input should be 'one' or 'any'"),
        ({"pools": {"prefill": {"workers": 1}}}, "pools.decode: is missing"),
        ({"pools": {"decode": {"workers": 1, "num_blocks": 4, "kv_memory": 1024}}}, "pools.decode.num_blocks: give this or kv_memory"),
        ({"pools": {"decode": {"workers": 1, "kv_dtype": "fp4"}}}, "pools.decode.kv_dtype: Input should be 'auto', 'float32'"),
        ({"pools": {"decode": {"workers": 1, "kv_memory": "8MB"}}}, "pools.decode.kv_memory: must be a number with one of KiB, MiB, GiB"),
        ({"pools": {"decode": {"workers": 1, "batch": 1}}}, "pools.decode.batch: unknown key"),
        ({"model": {"path": "nowhere"}}, "model.path: no folder"),
        ({"model": {"path": "."}}, "has no config.json"),
        ({"model": {"path": "weights", "device": "cuda"}, "transfer": {"transports": ["shm"]}}, "'shm' does not move memory of cuda"),
        ({"router": {"policy": "fastest"}}, "router.policy: 'fastest' is unknown; known: round_robin"),
        ({"router": {"port": 0, "processes": 2}}, "router.port: must be a fixed port"),
        ({"router": {"port": 65536}}, "router.port: "),
        ({"router": {"max_connections": 0}}, "router.max_connections: must be >= 1, not 0"),
        ({"router": {"explain": -1}}, "router.explain: must be >= 0, not -1"),
        ({"router": {"explain": 10_001}}, "router.explain: "),
        ({"transfer": {"transports": ["carrier_pigeon"]}}, "transfer.transports: 'carrier_pigeon' is not there yet"),
        ({"transfer": {"min_gbps": 0}}, "transfer.min_gbps: must be > 0.0, not 0"),
        ({"transfer": {"below_floor": "shout"}}, "transfer.below_floor: Input should be 'refuse' or 'warn'"),
        ({"transfer": {"transports": []}}, "transfer.transports: must name at least one"),
        ({"transfer": {"transports": ["ucx", "ucx"]}}, "transfer.transports: 'ucx' is named twice"),
        ({"security": {"api_keys_file": "none.txt"}}, "security.api_keys_file: no file"),
        ({"security": {"api_keys_file": "empty.txt"}}, "holds no key"),
        ({"security": {"api_keys_file": "odd.txt"}}, "key 2 of 2 is not of printable ASCII"),
        ({"pools": {"decode": {"workers": True}}}, "pools.decode.workers: Input should be a valid integer, not True"),
        ({"pools": {"decode": {"workers": "2"}}}, "pools.decode.workers: Input should be a valid integer, not '2'"),
        ({"pools": {"decode": {"workers": 1, "kv_memory": True}}}, "pools.decode.kv_memory: must be a number"),
        ({"pools": {"decode": {"workers": 1, "prefix_cache": 1}}}, "pools.decode.prefix_cache: Input should be a valid boolean, not 1"),
        ({"router": {"port": True}}, "router.port: Input should be a valid integer, not True"),
        ({"slo": {"ttft_ms": float("inf")}}, "slo.ttft_ms: "),
        ({"timeouts": {"start_s": float("inf")}}, "timeouts.start_s: "),
        ({"timeouts": {"answer_s": 0.3}}, "timeouts.answer_s: must be >= 2.0, not 0.3"),
        ({"name": "Not A Name"}, "name: "),
        ({"model": {"path": "~nosuchuser/x"}}, "model.path: no home folder for '~nosuchuser/x'"),
        ({"security": {"api_keys_file": "~nosuchuser/x"}}, "security.api_keys_file: no home folder for '~nosuchuser/x'"),
        ({"pools": {"decode": {"workers": 1, "max_step_tokens": 10**10}}}, "max_step_tokens: must be <= 1000000000, not 10000000000"),
        ({"pools": {"decode": {"workers": 10**5000}}}, "pools.decode.workers: must be <= 1000000000, not a number of 16610 bits"),
        ({"pools": {"decode": {"workers": 1, "kv_memory": "9999999GiB"}}}, "pools.decode.kv_memory: must be <= 1125899906842624, not '99"),
        ({"router": {"host": ""}}, "router.host: String should have at least 1 character, not ''"),
        ({"nmae": 1}, "nmae: unknown key"),
    ],
)
def test_what_is_wrong_is_named_by_its_path(folder: Path, sections: dict[str, Any], text: str) -> None:
    (folder / "empty.txt").write_text("# none yet\n")
    (folder / "odd.txt").write_text("plain\nké2\n")
    assert text in refusal(minimal(**sections), folder)


def test_all_faults_are_named_at_once(folder: Path) -> None:
    text = refusal(minimal(router={"policy": "x"}, model={"path": "nowhere"}), folder)
    assert len(text.splitlines()) == 2


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: [", "not YAML"),
        ("- 1", "must be a mapping"),
        ("name: a\nname: b", "'name' is given twice, line 2"),
        ("name: a\nrouter:\n  port: 1\n  policy: random\n  port: 2", "'port' is given twice, line 5"),
        ("pools:\n  decode: {workers: 1,\n    workers: 2}", "'workers' is given twice, line 3"),
        ("", "must be a mapping"),
        ("[" * 3000 + "]" * 3000, r"spec.yaml: is nested too deeply"),
        ("name: " + "9" * 5000, r"spec.yaml: not YAML: .*4300 digits"),
        ("name: 2026-99-99", r"spec.yaml: not YAML: month must be in 1..12"),
    ],
)
def test_what_is_no_spec(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "spec.yaml").write_text(text)
    with pytest.raises(SpecError, match=said):
        load_spec(tmp_path / "spec.yaml")


def test_keys_may_be_merged_and_given_again(folder: Path) -> None:
    text = "name: a\nmodel: {path: weights}\npools:\n  prefill: &p {workers: 1, kv_memory: 64MiB}\n  decode: {<<: *p, workers: 2}\n"
    (folder / "merged.yaml").write_text(text)
    decode = load_spec(folder / "merged.yaml").pools.decode
    assert (decode.workers, decode.kv_memory) == (2, 64 << 20)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="No such file"):
        load_spec(tmp_path / "spec.yaml")
