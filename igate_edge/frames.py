"""Read image files safely: one image, a folder or a pattern; for data folders, calibration, `igate run`. No torch."""

from __future__ import annotations

import glob
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import DataError, UnavailableError
from .files import read_file

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff")
#: Images with more pixels than this are refused before they are decoded: a small file can unpack to gigabytes.
MAX_PIXELS = 64_000_000
MAX_SIDE = 65_536
_PNG = b"\x89PNG\r\n\x1a\n"
_MODES_8BIT = ("1", "L", "P", "RGB", "RGBA", "LA", "CMYK", "YCbCr")


def pillow() -> Any:
    """The package PIL with the modules used here; raises UnavailableError when the extra `images` is not installed."""
    try:
        import PIL.Image
        import PIL.ImageDraw
        import PIL.ImageFont
        import PIL.ImageOps
    except ImportError as error:
        fix = "pip install 'igate-edge[images]'"
        raise UnavailableError("reading and drawing pictures needs Pillow", str(error), fix) from error
    return PIL


def _open(path: Path, what: str) -> Image:
    """Open and decode one image file; every way a file can be wrong becomes a DataError that names it."""
    modules = pillow()
    try:
        data = read_file(path)
    except FileNotFoundError as error:
        raise DataError(f"missing {what}", str(path), "check the path") from error
    except PermissionError as error:
        raise DataError(
            f"no permission to read the {what} {path}", error.strerror or "", "change its rights"
        ) from error
    except OSError as error:
        raise DataError(f"cannot read the {what} {path}", error.strerror or str(error), "give an image file") from error
    try:
        picture = modules.Image.open(io.BytesIO(data))
        width, height = picture.size
        if width * height <= MAX_PIXELS and max(width, height) <= MAX_SIDE:
            picture.load()
            return picture
        reason = f"{width}x{height} pixels; the limit is {MAX_PIXELS} in all and {MAX_SIDE} a side"
    except (modules.Image.DecompressionBombError, modules.Image.DecompressionBombWarning) as error:
        reason = str(error)
    except modules.UnidentifiedImageError as error:  # its own words name our buffer, not the file
        evidence = f"{len(data)} bytes that start with {data[:8]!r}"
        raise DataError(f"corrupt {what} {path}", evidence, "write this file again, or take it out") from error
    except Exception as error:  # decoders raise anything from SyntaxError to struct.error on damaged files
        evidence = f"{len(data)} bytes; {error}"
        raise DataError(f"corrupt {what} {path}", evidence, "write this file again, or take it out") from error
    raise DataError(f"the {what} {path} is too large", reason, "scale it down first")


def _is_16bit(path: Path, picture: Image) -> bool:
    if picture.mode not in _MODES_8BIT:
        return True
    with path.open("rb") as file:
        head = file.read(25)
    # Pillow narrows 16-bit colour PNGs without a word; byte 24 of a PNG is its bit depth.
    return len(head) == 25 and head.startswith(_PNG) and head[24] == 16


def read_image(path: str | os.PathLike[str]) -> np.ndarray:
    """Read a colour or grey image file as uint8 RGB [H,W,3]; alpha is dropped and the camera's rotation mark is obeyed.

    Raises DataError for a missing, unreadable, corrupt or 16-bit file, and for one above 64 million pixels.
    """
    path = Path(path)
    picture = _open(path, "image")
    if _is_16bit(path, picture):
        deep = picture.mode[0] in "IFR"  # integers, floats, and RGB that was narrowed
        evidence = f"{path} has mode {picture.mode}{' with more than 8 bits a channel' if deep else ''}"
        raise DataError("the image is not 8-bit RGB or grey", evidence, "save it as 8-bit RGB (is it a depth image?)")
    return np.asarray((pillow().ImageOps.exif_transpose(picture) or picture).convert("RGB"))


def read_ids(path: Path, what: str) -> np.ndarray:
    """Read an 8-bit one-channel label (grey or palette) as uint8 [H,W]; raises DataError for any other file."""
    picture = _open(path, f"{what} label")
    if picture.mode not in ("L", "P") or _is_16bit(path, picture):
        bits = "16-bit" if _is_16bit(path, picture) else f"mode {picture.mode}"
        fix = "save one 8-bit number a pixel (grey or palette PNG), not colours"
        raise DataError(f"the {what} label {path} is not 8-bit with one channel", f"it is {bits}", fix)
    return np.asarray(picture)


def read_16bit(path: Path, what: str) -> np.ndarray:
    """Read a 16-bit one-channel label as uint16 [H,W]; raises DataError for any other file."""
    picture = _open(path, f"{what} label")
    if picture.mode not in ("I;16", "I", "I;16B"):
        fix = "save it as 16-bit grey PNG (numpy uint16)"
        raise DataError(f"the {what} label {path} is not 16-bit with one channel", f"it has mode {picture.mode}", fix)
    return np.asarray(picture).astype(np.uint16)


def read_rgb_label(path: Path, what: str) -> np.ndarray:
    """Read an 8-bit three-channel label as uint8 [H,W,3]; raises DataError for any other file."""
    picture = _open(path, f"{what} label")
    if picture.mode != "RGB" or _is_16bit(path, picture):
        evidence = "it is 16-bit" if _is_16bit(path, picture) else f"it has mode {picture.mode}"
        raise DataError(f"the {what} label {path} is not 8-bit RGB", evidence, "save it as 8-bit RGB PNG")
    return np.asarray(picture)


def list_images(path: str | os.PathLike[str]) -> list[Path]:
    """Image files of a file, a folder or a pattern, by name; raises DataError where there are none."""
    place, text = Path(path), os.fspath(path)
    if place.is_file():
        return [place]
    if place.is_dir():
        try:
            found = sorted(place.iterdir())
        except PermissionError as error:
            raise DataError(f"no permission to list {place}", error.strerror or "", "change its rights") from error
        # Names with a leading dot are other programs' helpers, such as the Finder's "._x.png".
        files = [file for file in found if file.suffix.lower() in SUFFIXES and not file.name.startswith(".")]
        if files:
            return files
        inside = sorted(place.glob("*/image"))
        fix = f"pass {inside[0]}" if inside else f"put images there ({', '.join(SUFFIXES)})"
        raise DataError(f"no image in the folder {place}", f"{len(found)} other entries", fix)
    if any(mark in text for mark in "*?["):
        files = [Path(name) for name in sorted(glob.glob(text, recursive=True)) if Path(name).is_file()]
        if files:
            return files
        raise DataError("no file fits the pattern", text, "check the pattern; quote it in a shell")
    raise DataError("no such file or folder", text, "check the path")


def read_frames(path: str | os.PathLike[str]) -> Iterator[tuple[str, np.ndarray]]:
    """Iterate over (file name, uint8 RGB [H,W,3]) of an image file, a folder of images (by name) or a glob pattern.

    Raises DataError at once for a missing path or an empty folder, and while iterating for an unreadable file.

    >>> import tempfile; from pathlib import Path
    >>> from PIL import Image
    >>> folder = Path(tempfile.mkdtemp()); Image.new("RGB", (4, 3)).save(folder / "a.png")
    >>> [(name, frame.shape) for name, frame in read_frames(folder)]
    [('a.png', (3, 4, 3))]
    """
    files = list_images(path)
    return ((file.name, read_image(file)) for file in files)
