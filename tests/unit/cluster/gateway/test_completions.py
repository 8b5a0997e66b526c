"""/v1/completions among scripted workers: what the answer holds, whole and streamed."""

import pytest
from harness.gateway import ASSISTANT, EOS, FakeWorker, House, in_loop, tokens_of

from diptych.messages.requests import GenerateRequest

ASK = {"prompt": "Hi", "max_tokens": 50}


@in_loop
async def test_an_answer_is_whole_and_counted(tmp_path):
    async with House(tmp_path) as house:
        reply = await house.post("/v1/completions", ASK)
        assert (reply.status, reply.headers["content-type"]) == (200, "application/json")
        [choice] = reply.json["choices"]
        assert choice == {"index": 0, "text": "Hello there", "logprobs": None, "finish_reason": "stop"}
        assert reply.json["id"].startswith("cmpl-")
        assert (reply.json["object"], reply.json["model"]) == ("text_completion", "tiny")
        assert reply.json["usage"] == {
            "prompt_tokens": 2, "completion_tokens": 12, "total_tokens": 14, "prompt_tokens_details": {"cached_tokens": 3},
        }  # fmt: skip


@in_loop
async def test_a_stream_has_the_same_text(tmp_path):
    async with House(tmp_path) as house:
        reply = await house.post("/v1/completions", ASK | {"stream": True})
        assert (reply.status, reply.text, reply.complete) == (200, "Hello there", True)
        assert reply.headers["content-type"].startswith("text/event-stream")
        *chunks, done = reply.events
        assert done == "[DONE]"
        assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]
        assert len({chunk["id"] for chunk in chunks}) == 1
        assert not any("usage" in chunk for chunk in chunks)


@in_loop
async def test_include_usage_comes_last_and_null_before(tmp_path):
    async with House(tmp_path) as house:
        reply = await house.post("/v1/completions", ASK | {"stream": True, "stream_options": {"include_usage": True}})
        *chunks, usage, _ = reply.events
        assert all(chunk["usage"] is None for chunk in chunks)
        assert usage["choices"] == []
        assert (usage["usage"]["completion_tokens"], usage["usage"]["prompt_tokens_details"]) == (12, {"cached_tokens": 3})


@in_loop
async def test_length_is_a_finish_reason_and_16_the_default(tmp_path):
    async with House(tmp_path) as house:
        house.says = tokens_of("a" * 40)
        reply = await house.post("/v1/completions", {"prompt": "Hi"})
        assert (reply.json["choices"][0]["text"], reply.json["choices"][0]["finish_reason"]) == ("a" * 16, "length")


@in_loop
async def test_one_token_is_still_split(tmp_path):
    async with House(tmp_path) as house:
        reply = await house.post("/v1/completions", ASK | {"max_tokens": 1})
        assert reply.json["choices"][0]["text"] == "H"
        assert house.worker("prefill-0").received[0].route.decode.worker_id == "decode-0"


@in_loop
async def test_sampling_reaches_the_workers(tmp_path):
    sampling = {
        "temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1, "seed": 11, "presence_penalty": 0.1, "frequency_penalty": -0.2,
        "repetition_penalty": 1.1, "logit_bias": {"65": -100, "66": 1.5}, "min_tokens": 2, "stop_token_ids": [1, 2],
    }  # fmt: skip
    async with House(tmp_path) as house:
        assert (await house.post("/v1/completions", ASK | sampling)).status == 200
        [request] = house.worker("prefill-0").received
        params = request.sampling
        for name in sampling.keys() - {"logit_bias", "stop_token_ids"}:
            assert getattr(params, name) == sampling[name], name
        assert params.logit_bias == {65: -100.0, 66: 1.5}
        assert params.stop_token_ids == (EOS, 1, 2)
        assert (params.max_tokens, params.logprobs, params.prompt_logprobs) == (50, None, None)


@in_loop
async def test_null_is_the_default(tmp_path):
    async with House(tmp_path) as house:
        fields = "temperature top_p top_k n stop seed logit_bias stream stream_options suffix logprobs user presence_penalty min_tokens"
        fields += " echo ignore_eos include_stop_str_in_output add_special_tokens"
        reply = await house.post("/v1/completions", ASK | dict.fromkeys(fields.split()))
        assert reply.status == 200
        params = house.worker("prefill-0").received[0].sampling
        assert (params.temperature, params.top_p, params.top_k, params.min_p, params.repetition_penalty) == (1.0, 1.0, 0, 0.0, 1.0)


@in_loop
async def test_seeds_differ_between_requests_and_follow_between_choices(tmp_path):
    async with House(tmp_path) as house:
        await house.post("/v1/completions", ASK)
        await house.post("/v1/completions", ASK)
        await house.post("/v1/completions", ASK | {"n": 3, "seed": -1})
        seeds = [request.sampling.seed for request in house.worker("prefill-0").received]
        assert seeds[0] != seeds[1]
        assert seeds[2:] == [(1 << 63) - 1, 0, 1]
        assert all(0 <= seed < 1 << 63 for seed in seeds)


