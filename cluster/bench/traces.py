"""Readers of public trace formats; which one a file has is read from its first line.

    Azure     CSV    TIMESTAMP, ContextTokens, GeneratedTokens                           TIMESTAMP is a date and a time
    BurstGPT  CSV    Timestamp, Session ID, Elapsed time, Model, Request tokens, Response tokens, Total tokens, Log Type
                     Timestamp in seconds; its first release has no Session ID and no Elapsed time
    Mooncake  JSONL  {"timestamp": ms, "input_length": n, "output_length": m, "hash_ids": [one per 512 prompt tokens]}

The first timestamp is subtracted. A row that cannot be read is an error with file and line, never skipped. A row of no tokens
(BurstGPT's failed calls) keeps its arrival and asks for one.
"""

import csv
import math
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path

import msgspec

from .errors import WorkloadError
from .workload import TimedRequest, Workload

AZURE_COLUMNS = "TIMESTAMP", "ContextTokens", "GeneratedTokens"
BURSTGPT_COLUMNS = "Timestamp", "Request tokens", "Response tokens"
MOONCAKE_BLOCK_TOKENS = 512

RowReader = Callable[[str], TimedRequest]       # one line without its end; raises ValueError with what is wrong


class MooncakeRow(msgspec.Struct):
    timestamp: float                            # ms
    input_length: int
    output_length: int
    hash_ids: list[int]


def read_trace(path: Path) -> Workload:
    """Raises WorkloadError, with file and line, for what is not of one of the three formats."""
    try:
        with path.open(encoding="utf-8-sig") as lines:
            first = next(lines, "")
            is_mooncake = first.lstrip().startswith("{")
            read_row = _mooncake_row if is_mooncake else _csv_row_reader(first, path)
            rows = enumerate(chain([first], lines) if is_mooncake else lines, start=1 if is_mooncake else 2)
            requests = [_read_row(read_row, line, number, path) for number, line in rows if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise WorkloadError(f"{path}: cannot be read: {error}") from error
    if not requests:
        raise WorkloadError(f"{path}: no requests after the header")
    return Workload(path.name, _from_zero(requests), MOONCAKE_BLOCK_TOKENS if is_mooncake else 0)


def _csv_row_reader(header_line: str, path: Path) -> RowReader:
    header = [name.strip() for name in next(csv.reader([header_line]), [])]
    at_s: Callable[[str], float]
    if set(AZURE_COLUMNS) <= set(header):
        columns, at_s = AZURE_COLUMNS, _date_s
    elif set(BURSTGPT_COLUMNS) <= set(header):
        columns, at_s = BURSTGPT_COLUMNS, float
    else:
        raise WorkloadError(f"{path}:1: neither Azure's nor BurstGPT's header nor Mooncake's JSON: {header_line.strip()[:120]!r}")
    when, prompt, output = (header.index(name) for name in columns)

    def read(line: str) -> TimedRequest:
        cells = next(csv.reader([line]))
        if len(cells) != len(header):
            raise ValueError(f"{len(cells)} columns, the header has {len(header)}")
        return _request(at_s(cells[when]), int(cells[prompt]), int(cells[output]))

    return read


def _mooncake_row(line: str) -> TimedRequest:
    row = msgspec.json.decode(line, type=MooncakeRow)
    if len(row.hash_ids) != math.ceil(row.input_length / MOONCAKE_BLOCK_TOKENS):
        raise ValueError(f"{len(row.hash_ids)} hash_ids for {row.input_length} tokens in blocks of {MOONCAKE_BLOCK_TOKENS}")
    if row.hash_ids and min(row.hash_ids) < 0:
        raise ValueError(f"hash_ids must be >= 0, got {min(row.hash_ids)}")
    return _request(row.timestamp / 1e3, row.input_length, row.output_length, tuple(row.hash_ids))


def _request(at_s: float, prompt_tokens: int, output_tokens: int, block_ids: tuple[int, ...] = ()) -> TimedRequest:
    if not math.isfinite(at_s):
        raise ValueError(f"timestamp is {at_s}")
    if prompt_tokens < 0 or output_tokens < 0:
        raise ValueError(f"{prompt_tokens} prompt tokens and {output_tokens} output tokens: both must be >= 0")
    return TimedRequest(at_s, max(1, prompt_tokens), max(1, output_tokens), block_ids)


def _read_row(read_row: RowReader, line: str, number: int, path: Path) -> TimedRequest:
    try:
        return read_row(line.rstrip("\r\n"))
    except (ValueError, csv.Error, msgspec.MsgspecError) as error:
        raise WorkloadError(f"{path}:{number}: {error}") from error


def _date_s(text: str) -> float:
    return datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp()


def _from_zero(requests: list[TimedRequest]) -> tuple[TimedRequest, ...]:
    ordered = sorted(requests, key=lambda request: request.at_s)
    return tuple(replace(request, at_s=request.at_s - ordered[0].at_s) for request in ordered)
