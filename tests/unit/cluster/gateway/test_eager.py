"""Started where it stands, a task only if it waits."""

import asyncio

import pytest
from harness.gateway import in_loop

from diptych.cluster.gateway.eager import start


@in_loop
async def test_what_does_not_wait_is_done_at_once():
    done = []

    async def work() -> None:
        done.append(1)

    tasks = asyncio.all_tasks()
    start(work())
    assert (done, asyncio.all_tasks()) == ([1], tasks)


@in_loop
async def test_what_it_raises_before_it_waits_is_raised_here():
    async def work() -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        start(work())


@in_loop
async def test_what_waits_goes_on_as_though_it_had_always_been_a_task():
    steps: list[object] = []
    door: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    over = asyncio.Event()

    async def work() -> None:
        steps.append(await door)
        await asyncio.sleep(0)
        steps.append(await asyncio.to_thread(lambda: "thread"))
        async with asyncio.timeout(5):
            steps.append(await asyncio.gather(asyncio.sleep(0, "a"), asyncio.sleep(0.001, "b")))
        over.set()

    start(work())
    assert steps == []
    door.set_result("door")
    async with asyncio.timeout(10):
        await over.wait()
    assert steps == ["door", "thread", ["a", "b"]]


@in_loop
async def test_a_failure_and_a_cancellation_reach_it_where_it_waits():
    caught: list[type[BaseException]] = []
    doors = [asyncio.get_running_loop().create_future() for _ in range(2)]

    async def work(door: "asyncio.Future[None]") -> None:
        try:
            await door
        except BaseException as error:
            caught.append(type(error))

    for door in doors:
        start(work(door))
    doors[0].set_exception(KeyError("x"))
    doors[1].cancel()
    for _ in range(3):
        await asyncio.sleep(0)
    assert caught == [KeyError, asyncio.CancelledError]
