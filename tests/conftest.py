"""With pytest-xdist (`make test`: two processes) the tests of Ray stay in one of them, on their one head, and a file in one of them too."""

from pathlib import Path

import pytest

RAY = Path(__file__).parent / "ray"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        group = "ray" if RAY in item.path.parents else str(item.path.relative_to(RAY.parent))
        item.add_marker(pytest.mark.xdist_group(group))
