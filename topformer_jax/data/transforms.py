"""What the host does to one example: decode, check, resize, crop. NumPy and OpenCV, uint8 in and out.

Every byte is the official pipeline's (mmsegmentation 0.19 on mmcv 1.4); flip, colours and normalisation come later,
on the device (`augment.py`). Random draws come from the generator that is passed in, and from nowhere else.
"""

import functools
import struct
import zlib
from collections.abc import Iterator

import cv2
import numpy as np
from jaxtyping import UInt8

from topformer_jax.errors import UserError

IGNORE_LABEL = 255  # the label of pixels that do not count
TRIES = 10  # how many crops are tested before one is taken as it comes

# A broken file is told of once, by a UserError with its name. OpenCV 5 moved the function; 0 is silence.
(getattr(cv2, "setLogLevel", None) or cv2.utils.logging.setLogLevel)(0)


def decode_image(data: bytes | np.ndarray, name: str) -> UInt8[np.ndarray, "h w 3"]:
    """An image file's bytes (JPEG, PNG, or what else OpenCV reads) as RGB.

    As `cv2.IMREAD_COLOR` reads it: turned as its EXIF orientation says; grey, CMYK, 16 bits and alpha become 8-bit
    RGB. An array is an image that somebody else has decoded.

    Raises:
        UserError: the file `name` is empty, cut off, damaged or no image; or the array is not uint8 `[h, w, 3]`.
    """
    if isinstance(data, np.ndarray):
        if data.dtype != np.uint8 or data.ndim != 3 or data.shape[2] != 3:
            raise UserError(
                f"{name}: expected a uint8 image [h, w, 3], found {data.dtype} {list(data.shape)}"
            )
        return data
    _require_whole(data, name)
    return _decode(data, cv2.IMREAD_COLOR_RGB, name)


def decode_label(
    data: bytes | np.ndarray, name: str, *, classes: int, reduce_zero_label: bool
) -> UInt8[np.ndarray, "h w"]:
    """A label file's bytes (PNG: grey of 8 or 16 bits, or palette indices) as class indices and void (255).

    With `reduce_zero_label`, 0 becomes void and every other value goes down by one; 255 is void either way.
    An array holds the values of a file that somebody else has decoded.

    Raises:
        UserError: the file `name` is no whole single-channel PNG, or a value in it is neither a class nor void.
    """
    values = _label_values(data, name)
    rule, good = _label_rule(classes, reduce_zero_label)
    largest = int(values.max(initial=0))
    few = largest < min(
        classes + reduce_zero_label, IGNORE_LABEL
    )  # no void pixels of 255: nothing to look up
    if not few and (
        largest > IGNORE_LABEL or not cv2.LUT(values.astype(np.uint8), good.astype(np.uint8)).all()
    ):
        found = np.unique(values)
        bad = found[(found > IGNORE_LABEL) | ~good[np.minimum(found, IGNORE_LABEL)]]
        shown = ", ".join(str(value) for value in bad[:5]) + (", ..." if len(bad) > 5 else "")
        expected = f"1..{classes} (0 is void)" if reduce_zero_label else f"0..{classes - 1}"
        raise UserError(
            f"{name} holds {shown}, but the {classes} classes are {expected} and void is 255: "
            f"check data.dataset, model.num_classes and data.reduce_zero_label ({reduce_zero_label}); "
            "of Cityscapes, take the *_labelTrainIds.png files"
        )
    values = values.astype(np.uint8)
    return cv2.LUT(values, rule) if reduce_zero_label else values


@functools.lru_cache(maxsize=8)
def _label_rule(classes: int, reduce_zero_label: bool) -> tuple[np.ndarray, np.ndarray]:
    """What each of 256 values becomes, uint8; and whether it may occur."""
    rule = np.arange(256, dtype=np.uint8)
    if reduce_zero_label:
        rule -= 1  # 0 becomes 255
        rule[IGNORE_LABEL] = IGNORE_LABEL
    return rule, (rule < classes) | (rule == IGNORE_LABEL)


