"""The links of a deployment, prefill × decode, as its prefill workers have measured them: what `diptych probe` shows.
In a cell stands the transport that the pair uses, and below it what else reaches."""

from msgspec import Struct
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ..messages.requests import LinkFigures, LinkMeasured
from .places import PlaceKind
from .pulse import DeploymentStatus


class Pair(Struct, frozen=True):
    prefill: str
    decode: str
    link: LinkMeasured | None                 # None: not measured, yet or for want of a live worker or of a quiet moment


def pairs_of(status: DeploymentStatus) -> tuple[Pair, ...]:
    prefill = [place for place in status.places if place.kind is PlaceKind.PREFILL]
    decode = [place for place in status.places if place.kind is PlaceKind.DECODE]
    known = {(p.name, str(link.decode_id)): link for p in prefill for link in p.links}
    return tuple(Pair(p.name, d.name, known.get((p.name, d.name))) for p in prefill for d in decode)


def matrix_view(pairs: tuple[Pair, ...]) -> RenderableType:
    if not pairs:
        return Text("no links: the decode workers prefill by themselves")
    columns = list(dict.fromkeys(pair.decode for pair in pairs))
    table = Table("prefill \\ decode", *columns, box=None, pad_edge=False)
    for name in dict.fromkeys(pair.prefill for pair in pairs):
        table.add_row(name, *(_cell(pair.link) for pair in pairs if pair.prefill == name))
    floors = {pair.link.min_gbps for pair in pairs if pair.link is not None and pair.link.min_gbps}
    return Group(table, *(Text(f"floor {floor:g} GB/s") for floor in sorted(floors)))


def _cell(link: LinkMeasured | None) -> Text:
    if link is None:
        return Text("not measured", "yellow")
    others = "".join(f"\n{_figures(other)}" for other in link.others)
    if not link.below_floor:
        return Text(_figures(link), "green").append(others, "dim")
    return Text(f"{_figures(link)} {'refused' if link.refused else 'below the floor'}", "red").append(others, "dim")


def _figures(link: LinkMeasured | LinkFigures) -> str:
    return f"{link.transport} {link.gbps:.2f} GB/s {link.latency_s * 1e6:.0f} µs"
