"""How many prompt tokens may a step compute beside its decodes? Pure, with a clock.

    each decode's next token is due AIM · TPOT after the last one that was in time; the step begins when those under way have ended
                 ──► the tightest: what the step may take
    step model ──► what its decodes take ──► the rest is for prompts: StepRoom

A sequence that was handed over has waited for the step under way and the one planned behind it. A long answer makes up for that with what
AIM spares. Where one answer in SHORT_SHARE ends too soon for it, pace counts from the handover, so that they catch up at once.

A decode that ran ahead of its promise lends what it gained. One that is late leaves prompts 1 / MIN_SHARE of the time that decodes take: a
promise that cannot be kept must not stop others. (The budget is the largest whose step keeps the objective: SARATHI, OSDI'24, section 4.)
"""

import math
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass

from ..messages.steps import FIRST_BEND, NO_TIME_S, SECOND_BEND, StepModel, attended_pairs
from .sequence import Sequence

AIM = 0.9
MIN_SHARE = 8
SPARE_SHARE = 8                               # of what prompts get: for attention of tokens whose rows would be padding
SHORT_SHARE = 5
CUT_SHARE = 8                                 # of a step: what it may cost to end it where a prompt ends
MEMORY = 100                                  # answers

CAUGHT_UP = round(2 * AIM / (1 - AIM))
"""Tokens after which an answer has made up for two steps' wait with what AIM spares of each."""


@dataclass
class StepRoom:
    """What is left of one step for prompts."""

    tokens: int                               # the step's budget
    seconds: float = math.inf                 # may be negative: decodes alone take longer
    floor: int = 0                            # tokens that are given whatever they take
    model: StepModel | None = None            # None: time does not count
    rows: int = 0                             # that the step holds already
    padded: Seq[int] = ()                     # ascending: rows that steps with prompts are padded to; none beyond the last
    free: int = 0                             # tokens more whose rows cost nothing: the step is padded to them in any case
    spare_s: float = math.inf                 # for what such tokens attend to, which does cost
    enough: float = math.inf                  # rows: a step in which a prompt ends takes no more, for that prompt would wait for them
    beyond_s: float = 0.0                     # of `seconds`, what prompts get though decodes have no time for them
    was_cut: bool = False                     # a prompt wanted more

    @property
    def is_empty(self) -> bool:
        return self.tokens == 0 or (self.floor == self.free == 0 and self._affordable(0, 1) == 0)

    def take(self, start: int, wanted: int) -> int:
        """Of `wanted` tokens that follow on `start`, how many go into the step; at least one, if it is not empty."""
        most = min(wanted, self.tokens)
        count = min(most, max(1, self.floor, self._affordable(start, self.tokens)))
        if count < most:
            count = min(most, self._without_padding(start, count))
        self.was_cut = count < most
        self.tokens = 0 if self.was_cut else self.tokens - count       # what padding took from who is cut is not for the less urgent
        self.floor = max(0, self.floor - count)
        if self.model is not None:
            self.seconds -= self.model.prefill_s(count, attended_pairs(start, count), self.rows)
        self.rows += count
        self.free = self._padded_to(self.rows) - self.rows
        if self.tokens and self.enough < math.inf:
            self.tokens = min(self.tokens, self._padded_to(max(self.rows, math.ceil(self.enough))) - self.rows)
        return count

    def _without_padding(self, start: int, count: int) -> int:
        """To the nearest number of rows that steps are padded to: what one step has more, the next has less. The one above is paid for in
        any case, but for attention: as far as there is time to spare for that."""
        rows = self.rows + count
        above, index = self._padded_to(rows), bisect_right(self.padded, rows)
        below = self.padded[index - 1] if index else 0
        if below > self.rows and rows - below < above - rows:
            return below - self.rows
        assert self.model is not None, "without a model nothing is cut"
        token_s = self.model.prefill_pair_s * (start + count + above - rows)          # of the last one: it attends to most
        more = above - rows if token_s == 0 else int(min(above - rows, self.spare_s / token_s))
        self.spare_s -= more * token_s
        return count + more

    def _padded_to(self, rows: int) -> int:
        index = bisect_left(self.padded, rows)
        return self.padded[index] if index < len(self.padded) else rows

    def _affordable(self, start: int, most: int) -> int:
        return most if self.model is None else affordable_tokens(self.model, start, self.seconds, most, self.rows)


