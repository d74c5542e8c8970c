"""Build pycuda against the emulated driver, so that its launcher is tested without a GPU: `make test-pycuda`.

pycuda comes as source only. It needs the headers of a CUDA toolkit (nvcc on the path, or --cuda), a C++ compiler and
two minutes of a CPU; curand is left out. Installs into this environment, or into --target.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from igate_edge.kernels.emulator import driver

VERSION = "2026.1"
PURE = ("mako", "platformdirs", "pytools")


def toolkit() -> Path:
    """The newest toolkit's root; nvcc on the path may be a wrapper that lies elsewhere."""
    roots = [path.parent.parent for path in Path("/usr/local").glob("cuda*/include/cuda.h")]
    if not roots:
        sys.exit("no include/cuda.h below /usr/local/cuda*: install a CUDA toolkit, or pass --cuda")
    return max(roots)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cuda", type=Path, help="root of the CUDA toolkit (default: below /usr/local)")
    parser.add_argument("--target", help="folder to install into (default: this environment)")
    options = parser.parse_args()
    where = ["--target", options.target] if options.target else []
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        source = ["--no-deps", "--no-build-isolation", "--no-binary", "pycuda", "--dest", scratch, f"pycuda=={VERSION}"]
        subprocess.run([*pip, "download", "--quiet", *source], check=True)
        with tarfile.open(folder / f"pycuda-{VERSION}.tar.gz") as archive:
            archive.extractall(folder, filter="data")
        (folder / "libcuda.so").symlink_to(driver.build())
        unpacked = folder / f"pycuda-{VERSION}"
        with_ = [f"--cuda-root={options.cuda or toolkit()}", "--no-cuda-enable-curand", f"--cudadrv-lib-dir={scratch}"]
        subprocess.run([sys.executable, "configure.py", *with_], cwd=unpacked, check=True)
        built = [*pip, "install", "--no-build-isolation", "--no-deps", *where, str(unpacked)]
        subprocess.run(built, check=True, env={**os.environ, "CFLAGS": "-O0 -w"})
        subprocess.run([*pip, "install", "--quiet", "--no-deps", *where, *PURE], check=True)


if __name__ == "__main__":
    main()
