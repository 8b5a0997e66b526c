"""Traffic on a running CPU deployment while a random worker is killed again and again; what `tests/bench/soak.py` runs for ten minutes."""

import asyncio
import itertools
import os
import random
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import openai
import psutil

from diptych.cluster.pulse import DeploymentStatus
from diptych.cluster.ray_session import Deployment, is_serving

PROMPTS = ("The for statement", "A list is a sequence of", "def f(x):\n    return", "import os\n" * 30, "x")
NUM_CLIENTS, NUM_TOKENS = 6, 40
REQUEST_LIMIT_S, SERVING_LIMIT_S, WHOLE_LIMIT_S = 90.0, 60.0, 30.0
GROWTH_LIMIT = 1.25
"""Of a process that lives from the first third of the run to its end. What it loads in its first requests is before that."""


@dataclass
class Summary:
    num_streams: int = 0
    num_wrong: int = 0
    num_without_end: int = 0
    num_kills: int = 0
    problems: list[str] = field(default_factory=list)         # the first words of each
    slowest_s: float = 0.0                                    # of a stream
    slowest_return_s: float = 0.0                             # of a kill until all serve again
    growth: dict[str, float] = field(default_factory=dict)    # resident memory at the end over that at a third, of what lived so long
    whole: bool = False                                       # free + cached = total everywhere at the end

    @property
    def good(self) -> bool:
        flat = all(growth <= GROWTH_LIMIT for growth in self.growth.values())
        return self.num_streams > 0 and not self.num_wrong and not self.num_without_end and not self.problems and self.whole and flat

    def __str__(self) -> str:
        growth = ", ".join(f"{name} ×{factor:.2f}" for name, factor in self.growth.items()) or "nothing lived long enough"
        lines = [
            f"streams {self.num_streams}, wrong {self.num_wrong}, without an end {self.num_without_end}, slowest {self.slowest_s:.1f} s",
            f"kills {self.num_kills}, slowest return {self.slowest_return_s:.1f} s",
            f"pools {'whole' if self.whole else 'NOT whole'}; memory: {growth}",
            *self.problems[:10],
        ]
        return "\n".join([*lines, "good" if self.good else "NOT good"])


def is_whole(status: DeploymentStatus) -> bool:
    return all(place.load is None or place.load.num_free_blocks == place.load.num_blocks for place in status.places)


class Soak:
    def __init__(self, deployment: Deployment, endpoint: str, model: str, victims: Sequence[str], seed: int = 0) -> None:
        self._deployment = deployment
        self._client = openai.AsyncOpenAI(base_url=f"{endpoint}/v1", api_key="none", max_retries=0, timeout=REQUEST_LIMIT_S)
        self._model = model
        self._victims = victims
        self._random = random.Random(seed)
        self._stopping = asyncio.Event()
        self._memory: dict[str, tuple[int, int]] = {}         # at a third: pid, resident bytes
        self.summary = Summary()

    async def run(self, duration_s: float, pause_s: float) -> Summary:
        """`pause_s` from one kill to the next."""
        expected = [await self._stream(i) for i in range(len(PROMPTS))]
        clients = [asyncio.create_task(self._client_loop(i, expected)) for i in range(NUM_CLIENTS)]
        started = time.monotonic()
        while time.monotonic() < started + duration_s:
            await asyncio.sleep(pause_s)
            await self._kill()
            if not self._memory and time.monotonic() > started + duration_s / 3:
                self._memory = await asyncio.to_thread(self._measure)
        self._stopping.set()
        await asyncio.gather(*clients)
        await self._close_books()
        return self.summary

    async def _client_loop(self, index: int, expected: list[str]) -> None:
        for i in itertools.count(index):
            if self._stopping.is_set():
                return
            which, begun = i % len(PROMPTS), time.monotonic()
            self.summary.num_streams += 1
            try:
                text = await asyncio.wait_for(self._stream(which), REQUEST_LIMIT_S)
                self.summary.num_wrong += text != expected[which]
            except TimeoutError:
                self.summary.num_without_end += 1
            except openai.OpenAIError as error:
                self.summary.problems.append(f"{type(error).__name__}: {str(error)[:200]}")
            self.summary.slowest_s = max(self.summary.slowest_s, time.monotonic() - begun)

    async def _stream(self, which: int) -> str:
        chunks = await self._client.completions.create(
            model=self._model,
            prompt=PROMPTS[which],
            seed=which,
            max_tokens=NUM_TOKENS,
            temperature=0.9,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        text, finish = "", None
        async for chunk in chunks:
            text += chunk.choices[0].text
            finish = chunk.choices[0].finish_reason or finish
        return text if finish == "length" else f"{text} [ended by {finish}]"

    async def _kill(self) -> None:
        status = await asyncio.to_thread(self._deployment.status)
        name = self._random.choice(self._victims)
        before = next(place for place in status.places if place.name == name)
        if before.pid is None or before.epoch is None or before.load is None:
            return                                             # it is still on its way back
        os.kill(before.pid, signal.SIGKILL)
        self.summary.num_kills += 1
        begun = time.monotonic()
        epoch = before.epoch

        def is_back(status: DeploymentStatus) -> bool:
            return is_serving(status) and any(p.name == name and (p.epoch or 0) > epoch for p in status.places)

        if await self._wait_for(is_back, SERVING_LIMIT_S):
            self.summary.slowest_return_s = max(self.summary.slowest_return_s, time.monotonic() - begun)
        else:
            self.summary.problems.append(f"{name} was not back within {SERVING_LIMIT_S} s")

    async def _wait_for(self, condition: Callable[[DeploymentStatus], bool], timeout_s: float) -> bool:
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if condition(await asyncio.to_thread(self._deployment.status)):
                return True
            await asyncio.sleep(0.2)
        return False

    async def _close_books(self) -> None:
        self.summary.whole = await self._wait_for(lambda status: is_serving(status) and is_whole(status), WHOLE_LIMIT_S)
        for name, (pid, resident) in (await asyncio.to_thread(self._measure)).items():
            if self._memory.get(name, (0, 0))[0] == pid:
                self.summary.growth[name] = resident / self._memory[name][1]

    def _measure(self) -> dict[str, tuple[int, int]]:
        status = self._deployment.status()
        pids = {place.name: place.pid for place in status.places if place.pid is not None} | {"controller": status.pid}
        return {name: (pid, psutil.Process(pid).memory_info().rss) for name, pid in pids.items() if psutil.pid_exists(pid)}
