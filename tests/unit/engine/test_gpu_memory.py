"""What does not fit on a GPU is said with the numbers, before it is loaded."""

import pytest
import torch

from diptych.engine.gpu_memory import require_room_for_weights
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
