"""What does not fit on a GPU is said with the numbers, before it is loaded."""

import pytest
import torch

from diptych.engine.config import EngineConfig
from diptych.engine.gpu_memory import require_room_for_weights, sampling_bytes
from diptych.messages.errors import ModelError
from diptych.models.config import ModelConfig
from diptych.models.embedded.path import embedded_model_path
from diptych.models.weights import weight_plan


def test_weights_and_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = weight_plan(ModelConfig.from_folder(embedded_model_path()))
    num_bytes = 2 * sum(torch.empty(param.shape, device="meta").numel() for param in plan.leaves())
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (num_bytes, 80 << 30))
    require_room_for_weights(plan, torch.bfloat16, torch.device("cuda"))
    with pytest.raises(ModelError, match=r"the weights take 0\.0 GiB; of the GPU's 80\.0 GiB, 0\.0 are free"):
        require_room_for_weights(plan, torch.float32, torch.device("cuda"))


def test_room_for_sampling_is_left() -> None:
    """2 bytes a count, 4 a changed logit, 2 a logit, and 1024 rows of a prompt that is scored."""
    engine = EngineConfig("", max_sequences=256, max_step_tokens=2048)
    assert sampling_bytes(128_256, torch.bfloat16, engine) == 128_256 * (256 * 8 + 1024 * 2)
