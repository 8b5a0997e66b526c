"""`diptych`: what people type.

Exit codes: 0 done; 1 it did not work, the text says why; 2 a wrong option or spec; 4 `status`: running, but not everything is ready,
`probe`: not every link is measured; 5 `probe`: a link is below the spec's floor; 6 `explain`: no gateway knows that request; 130
interrupted; 143 and 129 ended by SIGTERM and SIGHUP. `bench` has its own, of the same meaning where they coincide.
"""

import contextlib
import signal
import sys
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer
from rich.console import Console

from ..messages.errors import ClusterError, DiptychError, SpecError, TakenDown
from .bench.command import app as bench_app
from .own_name import COMMAND, own_name
from .processes import held_signals

if TYPE_CHECKING:
    from .gateway.decisions import RequestExplanation
    from .pulse import DeploymentStatus

# What imports Ray, httpx or pydantic is imported within the command that needs it: `diptych --help` answers at once.

EXIT_FAILED, EXIT_USAGE, EXIT_NOT_READY, EXIT_BELOW_FLOOR, EXIT_UNKNOWN = 1, 2, 4, 5, 6
REFRESH_S = 1.0

app = typer.Typer(no_args_is_help=True, pretty_exceptions_show_locals=False, help="LLM serving with prefill and decode on separate GPUs.")
app.add_typer(bench_app, name="bench")
console = Console()

Name = Annotated[str | None, typer.Argument(help="of the deployment; not needed if there is only one")]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON")]


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"{COMMAND} {metadata.version(COMMAND)}")
        raise typer.Exit


@app.callback()
def diptych(
    version: Annotated[bool, typer.Option("--version", is_eager=True, callback=_print_version, help="print the version")] = False,
) -> None:
    """Its options do all that they do as they are read."""


@app.command()
def demo(keep: Annotated[bool, typer.Option("--keep", help="go on serving afterwards")] = False) -> None:
    """Start a prefill worker, a decode worker and a gateway on this machine, and stream one answer."""
    with held_signals():
        from .demo import run_demo

    with _ended_by_signals():
        run_demo(console, keep, f"{own_name()} down demo", _announcer())


@app.command()
def up(spec: Annotated[Path, typer.Argument(help="YAML")], as_json: AsJson = False) -> None:
    """Start the deployment of a spec: in the Ray cluster that runs, or else in one of its own. Returns once it serves."""
    with held_signals():                      # numpy's threads do not take what is this one's to clear away after
        from .ray_session import launch
        from .spec import load_spec

    wanted = load_spec(spec)
    with _ended_by_signals():
        deployment = launch(wanted)
        try:
            status = deployment.wait_until_ready(wanted.timeouts.start_s, _announcer())
        except TakenDown:
            raise
        except BaseException:
            deployment.stop()
            raise
    _show(status, as_json)


@app.command()
def down(name: Name = None) -> None:
    """Stop a deployment in order: answers under way are finished first. A Ray cluster that `up` started goes with it."""
    from .ray_session import take_down

    console.print(take_down(name, _announcer()), markup=False, highlight=False, soft_wrap=True)


@app.command()
def status(name: Name = None, as_json: AsJson = False) -> None:
    """Show a deployment's places and traffic."""
    from .ray_session import find, is_serving

    now = find(name).status()
    _show(now, as_json)
    if not is_serving(now):
        raise typer.Exit(EXIT_NOT_READY)


@app.command()
def probe(name: Name = None, as_json: AsJson = False) -> None:
    """Show what each prefill worker measured when it met each decode worker: transport, GB/s, latency of a page."""
    from .links import matrix_view, pairs_of
    from .ray_session import find

    pairs = pairs_of(find(name).status())
    if as_json:
        _print_json(pairs)
    else:
        console.print(matrix_view(pairs))
    if any(pair.link is not None and pair.link.below_floor for pair in pairs):
        raise typer.Exit(EXIT_BELOW_FLOOR)
    if any(pair.link is None for pair in pairs):
        raise typer.Exit(EXIT_NOT_READY)


@app.command()
def top(name: Name = None) -> None:
    """The same, live. Ctrl-C ends it."""
    from rich.live import Live

    from .ray_session import find
    from .tables import deployment_view

    deployment = find(name)
    view = deployment_view(deployment.status())
    with contextlib.suppress(KeyboardInterrupt), Live(view, console=console, screen=console.is_terminal) as live:
        while True:
            time.sleep(REFRESH_S)
            live.update(deployment_view(deployment.status()))


