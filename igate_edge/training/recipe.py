"""The whole recipe, file to file: plain -> fork -> search -> freeze -> final (recipe.md section 2), or the paper's.

Kill it at any moment: finished stages are whole files, the running one goes on from its last checkpoint.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from ..contract import OutputSpec, Preprocess
from ..errors import InputError
from ..files import os_errors, write_atomic
from ..gating.convert import InterroGateNet, PlainNet
from ..gating.merge import MergedNet, merge_unchecked
from ..gating.separate import SeparateNets
from ..metrics import delta_mtl
from .balance import Balance, make_balance
from .checkpoint import load_tensors
from .config import TrainConfig, make_tasks
from .layout import kept
from .loop import Progress
from .peers import shrink
from .source import Source, open_source
from .stages import (
    Context,
    Done,
    build_gated,
    build_plain,
    final,
    freeze,
    meet_budget,
    merged,
    plain,
    search,
    time_budget,
)
from .tasks import Task

CANDIDATES = ("fixed", "gradnorm", "uncertainty")
SOURCE = "source.json"
Net = InterroGateNet | MergedNet | PlainNet | SeparateNets


@dataclass(frozen=True)
class Trained:
    """What `train` leaves in its folder: the gated net and its plain rival, with their results."""

    folder: Path
    config: TrainConfig
    specs: tuple[OutputSpec, ...]
    plain: Done
    final: Done

    @property
    def preprocess(self) -> Preprocess:
        return self.config.preprocess()


def train(
    data: str | os.PathLike[str] | Source,
    out_dir: str | os.PathLike[str],
    config: TrainConfig | None = None,
    *,
    resume: bool = True,
    progress: Progress | None = None,
) -> Trained:
    """Train a gated net on a data folder. Everything goes to `out_dir`: one .safetensors and .json a stage, log.jsonl,
    config.json, result.json. With `resume`, finished stages of the same config are kept and the running one goes on.

    A folder that holds a run of other settings or frames is refused, whatever `resume` says. Raises DataError and
    InputError for data or settings, BudgetError for a budget that whole gates cannot meet, UnavailableError for the
    disk, CheckFailed when training diverges.
    """
    config, folder = config or TrainConfig(), Path(out_dir)
    source = data if isinstance(data, Source) else open_source(data, config)
    tasks = make_tasks(config, source.available, source.class_weights)
    if config.kind == "time" and config.step is None:  # a run can be read where its table is not
        config = replace(config, step=time_budget(config).latency().step)
    ctx = Context(config, tasks, source, folder, resume, progress)
    if config.kind == "hard":
        meet_budget(build_gated(ctx), config)  # before any training, on gates that are all alike
    elif config.kind == "time":
        time_budget(config).check(build_gated(ctx))
    claim(folder, config, source, None if isinstance(data, Source) else Path(data))
    base, last = (forked if config.recipe == "forked" else paper)(ctx)
    if config.single_steps:
        for task in tasks:
            single(ctx, task, config.single_steps)
    done = Trained(folder, config, tuple(task.spec for task in tasks), base, last)
    write_atomic(folder / "result.json", json.dumps(summary(done), indent=1) + "\n")
    return done


def claim(folder: Path, config: TrainConfig, source: Source, data: Path | None) -> None:
    """Write which settings and frames a folder's run has. Raises InputError when it has others: nothing is replaced."""
    stored = stored_run(folder)
    if stored is not None and TrainConfig.from_json(stored["config"]) != config:
        then, now = stored["config"], config.as_json()
        names = sorted(name for name in {*then, *now} if then.get(name) != now.get(name))
        evidence = ", ".join(f"{name} was {then.get(name)}, now {now.get(name)}" for name in names)
        raise InputError(f"{folder} holds a run of other settings", evidence, "choose another folder")
    known = None if stored is None else stored["fingerprint"]
    if known not in (None, source.fingerprint):
        evidence = f"it was trained on {stored['data'] or 'others'}" if stored else ""
        raise InputError(f"{folder} holds a run on other frames", evidence, "choose another folder, or its own data")
    with os_errors(folder, "create"):
        folder.mkdir(parents=True, exist_ok=True)
    where = str(data.resolve()) if data is not None else stored and stored["data"]
    about = {"data": where, "fingerprint": source.fingerprint}
    write_atomic(folder / SOURCE, json.dumps(about) + "\n")
    write_atomic(folder / "config.json", json.dumps(config.as_json(), indent=1) + "\n")


