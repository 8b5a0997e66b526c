"""The model that comes with the package: it is whole, small, what its papers say, and its script makes such a folder."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from jinja2.sandbox import ImmutableSandboxedEnvironment
from safetensors import safe_open
from tokenizers import Tokenizer

from diptych.models.config import ModelConfig
from diptych.models.embedded import conversation, corpus
from diptych.models.embedded.corpus import Document, Kind
from diptych.models.embedded.path import embedded_model_path
from diptych.models.loader import load_weights

MAX_FOLDER_BYTES = 12_000_000
TEXTS = ["The for statement", "def f(x):\n    return x ** 2\n", "naïve — “quotes” 模型 🐍", " leading and trailing  ", "\ttab\r\n"]


@pytest.fixture(scope="module")
def folder() -> Path:
    return embedded_model_path()


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


@pytest.fixture(scope="module")
def papers(folder: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    return report


def test_the_folder_is_small(folder: Path) -> None:
    assert sum(file.stat().st_size for file in folder.iterdir()) <= MAX_FOLDER_BYTES


def test_weights_fit_the_config_and_are_finite(folder: Path, papers: dict[str, Any]) -> None:
    config = ModelConfig.from_folder(folder)
    weights = load_weights(folder, config, torch.float32, torch.device("cpu"))  # raises WeightMismatch where a shape differs
    assert all(torch.isfinite(tensor).all() for tensor in weights.leaves())
    with safe_open(folder / "model.safetensors", framework="pt") as stored:
        num_parameters = sum(stored.get_tensor(name).numel() for name in stored.keys())  # noqa: SIM118 (no mapping)
    assert num_parameters == papers["num_parameters"]


def test_the_tokenizer_fits_the_config(folder: Path, tokenizer: Tokenizer) -> None:
    config = ModelConfig.from_folder(folder)
    assert tokenizer.get_vocab_size() == config.vocab_size
    assert config.eos_token_ids == (tokenizer.token_to_id(conversation.EOS),)


@pytest.mark.parametrize("text", TEXTS)
def test_text_survives_the_tokenizer(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text).ids
    assert ids[0] == tokenizer.token_to_id(conversation.BOS)
    assert tokenizer.decode(ids) == text


def test_the_chat_template_says_what_training_said(folder: Path) -> None:
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    template = ImmutableSandboxedEnvironment().from_string(settings["chat_template"])
    roles = ("system", "user", "assistant", "user", "assistant")
    messages = [{"role": role, "content": f"text {index}"} for index, role in enumerate(roles)]
    names = {"bos_token": settings["bos_token"], "eos_token": settings["eos_token"]}
    assert template.render(messages=messages, **names) == conversation.chat([("text 1", "text 2"), ("text 3", "text 4")], "text 0")
    prompt = template.render(messages=messages[1:2], add_generation_prompt=True, **names)
    assert prompt == "<s><|user|>text 1</s><|assistant|>"


def test_the_recorded_loss_is_the_loss(folder: Path, tokenizer: Tokenizer, papers: dict[str, Any]) -> None:
    transformers = pytest.importorskip("transformers", reason="the recorded loss is recomputed with transformers")
    from diptych.models.embedded import train

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    assert model.dtype == torch.float32
    loss = train.held_out_loss(model, tokenizer, train.read_held_out_sample(folder))
    assert loss.num_tokens == papers["held_out_sample"]["num_tokens"]
    assert loss.nats_per_token == pytest.approx(papers["held_out_sample"]["nats_per_token"], abs=1e-3)
    assert papers["held_out"]["nats_per_token"] < 4.5  # noise over this vocabulary is ln(3072) = 8.03


def test_transformers_reads_the_tokenizer_and_template(folder: Path, tokenizer: Tokenizer) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is the oracle here")
    theirs = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    messages = [{"role": "user", "content": "What is the for statement?"}]
    prompt = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert prompt == "<s><|user|>What is the for statement?</s><|assistant|>"
    assert theirs(TEXTS[1])["input_ids"] == tokenizer.encode(TEXTS[1]).ids
    assert (theirs.bos_token, theirs.eos_token, theirs.pad_token) == (conversation.BOS, conversation.EOS, conversation.PAD)


@pytest.fixture(scope="module")
def documents() -> list[Document]:
    return corpus.documents()


def test_the_corpus_has_an_order_and_no_text_twice(documents: list[Document]) -> None:
    names = [document.name for document in documents]
    assert names == sorted(names)
    assert len({document.text for document in documents}) == len(documents)


def test_training_documents_share_no_paragraph_with_held_out_ones(documents: list[Document]) -> None:
    training, held_out = corpus.split(documents)
    paragraphs = {" ".join(paragraph.split()) for document in training for paragraph in document.text.split("\n\n")}
    assert len(held_out) > 100
    assert not [document.name for document in held_out for text in document.text.split("\n\n") if " ".join(text.split()) in paragraphs]


def test_an_answer_is_whole_paragraphs() -> None:
    text = "\n\n".join(f"{index} " + "word " * 60 for index in range(9))
    answer = conversation.shortened(text)
    assert 0 < len(answer) <= conversation.MAX_ANSWER_CHARS
    assert text.startswith(answer + "\n\n")


TEXTS_TO_LEARN = [Document(f"docstring/f{index}", Kind.DOCSTRING, f"f{index}", f"Return item {index} of it. " * 4) for index in range(20)]
TINY = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_layers": 2,
    "num_steps": 4,
    "tokens_per_step": 128,
    "row_tokens": 64,
}


def test_the_script_makes_the_same_loadable_folder_twice(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="the script trains transformers' Llama")
    from diptych.models.embedded import train

    recipe, one, two = train.Recipe(**TINY), tmp_path / "one", tmp_path / "two"
    reports = [train.train(folder, recipe, TEXTS_TO_LEARN[:16], TEXTS_TO_LEARN[16:], train.Progress()) for folder in (one, two)]
    assert reports[0]["held_out"] == reports[1]["held_out"]
    assert (one / "model.safetensors").read_bytes() == (two / "model.safetensors").read_bytes()
    weights = load_weights(one, ModelConfig.from_folder(one), torch.float32, torch.device("cpu"))
    assert next(iter(weights.leaves())).shape == (320, 32)


def test_a_killed_run_goes_on_from_its_last_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers", reason="the script trains transformers' Llama")
    from diptych.models.embedded import train

    recipe, training, held_out = train.Recipe(**TINY), TEXTS_TO_LEARN[:16], TEXTS_TO_LEARN[16:]
    monkeypatch.setattr(train, "EVALUATE_EVERY_STEPS", 2)
    with monkeypatch.context() as killed:
        judged = iter([train.HeldOutLoss(5.0, 2.0, 10)])
        killed.setattr(train, "held_out_loss", lambda *_: next(judged))  # the second evaluation ends the run
        with pytest.raises(StopIteration):
            train.train(tmp_path, recipe, training, held_out, train.Progress())
    progress = train.Progress.read(tmp_path)
    assert (progress.num_steps, progress.resumed_at_steps) == (2, [2])
    train.train(tmp_path, recipe, training, held_out, progress)
    report = json.loads((tmp_path / "training.json").read_text(encoding="utf-8"))
    assert report["training"]["num_steps"] == 4
    assert list(report["training"]["losses_by_step"]) == ["2", "4"]
    assert not (tmp_path / train.PROGRESS).exists()
