"""The chat client against a scripted endpoint."""

import socket

import pytest

from diptych.cluster.chat import Chat, _lines
from diptych.messages.errors import ClusterError

from .conftest import ScriptedEndpoint


def test_streams_and_keeps_the_conversation(endpoint: ScriptedEndpoint) -> None:
    chat = Chat(endpoint.url, api_key="secret", max_tokens=9)
    endpoint.answers("a ", "list")
    answer = chat.ask("What is it?")
    assert list(answer.pieces) == ["a ", "list"]
    assert answer.num_tokens == 2
    assert answer.ttft_s > 0
    assert answer.tpot_s is not None
    endpoint.answers("yes")
    assert list(chat.ask("Sure?").pieces) == ["yes"]
    assert [message["content"] for message in endpoint.requests[1]["messages"]] == ["What is it?", "a list", "Sure?"]
    assert endpoint.requests[0]["model"] == "tiny"
    assert endpoint.requests[0]["max_tokens"] == 9
    assert endpoint.authorizations[0] == "Bearer secret"


def test_lines_end_at_line_feeds_alone(endpoint: ScriptedEndpoint) -> None:
    text = "a\u2028b\u2029c\u0085d"
    endpoint.lines = [f'data: {{"choices": [{{"index": 0, "delta": {{"content": "{text}"}}}}]}}\r', "data: [DONE]"]
    assert list(Chat(endpoint.url).ask("?").pieces) == [text]


def test_lines_in_any_pieces_the_last_without_an_end() -> None:
    raw = "data: é\r\n\ndata: [DONE]".encode()
    for size in range(1, len(raw) + 1):
        assert list(_lines(raw[i : i + size] for i in range(0, len(raw), size))) == ["data: é", "", "data: [DONE]"]
    assert list(_lines(iter([b"\xff\n"]))) == ["\ufffd"], "what is no UTF-8 ends nothing"


def test_an_endpoint_as_clients_of_openai_are_given_it(endpoint: ScriptedEndpoint) -> None:
    endpoint.answers("yes")
    assert list(Chat(f"{endpoint.url}/v1/").ask("?").pieces) == ["yes"]


def test_a_broken_answer_is_not_part_of_the_conversation(endpoint: ScriptedEndpoint) -> None:
    chat = Chat(endpoint.url)
    endpoint.answers("half")
    endpoint.lines.pop()                                      # no [DONE]
    with pytest.raises(ClusterError, match="ended before it was done"):
        list(chat.ask("?").pieces)
    assert chat.messages == []


def test_an_error_within_the_stream(endpoint: ScriptedEndpoint) -> None:
    endpoint.lines = ['data: {"error": {"message": "the worker was lost"}}', "data: [DONE]"]
    with pytest.raises(ClusterError, match="the worker was lost"):
        list(Chat(endpoint.url).ask("?").pieces)


def test_a_refusal_is_said_in_the_servers_words(endpoint: ScriptedEndpoint) -> None:
    endpoint.status = 429
    with pytest.raises(ClusterError, match="HTTP 429: no room"):
        list(Chat(endpoint.url).ask("?").pieces)


def test_an_empty_answer_has_no_ttft(endpoint: ScriptedEndpoint) -> None:
    endpoint.answers()
    answer = Chat(endpoint.url).ask("?")
    assert list(answer.pieces) == []
    assert answer.tpot_s is None
    with pytest.raises(ClusterError, match="empty"):
        _ = answer.ttft_s


def test_nobody_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(ClusterError, match="does not answer"):
        Chat(f"http://127.0.0.1:{port}")