def stored_run(folder: Path) -> dict[str, Any] | None:
    """`config`, `data` (path or None) and `fingerprint` of the run in a folder; None without one. Raises InputError."""
    if not (folder / "config.json").exists():
        return None
    try:
        config = json.loads((folder / "config.json").read_text())
        about = json.loads((folder / SOURCE).read_text()) if (folder / SOURCE).exists() else {}
        if not isinstance(config, dict):  # dict([]) would be a run with every setting at its default
            raise TypeError(f"config.json holds a {type(config).__name__}")
        return {"config": config, "data": about.get("data"), "fingerprint": about.get("fingerprint")}
    except (ValueError, TypeError, AttributeError) as error:
        raise InputError("the run's settings cannot be read", f"{folder}: {error}", "choose another folder") from error


def forked(ctx: Context) -> tuple[Done, Done]:
    """Our recipe. Returns the plain net and the final gated net."""
    config = ctx.config
    base = plain(ctx, "plain", first_balance(ctx), steps=config.plain_steps, lr=config.lr)
    branches = fork(ctx, base)
    weights = Balance(base.result["weights"])
    searched = search(ctx, base, branches, weights, name="search", steps=config.search_steps)
    frozen = freeze(ctx, searched)
    cycle = final if config.final == "gated" else partial(merged, mode=config.final)
    return base, cycle(ctx, frozen, weights, name="final", steps=config.final_steps, lr=config.lr)


def paper(ctx: Context) -> tuple[Done, Done]:
    """The faithful ablation: single-task nets, joint training with the soft hinge and SGD on gates, threshold.

    The shared branch starts from the plain net where the paper has ImageNet weights; no retraining after the threshold.
    """
    config = ctx.config
    base = plain(ctx, "plain", first_balance(ctx), steps=config.plain_steps, lr=config.lr)
    singles = {t.name: single(ctx, t, config.single_steps or config.plain_steps) for t in ctx.tasks}
    steps = config.search_steps + config.final_steps
    searched = search(ctx, base, singles, Balance(base.result["weights"]), name="search", steps=steps)
    frozen = freeze(ctx, searched)
    return base, replace(frozen, result={**searched.result, **frozen.result})


def single(ctx: Context, task: Task, steps: int) -> Done:
    """A single-task net from scratch."""
    return plain(ctx, f"single-{task.name}", Balance({task.name: 1.0}), steps=steps, lr=ctx.config.lr, tasks=[task])


def fork(ctx: Context, base: Done) -> dict[str, Done]:
    """One copy of the plain net a task, fine-tuned on that task alone: aligned branches for the search."""
    steps, lr = ctx.config.fork_steps, ctx.config.fork_lr
    return {
        t.name: plain(ctx, f"fork-{t.name}", Balance({t.name: 1.0}), steps=steps, lr=lr, tasks=[t], start=base)
        for t in ctx.tasks
    }


def first_balance(ctx: Context) -> Balance:
    """The loss balance that the config asks for, measured first when it says so."""
    own = {task.name: task.weight for task in ctx.tasks}
    if ctx.config.balance != "measure" or len(own) < 2:
        return make_balance("fixed" if ctx.config.balance == "measure" else ctx.config.balance, own)
    return Balance(measure_balance(ctx)["weights"])


def measure_balance(ctx: Context) -> dict[str, Any]:
    """Train short plain nets under every balance, then sweep around the best; the weights of the best one win.

    The score is the mean relative gain over the candidates' mean metrics, in %. Written to balance.json.
    """
    own = {task.name: task.weight for task in ctx.tasks}
    steps, lr = ctx.config.balance_steps, ctx.config.lr
    done = {mode: plain(ctx, f"balance-{mode}", make_balance(mode, own), steps=steps, lr=lr) for mode in CANDIDATES}
    best = max(done, key=lambda name: _scores(ctx, done)[name])
    around = done[best].result["weights"]
    for task in own:
        weights = {**around, task: 2 * around[task]}
        done[f"2x-{task}"] = plain(ctx, f"balance-2x-{task}", make_balance("fixed", weights), steps=steps, lr=lr)
    scores = _scores(ctx, done)
    best = max(scores, key=lambda name: scores[name])
    rows = {
        n: {"score": scores[n], "weights": d.result["weights"], "metrics": d.result["metrics"]} for n, d in done.items()
    }
    found = {
        "best": best,
        "weights": done[best].result["weights"],
        "macs": sum(d.result["macs"] for d in done.values()),
    }
    write_atomic(ctx.folder / "balance.json", json.dumps({**found, "candidates": rows}, indent=1) + "\n")
    return found


