"""Whether a decode worker has room for one handoff more: pure, shared by the receiver and the simulator."""

from ..engine.block_pool import BlockPool


def has_room(pool: BlockPool, num_new_blocks: int, num_live: int, max_sequences: int) -> bool:
    """Beside `num_live` sequences that run or are on their way here. Each keeps one block to grow into: a handoff that lands only to
    preempt, or to be preempted, was moved for nothing."""
    if num_live >= max_sequences:
        return False
    return num_live == 0 or num_new_blocks + num_live <= pool.num_available
