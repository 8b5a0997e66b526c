"""What a worker tells of its load, and how it knows: pure, shared by the worker's loop and the simulator."""

import math
from collections.abc import Sequence as Seq
from typing import TYPE_CHECKING

from ..messages.requests import FillingLoad, LoadReport, WorkerRef
from ..messages.steps import StepFeatures, attended_pairs
from .sequence import Sequence
from .urgency import NO_OBJECTIVE_S

if TYPE_CHECKING:                             # the router shares this file's constants, and has no use for torch
    from .block_pool import BlockPool
    from .engine import Engine
    from .step_watch import StepWatch

SHARE_HORIZON_S = 2.0
"""How far back `prefill_share` looks: about as long as an answer decodes."""

MAX_QUEUE_ENTRIES = 16

NO_DEADLINE_S = 1e9
"""Finite, for what JSON can say."""


class PrefillShare:
    """The share of a worker's time that prompts took, forgotten exponentially."""

    def __init__(self) -> None:
        self._share = 0.0
        self._at = 0.0

    def add(self, prefill_s: float, now: float) -> None:
        self._share = self.at(now) + prefill_s / SHARE_HORIZON_S
        self._at = now

    def at(self, now: float) -> float:
        return self._share * math.exp(-max(0.0, now - self._at) / SHARE_HORIZON_S)


def load_report(
    worker: WorkerRef, engine: "Engine", num_reserved: int, steps: "StepWatch", now: float, num_leaving: int = 0, num_filling: int = 0
) -> LoadReport:
    """Of the handoffs `num_reserved`: `num_leaving` go to another worker, `num_filling` are batch work that comes here."""
    scheduler, pool, limits = engine.scheduler, engine.pool, engine.limits
    decoding, filling, unfinished = list[Sequence](), list[Sequence](), scheduler.waiting[:]
    for sequence in scheduler.running:
        if sequence.is_decoding:
            (filling if sequence.fills_in else decoding).append(sequence)
        else:
            unfinished.append(sequence)
    work = StepFeatures(
        prefill_tokens=sum(s.num_to_compute for s in unfinished),
        prefill_pairs=sum(attended_pairs(s.num_computed, s.num_to_compute) for s in unfinished),
        num_decoding=len(decoding),
        decode_context=sum(len(s.token_ids) for s in decoding),
    )
    return LoadReport(
        worker=worker,
        num_waiting=len(scheduler.waiting),
        num_waiting_tokens=work.prefill_tokens,
        num_running=len(scheduler.running),
        num_reserved=num_reserved,
        num_blocks=pool.num_blocks,
        num_free_blocks=pool.num_available,
        block_size=limits.block_size,
        work=work,
        queue=queue_by_slack(scheduler.waiting, now),
        max_step_tokens=limits.max_step_tokens,
        prefill_share=steps.prefill_share.at(now),
        step_model=steps.model,
        busy_s=steps.busy_s(now),
        plans_in_s=0.0 if engine.may_plan else steps.oldest_s(now),
        lead_s=0.0 if scheduler.pacer is None else scheduler.pacer.lead_s,
        num_passing=num_leaving + sum(s.hands_off for s in scheduler.waiting) + sum(s.hands_off for s in scheduler.running),
        last_read=tuple((request_id, now - added_at) for request_id, added_at in engine.last_added),
        filling=_filling_load(filling, [s for s in unfinished if s.fills_in and not s.hands_off], num_filling, pool, now),
        max_sequences=limits.max_sequences,
    )


def _filling_load(decoding: list[Sequence], others: list[Sequence], num_coming: int, pool: "BlockPool", now: float) -> FillingLoad:
    """Of its memory, what is not shared, of those that give it to whoever comes now."""
    return FillingLoad(
        num_requests=len(decoding) + len(others) + num_coming,
        num_decoding=len(decoding),
        decode_context=sum(len(s.token_ids) for s in decoding),
        num_blocks=sum(pool.num_private(s.blocks) for s in (*decoding, *others) if s.due_at > now + NO_OBJECTIVE_S),
    )


def queue_by_slack(waiting: Seq[Sequence], now: float) -> tuple[tuple[float, int], ...]:
    """Neighbours are put together, at the sooner deadline, until there are at most MAX_QUEUE_ENTRIES. `waiting` is by urgency."""
    per_entry = -(-len(waiting) // MAX_QUEUE_ENTRIES) or 1
    groups = [waiting[i : i + per_entry] for i in range(0, len(waiting), per_entry)]
    return tuple((min(group[0].due_at - now, NO_DEADLINE_S), sum(s.num_to_compute for s in group)) for group in groups)
