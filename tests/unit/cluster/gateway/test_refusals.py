"""Every mistake that a caller can make: its status, the field it names, OpenAI's shape. Never a 500, and nothing reaches a worker."""

import json

import pytest
from harness.gateway import CONTEXT, MODEL, VOCAB_SIZE, House, in_loop
from pydantic import ValidationError

from diptych.cluster.gateway import jobs
from diptych.cluster.gateway.bodies import ChatBody, CompletionBody
from diptych.cluster.gateway.config import Limits

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "Hi"}]


async def refused(house: House, path: str, body: object, status: int = 400) -> dict:
    reply = await house.post(path, body)
    assert reply.status == status, reply.body
    assert reply.headers["content-type"] == "application/json"
    assert set(reply.json) == {"error"}
    assert set(reply.error) == {"message", "type", "param", "code"}
    assert reply.error["type"] == "invalid_request_error"
    assert not any(worker.received for worker in house.workers)
    assert house.core.dispatcher.num_running == house.core.dispatcher.num_queued == 0
    return reply.error


BOTH = [
    ("temperature", -0.1), ("temperature", 2.1), ("temperature", "hot"), ("temperature", True),
    ("top_p", 0), ("top_p", 1.1), ("top_k", -2), ("top_k", 1.5), ("min_p", -0.1), ("min_p", 1.1),
    ("max_tokens", -1), ("max_tokens", 0), ("max_tokens", 1.5), ("max_tokens", "many"), ("max_tokens", True),
    ("n", 0), ("n", -1), ("n", 129), ("seed", 1.5), ("seed", 1 << 63), ("seed", "x"),
    ("stop", 5), ("stop", [5]), ("stop", [""]), ("stop", ""), ("stop", ["x"] * 17),
    ("presence_penalty", 2.1), ("presence_penalty", -2.1), ("frequency_penalty", 3), ("repetition_penalty", 0),
    ("repetition_penalty", 1e-320),
    ("logit_bias", {"5": 101}), ("logit_bias", {"x": 1}), ("logit_bias", {"-1": 1}), ("logit_bias", {str(VOCAB_SIZE): 1}),
    ("stream", "yes"), ("stream_options", {"include_usage": True}), ("min_tokens", -1), ("min_tokens", 21), ("user", 5),
    ("stop_token_ids", [-1]), ("stop_token_ids", [VOCAB_SIZE]), ("stop_token_ids", 5), ("ignore_eos", "no"),
    ("stop", "x" * 1025), ("logit_bias", {"5": True}), ("logit_bias", {"5": "1"}), ("logit_bias", {"5": None}),
    ("guided_json", {"type": "object"}), ("guided_choice", ["a"]), ("structured_outputs", {"regex": "a"}), ("bad_words", ["a"]),
    ("skip_special_tokens", False), ("detokenize", False), ("return_token_ids", True), ("return_tokens_as_token_ids", True),
    ("logits_processors", ["f"]), ("prompt_embeds", "AAAA"), ("skip_special_tokens", "no"),
    ("response_format", {"type": "json_object"}), ("prompt_logprobs", 0), ("use_beam_search", True),
]  # fmt: skip


@pytest.mark.parametrize(("field", "value"), BOTH)
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@in_loop
async def test_a_field_of_both(tmp_path, path, field, value):
    async with House(tmp_path) as house:
        body = {"max_tokens": 20} | ({"prompt": "Hi"} if path == COMPLETIONS else {"messages": MESSAGES}) | {field: value}
        error = await refused(house, path, body)
        assert error["param"] == field
        assert field in error["message"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "prompt"),
        *(({"prompt": wrong}, "prompt") for wrong in (None, "", [], [""], [[]], 5, {}, ["a", 5], [1.5], [-1], [VOCAB_SIZE], [[1], "a"])),
        *(({"prompt": "Hi", "logprobs": wrong}, "logprobs") for wrong in (-1, 21, True)),
        ({"prompt": "Hi", "suffix": "end"}, "suffix"),
        ({"prompt": "Hi", "best_of": 2}, "best_of"),
        ({"prompt": "Hi", "echo": "yes"}, "echo"),
        ({"prompt": ["a"] * 100, "n": 11}, "n"),
    ],
)
@in_loop
async def test_a_field_of_completions(tmp_path, body, param):
    async with House(tmp_path) as house:
        error = await refused(house, COMPLETIONS, body)
        assert error["param"] == param
        assert param in error["message"]


