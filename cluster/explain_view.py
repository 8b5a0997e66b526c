"""How the decisions for one request look in a terminal: a line of what came, then a table of candidates for each attempt."""

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from .gateway.decisions import AttemptExplanation, Candidate, ChoiceExplanation, DecisionKind, RequestExplanation


def explanation_view(request: RequestExplanation) -> RenderableType:
    head = Text.assemble((request.response_id, "bold"), f"  x-request-id {request.request_id}")
    if not request.choices:
        return Group(head, Text("nothing has been decided yet"))
    return Group(head, *(part for choice in request.choices for part in _choice(choice)))


def _choice(choice: ChoiceExplanation) -> list[RenderableType]:
    kept = {True: "in time", False: "not in time", None: ""}[choice.kept_objectives]
    columns = ("choice", "class", "prompt", "came to", "path", "tokens", "TTFT / promised", "TPOT / promised", "")
    table = Table(*columns, box=None, pad_edge=False)
    table.add_row(
        str(choice.index),
        choice.service_class,
        str(choice.num_prompt_tokens),
        choice.state,
        choice.path or "",
        str(choice.num_outputs),
        f"{_ms(choice.ttft_s)} / {_ms(choice.promised_ttft_s)}",
        f"{_ms(choice.tpot_s)} / {_ms(choice.promised_tpot_s)}",
        kept,
    )
    error = [Text(choice.error, "red")] if choice.error else []
    return [Text(), table, *error, *(part for number, each in enumerate(choice.attempts, 1) for part in _attempt(number, each))]


def _attempt(number: int, attempt: AttemptExplanation) -> list[RenderableType]:
    what = f"to {_way(attempt.prefill, attempt.decode)}" if attempt.kind is DecisionKind.ROUTE else f"{attempt.kind}: {attempt.reason}"
    waits = f", found no route {attempt.num_waits} times before" if attempt.num_waits else ""
    parts: list[RenderableType] = [Text(f"  attempt {number}: {what}; {_ms(attempt.decided_after_s)} after it came{waits}")]
    if attempt.candidates:
        parts.append(_candidates(attempt.candidates))
    if attempt.failure:
        parts.append(Text(f"  given up: {attempt.failure}", "red"))
    return parts


def _candidates(candidates: tuple[Candidate, ...]) -> Table:
    columns = ("", "predicted", "TTFT", "KV arrival", "TPOT", "memory", "cost", "keeps")
    table = Table(*columns, box=None, pad_edge=False)
    for each in candidates:
        table.add_row(
            "  ►" if each.chosen else "",
            _way(each.prefill, each.decode),
            _ms(each.ttft_s),
            _ms(each.kv_arrival_s),
            _ms(each.tpot_s),
            "-" if each.memory is None else f"{each.memory:.0%}",
            "-" if each.cost is None else f"{each.cost:.3g}",
            " and ".join(name for name, keeps in (("TTFT", each.keeps_ttft), ("TPOT", each.keeps_tpot)) if keeps) or "neither",
        )
    return table


def _way(prefill: str | None, decode: str | None) -> str:
    return f"{decode} alone" if prefill is None else f"{prefill} → {decode}"


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:.1f} ms"