@in_loop
async def test_ignore_eos_goes_past_it(tmp_path):
    async with House(tmp_path) as house:
        house.says = [*tokens_of("a"), EOS, *tokens_of("b")]
        reply = await house.post("/v1/completions", ASK | {"max_tokens": 3, "ignore_eos": True})
        assert (reply.json["choices"][0]["text"], reply.json["choices"][0]["finish_reason"]) == ("ab", "length")


class TestPrompts:
    @pytest.mark.parametrize("prompt", ["ab", ["ab"], [97, 98], [[97, 98]]])
    @in_loop
    async def test_in_all_four_forms(self, tmp_path, prompt):
        async with House(tmp_path) as house:
            assert (await house.post("/v1/completions", ASK | {"prompt": prompt})).status == 200
            assert house.worker("prefill-0").received[0].token_ids == (97, 98)

    @in_loop
    async def test_a_batch_with_n_fans_out_in_order(self, tmp_path):
        async with House(tmp_path) as house:
            reply = await house.post("/v1/completions", ASK | {"prompt": ["a", "bc"], "n": 2, "echo": True, "seed": 5})
            assert [(c["index"], c["text"]) for c in reply.json["choices"]] == list(
                enumerate(["aHello there", "aHello there", "bcHello there", "bcHello there"])
            )
            usage = reply.json["usage"]
            assert (usage["prompt_tokens"], usage["completion_tokens"], usage["prompt_tokens_details"]["cached_tokens"]) == (3, 48, 6)
            received = house.worker("prefill-0").received
            assert [(r.token_ids, r.sampling.seed) for r in received] == [((97,), 5), ((97,), 6), ((98, 99), 5), ((98, 99), 6)]
            assert len({r.request_id for r in received}) == 4

    @in_loop
    async def test_a_batch_streams_interleaved(self, tmp_path):
        async with House(tmp_path) as house:
            reply = await house.post("/v1/completions", ASK | {"prompt": ["a", "b", "c"], "stream": True})
            texts = dict.fromkeys(range(3), "")
            ends = []
            for event in reply.events[:-1]:
                [choice] = event["choices"]
                texts[choice["index"]] += choice["text"]
                ends += [choice["index"]] if choice["finish_reason"] else []
            assert (texts, sorted(ends)) == (dict.fromkeys(range(3), "Hello there"), [0, 1, 2])


class TestStop:
    @pytest.mark.parametrize("stream", [False, True])
    @pytest.mark.parametrize(
        ("stop", "include", "expected"),
        [
            ("o th", False, "Hell"), ("o th", True, "Hello th"), (["xyz", "there"], False, "Hello "), ("re", False, "Hello the"),
            (["lo there!", "o"], False, "Hell"), ("Hello there", False, ""), ("there!", False, "Hello there"),
        ],
    )  # fmt: skip
    @in_loop
    async def test_strings_across_tokens(self, tmp_path, stop, include, expected, stream):
        async with House(tmp_path) as house:
            body = ASK | {"stop": stop, "include_stop_str_in_output": include, "stream": stream}
            reply = await house.post("/v1/completions", body)
            assert (reply.text if stream else reply.json["choices"][0]["text"]) == expected
            last = reply.events[-2] if stream else reply.json
            assert last["choices"][0]["finish_reason"] == "stop"

    @in_loop
    async def test_strings_end_each_choice_once(self, tmp_path):
        held: list[tuple[FakeWorker, GenerateRequest]] = []

        def hold_second(worker: FakeWorker, request: GenerateRequest) -> bool:
            is_second = request.request_id.endswith("-1-1")
            if is_second:
                held.append((worker, request))
            return is_second

        async with House(tmp_path) as house:
            house.on_request = hold_second
            stream = house.open("POST", "/v1/completions", {"model": "tiny"} | ASK | {"stop": "th", "n": 2, "stream": True})
            await house.until(lambda: house.core.metrics.outcomes["finished"] == 1)
            await house.until(lambda: b"stop" in stream.writes[-1])
            [(worker, request)] = held
            worker.say(request, 0, num_tokens=11, prefill=True)
            choices = [choice for event in (await stream.reply()).events[:-1] for choice in event["choices"]]
            assert [choice["index"] for choice in choices if choice["finish_reason"]] == [0, 1]

    @in_loop
    async def test_a_match_aborts_the_workers(self, tmp_path):
        async with House(tmp_path) as house:
            house.says = tokens_of("Hello there" * 10)
            reply = await house.post("/v1/completions", ASK | {"stop": "there", "max_tokens": 100})
            assert reply.json["usage"]["completion_tokens"] == 11
            await house.until(lambda: bool(house.worker("decode-0").aborted) and bool(house.worker("prefill-0").aborted))
            assert house.core.metrics.outcomes["finished"] == 1

    @in_loop
    async def test_not_before_min_tokens(self, tmp_path):
        async with House(tmp_path) as house:
            reply = await house.post("/v1/completions", ASK | {"stop": "e", "min_tokens": 4})
            assert reply.json["choices"][0]["text"] == "Hello th"
            reply = await house.post("/v1/completions", ASK | {"stop": "lo ", "min_tokens": 4})
            assert reply.json["choices"][0]["text"] == "Hel", "it ends beyond them"

    @pytest.mark.parametrize(("include", "expected"), [(False, "Hello"), (True, "Hello ")])
    @in_loop
    async def test_token_ids(self, tmp_path, include, expected):
        async with House(tmp_path) as house:
            body = ASK | {"stop_token_ids": [ord(" ")], "include_stop_str_in_output": include}
            [choice] = (await house.post("/v1/completions", body)).json["choices"]
            assert (choice["text"], choice["finish_reason"]) == (expected, "stop")


