"""What a step of an engine costs: T = a + b·S_p + c·Σ S_p·ctx + d·N_d + e·Σ S_d, linear in four features.

A worker fits the five coefficients to its own steps (engine/predictor.py) and tells them with its load; a router predicts with them.
"""

from msgspec import Struct

CONFIDENT_AFTER = 20
"""Observed steps at which half of the trust is earned."""


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

    @property
    def confidence(self) -> float:
        """0 to 1: enough steps seen, and well predicted."""
        return self.num_observed / (self.num_observed + CONFIDENT_AFTER) / (1 + self.error)

    def prefill_s(self, tokens: int, pairs: float) -> float:
        """What prompt tokens add to the steps they are in."""
        return self.prefill_token_s * tokens + self.prefill_pair_s * pairs

    def decode_s(self, num_decoding: float, decode_context: float) -> float:
        """A step of decodes alone."""
        return self.base_s + self.decode_sequence_s * num_decoding + self.decode_context_s * decode_context

    def step_s(self, features: StepFeatures) -> float:
        return self.decode_s(features.num_decoding, features.decode_context) + self.prefill_s(
            features.prefill_tokens, features.prefill_pairs
        )


def attended_pairs(start: int, count: int) -> int:
    """Pairs of tokens [start, start + count) with what each attends to, itself included."""
    return count * start + count * (count + 1) // 2
