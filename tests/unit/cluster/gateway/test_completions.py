import asyncio

from harness.gateway import EOS, House, tokens_of


def test_an_answer_is_whole_and_counted(tmp_path):
    async def scenario():
        async with House(tmp_path) as house:
            reply = await house.post("/v1/completions", {"prompt": "Hi", "max_tokens": 50})
            assert reply.status == 200, reply.body
            [choice] = reply.json["choices"]
            assert (choice["text"], choice["finish_reason"], choice["index"], choice["logprobs"]) == ("Hello there", "stop", 0, None)
            assert reply.json["object"] == "text_completion"
            assert reply.json["usage"] == {
                "prompt_tokens": 2, "completion_tokens": 12, "total_tokens": 14, "prompt_tokens_details": {"cached_tokens": 3},
            }  # fmt: skip

    asyncio.run(scenario())


def test_a_stream_has_the_same_text(tmp_path):
    async def scenario():
        async with House(tmp_path) as house:
            reply = await house.post("/v1/completions", {"prompt": "Hi", "max_tokens": 50, "stream": True})
            assert (reply.status, reply.text, reply.complete) == (200, "Hello there", True)
            assert reply.headers["content-type"].startswith("text/event-stream")
            assert reply.events[-1] == "[DONE]"
            assert reply.events[-2]["choices"][0]["finish_reason"] == "stop"
            assert all("usage" not in event for event in reply.events[:-1])

    asyncio.run(scenario())
