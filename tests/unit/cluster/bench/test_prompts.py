import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from diptych.cluster.bench.client import Address
from diptych.cluster.bench.endpoint import ModelCard
from diptych.cluster.bench.errors import PromptError, WorkloadError
from diptych.cluster.bench.prompts import PromptMaker, Words
from diptych.cluster.bench.workload import TimedRequest, Workload
from diptych.cluster.bench.writer import PromptMode, PromptSource, RequestWriter

WORDS = ["Ġred", "Ġgreen", "Ġblue", "Ġold", "Ġnew"]


def byte_level(*, bos: bool) -> Tokenizer:
    """Splits at spaces; the words above are one token, every other letter is one of its own."""
    vocab = {token: index for index, token in enumerate(["<s>", *"Ġabcdefghijklmnopqrstuvwxyz", *WORDS])}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="<s>", continuing_subword_prefix=""))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return tokenizer


def metaspace() -> Tokenizer:
    """As Llama 2's: a space is put before every text, which makes a token of the text's own first space."""
    vocab = {token: index for index, token in enumerate(["<s>", "▁", *(word.replace("Ġ", "▁") for word in WORDS)])}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="<s>", continuing_subword_prefix=""))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    return tokenizer


@pytest.mark.parametrize("tokens", [1, 511, 512, 513, 1024, 1500])
def test_exact_length_within_the_middle_of_the_vocabulary(tokens: int) -> None:
    ids = PromptMaker(1000, 512, (0,)).token_ids(3, TimedRequest(0, tokens, 1, (7, 8)))
    assert len(ids) == tokens
    assert 100 <= min(ids) <= max(ids) < 900


def test_equal_blocks_are_equal_tokens_and_nothing_else_is() -> None:
    prompts = PromptMaker(32_000, 512, (0,))
    first = prompts.token_ids(0, TimedRequest(0, 1400, 1, (5, 6, 7)))
    second = prompts.token_ids(1, TimedRequest(0, 2000, 1, (5, 6, 8, 9)))
    assert first[:1024] == second[:1024]
    assert first[1024:1400] != second[1024:1400]
    own = [prompts.token_ids(index, TimedRequest(0, 64, 1)) for index in range(20)]
    assert len(set(map(tuple, own))) == 20


def test_seed_and_salt_decide() -> None:
    request = TimedRequest(0, 600, 1, (5,))
    assert PromptMaker(1000, 512, (1, 0)).token_ids(0, request) == PromptMaker(1000, 512, (1, 0)).token_ids(0, request)
    assert PromptMaker(1000, 512, (1, 0)).token_ids(0, request) != PromptMaker(1000, 512, (1, 1)).token_ids(0, request)


def test_too_small_a_vocabulary() -> None:
    with pytest.raises(PromptError, match="a vocabulary of 1 "):
        PromptMaker(1, 0, (0,))


@pytest.mark.parametrize("tokenizer", [byte_level(bos=False), byte_level(bos=True), metaspace()])
def test_texts_have_the_tokens_asked_for(tokenizer: Tokenizer) -> None:
    words = Words(tokenizer, "made")
    prompts = PromptMaker(len(words), 0, (0,), keep_ends=True)
    assert len(words) == len(WORDS)
    for tokens in (2, 3, 10, 300):
        text = words.text(prompts.token_ids(tokens, TimedRequest(0, tokens, 1)))
        assert len(tokenizer.encode(text).ids) == tokens


def test_a_tokenizer_without_words_is_refused() -> None:
    with pytest.raises(PromptError, match="0 words"):
        Words(Tokenizer(models.WordLevel({"a": 0}, unk_token="a")), "made")


def body_of(raw: bytes) -> dict:
    return json.loads(raw.split(b"\r\n\r\n", 1)[1])


def writer(source: PromptSource, card: ModelCard | None = None) -> RequestWriter:
    return RequestWriter(Address.parse("http://host:1", "key"), card or ModelCard("m", 4096, 1000), source)


def test_the_request_for_token_ids() -> None:
    raw = writer(PromptSource()).write(Workload("w", (TimedRequest(0, 12, 3),)), salt=0)[0]
    assert raw.startswith(b"POST /v1/completions HTTP/1.1\r\n")
    assert b"\r\nAuthorization: Bearer key\r\n" in raw
    body = body_of(raw)
    assert len(body.pop("prompt")) == 12
    assert body == {
        "model": "m", "max_tokens": 3, "temperature": 0.0, "ignore_eos": True, "stream": True, "stream_options": {"include_usage": True}
    }


def test_the_requests_for_text_and_chat(tmp_path: Path) -> None:
    tokenizer = byte_level(bos=False)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    workload = Workload("w", (TimedRequest(0, 12, 3),))
    text = body_of(writer(PromptSource(PromptMode.TEXT, tokenizer=tmp_path)).write(workload, salt=0)[0])["prompt"]
    raw = writer(PromptSource(PromptMode.CHAT, tokenizer=tmp_path)).write(workload, salt=0)[0]
    assert raw.startswith(b"POST /v1/chat/completions ")
    assert body_of(raw)["messages"] == [{"role": "user", "content": text}]
    assert len(tokenizer.encode(text).ids) == 12


def test_vocabulary_from_option_then_endpoint_then_tokenizer(tmp_path: Path) -> None:
    byte_level(bos=False).save(str(tmp_path / "tokenizer.json"))
    workload = Workload("w", (TimedRequest(0, 500, 3),))

    def highest(source: PromptSource, card: ModelCard) -> int:
        return max(body_of(writer(source, card).write(workload, salt=0)[0])["prompt"])

    assert highest(PromptSource(vocab_size=10), ModelCard("m", vocab_size=1000)) < 9
    assert 500 < highest(PromptSource(tokenizer=tmp_path), ModelCard("m", vocab_size=1000)) < 900
    assert highest(PromptSource(tokenizer=tmp_path), ModelCard("m")) < 33
    with pytest.raises(PromptError, match="give --vocab-size or --tokenizer"):
        writer(PromptSource(), ModelCard("m"))
    with pytest.raises(PromptError, match="need --tokenizer"):
        writer(PromptSource(PromptMode.CHAT))
    with pytest.raises(PromptError, match="cannot be read as a tokenizer"):
        writer(PromptSource(PromptMode.CHAT, tokenizer=tmp_path / "absent"))


def test_too_small_a_context_is_told_before_the_load() -> None:
    with pytest.raises(WorkloadError, match="has 120 tokens, 'm' takes 100: give --max-context 100"):
        writer(PromptSource(), ModelCard("m", 100, 1000)).write(Workload("w", (TimedRequest(0, 100, 20),)), salt=0)
