"""The command line `igate`: parses, calls, prints. Exit codes: see cli_console."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from . import __version__
from .cli_console import Answer, command, drop_stdout, explain, print_error, say, tidy_at_sigterm
from .cli_jetson import jetson
from .errors import InputError, UnavailableError

app = typer.Typer(
    name="igate",
    help="Several perception tasks in one INT8 engine: train, prune, quantise, verify, run.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

BundleArg = Annotated[Path, typer.Argument(metavar="BUNDLE", help="A bundle: NAME.igate.", show_default=False)]
Threads = Annotated[int, typer.Option(min=1, max=256, help="Threads of the engine.")]
Precision = Annotated[str, typer.Option(help="auto (the faster of both, measured), int8 or float.")]
Backend = Annotated[str, typer.Option(help="onnxruntime, tensorrt, auto (TensorRT if usable), emulate (on this CPU).")]
Calibration = Annotated[Path | None, typer.Option(help="Frames that replace the bundle's ranges.", show_default=False)]
CacheDir = Annotated[Path | None, typer.Option("--cache", help="Folder of built engines.", show_default="user cache")]


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        typer.echo(f"igate_edge {__version__}")
        raise typer.Exit


@app.command()
@command
def doctor(
    strict: Annotated[bool, typer.Option("--strict", help="Exit 1 when a part does not fit the board.")] = False,
    purpose: Annotated[str, typer.Option("--for", help="build, or run: leave out what only builds need.")] = "build",
) -> Answer:
    """Show what this machine can do, what is missing, and the command that fixes it."""
    from .cli_doctor import doctor as examine

    return examine(strict, purpose)


@app.command()
@command
def inspect(
    path: Annotated[Path, typer.Argument(metavar="FILE", help="A bundle or a model.onnx.", show_default=False)],
) -> Answer:
    """Show tasks, preprocessing, gates, cost and provenance of a bundle or an ONNX model."""
    from .cli_inspect import inspect_file

    return inspect_file(path)


@app.command()
@command
def build(
    path: BundleArg,
    backend: Backend = "onnxruntime",
    threads: Threads = 1,
    precision: Precision = "auto",
    cache: CacheDir = None,
    calibration: Calibration = None,
    tune: Annotated[bool, typer.Option("--tune", help="Find the fastest lowering of the layers: a minute.")] = False,
    batch: Annotated[int, typer.Option(min=1, help="TensorRT: most frames of a call, for several cameras.")] = 1,
    max_ms: Annotated[
        float | None, typer.Option(help="TensorRT: fail (exit 1) above this p99. Default: budget.")
    ] = None,
    time_limit: Annotated[float | None, typer.Option(help="TensorRT: seconds for more settings. Default 300.")] = None,
    workspace_mb: Annotated[int | None, typer.Option(min=1, help="TensorRT: scratch memory. Default: free.")] = None,
    plugin: Annotated[list[Path] | None, typer.Option(help="TensorRT: a plugin library; repeat.")] = None,
    check: Annotated[str | None, typer.Option(help="Instead: tensorrt-rtx, does NVIDIA's builder take it?")] = None,
    onnx: Annotated[Path | None, typer.Option(help="Instead: write the graph that TensorRT gets.")] = None,
) -> Answer:
    """Build the engine of a bundle for this machine and check its golden frames."""
    if check is not None or onnx is not None:
        from .cli_check import check_bundle

        return check_bundle(path, check, onnx, precision)
    from .cli_engine import build_bundle

    device = {"batch": batch, "max_ms": max_ms, "seconds": time_limit, "workspace_mb": workspace_mb, "plugins": plugin}
    return build_bundle(path, backend, threads, precision, cache, calibration, tune, device)


@app.command()
@command
def verify(path: BundleArg, backend: Backend = "onnxruntime", cache: CacheDir = None) -> Answer:
    """Check that the engine still computes what was trained; exit code 1 when it does not."""
    from .cli_engine import verify_bundle

    return verify_bundle(path, backend, cache)


@app.command()
@command
def bench(
    path: BundleArg,
    rounds: Annotated[int, typer.Option(min=3, help="Interleaved rounds.")] = 40,
    threads: Threads = 1,
    max_ratio: Annotated[float | None, typer.Option(help="Fail (exit 1) above this ratio to the plain net.")] = None,
    max_ms: Annotated[float | None, typer.Option(help="Fail (exit 1) above this median in milliseconds.")] = None,
) -> Answer:
    """Time the engine against the plain shared net, separate nets and the run-time-gated net, interleaved."""
    from .cli_engine import bench_bundle

    return bench_bundle(path, rounds, threads, max_ratio, max_ms)


@app.command()
@command
def run(
    path: BundleArg,
    source: Annotated[Path | None, typer.Argument(metavar="INPUT", help="Image, folder, video or .npy.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for pictures and arrays; of --bag: NAME.mcap.")] = Path("out/run"),
    limit: Annotated[int | None, typer.Option(min=1, help="Stop after this many frames.")] = None,
    threads: Threads = 1,
    precision: Precision = "auto",
    cache: CacheDir = None,
    calibration: Calibration = None,
    bag: Annotated[Path | None, typer.Option(help="Instead of INPUT: a bag of ROS 2; results become one too.")] = None,
    topic: Annotated[list[str] | None, typer.Option(help="Image topic of the bag; repeat. Default: cameras.")] = None,
    depth_encoding: Annotated[str, typer.Option(help="In the bag: 32FC1 (metres) or 16UC1 (millimetres).")] = "32FC1",
) -> Answer:
    """Run a bundle on frames: masks, depth maps, normals, side-by-side pictures and raw arrays; or on a bag."""
    if bag is not None:
        from .cli_bag import run_bag

        return run_bag(
            path, source, bag, out, topic or (), limit, depth_encoding, (threads, precision, cache, calibration)
        )
    if source is None:
        raise InputError("nothing to run on", "neither INPUT nor --bag was given", "see `igate run --help`")
    from .cli_engine import run_bundle

    return run_bundle(path, source, out, limit, threads, precision, cache, calibration)


@app.command()
@command
def serve(
    path: BundleArg,
    source: Annotated[
        str, typer.Option(help="synthetic, v4l2:///dev/video0, csi://0, rtsp://..., a video or a folder.")
    ] = "synthetic",
    backend: Backend = "auto",
    threads: Threads = 1,
    cache: CacheDir = None,
    budget_ms: Annotated[float | None, typer.Option(help="Deadline of a frame. Default: the bundle's.")] = None,
    port: Annotated[int, typer.Option(help="Health as Prometheus text on 127.0.0.1; 0: none.")] = 9464,
    record: Annotated[Path | None, typer.Option(help="Folder of flight recordings, made at an alarm.")] = None,
    latest: Annotated[Path | None, typer.Option(help="NAME.npz that always holds the newest answers.")] = None,
    seconds: Annotated[float | None, typer.Option(min=0.1, help="Stop after this time. Default: at a signal.")] = None,
    jsonl: Annotated[Path | None, typer.Option(help="NAME.jsonl: a line of health every 10 s and at the end.")] = None,
) -> Answer:
    """Run a camera through a bundle until stopped: watched, recorded, supervised; what the systemd unit starts."""
    from .cli_serve import ServeArgs
    from .cli_serve import serve as run_service

    return run_service(
        ServeArgs(path, source, backend, threads, cache, budget_ms, port, record, latest, seconds, jsonl)
    )


@app.command()
@command
def replay(
    path: BundleArg,
    recording: Annotated[Path, typer.Argument(metavar="RECORDING", help="flight_*.mcap.", show_default=False)],
    threads: Threads = 1,
    precision: Precision = "auto",
    cache: CacheDir = None,
    drift: Annotated[bool, typer.Option("--drift", help="Which tensors leave their INT8 range: takes longer.")] = False,
) -> Answer:
    """Run the frames of a flight recording again; exit code 1 when they are answered in another way."""
    from .cli_bag import replay_recording

    return replay_recording(path, recording, {"threads": threads, "precision": precision, "cache_dir": cache}, drift)


@app.command()
@command
def report(
    path: BundleArg,
    out: Annotated[Path, typer.Option(help="The HTML file to write.")] = Path("out/report.html"),
    measure: Annotated[bool, typer.Option("--bench/--no-bench", help="Measure times for the cost table.")] = True,
    cache: CacheDir = None,
) -> Answer:
    """Write one self-contained HTML file: sharing map, cost, accuracy, predictions, fallbacks, provenance."""
    from .reports.report import make_report

    written = make_report(path, out, measure=measure, cache=cache, say=say)
    return Answer(
        {"report": str(written.path), "headline": written.headline}, [written.headline, f"report: {written.path}"]
    )


@app.command()
@command
def demo(
    bundle: Annotated[Path, typer.Option(help="The bundle to show.")] = Path("examples/tabletop.igate"),
    out: Annotated[Path, typer.Option(help="Folder for everything the demo writes.")] = Path("out/demo"),
) -> Answer:
    """Show the whole product on the trained example: inspect, build, verify, bench, run, report. Under a minute."""
    from .demo import run_demo

    return run_demo(bundle, out)


@app.command()
@command
def train(
    data: Annotated[str | None, typer.Option(help="A data folder, or the word tabletop to generate one.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of the training run.")] = Path("runs/train"),
    task: Annotated[list[str] | None, typer.Option(help="A task of data.json; repeat for more. Default: all.")] = None,
    backbone: Annotated[str | None, typer.Option(help="Default resnet18; a wrong name lists all.")] = None,
    width: Annotated[float | None, typer.Option(help="First stage's channels; mobilenet: a multiplier.")] = None,
    size: Annotated[str | None, typer.Option(help="Input as WIDTHxHEIGHT. Default 128x96.")] = None,
    budget: Annotated[float | None, typer.Option(help="Share of channels a task may own. Default 0.25.")] = None,
    ratio: Annotated[float | None, typer.Option(help="Instead: time, as a multiple of the plain shared net's.")] = None,
    ms: Annotated[float | None, typer.Option(help="Instead: time, in milliseconds of the latency table.")] = None,
    table: Annotated[str | None, typer.Option(help="Latency table of the target: a file, or a shipped one.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Steps of all stages together.")] = None,
    frames: Annotated[int | None, typer.Option(min=8, help="Frames to generate. Default 4000.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of weights and data order. Default 0.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where a stopped run ended.")] = False,
    config: Annotated[Path | None, typer.Option(help="Settings, as a run's config.json; options replace them.")] = None,
    recipe: Annotated[str | None, typer.Option(help="forked (default) or paper.")] = None,
    balance: Annotated[str | None, typer.Option(help="gradnorm (default), fixed, uncertainty or measure.")] = None,
    weight: Annotated[list[str] | None, typer.Option(metavar="TASK=W", help="Weight of a loss; repeat.")] = None,
    granule: Annotated[int | None, typer.Option(min=0, help="Channels per gate. Default 0: by layer.")] = None,
    tie: Annotated[str | None, typer.Option(help="stage (default) or none: which layers share gates.")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate. Default 0.002.")] = None,
    final: Annotated[str | None, typer.Option(help="Last cycle: masked (default), fill or gated.")] = None,
    singles: Annotated[bool, typer.Option("--singles", help="Train single-task nets too, to compare.")] = False,
) -> Answer:
    """Train a gated multi-task network on a data folder and leave a run that `igate export` turns into a bundle."""
    from .cli_train import TrainArgs, train_run

    first = (data, out, tuple(task or ()), backbone, width, size, budget, steps, seed, frames, resume)
    more = (recipe, balance, tuple(weight or ()), granule, tie, lr, singles, ratio, ms, table, final)
    return train_run(TrainArgs(*first, config, *more))


@app.command()
@command
def export(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN", help="A folder `igate train` wrote.", show_default=False)],
    out: Annotated[Path, typer.Option(help="The bundle to write.")] = Path("model.igate"),
    data: Annotated[Path | None, typer.Option(help="Data folder. Default: the one of the run.")] = None,
    half_weights: Annotated[bool, typer.Option("--half-weights", help="Store weights in 16 bits.")] = False,
) -> Answer:
    """Turn a training run into a bundle, with golden frames and its accuracy in float and INT8."""
    from .cli_export import export_run

    return export_run(run_dir, out, data, half_weights)


@app.command()
@command
def profile(
    out: Annotated[Path | None, typer.Option(help="The table to write.", show_default="beside built engines")] = None,
    threads: Threads = 1,
    precision: Annotated[str, typer.Option(help="int8 or float: what the engines of this table run.")] = "int8",
    backend: Annotated[str, typer.Option(help="onnxruntime, or tensorrt (not run on a device).")] = "onnxruntime",
    quick: Annotated[bool, typer.Option("--quick", help="Fewer sizes and runs: half the accuracy.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where a stopped measurement ended.")] = False,
) -> Answer:
    """Time this machine's operators: the latency table that budgets, sweeps and `build --tune` predict by."""
    from .cli_profile import profile_machine

    return profile_machine(out, threads, precision, quick, resume, backend)


