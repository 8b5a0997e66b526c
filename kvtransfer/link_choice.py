"""Over which of several transports each target is reached: the first that reaches it, in its order of preference.

    not reached (PeerGone) ──► the next          being dialled ──► waited for, but not for long; then the next, until it answers
"""

import logging
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ..messages.errors import PeerGone, TransferError
from ..messages.membership import MemoryDescriptor
from .transport import Peer, Target

logger = logging.getLogger(__name__)

DIAL_S = 1.0                   # so long a peer may be dialled before the next transport is taken; less than a handoff waits for it


@dataclass
class _Link:
    """To one target."""

    order: Sequence[str] = ()      # of transports, before those that are not named in it
    over: str | None = None        # the one that was found last; None: there is no link
    count: int = 0                 # how often it was found anew, or another one
    dialled_at: dict[str, float] = field(default_factory=dict)


class LinkChoice:
    def __init__(self, names: Sequence[str], clock: Callable[[], float] = time.monotonic) -> None:
        """`names`: of the transports here, in the spec's order."""
        self._names = tuple(names)
        self._clock = clock
        self._links: dict[tuple[MemoryDescriptor, ...], _Link] = defaultdict(_Link)

    def connect(self, target: Target, dial: Callable[[str], Peer | None]) -> Peer | None:
        """`dial` connects over the transport it is given: None, being dialled. Raises what it raises but PeerGone; PeerGone, if all have;
        TransferError: nothing in common."""
        link = self._links[tuple(target)]
        common = self._common(link, target)
        if not common:
            theirs = ", ".join(dict.fromkeys(descriptor.transport for descriptor in target))
            raise TransferError(f"no transport in common: {', '.join(self._names)} here, {theirs or 'none'} there")
        refusals: list[str] = []
        is_dialling = False
        for name in common:
            try:
                peer = dial(name)
            except PeerGone as error:
                refusals.append(f"{name}: {error}")
                continue
            if peer is not None:
                link.dialled_at.pop(name, None)
                _report(target[0].host, link, name, refusals)
                return peer
            is_dialling = True
            dialled_s = self._clock() - link.dialled_at.setdefault(name, self._clock())
            if dialled_s < DIAL_S:
                link.over = None
                return None
            refusals.append(f"{name}: not reached after {dialled_s:.1f} s")
        link.over = None
        if is_dialling:
            return None
        raise PeerGone("; ".join(refusals))

    def common(self, target: Target) -> list[str]:
        """Transports that both sides have, the preferred first."""
        return self._common(self._links[tuple(target)], target)

    def _common(self, link: _Link, target: Target) -> list[str]:
        theirs = {descriptor.transport for descriptor in target}
        return [name for name in dict.fromkeys([*link.order, *self._names]) if name in theirs and name in self._names]

    def prefer(self, target: Target, names: Sequence[str]) -> None:
        self._links[tuple(target)].order = names

    def num_links(self, target: Target) -> int:
        return self._links[tuple(target)].count

    def forget(self, target: Target) -> None:
        self._links.pop(tuple(target), None)


def _report(host: str, link: _Link, name: str, refusals: list[str]) -> None:
    """A fall-back is never silent."""
    if link.over != name:
        link.over, link.count = name, link.count + 1
        reasons = f", since {'; '.join(refusals)}" if refusals else ""
        logger.log(logging.WARNING if refusals else logging.INFO, "KV to %s goes over %s%s", host, name, reasons)
