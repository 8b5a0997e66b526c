"""Python's garbage collector in a member that serves: a full pass over all that was made at the start (torch, tokenizers) stops its loop,
and with it every stream, for 51 to 77 ms where that was measured, in a gateway."""

import gc

ALLOCATIONS = 10_000
"""Between passes over what is young; Python's own 700 are a few requests' worth."""


def settle() -> None:
    """What lives now lives on, and is looked at no more. Requests leave no cycles: few passes are needed."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(ALLOCATIONS)
