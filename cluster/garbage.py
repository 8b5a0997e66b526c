"""Python's garbage collector in a member that serves: a full pass over all that was made at the start (torch, tokenizers) stops its loop
for 50 to 130 ms, and with it every stream."""

import gc

ALLOCATIONS = 10_000
"""Between passes over what is young; Python's own 700 are a few requests' worth."""


def settle() -> None:
    """What lives now lives on, and is looked at no more. Requests leave no cycles: few passes are needed."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(ALLOCATIONS)
