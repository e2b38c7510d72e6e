"""Files to arrays: decodes and checks images and labels on the host.

A broken file raises a UserError with its name: OpenCV would fill the missing part with grey.
"""

import contextlib
import io
import os
import re
import struct
import zlib
from collections.abc import Iterator

import cv2
import numpy as np
import PIL.ExifTags
import PIL.Image
import PIL.ImageOps
from PIL.PngImagePlugin import PngImageFile

from topformer_jax.data.batch import IGNORE_LABEL, Image, Labels
from topformer_jax.runtime.errors import UserError, explain_out_of_memory

PNG = b"\x89PNG\r\n\x1a\n"
JPEG = b"\xff\xd8\xff"
TIFF = (b"II*\0", b"MM\0*")
REDUCED = {2: cv2.IMREAD_REDUCED_COLOR_2, 4: cv2.IMREAD_REDUCED_COLOR_4, 8: cv2.IMREAD_REDUCED_COLOR_8}
AVIF = b"ftypavif"  # from the fifth byte on
# Files that OpenCV does not read: how they begin, and what they are.
_OTHER_FILES = {
    rb"....ftyp(hei|hev|mif1|msf1)": "a HEIC picture",
    rb"....ftyp(?!avi)|RIFF....AVI |\x1aE\xdf\xa3|\0\0\x01\xba": "a video",
    rb"%PDF": "a PDF file",
    rb"\s*<(\?xml|svg)": "an SVG or XML file",
    rb"\s*<(!doctype )?html": "a web page",
}
DEEP = 14  # bits of 16: with values of so many, a picture of 8 bits is nearly black
ZERO_IS_VOID = np.array([IGNORE_LABEL, *range(254), IGNORE_LABEL], np.uint8)  # reduces zero labels
GREY, PALETTE, GREY_ALPHA = 0, 3, 4  # colour types in a PNG's header
# By colour type (2: colours, 6: with alpha), the bits that a value may have.
_PNG_DEPTHS = {GREY: (1, 2, 4, 8, 16), 2: (8, 16), PALETTE: (1, 2, 4, 8), GREY_ALPHA: (8, 16), 6: (8, 16)}
# What errors say about a file.
_CUT_OFF = "is cut off: its end is missing; replace or remove it"
_DAMAGED_PNG = "is a damaged PNG: replace or remove it"
_NOT_A_PNG = "is not a PNG: labels are PNG files of one channel that holds class indices"
_TOO_LARGE = "is larger than OpenCV reads, 2**30 pixels: cut it into smaller pictures"
MOST_PIXELS = 1 << 30  # that OpenCV reads
MOST_JPEG_PIXELS = 1024  # a byte: each block takes a bit at least

# OpenCV logs broken files to stderr; the UserError already names them. OpenCV 5 moved the function; 0 is silent.
(getattr(cv2, "setLogLevel", None) or cv2.utils.logging.setLogLevel)(0)


class ColourLabelError(UserError):
    """A label file is whole, but has more than one channel."""