@pytest.mark.parametrize(
    ("body", "param", "text"),
    [
        ({}, "messages", "required"),
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": "Hi"}, "messages", "messages"),
        ({"messages": [{"content": "Hi"}]}, "messages", "messages[0].role is required"),
        ({"messages": [*MESSAGES, {"role": "user", "content": [{"type": "text"}]}]}, "messages", "messages[1].content[0].text is required"),
        ({"messages": [{"role": "king", "content": "Hi"}]}, "messages", "messages[0].role"),
        ({"messages": [*MESSAGES, {"role": "user", "content": 5}]}, "messages", "messages[1].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "messages", "'text'"),
        ({"messages": MESSAGES, "top_logprobs": 2}, "top_logprobs", "logprobs"),
        ({"messages": MESSAGES, "logprobs": True, "top_logprobs": 21}, "top_logprobs", "20"),
        ({"messages": MESSAGES, "logprobs": 1}, "logprobs", "logprobs"),
        ({"messages": MESSAGES, "max_completion_tokens": 0}, "max_completion_tokens", "1"),
        ({"messages": MESSAGES, "response_format": {"type": "json_object"}}, "response_format", "json_object"),
        ({"messages": MESSAGES, "response_format": {}}, "response_format", "not supported"),
        ({"messages": MESSAGES, "tools": [{"type": "function", "function": {"name": "f"}}]}, "tools", "not supported"),
        ({"messages": MESSAGES, "functions": [{"name": "f"}]}, "functions", "not supported"),
        ({"messages": MESSAGES, "tool_choice": "required"}, "tool_choice", "not supported"),
        ({"messages": MESSAGES, "tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice", "not supported"),
        ({"messages": MESSAGES, "modalities": ["text", "audio"]}, "modalities", "only ['text']"),
        ({"messages": MESSAGES, "modalities": ["image"]}, "modalities", "only ['text']"),
    ],
)
@in_loop
async def test_a_field_of_chat(tmp_path, body, param, text):
    async with House(tmp_path) as house:
        error = await refused(house, CHAT, body)
        assert error["param"] == param
        assert text in error["message"]


@pytest.mark.parametrize(
    ("into", "body"),
    [
        (CompletionBody, {"prompt": [0] * 1000 + [-1] * 1000}),
        (CompletionBody, {"prompt": [[0] * 500 + [-1] * 500] * 100}),
        (CompletionBody, {"prompt": ["a"] * 100 + [5] * 1000}),
        (CompletionBody, {"prompt": "a", "stop_token_ids": [-1] * 1000}),
        (CompletionBody, {"prompt": "a", "logit_bias": {str(i): 101 for i in range(1000)}}),
        (ChatBody, {"messages": [{}] * 1000}),
        (ChatBody, {"messages": [{"role": "user", "content": [{}] * 1000}]}),
    ],
)
def test_of_many_mistakes_few_are_looked_for(into, body):
    """One to a list and alternative. A body has room for millions, each takes time and memory, and nobody else is served meanwhile."""
    with pytest.raises(ValidationError) as caught:
        into.model_validate_json(json.dumps({"model": MODEL} | body))
    assert caught.value.error_count() <= 8


@pytest.mark.parametrize("prompt", [["a"] * 1025, [[1]] * 1025, [1] * ((1 << 20) + 1)])
@in_loop
async def test_more_of_a_prompt_than_is_looked_at(tmp_path, prompt):
    async with House(tmp_path) as house:
        assert "at most" in (await refused(house, COMPLETIONS, {"prompt": prompt}))["message"]


@in_loop
async def test_what_asks_for_nothing_is_taken(tmp_path):
    async with House(tmp_path) as house:
        nothing = {"guided_json": None, "bad_words": [], "use_beam_search": False, "structured_outputs": {}, "return_token_ids": False}
        nothing |= {"skip_special_tokens": True, "detokenize": None, "logits_processors": [], "prompt_embeds": None}
        body = {"prompt": "Hi", "response_format": {"type": "text"}} | nothing
        assert (await house.post(COMPLETIONS, body)).status == 200
        for choice, modalities in (("none", ["text"]), ("auto", []), (None, None)):
            body = nothing | {"messages": MESSAGES, "tool_choice": choice, "modalities": modalities}
            assert (await house.post(CHAT, body)).status == 200


@pytest.mark.parametrize("ms", ["1e-322", "0", "-1", "nan", "inf", "soon"])
@pytest.mark.parametrize("name", ["x-diptych-ttft-ms", "x-diptych-tpot-ms"])
@in_loop
async def test_an_objective_that_nothing_can_be_divided_by(tmp_path, name, ms):
    async with House(tmp_path) as house:
        reply = await house.post(COMPLETIONS, {"prompt": "Hi", "service_tier": "flex"}, {name: ms})
        assert (reply.status, reply.error["param"]) == (400, name)


@pytest.mark.parametrize("temperature", [0, 1])
@in_loop
async def test_stop_tokens_that_leave_nothing_to_sample(tmp_path, temperature):
    async with House(tmp_path) as house:
        body = {"prompt": "Hi", "min_tokens": 1, "stop_token_ids": list(range(VOCAB_SIZE)), "temperature": temperature}
        assert (await refused(house, COMPLETIONS, body))["param"] == "stop_token_ids"
        assert (await house.post(COMPLETIONS, body | {"stop_token_ids": list(range(VOCAB_SIZE - 2)), "ignore_eos": True})).status == 200


@in_loop
async def test_a_text_with_a_token_that_the_model_does_not_have(tmp_path):
    async with House(tmp_path) as house:
        house.core.model.vocab_size = VOCAB_SIZE - 1
        error = await refused(house, COMPLETIONS, {"prompt": "Hi<|assistant|>"})
        assert str(VOCAB_SIZE - 1) in error["message"]


@in_loop
async def test_more_prompt_logprobs_than_a_message_takes(tmp_path, monkeypatch):
    monkeypatch.setattr(jobs, "MAX_PROMPT_LOGPROBS", 30)
    async with House(tmp_path) as house:
        body = {"prompt": "x" * 10, "logprobs": 2, "max_tokens": 1}
        assert (await refused(house, COMPLETIONS, body | {"prompt": "x" * 11, "echo": True}))["param"] == "logprobs"
        assert (await refused(house, COMPLETIONS, body | {"n": 2, "echo": True}))["param"] == "logprobs", "they come together"
        for taken in (body | {"echo": True}, body | {"prompt": "x" * 11}):
            assert (await house.post(COMPLETIONS, taken)).status == 200


@in_loop
async def test_a_top_k_that_is_no_machine_number(tmp_path):
    async with House(tmp_path) as house:
        assert (await house.post(COMPLETIONS, {"prompt": "Hi", "top_k": 10**30})).status == 200
        assert {request.sampling.top_k for worker in house.workers for request in worker.received} == {VOCAB_SIZE}


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
@pytest.mark.parametrize("field", ["temperature", "top_p", "presence_penalty"])
@in_loop
async def test_numbers_that_are_none(tmp_path, number, field):
    async with House(tmp_path) as house:
        error = await refused(house, COMPLETIONS, f'{{"model": "{MODEL}", "prompt": "Hi", "{field}": {number}}}'.encode())
        assert error["param"] in (field, None)


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"", "invalid_json"), (b"{", "invalid_json"), (b'{"model": "tiny",}', "invalid_json"), (b"\xff\xfe", "invalid_json"),
        (b'{"model": "\\ud800", "prompt": "x"}', "invalid_json"), (b"[" * 100_000, "invalid_json"),
        (b"[]", None), (b'"x"', None), (b"null", None),
    ],
)  # fmt: skip
@in_loop
async def test_bodies_that_are_no_object(tmp_path, body, code):
    async with House(tmp_path) as house:
        assert (await refused(house, COMPLETIONS, body))["code"] == code


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@in_loop
async def test_an_unknown_model(tmp_path, path):
    async with House(tmp_path) as house:
        error = await refused(house, path, {"model": "gpt-9", "prompt": "Hi", "messages": MESSAGES}, 404)
        assert (error["code"], error["param"]) == ("model_not_found", "model")
        assert "gpt-9" in error["message"]
        assert "tiny" in error["message"]


