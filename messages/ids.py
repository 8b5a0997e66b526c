"""Ids are types: a block is not a request, and mypy says so."""

import secrets
from typing import NewType

RequestId = NewType("RequestId", str)
"""One attempt at one choice of a client's request; a retry gets a new one, so that a late message of the old attempt meets nothing."""

WorkerId = NewType("WorkerId", str)
"""`prefill-0`, `decode-1`: a place in the cluster. It keeps its name when the process behind it is replaced."""

GatewayId = NewType("GatewayId", str)
Epoch = NewType("Epoch", int)
"""One life of a worker id; larger is later. Two processes never share (worker id, epoch)."""

Address = NewType("Address", str)
"""Where a member receives its messages, `tcp://host:port`."""

BlockId = NewType("BlockId", int)
"""Index of a KV block in one worker's pool."""

BlockHash = NewType("BlockHash", bytes)
"""Hash of a full block's tokens chained to all before it: equal hashes mean equal prefixes."""

Imm = NewType("Imm", int)
"""The receiver's counter that a ticket's writer counts up, one per page or piece of one."""


def new_nonce() -> int:
    """63 random bits; what makes a ticket unforgeable by accident and by age."""
    return secrets.randbits(63)
