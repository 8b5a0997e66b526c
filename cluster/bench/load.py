"""The open loop: every request goes out when its time has come, whether or not the earlier ones were answered.

    bodies built ─> clock starts ─> [sleep until at_s ─> one task a request, with a deadline] ─> all ended ─> LoadRun

The bodies are built before the clock starts and the garbage collector sleeps (a full collection stalls every stream by 100 ms),
so that nothing but sending and receiving happens while times are taken. A cancellation (Ctrl-C) ends what is under way and
hands back what is known.
"""

import asyncio
import contextlib
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from .client import CannotConnect, ExchangeFailed, HttpClient, NotHttp
from .record import Outcome, RequestRecord, StreamTally
from .workload import TimedRequest, Workload

OnEnd = Callable[[RequestRecord], None]


@dataclass(frozen=True, slots=True)
class Call:
    timed: TimedRequest
    raw: bytes                          # the whole HTTP request


@dataclass(frozen=True)
class LoadRun:
    planned: int
    records: tuple[RequestRecord, ...]  # in order of arrival; fewer than planned if interrupted
    interrupted: bool = False


async def replay(client: HttpClient, workload: Workload, raw_requests: Sequence[bytes], deadline_s: float, on_end: OnEnd) -> LoadRun:
    """`raw_requests[i]` is sent at `workload.requests[i].at_s`. Every request ends within `deadline_s` of its sending."""
    with no_collection():
        return await _replay(client, workload, raw_requests, deadline_s, on_end)


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


async def _replay(client: HttpClient, workload: Workload, raw_requests: Sequence[bytes], deadline_s: float, on_end: OnEnd) -> LoadRun:
    began = time.perf_counter()

    def clock() -> float:
        return time.perf_counter() - began

    tasks: list[asyncio.Task[RequestRecord]] = []
    interrupted = False
    try:
        for timed, raw in zip(workload.requests, raw_requests, strict=True):
            await asyncio.sleep(max(0.0, timed.at_s - clock()))
            tasks.append(asyncio.create_task(send(client, Call(timed, raw), deadline_s, clock)))
            tasks[-1].add_done_callback(lambda task: None if task.cancelled() else on_end(task.result()))
        await asyncio.wait(tasks)
    except asyncio.CancelledError:
        interrupted = True
        await asyncio.sleep(0)          # a task that never started could not write its record
        for task in tasks:
            task.cancel()
    return LoadRun(len(workload), tuple(await asyncio.gather(*tasks)), interrupted)


async def send(client: HttpClient, call: Call, deadline_s: float, clock: Callable[[], float]) -> RequestRecord:
    tally = StreamTally(clock)
    sent_s = clock()
    failure: tuple[Outcome, str] | None = None
    try:
        async with asyncio.timeout(deadline_s):
            await client.exchange(call.raw, tally)
    except TimeoutError:
        failure = Outcome.TIMEOUT, f"not finished after {deadline_s} s"
    except asyncio.CancelledError:      # by replay alone, which wants the record
        failure = Outcome.CANCELLED, "interrupted"
    except ExchangeFailed as error:
        failure = _outcome_of(error), str(error)
    return tally.record(
        prompt_tokens=call.timed.prompt_tokens,
        output_tokens_asked=call.timed.output_tokens,
        scheduled_s=call.timed.at_s,
        sent_s=sent_s,
        failure=failure,
    )


def _outcome_of(error: ExchangeFailed) -> Outcome:
    if isinstance(error, CannotConnect):
        return Outcome.UNREACHABLE
    return Outcome.MALFORMED if isinstance(error, NotHttp) else Outcome.INCOMPLETE
