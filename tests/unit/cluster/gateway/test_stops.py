from itertools import pairwise

from hypothesis import example, given
from hypothesis import strategies as st

from diptych.cluster.gateway import stops as stops_module
from diptych.cluster.gateway.stops import StopMatcher, StopStrings

TEXT = st.text("ab ", max_size=40)
STOPS = st.lists(st.text("ab ", min_size=1, max_size=5), max_size=4)


def feed(matcher: StopMatcher, pieces: list[str], num_silent: int = 0) -> str:
    """In the first `num_silent` pieces no match may end."""
    out = ""
    for i, piece in enumerate(pieces):
        out += matcher.feed(piece, may_match=i >= num_silent)
        if matcher.matched:
            return out
    return out + matcher.end()


def expected(text: str, stops: list[str], *, include: bool, beyond: int = 0) -> tuple[str, bool]:
    """By brute force: the match that ends first (after `beyond` characters), of those the longest."""
    ends = range(beyond + 1, len(text) + 1)
    matches = [(end, -len(stop)) for stop in stops for end in ends if text[:end].endswith(stop)]
    if not matches:
        return text, False
    end, length = min(matches)
    return text[: end if include else end + length], True


@given(TEXT, STOPS, st.lists(st.integers(0, 40)), st.booleans())
@example("aab", ["aab", "ab", "b"], [1, 2], False)
def test_finds_what_brute_force_finds_however_the_text_is_cut(text, stops, cuts, include):
    bounds = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    pieces = [text[a:b] for a, b in pairwise(bounds)]
    matcher = StopMatcher(StopStrings(stops), include=include)
    assert (feed(matcher, pieces), matcher.matched) == expected(text, stops, include=include)


@given(TEXT, STOPS, st.lists(st.integers(0, 40)), st.integers(0, 5), st.booleans())
@example("aaa", ["aa"], [2], 1, False)
def test_a_match_may_begin_where_none_may_end(text, stops, cuts, num_silent, include):
    bounds = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    beyond = bounds[min(num_silent, len(bounds) - 1)]
    matcher = StopMatcher(StopStrings(stops), include=include)
    out = feed(matcher, [text[a:b] for a, b in pairwise(bounds)], num_silent)
    assert (out, matcher.matched) == expected(text, stops, include=include, beyond=beyond)


@given(TEXT, STOPS)
def test_holds_back_exactly_what_may_become_a_stop(text, stops):
    matcher, out = StopMatcher(StopStrings(stops), include=False), ""
    for i, char in enumerate(text):
        out += matcher.feed(char)
        if matcher.matched:
            return
        so_far = text[: i + 1]
        held = max((n for stop in stops for n in range(len(stop)) if so_far.endswith(stop[:n])), default=0)
        assert len(out) == i + 1 - held


def test_without_stops_nothing_is_held():
    assert StopMatcher(StopStrings([]), include=False).feed("abc") == "abc"


def test_tables_are_made_once_for_all_choices(monkeypatch):
    made = list[str]()
    monkeypatch.setattr(stops_module, "_borders", lambda pattern: made.append(pattern) or [0] * len(pattern))
    stops = StopStrings(["ab", "c"])
    for _ in range(128):
        StopMatcher(stops, include=False).feed("abc")
    assert made == ["ab", "c"]
