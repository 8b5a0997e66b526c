"""Hypothesis has no time limit for an example: speed is for benchmarks, and machines are shared.

With pytest-xdist (`make test`: two processes) the tests of Ray stay in one of them, on their one head, and a file in one of them too."""

from typing import Any

import pytest
from hypothesis import settings

settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from xdist.scheduler import LoadScopeScheduling

    class RayTogether(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "tests/ray" if nodeid.startswith("tests/ray/") else nodeid.partition("::")[0]

    return RayTogether(config, log)
