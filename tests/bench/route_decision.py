"""How long one decision of policy goodput takes: `python tests/bench/route_decision.py` prints the median and p99 in µs.

32 prefill and 32 decode workers under load, prompts of 1000 tokens, all different or all alike (so that every worker soon holds them);
every decision is followed by what the dispatcher does with it, and reports come in as they would, so that the view changes under the
policy.
"""

import random
import statistics
import time

from diptych.cluster.router.goodput import Goodput, GoodputOptions
from diptych.cluster.router.load_view import LoadView
from diptych.cluster.router.policy import Objectives, RoutingRequest
from diptych.messages.ids import Address, Epoch, RequestId, WorkerId
from diptych.messages.membership import Member, Membership, Role
from diptych.messages.requests import LoadReport, Route, WorkerRef
from diptych.messages.steps import StepFeatures, StepModel

NUM_DECISIONS = 5000
MODEL = StepModel(5e-3, 7e-6, 9e-10, 12e-6, 3.2e-8, 0.02, 1000, past_first_s=12e-6, past_second_s=4e-6)


def main() -> None:
    for name, num_prompts in (("all different", NUM_DECISIONS), ("all alike", 1)):
        for what, times_us in measured(num_prompts).items():
            p99 = sorted(times_us)[int(0.99 * NUM_DECISIONS)]
            print(f"{name}: {what}: median {statistics.median(times_us):.0f} µs, p99 {p99:.0f} µs")


def measured(num_prompts: int) -> dict[str, list[float]]:
    draw = random.Random(0)
    names = [(role, f"{role}-{i}") for role in Role for i in range(32)]
    members = tuple(
        Member(WorkerRef(WorkerId(name), Epoch(1), Address(f"bench://{name}")), role, "layout", 64, 12_800, 131_072) for role, name in names
    )
    view, policy = LoadView(3.0), Goodput(GoodputOptions())
    view.set_membership(Membership(1, members, tuple(Address(f"bench://gateway-{i}") for i in range(4))), 0.0)
    choosing_us, viewing_us = [], []
    for number in range(NUM_DECISIONS):
        now = number * 1e-3
        for member in draw.sample(members, 2):
            view.heard(member.ref, report(member, draw), now)
        request = RoutingRequest((number % num_prompts,) * 1000, 4096, objectives=Objectives(0.4, 0.02), arrived_at=now)
        started = time.perf_counter()
        seen = view.view(now)
        between = time.perf_counter()
        decision = policy.choose(request, seen, now)
        viewing_us.append((between - started) * 1e6)
        choosing_us.append((time.perf_counter() - between) * 1e6)
        if isinstance(decision, Route):
            view.sent(RequestId(str(number)), decision, 1000, now)
            view.ended(RequestId(str(number)), decision, 200)
    return {"decision": choosing_us, "view": viewing_us}


def report(member: Member, draw: random.Random) -> LoadReport:
    waiting, decoding = (draw.randrange(8000), 0) if member.role is Role.PREFILL else (0, draw.randrange(100))
    work = StepFeatures(waiting, waiting * 500, decoding, decoding * 1200)
    return LoadReport(member.ref, waiting // 1000, waiting, decoding, 0, 12_800, 12_800 - 20 * decoding, 64, work, (), 4096, 0.1, MODEL)


if __name__ == "__main__":
    main()
