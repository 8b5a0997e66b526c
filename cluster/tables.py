"""How a deployment looks in a terminal."""

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
    return Group(head, _place_table(status.places), *([_traffic_table(gateways)] if gateways else []))


def _place_table(places: tuple[PlaceStatus, ...]) -> Table:
    hosts = {place.host for place in places if place.host}
    where = ("host",) if len(hosts) > 1 else ()
    ranks = ("tp",) if any((place.tp or 1) > 1 for place in places) else ()
    load = ("waiting", "running", "KV blocks used", "step error")
    names = Column("place", no_wrap=True)
    table = Table(names, *where, *ranks, "state", "pid", "for", "restarts", *load, "last error", box=None, pad_edge=False)
    for place in places:
        table.add_row(
            place.name,
            *[place.host for _ in where],
            *[str(place.tp or "") for _ in ranks],
            Text("failed" if place.failed else place.state or "down", STATE_STYLE[place.state]),
            str(place.pid or ""),
            duration(place.state_for_s) if place.state else "",
            str(place.num_restarts or ""),
            *_load_cells(place.load),
            Text(place.error.partition("\n")[0], "red"),
        )
    return table


def _load_cells(load: LoadReport | None) -> tuple[str, str, str, str]:
    if load is None:
        return "", "", "", ""
    used = f"{load.num_blocks - load.num_free_blocks} / {load.num_blocks}"
    error = f"{load.step_model.error:.1%}" if load.step_model and load.step_model.num_observed else ""
    return str(load.num_waiting), str(load.num_running), used, error


def _traffic_table(gateways: list[GatewayStatus]) -> Table:
    counts = ("queued", "finished", "refused", "failed", "in time", "retries", "tokens out")
    columns = ("gateway", *counts, "TTFT p50/p90", "TPOT p50/p90", "KV moved")
    table = Table(*columns, box=None, pad_edge=False)
    for gateway in gateways:
        table.add_row(
            gateway.gateway_id,
            str(gateway.num_queued),
            str(gateway.outcomes.get("finished", 0)),
            str(gateway.outcomes.get("refused", 0)),
            str(gateway.outcomes.get("failed", 0)),
            ", ".join(f"{name} {gateway.good_by_class.get(name, 0)} / {total}" for name, total in sorted(gateway.by_class.items())),
            str(gateway.num_retries),
            str(gateway.num_output_tokens),
            _quantiles(gateway.ttft),
            _quantiles(gateway.tpot),
            ", ".join(_moved(totals) for totals in gateway.transfers),
        )
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
