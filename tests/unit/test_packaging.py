"""Every folder of ours is installed, mapped, linked for type checkers, and walled off as it should be."""

import ast
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CONFIG = tomllib.loads((ROOT / "pyproject.toml").read_text())
SETUPTOOLS = CONFIG["tool"]["setuptools"]
PACKAGES: list[str] = SETUPTOOLS["packages"]
LINKS = ROOT / "typings" / "diptych"
TOP_LEVEL = sorted(package.removeprefix("diptych.") for package in PACKAGES if package.count(".") == 1)
MAY_IMPORT_RAY = {"cluster/ray_join.py", "cluster/ray_nodes.py", "cluster/ray_runtime.py", "cluster/ray_session.py"}


def sources() -> list[Path]:
    return sorted(path for folder in TOP_LEVEL for path in (ROOT / folder).rglob("*.py"))


def test_list_equals_mapping() -> None:
    assert sorted(SETUPTOOLS["package-dir"]) == sorted(PACKAGES)
    for package, folder in SETUPTOOLS["package-dir"].items():
        assert folder == package.removeprefix("diptych.").replace(".", "/")


def test_every_folder_with_code_is_listed() -> None:
    with_code = {"diptych." + ".".join(path.parent.relative_to(ROOT).parts) for path in sources()}
    assert with_code == set(PACKAGES)


def test_links_for_type_checkers() -> None:
    assert sorted(path.name for path in LINKS.iterdir()) == TOP_LEVEL
    for link in LINKS.iterdir():
        assert link.is_symlink()
        assert link.resolve() == ROOT / link.name


def test_mypy_checks_every_top_level_folder() -> None:
    assert sorted(CONFIG["tool"]["mypy"]["packages"]) == [f"diptych.{name}" for name in TOP_LEVEL]


def test_the_layers_name_every_top_level_folder() -> None:
    (contract,) = [c for c in CONFIG["tool"]["importlinter"]["contracts"] if c["type"] == "layers"]
    named = [name.strip() for layer in contract["layers"] for name in layer.split("|")]
    assert sorted(named) == TOP_LEVEL


def test_top_level_folders_are_namespace_packages() -> None:
    assert [name for name in TOP_LEVEL if (ROOT / name / "__init__.py").exists()] == []


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_ray_stays_behind_its_wall(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    modules = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    modules += [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level == 0]
    if str(path.relative_to(ROOT)) not in MAY_IMPORT_RAY:
        assert not any(module.split(".")[0] == "ray" for module in modules)
