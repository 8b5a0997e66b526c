"""When is a request due in a worker's queue? Pure; the router asks the same of a request that it has not sent yet.

    priority   as though it had come PRIORITY_HEAD_START_S earlier
    default    by its TTFT objective, or NO_OBJECTIVE_S after it came
    batch      BATCH_PATIENCE_S after it came, whatever it was promised

What waits and cannot keep its TTFT objective any more is due NO_OBJECTIVE_S later: it lets those pass that can. (To go on in order of due
times would make them late in their turn, one after the other.) But for that a due time never moves, so waiting is ageing: what comes later
is due later sooner or later, and goes behind. The same order, backwards, says who gives up memory first.
"""

import math

from ..messages.requests import ServiceClass

PRIORITY_HEAD_START_S = 1.0
NO_OBJECTIVE_S = 10.0
BATCH_PATIENCE_S = 60.0


def due_in_s(service_class: ServiceClass, ttft_slack_s: float, waited_s: float) -> float:
    """From now. `ttft_slack_s`: until the first token was promised, infinite if it was not; `waited_s`: since the client asked."""
    if service_class is ServiceClass.BATCH:
        return BATCH_PATIENCE_S - waited_s
    promised_s = ttft_slack_s if math.isfinite(ttft_slack_s) else NO_OBJECTIVE_S - waited_s
    return promised_s - PRIORITY_HEAD_START_S if service_class is ServiceClass.PRIORITY else promised_s
