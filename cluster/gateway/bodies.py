"""What a client may send, by pydantic. Unknown fields are ignored, as OpenAI does; a wrong type or a number out of range is a 400 that
names the field; what would change the answer but is not built (tools, JSON mode, suffix) is refused, never dropped.

All that is validated holds up every other client. So lists end at their first mistake, of millions that there may be, and have an end.
"""

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, ValidationError
from pydantic_core import ErrorDetails

from ...messages.requests import MAX_LOGPROBS
from .errors import BadRequest

MAX_STOPS = 16
MAX_STOP_CHARS = 1024
MAX_N = 128
MAX_CHOICES = 1024              # of all prompts
MAX_PROMPT_TOKENS = 1 << 20
MAX_MESSAGES = 1 << 14          # of a chat, and parts of a message
MAX_BIAS = 100

Body = TypeVar("Body", bound="_Common")

Token = Annotated[int, Field(ge=0)]
Tokens = Annotated[list[Token], Field(max_length=MAX_PROMPT_TOKENS, fail_fast=True)]
Stop = Annotated[str, StringConstraints(min_length=1, max_length=MAX_STOP_CHARS)]
Stops = Annotated[list[Stop], Field(max_length=MAX_STOPS, fail_fast=True)]
OffFlag = Annotated[bool, BeforeValidator(lambda value: value is not None and value)]           # null means what leaving it out does
OnFlag = Annotated[bool, BeforeValidator(lambda value: value is None or value)]


def _one_as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _bias(value: Any) -> Any:
    """JSON has no integer keys."""
    if not isinstance(value, dict):
        return value
    try:
        biases = {int(key): bias for key, bias in value.items()}
    except ValueError:
        raise ValueError(f"keys must be token ids, got {', '.join(repr(key[:20]) for key in list(value)[:3])}") from None
    for token_id, bias in biases.items():
        if token_id < 0 or type(bias) not in (int, float) or not -MAX_BIAS <= bias <= MAX_BIAS:
            raise ValueError(f"biases are numbers from -{MAX_BIAS} to {MAX_BIAS} of token ids, not {str(bias)[:20]} of {token_id}")
    return biases


class _Model(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)


class StreamOptions(_Model):
    include_usage: bool | None = None


class _Unbuilt(_Model):
    """What vLLM knows and would change the answer. Refused, unless it asks for nothing."""

    allowed_token_ids: Any = None
    bad_words: Any = None
    chat_template: Any = None
    continue_final_message: Any = None
    documents: Any = None
    guided_choice: Any = None
    guided_grammar: Any = None
    guided_json: Any = None
    guided_regex: Any = None
    logits_processors: Any = None
    prompt_embeds: Any = None
    prompt_logprobs: Any = None
    return_token_ids: Any = None
    return_tokens_as_token_ids: Any = None
    structured_outputs: Any = None
    truncate_prompt_tokens: Any = None
    use_beam_search: Any = None


class _Always(_Model):
    """What vLLM does unless it is told not to, and this gateway always does."""

    detokenize: Any = None
    skip_special_tokens: Any = None


_UNBUILT, _ALWAYS = _Unbuilt.model_fields.keys(), _Always.model_fields.keys()


