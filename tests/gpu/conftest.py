from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def exact_products() -> Iterator[None]:
    """Of fp32; and what torch holds back afterwards is free for the next engine."""
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.cuda.empty_cache()
