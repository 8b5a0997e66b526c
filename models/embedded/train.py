"""How the embedded model was made: `python -m diptych.models.embedded.train --out DIR` (needs the test extra: transformers).

    documents → split → byte-level BPE on the training part → epochs of plain text and chats, cut into rows
    → Llama, bf16 autocast on one CPU thread; Muon for the matrices of the layers, AdamW for embedding and norms
    → first all documents alike, then, as the learning rate falls, mostly what the demo's user will ask about
    → float16 safetensors, read back, and judged on the held-out documents, each from its start
    → training.json: every figure measured in this run

Seeded throughout: the same Python, the same torch and the same CPU give the same model. A run that was killed goes on with `--resume`
from its last evaluation: with the float16 weights stored there, the same text, and optimizers that begin anew (so not bit for bit).
"""

import argparse
import json
import math
import platform
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM

from . import conversation, corpus
from .conversation import ASSISTANT, BOS, EOS, PAD, SPECIAL_TOKENS, SYSTEM, USER
from .corpus import Document

MAX_POSITIONS = 2048
SAMPLE_DOCUMENTS = 24  # held-out documents shipped beside the model, so that anybody can recompute a loss
EVALUATE_EVERY_STEPS = 125
PROGRESS = "progress.json"  # there as long as a run is unfinished


@dataclass(frozen=True, slots=True)
class Recipe:
    vocab_size: int = 3072
    hidden_size: int = 256
    intermediate_size: int = 640
    num_layers: int = 6
    num_heads: int = 8
    num_kv_heads: int = 4
    seed: int = 20
    num_steps: int = 1150
    decay_steps: int = 400  # the last ones: focused text, learning rate linear to zero
    tokens_per_step: int = 4096
    row_tokens: int = 512
    long_row_share: float = 0.05  # the last steps use rows of MAX_POSITIONS, so that late positions are trained too
    muon_lr: float = 0.02
    adamw_lr: float = 0.004
    warmup_steps: int = 40
    weight_decay: float = 0.05

    def lr_scale(self, step: int, first_step: int) -> float:
        return min(1.0, (step - first_step + 1) / self.warmup_steps, (self.num_steps - step) / self.decay_steps)

    def is_focused(self, step: int) -> bool:
        return step >= self.num_steps - self.decay_steps

    def row_tokens_at(self, step: int) -> int:
        is_long = step >= self.num_steps * (1 - self.long_row_share)
        return min(MAX_POSITIONS, self.tokens_per_step) if is_long else self.row_tokens


