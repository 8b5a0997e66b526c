"""A coroutine is run where it is started as far as it goes without waiting; only if it waits does it become a task.

Python 3.12 has this as `eager_start`. Most requests never wait: a task for each would cost more than some of them do.
"""

import asyncio
from collections.abc import Coroutine, Generator
from types import coroutine
from typing import Any

_tasks: set[asyncio.Task[None]] = set()       # the loop itself holds them weakly


def start(work: Coroutine[Any, Any, None]) -> None:
    """What `work` raises before it waits is raised here."""
    try:
        awaited = work.send(None)
    except StopIteration:
        return
    task = asyncio.get_running_loop().create_task(_rest(work, awaited))
    _tasks.add(task)
    task.add_done_callback(_tasks.discard)


async def _rest(work: Coroutine[Any, Any, None], awaited: Any) -> None:
    await _resumed(work, awaited)


@coroutine
def _resumed(work: Coroutine[Any, Any, None], awaited: Any) -> Generator[Any, Any, None]:
    """Hands on what `work` yields and what it is sent, from its first wait on."""
    while True:
        try:
            sent = yield awaited
        except BaseException as error:
            thrown: BaseException | None = error
        else:
            thrown = None
        try:
            awaited = work.send(sent) if thrown is None else work.throw(thrown)
        except StopIteration:
            return
