"""What clients see of a running cluster: the official client, exact tokens, deaths under load, a real trace."""

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
import torch
import transformers

from diptych.cluster.links import pairs_of
from diptych.cluster.ray_session import is_serving
from diptych.models.embedded.path import embedded_model_path

from .conftest import Cluster, nothing_is_held, serve

SMALL = {"workers": 1, "kv_memory": "32MiB", "max_step_tokens": 64}
PROMPTS = ["The for statement", "A list is a sequence of", "def f(x):\n    return", "import os\n" * 30, "x"]
TRACES = Path(__file__).parents[3] / "shared" / "traces"
KEY = "a-key-of-this-test"


@pytest.fixture(scope="module")
def served(ray_head: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Prefill and decode apart, with API keys, and a floor for links that none reaches and nobody is refused for."""
    folder = tmp_path_factory.mktemp("spec")
    (folder / "keys.txt").write_text(KEY + "\n")
    floor = {"min_gbps": 1e6, "below_floor": "warn"}
    yield from serve("serving", folder, pools={"prefill": SMALL, "decode": SMALL}, transfer=floor, security={"api_keys_file": "keys.txt"})


def client_of(cluster: Cluster) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{cluster.endpoint}/v1", api_key=KEY, max_retries=0, timeout=90)


async def stream(client: openai.AsyncOpenAI, model: str, prompt: str, seed: int, max_tokens: int = 60) -> tuple[str, str | None]:
    """Text and finish reason of a sampled completion; the same seed gives the same text."""
    text, finish = "", None
    chunks = await client.completions.create(
        model=model, prompt=prompt, seed=seed, max_tokens=max_tokens, temperature=0.9, stream=True, extra_body={"ignore_eos": True}
    )
    async for chunk in chunks:
        text += chunk.choices[0].text
        finish = chunk.choices[0].finish_reason or finish
    return text, finish


def test_the_official_client(served: Cluster) -> None:
    async def talk() -> None:
        client, model = client_of(served), served.model
        assert [entry.id for entry in (await client.models.list()).data] == [model]
        question = [{"role": "user", "content": "What is a list?"}]
        whole = await client.chat.completions.create(model=model, messages=question, max_tokens=12, temperature=0)
        assert whole.choices[0].message.content
        assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
        pieces = await client.chat.completions.create(
            model=model, messages=question, max_tokens=12, temperature=0, stream=True, stream_options={"include_usage": True}
        )
        seen = [piece async for piece in pieces]
        assert "".join(p.choices[0].delta.content or "" for p in seen if p.choices) == whole.choices[0].message.content
        assert seen[-1].usage == whole.usage or seen[-1].usage.completion_tokens == whole.usage.completion_tokens
        several = await client.completions.create(model=model, prompt=PROMPTS, n=2, max_tokens=8, seed=4, logprobs=2)
        assert len(several.choices) == 2 * len(PROMPTS)
        with pytest.raises(openai.AuthenticationError):
            await client.with_options(api_key="wrong").models.list()
        with pytest.raises(openai.BadRequestError, match="2048"):
            await client.completions.create(model=model, prompt="x", max_tokens=5000)

    asyncio.run(talk())


def test_links_are_measured_when_workers_meet(served: Cluster) -> None:
    status = served.wait_for(lambda status: all(pair.link is not None for pair in pairs_of(status)), 20)
    (pair,) = pairs_of(status)
    assert pair.link is not None
    assert (pair.prefill, pair.decode, pair.link.transport, pair.link.refused) == ("prefill-0", "decode-0", "shm", False)
    assert pair.link.below_floor


def test_concurrent_streams_and_aborts(served: Cluster) -> None:
    """Half of the clients go away in mid-stream; the other half gets what each would get alone, and the blocks come back."""

    async def leave_early(client: openai.AsyncOpenAI, seed: int) -> None:
        chunks = await client.completions.create(model=served.model, prompt=PROMPTS[1], seed=seed, max_tokens=1500, stream=True)
        async for _ in chunks:
            await chunks.close()
            return

    async def talk() -> None:
        client = client_of(served)
        alone = [await stream(client, served.model, prompt, seed) for seed, prompt in enumerate(PROMPTS)]
        staying = [stream(client, served.model, prompt, seed) for seed, prompt in enumerate(PROMPTS)]
        together = await asyncio.gather(*staying, *[leave_early(client, seed) for seed in range(8)])
        assert together[: len(PROMPTS)] == alone

    asyncio.run(talk())
    served.wait_for(nothing_is_held, 20)


def test_greedy_equals_transformers_on_the_running_cluster(served: Cluster) -> None:
    oracle = transformers.AutoModelForCausalLM.from_pretrained(embedded_model_path(), dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(embedded_model_path())
    with openai.OpenAI(base_url=f"{served.endpoint}/v1", api_key=KEY) as client:
        for prompt in PROMPTS * 2:                      # the second time with warm prefix caches
            ids = tokenizer(prompt)["input_ids"]
            with torch.no_grad():
                for _ in range(24):
                    ids.append(int(oracle(torch.tensor([ids])).logits[0, -1].argmax()))
            expected = tokenizer.decode(ids[-24:])
            answer = client.completions.create(
                model=served.model, prompt=ids[:-24], max_tokens=24, temperature=0, extra_body={"ignore_eos": True}
            )
            ours = answer.choices[0].text
            assert ours == tokenizer.decode(ids[-24:], skip_special_tokens=True) or ours == expected
            assert answer.usage.completion_tokens == 24


def test_colocated_gives_the_same_tokens_and_logprobs(served: Cluster, colocated: Cluster) -> None:
    def sample(cluster: Cluster) -> list[tuple[list[str], list[float]]]:
        with openai.OpenAI(base_url=f"{cluster.endpoint}/v1", api_key=KEY) as client:
            sampling = {"seed": 9, "max_tokens": 20, "temperature": 0.8, "top_p": 0.95, "logprobs": 0}
            choices = [client.completions.create(model=cluster.model, prompt=prompt, **sampling) for prompt in PROMPTS]
        return [(c.choices[0].logprobs.tokens, c.choices[0].logprobs.token_logprobs) for c in choices]

    apart, together = sample(served), sample(colocated)
    for (tokens, logprobs), (expected_tokens, expected_logprobs) in zip(apart, together, strict=True):
        assert tokens == expected_tokens
        assert logprobs == pytest.approx(expected_logprobs, abs=1e-5)


@pytest.mark.parametrize("victim", ["prefill-0", "decode-0"])
def test_a_death_under_load_is_a_pause(served: Cluster, victim: str) -> None:
    """SIGKILL of the only worker of its role while 16 clients stream: every stream is complete and right, and the worker is back."""

    async def talk() -> None:
        client = client_of(served)
        alone = [await stream(client, served.model, prompt, seed) for seed, prompt in enumerate(PROMPTS)]
        tasks = [asyncio.create_task(stream(client, served.model, PROMPTS[i % 5], i % 5)) for i in range(16)]
        await asyncio.to_thread(served.wait_for, lambda status: any(p.load and p.load.num_running for p in status.places))
        before = served.kill(victim)
        answers = await asyncio.gather(*tasks)
        assert answers == [alone[i % 5] for i in range(16)]
        assert served.wait_until_back(before).num_restarts == before.num_restarts + 1

    asyncio.run(talk())
    served.wait_for(is_serving, 30)


def bench(cluster: Cluster, report: Path, *workload: str) -> dict[str, object]:
    command = [str(Path(sys.executable).with_name("diptych")), "bench", "--url", cluster.endpoint, "--json", str(report), *workload]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env={**os.environ, "DIPTYCH_API_KEY": KEY}, check=False)
    assert done.returncode == 0, done.stderr + done.stdout
    assert "TTFT" in done.stdout
    answer: dict[str, object] = json.loads(report.read_text())
    return answer


def test_a_generated_trace_is_replayed_without_errors(served: Cluster, tmp_path: Path) -> None:
    lengths = ("--prompt-mean", "100", "--output-mean", "12", "--max-context", "512")
    bench(served, tmp_path / "report.json", "--requests", "60", "--rate", "8", *lengths)


@pytest.mark.skipif(not TRACES.is_dir(), reason="the Azure trace is not part of the project; the generated trace above serves instead")
def test_200_requests_of_azure2023_conv_are_replayed_without_errors(served: Cluster, tmp_path: Path) -> None:
    trace = ("--trace", str(TRACES / "azure2023_conv.csv"), "--max-context", "512", "--scale-lengths")
    bench(served, tmp_path / "report.json", "--requests", "200", "--rate", "10", *trace)
