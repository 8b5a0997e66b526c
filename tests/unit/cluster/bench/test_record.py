import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diptych.cluster.bench.record import Outcome, RequestRecord, SseSplitter, StreamTally


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def events(*contents: dict[str, Any]) -> bytes:
    return b"".join(b"data: " + json.dumps(content).encode() + b"\n\n" for content in contents)


def text(piece: str, finish: str | None = None, **more: Any) -> dict[str, Any]:
    return {"choices": [{"text": piece, "finish_reason": finish}], **more}


def tell(*timed: tuple[float, bytes], status: int = 200, asked: int = 3, failure: tuple[Outcome, str] | None = None) -> RequestRecord:
    clock = Clock()
    tally = StreamTally(clock)
    for at_s, body in timed:
        clock.now_s = at_s
        tally.receive(status, body)
    return tally.record(prompt_tokens=7, output_tokens_asked=asked, scheduled_s=0.9, sent_s=1.0, failure=failure)


@given(st.lists(st.binary(min_size=1, max_size=9).filter(lambda line: not set(line) & set(b"\r\n")), max_size=6), st.booleans(), st.data())
def test_events_are_the_same_however_the_bytes_are_cut(contents: list[bytes], carriage: bool, data: st.DataObject) -> None:
    end = b"\r\n" if carriage else b"\n"
    whole = b"".join(b": ping" + end + b"event: x" + end + b"data: " + content + end + end for content in contents)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=8)))
    splitter = SseSplitter()
    seen = [event for start, stop in zip([0, *cuts], [*cuts, len(whole)], strict=True) for event in splitter.feed(whole[start:stop])]
    assert seen == contents


def test_an_event_without_end_is_refused() -> None:
    splitter = SseSplitter()
    for _ in range(3):
        assert splitter.feed(b"x" * (1 << 20)) == []
    with pytest.raises(ValueError, match="longer than 4194304 bytes"):
        splitter.feed(b"x" * (1 << 20 | 1))


def test_times_and_tokens_of_a_plain_stream() -> None:
    usage = {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 4}}}
    end = events(text("c", "length"), usage) + b"data: [DONE]\n\n"
    record = tell((1.0, b""), (1.2, events(text("a"))), (1.3, events(text(""))), (1.5, end))
    assert record.outcome is Outcome.OK
    assert (record.ttft_s, record.tpot_s, record.e2e_s) == pytest.approx((0.2, 0.15, 0.5))
    assert record.lag_s == pytest.approx(0.1)
    assert record.gaps_s == pytest.approx([0.1, 0.2])
    assert (record.output_tokens, record.finish_reason, record.prompt_tokens_seen, record.cached_tokens) == (3, "length", 7, 4)


def test_several_tokens_a_chunk_are_counted_by_usage() -> None:
    first, second = text("ab", usage={"completion_tokens": 2}), text("cde", "length", usage={"completion_tokens": 5})
    record = tell((1.0, events(first)), (1.4, events(second)), asked=5)
    assert [chunk.tokens for chunk in record.chunks] == [2, 3]
    assert (record.output_tokens, record.tpot_s) == (5, pytest.approx(0.1))


def test_chat_role_and_bare_finish_are_no_tokens_but_the_finish_ends_the_answer() -> None:
    def delta(finish: str | None = None, **delta: Any) -> dict[str, Any]:
        return {"choices": [{"delta": delta, "finish_reason": finish}]}

    opening, thought, word = delta(role="assistant", content=""), delta(reasoning_content="x"), delta(content="y")
    record = tell((1.1, events(opening)), (1.3, events(thought)), (1.4, events(word)), (1.5, events(delta("stop"))))
    assert record.ttft_s == pytest.approx(0.3)
    assert (record.output_tokens, record.last_token_s) == (2, 1.5)


def test_one_token_has_no_tpot() -> None:
    record = tell((1.1, events(text("a", "length"))))
    assert (record.outcome, record.tpot_s) == (Outcome.OK, None)


def test_an_answer_without_visible_text_is_known_by_its_usage() -> None:
    record = tell((1.5, events(text("", "length"), {"choices": [], "usage": {"completion_tokens": 2}})))
    assert (record.outcome, record.ttft_s, record.output_tokens) == (Outcome.OK, 0.5, 2)


@pytest.mark.parametrize(
    ("body", "status", "outcome", "error"),
    [
        (events(text("a")), 200, Outcome.INCOMPLETE, "after 1 tokens without a finish reason"),
        (events(text("", "stop")), 200, Outcome.EMPTY, "without a token"),
        (b"", 200, Outcome.INCOMPLETE, "after 0 tokens"),
        (events(text("a"), {"error": {"message": "no pages"}}), 200, Outcome.STREAM_ERROR, "no pages"),
        (b"data: {\n\n", 200, Outcome.MALFORMED, "truncated"),
        (events({"choices": 5}), 200, Outcome.MALFORMED, "choices"),
        (b'{"error": "slow down"}', 429, Outcome.REFUSED, "slow down"),
        (b"", 503, Outcome.REFUSED, ""),
        (b"oops", 500, Outcome.HTTP_ERROR, "oops"),
    ],
)
def test_outcomes(body: bytes, status: int, outcome: Outcome, error: str) -> None:
    record = tell((1.1, body), status=status)
    assert record.outcome is outcome
    assert error in record.error
    assert record.status == status


def test_a_failed_connection_does_not_hide_what_the_server_said() -> None:
    dropped = Outcome.INCOMPLETE, "connection lost"
    assert tell((1.1, events(text("a"))), failure=dropped).outcome is Outcome.INCOMPLETE
    assert tell((1.1, events({"error": "x"})), failure=dropped).outcome is Outcome.STREAM_ERROR
