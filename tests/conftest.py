"""Hypothesis has no time limit for an example: speed is for benchmarks, and machines are shared.

With pytest-xdist (`make test`: two processes) the tests of Ray stay in one of them, on their one head, and a file in one of them too;
tests of single kernels on a GPU, most of whose time is the compiler's, go to whoever is free."""

from typing import Any

import pytest
from hypothesis import settings

pytest.register_assert_rewrite("harness")             # what its asserts compare is shown, as in tests
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

KERNEL_TESTS = ("tests/gpu/test_kernels.py::", "tests/gpu/test_conversion.py::")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            if nodeid.startswith(KERNEL_TESTS):
                return nodeid
            return "tests/ray" if nodeid.startswith("tests/ray/") else nodeid.partition("::")[0]

    return ByFile(config, log)
