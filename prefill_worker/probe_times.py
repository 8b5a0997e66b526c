"""When which link is to be measured. Pure: the clock is an argument.

    met, or found anew ──► in the next quiet moment; after REPEAT_S without one, beside handoffs
                begun ───► again after RETRY_S, if nothing comes of it
               failed ───► after RETRY_S, doubled with each failure in a row, up to REPEAT_S
             measured ───► never, if it is fast enough and was alone; else after REPEAT_S; what is fast enough waits for a quiet moment
"""

import math
from collections.abc import Collection
from typing import NamedTuple

from ..messages.requests import WorkerRef

RETRY_S = 1.0
REPEAT_S = 30.0


class _Due(NamedTuple):
    in_quiet: float
    beside_handoffs: float


class ProbeTimes:
    """`ref` is the decode worker at the link's other end."""

    def __init__(self) -> None:
        self._due: dict[WorkerRef, _Due] = {}
        self._num_failures: dict[WorkerRef, int] = {}        # in a row

    def keep(self, refs: Collection[WorkerRef]) -> None:
        """All others are gone."""
        self._due = {ref: due for ref, due in self._due.items() if ref in refs}
        self._num_failures = {ref: count for ref, count in self._num_failures.items() if ref in refs}

    def met(self, ref: WorkerRef, now: float) -> None:
        due = self._due.get(ref)
        if due is None or math.isinf(due.beside_handoffs):            # what waits for a quiet moment alone is of a link that was
            self._due[ref] = _from(now)

    def begin(self, now: float, is_quiet: bool, among: Collection[WorkerRef]) -> WorkerRef | None:
        """The one that is due first, if one is; it counts as begun."""
        due_at = {ref: due.in_quiet if is_quiet else due.beside_handoffs for ref, due in self._due.items() if ref in among}
        ref = min(due_at, key=due_at.__getitem__, default=None)
        if ref is None or now < due_at[ref]:
            return None
        again = now + RETRY_S
        self._due[ref] = _Due(again, max(again, self._due[ref].beside_handoffs))
        return ref

    def failed(self, ref: WorkerRef, now: float) -> None:
        failures = self._num_failures.get(ref, 0)
        self._num_failures[ref] = failures + 1
        self._due[ref] = _from(now + min(REPEAT_S, RETRY_S * 2.0 ** min(failures, 16)))

    def measured(self, ref: WorkerRef, now: float, *, enough: bool, alone: bool) -> None:
        """`enough`: over every transport, and fast enough."""
        self.give_up(ref)
        if not enough:
            self._due[ref] = _from(now + REPEAT_S)
        elif not alone:
            self._due[ref] = _Due(now + REPEAT_S, math.inf)

    def give_up(self, ref: WorkerRef) -> None:
        """Until it is met anew."""
        self._due.pop(ref, None)
        self._num_failures.pop(ref, None)


def _from(now: float) -> _Due:
    return _Due(now, now + REPEAT_S)
