"""What a step of an engine costs, of its rows R = S_p + N_d, which are multiplied by all weights:

    T = a + b·S_p + c·Σ S_p·ctx + d·N_d + e·Σ S_d + f·max(0, R − 128) + g·max(0, R − 512)

To read the weights takes a, however few rows there are; behind it rows are cheap until computing them takes as long. Where that is differs
(200 to 300 rows of bf16 on an H100 or H200), and it is no corner: between the two bends a step costs a little more than the longer of both
(the roofline: Williams, Waterman, Patterson, CACM 2009). A machine whose computing is never hidden has f = g = 0. All coefficients are
>= 0, so T is convex in each feature and never falls.

A worker fits the coefficients to its own steps (engine/predictor.py) and tells them with its load; a router predicts with them.
"""

from msgspec import Struct

CONFIDENT_AFTER = 20
"""Observed steps at which half of the trust is earned."""

FIRST_BEND, SECOND_BEND = 128.0, 512.0
"""Rows."""

NO_TIME_S = 1e-15
"""Of a token that is taken to cost nothing."""


class StepFeatures(Struct, frozen=True):
    """Of one step, or of work as though it were one step."""

    prefill_tokens: int = 0                   # S_p: prompt tokens computed
    prefill_pairs: int = 0                    # Σ S_p·ctx: (prompt token, token it attends to) pairs
    num_decoding: int = 0                     # N_d: sequences that decode
    decode_context: int = 0                   # Σ S_d: tokens they attend to

    def plus(self, other: "StepFeatures") -> "StepFeatures":
        return StepFeatures(
            self.prefill_tokens + other.prefill_tokens,
            self.prefill_pairs + other.prefill_pairs,
            self.num_decoding + other.num_decoding,
            self.decode_context + other.decode_context,
        )


class StepModel(Struct, frozen=True):
    """Coefficients in seconds, all >= 0, so that no prediction is negative."""

    base_s: float                             # a
    prefill_token_s: float                    # b
    prefill_pair_s: float                     # c
    decode_sequence_s: float                  # d
    decode_context_s: float                   # e
    error: float = 1.0                        # mean of |observed / predicted − 1| over the last steps
    num_observed: int = 0                     # steps behind it; 0: a prior
    past_first_s: float = 0.0                 # f: of each row beyond FIRST_BEND
    past_second_s: float = 0.0                # g: of each row beyond SECOND_BEND

    @property
    def confidence(self) -> float:
        """0 to 1: enough steps seen, and well predicted."""
        return self.num_observed / (self.num_observed + CONFIDENT_AFTER) / (1 + self.error)

    @property
    def full_token_s(self) -> float:
        """A prompt token more in a step that is past all bends: the most that one costs, but for what it attends to."""
        return self.prefill_token_s + self.past_first_s + self.past_second_s

    def prefill_s(self, tokens: float, pairs: float, beside: float = 0.0) -> float:
        """What prompt tokens add to one step with `beside` other rows."""
        straight_s = self.prefill_token_s * tokens + self.prefill_pair_s * pairs
        return straight_s + self.bent_s(beside + tokens) - self.bent_s(beside)

    def decode_s(self, num_decoding: float, decode_context: float) -> float:
        """A step of decodes alone."""
        straight_s = self.base_s + self.decode_sequence_s * num_decoding + self.decode_context_s * decode_context
        return straight_s + self.bent_s(num_decoding) if num_decoding > FIRST_BEND else straight_s

    def step_s(self, features: StepFeatures) -> float:
        return self.decode_s(features.num_decoding, features.decode_context) + self.prefill_s(
            features.prefill_tokens, features.prefill_pairs, features.num_decoding
        )

    def bent_s(self, rows: float) -> float:
        """What `rows` add for being past the bends."""
        if rows <= FIRST_BEND:
            return 0.0
        bent_s = self.past_first_s * (rows - FIRST_BEND)
        return bent_s if rows <= SECOND_BEND else bent_s + self.past_second_s * (rows - SECOND_BEND)


def attended_pairs(start: int, count: int) -> int:
    """Pairs of tokens [start, start + count) with what each attends to, itself included."""
    return count * start + count * (count + 1) // 2
