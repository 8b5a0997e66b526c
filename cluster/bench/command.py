"""`diptych bench`: a group whose default is `serve`, the load generator.

    diptych bench [serve] --url URL [--trace FILE] [--rate R | --rates R,R | --goodput] [--json FILE] [--png FILE]

Exit codes: 0 all well; 1 requests failed, or --goodput found no rate that reaches the target; 2 bad options, trace or lengths;
3 the endpoint cannot be used; 130 interrupted (the partial report is printed). With --goodput only failures at the answer's
rate count: what fails beyond it is what the search looks for.
"""

import asyncio
import contextlib
import math
import resource
import secrets
import signal
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
import uvloop
from rich.console import Console
from typer.core import TyperGroup

from ...messages.errors import DiptychError
from .client import Address, HttpClient
from .display import ProgressWatcher, print_result
from .errors import BenchError, EndpointError, WorkloadError
from .generator import Arrivals, Lengths, Recipe, SharedPrefix, generate
from .goodput import SearchPlan
from .report import Objective
from .session import BenchPlan, BenchResult, Load, measure
from .traces import read_trace
from .workload import Workload
from .writer import PromptMode, PromptSource

EXIT_FAILED, EXIT_USAGE, EXIT_UNREACHABLE, EXIT_INTERRUPTED = 1, 2, 3, 130
NUM_GENERATED, NUM_GENERATED_TO_SEARCH = 200, 100_000   # of which a search sends what its longest probe takes: 20 s at 5000/s