def label_size(data: bytes | np.ndarray, name: str) -> tuple[int, int]:
    """(height, width) of a label from the first 24 bytes of its file, or of one that is an array.

    Raises:
        UserError: the file `name` is no PNG.
    """
    if isinstance(data, np.ndarray):
        return data.shape[0], data.shape[1]
    if not data.startswith(PNG) or len(data) < 24:
        raise _no_png(name)
    width, height = struct.unpack(">II", data[16:24])
    return height, width


def check_sizes(image: np.ndarray, label: np.ndarray, name: str) -> None:
    """Raises a UserError unless `label` has the height and width of `image`."""
    if image.shape[:2] != label.shape[:2]:
        (h, w), (height, width) = image.shape[:2], label.shape[:2]
        turned = " (images are turned as their EXIF orientation says)" if (h, w) == (width, height) else ""
        raise UserError(
            f"{name}: the image has {w} x {h} pixels and its label {width} x {height}: "
            f"they must be the same picture{turned}"
        )


def scaled(scale: tuple[int, int], ratio: float) -> tuple[int, int]:
    """Both sides of `scale` times `ratio`, cut to whole pixels, at least 1."""
    return max(int(scale[0] * ratio), 1), max(int(scale[1] * ratio), 1)


def fitted_size(size: tuple[int, int], scale: tuple[int, int]) -> tuple[int, int]:
    """The largest (height, width) of the shape of `size` that fits into a long and a short side.

    `scale` names the two sides in either order; which of height and width is the long one does not matter.
    mmcv's `imrescale`: `int(side * factor + 0.5)`, at least 1.
    """
    h, w = size
    factor = min(max(scale) / max(h, w), min(scale) / min(h, w))
    return max(int(h * factor + 0.5), 1), max(int(w * factor + 0.5), 1)


def resize_image(
    image: UInt8[np.ndarray, "h w 3"], size: tuple[int, int]
) -> UInt8[np.ndarray, "height width 3"]:
    """Resizes to (height, width), bilinear, as OpenCV's `INTER_LINEAR` does on bytes."""
    return cv2.resize(image, size[::-1], interpolation=cv2.INTER_LINEAR)


def resize_label(label: UInt8[np.ndarray, "h w"], size: tuple[int, int]) -> UInt8[np.ndarray, "height width"]:
    """Resizes to (height, width) as OpenCV's `INTER_NEAREST` does."""
    return cv2.resize(label, size[::-1], interpolation=cv2.INTER_NEAREST)