@dataclass(slots=True)
class Progress:
    """How far a run has come: what progress.json holds."""

    num_steps: int = 0
    wall_s: float = 0.0
    resumed_at_steps: list[int] = field(default_factory=list)
    losses_by_step: dict[str, dict[str, float]] = field(default_factory=dict)  # nats per token: "training" (last batch), "held_out"

    @classmethod
    def read(cls, folder: Path) -> "Progress":
        progress = cls(**json.loads((folder / PROGRESS).read_text(encoding="utf-8")))
        progress.resumed_at_steps.append(progress.num_steps)
        return progress

    def write(self, folder: Path) -> None:
        (folder / PROGRESS).write_text(json.dumps(asdict(self)), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the embedded model anew.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; made if missing")
    parser.add_argument("--resume", action="store_true", help="go on with the unfinished run in the folder")
    arguments = parser.parse_args()
    training, held_out = corpus.split(corpus.documents())
    progress = Progress.read(arguments.out) if arguments.resume else Progress()
    train(arguments.out, Recipe(), training, held_out, progress)


def train(
    folder: Path, recipe: Recipe, training: Sequence[Document], held_out: Sequence[Document], progress: Progress
) -> dict[str, object]:
    """Writes the whole model folder and returns what training.json says."""
    torch.set_num_threads(1)
    torch.manual_seed(recipe.seed)
    folder.mkdir(parents=True, exist_ok=True)
    if progress.num_steps == 0:
        write_tokenizer(folder, train_tokenizer([document.text for document in training], recipe.vocab_size))
        write_model(folder, build_model(recipe), recipe)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    fit(model, recipe, tokenizer, training, held_out, folder, progress)
    write_held_out_sample(folder, held_out[:: max(1, len(held_out) // SAMPLE_DOCUMENTS)])
    report = measured(folder, recipe, tokenizer, training, held_out) | {
        "num_tokens_seen": progress.num_steps * recipe.tokens_per_step,
        "training": asdict(progress),
    }
    (folder / "training.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (folder / PROGRESS).unlink()
    return report


# The tokenizer


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=list(SPECIAL_TOKENS), initial_alphabet=sorted(alphabet), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, SPECIAL_TOKENS.index(BOS))])
    return tokenizer


def write_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": MAX_POSITIONS,
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "additional_special_tokens": [SYSTEM, USER, ASSISTANT],
        "clean_up_tokenization_spaces": False,
        "chat_template": conversation.CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


# The model


def config_of(recipe: Recipe) -> dict[str, object]:
    """config.json. The weights are stored as float16 and meant to be computed in float32: hence the dtype."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": recipe.vocab_size,
        "hidden_size": recipe.hidden_size,
        "intermediate_size": recipe.intermediate_size,
        "num_hidden_layers": recipe.num_layers,
        "num_attention_heads": recipe.num_heads,
        "num_key_value_heads": recipe.num_kv_heads,
        "head_dim": recipe.hidden_size // recipe.num_heads,
        "hidden_act": "silu",
        "max_position_embeddings": MAX_POSITIONS,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-5,
        "initializer_range": 0.02,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": SPECIAL_TOKENS.index(BOS),
        "eos_token_id": SPECIAL_TOKENS.index(EOS),
        "pad_token_id": SPECIAL_TOKENS.index(PAD),
        "torch_dtype": "float32",
    }


def build_model(recipe: Recipe) -> LlamaForCausalLM:
    model = LlamaForCausalLM(LlamaConfig.from_dict(config_of(recipe)))
    residual_scale = 1 / math.sqrt(2 * recipe.num_layers)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.mul_(residual_scale)
            layer.mlp.down_proj.weight.mul_(residual_scale)
    return model


def write_model(folder: Path, model: LlamaForCausalLM, recipe: Recipe) -> None:
    tensors = {name: tensor.to(torch.float16).contiguous() for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)  # safetensors leaves it to its owner alone, and a wheel would keep that
    (folder / "config.json").write_text(json.dumps(config_of(recipe), indent=2) + "\n", encoding="utf-8")
    generation = {name: config_of(recipe)[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")


# Training


def fit(
    model: LlamaForCausalLM,
    recipe: Recipe,
    tokenizer: Tokenizer,
    training: Sequence[Document],
    held_out: Sequence[Document],
    folder: Path,
    progress: Progress,
) -> None:
    """The steps that are left; every EVALUATE_EVERY_STEPS the held-out loss is measured and model and progress are written."""
    started_s = time.monotonic() - progress.wall_s
    for loss in optimizer_steps(model, recipe, tokenizer, training, progress.num_steps):
        progress.num_steps += 1
        if progress.num_steps % EVALUATE_EVERY_STEPS == 0 or progress.num_steps == recipe.num_steps:
            judged = held_out_loss(model, tokenizer, held_out)
            progress.losses_by_step[str(progress.num_steps)] = {"training": round(loss, 4), "held_out": round(judged.nats_per_token, 4)}
            progress.wall_s = round(time.monotonic() - started_s)
            write_model(folder, model, recipe)
            progress.write(folder)
            print(f"step {progress.num_steps}/{recipe.num_steps}: {loss:.4f}, held out {judged.nats_per_token:.4f}", flush=True)


def optimizer_steps(
    model: LlamaForCausalLM, recipe: Recipe, tokenizer: Tokenizer, training: Sequence[Document], first_step: int
) -> Iterator[float]:
    """Makes one step at a time and tells its loss (nats per token, before the step)."""
    optimizers = optimizers_of(model, recipe)
    base_lrs = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    for step, batch in islice(enumerate(batches(recipe, tokenizer, training)), first_step, None):
        loss = loss_of(model, batch)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, lrs in zip(optimizers, base_lrs, strict=True):
            for group, lr in zip(optimizer.param_groups, lrs, strict=True):
                group["lr"] = lr * recipe.lr_scale(step, first_step)
            optimizer.step()
            optimizer.zero_grad()
        yield loss.item()


def batches(recipe: Recipe, tokenizer: Tokenizer, training: Sequence[Document]) -> Iterator[torch.Tensor]:
    """One [rows, tokens] a step."""
    broad, focused = (
        token_stream(partial(epoch, training), tokenizer, random.Random(recipe.seed))
        for epoch in (conversation.broad_epoch, conversation.focused_epoch)
    )
    for step in range(recipe.num_steps):
        tokens = focused if recipe.is_focused(step) else broad
        yield torch.tensor(list(islice(tokens, recipe.tokens_per_step))).view(-1, recipe.row_tokens_at(step))


def token_stream(epoch: Callable[[random.Random], Iterator[str]], tokenizer: Tokenizer, rng: random.Random) -> Iterator[int]:
    """Epoch after epoch, without end."""
    while True:
        for text in epoch(rng):
            yield from tokenizer.encode(text, add_special_tokens=False).ids


def optimizers_of(model: LlamaForCausalLM, recipe: Recipe) -> list[torch.optim.Optimizer]:
    matrices = [tensor for tensor in model.model.layers.parameters() if tensor.ndim == 2]
    others = [tensor for tensor in model.parameters() if not any(tensor is matrix for matrix in matrices)]
    return [
        torch.optim.Muon(matrices, lr=recipe.muon_lr, weight_decay=recipe.weight_decay),
        torch.optim.AdamW(others, lr=recipe.adamw_lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]


def loss_of(model: LlamaForCausalLM, batch: torch.Tensor) -> torch.Tensor:
    """Mean loss in nats of every token but each row's first. batch: [rows, tokens]."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=batch[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())


# Measuring


@dataclass(frozen=True, slots=True)
class HeldOutLoss:
    nats_per_token: float
    bits_per_byte: float
    num_tokens: int


def held_out_loss(model: LlamaForCausalLM, tokenizer: Tokenizer, held_out: Sequence[Document]) -> HeldOutLoss:
    """Each document as plain text from its start to its </s>, the first MAX_POSITIONS tokens of it; in the model's own dtype."""
    nats, num_tokens, num_bytes = 0.0, 0, 0
    for document in held_out:
        ids = tokenizer.encode(conversation.plain(document.text), add_special_tokens=False).ids[:MAX_POSITIONS]
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([ids[:-1]]), use_cache=False).logits[0]
        nats += torch.nn.functional.cross_entropy(logits.float(), torch.tensor(ids[1:]), reduction="sum").item()
        num_tokens += len(ids) - 1
        num_bytes += len(tokenizer.decode(ids).encode())
    return HeldOutLoss(nats / num_tokens, nats / math.log(2) / num_bytes, num_tokens)


def write_held_out_sample(folder: Path, sample: Sequence[Document]) -> None:
    texts = [{"name": document.name, "text": document.text} for document in sample]
    (folder / "held_out_sample.json").write_text(json.dumps(texts, indent=1) + "\n", encoding="utf-8")


def read_held_out_sample(folder: Path) -> list[Document]:
    entries = json.loads((folder / "held_out_sample.json").read_text(encoding="utf-8"))
    return [Document(entry["name"], corpus.Kind.DOCSTRING, entry["name"], entry["text"]) for entry in entries]


def measured(
    folder: Path, recipe: Recipe, tokenizer: Tokenizer, training: Sequence[Document], held_out: Sequence[Document]
) -> dict[str, object]:
    """The figures of the model as it lies in the folder, not as it was in memory."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "corpus_sha256": corpus.fingerprint([*training, *held_out]),
        "num_training_documents": len(training),
        "num_held_out_documents": len(held_out),
        "num_parameters": model.num_parameters(),
        "recipe": asdict(recipe),
        "held_out": asdict(held_out_loss(model, tokenizer, held_out)),
        "held_out_sample": asdict(held_out_loss(model, tokenizer, read_held_out_sample(folder))),
    }


if __name__ == "__main__":
    main()
