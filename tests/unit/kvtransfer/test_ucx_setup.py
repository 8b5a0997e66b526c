"""Finding UCX and building the shim: the order, the settings, and errors that say what to do."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from diptych.kvtransfer.ucx import build, provider
from diptych.messages.errors import ClusterError


@contextmanager
def only(monkeypatch: pytest.MonkeyPatch, **found: str) -> Iterator[None]:
    """Of all providers just these have something."""
    with monkeypatch.context() as patch:
        patch.delenv(provider.PATH_VARIABLE, raising=False)
        for name in ("_loaded", "_system", "_nixl_wheel", "_libucx_wheel"):
            patch.setattr(provider, name, lambda name=name: found.get(name))
        yield


def test_the_order_of_providers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    names = ["_loaded", "_system", "_nixl_wheel", "_libucx_wheel"]
    for i, name in enumerate(names):
        with only(monkeypatch, **{later: later for later in names[i:]}):
            assert provider.find_libucp() == name
    explicit = tmp_path / "libucp.so"
    explicit.touch()
    with only(monkeypatch, **{name: name for name in names}):
        monkeypatch.setenv(provider.PATH_VARIABLE, str(explicit))
        assert provider.find_libucp() == str(explicit)


def test_gpu_memory_gets_the_first_with_cuda(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def library(name: str, with_cuda: bool) -> str:
        (tmp_path / name / "ucx").mkdir(parents=True)
        (tmp_path / name / "libucp.so.0").touch()
        (tmp_path / name / "ucx" / ("libuct_cuda.so.0" if with_cuda else "libuct_ib.so.0")).touch()
        return str(tmp_path / name / "libucp.so.0")

    plain, distribution, wheel, other = (library(name, name in ("wheel", "other")) for name in ("plain", "distribution", "wheel", "other"))
    monkeypatch.setattr(provider, "_system_paths", lambda: [plain, distribution])
    with only(monkeypatch, _system="libucp.so.0", _nixl_wheel=wheel, _libucx_wheel=other):
        assert provider.find_libucp(for_gpu=True) == wheel
        assert provider.find_libucp() == "libucp.so.0"
    with only(monkeypatch, _loaded="loaded", _nixl_wheel=wheel):
        assert provider.find_libucp(for_gpu=True) == "loaded"
    with only(monkeypatch, _system="libucp.so.0", _nixl_wheel=plain):
        assert provider.find_libucp(for_gpu=True) == "libucp.so.0", "none has CUDA: the error comes when memory is registered"
    link = tmp_path / "libucp.so.0"
    link.symlink_to(other)
    monkeypatch.setattr(provider, "_system_paths", lambda: [plain, str(link)])
    with only(monkeypatch, _system="libucp.so.0", _nixl_wheel=wheel):
        assert provider.find_libucp(for_gpu=True) == str(link)


def test_the_systems_libraries_are_found_without_loading_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "libucp.so.0").touch()
    program = tmp_path / "ldconfig"
    listed = ("2 libs found", "\tlibucp.so.0 (libc6,x86-64) => /a/libucp.so.0", "\tlibucp.so (libc6) => /a/libucp.so")
    program.write_text("#!/bin/sh\n" + "".join(f"echo '{line}'\n" for line in listed))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("LD_LIBRARY_PATH", f"/nowhere:{tmp_path / 'lib'}:")
    assert provider._system_paths() == [str(tmp_path / "lib" / "libucp.so.0"), "/a/libucp.so.0"]


def test_a_list_that_does_not_come_is_not_waited_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / "ldconfig"
    program.write_text("#!/bin/sh\nexec sleep 60\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(provider, "LISTING_S", 0.1)
    with pytest.raises(ClusterError, match=rf"ldconfig -p has listed nothing for 0.1 s; {provider.PATH_VARIABLE}"):
        provider._system_paths()


def test_no_ucx_at_all_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    with only(monkeypatch), pytest.raises(ClusterError, match=r"pip install diptych\[ucx\]"):
        provider.find_libucp()


def test_an_explicit_path_is_not_passed_over(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(provider.PATH_VARIABLE, str(tmp_path / "gone.so"))
    with pytest.raises(ClusterError, match=r"gone\.so: there is no such file"):
        provider.find_libucp()


def test_the_environment_overrides_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in provider.SETTINGS:
        monkeypatch.delenv(f"UCX_{name}", raising=False)
    assert "KEEPALIVE_INTERVAL=500ms\n" in provider.settings_text()
    monkeypatch.setenv("UCX_KEEPALIVE_INTERVAL", "3s")
    assert "KEEPALIVE_INTERVAL" not in provider.settings_text()


def test_the_door_takes_the_network_interfaces_among_the_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    for devices, taken in (("mlx5_0:1,lo", "lo"), ("mlx5_0:1", "all"), ("all", "all")):
        monkeypatch.setenv("UCX_NET_DEVICES", devices)
        assert f"NET_DEVICES={taken}\n" in provider.door_settings_text()


def test_loading_leaves_the_environment_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UCX_LOG_LEVEL", "info")
    before = dict(os.environ)
    with provider.quiet_loading():
        assert os.environ["UCX_LOG_LEVEL"] == "info"
        assert os.environ["UCX_ERROR_SIGNALS"] == ""
    assert dict(os.environ) == before


needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")


@needs_compiler
def test_the_shim_is_built_once_and_again_for_other_sources(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = tmp_path / "sources"
    folder.mkdir()
    (folder / "a.c").write_text("int a(void) { return 1; }\n")
    monkeypatch.setattr(build, "FOLDER", folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    first = build.build_shim()
    built_at = first.stat().st_mtime_ns
    assert build.build_shim() == first
    assert first.stat().st_mtime_ns == built_at
    (folder / "a.c").write_text("int a(void) { return 2; }\n")
    second = build.build_shim()
    assert second != first
    assert sorted(path.name for path in first.parent.iterdir()) == sorted([first.name, second.name])


@needs_compiler
def test_a_failed_build_gives_the_compilers_words(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "a.c").write_text("int a(void) { return nothing; }\n")
    monkeypatch.setattr(build, "FOLDER", tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(ClusterError, match="nothing"):
        build.build_shim()
    assert list(build.cache_folder().iterdir()) == []


def test_no_compiler_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(ClusterError, match="needs a C compiler"):
        build.build_shim()
