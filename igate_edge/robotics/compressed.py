"""Compressed images of ROS: PNG and JPEG through Pillow, which is imported when the first one comes."""

from __future__ import annotations

import io

import numpy as np

from ..errors import DataError
from ..frames import MAX_PIXELS, MAX_SIDE, pillow
from .messages import CompressedImageMessage

_PNG = b"\x89PNG\r\n\x1a\n"
_FIX = "record the image topic raw, or as jpeg or png"


def decode_compressed(message: CompressedImageMessage) -> tuple[np.ndarray, str]:
    """(pixels, encoding): rgb8 [H,W,3], or mono8 / mono16 [H,W] for a grey image.

    Raises DataError for damaged data, another format or too many pixels; UnavailableError without Pillow.
    """
    data, what = bytes(message.data), f"the compressed image (stamp {message.stamp_ns})"
    if "compressedDepth" in message.format:
        raise DataError(f"{what} is a depth image", f"format {message.format!r:.60}", "choose a colour topic")
    modules = pillow()
    try:
        picture = modules.Image.open(io.BytesIO(data), formats=("PNG", "JPEG"))
        width, height = picture.size
        if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
            raise ValueError(f"{width}x{height} pixels, the limit is {MAX_PIXELS} in all and {MAX_SIDE} a side")
        picture.load()
    except modules.UnidentifiedImageError as error:
        evidence = f"format {message.format!r:.60}, {len(data)} bytes that start with {data[:8]!r}"
        raise DataError(f"{what} is neither PNG nor JPEG", evidence, _FIX) from error
    except Exception as error:  # decoders raise anything from SyntaxError to struct.error on damaged data
        raise DataError(f"{what} is damaged", f"{len(data)} bytes; {error}", _FIX) from error
    if picture.mode in ("I;16", "I;16B", "I"):
        return np.asarray(picture).astype(np.uint16), "mono16"
    if data.startswith(_PNG) and data[24:25] == b"\x10":  # Pillow narrows 16-bit colour without a word
        raise DataError(f"{what} has 16 bits a colour", f"format {message.format!r:.60}", _FIX)
    if picture.mode == "L":
        return np.array(picture), "mono8"
    pixels = np.array(picture.convert("RGB"))
    # Compressed by a node that handed RGB to an encoder of BGR: red and blue changed places (image_transport's mark).
    swapped = "compressed rgb" in message.format
    return (np.ascontiguousarray(pixels[..., ::-1]) if swapped else pixels), "rgb8"