class DefaultsToServe(TyperGroup):
    """`bench --url …` means `bench serve --url …`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0].startswith("-") and args[0] not in ctx.help_option_names:
            args = ["serve", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(cls=DefaultsToServe, no_args_is_help=True, help="Measure what an endpoint can do.")


@app.callback()
def bench() -> None:
    """Measure what an endpoint can do."""      # its presence keeps `serve` a sub-command while it is the only one


endpoint_option = partial(typer.Option, rich_help_panel="Endpoint")
workload_option = partial(typer.Option, rich_help_panel="Workload")
generator_option = partial(typer.Option, rich_help_panel="Generator, without --trace")
load_option = partial(typer.Option, rich_help_panel="Load")
objective_option = partial(typer.Option, rich_help_panel="Objective")
prompt_option = partial(typer.Option, rich_help_panel="Prompts")


def in_a_folder(path: Path | str | None) -> Path | str | None:
    """Told before anything is measured, not when it is to be written."""
    if path is not None and str(path) != "-" and not (folder := Path(path).absolute().parent).is_dir():
        raise typer.BadParameter(f"there is no folder {folder}")
    return path


report_option = partial(typer.Option, rich_help_panel="Report", callback=in_a_folder)


@app.command()
def serve(
    url: Annotated[str, endpoint_option(help="of the server: http(s)://host:port")],
    model: Annotated[str | None, endpoint_option(help="default: the first that /v1/models lists")] = None,
    api_key: Annotated[str | None, endpoint_option(envvar="DIPTYCH_API_KEY")] = None,
    deadline_s: Annotated[float, endpoint_option(min=0.001, help="of each request")] = 120.0,
    trace: Annotated[Path | None, workload_option(help="Azure CSV, BurstGPT CSV or Mooncake JSONL")] = None,
    first_s: Annotated[float | None, workload_option(min=0, help="only the first seconds, before scaling to a rate")] = None,
    requests: Annotated[int | None, workload_option(min=1, help="at most; default: all; generated: 200, or as probes need")] = None,
    max_context: Annotated[int | None, workload_option(min=2, help="cut prompt + output to this many tokens")] = None,
    scale_lengths: Annotated[bool, workload_option("--scale-lengths", help="shrink all lengths in proportion instead of cutting")] = False,
    seed: Annotated[int, workload_option(min=0, help="of generated arrivals and lengths")] = 0,
    arrivals: Annotated[Arrivals, generator_option()] = Arrivals.POISSON,
    cv: Annotated[float, generator_option(help="coefficient of variation of the gaps, for gamma and weibull")] = 1.0,
    prompt_mean: Annotated[float, generator_option(help="tokens")] = 512.0,
    prompt_sigma: Annotated[float, generator_option(help="of the logarithm; 0: fixed")] = 0.0,
    prompt_max: Annotated[int | None, generator_option()] = None,
    output_mean: Annotated[float, generator_option(help="tokens")] = 128.0,
    output_sigma: Annotated[float, generator_option(help="of the logarithm; 0: fixed")] = 0.0,
    output_max: Annotated[int | None, generator_option()] = None,
    prefix_tokens: Annotated[int, generator_option(min=0, help="put before every prompt, shared")] = 0,
    prefix_groups: Annotated[int, generator_option(min=1, help="how many such prefixes")] = 1,
    rate: Annotated[float | None, load_option(help="requests/s; default: the trace's own, else 1")] = None,
    rates: Annotated[str | None, load_option(help="one after another: 1,2,4")] = None,
    goodput: Annotated[bool, load_option("--goodput", help="search the highest rate that reaches --target, from --rate on")] = False,
    target: Annotated[float, load_option(help="attainment")] = 0.9,
    half_width: Annotated[float, load_option(help="of the attainment's interval, at which a close probe is decided")] = 0.03,
    resolution: Annotated[float, load_option(help="of the rate found, relative")] = 0.05,
    probe_s: Annotated[float, load_option(min=0, help="shortest probe, in seconds of load")] = 20.0,
    ttft_ms: Annotated[float | None, objective_option(min=0)] = None,
    tpot_ms: Annotated[float | None, objective_option(min=0)] = None,
    tell_objective: Annotated[bool, objective_option("--tell-objective", help="to the server, with each request")] = False,
    gpus: Annotated[int, objective_option(min=1, help="that serve, all ranks of all workers: for goodput per GPU")] = 1,
    mode: Annotated[PromptMode, prompt_option()] = PromptMode.TOKEN_IDS,
    vocab_size: Annotated[int | None, prompt_option(min=1, help="default: from /v1/models, else of --tokenizer")] = None,
    tokenizer: Annotated[Path | None, prompt_option(help="folder with tokenizer.json, for text and chat")] = None,
    prompt_seed: Annotated[int | None, prompt_option(min=0, help="default: drawn, so that no prefix cache knows them from before")] = None,
    json: Annotated[str | None, report_option(help="file, or - for the standard output")] = None,
    png: Annotated[Path | None, report_option(help="attainment over rate")] = None,
) -> None:
    """Send a workload to any OpenAI-compatible server; report latencies, attainment and goodput."""
    console = Console(stderr=json == "-")
    with _exit_codes():
        lengths = Lengths(prompt_mean, prompt_sigma, prompt_max), Lengths(output_mean, output_sigma, output_max)
        prefix = SharedPrefix(prefix_tokens, prefix_groups) if prefix_tokens else None
        recipe = Recipe(requests or (NUM_GENERATED_TO_SEARCH if goodput else NUM_GENERATED), *lengths, arrivals, cv, prefix, seed)
        workload = _narrow(read_trace(trace) if trace else generate(recipe), first_s, requests)
        if max_context is not None:
            workload = workload.fit_context(max_context, scale=scale_lengths)
        elif scale_lengths:
            raise WorkloadError("--scale-lengths needs --max-context, the context to scale to")
        wanted, start_rate = _rates(rate, rates, recorded=trace is not None), 1.0 if rate is None else rate
        search = SearchPlan(start_rate, len(workload), target, half_width, resolution, min_probe_s=probe_s) if goodput else None
        load = Load(wanted, search)
        objective, prompts = Objective(ttft_ms, tpot_ms), PromptSource(mode, vocab_size, tokenizer, _seed(prompt_seed))
        plan = BenchPlan(Address.parse(url, api_key), workload, load, objective, prompts, model, deadline_s, gpus, seed, tell_objective)
        result = _measure(plan)
        print_result(console, result)
        _write(result, json, png, target)
    raise typer.Exit(_exit_code(result))


@app.command()
def engine(
    model: Annotated[Path, typer.Argument(help="Hugging Face folder; only config.json is needed with --load-format dummy")],
    load_format: Annotated[str, typer.Option(help="safetensors, or dummy: seeded random weights")] = "safetensors",
    dtype: Annotated[str, typer.Option()] = "auto",
    device: Annotated[str, typer.Option()] = "cuda",
    block_size: Annotated[int, typer.Option(help="tokens of a KV block")] = 64,
    repeats: Annotated[int, typer.Option(min=3, help="of each prefill row; decode rows take ten times as many steps")] = 7,
    tp: Annotated[int, typer.Option(min=1, help="ranks, each on a GPU of its own; kernels are timed for one")] = 1,
    quick: Annotated[bool, typer.Option("--quick", help="small shapes, to see that it works")] = False,
    json: Annotated[Path | None, report_option()] = None,
    png: Annotated[Path | None, report_option(help="milliseconds and roofline share of each row")] = None,
) -> None:
    """Time one engine by itself, without a cluster: prefill, decode, kernels, each beside its roofline."""
    from .engine_bench import EngineBench, run_engine_bench  # torch: not for every command that only names `bench`

    plan = EngineBench(model, load_format, dtype, device, block_size, repeats, quick, tp)
    with _exit_codes():
        result = run_engine_bench(plan, Console())
        if json is not None:
            _save(json, result)
        if png is not None:
            from .plot import plot_rows

            plot_rows(png, result)


@app.command()
def transfer(
    transports: Annotated[str, typer.Option(help="shm,ucx,nvlink,nixl; default: all that can be used here")] = "",
    programs: Annotated[str, typer.Option(help="nvlink: of its kernel, several to compare: 8,16,32")] = "",
    copy_engines: Annotated[bool, typer.Option("--copy-engines", help="nvlink: measure them too")] = False,
    parts: Annotated[str, typer.Option(help="pages,handoff,decode; default: all")] = "",
    one_gpu: Annotated[bool, typer.Option("--one-gpu", help="both ends on the first GPU: no link, to see that it works")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="few pages and rounds, to see that it works")] = False,
    json: Annotated[Path | None, report_option()] = None,
) -> None:
    """Move KV pages between two processes over each transport: GB/s, latency, a handoff's microseconds, the cost to work beside it."""
    from .transfer_bench import PART_NAMES, TransferBench, run_transfer_bench  # torch, as above

    with _exit_codes():
        shapes = _numbers("--programs", programs)
        plan = TransferBench(_names(transports), shapes, copy_engines, one_gpu, quick, _names(parts) or PART_NAMES)
        report = run_transfer_bench(plan, Console())
        if json is not None:
            _save(json, report)


