"""Finds stop strings in a text that comes in pieces. What may be the beginning of one is held back until it is known not to be."""

from collections.abc import Sequence


class StopStrings:
    """A request's, prepared once for all of its choices."""

    def __init__(self, stops: Sequence[str]) -> None:
        self.tables = [(stop, _borders(stop)) for stop in stops]

    def __len__(self) -> int:
        return len(self.tables)


def _borders(pattern: str) -> list[int]:
    borders, length = [0] * len(pattern), 0
    for i in range(1, len(pattern)):
        borders[i] = length = _step(pattern, borders, length, pattern[i])
    return borders


def _step(pattern: str, borders: list[int], length: int, char: str) -> int:
    while length and pattern[length] != char:
        length = borders[length - 1]
    return length + (pattern[length] == char)


class _Automaton:
    """Knuth, Morris and Pratt 1977: `state` is how much of `pattern` the text ends with; each character costs constant time on average."""

    def __init__(self, pattern: str, borders: list[int]) -> None:
        self.pattern, self._borders = pattern, borders
        self.state = 0

    def feed(self, char: str) -> bool:
        self.state = _step(self.pattern, self._borders, self.state, char)
        if self.state < len(self.pattern):
            return False
        self.state = self._borders[-1]
        return True


class StopMatcher:
    """Used until the first match; then it is over."""

    def __init__(self, stops: StopStrings, *, include: bool) -> None:
        self._automata = [_Automaton(*table) for table in stops.tables]
        self._include = include
        self._held = ""
        self.matched = False

    def feed(self, text: str, *, may_match: bool = True) -> str:
        """The text that may go out. The match that ends first counts; of several that end there, the longest. `may_match`: one that ends
        in this text does."""
        if not self._automata:
            return text
        self._held += text
        for i, char in enumerate(text):
            found = [automaton.pattern for automaton in self._automata if automaton.feed(char)]
            if found and may_match:
                self.matched = True
                end = len(self._held) - len(text) + i + 1
                return self._held[: end if self._include else end - max(map(len, found))]
        return self._release(max(automaton.state for automaton in self._automata))

    def end(self) -> str:
        """The text is over without a match."""
        return self._release(0)

    def _release(self, num_held: int) -> str:
        cut = len(self._held) - num_held
        released, self._held = self._held[:cut], self._held[cut:]
        return released
