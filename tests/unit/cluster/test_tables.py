"""What a person sees of a deployment."""

from rich.console import Console

from diptych.cluster.controller import Phase
from diptych.cluster.places import PlaceKind
from diptych.cluster.pulse import DeploymentStatus, PlaceStatus
from diptych.cluster.tables import deployment_view


def place(name: str, kind: PlaceKind, tp: int | None) -> PlaceStatus:
    return PlaceStatus(name, kind, None, None, None, 0.0, 0, "", False, None, None, tp=tp)


def shown(prefill_tp: int, width: int = 200) -> list[list[str]]:
    places = (
        place("prefill-0", PlaceKind.PREFILL, prefill_tp),
        place("decode-0", PlaceKind.DECODE, 1),
        place("gateway-0", PlaceKind.GATEWAY, None),
    )
    console = Console(width=width)
    with console.capture() as capture:
        console.print(deployment_view(DeploymentStatus("a", Phase.STARTING, "m", "least_loaded", "", None, 1, 1.0, places)))
    return [line.split() for line in capture.get().splitlines()[1:]]


def test_ranks_are_shown_where_a_worker_has_more_than_one() -> None:
    header, *rows = shown(prefill_tp=2)
    assert header[:3] == ["place", "tp", "state"]
    assert [row[:2] for row in rows] == [["prefill-0", "2"], ["decode-0", "1"], ["gateway-0", "down"]]
    assert "tp" not in shown(prefill_tp=1)[0]


def test_places_can_be_told_apart_in_a_narrow_terminal() -> None:
    _, *rows = shown(prefill_tp=2, width=60)
    assert {"prefill-0", "decode-0", "gateway-0"} <= {row[0] for row in rows if row}