@app.command()
def split(
    url: Annotated[str, endpoint_option(help="of a deployment with both roles")],
    colocated_url: Annotated[str | None, endpoint_option(help="default: its own workers, each alone (router.debug_headers)")] = None,
    model: Annotated[str | None, endpoint_option(help="default: the first that /v1/models lists")] = None,
    api_key: Annotated[str | None, endpoint_option(envvar="DIPTYCH_API_KEY")] = None,
    lengths: Annotated[str, workload_option(help="of prompts, tokens")] = "1024,4096,8192",
    rounds: Annotated[int, workload_option(min=1, help="of requests, one for each way, for each length")] = 30,
    output_tokens: Annotated[int, workload_option(min=2)] = 8,
    seed: Annotated[int | None, workload_option(min=0, help="default: drawn, so that no prefix cache knows the prompts")] = None,
    vocab_size: Annotated[int | None, prompt_option(min=1, help="default: from /v1/models")] = None,
    json: Annotated[Path | None, report_option()] = None,
) -> None:
    """Compare TTFT and the second token of a split with those of one worker, request by request, on idle workers."""
    from .split_bench import SplitBench, run_split_bench  # not for every command that only names `bench`

    with _exit_codes():
        colocated = Address.parse(colocated_url, api_key) if colocated_url is not None else None
        prompts = PromptSource(PromptMode.TOKEN_IDS, vocab_size, None, _seed(seed))
        plan = SplitBench(Address.parse(url, api_key), colocated, _numbers("--lengths", lengths), rounds, output_tokens, prompts, model)
        report = run_split_bench(plan, Console())
        if json is not None:
            _save(json, report)


@app.command()
def gateway(
    model: Annotated[Path | None, typer.Argument(help="folder with a tokenizer; default: the model that comes with the package")] = None,
    gateways: Annotated[int, typer.Option(min=1, help="processes on one port")] = 1,
    connections: Annotated[int, typer.Option(min=1)] = 128,
    seconds: Annotated[float, typer.Option(min=0.1, help="of each phase")] = 5.0,
    stream_tokens: Annotated[int, typer.Option(min=2, help="of a long answer")] = 256,
    step_ms: Annotated[float, typer.Option(min=0.1, help="of the stub engine")] = 2.0,
    prompt_words: Annotated[int, typer.Option(min=1)] = 30,
    policy: Annotated[str, typer.Option(help="of the router")] = "goodput",
    rate: Annotated[float | None, typer.Option(min=0.1, help="requests/s of the phase latency; default: a share of what they did")] = None,
    json: Annotated[Path | None, report_option()] = None,
) -> None:
    """What gateways can do by themselves: HTTP, tokenizing, routing, ZeroMQ, detokenizing, against an engine that computes nothing."""
    from ...models.embedded.path import embedded_model_path
    from .gateway_bench import GatewayBench, run_gateway_bench  # a tokenizer: not for every command that only names `bench`

    folder = model or embedded_model_path()
    plan = GatewayBench(folder, gateways, connections, seconds, stream_tokens, step_ms, prompt_words, policy, rate)
    with _exit_codes():
        phases = run_gateway_bench(plan, Console())
        if json is not None:
            _save(json, phases)


