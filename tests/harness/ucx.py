"""Whether the `ucx` transport can be used here; tests that need it skip with the reason."""

from functools import cache

import pytest
import torch

from diptych.kvtransfer.ucx.build import build_shim
from diptych.kvtransfer.ucx.provider import find_libucp
from diptych.messages.errors import ClusterError


@cache
def why_no_ucx() -> str | None:
    try:
        find_libucp(for_gpu=torch.cuda.is_available())           # what is found first stays in the process
        build_shim()
    except ClusterError as error:
        return str(error)
    return None


needs_ucx = pytest.mark.skipif(why_no_ucx() is not None, reason=why_no_ucx() or "")