def decode_image(data: bytes | np.ndarray, name: str, *, reduction: int = 1, orient: bool = True) -> Image:
    """Decodes an image file (JPEG, PNG, or another format that OpenCV reads) to RGB, uint8 `[h, w, 3]`.

    As with `cv2.IMREAD_COLOR`, the EXIF orientation turns it (AVIF too) unless `orient` is False, and grey, CMYK,
    16-bit and alpha become 8-bit RGB. A `reduction` of 2, 4 or 8 divides the sides, rounded up; a JPEG then takes
    fewer transforms. An array is checked and returned.

    >>> import cv2, numpy as np
    >>> file = cv2.imencode(".png", np.zeros((4, 6, 3), np.uint8))[1].tobytes()
    >>> decode_image(file, "photo.png").shape
    (4, 6, 3)

    Raises UserError if the file is empty, cut off, damaged, not an image, or holds floats; `name` names it there.
    """
    if isinstance(data, np.ndarray):
        if data.dtype != np.uint8 or data.ndim != 3 or data.shape[2] != 3:
            raise UserError(f"{name}: expected a uint8 image [h, w, 3], found {data.dtype} {list(data.shape)}")
        return data
    _check_complete(data, name)
    read_depth(data, name)
    flags = 0 if orient else cv2.IMREAD_IGNORE_ORIENTATION
    if orient and data[4:12] == AVIF:  # OpenCV leaves AVIF as it is stored
        try:
            with PIL.Image.open(io.BytesIO(data)) as picture:
                return np.array(PIL.ImageOps.exif_transpose(picture).convert("RGB"))
        except Exception:  # a damaged file, or a Pillow without AVIF
            raise _damaged(name, data) from None
    if reduction == 1:
        return _decode(data, flags | cv2.IMREAD_COLOR_RGB, name)
    image = _decode(data, flags | REDUCED[reduction], name)
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def read_depth(data: bytes | np.ndarray, name: str) -> int:
    """The bits that the largest value of a file of 16 bits takes; 0 for files of 8 bits.

    Raises UserError if it holds floats, or cannot be decoded.
    """
    if isinstance(data, np.ndarray) or not (data.startswith(TIFF) or (data.startswith(PNG) and data[24] == 16)):
        return 0
    pixels = _decode(data, cv2.IMREAD_UNCHANGED, name)
    if pixels.dtype not in (np.uint8, np.uint16):
        raise UserError(f"{name} holds {pixels.dtype} numbers, no colours: save it as PNG or JPEG, of 8 bits")
    largest = pixels[..., :3].max() if pixels.ndim == 3 else pixels.max()
    return int(largest).bit_length() if pixels.dtype == np.uint16 else 0


def describe_depth(bits: int) -> str:
    """A warning if 16-bit values take so few bits that the picture is nearly black in 8 bits; else ""."""
    nearly_black = f"{bits} bits in 16, which would be nearly black: scale the values, and save as 8 bits"
    return nearly_black if 0 < bits <= DEEP else ""


def is_turned_unseen(data: bytes | np.ndarray, size: tuple[int, int]) -> bool:
    """Whether a JPEG's EXIF orientation turns or mirrors it, and it has this (height, width) either way."""
    if isinstance(data, np.ndarray) or not data.startswith(JPEG) or b"Exif" not in data[:4096]:
        return False
    with contextlib.suppress(Exception), PIL.Image.open(io.BytesIO(data)) as image:
        orientation = image.getexif().get(PIL.ExifTags.Base.Orientation, 1)
        return orientation in (2, 3, 4) or (orientation > 4 and size[0] == size[1])
    return False


def read_jpeg_size(data: bytes | np.ndarray) -> tuple[int, int] | None:
    """The (height, width) in a JPEG file's header, as it is stored; None if the file is no JPEG, or cut off."""
    if isinstance(data, np.ndarray) or not data.startswith(JPEG):
        return None
    for marker, start in _jpeg_segments(data):
        # Start of frame; c4, c8 and cc are Huffman tables, an extension and arithmetic coding's conditions.
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC) and len(data) >= start + 9:
            height, width = struct.unpack(">HH", data[start + 5 : start + 9])
            return (height, width) if height and width else None
    return None


