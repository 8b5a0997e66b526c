"""Messages → the model's prompt, by the model's own template, in Jinja's sandbox, with what such templates expect to find there."""

import json
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

import msgspec
from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ...messages.errors import ModelError
from .errors import BadRequest


class _Generation(Extension):
    """`{% generation %}` marks the assistant's words for training; here it is only a block."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """Raises ModelError for a source that is no template. `specials` are bos_token, eos_token, … as the template names them."""

    def __init__(self, source: str, specials: dict[str, str]) -> None:
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        self._specials = specials
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise ModelError(f"chat template: {error}") from None

    def render(self, messages: list[dict[str, Any]], opens: bool = True, further: Mapping[str, Any] = MappingProxyType({})) -> str:
        """`opens`: ends with the opening of the assistant's turn. `further`: what else the client tells the template, `enable_thinking`
        for example; what is told here anyway stays. Raises BadRequest for messages that the template does not take."""
        told = {"messages": messages, "add_generation_prompt": opens, "tools": None, "documents": None, **self._specials}
        try:
            return self._template.render({**further, **told})
        except (TemplateError, AttributeError, TypeError, ValueError, LookupError, ArithmeticError) as error:
            raise BadRequest(f"the model's chat template does not take these messages: {error}", param="messages") from None


class _Named(msgspec.Struct):
    name: str
    template: str


def load_template(folder: Path, tokenizer_config: dict[str, Any]) -> ChatTemplate | None:
    """From chat_template.jinja, or tokenizer_config.json (a string, or a list of named ones: "default")."""
    file = folder / "chat_template.jinja"
    source = file.read_text(encoding="utf-8") if file.is_file() else tokenizer_config.get("chat_template")
    try:
        given = msgspec.convert(source, str | list[_Named] | None)
    except msgspec.ValidationError as error:
        raise ModelError(f"{folder}/tokenizer_config.json: chat_template: {error}") from None
    if isinstance(given, list):
        given = next((each.template for each in given if each.name == "default"), None)
    return None if given is None else ChatTemplate(given, _special_tokens(tokenizer_config))


def _special_tokens(tokenizer_config: dict[str, Any]) -> dict[str, str]:
    """`"eos_token": "</s>"` or `"eos_token": {"content": "</s>", …}`."""
    specials = {}
    for key, value in tokenizer_config.items():
        content = value.get("content") if isinstance(value, dict) else value
        if key.endswith("_token") and isinstance(content, str):
            specials[key] = content
    return specials


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None) -> str:
    """Jinja's own escapes HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)
