"""The controller's clock, which stands still while the controller does.

Members are asked once a turn. If a turn takes long (Ray's head does not answer, the machine was suspended, the process stopped), nobody was
asked meanwhile, and nobody's silence is his own: by the wall's clock all of them would be killed for it at once.
"""

MAX_TURN_S = 0.5
"""What one turn may count for: some times what it takes."""


class TurnClock:
    def __init__(self, wall_s: float) -> None:
        self.now_s = self._wall_s = wall_s

    def turn(self, wall_s: float) -> float:
        """The time at a turn that begins now."""
        self.now_s += min(MAX_TURN_S, wall_s - self._wall_s)
        self._wall_s = wall_s
        return self.now_s