def affordable_tokens(model: StepModel, start: int, seconds: float, most: int, rows: int = 0) -> int:
    """The largest count <= `most` of prompt tokens that follow on `start` and add at most `seconds` to a step that holds `rows`."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        if model.prefill_s(middle, attended_pairs(start, middle), rows) <= seconds:
            low = middle
        else:
            high = middle - 1
    return low


def beside_s(decode_s: float, tpot_s: float) -> float:
    """Of each step, for prompts, in the long run: beside decodes that take `decode_s` and were promised `tpot_s` a token."""
    left_s, least_s = AIM * tpot_s - decode_s, decode_s / MIN_SHARE
    return left_s if left_s > least_s else least_s


def enough_rows(model: StepModel, decode_s: float) -> float:
    """Of a step with decodes that take `decode_s`. Past the bends it takes again_s + rows · full_token_s, so two steps take again_s more
    than one: 1 / CUT_SHARE at so many rows."""
    again_s = decode_s - FIRST_BEND * model.past_first_s - SECOND_BEND * model.past_second_s
    rows = (CUT_SHARE - 1) * again_s / (model.full_token_s or NO_TIME_S)
    return rows if rows > SECOND_BEND else SECOND_BEND


class Pacer:
    def __init__(
        self,
        clock: Callable[[], float],
        model: Callable[[], StepModel],
        busy_s: Callable[[float], float] = lambda now: 0.0,
        padded: Seq[int] = (),
    ) -> None:
        """`busy_s(now)`: until the steps under way have ended. `padded`: rows of the graphs that steps with prompts beside decodes take."""
        self._clock = clock
        self._model = model
        self._busy_s = busy_s
        self._padded = padded
        self.lead_s = 0.0                     # how far ahead the tightest decode will be when the steps under way have ended, or behind
        self._owed_s = 0.0                    # of prompts' least share, what the last step lacked; negative: what it had more
        self._lengths = deque[int](maxlen=MEMORY)
        self._are_short = False

    def answered(self, num_outputs: int) -> None:
        """An answer has come to its own end. One token has no pace."""
        if num_outputs < 2:
            return
        self._lengths.append(num_outputs)
        self._are_short = sorted(self._lengths)[len(self._lengths) // SHORT_SHARE] < CAUGHT_UP

    def room(self, decodes: Iterable[Sequence], max_tokens: int) -> StepRoom:
        """For prompts beside `decodes`, which are all of the step's."""
        decodes, now, model = list(decodes), self._clock(), self._model()
        begins_at = now + self._busy_s(now)
        paced = [sequence for sequence in decodes if not sequence.fills_in] or decodes         # batch work holds nobody up
        slack_s = min((self._slack_s(sequence, begins_at) for sequence in paced), default=math.inf)
        decode_s = model.decode_s(len(decodes), sum(len(sequence.token_ids) for sequence in decodes))
        enough = enough_rows(model, decode_s)
        if math.isinf(slack_s):
            return StepRoom(max_tokens, rows=len(decodes), padded=self._padded, enough=enough)
        left_s = slack_s - decode_s
        least_s = decode_s / MIN_SHARE
        room_s = max(left_s, least_s + max(self._owed_s, -least_s / 2))
        spare_s, beyond_s = room_s / SPARE_SHARE, room_s - left_s
        return StepRoom(max_tokens, room_s, 1, model, len(decodes), self._padded, spare_s=spare_s, enough=enough, beyond_s=beyond_s)

    def num_beside(self, decodes: Seq[Sequence], filling: Seq[Sequence]) -> int:
        """How many of `filling`, the first ones, a step takes that does not break the pace of `decodes`: one at least. What decodes have
        gained is lent to prompts alone."""
        now, model = self._clock(), self._model()
        begins_at = now + self._busy_s(now)
        slack_s = min((self._slack_s(sequence, begins_at) for sequence in decodes), default=math.inf)
        if math.isinf(slack_s):
            return len(filling)
        most_s = min(slack_s, AIM * min(s.request.tpot_slo_s for s in decodes if s.request.tpot_slo_s is not None))
        context = sum(len(sequence.token_ids) for sequence in decodes)
        for index, sequence in enumerate(filling):
            context += len(sequence.token_ids)
            if model.decode_s(len(decodes) + index + 1, context) > most_s:
                return max(1, index)
        return len(filling)

    def planned(self, room: StepRoom) -> None:
        """What a step's prompts left of its room is the lead of the next one's decodes. What padding left of the time that decodes did not
        have is the next prompts'."""
        self.lead_s = room.seconds - room.beyond_s if math.isfinite(room.seconds) else 0.0
        most_s = room.beyond_s if room.was_cut else 0.0
        self._owed_s = min(max(room.seconds, -most_s), most_s)

    def joined(self) -> None:
        """A decode more, which has nothing to lend yet."""
        self.lead_s = min(self.lead_s, 0.0)

    def is_lost(self, sequence: Sequence) -> bool:
        """Its first token, still to come, is later than promised even if nothing but its prompt is computed from now on."""
        if sequence.is_postponed or sequence.fills_in or sequence.num_outputs or math.isinf(sequence.ttft_deadline):
            return False
        start, count = sequence.num_computed, sequence.num_to_compute
        return self._clock() + self._model().prefill_s(count, attended_pairs(start, count)) > sequence.ttft_deadline

    def _slack_s(self, sequence: Sequence, begins_at: float) -> float:
        """From the step's beginning until its next token is due; its pace counts from the beginning of the first step that it is in as a
        decode, or from its handover."""
        tpot_s = sequence.request.tpot_slo_s
        if tpot_s is None:
            return math.inf
        if sequence.paced_from is None:
            since = sequence.handed_over_at if self._are_short else None
            sequence.paced_from = begins_at if since is None else since, sequence.num_outputs
        since, num_outputs = sequence.paced_from
        return since + AIM * tpot_s * (sequence.num_outputs - num_outputs + 1) - begins_at