@in_loop
async def test_characters_split_over_tokens_come_whole(tmp_path):
    async with House(tmp_path) as house:
        house.says = tokens_of("Grüße 世界 🙂!")
        reply = await house.post("/v1/completions", ASK | {"stream": True})
        assert reply.text == "Grüße 世界 🙂!"
        assert "�" not in reply.body.decode()
        house.says = tokens_of("a🙂"[:2])[:-1]
        assert (await house.post("/v1/completions", ASK | {"stream": True})).text == "a�"


@in_loop
async def test_special_tokens_are_not_text(tmp_path):
    async with House(tmp_path) as house:
        house.says = [*tokens_of("a"), ASSISTANT, *tokens_of("b"), EOS]
        assert (await house.post("/v1/completions", ASK)).json["choices"][0]["text"] == "ab"


class TestLogprobs:
    @pytest.mark.parametrize("stream", [False, True])
    @in_loop
    async def test_of_each_token_and_the_best(self, tmp_path, stream):
        async with House(tmp_path) as house:
            house.says = [*tokens_of("ab"), EOS]
            reply = await house.post("/v1/completions", ASK | {"logprobs": 2, "stream": stream})
            assert house.worker("prefill-0").received[0].sampling.logprobs == 2
            bodies = reply.events[:-1] if stream else [reply.json]
            parts = [body["choices"][0]["logprobs"] for body in bodies]
            assert {key: [each for part in parts for each in part[key]] for key in parts[0]} == {
                "tokens": ["a", "b"],
                "token_logprobs": [-0.5, -0.5],
                "top_logprobs": [{"a": -0.5, "b": -1.0, "c": -9999.0}, {"b": -0.5, "c": -1.0, "d": -9999.0}],
                "text_offset": [0, 1],
            }

    @pytest.mark.parametrize("stream", [False, True])
    @in_loop
    async def test_what_a_stop_string_cuts_off_is_cut_there_too(self, tmp_path, stream):
        async with House(tmp_path) as house:
            reply = await house.post("/v1/completions", ASK | {"logprobs": 0, "stop": "o t", "stream": stream})
            bodies = reply.events[:-1] if stream else [reply.json]
            for body in bodies:
                [choice] = body["choices"]
                assert "".join(choice["logprobs"]["tokens"]) == choice["text"]
            assert "".join(body["choices"][0]["text"] for body in bodies) == "Hell"


class TestEcho:
    @in_loop
    async def test_text_is_repeated_as_it_was_sent(self, tmp_path):
        async with House(tmp_path) as house:
            reply = await house.post("/v1/completions", {"prompt": "Say: <s>é", "echo": True, "stream": True, "max_tokens": 50})
            assert reply.text == "Say: <s>éHello there"

    @in_loop
    async def test_tokens_are_repeated_as_text(self, tmp_path):
        async with House(tmp_path) as house:
            reply = await house.post("/v1/completions", ASK | {"prompt": tokens_of("é!"), "echo": True})
            assert reply.json["choices"][0]["text"] == "é!Hello there"

    @in_loop
    async def test_with_logprobs_of_the_prompt(self, tmp_path):
        async with House(tmp_path) as house:
            house.says = [*tokens_of("b"), EOS]
            reply = await house.post("/v1/completions", ASK | {"prompt": "éa", "echo": True, "logprobs": 1})
            assert house.worker("prefill-0").received[0].sampling.prompt_logprobs == 1
            logprobs = reply.json["choices"][0]["logprobs"]
            assert logprobs["tokens"] == ["�", "�", "a", "b"]
            assert logprobs["token_logprobs"] == [None, -0.5, -0.5, -0.5]
            assert logprobs["top_logprobs"][0] is None
            assert logprobs["text_offset"] == [0, 0, 1, 2]

    @in_loop
    async def test_of_the_prompt_only(self, tmp_path):
        async with House(tmp_path) as house:
            reply = await house.post("/v1/completions", {"prompt": "abc", "echo": True, "logprobs": 1, "max_tokens": 0})
            [choice] = reply.json["choices"]
            assert (choice["text"], choice["finish_reason"], choice["logprobs"]["token_logprobs"]) == ("abc", "length", [None, -0.5, -0.5])
            assert reply.json["usage"]["completion_tokens"] == 0
            assert house.worker("prefill-0").received[0].sampling.max_tokens == 0
