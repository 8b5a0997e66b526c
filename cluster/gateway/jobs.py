"""A parsed body → Job: prompts as tokens, sampling as the workers take it, and how the answer is to look. Raises BadRequest."""

import random
import secrets
import time
from collections.abc import Sequence

import msgspec
from msgspec import Struct

from ...messages.requests import SamplingParams, ServiceClass
from .bodies import MAX_CHOICES, ChatBody, ChatMessage, CompletionBody
from .errors import BadRequest
from .stops import StopStrings
from .tiers import CLASS_OF_TIER, told_tier
from .tokenizer import TextModel

DEFAULT_COMPLETION_TOKENS = 16
MAX_PROMPT_LOGPROBS = 250_000
"""Of one prompt, alternatives included. They travel in one message, which has a limit: a quarter of it is taken here. And of all choices:
they come together, and are written in one go, for which all other clients wait."""

SEED_MASK = (1 << 63) - 1


class JobPrompt(Struct, frozen=True):
    token_ids: tuple[int, ...]
    text: str | None                          # as the client sent it; None: it sent tokens


class Job(Struct, frozen=True):
    response_id: str
    created: int                              # seconds since 1970
    prompts: tuple[JobPrompt, ...]
    num_prompt_tokens: int                    # of all prompts
    n: int                                    # choices per prompt; choice j of prompt i has index i * n + j
    sampling: SamplingParams                  # of the first choice of each prompt
    is_open: bool                             # the client has not said how many tokens may come
    stops: StopStrings
    include_stop: bool
    echo: bool
    stream: bool
    include_usage: bool
    service_tier: str = "default"             # as the answer tells it

    @property
    def service_class(self) -> ServiceClass:
        return CLASS_OF_TIER[self.service_tier]

    @property
    def num_choices(self) -> int:
        return len(self.prompts) * self.n

    @property
    def min_tokens(self) -> int:
        """Of all choices: their prompts."""
        return self.n * self.num_prompt_tokens

    @property
    def max_tokens(self) -> int:
        """Of all choices, prompts included."""
        return self.min_tokens + self.num_choices * self.sampling.max_tokens

    def prompt_of(self, index: int) -> JobPrompt:
        return self.prompts[index // self.n]

    def sampling_of(self, index: int) -> SamplingParams:
        if index % self.n == 0:
            return self.sampling
        return msgspec.structs.replace(self.sampling, seed=(self.sampling.seed + index % self.n) & SEED_MASK)


class JobMaker:
    def __init__(self, model: TextModel, model_name: str) -> None:
        self._model = model
        self._model_name = model_name
        self._random = random.Random()        # seeds are no secrets

    async def completion(self, body: CompletionBody, max_model_len: int) -> Job:
        given = _separate(body.prompt)
        _check_choices(len(given), body.n or 1)
        prompts = await self._prompts(given, body.add_special_tokens)
        max_tokens = DEFAULT_COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
        if max_tokens == 0 and not body.echo:
            raise BadRequest("max_tokens must be at least 1 (0 only with echo)", param="max_tokens")
        sampling = self._sampling(body, max_tokens, body.logprobs, body.logprobs if body.echo else None)
        _check_prompt_logprobs((body.n or 1) * sum([len(prompt.token_ids) for prompt in prompts]), sampling.prompt_logprobs)
        return _job("cmpl", body, prompts, sampling, max_model_len, echo=body.echo)

    async def chat(self, body: ChatBody, max_model_len: int) -> Job:
        if self._model.template is None:
            raise BadRequest(f"{self._model_name} has no chat template; use /v1/completions", code="no_chat_template")
        messages = [_plain(message) for message in body.messages]
        text = self._model.template.render(messages, body.add_generation_prompt, body.chat_template_kwargs or {})
        [prompt] = await self._prompts([text], body.add_special_tokens)
        max_tokens = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
        if max_tokens == 0:
            raise BadRequest("max_tokens must be at least 1", param="max_tokens")
        if is_open := max_tokens is None:
            max_tokens = max(1, max_model_len - len(prompt.token_ids))
        sampling = self._sampling(body, max_tokens, (body.top_logprobs or 0) if body.logprobs else None, None)
        return _job("chatcmpl", body, [prompt], sampling, max_model_len, is_open=is_open)

    async def _prompts(self, given: Sequence[str | list[int]], add_special_tokens: bool) -> list[JobPrompt]:
        if not given or not all(given):
            raise BadRequest("the prompt is empty", param="prompt")
        texts = [each for each in given if isinstance(each, str)]
        encoded = iter(await self._model.encode(texts, add_special_tokens=add_special_tokens))
        prompts = [JobPrompt(next(encoded), each) if isinstance(each, str) else JobPrompt(tuple(each), None) for each in given]
        for prompt in prompts:
            if not prompt.token_ids:
                raise BadRequest("the prompt has no tokens", param="prompt")
            if prompt.text is None or self._model.num_tokens > self._model.vocab_size:
                self._check_tokens(prompt.token_ids, "prompt")
        return prompts

    def _check_tokens(self, token_ids: Sequence[int], param: str) -> None:
        if token_ids and (highest := max(token_ids)) >= self._model.vocab_size:
            raise BadRequest(f"{param}: token id {highest} is not in the vocabulary of {self._model.vocab_size}", param=param)

    def _sampling(
        self, body: CompletionBody | ChatBody, max_tokens: int, logprobs: int | None, prompt_logprobs: int | None
    ) -> SamplingParams:
        stop_token_ids, logit_bias = body.stop_token_ids or [], body.logit_bias or {}
        self._check_tokens(stop_token_ids, "stop_token_ids")
        self._check_tokens(list(logit_bias), "logit_bias")
        min_tokens = body.min_tokens or 0
        if min_tokens > max_tokens:
            raise BadRequest(f"min_tokens {min_tokens} is more than max_tokens {max_tokens}", param="min_tokens")
        eos = () if body.ignore_eos else self._model.eos_token_ids
        stops = tuple(dict.fromkeys((*eos, *stop_token_ids)))
        if min_tokens and len(stops) >= self._model.vocab_size:
            raise BadRequest(f"stop_token_ids: with min_tokens {min_tokens} some token must not stop", param="stop_token_ids")
        return SamplingParams(
            max_tokens=max_tokens,
            seed=(self._random.getrandbits(63) if body.seed is None else body.seed) & SEED_MASK,
            temperature=_or(body.temperature, 1.0),
            top_k=min(max(0, body.top_k or 0), self._model.vocab_size),      # a larger one need not fit into a message
            top_p=_or(body.top_p, 1.0),
            min_p=_or(body.min_p, 0.0),
            repetition_penalty=_or(body.repetition_penalty, 1.0),
            presence_penalty=_or(body.presence_penalty, 0.0),
            frequency_penalty=_or(body.frequency_penalty, 0.0),
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            min_tokens=min_tokens,
            stop_token_ids=stops,
            ignore_eos=body.ignore_eos,
            logit_bias=logit_bias,
        )


def _job(
    prefix: str,
    body: CompletionBody | ChatBody,
    prompts: Sequence[JobPrompt],
    sampling: SamplingParams,
    max_model_len: int,
    *,
    echo: bool = False,
    is_open: bool = False,
) -> Job:
    num_tokens = [len(prompt.token_ids) for prompt in prompts]
    for each in num_tokens:
        _check_context(each, sampling.max_tokens, max_model_len)
    return Job(
        response_id=f"{prefix}-{secrets.token_hex(12)}",
        created=int(time.time()),
        prompts=tuple(prompts),
        num_prompt_tokens=sum(num_tokens),
        n=body.n or 1,
        sampling=sampling,
        is_open=is_open,
        stops=StopStrings(body.stop or ()),
        include_stop=body.include_stop_str_in_output,
        echo=echo,
        stream=bool(body.stream),
        include_usage=bool(body.stream_options and body.stream_options.include_usage),
        service_tier=told_tier(body.service_tier),
    )


def _check_context(num_prompt_tokens: int, max_tokens: int, max_model_len: int) -> None:
    if num_prompt_tokens + max_tokens > max_model_len:
        raise BadRequest(
            f"the context is {max_model_len} tokens, but {num_prompt_tokens + max_tokens} are asked for: "
            f"{num_prompt_tokens} of the prompt and {max_tokens} to come (max_tokens)",
            param="max_tokens",
            code="context_length_exceeded",
        )


def _check_choices(num_prompts: int, n: int) -> None:
    """Before the prompts are tokenized, which takes long if there are many."""
    if num_prompts * n > MAX_CHOICES:
        raise BadRequest(f"{num_prompts} prompts of {n} choices are more than {MAX_CHOICES} choices in one request", param="n")


def _check_prompt_logprobs(num_prompt_tokens: int, num_top: int | None) -> None:
    if num_top is not None and num_prompt_tokens * (num_top + 1) > MAX_PROMPT_LOGPROBS:
        wanted = f"{num_prompt_tokens} prompt tokens of all choices with {num_top} alternatives each"
        raise BadRequest(f"logprobs: {wanted} are over {MAX_PROMPT_LOGPROBS} log-probabilities of prompts (echo)", param="logprobs")


def _separate(prompt: str | list[str] | list[int] | list[list[int]]) -> Sequence[str | list[int]]:
    if isinstance(prompt, str):
        return [prompt]
    token_ids = [each for each in prompt if isinstance(each, int)]
    return [token_ids] if token_ids else [each for each in prompt if not isinstance(each, int)]


def _plain(message: ChatMessage) -> dict[str, object]:
    """As templates know messages: text content; OpenAI's newer "developer" is "system"."""
    plain = message.model_dump(exclude_none=True)
    if isinstance(message.content, list):
        plain["content"] = "\n".join(part.text for part in message.content)
    elif message.content is None:             # beside calls, templates ask whether it is None; elsewhere they add it to text
        plain["content"] = None if plain.get("tool_calls") else ""
    if message.role == "developer":
        plain["role"] = "system"
    return plain


def _or(value: float | None, default: float) -> float:
    return default if value is None else value
