"""For how long anything was under way, if several writes may be at once: the length of a union of intervals."""

from bisect import bisect_left, bisect_right

MAX_GAPS = 64


class BusyTime:
    """Intervals of one clock in nanoseconds, in about the order of their ends: of the gaps between them the last MAX_GAPS are remembered,
    and what would fall into an older one counts as busy already."""

    def __init__(self) -> None:
        self._total_ns = 0
        self._starts: list[int] = []              # of disjoint intervals, rising
        self._ends: list[int] = []

    @property
    def seconds(self) -> float:
        return 1e-9 * self._total_ns

    def add(self, began_ns: int, ended_ns: int) -> None:
        first, last = bisect_left(self._ends, began_ns), bisect_right(self._starts, ended_ns)        # what it touches
        if first < last:
            began_ns, ended_ns = min(began_ns, self._starts[first]), max(ended_ns, self._ends[last - 1])
        elif first == 0 and len(self._starts) == MAX_GAPS:
            return
        merged_ns = sum(self._ends[first:last]) - sum(self._starts[first:last])
        self._starts[first:last], self._ends[first:last] = [began_ns], [ended_ns]
        self._total_ns += ended_ns - began_ns - merged_ns
        if len(self._starts) > MAX_GAPS:
            del self._starts[0], self._ends[0]
