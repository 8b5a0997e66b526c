"""`diptych bench transfer` on a CPU: what it measures, what it leaves out and says so, what it refuses."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from diptych.cluster.bench import transfer_bench
from diptych.cluster.bench.command import app
from diptych.cluster.bench.errors import TransferBenchError
from diptych.cluster.bench.transfer_bench import TransferBench, choose_paths
from diptych.cluster.bench.transfer_peer import Path as PagePath
from diptych.cluster.bench.transfer_peer import remote
from diptych.kvtransfer.ucx import provider
from diptych.messages.errors import LayoutMismatch
from diptych.messages.membership import MemoryDescriptor


def bench(*transports: str, programs: tuple[int, ...] = (), copy_engines: bool = False, one_gpu: bool = False) -> TransferBench:
    return TransferBench(transports, programs, copy_engines, one_gpu, quick=True)


@pytest.fixture
def no_nixl(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer_bench.transfer_nixl, "is_installed", lambda: False)


def test_the_command_writes_a_row_for_each_page_size(tmp_path: Path) -> None:
    options = ["--transports", "shm", "--parts", "pages", "--quick", "--json", str(tmp_path / "pages.json")]
    done = CliRunner().invoke(app, ["transfer", *options])
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "pages.json").read_text())
    assert [(row["path"], row["page_bytes"], row["num_pages"]) for row in report["rows"]] == [
        ("shm", 4 << 10, 256), ("shm", 32 << 10, 128), ("shm", 64 << 10, 128), ("shm", 256 << 10, 64),
    ]  # fmt: skip
    for row in report["rows"]:
        assert 0 < row["page_us"] <= row["page_p99_us"]
        assert all(row[name] > 0 for name in ("page_call_us", "page_busy_us", "call_call_us", "burst_call_us", "burst_gbps", "busy_gbps"))
        assert row["call_gbps"] == pytest.approx(row["num_pages"] * row["page_bytes"] / row["call_us"] / 1e3)
    assert (report["loads"], report["handoffs"], report["skipped"]) == ([], [], {})


def test_the_command_times_handoffs_and_decode_steps(tmp_path: Path) -> None:
    options = ["--transports", "shm", "--parts", "handoff,decode", "--quick", "--json", str(tmp_path / "parts.json")]
    done = CliRunner(env={"COLUMNS": "160"}).invoke(app, ["transfer", *options])
    assert done.exit_code == 0, done.output
    assert "offer to commit" in done.output
    report = json.loads((tmp_path / "parts.json").read_text())
    assert report["rows"] == []
    assert [handoff["pause_s"] for handoff in report["handoffs"]] == [0.002, 0.02]
    for handoff in report["handoffs"]:
        assert (handoff["path"], handoff["page_bytes"], handoff["count"]) == ("shm", 64 << 10, 50)
        assert 0 < handoff["p50_us"] <= handoff["p99_us"]
        assert sum(step["p50_us"] for step in handoff["steps"]) < 2 * handoff["p99_us"]
    assert [row["work"].split("steps of ")[1] for row in report["loads"]] == [
        "1, a prompt arrives", "1, pages without a pause", "64, a prompt arrives", "64, pages without a pause",
    ]  # fmt: skip
    assert all(row["alone_ms"] > 0 and row["beside_ms"] > 0 and row["gbps"] > 0 for row in report["loads"])


def test_an_unknown_part_is_a_usage_error() -> None:
    done = CliRunner(env={"COLUMNS": "160"}).invoke(app, ["transfer", "--transports", "shm", "--parts", "pages,handshake"])
    assert done.exit_code == 2
    assert "no part handshake; there are pages, handoff, decode" in done.output


@pytest.mark.usefixtures("no_nixl")
def test_what_cannot_be_measured_is_left_out_with_its_reason() -> None:
    paths, skipped = choose_paths(bench(), num_gpus=1)
    assert "shm" in [path.name for path in paths]
    assert {"nvlink", "nixl"}.isdisjoint(path.transport for path in paths)
    assert skipped["nvlink"] == "1 GPUs, it needs 2"
    assert skipped["nixl"].startswith("not installed")


@pytest.mark.usefixtures("no_nixl")
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("nvlink", "nvlink: 0 GPUs, it needs 2"),
        ("nixl", "nixl: not installed"),
        ("pigeons", "no transport pigeons; there are shm, nvlink, ucx, nixl"),
    ],
)
def test_what_was_named_and_cannot_be_measured_is_an_error(name: str, reason: str) -> None:
    with pytest.raises(TransferBenchError, match=reason):
        choose_paths(bench("shm", name), num_gpus=0)
    assert CliRunner().invoke(app, ["transfer", "--transports", name, "--quick"]).exit_code == 2


def test_variants_of_nvlink_are_paths_of_their_own() -> None:
    paths, _ = choose_paths(bench("nvlink", programs=(8, 16), copy_engines=True), num_gpus=2)
    assert [(path.programs, path.copy_engines) for path in paths] == [(8, False), (16, False), (0, True)]
    assert len({path.name for path in paths}) == 3
    (dry_run,), _ = choose_paths(bench("nvlink", one_gpu=True), num_gpus=1)
    assert (dry_run.name, dry_run.device) == ("nvlink", "cuda")


def test_nixl_moves_host_memory_and_where_there_are_gpus_theirs_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer_bench.transfer_nixl, "is_installed", lambda: True)
    assert [[path.device for path in choose_paths(bench("nixl"), num_gpus)[0]] for num_gpus in (0, 2)] == [["cpu"], ["cpu", "cuda"]]


@pytest.mark.parametrize(("has_cuda", "devices"), [(False, ["cpu"]), (True, ["cpu", "cuda"])])
def test_ucx_moves_gpu_memory_where_one_with_cuda_is_found(
    has_cuda: bool, devices: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    library = tmp_path / "libucp.so.0"
    library.touch()
    if has_cuda:
        (tmp_path / "ucx").mkdir()
        (tmp_path / "ucx" / "libuct_cuda.so.0").touch()
    monkeypatch.setenv(provider.PATH_VARIABLE, str(library))
    for one_gpu, num_gpus in ((False, 2), (True, 1)):
        paths, _ = choose_paths(bench("ucx", one_gpu=one_gpu), num_gpus)
        assert [path.device for path in paths] == devices
    assert [path.device for path in choose_paths(bench("ucx"), num_gpus=1)[0]] == ["cpu"]


@pytest.mark.parametrize("programs", ["8,x", "0", "-4"])
def test_programs_that_are_no_numbers_are_a_usage_error(programs: str) -> None:
    done = CliRunner().invoke(app, ["transfer", "--programs", programs, "--transports", "shm"])
    assert done.exit_code == 2
    assert "numbers from 1 on" in " ".join(done.output.split())


def test_an_end_hands_its_errors_over_and_goes_on() -> None:
    with remote(PagePath("shm", "shm", "cpu"), "test-bench-end", "only", None) as end:
        mine = end.call("open", 4096, 8)
        assert isinstance(mine, MemoryDescriptor)
        end.call("open", 8192, 8)
        with pytest.raises(LayoutMismatch, match="pages of 4096 bytes there, 8192 here"):
            end.call("connect", mine)
        with pytest.raises(TransferBenchError, match="shm, only: AttributeError"):
            end.call("no_such_method")
        assert end.call("open", 4096, 8).page_bytes == 4096
