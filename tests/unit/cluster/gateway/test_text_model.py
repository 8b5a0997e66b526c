"""Model folders as they come: templates in either place, special tokens in either form, files that are broken."""

import asyncio
import json
import threading

import pytest
from harness.gateway import ASSISTANT, BOS, EOS, USER, VOCAB_SIZE, make_model, tokens_of
from tokenizers import Tokenizer, processors

from diptych.cluster.gateway.chat_template import ChatTemplate
from diptych.cluster.gateway.errors import BadRequest
from diptych.cluster.gateway.tokenizer import INLINE_CHARS, INLINE_WORDS_CHARS, TextModel
from diptych.messages.errors import ModelError
from diptych.models.embedded.conversation import chat as embedded_chat
from diptych.models.embedded.path import embedded_model_path

HELLO = [{"role": "user", "content": "Hello"}]


def encode(model: TextModel, text: str, *, add_special_tokens: bool = False) -> tuple[int, ...]:
    [token_ids] = asyncio.run(model.encode([text], add_special_tokens=add_special_tokens))
    return token_ids


def test_special_names_in_a_text_are_special_tokens(tmp_path):
    assert encode(TextModel(make_model(tmp_path)), "<|user|>hi<|assistant|>") == (USER, *tokens_of("hi"), ASSISTANT)


def test_a_long_text_is_tokenized_elsewhere_to_the_same(tmp_path):
    text = "ä" * INLINE_CHARS
    assert encode(TextModel(make_model(tmp_path)), text) == tuple(text.encode())


@pytest.mark.parametrize(("letter", "limit"), [("ä", INLINE_CHARS), ("a", INLINE_WORDS_CHARS)])
def test_many_short_texts_are_tokenized_elsewhere_as_one_batch(tmp_path, monkeypatch, letter, limit):
    model = TextModel(make_model(tmp_path))
    elsewhere: list[int] = []

    def by_library(texts: list[str], add_special_tokens: bool) -> list[tuple[int, ...]]:
        if threading.current_thread() is not threading.main_thread():
            elsewhere.append(len(texts))
        return TextModel._by_library(model, texts, add_special_tokens)

    monkeypatch.setattr(model, "_by_library", by_library)
    for num_texts in (limit, limit + 1):
        assert asyncio.run(model.encode([letter] * num_texts, add_special_tokens=False)) == [tuple(tokens_of(letter))] * num_texts
    assert elsewhere == [limit + 1]


def test_what_is_put_around_a_text_is_known_though_the_vocabulary_lacks_it(tmp_path):
    """Or it would not be noticed that the model has no such token."""
    folder = make_model(tmp_path)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 300)])
    tokenizer.save(str(folder / "tokenizer.json"))
    model = TextModel(folder)
    assert encode(model, "hi", add_special_tokens=True) == (300, *tokens_of("hi"))
    assert (model.num_tokens, model.vocab_size) == (301, VOCAB_SIZE)


def test_truncation_and_padding_of_the_file_are_off(tmp_path):
    folder = make_model(tmp_path)
    file = json.loads((folder / "tokenizer.json").read_text())
    file["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    (folder / "tokenizer.json").write_text(json.dumps(file))
    assert len(encode(TextModel(folder), "abcdef")) == 6


@pytest.mark.parametrize(("eos", "expected"), [(EOS, (EOS,)), ([EOS, BOS], (EOS, BOS)), (None, (EOS,))])
def test_eos_is_that_of_generation_config_if_it_has_one(tmp_path, eos, expected):
    folder = make_model(tmp_path)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    assert TextModel(folder).eos_token_ids == expected


class TestTemplate:
    def test_a_file_goes_before_the_config(self, tmp_path):
        folder = make_model(tmp_path)
        (folder / "chat_template.jinja").write_text("file:{{ messages[0].content }}")
        assert TextModel(folder).template.render(HELLO) == "file:Hello"

    def test_of_named_ones_the_default(self, tmp_path):
        named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "{{ bos_token }}{{ eos_token }}"}]
        assert TextModel(make_model(tmp_path, chat_template=named)).template.render(HELLO) == "<s></s>"

    def test_none_is_none(self, tmp_path):
        assert TextModel(make_model(tmp_path, chat_template=None)).template is None

    def test_what_templates_expect(self):
        source = (
            "{% for m in messages %}\n"
            "    {% if m.role == 'system' %}{% continue %}{% endif %}\n"
            "{{ m.content | tojson }}{% generation %}[{{ strftime_now('%Y') | length }}]{% endgeneration %}\n"
            "{% endfor %}"
            "{% if add_generation_prompt %}>{% endif %}"
        )
        messages = [{"role": "system", "content": "x"}, {"role": "user", "content": "<ü & 'q'>"}]
        assert ChatTemplate(source, {}).render(messages) == "\"<ü & 'q'>\"[4]>"

    def test_the_client_tells_it_more_but_not_otherwise(self):
        template = ChatTemplate("{{ enable_thinking }}{{ messages[0].content }}{{ tools }}{% if add_generation_prompt %}>{% endif %}", {})
        further = {"enable_thinking": False, "messages": [], "tools": ["x"], "add_generation_prompt": False}
        assert template.render(HELLO, further=further) == "FalseHelloNone>"
        assert template.render(HELLO, opens=False, further=further) == "FalseHelloNone"

    def test_its_refusal_is_the_callers_mistake(self):
        template = ChatTemplate("{{ raise_exception('roles must alternate') }}", {})
        with pytest.raises(BadRequest, match="roles must alternate"):
            template.render(HELLO)

    @pytest.mark.parametrize("source", ["{{ messages[5].content + 1 }}", "{{ messages[0].content + 1 }}", "{{ 1 // 0 }}"])
    def test_its_failure_too(self, source):
        with pytest.raises(BadRequest, match="does not take these messages"):
            ChatTemplate(source, {}).render(HELLO)

    def test_it_is_in_a_sandbox(self):
        with pytest.raises(BadRequest, match="unsafe"):
            ChatTemplate("{{ messages.__class__.__mro__[1].__subclasses__() }}", {}).render(HELLO)
        with pytest.raises(BadRequest):
            ChatTemplate("{{ messages.append(1) }}", {}).render(HELLO)

    def test_a_broken_one_is_a_model_error(self):
        with pytest.raises(ModelError, match="chat template"):
            ChatTemplate("{% if %}", {})

    def test_the_embedded_models_is_what_it_was_trained_on(self):
        rendered = TextModel(embedded_model_path()).template.render([{"role": "system", "content": "Be brief."}, *HELLO])
        assert rendered == embedded_chat([("Hello", "")], "Be brief.").removesuffix("</s>")


@pytest.mark.parametrize(
    ("file", "content", "match"),
    [
        ("tokenizer.json", None, "tokenizer.json: cannot be read"),
        ("tokenizer.json", "{}", "tokenizer.json"),
        ("config.json", "{", "config.json"),
        ("config.json", '{"vocab_size": "many"}', "vocab_size"),
        ("tokenizer_config.json", "[]", "tokenizer_config.json"),
        ("tokenizer_config.json", '{"chat_template": 5}', "chat_template: Expected"),
        ("tokenizer_config.json", '{"chat_template": [{"name": 5}]}', "chat_template"),
    ],
)
def test_a_broken_folder_is_a_model_error_that_names_the_file(tmp_path, file, content, match):
    folder = make_model(tmp_path)
    (folder / file).unlink()
    if content is not None:
        (folder / file).write_text(content)
    with pytest.raises(ModelError, match=match):
        TextModel(folder)
