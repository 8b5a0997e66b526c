"""The steps that a worker has under way, and what their ends teach: pure, told what time it is.

    launched(features) ─► … ─► collected ──► seconds of that step alone ──► learn: StepPredictor, PrefillShare
                          └─ never ──► require_progress raises
"""

from collections import deque
from itertools import islice

from ..messages.errors import StepStuck
from ..messages.steps import StepFeatures, StepModel
from .load import PrefillShare
from .predictor import StepPredictor

STEP_LIMIT_S = 60.0            # some hundred times the longest step


class StepWatch:
    def __init__(self, model: StepModel) -> None:
        """`model`: what is known of steps before any was seen."""
        self.prefill_share = PrefillShare()
        self._predictor = StepPredictor(model)
        self._under_way: deque[tuple[StepFeatures, float]] = deque()      # and when it was launched
        self._collected_at = 0.0
        self._unlearned: deque[tuple[StepFeatures, float, float]] = deque()     # the seconds that it took, and when it ended

    @property
    def model(self) -> StepModel:
        return self._predictor.model

    @property
    def num_unlearned(self) -> int:
        return len(self._unlearned)

    def launched(self, features: StepFeatures, now: float) -> None:
        self._under_way.append((features, now))

    def collected(self, now: float) -> None:
        """The oldest has ended. One that was launched ahead began when the one before it ended."""
        features, launched_at = self._under_way.popleft()
        self._unlearned.append((features, now - max(launched_at, self._collected_at), now))
        self._collected_at = now

    def learn(self) -> None:
        """From the oldest that has been collected, if there is one; apart, for it takes long."""
        if not self._unlearned:
            return
        features, seconds, ended_at = self._unlearned.popleft()
        self._predictor.observe(features, seconds)
        prefill_s = self.model.prefill_s(features.prefill_tokens, features.prefill_pairs, features.num_decoding)
        self.prefill_share.add(prefill_s, ended_at)

    def observe(self, features: StepFeatures, seconds: float) -> None:
        """A step of nobody's, which was never under way."""
        self._predictor.observe(features, seconds)

    def busy_s(self, now: float) -> float:
        """Until all that are under way have ended, as far as can be foretold."""
        return self._left_s(len(self._under_way), now)

    def oldest_s(self, now: float) -> float:
        """Until the oldest that is under way has ended."""
        return self._left_s(1, now)

    def _left_s(self, num_steps: int, now: float) -> float:
        if not self._under_way:
            return 0.0
        began_at = max(self._under_way[0][1], self._collected_at)
        return max(0.0, began_at + sum(self.model.step_s(features) for features, _ in islice(self._under_way, num_steps)) - now)

    def require_progress(self, now: float) -> None:
        """Raises StepStuck if the oldest has been under way for too long."""
        features, launched_at = self._under_way[0]
        under_way_s = now - max(launched_at, self._collected_at)
        if under_way_s > STEP_LIMIT_S:
            what = f"{features.prefill_tokens} prompt tokens and {features.num_decoding} decodes"
            raise StepStuck(f"a step of {what} has not ended for {under_way_s:.0f} s")