@in_loop
async def test_a_prompt_that_leaves_too_little_room(tmp_path):
    async with House(tmp_path) as house:
        error = await refused(house, COMPLETIONS, {"prompt": "x" * 100, "max_tokens": 50})
        assert error["code"] == "context_length_exceeded"
        for number in (CONTEXT, 150, 100, 50):
            assert str(number) in error["message"]
        long = [{"role": "user", "content": "x" * 200}]
        assert (await refused(house, CHAT, {"messages": long}))["code"] == "context_length_exceeded"
        assert (await house.post(COMPLETIONS, {"prompt": "x" * 100, "max_tokens": CONTEXT - 100})).status == 200


@in_loop
async def test_too_large_a_body(tmp_path):
    async with House(tmp_path, limits=Limits(max_body_bytes=100_000)) as house:
        body = b'{"model": "tiny", "prompt": "' + b"x" * 200_000 + b'"}'
        assert "100000" in (await refused(house, COMPLETIONS, body, 413))["message"]
        declared = await house.send("POST", COMPLETIONS, body, {"content-length": str(len(body))})
        assert (declared.status, declared.error["code"]) == (413, "request_too_large")
        assert "200" in declared.error["message"]


@in_loop
async def test_unknown_fields_are_ignored(tmp_path):
    async with House(tmp_path) as house:
        assert (await house.post(COMPLETIONS, {"prompt": "Hi", "service_tier": "auto", "metadata": {"a": 1}, "bananas": 5})).status == 200


@in_loop
async def test_a_template_that_refuses(tmp_path):
    async with House(tmp_path, chat_template="{{ raise_exception('roles must alternate') }}") as house:
        assert "roles must alternate" in (await refused(house, CHAT, {"messages": MESSAGES}))["message"]


@in_loop
async def test_a_message_that_the_template_was_not_written_for(tmp_path):
    async with House(tmp_path, chat_template="{{ messages[0].options | dictsort }}") as house:
        messages = [{"role": "user", "content": "Hi", "options": "text"}]
        assert (await refused(house, CHAT, {"messages": messages}))["param"] == "messages"
