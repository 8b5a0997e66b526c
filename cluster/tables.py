"""How a deployment looks in a terminal."""

from collections.abc import Collection, Mapping, Sequence

from rich.console import Group, RenderableType
from rich.table import Column, Table
from rich.text import Text

from ..messages.requests import LoadReport
from .controller import Phase
from .gateway.status import GatewayStatus, Quantiles, TransferTotals
from .lives import LifeState
from .pulse import DeploymentStatus, PlaceStatus

PHASE_STYLE = {
    Phase.STARTING: "yellow",
    Phase.READY: "green",
    Phase.DEGRADED: "yellow",
    Phase.FAILED: "red",
    Phase.STOPPING: "yellow",
    Phase.STOPPED: "dim",
}
STATE_STYLE = {LifeState.READY: "green", LifeState.STARTING: "yellow", LifeState.DRAINING: "cyan", LifeState.STOPPING: "red", None: "red"}


def deployment_view(status: DeploymentStatus) -> RenderableType:
    what = f"  {status.model}  {status.policy}  {status.endpoint or ''}"
    head = Text.assemble((status.name, "bold"), "  ", (status.phase, PHASE_STYLE[status.phase]), what)
    gateways = [place.gateway for place in status.places if place.gateway is not None]
    return Group(head, _place_table(status.places), *(_traffic_tables(gateways) if gateways else ()))


def _place_table(places: tuple[PlaceStatus, ...]) -> Table:
    hosts = {place.host for place in places if place.host}
    several_ranks = any((place.tp or 1) > 1 for place in places)
    rows: list[dict[str, str | Text]] = [
        {
            "place": place.name,
            "host": place.host if len(hosts) > 1 else "",
            "tp": str(place.tp or "") if several_ranks else "",
            "state": Text("failed" if place.failed else place.state or "down", STATE_STYLE[place.state]),
            "pid": str(place.pid or ""),
            "for": duration(place.state_for_s) if place.state else "",
            "restarts": str(place.num_restarts or ""),
            **_load_cells(place.load),
            "last error": Text(place.error.partition("\n")[0], "red"),
        }
        for place in places
    ]
    return _table(rows, wraps=("step error", "last error"))


def _load_cells(load: LoadReport | None) -> dict[str, str]:
    names = ("waiting", "running", "KV used", "step error")
    if load is None:
        return dict.fromkeys(names, "")
    used = f"{load.num_blocks - load.num_free_blocks}/{load.num_blocks}"
    error = f"{load.step_model.error:.1%}" if load.step_model and load.step_model.num_observed else ""
    return dict(zip(names, (str(load.num_waiting), str(load.num_running), used, error), strict=True))


def _traffic_tables(gateways: list[GatewayStatus]) -> tuple[Table, Table]:
    """Of requests, and of time: side by side they are wider than many terminals."""
    counts = [
        {
            "gateway": gateway.gateway_id,
            "queued": str(gateway.num_queued),
            **{name: str(gateway.outcomes.get(name, 0)) for name in ("finished", "refused", "failed")},
            "retries": str(gateway.num_retries),
            "tokens out": str(gateway.num_output_tokens),
        }
        for gateway in gateways
    ]
    times = [
        {
            "gateway": gateway.gateway_id,
            "in time": "\n".join(f"{name} {gateway.good_by_class.get(name, 0)}/{all_}" for name, all_ in sorted(gateway.by_class.items())),
            "TTFT p50/p90": _quantiles(gateway.ttft),
            "TPOT p50/p90": _quantiles(gateway.tpot),
            "KV moved": ", ".join(_moved(totals) for totals in gateway.transfers),
        }
        for gateway in gateways
    ]
    return _table(counts), _table(times, wraps=("KV moved",))


def _table(rows: Sequence[Mapping[str, str | Text]], wraps: Collection[str] = ()) -> Table:
    """The first column, and those that have something to say: nothing is cut off in a narrow terminal but what wraps."""
    first, *others = rows[0] if rows else ["place"]
    names = [first, *(name for name in others if any(row[name] for row in rows))]
    table = Table(*(Column(name, no_wrap=name not in wraps) for name in names), box=None, pad_edge=False)
    for row in rows:
        table.add_row(*(row[name] for name in names))
    return table


def _quantiles(quantiles: Quantiles | None) -> str:
    return f"{quantiles.p50_s * 1e3:.1f} / {quantiles.p90_s * 1e3:.1f} ms" if quantiles else ""


def _moved(totals: TransferTotals) -> str:
    return f"{size(totals.num_bytes)} by {totals.transport} at {totals.gbps:.2f} GB/s"


def size(num_bytes: int) -> str:
    """1536 → `1.5 KiB`"""
    value, units = float(num_bytes), ["B", "KiB", "MiB", "GiB", "TiB"]
    while value >= 1024 and len(units) > 1:
        value, units = value / 1024, units[1:]
    return f"{value:.0f} {units[0]}" if units[0] == "B" else f"{value:.1f} {units[0]}"


def duration(seconds: float) -> str:
    """90 → `1m30s`"""
    whole = int(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02}m"
