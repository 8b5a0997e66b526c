"""Weights onto a device: from a Hugging Face folder's safetensors, or invented.

    headers of all files ── compared with the plan ──► allocate ── copy piece by piece, casting ──► ModelWeights[Tensor]

Names, shapes and storage types are checked from the headers before any tensor memory is taken: a tensor that is missing, misshapen
or unexpected ends it there, with its name and both shapes.
"""

import math
import re
import zlib
from collections.abc import Iterable
from contextlib import ExitStack
from enum import StrEnum
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..messages.errors import UnsupportedModel, WeightMismatch
from .config import WHOLE, ModelConfig, Shard
from .weights import ModelWeights, Param, Piece, weight_plan

_STORED_TYPES = {"F32", "F16", "BF16"}
_HARMLESS = re.compile(r"\.(rotary_emb\.inv_freq|self_attn\.[kv]_scale)$")      # frequencies, which follow from config.json; load_kv_scales
_SHOWN = 5                                              # mismatches spelled out in an error


class LoadFormat(StrEnum):
    SAFETENSORS = "safetensors"
    DUMMY = "dummy"


def load_weights(
    folder: Path,
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    load_format: LoadFormat = LoadFormat.SAFETENSORS,
    shard: Shard = WHOLE,
) -> ModelWeights[Tensor]:
    """Weights of `config` as `dtype` on `device`, or one rank's part of them. Raises WeightMismatch, UnsupportedModel, or ModelError: the
    model cannot be shared so. Dummy weights need no file."""
    plan = weight_plan(config, shard)
    if load_format is LoadFormat.DUMMY:
        return plan.map(lambda param: _invent(param, dtype, device))
    with ExitStack() as files:
        checkpoint = _Checkpoint(folder, files)
        checkpoint.compare({piece.name: piece for param in plan.leaves() for piece in param.pieces}, config.tie_embeddings)
        return plan.map(lambda param: _stack(param, (checkpoint.read(piece) for piece in param.pieces), dtype, device))


def load_kv_scales(folder: Path, config: ModelConfig, load_format: LoadFormat = LoadFormat.SAFETENSORS) -> Tensor:
    """What keys and values are divided by when they are stored as fp8 → [num_layers, 2, kv_heads] fp32, from a checkpoint's
    `self_attn.k_scale` and `v_scale`, of one number or one a head; 1 where it has none. Raises WeightMismatch."""
    scales = torch.ones(config.num_layers, 2, config.num_kv_heads)
    if load_format is LoadFormat.DUMMY:
        return scales
    with ExitStack() as files:
        checkpoint = _Checkpoint(folder, files)
        for layer in range(config.num_layers):
            for which, letter in enumerate("kv"):
                name = f"model.layers.{layer}.self_attn.{letter}_scale"
                if name in checkpoint:
                    scales[layer, which] = _positive(name, checkpoint.read_whole(name), config.num_kv_heads)
    return scales


def _positive(name: str, scale: Tensor, kv_heads: int) -> Tensor:
    if scale.numel() not in (1, kv_heads) or not (torch.isfinite(scale) & (scale > 0)).all():
        raise WeightMismatch(f"{name}: expected 1 or {kv_heads} positive numbers, found {scale.flatten()[:_SHOWN].tolist()}")
    return scale.flatten().float()


def _stack(param: Param, pieces: Iterable[Tensor], dtype: torch.dtype, device: torch.device) -> Tensor:
    stacked, row = torch.empty(param.shape, dtype=dtype, device=device), 0
    for piece in pieces:
        stacked[row : row + piece.shape[0]].copy_(piece)
        row += piece.shape[0]
    return stacked


def _invent(param: Param, dtype: torch.dtype, device: torch.device) -> Tensor:
    return _stack(param, (_invent_piece(piece, dtype, device) for piece in param.pieces), dtype, device)


