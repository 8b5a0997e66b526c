"""What a person sees of a deployment."""

from rich.console import Console

from diptych.cluster.controller import Phase
from diptych.cluster.gateway.status import GatewayStatus, Quantiles, TransferTotals
from diptych.cluster.lives import LifeState
from diptych.cluster.places import PlaceKind
from diptych.cluster.pulse import DeploymentStatus, PlaceStatus
from diptych.cluster.tables import deployment_view
from diptych.messages.ids import Address, Epoch, WorkerId
from diptych.messages.requests import LoadReport, WorkerRef
from diptych.messages.steps import StepModel


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


def test_what_a_busy_deployment_tells_fits_into_eighty_columns() -> None:
    model = StepModel(5e-3, 1e-5, 1e-9, 1e-5, 3e-8, error=0.123, num_observed=100)
    load = LoadReport(WorkerRef(WorkerId("w"), Epoch(3), Address("tcp://here")), 12, 3456, 64, 0, 1024, 1000, 16, step_model=model)
    worker = PlaceStatus("prefill-0", PlaceKind.PREFILL, LifeState.READY, Epoch(3), 1234567, 3700.0, 2, "", False, load, None)
    times, outcomes = Quantiles(99, 0.0654, 1.2345), {"finished": 123_456, "refused": 12_345, "failed": 0, "aborted": 7}
    moved, ended, good = (TransferTotals("shm", 100, 5000, 1 << 30, 2.0),), {"default": 135_000, "priority": 801}, {"default": 120_000}
    figures = GatewayStatus("gateway-0", 8000, True, 40, 12, 2, outcomes, ended, good, 3, 10**8, 10**7, times, times, (), moved, None)
    gateway = PlaceStatus("gateway-0", PlaceKind.GATEWAY, LifeState.READY, Epoch(1), 1234568, 3700.0, 0, "", False, None, figures)
    console = Console(width=80)
    with console.capture() as capture:
        console.print(deployment_view(DeploymentStatus("a", Phase.READY, "m", "goodput", "", None, 1, 1.0, (worker, gateway))))
    text = capture.get()
    assert "…" not in text
    for told in ("restarts", "24/1024", "12.3%", "tokens out", "123456", "12345", "default 120000/135000", "65.4 / 1234.5 ms", "0.54 GB/s"):
        assert told in text
    assert "last error" not in text, "there is none"