def _seed(given: int | None) -> int:
    return secrets.randbits(32) if given is None else given


def _names(text: str) -> tuple[str, ...]:
    return tuple(name for name in text.split(",") if name)


def _numbers(option: str, text: str) -> tuple[int, ...]:
    """Raises WorkloadError."""
    names = _names(text)
    if not all(name.isdecimal() and int(name) for name in names):
        raise WorkloadError(f"{option} {text!r}: numbers from 1 on with commas between are wanted, such as 8,16,32")
    return tuple(map(int, names))


def _save(path: Path, report: object) -> None:
    path.write_bytes(msgspec.json.format(msgspec.json.encode(report)) + b"\n")


@contextlib.contextmanager
def _exit_codes() -> Iterator[None]:
    try:
        yield
    except (DiptychError, OSError) as error:
        Console(stderr=True).print(str(error), style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(EXIT_UNREACHABLE if isinstance(error, EndpointError) else EXIT_USAGE) from error


def _narrow(workload: Workload, first_s: float | None, requests: int | None) -> Workload:
    within = workload if first_s is None else workload.first_seconds(first_s)
    return within if requests is None else within.first(requests)


def _rates(rate: float | None, rates: str | None, *, recorded: bool) -> tuple[float | None, ...]:
    """Raises WorkloadError."""
    if rates is None:
        return (_checked(rate) if rate is not None else None if recorded else 1.0,)
    if rate is not None:
        raise WorkloadError("give --rate or --rates, not both")
    try:
        numbers = [float(text) for text in rates.split(",")]
    except ValueError as error:
        raise WorkloadError(f"--rates {rates!r}: numbers with commas between are wanted, such as 1,2,4") from error
    return tuple(map(_checked, numbers))


def _checked(rate: float) -> float:
    if not 0 < rate < math.inf:
        raise WorkloadError(f"a rate must be > 0 requests/s, and finite: got {rate}")
    return rate


def _measure(plan: BenchPlan) -> BenchResult:
    _allow_many_connections()
    watcher = ProgressWatcher(Console(stderr=True))
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner, watcher.progress:
        return runner.run(_interruptible(plan, watcher))


async def _interruptible(plan: BenchPlan, watcher: ProgressWatcher) -> BenchResult:
    """The first Ctrl-C ends the load with a partial report, the second ends the program."""
    task, loop = asyncio.current_task(), asyncio.get_running_loop()
    assert task is not None

    def interrupt() -> None:
        loop.remove_signal_handler(signal.SIGINT)
        task.cancel()

    loop.add_signal_handler(signal.SIGINT, interrupt)
    client = HttpClient(plan.address)
    try:
        return await measure(plan, client, watcher)
    finally:
        client.close()
        loop.remove_signal_handler(signal.SIGINT)


def _allow_many_connections() -> None:
    """One connection a request under way: the usual soft limit of 1024 files would be met."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _write(result: BenchResult, json: str | None, png: Path | None, target: float) -> None:
    encoded = msgspec.json.format(msgspec.json.encode(result)) + b"\n"
    try:
        if json == "-":
            sys.stdout.buffer.write(encoded)
        elif json is not None:
            Path(json).write_bytes(encoded)
        if png is not None:
            found = result.goodput.search.rate if result.goodput is not None else None
            from .plot import plot_attainment  # matplotlib: not for every command that only names `bench`

            plot_attainment(png, result.runs, title=f"{result.model}, {result.workload.source}", target=target, goodput=found)
    except OSError as error:
        raise BenchError(f"the report cannot be written: {error}") from error


def _exit_code(result: BenchResult) -> int:
    if result.interrupted:
        return EXIT_INTERRUPTED
    if result.goodput is None:
        return EXIT_FAILED if any(run.failed for run in result.runs) else 0
    answer = result.goodput.search.rate
    return EXIT_FAILED if answer == 0 or any(run.failed for run in result.runs if run.rate_asked == answer) else 0