@app.command()
def chat(
    message: Annotated[str | None, typer.Argument(help="one question; without it, a conversation")] = None,
    name: Annotated[str | None, typer.Option(help="of the deployment")] = None,
    url: Annotated[str | None, typer.Option(help="of any OpenAI-compatible endpoint, instead: http://host:port")] = None,
    api_key: Annotated[str | None, typer.Option(envvar="DIPTYCH_API_KEY")] = None,
    max_tokens: Annotated[int, typer.Option(min=1)] = 200,
    temperature: Annotated[float, typer.Option(min=0)] = 0.0,
) -> None:
    """Talk to a deployment. A conversation ends with an empty line or Ctrl-D."""
    from .chat import Chat

    conversation = Chat(url or _endpoint(name), api_key, max_tokens, temperature)
    if message is not None:
        _say(conversation.ask(message).pieces)
        return
    with contextlib.suppress(EOFError):
        while text := console.input("[bold]> [/]").strip():
            _say(conversation.ask(text).pieces)


@app.command()
def explain(
    request_id: Annotated[str, typer.Argument(help="the answer's id (cmpl-…, chatcmpl-…), or a refusal's x-request-id header")],
    name: Annotated[str | None, typer.Option(help="of the deployment")] = None,
    url: Annotated[str | None, typer.Option(help="ask one endpoint over HTTP instead: http://host:port")] = None,
    api_key: Annotated[str | None, typer.Option(envvar="DIPTYCH_API_KEY", help="with --url")] = None,
    as_json: AsJson = False,
) -> None:
    """Show where a request could have gone, where it went and why, and what came of it.

    The spec's `router: {explain: N}` keeps the last N requests of each gateway. All gateways of the deployment are asked; with --url only
    the one that happens to take the connection, which need not be the one that served the request if several share the port.
    """
    from .explain import explain_over_http
    from .explain_view import explanation_view

    found = explain_over_http(url, request_id, api_key) if url else _explain(name, request_id)
    if found is None:
        where = url or "any gateway"
        text = f"{request_id} is not known to {where}: forgotten, never seen, or the spec's router.explain is 0"
        Console(stderr=True).print(text, style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(EXIT_UNKNOWN)
    if as_json:
        sys.stdout.buffer.write(msgspec.json.format(msgspec.json.encode(found)) + b"\n")
    else:
        console.print(explanation_view(found))


def main() -> None:
    try:
        app()
    except DiptychError as error:
        Console(stderr=True).print(str(error), style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(EXIT_USAGE if isinstance(error, SpecError) else EXIT_FAILED)


def _endpoint(name: str | None) -> str:
    from . import records

    record = records.find(name)
    if record is None or record.endpoint is None:
        raise ClusterError(f"no deployment {name or ''} serves here; --url names another endpoint".replace("  ", " "))
    return record.endpoint


def _explain(name: str | None, request_id: str) -> "RequestExplanation | None":
    from .ray_session import find

    return find(name).explain(request_id)


def _show(status: "DeploymentStatus", as_json: bool) -> None:
    from .tables import deployment_view

    if as_json:
        _print_json(status)
    else:
        console.print(deployment_view(status))


def _print_json(value: object) -> None:
    sys.stdout.buffer.write(msgspec.json.format(msgspec.json.encode(value)) + b"\n")


def _say(pieces: Iterator[str]) -> None:
    for piece in pieces:
        console.print(piece, end="", markup=False, highlight=False, soft_wrap=True)
    console.print()


def _announcer() -> Callable[["DeploymentStatus"], None]:
    """Prints each change of a place's state on the standard error, once."""
    seen: dict[str, tuple[object, str]] = {}
    progress = Console(stderr=True)

    def announce(status: "DeploymentStatus") -> None:
        for place in status.places:
            now = (place.state, place.error)
            if seen.get(place.name) != now:
                seen[place.name] = now
                progress.print(f"  {place.name} {place.state or 'down'} {place.error}", style="dim", markup=False, highlight=False)

    return announce


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP raise SystemExit, once: what has been started is cleared away, which a second one does not cut short."""

    def end(number: int, frame: object) -> None:
        for each in before:
            signal.signal(each, signal.SIG_IGN)
        sys.exit(128 + number)

    before = {each: signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGHUP)}
    before = {each: handler for each, handler in before.items() if handler is not signal.SIG_IGN}      # as `nohup` wants it
    for each in before:
        signal.signal(each, end)
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