sweeping = typer.Typer(pretty_exceptions_enable=False)


@sweeping.callback(invoke_without_command=True)
@command
def sweep(
    context: typer.Context,
    data: Annotated[str | None, typer.Option(help="A data folder, or the word tabletop to generate one.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of the sweep.")] = Path("runs/sweep"),
    ratios: Annotated[
        str | None, typer.Option(help="Budgets, times the plain net. Default 1.2,1.35,1.5,1.75,2.")
    ] = None,
    ms: Annotated[str | None, typer.Option(help="Budgets in milliseconds instead, as 3,4,5.")] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Plain net's steps: all get its compute. Default 2000.")
    ] = None,
    seeds: Annotated[str | None, typer.Option(help="Seeds, as 0,1. Default 0.")] = None,
    nets: Annotated[
        str | None, typer.Option(help="Of plain,wide,narrow,ours,grown (default), fill,random,pruned,single,third.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on; --ratios, --seeds and --nets may add.")] = False,
    task: Annotated[list[str] | None, typer.Option(help="A task of data.json; repeat for more. Default: all.")] = None,
    backbone: Annotated[str | None, typer.Option(help="Default resnet18; a wrong name lists all.")] = None,
    width: Annotated[float | None, typer.Option(help="First stage's channels; mobilenet: a multiplier.")] = None,
    size: Annotated[str | None, typer.Option(help="Input as WIDTHxHEIGHT. Default 128x96.")] = None,
    frames: Annotated[int | None, typer.Option(min=8, help="Frames to generate. Default 4000.")] = None,
    weight: Annotated[list[str] | None, typer.Option(metavar="TASK=W", help="Loss weights. Default: measured.")] = None,
    shares: Annotated[str | None, typer.Option(help="Ours' warm start, fork, search. Default 0.7,0.03,0.07.")] = None,
    config: Annotated[Path | None, typer.Option(help="More settings, as a run's config.json.")] = None,
    rounds: Annotated[int, typer.Option(min=3, help="Interleaved timing rounds.")] = 100,
) -> Answer:
    """Accuracy against measured milliseconds in one run: ours at every budget beside its rivals, and who wins where."""
    if context.invoked_subcommand is not None:
        return Answer({})
    from .cli_sweep import SweepArgs, sweep_run
    from .cli_train import TrainArgs

    first = (data, out, tuple(task or ()), backbone, width, size, None, None, None, frames, resume, config)
    train_args = TrainArgs(*first, weights=tuple(weight or ()))
    return sweep_run(SweepArgs(train_args, steps, ratios, ms, seeds, nets, shares, rounds))


