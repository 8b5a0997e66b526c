"""Ten minutes of traffic on a CPU deployment while a random worker is killed (SIGKILL) every 15 s.

    PYTHONPATH=tests python tests/bench/soak.py [--minutes 10] [--every 15] [--transport shm] [--tp 1 1]

Prints a summary; exits with 0 if no stream was wrong, every request ended, the pools are whole and the
memory of what was not killed is flat.
"""

import argparse
import asyncio
import os
import sys
from pathlib import Path

from harness.soak import Soak

from diptych.cluster import ray_session
from diptych.cluster.spec import parse_spec

START_LIMIT_S = 180.0
POOL = {"workers": 2, "kv_memory": "32MiB", "max_step_tokens": 64}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--every", type=float, default=15.0, help="seconds between kills")
    parser.add_argument("--transport", default="shm")
    parser.add_argument("--tp", type=int, nargs=2, default=(1, 1), help="ranks of a prefill and of a decode worker")
    options = parser.parse_args()
    tree = {
        "name": f"soak-{os.getpid()}",
        "model": {"path": "embedded"},
        "pools": {role: POOL | {"tp": tp} for role, tp in zip(("prefill", "decode"), options.tp, strict=True)},
        "router": {"port": 0},
        "transfer": {"transports": [options.transport]},
    }
    deployment = ray_session.launch(parse_spec(tree, Path.cwd()))
    try:
        status = deployment.wait_until_ready(START_LIMIT_S)
        assert status.endpoint is not None
        victims = ("prefill-0", "prefill-1", "decode-0", "decode-1")
        soak = Soak(deployment, status.endpoint, status.model, victims)
        summary = asyncio.run(soak.run(options.minutes * 60, options.every))
    finally:
        deployment.stop()
    print(summary)
    return 0 if summary.good else 1


if __name__ == "__main__":
    sys.exit(main())
