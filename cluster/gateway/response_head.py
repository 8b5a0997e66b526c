"""Headers, and the head of an answer as bytes."""

import time
from email.utils import formatdate
from functools import lru_cache
from http import HTTPStatus

Headers = tuple[tuple[str, str], ...]

_STATUS_LINES = {status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n" for status in HTTPStatus}


def response_head(status: int, headers: Headers) -> bytes:
    """Raises ValueError for a header that would be more than one line."""
    lines = [f"{name}: {value}\r\n" for name, value in headers]
    text = f"{_STATUS_LINES[status]}date: {_date(int(time.time()))}\r\n{''.join(lines)}\r\n"
    if not text.count("\n") == text.count("\r") == len(lines) + 3:
        raise ValueError(f"a line break inside one of the headers {headers}")
    return text.encode("latin-1")


@lru_cache(maxsize=1)
def _date(second: int) -> str:
    return formatdate(second, usegmt=True)
