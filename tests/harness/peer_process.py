"""What a test or benchmark holds of an object that lives in a process of its own: calls over a pipe, with an end to every wait."""

import os
import signal
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from diptych.messages.errors import DiptychError

CALL_TIMEOUT_S = 60.0
"""Of the slowest call, which starts CUDA and compiles a kernel."""

JOIN_TIMEOUT_S = 20.0


class PeerProcess:
    """The process answers `(method, arguments)` with what the method returned or raised; `last_word` is the method that ends it."""

    def __init__(self, process: BaseProcess, pipe: "Connection[Any, Any]", last_word: str) -> None:
        self.process, self.pipe, self._last_word = process, pipe, last_word

    def call(self, method: str, *arguments: object) -> Any:
        self.tell(method, *arguments)
        return self.answer()

    def tell(self, method: str, *arguments: object) -> None:
        """Does not wait; `answer` has the result."""
        self.pipe.send((method, arguments))

    def answer(self) -> Any:
        if not wait([self.pipe, self.process.sentinel], CALL_TIMEOUT_S) or not self.pipe.poll():
            raise TimeoutError(f"process {self.process.pid} did not answer in {CALL_TIMEOUT_S} s; exit code {self.process.exitcode}")
        answer = self.pipe.recv()
        if isinstance(answer, Exception):
            raise answer
        return answer

    def signal(self, number: signal.Signals) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def kill(self) -> None:
        """SIGKILL; returns when the process is gone."""
        self.signal(signal.SIGKILL)
        self.process.join(JOIN_TIMEOUT_S)
        assert self.process.exitcode == -signal.SIGKILL

    def end(self) -> int | None:
        """Its exit code after an orderly end, or a kill."""
        if self.process.is_alive():
            self.tell(self._last_word)
            self.process.join(JOIN_TIMEOUT_S)
        if self.process.is_alive():
            self.process.kill()
        self.process.join(JOIN_TIMEOUT_S)
        return self.process.exitcode


def serve_calls(pipe: "Connection[Any, Any]", served: Any, name: str) -> None:
    """In the process: what `PeerProcess` asks `served` for, until `end`, which closes it."""
    while True:
        method, arguments = pipe.recv()
        if method == "end":
            served.close()
            return
        try:
            answer = getattr(served, method)(*arguments)
        except Exception as error:
            answer = error if isinstance(error, DiptychError | TimeoutError) else RuntimeError(f"{name}: {error!r}")
        pipe.send(answer)
