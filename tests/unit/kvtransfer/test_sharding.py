"""Routes between ranks: every piece of every page goes to its place, and once."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diptych.kvtransfer.sharding import Sharing, routes


@st.composite
def pairs(draw: st.DrawFn) -> tuple[int, int, int]:
    """Pieces, ranks here, ranks there: any that divide, also where neither divides the other."""
    num_pieces = draw(st.integers(1, 24))
    divisors = st.sampled_from([tp for tp in range(1, num_pieces + 1) if num_pieces % tp == 0])
    return num_pieces, draw(divisors), draw(divisors)


def in_ranks(num_pages: int, sharing: Sharing) -> list[list[tuple[int, int, int]]]:
    """What each rank's pool holds, piece by piece: (page, K or V, piece of it)."""
    return [
        [(page, kv, piece) for page in range(num_pages) for kv in range(2) for piece in sharing.pieces_of(rank)]
        for rank in range(sharing.num_ranks)
    ]


@settings(max_examples=200)
@given(pair=pairs(), data=st.data())
def test_every_piece_goes_once_to_its_place(pair: tuple[int, int, int], data: st.DataObject) -> None:
    num_pieces, num_sources, num_targets = pair
    here = in_ranks(7, Sharing(num_pieces, num_sources))
    src = data.draw(st.lists(st.integers(0, 6), unique=True))
    dst = data.draw(st.permutations(range(7)))[: len(src)]
    there = in_ranks(7, Sharing(num_pieces, num_targets))
    found: list[dict[int, tuple[int, int, int]]] = [{} for _ in there]
    for route in routes(*pair):
        sources, targets = route.sources(np.array(src, dtype=np.int64)), route.targets(np.array(dst, dtype=np.int64))
        for source, target in zip(sources.tolist(), targets.tolist(), strict=True):
            assert target not in found[route.target], "written twice"
            found[route.target][target] = here[route.source][source]
    moved = dict(zip(dst, src, strict=True))
    wanted = [{i: (moved[page], *rest) for i, (page, *rest) in enumerate(rank) if page in moved} for rank in there]
    assert found == wanted


@given(pair=pairs())
def test_who_writes_to_one_rank_has_a_channel_of_its_own(pair: tuple[int, int, int]) -> None:
    num_pieces, num_sources, num_targets = pair
    channels = [(route.target, route.channel) for route in routes(*pair)]
    assert len(set(channels)) == len(channels)
    assert all(0 <= channel < num_pieces // num_targets for _, channel in channels)
    assert len({(route.source, route.target) for route in routes(*pair)}) == len(channels)
    assert {route.source for route in routes(*pair)} == set(range(num_sources))


def test_equal_ranks_write_their_pages_as_they_lie() -> None:
    """Neighbours stay neighbours, so that transports can move them in one go."""
    for rank, route in enumerate(routes(8, 2, 2)):
        assert (route.source, route.target) == (rank, rank)
        assert route.sources(np.array([5, 6])).tolist() == route.targets(np.array([5, 6])).tolist() == list(range(40, 56))


@pytest.mark.parametrize(("num_pieces", "num_ranks"), [(4, 3), (4, 0), (2, 4), (4, -2)])
def test_pieces_that_cannot_be_shared(num_pieces: int, num_ranks: int) -> None:
    with pytest.raises(ValueError, match=f"{num_pieces} pieces cannot be shared by {num_ranks} ranks"):
        routes(num_pieces, 1, num_ranks)
