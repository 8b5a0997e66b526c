"""/v1/chat/completions among scripted workers."""

import pytest
from harness.gateway import ASSISTANT, CONTEXT, EOS, USER, House, in_loop, tokens_of

HI = {"messages": [{"role": "user", "content": "Hi"}]}


@in_loop
async def test_an_answer_is_a_message(tmp_path):
    async with House(tmp_path) as house:
        reply = await house.post("/v1/chat/completions", HI)
        assert reply.status == 200
        [choice] = reply.json["choices"]
        message = {"role": "assistant", "content": "Hello there", "refusal": None}
        assert choice == {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}
        assert reply.json["id"].startswith("chatcmpl-")
        assert reply.json["object"] == "chat.completion"
        assert (reply.json["usage"]["prompt_tokens"], reply.json["usage"]["completion_tokens"]) == (4, 12)
        assert house.worker("prefill-0").received[0].token_ids == (USER, *tokens_of("Hi"), ASSISTANT)


@in_loop
async def test_a_stream_opens_with_the_role_and_closes_with_the_reason(tmp_path):
    async with House(tmp_path) as house:
        reply = await house.post("/v1/chat/completions", HI | {"stream": True, "stream_options": {"include_usage": True}})
        *chunks, usage, done = reply.events
        assert (reply.text, done, usage["choices"], usage["usage"]["total_tokens"]) == ("Hello there", "[DONE]", [], 16)
        deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
        assert deltas[0]["role"] == "assistant"
        assert not any("role" in delta for delta in deltas[1:])
        assert [chunk["choices"][0]["finish_reason"] for chunk in chunks][-2:] == [None, "stop"]
        assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}


@in_loop
async def test_the_rest_of_the_context_is_the_default(tmp_path):
    async with House(tmp_path) as house:
        await house.post("/v1/chat/completions", HI)
        assert house.worker("prefill-0").received[0].sampling.max_tokens == CONTEXT - 4


@pytest.mark.parametrize("limit", [{"max_tokens": 3}, {"max_completion_tokens": 3}, {"max_completion_tokens": 3, "max_tokens": 5}])
@in_loop
async def test_either_name_limits(tmp_path, limit):
    async with House(tmp_path) as house:
        reply = await house.post("/v1/chat/completions", HI | limit)
        assert (reply.json["choices"][0]["message"]["content"], reply.json["choices"][0]["finish_reason"]) == ("Hel", "length")


@in_loop
async def test_parts_developer_and_history_reach_the_template(tmp_path):
    template = "{% for m in messages %}[{{ m.role }} {{ m.name }} {{ m.content }}]{% endfor %}"
    messages = [
        {"role": "developer", "content": "a"},
        {"role": "user", "name": "Eve", "content": [{"type": "text", "text": "b"}, {"type": "text", "text": "c"}]},
        {"role": "assistant", "content": None},
        {"role": "tool", "content": "d"},
    ]
    async with House(tmp_path, chat_template=template) as house:
        assert (await house.post("/v1/chat/completions", {"messages": messages})).status == 200
        sent = bytes(house.worker("prefill-0").received[0].token_ids).decode()
        assert sent == "[system  a][user Eve b\nc][assistant  ][tool  d]"


@in_loop
async def test_n_choices(tmp_path):
    async with House(tmp_path) as house:
        reply = await house.post("/v1/chat/completions", HI | {"n": 3, "seed": 5})
        assert [(c["index"], c["message"]["content"]) for c in reply.json["choices"]] == [(i, "Hello there") for i in range(3)]
        assert [r.sampling.seed for r in house.worker("prefill-0").received] == [5, 6, 7]
        usage = reply.json["usage"]
        assert (usage["prompt_tokens"], usage["completion_tokens"], usage["prompt_tokens_details"]["cached_tokens"]) == (4, 36, 3)


@pytest.mark.parametrize("stream", [False, True])
@in_loop
async def test_logprobs(tmp_path, stream):
    async with House(tmp_path) as house:
        house.says = [*tokens_of("é"), EOS]
        reply = await house.post("/v1/chat/completions", HI | {"logprobs": True, "top_logprobs": 1, "stream": stream})
        assert house.worker("prefill-0").received[0].sampling.logprobs == 1
        bodies = reply.events[:-1] if stream else [reply.json]
        content = [token for body in bodies for token in body["choices"][0]["logprobs"]["content"]]
        assert [(token["token"], token["logprob"], token["bytes"]) for token in content] == [("�", -0.5, [0xC3]), ("�", -0.5, [0xA9])]
        assert content[0]["top_logprobs"][:2] == [
            {"token": "�", "logprob": -0.5, "bytes": [0xC3]},
            {"token": "�", "logprob": -1.0, "bytes": [0xC4]},
        ]


@in_loop
async def test_logprobs_without_alternatives(tmp_path):
    async with House(tmp_path) as house:
        await house.post("/v1/chat/completions", HI | {"logprobs": True})
        assert house.worker("prefill-0").received[0].sampling.logprobs == 0


@pytest.mark.parametrize(
    "accepted",
    [{"response_format": {"type": "text"}}, {"tools": []}, {"tools": [{"type": "function"}], "tool_choice": "none"}, {"store": True}],
)
@in_loop
async def test_what_changes_nothing_is_accepted(tmp_path, accepted):
    async with House(tmp_path) as house:
        assert (await house.post("/v1/chat/completions", HI | accepted)).status == 200


CALLS = [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]


@pytest.mark.parametrize(
    ("message", "seen"),
    [
        ({"content": None}, "[]"), ({}, "[]"), ({"content": ""}, "[]"), ({"content": "Yes"}, "[Yes]"), ({"content": []}, "[]"),
        ({"content": None, "tool_calls": []}, "[]"), ({"content": None, "tool_calls": None}, "[]"),
        ({"content": None, "tool_calls": CALLS}, "f"), ({"tool_calls": CALLS}, "f"), ({"content": "Yes", "tool_calls": CALLS}, "[Yes]"),
    ],
)  # fmt: skip
@in_loop
async def test_an_answer_without_text_in_the_history(tmp_path, message, seen):
    """As DeepSeek's template, which asks for None beside calls, and as most, which add content to text."""
    template = (
        "{% for m in messages %}{% if m['content'] is none %}{{ m['tool_calls'][0].function.name }}"
        "{% else %}{{ '[' + m['content'] + ']' }}{% endif %}{% endfor %}"
    )
    async with House(tmp_path, chat_template=template) as house:
        reply = await house.post("/v1/chat/completions", HI | {"messages": [{"role": "assistant"} | message]})
        assert reply.status == 200, reply.body
        assert house.worker("prefill-0").received[0].token_ids == tuple(tokens_of(seen))


@in_loop
async def test_no_template_no_chat(tmp_path):
    async with House(tmp_path, chat_template=None) as house:
        reply = await house.post("/v1/chat/completions", HI)
        assert (reply.status, reply.error["code"]) == (400, "no_chat_template")
        assert (await house.post("/v1/completions", {"prompt": "Hi"})).status == 200
