"""Everything that a caller, a peer or the network can cause. Our own broken invariants are `assert`s instead.

DiptychError
├── SpecError                 the YAML spec is wrong; the text names the key's path
├── ModelError                the model folder cannot be served
│   ├── UnsupportedModel
│   └── WeightMismatch
├── RequestError              the caller's mistake: HTTP 400
│   └── ContextOverflow
├── CapacityError             it could be served, but not here or now
│   ├── PoolTooSmall
│   └── Refused               by the router or a worker: HTTP 429 or 503
├── WireError                 a frame that is not ours
│   ├── Malformed
│   └── TooLarge
├── HandoffError
│   └── IllegalTransition
├── TransferError
│   ├── LayoutMismatch
│   ├── LinkTooSlow
│   └── PeerGone
├── StepStuck                 the device does not end what it was given
└── ClusterError              Ray, ports, disks, processes
    └── TakenDown             by another command, while this one waited
"""


class DiptychError(Exception):
    """Root of the tree; its text is for a person and holds the numbers."""


class SpecError(DiptychError):
    pass


class ModelError(DiptychError):
    pass


class UnsupportedModel(ModelError):
    pass


class WeightMismatch(ModelError):
    pass


class RequestError(DiptychError):
    pass


class ContextOverflow(RequestError):
    pass


class CapacityError(DiptychError):
    pass


class PoolTooSmall(CapacityError):
    pass


class Refused(CapacityError):
    pass


class WireError(DiptychError):
    pass


class Malformed(WireError):
    pass


class TooLarge(WireError):
    pass


class HandoffError(DiptychError):
    pass


class IllegalTransition(HandoffError):
    pass


class TransferError(DiptychError):
    pass


class LayoutMismatch(TransferError):
    pass


class LinkTooSlow(TransferError):
    pass


class PeerGone(TransferError):
    pass


class StepStuck(DiptychError):
    """Raised in the worker's loop: its process ends, and with it whatever may still write."""


class ClusterError(DiptychError):
    pass


class TakenDown(ClusterError):
    pass
