"""`igate export`: a training run becomes a bundle, with golden frames, labels and its accuracy in both precisions."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .cli_console import Answer, say
from .cli_train import GOLDEN_FRAMES, data_info, single_nets
from .errors import DataError, InputError
from .files import make_folder
from .reports.grids import accuracy_grid, results_nets

if TYPE_CHECKING:
    import numpy as np

    from .contract import OutputSpec, Preprocess
    from .training.layout import DataInfo

CALIBRATION_FRAMES = 64


def export_run(run: Path, out: Path, data: Path | None, half_weights: bool) -> Answer:
    """Package the network of a training run, with ranges, golden frames, labels and its accuracy, into a bundle."""
    from .accuracy import int8_losses
    from .bundle import write_bundle
    from .cli_inspect import inspect_file
    from .gating.export import plain_onnx, to_onnx
    from .package import package
    from .training.recipe import load_net

    net, preprocess = load_net(run)
    specs = [task.spec for task in net.tasks]
    frames = _Frames(data or _data_of(run), specs, preprocess)
    about = json.loads((run / "result.json").read_text())
    make_folder(out.parent)
    say(f"exporting {run}")
    onnx = to_onnx(net, preprocess, half_weights=half_weights)
    say(f"pruning, calibrating on {len(frames.calibration)} frames, checking: a few minutes for a large network")
    with tempfile.TemporaryDirectory() as folder:
        trial = Path(folder) / out.name
        bundle = package(
            onnx,
            trial,
            calibration=frames.calibration,
            golden=[frame["image"] for frame in frames.golden],
            labels=frames.labels(),
            budget=about.get("budget") or ({"own_channels": about["config"]["budget"]} if about["hard"] else None),
            provenance=provenance(about, frames.info),
            plain=plain_onnx(net, preprocess),
        )
        results = _results(trial, frames, about)
    parts: dict[str, Any] = {"ranges": bundle.ranges, "plain": bundle.plain, "golden": bundle.golden}
    warnings = [*bundle.warnings, *int8_losses(specs, results)]
    write_bundle(out, {**bundle.manifest, "results": results, "warnings": warnings}, model=bundle.model, **parts)
    answer = inspect_file(out)
    title = f"Accuracy on held-out frames ({frames.title}, {len(frames.held)} frames)"
    table = accuracy_grid(specs, results_nets(results), title)
    return Answer(answer.document, [*answer.shown, "", table, f"next: igate build {out}"])


def _data_of(run: Path) -> Path:
    from .training.recipe import stored_run

    stored = stored_run(run)
    if stored is None or not stored["data"]:
        raise InputError("the run does not say which data it was trained on", str(run), "pass --data DIR")
    return Path(stored["data"])


class _Frames:
    """Frames of a data folder for a bundle: calibration from those trained on, golden ones from the held-out."""

    def __init__(self, folder: Path, specs: Sequence[OutputSpec], preprocess: Preprocess) -> None:
        from torch.utils.data import Subset

        from .training.folder import open_split
        from .training.layout import held_out

        self.info, self.specs, self.preprocess = data_info(folder), specs, preprocess
        train, rule = open_split(folder, "train", ()), held_out(self.info)
        whole: Any = open_split(folder, rule.split, tuple(spec.target or spec.name for spec in specs))
        self.title = rule.title
        self.held: Any = Subset(whole, range(rule.first, rule.last))
        if len(self.held) < GOLDEN_FRAMES:
            evidence = f"{folder} has {len(self.held)} frames to check with ({self.title}), {GOLDEN_FRAMES} are needed"
            raise DataError("too few held-out frames", evidence, "add frames, or pass --data with more of them")
        trained_on = rule.first if rule.split == "train" else len(train)
        self.calibration = [train[k]["image"] for k in _spread(trained_on, CALIBRATION_FRAMES)]
        self.golden = [self.held[k] for k in _spread(len(self.held), GOLDEN_FRAMES)]

    def labels(self) -> dict[str, np.ndarray]:
        """Labels of the golden frames at network size, by nearest neighbour."""
        import numpy as np

        found = {}
        for spec in self.specs:
            arrays = [np.asarray(frame[spec.target or spec.name]) for frame in self.golden]
            if spec.dense:
                arrays = [nearest(array, (self.preprocess.height, self.preprocess.width)) for array in arrays]
            found[spec.name] = np.stack(arrays)
        return found


def nearest(label: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A label map [H,W,...] at another size: each pixel takes the value at its centre.

    >>> import numpy as np
    >>> nearest(np.arange(4).reshape(1, 4), (1, 2)).tolist()
    [[1, 3]]
    """
    import numpy as np

    rows, columns = (
        ((np.arange(n) + 0.5) * old / n).astype(np.int64) for n, old in zip(size, label.shape, strict=False)
    )
    return label[rows][:, columns]


def _spread(total: int, wanted: int) -> list[int]:
    """`wanted` indices spread evenly over `total`."""
    wanted = min(total, wanted)
    return [k * total // wanted for k in range(wanted)]


def _results(bundle: Path, frames: _Frames, about: dict[str, Any]) -> dict[str, Any]:
    """Accuracy of the packaged network in both precisions on the held-out frames, beside what training measured."""
    from .accuracy import accuracy

    say(f"measuring accuracy on {len(frames.held)} frames ({frames.title}), float and INT8")
    found = {precision: accuracy(bundle, frames.held, precision) for precision in ("float", "int8")}
    rivals = {"plain shared net, float": about["plain"]} if about.get("plain") else {}
    rivals |= {f"{name}, float": values for name, values in single_nets(about).items()}
    rivals |= about.get("rivals") or {}
    return {"split": frames.title, "frames": len(frames.held), **found, "rivals": rivals}


def provenance(about: dict[str, Any], info: DataInfo) -> dict[str, Any]:
    """How the network came to be, without any path of this machine."""
    import torch

    config = about["config"]
    kept = ("recipe", "backbone", "width", "size", "granule", "tie", "balance", "seed")
    steps = sum(row["steps"] for row in about["stages"].values())
    data = {"generator": info.generator, "splits": info.splits}
    return {
        **{key: config[key] for key in kept if key in config},
        "steps_in_all": steps,
        "own_channels": about["hard"],
        "loss_weights": about["weights"],
        "data": {key: value for key, value in data.items() if value},
        "torch": torch.__version__,
    }