def test_size(size: tuple[int, int], *, scale: tuple[int, int], align: int) -> tuple[int, int]:
    """(height, width) of the input of an evaluation: fitted into `scale`, then up to multiples of `align` pixels."""
    h, w = fitted_size(size, scale)
    return -(-h // align) * align, -(-w // align) * align


def test_image(
    image: UInt8[np.ndarray, "h w 3"], *, scale: tuple[int, int], align: int
) -> UInt8[np.ndarray, "height width 3"]:
    """The input of an evaluation, of `test_size`; officially two resizes, of bytes each."""
    size = image.shape[0], image.shape[1]
    fitted = resize_image(image, fitted_size(size, scale))
    return resize_image(fitted, test_size(size, scale=scale, align=align))


def training_example(
    image: UInt8[np.ndarray, "h w 3"],
    label: UInt8[np.ndarray, "h w"],
    *,
    crop: tuple[int, int],
    scale: tuple[int, int],
    ratio: tuple[float, float],
    cat_max_ratio: float,
    rng: np.random.Generator,
) -> dict[str, np.ndarray]:
    """A random crop of the randomly resized image and of its label.

    Args:
        image: of any size.
        label: of the image's size, void pixels 255.
        crop: (height, width) of what is returned.
        scale: (long, short) side that the image is fitted into, before `ratio`.
        ratio: the range of the factor on `scale`, drawn uniformly.
        cat_max_ratio: a crop passes when it has more than one class, none of which has this share of the pixels
            that are not void, or more. `TRIES` crops are tested; if none passes, one more is drawn and taken
            as it is. From 1 on there is no test.
        rng: where all draws come from.

    Returns:
        "image" uint8 `[*crop, 3]`, 0 where the resized image is smaller than the crop (bottom, right); "label" uint8
        `[*crop]`, 255 there; "size" int32 `[2]`, the (height, width) that is not padding.
    """
    source = image.shape[:2]
    size = fitted_size(source, scaled(scale, rng.uniform(*ratio)))
    height, width = min(size[0], crop[0]), min(size[1], crop[1])
    tries = TRIES if cat_max_ratio < 1 else 0
    for attempt in range(tries + 1):
        top, left = (int(rng.integers(0, size[axis] - (height, width)[axis] + 1)) for axis in (0, 1))
        rows = nearest(source[0], size[0])[top : top + height]
        columns = nearest(source[1], size[1])[left : left + width]
        chosen = label.take(rows, axis=0).take(columns, axis=1)
        if attempt == tries or _varied(chosen, cat_max_ratio):
            break
    part = _resized_corner(image, size, top + height, left + width)[top:, left:]
    below, beside = crop[0] - height, crop[1] - width
    return {
        "image": cv2.copyMakeBorder(part, 0, below, 0, beside, cv2.BORDER_CONSTANT, value=0),
        "label": cv2.copyMakeBorder(chosen, 0, below, 0, beside, cv2.BORDER_CONSTANT, value=IGNORE_LABEL),
        "size": np.array((height, width), np.int32),
    }


def nearest(size: int, new_size: int) -> np.ndarray:
    """The source index of each of `new_size` pixels in OpenCV's `INTER_NEAREST` resize of `size` pixels."""
    positions = np.floor(np.arange(new_size) * (1 / (new_size / size))).astype(np.intp)
    return np.minimum(positions, size - 1)


def _resized_corner(
    image: UInt8[np.ndarray, "h w 3"], size: tuple[int, int], bottom: int, right: int
) -> UInt8[np.ndarray, "height width 3"]:
    """`resize_image(image, size)[:bottom, :right]`, without computing what is below and to the right.

    OpenCV is given the whole image's factors rather than a size, so that its sampling grid stays the same; the
    source goes beyond the last pixel needed. Equal in 6600 random geometries. For 512 x 512 crops of a 683 x 512
    image, in one thread: at ratio 2 0.9 ms instead of 1.9, at 1.5 0.65 instead of 0.95. What is above and to the
    left of the crop is resized for nothing: a grid that starts elsewhere has other fractions, unless the sizes
    happen to divide.
    """
    down, across = size[0] / image.shape[0], size[1] / image.shape[1]
    source = image[: int(bottom / down) + 3, : int(right / across) + 3]
    part = cv2.resize(source, None, fx=across, fy=down, interpolation=cv2.INTER_LINEAR)
    if part.shape == source.shape:  # OpenCV copies then, whatever the factors
        part = resize_image(image, size)
    return part[:bottom, :right]


def _varied(label: UInt8[np.ndarray, "h w"], cat_max_ratio: float) -> bool:
    """Whether more than one class is there and none has `cat_max_ratio` or more of what is not void."""
    # The counts are float32, exact up to 2**24 pixels; three times as fast as np.bincount.
    counts = cv2.calcHist([label], [0], None, [256], [0, 256]).ravel()[:IGNORE_LABEL]
    return bool(np.count_nonzero(counts) > 1) and float(counts.max()) / float(counts.sum()) < cat_max_ratio


def _label_values(data: bytes | np.ndarray, name: str) -> np.ndarray:
    """The values in a label file, uint8 or uint16 `[h, w]`, before any rule."""
    if isinstance(data, np.ndarray):
        values = data[..., 0] if data.ndim == 3 and data.shape[2] == 1 else data
        if values.dtype not in (np.uint8, np.uint16) or values.ndim != 2:
            found = f"{data.dtype} {list(data.shape)}"
            raise UserError(f"{name}: expected class indices as uint8 or uint16 [h, w], found {found}")
        return values
    if not data.startswith(PNG):
        _require_whole(data, name)
        raise _no_png(name)
    chunks = list(_png_chunks(data, name))
    _, header = chunks[0]
    depth, colour = header[8], header[9]
    if colour not in (GREY, PALETTE):
        raise UserError(
            f"{name} is a colour image: labels are PNG files of one channel that holds class indices"
        )
    # OpenCV turns palette indices into colours, so it gets them as a grey image of the same bytes. Below 8 bits
    # it spreads grey values over 0..255, which is right for grey and undone for indices.
    header = header[:9] + bytes([GREY]) + header[10:]
    pixels = [(kind, body) for kind, body in chunks if kind in (b"IDAT", b"IEND")]
    bare = PNG + b"".join(_png_chunk(kind, body) for kind, body in [(b"IHDR", header), *pixels])
    values = _decode(bare, cv2.IMREAD_UNCHANGED, name)
    return values // (255 // (2**depth - 1)) if colour == PALETTE and depth < 8 else values


def _decode(data: bytes, flag: int, name: str) -> np.ndarray:
    try:
        array = cv2.imdecode(np.frombuffer(data, np.uint8), flag)
    except cv2.error:
        array = None
    if array is None:
        raise UserError(f"{name} cannot be decoded: it is no image, or damaged; copy or download it again")
    return array


PNG = b"\x89PNG\r\n\x1a\n"
GREY, PALETTE = 0, 3  # of a PNG's colour types
JPEG = b"\xff\xd8\xff"


def _require_whole(data: bytes, name: str) -> None:
    """Raises a UserError for a file that was cut off: OpenCV would fill a JPEG up with grey."""
    if not data:
        raise UserError(f"{name} is empty: copy or download it again")
    if data.startswith(PNG):
        for _ in _png_chunks(data, name):
            pass
    elif data.startswith(JPEG) and not _jpeg_ends(data):
        raise _cut_off(name)


def _jpeg_ends(data: bytes) -> bool:
    """Whether the end-of-image marker follows the start of the first scan.

    Not anywhere, since a thumbnail in the header has its own; and not at the very end, where some cameras and
    tools add bytes. Compressed data never holds the marker by chance: an ff in it is followed by 00.
    """
    position = 2
    while data[position : position + 1] == b"\xff":
        marker = data[position + 1 : position + 2]
        if marker == b"\xda":
            return data.find(b"\xff\xd9", position) >= 0
        if marker == b"\xff":  # a fill byte
            position += 1
        else:
            position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")
    return False


def _png_chunks(data: bytes, name: str) -> Iterator[tuple[bytes, bytes]]:
    """A PNG's chunks from IHDR to IEND as (kind, body); a UserError for one that is missing or damaged."""
    position, kind = len(PNG), b""
    while kind != b"IEND":
        length, kind = struct.unpack(">I4s", data[position : position + 8].ljust(8, b"\0"))
        end = position + 12 + length
        if end > len(data):
            raise _cut_off(name)
        right_start = position > len(PNG) or (length, kind) == (13, b"IHDR")
        if not right_start or data[end - 4 : end] != _checksum(data[position + 4 : end - 4]):
            raise UserError(f"{name} is a damaged PNG: copy or download it again")
        yield kind, data[position + 8 : end - 4]
        position = end


def _png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + _checksum(kind + body)


def _checksum(chunk: bytes) -> bytes:
    return struct.pack(">I", zlib.crc32(chunk))


def _no_png(name: str) -> UserError:
    return UserError(f"{name} is no PNG: labels are PNG files of one channel that holds class indices")


def _cut_off(name: str) -> UserError:
    return UserError(f"{name} is cut off: its end is missing; copy or download it again")