def _scores(ctx: Context, done: Mapping[str, Done]) -> dict[str, float]:
    specs = [task.spec for task in ctx.tasks]
    values = {name: {s.name: d.result["metrics"][s.name][s.metric] for s in specs} for name, d in done.items()}
    mean = {s.name: sum(v[s.name] for v in values.values()) / len(values) for s in specs}
    return {name: delta_mtl(v, mean, specs) for name, v in values.items()}


def summary(done: Trained) -> dict[str, Any]:
    """The run as JSON: tasks, input, gates, metrics of the gated net and of the plain one, cost of every stage."""
    stages = {}
    for path in sorted(done.folder.glob("*.json")):
        row = kept(path)  # a file that is not ours is passed over
        if "macs" in row and "steps" in row:
            stages[path.stem] = {k: row[k] for k in ("steps", "seconds", "macs", "metrics") if k in row}
    return {
        "tasks": [spec.as_json() for spec in done.specs],
        "preprocess": done.preprocess.as_json(),
        "config": done.config.as_json(),
        "metrics": done.final.result.get("metrics"),
        "plain": done.plain.result.get("metrics"),
        "weights": done.plain.result.get("weights"),
        "hard": done.final.result["hard"],
        "budget": done.final.result.get("budget"),
        "stages": stages,
    }


def load_net(folder: str | os.PathLike[str], stage: str = "final") -> tuple[Net, Preprocess]:
    """The network that a run left: "final" (merged or gated), "plain", "single-<task>"... in eval mode, to be exported.

    Raises InputError when the folder holds no such result, CheckpointError when the file is not whole.
    """
    folder = Path(folder)
    if stage == "final" and not (folder / "final.safetensors").exists():
        stage = "frozen"  # the paper's recipe ends there
    path = folder / f"{stage}.safetensors"
    if not path.exists() or not (folder / "result.json").exists():
        fix = "train first, or resume the run that was interrupted"
        raise InputError(f"no trained network in {folder}", f"{path.name} or result.json is missing", fix)
    try:
        about = json.loads((folder / "result.json").read_text())
        config = TrainConfig.from_json(about["config"])
        specs = [OutputSpec.from_json(spec) for spec in about["tasks"]]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        evidence = f"{folder / 'result.json'}: {type(error).__name__}: {error}"
        raise InputError("the run's result cannot be read", evidence, "resume the run: it is written again") from error
    tasks = make_tasks(config, {spec.target: spec.classes for spec in specs})
    return restore(config, tasks, path), config.preprocess()


def restore(config: TrainConfig, tasks: Sequence[Task], path: Path) -> Net:
    """The network of one stage file, in eval mode: gated, merged, separate or plain, as its state says."""
    state = load_tensors(path)[0]
    ctx = Context(config, tasks, Source({}, "", lambda b, s: lambda i: {}, lambda: ()), path.parent)
    heads = {key.split(".")[1] for key in state if key.startswith("heads.")}
    net: Net
    if any(key.startswith("sites.") for key in state):
        net = build_gated(ctx)
    elif any(key.startswith("gates.") for key in state):
        gated = build_gated(ctx)
        gated.set_gates({key.removeprefix("gates."): state[key] for key in state if key.startswith("gates.")})
        net = merge_unchecked(gated, "fill" if state["filled"] else "masked")
    elif any(key.startswith("nets.") for key in state):
        net = SeparateNets([build_plain(ctx, [task]) for task in tasks])
    else:
        # A pruned net is a plain one with fewer channels: its state says how many.
        net = shrink(build_plain(ctx, [task for task in tasks if task.name in heads]), state)
    net.load_state_dict(state)
    return net.eval()
