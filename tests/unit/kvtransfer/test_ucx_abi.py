"""The shim's declarations of libucp's interface against UCX's own headers: sizes, offsets and constants, through the same C program."""

import re
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest

from diptych.kvtransfer.ucx.build import FOLDER

STRUCTS = {
    "ucp_params_t": ("features",),
    "ucp_context_attr_t": ("memory_types",),
    "ucp_worker_params_t": ("thread_mode", "cpu_mask", "flags"),
    "ucp_worker_attr_t": ("address", "address_length"),
    "ucp_mem_map_params_t": ("address", "length", "flags", "memory_type"),
    "ucp_mem_attr_t": ("address",),
    "ucp_ep_params_t": ("address", "err_mode", "err_handler", "user_data"),
    "ucp_ep_attr_t": ("transports", "transports.entries", "transports.num_entries", "transports.entry_size"),
    "ucp_transport_entry_t": ("transport_name", "device_name"),
    "ucp_request_param_t": ("flags", "cb", "user_data", "memory_type", "memh"),
    "ucp_am_handler_param_t": ("id", "flags", "cb", "arg"),
    "ucp_am_recv_param_t": ("recv_attr", "reply_ep"),
    "ucs_status_t": (),
}
CONSTANTS = re.findall(r"\b(UC[PS]_\w+) = ", (FOLDER / "ucp_abi.h").read_text())
LONGER_SINCE = {"ucp_params_t", "ucp_context_attr_t", "ucp_request_param_t"}
"""Have fields after those that the shim uses, in some versions: their sizes differ, their offsets do not."""


def headers() -> Path | None:
    spec = find_spec("libucx")
    wheel = [Path(folder) / "include" for folder in spec.submodule_search_locations or ()] if spec else []
    return next((folder for folder in [*wheel, Path("/usr/include")] if (folder / "ucp/api/ucp.h").is_file()), None)


def probe(include: str, folder: Path, scratch: Path) -> list[str]:
    lines = [f'printf("{name} %d\\n", (int){name});' for name in CONSTANTS]
    for struct, fields in STRUCTS.items():
        if struct not in LONGER_SINCE:
            lines.append(f'printf("{struct} %zu\\n", sizeof({struct}));')
        lines += [f'printf("{struct}.{field} %zu\\n", offsetof({struct}, {field}));' for field in fields]
    source = scratch / "probe.c"
    source.write_text(f"#include <stddef.h>\n#include <stdio.h>\n#include <{include}>\nint main(void)\n{{\n" + "\n".join(lines) + "\n}\n")
    compiler = shutil.which("cc")
    assert compiler is not None
    subprocess.run([compiler, f"-I{folder}", "-o", str(scratch / "probe"), str(source)], check=True, capture_output=True, timeout=60)
    return subprocess.run([scratch / "probe"], check=True, capture_output=True, text=True, timeout=10).stdout.splitlines()


@pytest.mark.skipif(headers() is None, reason="no UCX headers are installed: pip install libucx-cu12")
@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_declarations_are_those_of_ucx(tmp_path: Path) -> None:
    folder = headers()
    assert folder is not None
    assert "UCP_MEM_MAP_ALLOCATE" in CONSTANTS
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    ours.mkdir()
    theirs.mkdir()
    assert probe("ucp_abi.h", FOLDER, ours) == probe("ucp/api/ucp.h", folder, theirs)
