"""Print what the robot's install takes: the wheels that are downloaded and the files that end up on the disk.

    python benchmarks/install_size.py [--limit-download 120] [--limit-installed 260]

Everything is done in a temporary folder; exit code 1 when a limit (MB) is passed.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def measure(extra: str, folder: Path) -> tuple[float, dict[str, float]]:
    """Return MB of wheels and MB on disk per top-level package for `igate-edge[extra]`, without byte code."""
    target, wheels = folder / "site", folder / "wheels"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    wanted = f"{ROOT}[{extra}]" if extra else str(ROOT)
    subprocess.run([*pip, "wheel", "--quiet", "--wheel-dir", str(wheels), wanted], check=True)
    subprocess.run(
        [
            *pip,
            "install",
            "--quiet",
            "--no-compile",
            "--no-index",
            "--no-deps",
            "--target",
            str(target),
            *map(str, wheels.iterdir()),
        ],
        check=True,
    )
    sizes: dict[str, float] = defaultdict(float)
    for path in target.rglob("*"):
        if path.is_file():
            sizes[path.relative_to(target).parts[0].removesuffix(".libs")] += path.stat().st_size / 1e6
    return sum(path.stat().st_size for path in wheels.iterdir()) / 1e6, dict(sizes)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit-download", type=float, default=120, help="MB of wheels (default 120)")
    parser.add_argument("--limit-installed", type=float, default=260, help="MB on disk (default 260)")
    options = parser.parse_args()
    passed = True
    for extra in ("", "images"):
        with tempfile.TemporaryDirectory() as folder:
            download, sizes = measure(extra, Path(folder))
        installed = sum(sizes.values())
        largest = sorted(sizes.items(), key=lambda item: -item[1])[:8]
        print(f"igate-edge{f'[{extra}]' if extra else ''}: {download:.0f} MB downloaded, {installed:.0f} MB installed")
        print("  " + ", ".join(f"{name} {size:.0f}" for name, size in largest))
        passed &= download <= options.limit_download and installed <= options.limit_installed
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
