"""Deployments whose pools hold KV differently: the same answers as colocated, also after each worker was killed."""

from .conftest import Cluster, StartCluster

PROMPTS = ["The for statement", "import os\n" * 30, "A list is a sequence of"]
POOL = {"workers": 1, "kv_memory": "32MiB"}


def test_blocks_of_different_sizes(cluster: StartCluster, colocated: Cluster) -> None:
    def answers(served: Cluster) -> list[str]:
        return [served.complete(prompt, max_tokens=24)["choices"][0]["text"] for prompt in PROMPTS]

    expected = answers(colocated)
    apart = cluster(pools={"prefill": POOL | {"block_size": 64}, "decode": POOL | {"block_size": 16}})
    assert answers(apart) == expected
    for victim in ("decode-0", "prefill-0"):
        apart.wait_until_back(apart.kill(victim))
        assert answers(apart) == expected


def test_an_fp8_decode_pool_holds_four_times_as_much(cluster: StartCluster) -> None:
    apart = cluster(pools={"prefill": POOL, "decode": POOL | {"kv_dtype": "fp8_e4m3"}})
    assert len(apart.complete(PROMPTS[1], max_tokens=24)["choices"][0]["text"]) > 0
    prefill, decode = apart.place("prefill-0").load, apart.place("decode-0").load
    assert prefill is not None
    assert decode is not None
    assert decode.num_blocks // 4 == prefill.num_blocks


def test_ranks_that_share_the_heads(cluster: StartCluster, colocated: Cluster) -> None:
    def answers(served: Cluster) -> list[str]:
        return [served.complete(prompt, max_tokens=24)["choices"][0]["text"] for prompt in PROMPTS]

    expected = answers(colocated)
    apart = cluster(pools={"prefill": POOL | {"tp": 2}, "decode": POOL | {"tp": 4, "block_size": 32}})
    assert [apart.place(name).tp for name in ("prefill-0", "decode-0")] == [2, 4]
    assert answers(apart) == expected
    for victim in ("decode-0", "prefill-0"):
        apart.wait_until_back(apart.kill(victim))
        assert answers(apart) == expected
