"""`diptych demo`: a whole cluster on this machine for one streamed answer.

    own Ray ─► prefill-0, decode-0, gateway-0 on the embedded model ─► POST /v1/chat/completions ─► the answer ─► the figures ─► down
"""

import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ..messages.errors import ClusterError, TakenDown
from ..messages.requests import RequestSpan
from .chat import Answer, Chat
from .pulse import DeploymentStatus
from .ray_session import Deployment, launch
from .spec import Spec, parse_spec
from .tables import size

QUESTION = "What is the for statement?"
MAX_TOKENS = 160
START_TIMEOUT_S = 120.0
SPAN_TIMEOUT_S = 5.0                          # the prefill worker's account of the handoff may come after the tokens
POLL_S = 0.1


def demo_spec() -> Spec:
    pool = {"workers": 1, "kv_memory": "64MiB"}
    tree = {"name": "demo", "model": {"path": "embedded"}, "pools": {"prefill": pool, "decode": pool}, "router": {"port": 0}}
    return parse_spec(tree, Path())


def run_demo(console: Console, keep: bool, how_to_stop: str, watch: Callable[[DeploymentStatus], None]) -> None:
    """Raises DiptychError."""
    started = time.perf_counter()
    console.print("Starting Ray, a prefill worker, a decode worker and a gateway on this machine …", style="dim")
    deployment = launch(demo_spec(), own_ray=True)
    try:
        status = deployment.wait_until_ready(START_TIMEOUT_S, watch)
        console.print(f"Ready after {time.perf_counter() - started:.1f} s.\n", style="dim")
        assert status.endpoint is not None
        answer = _ask(console, status.endpoint)
        console.print(_figures(answer, _span(deployment), status))
    except TakenDown:
        raise
    except BaseException:
        deployment.stop()
        raise
    if keep:
        console.print(_how_to_go_on(status.endpoint, status.model, how_to_stop), highlight=False, soft_wrap=True)
    else:
        deployment.stop()
        took_s = time.perf_counter() - started
        console.print(f"\nAll stopped, after {took_s:.1f} s. `--keep` (make demo KEEP=1) would keep it serving.", style="dim")


def _ask(console: Console, endpoint: str) -> Answer:
    console.print(f"[bold]> {QUESTION}[/]")
    answer = Chat(endpoint, max_tokens=MAX_TOKENS).ask(QUESTION)
    for piece in answer.pieces:
        console.print(piece, end="", markup=False, highlight=False, soft_wrap=True)
    console.print("\n")
    return answer


def _span(deployment: Deployment) -> RequestSpan:
    """Raises ClusterError if no KV was handed off."""
    deadline = time.monotonic() + SPAN_TIMEOUT_S
    while time.monotonic() < deadline:
        for place in deployment.status().places:
            if place.gateway is not None and place.gateway.last_span is not None:
                return place.gateway.last_span
        time.sleep(POLL_S)
    raise ClusterError(f"no handoff was reported within {SPAN_TIMEOUT_S:g} s")


def _figures(answer: Answer, span: RequestSpan, status: DeploymentStatus) -> Table:
    table = Table(show_header=False, box=None, pad_edge=False)
    gbps = span.num_bytes / span.transfer_s / 1e9 if span.transfer_s > 0 else 0.0
    rows = {
        "model": f"{status.model}, 5 M parameters, trained on Python's documentation; it is here to be small, not wise",
        "TTFT": f"{answer.ttft_s * 1e3:.1f} ms",
        "TPOT": f"{answer.tpot_s * 1e3:.1f} ms over {answer.num_tokens} tokens" if answer.tpot_s else "–",
        "KV moved": f"{size(span.num_bytes)} in {span.num_pages} pages, {span.worker.worker_id} → {span.decode_id}",
        "transport": f"{span.transport}, {gbps:.2f} GB/s while writing",
        "handoff": f"{span.handoff_s * 1e3:.1f} ms from offer to commit, computing the prompt included",
        "endpoint": f"{status.endpoint}/v1",
    }
    for name, text in rows.items():
        table.add_row(f"[bold]{name}[/]", text)
    return table


def _how_to_go_on(endpoint: str | None, model: str, how_to_stop: str) -> str:
    body = f'{{"model": "{model}", "messages": [{{"role": "user", "content": "What is a list?"}}]}}'
    return f"""
It keeps serving. Try
    curl {endpoint}/v1/chat/completions -H 'Content-Type: application/json' -d '{body}'
Stop it with
    {how_to_stop}"""