@sweeping.command("export")
@command
def export_sweep(
    folder: Annotated[Path, typer.Argument(metavar="SWEEP", help="A folder of `igate sweep`.", show_default=False)],
    at: Annotated[str, typer.Option(help="Budget: 1.5 (times the plain net) or 4ms.")],
    net: Annotated[str | None, typer.Option(help="A net of the table, or a kind as wide. Default: the best.")] = None,
    out: Annotated[Path, typer.Option(help="The bundle to write.")] = Path("model.igate"),
    seed: Annotated[int | None, typer.Option(help="Default: the seed that came out best.")] = None,
    half_weights: Annotated[bool, typer.Option("--half-weights", help="Store weights in 16 bits.")] = False,
) -> Answer:
    """Make a bundle of the best net within a budget, or of any other net of a sweep, rivals too."""
    from .cli_sweep import sweep_export

    return sweep_export(folder, at, net, out, seed, half_weights)


app.add_typer(sweeping, name="sweep")
app.add_typer(jetson, name="jetson")


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the command `igate`; always ends in SystemExit with one of the fixed codes."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    terminated: list[int] = []
    try:
        with tidy_at_sigterm(terminated):
            _refuse_empty(given)
            code = app(args=given, prog_name="igate", standalone_mode=False)
    except SystemExit:  # rich's way to say that the reader of the help has gone
        code = 0
    except OSError as error:  # stdout cannot be written
        drop_stdout()
        print_error(explain(error), False)
        code = UnavailableError.exit_code
    except Exception as error:  # usage errors of the parser; commands handle their own
        code = _usage(error, given)
    if terminated and code == 130:
        code = 128 + terminated[0]
    raise SystemExit(code if isinstance(code, int) else 0)


def _refuse_empty(given: Sequence[str]) -> None:
    """Refuse "" (a script's unset variable): as a path it would be read as the current folder."""
    if any(not text or re.fullmatch("--[a-z-]+=", text) for text in given):
        raise InputError("an argument is empty", shlex.join(["igate", *given]), "give it a value, or leave it out")


def _usage(error: Any, given: Sequence[str]) -> int:
    """A parser's complaint (recognised by its interface: typer brings its own copy of click) as our sentence."""
    if type(error).__name__ == "Abort":
        say("stopped")
        return 130
    if isinstance(error, InputError):
        return _say_usage(error, given)
    if not hasattr(error, "format_message"):
        raise error
    context = getattr(error, "ctx", None)
    message = error.format_message()
    if not message:  # no command given: the help was printed
        return 2
    where = context.command_path if context is not None else "igate"
    cause, _, guess = message.partition(". Did you mean")
    fix = f"did you mean{guess} See `{where} --help`" if guess else f"see `{where} --help`"
    return _say_usage(InputError(cause, shlex.join(["igate", *given]), fix), given)


def _say_usage(sentence: InputError, given: Sequence[str]) -> int:
    print_error(sentence, "--json" in given)
    return sentence.exit_code
