"""With pytest-xdist (`make test`: two processes) the tests of Ray stay in one of them, on their one head, and a file in one of them too."""

from typing import Any

import pytest


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from xdist.scheduler import LoadScopeScheduling

    class RayTogether(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "tests/ray" if nodeid.startswith("tests/ray/") else nodeid.partition("::")[0]

    return RayTogether(config, log)