def decode_label(data: bytes | np.ndarray, name: str, *, classes: int, reduce_zero_label: bool) -> Labels:
    """Decodes a label file (PNG: grey of 1 to 16 bits, or palette indices) or its values to class indices.

    With `reduce_zero_label`, 0 becomes IGNORE_LABEL and all other values are reduced by one; 255 stays. Raises
    UserError if the file is not a complete single-channel PNG, or a value in it is neither a class nor 255.
    """
    values = read_label_values(data, name)
    is_wrong = (values >= min(classes + reduce_zero_label, IGNORE_LABEL)) & (values != IGNORE_LABEL)
    if is_wrong.any():
        wrong = np.unique(values[is_wrong]).tolist()
        shown = ", ".join(map(str, wrong[:5])) + (", ..." if len(wrong) > 5 else "")
        expected = f"1..{classes} (0 is void)" if reduce_zero_label else f"0..{classes - 1}"
        raise UserError(
            f"{name} holds {shown}, but the {classes} classes are {expected} and void is 255: "
            f"check data.dataset, model.num_classes and data.reduce_zero_label ({reduce_zero_label}); "
            "for Cityscapes, use the *_labelTrainIds.png files"
        )
    values = values.astype(np.uint8)
    return cv2.LUT(values, ZERO_IS_VOID) if reduce_zero_label else values


def read_label_size(data: bytes | np.ndarray, name: str) -> tuple[int, int]:
    """Reads a label's (height, width) from the first 24 bytes of its file, or from an array; a UserError if it is no
    PNG.
    """
    if isinstance(data, np.ndarray):
        return data.shape[0], data.shape[1]
    if not data.startswith(PNG) or len(data) < 24:
        raise UserError(f"{name} {_NOT_A_PNG}")
    width, height = struct.unpack(">II", data[16:24])
    return height, width


def read_palette(data: bytes) -> bytes:
    """The palette of a PNG: red, green, blue of each value; empty where it has none."""
    place = data.find(b"PLTE", 0, data.find(b"IDAT"))
    return data[place + 4 : place + 4 + int.from_bytes(data[place - 4 : place], "big")] if place > 0 else b""


def read_image_size(path: str) -> tuple[int, int] | None:
    """The (height, width) that `decode_image` gives for a file, from its header; None if that is unknown."""
    if not os.path.isfile(path):  # a pipe can be read once
        return None
    try:
        with PIL.Image.open(path) as image:
            width, height = image.size
            # Pillow decodes a PNG to look for EXIF data at its end, and gives a TIFF's sides as they are turned.
            has_exif = image.format != "TIFF" and (image.format != "PNG" or "exif" in image.info)
            # Values from 5 on turn the image by 90 degrees.
            is_turned = has_exif and image.getexif().get(PIL.ExifTags.Base.Orientation, 1) >= 5
    except Exception:  # a damaged file raises OSError, SyntaxError, ValueError and others
        return None
    return (width, height) if is_turned else (height, width)


def read_label_values(data: bytes | np.ndarray, name: str) -> np.ndarray:
    """The values in a label file, uint8 or uint16 `[h, w]`, as they are stored.

    Raises UserError if it is not a complete PNG of one channel, or the array not uint8 or uint16 `[h, w]`.
    """
    if isinstance(data, np.ndarray):
        values = data[..., 0] if data.ndim == 3 and data.shape[2] == 1 else data
        if values.dtype not in (np.uint8, np.uint16) or values.ndim != 2:
            found = f"{data.dtype} {list(data.shape)}"
            raise UserError(f"{name}: expected class indices as uint8 or uint16 [h, w], found {found}")
        return values
    _check_complete(data, name)
    if not data.startswith(PNG):
        raise UserError(f"{name} {_NOT_A_PNG}")
    colour_type = data[25]
    if colour_type not in (GREY, PALETTE):
        what = "has transparency" if colour_type == GREY_ALPHA else "is a colour image"
        raise ColourLabelError(f"{name} {what}: labels are PNG files of one channel that holds class indices")
    if colour_type == GREY:
        flags = cv2.IMREAD_GRAYSCALE | cv2.IMREAD_ANYDEPTH | cv2.IMREAD_IGNORE_ORIENTATION
        values, bits = _decode(data, flags, name), data[24]
        # OpenCV scales 1, 2 and 4 bits to 0..255, by 255, 85 and 17.
        return values // np.uint8(255 // (2**bits - 1)) if bits < 8 else values
    try:
        # OpenCV would turn the indices into colours. Not by `PIL.Image.open`, which refuses large files.
        with PngImageFile(io.BytesIO(data)) as image:
            return np.array(image)
    except Exception as error:  # a damaged file raises OSError, SyntaxError, ValueError and others
        raise _explain(error, name, data) from None


