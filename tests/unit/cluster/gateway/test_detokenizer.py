import time

import pytest
from harness.gateway import BOS, EOS, make_model
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

from diptych.cluster.gateway.detokenizer import Utf8Stream, Vocabulary
from diptych.cluster.gateway.tokenizer import TextModel
from diptych.messages.errors import UnsupportedModel
from diptych.models.embedded.path import embedded_model_path

SENTENCEPIECE = {
    "type": "Sequence",
    "decoders": [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ],
}


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory) -> Vocabulary:
    return TextModel(make_model(tmp_path_factory.mktemp("model"))).vocabulary


def streamed(vocabulary: Vocabulary, token_ids: list[int]) -> list[str]:
    stream = Utf8Stream()
    return [*(stream.feed(vocabulary.token_bytes(token_id)) for token_id in token_ids), stream.end()]


@given(text=st.text())
def test_any_text_in_single_bytes_comes_out_whole(vocabulary, text):
    pieces = streamed(vocabulary, list(text.encode()))
    assert "".join(pieces) == text
    assert all(len(piece) <= 1 for piece in pieces)


@given(raw=st.binary())
def test_any_bytes_read_as_python_reads_them(vocabulary, raw):
    assert "".join(streamed(vocabulary, list(raw))) == raw.decode(errors="replace")


def test_an_incomplete_character_waits_and_shows_only_at_the_end(vocabulary):
    assert streamed(vocabulary, list("🙂".encode()[:3])) == ["", "", "", "�"]


def test_special_tokens_and_ids_without_a_token_add_nothing(vocabulary):
    assert streamed(vocabulary, [ord("a"), BOS, EOS, 9999, ord("b")]) == ["a", "", "", "", "b", ""]
    assert vocabulary.raw_bytes(EOS) == b"</s>"
    assert vocabulary.raw_bytes(9999) == b""


def test_the_cost_of_a_token_does_not_grow(vocabulary):
    def took(num_tokens: int) -> float:
        start = time.perf_counter()
        streamed(vocabulary, [0xC3] * num_tokens)                     # the worst: never a character
        return time.perf_counter() - start

    took(1000)
    assert min(took(32_000) for _ in range(3)) < 16 * 8 * min(took(2000) for _ in range(3))


@pytest.fixture(scope="module")
def pieces() -> Vocabulary:
    """As SentencePiece's are: "▁" for a space, and the bytes from id 5 on."""
    names = ["<unk>", "▁Hello", "▁world", "!", "lo▁wor", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, [], byte_fallback=True))
    return Vocabulary(tokenizer, SENTENCEPIECE, [{"id": 0, "content": "<unk>", "special": True}])


def test_pieces_continue_with_their_space(pieces):
    assert streamed(pieces, [1, 2, 3, 4]) == [" Hello", " world", "!", "lo wor", ""]


@given(text=st.text())
def test_pieces_fall_back_to_bytes(pieces, text):
    assert "".join(streamed(pieces, [5 + byte for byte in text.encode()])) == text


@pytest.mark.parametrize("decoder", [None, {"type": "WordPiece"}, {"type": "Sequence", "decoders": [{"type": "Fuse"}, {"type": "CTC"}]}])
def test_an_unknown_decoder_is_refused_by_name(decoder):
    with pytest.raises(UnsupportedModel, match=r"WordPiece|CTC|without a decoder"):
        Vocabulary(Tokenizer(models.BPE()), decoder, [])


def test_the_embedded_model_speaks_as_the_library_decodes():
    model = TextModel(embedded_model_path())
    tokenizer = Tokenizer.from_file(str(embedded_model_path() / "tokenizer.json"))
    text = "def grüße(x):\n    return '世界 🙂' + str(x)  # naïve\n"
    token_ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert "".join(streamed(model.vocabulary, token_ids)) == tokenizer.decode(token_ids) == text