class _Common(_Unbuilt, _Always):
    model: str
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_N)] | None = None
    stop: Annotated[Stops, BeforeValidator(_one_as_list)] | None = None
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=2)] | None = None      # logits are divided by it, and must stay finite
    logit_bias: Annotated[dict[int, float], BeforeValidator(_bias)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    service_tier: Literal["auto", "default", "priority", "flex", "batch"] | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    ignore_eos: OffFlag = False
    stop_token_ids: Tokens | None = None
    include_stop_str_in_output: OffFlag = False
    response_format: dict[str, Any] | None = None


class CompletionBody(_Common):
    prompt: (
        str
        | Annotated[list[str], Field(max_length=MAX_CHOICES, fail_fast=True)]
        | Tokens
        | Annotated[list[Tokens], Field(max_length=MAX_CHOICES, fail_fast=True)]
    )
    suffix: str | None = None
    best_of: int | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    echo: OffFlag = False
    add_special_tokens: OnFlag = True


class TextPart(_Model):
    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    """Further fields (name, tool_calls, …) are the template's to read."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[TextPart], Field(max_length=MAX_MESSAGES, fail_fast=True)] | None = None


class ChatBody(_Common):
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    functions: list[Any] | None = None
    add_special_tokens: OffFlag = False
    add_generation_prompt: OnFlag = True
    chat_template_kwargs: dict[str, Any] | None = None
    echo: Any = None
    modalities: Any = None


def parse(body: bytes, into: type[Body]) -> Body:
    """Raises BadRequest."""
    try:
        return into.model_validate_json(body)
    except ValidationError as error:
        errors = error.errors(include_url=False, include_context=False, include_input=False)
    raise _bad_request(max(errors, key=lambda each: len(each["loc"])))           # of a union's alternatives, the one that came furthest


def refuse_unsupported(body: CompletionBody | ChatBody) -> None:
    """Raises BadRequest for what is known, valid and not built, and for fields that contradict each other."""
    if body.stream_options is not None and not body.stream:
        raise BadRequest("stream_options is only allowed when stream is true", param="stream_options")
    for name in [] if _UNBUILT.isdisjoint(body.model_fields_set) else _UNBUILT:
        if (value := getattr(body, name)) is not None and value is not False and value != [] and value != {}:
            raise BadRequest(f"{name} is not supported", param=name)
    for name in [] if _ALWAYS.isdisjoint(body.model_fields_set) else _ALWAYS:
        if (value := getattr(body, name)) is not None and value is not True:
            raise BadRequest(f"{name} is not supported unless it is true", param=name)
    if body.response_format is not None and (form := body.response_format.get("type")) != "text":
        raise BadRequest(f"response_format of type {form!r} is not supported, only 'text'", param="response_format")
    if isinstance(body, CompletionBody):
        if body.suffix:
            raise BadRequest("suffix is not supported: the model does not fill in the middle", param="suffix")
        if body.best_of is not None and body.best_of != (body.n or 1):
            raise BadRequest(f"best_of {body.best_of} is not supported unless it equals n ({body.n or 1})", param="best_of")
        return
    _refuse_unsupported_of_chat(body)


def _refuse_unsupported_of_chat(body: ChatBody) -> None:
    if body.echo:
        raise BadRequest("echo is not supported for chat", param="echo")
    if body.modalities not in (None, [], ["text"]):
        raise BadRequest("modalities: only ['text'] is supported", param="modalities")
    if (body.tools or body.functions) and body.tool_choice != "none":
        raise BadRequest("tools are not supported; tool_choice 'none' ignores them", param="tools" if body.tools else "functions")
    if body.tool_choice not in (None, "none", "auto"):
        raise BadRequest("tool_choice: tools are not supported, so none can be called", param="tool_choice")
    if body.top_logprobs and not body.logprobs:
        raise BadRequest("top_logprobs needs logprobs to be true", param="top_logprobs")


def _bad_request(error: ErrorDetails) -> BadRequest:
    if error["type"] == "json_invalid":
        return BadRequest(f"the body is not valid JSON: {error['msg'].removeprefix('Invalid JSON: ')}", code="invalid_json")
    fields = [str(part) for part in error["loc"]]
    if not fields:
        return BadRequest(f"the body must be a JSON object: {error['msg']}")
    if error["type"] == "missing":
        return BadRequest(f"{_path(error['loc'])} is required", param=fields[0])
    if fields[0] == "prompt":                 # of the four types, pydantic would name the first
        text = f"a list of token ids (at most {MAX_PROMPT_TOKENS}) or a list of lists of token ids (at most {MAX_CHOICES})"
        return BadRequest(f"prompt must be a string, a list of strings (at most {MAX_CHOICES}), {text}", param="prompt")
    return BadRequest(f"{_path(error['loc'])}: {error['msg']}", param=fields[0])


def _path(loc: tuple[int | str, ...]) -> str:
    """`messages[0].content`, without the names of types that pydantic puts between."""
    path = str(loc[0])
    for part in loc[1:]:
        if isinstance(part, int):
            path += f"[{part}]"
        elif part in ChatMessage.model_fields or part in TextPart.model_fields or part in StreamOptions.model_fields:
            path += f".{part}"
    return path
