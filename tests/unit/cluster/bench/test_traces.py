from pathlib import Path

import pytest

from diptych.cluster.bench.errors import WorkloadError
from diptych.cluster.bench.traces import read_trace
from diptych.cluster.bench.workload import TimedRequest

SHARED_TRACES = Path(__file__).parents[5] / "shared" / "traces"

AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:50.9951690,396,109\n"
BURSTGPT = (
    "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
    "5,1,2.5,ChatGPT,472,18,490,Conversation log\n45,2,1.0,GPT-4,1087,0,1087,API log\n"
)
BURSTGPT_FIRST_RELEASE = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n5,ChatGPT,472,18,490,Conversation log\n"
MOONCAKE = (
    '{"timestamp": 1000, "input_length": 1025, "output_length": 5, "hash_ids": [0, 1, 2]}\n'
    '{"timestamp": 4000, "input_length": 600, "output_length": 7, "hash_ids": [0, 3]}\n'
)


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "trace"
    path.write_text(text)
    return path


def test_azure(tmp_path: Path) -> None:
    workload = read_trace(write(tmp_path, AZURE))
    assert [(request.prompt_tokens, request.output_tokens) for request in workload.requests] == [(374, 44), (396, 109)]
    assert workload.requests[0].at_s == 0
    assert workload.requests[1].at_s == pytest.approx(4.314579, abs=1e-6)
    assert workload.block_tokens == 0


def test_burstgpt_keeps_failed_calls_as_arrivals(tmp_path: Path) -> None:
    assert read_trace(write(tmp_path, BURSTGPT)).requests == (TimedRequest(0.0, 472, 18), TimedRequest(40.0, 1087, 1))


def test_burstgpt_first_release(tmp_path: Path) -> None:
    assert read_trace(write(tmp_path, BURSTGPT_FIRST_RELEASE)).requests == (TimedRequest(0.0, 472, 18),)


def test_mooncake(tmp_path: Path) -> None:
    workload = read_trace(write(tmp_path, MOONCAKE))
    assert workload.requests == (TimedRequest(0.0, 1025, 5, (0, 1, 2)), TimedRequest(3.0, 600, 7, (0, 3)))
    assert workload.block_tokens == 512


def test_rows_out_of_order_are_sorted_and_byte_order_mark_and_blank_lines_ignored(tmp_path: Path) -> None:
    text = "\ufeffTIMESTAMP,ContextTokens,GeneratedTokens\r\n2023-11-16 00:00:02,2,1\r\n\r\n2023-11-16 00:00:00,1,1"
    assert [request.prompt_tokens for request in read_trace(write(tmp_path, text)).requests] == [1, 2]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (AZURE + "2023-11-16 18:15:51,many,1\n", r"trace:4: .*'many'"),
        (AZURE + "2023-11-16 18:15:51,7\n", r"trace:4: 2 columns, the header has 3"),
        (AZURE + "yesterday,7,1\n", r"trace:4: .*'yesterday'"),
        (AZURE + "2023-11-16 18:15:51,-7,1\n", r"trace:4: -7 prompt tokens"),
        (BURSTGPT + "nan,1,1,m,7,1,8,l\n", r"trace:4: timestamp is nan"),
        (MOONCAKE + '{"timestamp": 0, "input_length": 1025, "output_length": 5, "hash_ids": [1]}\n', r"trace:3: 1 hash_ids for 1025"),
        (MOONCAKE + '{"timestamp": 0, "output_length": 5, "hash_ids": []}\n', r"trace:3: .*input_length"),
        (MOONCAKE + '{"timestamp": 0,\n', r"trace:3: "),
        (MOONCAKE + '{"timestamp": 0, "input_length": 1, "output_length": 5, "hash_ids": [-1]}\n', r"trace:3: hash_ids must be >= 0"),
        ("a,b,c\n1,2,3\n", r"trace:1: neither"),
        ("", r"trace:1: neither"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n", r"no requests"),
    ],
)
def test_bad_rows_name_file_and_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(WorkloadError, match=message):
        read_trace(write(tmp_path, text))


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(WorkloadError, match="cannot be read"):
        read_trace(tmp_path / "absent")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x80")
    with pytest.raises(WorkloadError, match="cannot be read"):
        read_trace(tmp_path / "binary")


@pytest.mark.parametrize(
    ("name", "count", "rate"),
    [("azure2023_code.csv", 8819, 2.57), ("azure2023_conv.csv", 19366, 5.53), ("mooncake_fast25_conversation_trace.jsonl", 12031, 3.40)],
)
def test_public_traces(name: str, count: int, rate: float) -> None:
    path = SHARED_TRACES / name
    if not path.exists():
        pytest.skip(f"the public trace {name} is not beside this repository")
    workload = read_trace(path)
    assert len(workload) == count
    assert workload.rate == pytest.approx(rate, abs=0.01)