def _invent_piece(piece: Piece, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Norms are one; the rest is normal with variance 1 / fan-in, so that activations and logits stay near unit variance.

    Seeded by the tensor's name, so that two workers on the same kind of device invent the same model, and the ranks of one their parts.
    """
    if len(piece.shape) == 1 and piece.name.endswith("norm.weight"):
        return torch.ones(piece.held_shape, dtype=dtype, device=device)
    generator = torch.Generator(device).manual_seed(zlib.crc32(piece.name.encode()))
    whole = torch.randn(piece.shape, dtype=dtype, device=device, generator=generator)
    return whole[piece.part] / math.sqrt(piece.shape[-1])


class _Checkpoint:
    """The safetensors files of one folder: their headers, and their tensors mapped into memory as long as `files` is open."""

    def __init__(self, folder: Path, files: ExitStack) -> None:
        self._tensors: dict[str, Any] = {}      # tensor name → the open file that holds it (safetensors has no types)
        for path, announced in _files(folder).items():
            file = _open(path, files)
            names = set(file.keys())
            if lost := announced - names:
                raise WeightMismatch(f"{path}: the index promises {min(lost)} ({len(lost)} such) but the file lacks it")
            if twice := names & self._tensors.keys():
                raise WeightMismatch(f"{path}: {min(twice)} is in another file too")
            self._tensors |= dict.fromkeys(names, file)

    def compare(self, expected: dict[str, Piece], tied: bool) -> None:
        """Raises unless the files hold exactly the expected tensors, in types and shapes that can be served."""
        wrong = [f"{name}: expected {list(piece.shape)}, missing" for name, piece in expected.items() if name not in self._tensors]
        for name, file in self._tensors.items():
            header = file.get_slice(name)
            found = tuple(header.get_shape())
            if name not in expected:
                if not _HARMLESS.search(name) and not (tied and self._is_copy_of_embedding(name)):
                    wrong.append(f"{name}: unexpected, found {list(found)}")
            elif found != expected[name].shape:
                wrong.append(f"{name}: expected {list(expected[name].shape)}, found {list(found)}")
            elif header.get_dtype() not in _STORED_TYPES:
                raise UnsupportedModel(f"{name} is stored as {header.get_dtype()}; supported: {', '.join(sorted(_STORED_TYPES))}")
        if wrong:
            more = f"; and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
            raise WeightMismatch(f"{len(wrong)} tensors do not fit: {'; '.join(wrong[:_SHOWN])}{more}")

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def read(self, piece: Piece) -> Tensor:
        tensor: Tensor = self._tensors[piece.name].get_slice(piece.name)[piece.part]
        return tensor

    def read_whole(self, name: str) -> Tensor:
        tensor: Tensor = self._tensors[name].get_tensor(name)
        return tensor

    def _is_copy_of_embedding(self, name: str) -> bool:
        """Some checkpoints of tied models store the embedding twice; a *different* lm_head contradicts config.json."""
        embedding = "model.embed_tokens.weight"
        if name != "lm_head.weight" or embedding not in self._tensors:
            return False
        return torch.equal(self._tensors[name].get_tensor(name), self._tensors[embedding].get_tensor(embedding))


def _files(folder: Path) -> dict[Path, set[str]]:
    """The safetensors files to read, each with the tensors that the index promises in it (none without an index)."""
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if not index.exists():
        if not single.exists():
            raise WeightMismatch(f"{folder}: neither {single.name} nor {index.name} is there")
        return {single: set()}
    files: dict[Path, set[str]] = {}
    for tensor, shard in _weight_map(index).items():
        if Path(shard).name != shard:
            raise WeightMismatch(f"{index}: {shard!r} is not a file name of this folder")
        files.setdefault(folder / shard, set()).add(tensor)
    return files


class _Index(msgspec.Struct):
    weight_map: dict[str, str]


def _weight_map(index: Path) -> dict[str, str]:
    try:
        return msgspec.json.decode(index.read_bytes(), type=_Index).weight_map
    except msgspec.DecodeError as error:
        raise WeightMismatch(f"{index}: corrupt: {error}") from error


def _open(path: Path, files: ExitStack) -> Any:
    try:
        return files.enter_context(safe_open(path, framework="pt", device="cpu"))
    except FileNotFoundError as error:
        raise WeightMismatch(f"{path}: the file is missing") from error
    except (SafetensorError, OSError) as error:
        raise WeightMismatch(f"{path}: corrupt or unreadable: {error}") from error