def _decode(data: bytes, flags: int, name: str) -> np.ndarray:
    try:
        array = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except (cv2.error, MemoryError) as error:
        raise _explain(error, name, data) from None
    if array is None:
        raise _damaged(name, data)
    return array


def _check_complete(data: bytes, name: str) -> None:
    """Raises a UserError for a file that is cut off: OpenCV would fill a JPEG up with grey."""
    if not data:
        raise UserError(f"{name} is empty: replace or remove it")
    if data.startswith(PNG):
        _check_png(data, name)
    elif data.startswith(JPEG):
        height, width = read_jpeg_size(data) or (0, 0)
        # Behind the first scan's start: a thumbnail in the header has an end-of-image marker of its own, and some
        # cameras add bytes after the end. In compressed data 00 follows each ff, so that it never holds the marker.
        scans = [start for marker, start in _jpeg_segments(data) if marker == 0xDA]
        has_end = any(data.find(b"\xff\xd9", start) >= 0 for start in scans)
        if not has_end or height * width > MOST_JPEG_PIXELS * len(data):
            raise UserError(f"{name} {_CUT_OFF}")


def _jpeg_segments(data: bytes) -> Iterator[tuple[int, int]]:
    """The markers of a JPEG's header and where they start, up to the first scan."""
    position, marker = 2, 0
    while marker != 0xDA and data[position : position + 1] == b"\xff" and position + 1 < len(data):
        marker = data[position + 1]
        if marker == 0xFF:  # a fill byte
            position += 1
        else:
            yield marker, position
            position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")


def _check_png(data: bytes, name: str) -> None:
    """Raises a UserError unless all chunks from IHDR to IEND are there with the right checksums.

    OpenCV and Pillow both accept some PNGs that are cut off or damaged, without an error.
    """
    position, kind = len(PNG), b""
    while kind != b"IEND":
        length, kind = struct.unpack(">I4s", data[position : position + 8].ljust(8, b"\0"))
        end = position + 12 + length
        if end > len(data):
            raise UserError(f"{name} {_CUT_OFF}")
        right_start = position > len(PNG) or (length, kind) == (13, b"IHDR")
        checksum = struct.pack(">I", zlib.crc32(memoryview(data)[position + 4 : end - 4]))
        if not right_start or data[end - 4 : end] != checksum:
            raise UserError(f"{name} {_DAMAGED_PNG}")
        position = end
    width, height, depth, colour, *methods = struct.unpack(">IIBBBBB", data[16:29])
    if width * height > MOST_PIXELS:
        raise UserError(f"{name} {_TOO_LARGE}")
    is_known = depth in _PNG_DEPTHS.get(colour, ()) and methods in ([0, 0, 0], [0, 0, 1])
    if not is_known or not width * height:
        raise UserError(f"{name} {_DAMAGED_PNG}")


def _explain(error: Exception, name: str, data: bytes) -> UserError:
    if explain_out_of_memory(error, ""):
        return UserError(f"{name} does not fit into memory: lower data.num_workers, or make the picture smaller")
    if "CV_IO_MAX_IMAGE" in str(error):
        return UserError(f"{name} {_TOO_LARGE}")
    return _damaged(name, data)


def _damaged(name: str, data: bytes = b"") -> UserError:
    for start, kind in _OTHER_FILES.items():
        if re.match(start, data[:40], re.DOTALL | re.IGNORECASE):
            return UserError(f"{name} is {kind}: save pictures as JPEG or PNG")
    return UserError(f"{name} cannot be decoded: it is not an image, or damaged; replace or remove it")
