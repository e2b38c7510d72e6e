"""Decoding, resizing and cropping against OpenCV and the reference, byte for byte; and every broken file's error."""

import io
import pathlib
import re
import struct
import zlib
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
import PIL.ExifTags
import PIL.Image
import PIL.ImageOps
import pytest
import scipy.ndimage
from hypothesis import strategies as st

from topformer_jax import config as config_lib
from topformer_jax.data import codecs, loader, transforms
from topformer_jax.data.batch import Example
from topformer_jax.data.codecs import decode_image, decode_label
from topformer_jax.data.transforms import fit_size, random_resize_crop
from topformer_jax.runtime.errors import UserError

Find = Callable[[str], pathlib.Path]
sides = st.integers(1, 90)


def _picture(h: int = 60, w: int = 90, seed: int = 0) -> np.ndarray:
    noise = np.random.default_rng(seed).integers(0, 256, (h, w, 3), dtype=np.uint8)
    return np.asarray(cv2.GaussianBlur(noise, (0, 0), 2))


def _encoded(image: np.ndarray, extension: str) -> bytes:
    return cv2.imencode(extension, image[..., ::-1] if image.ndim == 3 else image)[1].tobytes()


def _png(header: tuple[int, int, int, int, int], rows: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG by hand: header = (width, height, depth, colour type, interlace), rows with their filter bytes."""
    width, height, depth, colour, interlace = header
    first = (b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlace))
    data = b"\x89PNG\r\n\x1a\n"
    for kind, body in [first, *chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]:
        data += struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    return data


def _palette_png(indices: np.ndarray, depth: int, *, grey: bool = False) -> bytes:
    bits = np.unpackbits(indices[..., None], axis=-1)[..., 8 - depth :].reshape(len(indices), -1)
    rows = b"".join(b"\0" + np.packbits(row).tobytes() for row in bits)
    colours = np.random.default_rng(0).integers(0, 256, 3 * 2**depth, dtype=np.uint8).tobytes()
    height, width = indices.shape
    if grey:
        return _png((width, height, depth, 0, 0), rows, (b"tRNS", b"\0\1"))
    return _png((width, height, depth, 3, 0), rows, (b"PLTE", colours), (b"tRNS", b"\0\x80"))


# Files


def _with_segment(jpeg: bytes, marker: int, body: bytes) -> bytes:
    return jpeg[:2] + bytes([0xFF, marker]) + struct.pack(">H", len(body) + 2) + body + jpeg[2:]


def _cmyk_jpeg() -> bytes:
    file = io.BytesIO()
    PIL.Image.fromarray(_picture()).convert("CMYK").save(file, "JPEG")
    return file.getvalue()


def test_images_become_rgb_of_8_bits() -> None:
    image = _picture()
    clear = np.concatenate([image[..., ::-1], np.full((60, 90, 1), 7, np.uint8)], axis=-1)
    for data in (_encoded(image, ".png"), cv2.imencode(".png", clear)[1].tobytes(), image):
        np.testing.assert_array_equal(decode_image(data, "x"), image)
    np.testing.assert_array_equal(decode_image(_encoded(image.astype(np.uint16) * 257, ".png"), "x"), image)
    for jpeg in (_encoded(image, ".jpg"), _encoded(image[..., 0], ".jpg"), _cmyk_jpeg()):
        theirs = np.asarray(cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_COLOR))[..., ::-1]
        np.testing.assert_array_equal(decode_image(jpeg, "x"), theirs)


@pytest.mark.parametrize("kind", ["JPEG", "AVIF"])
def test_exif_orientation_turns_the_image_as_in_pillow(kind: str) -> None:
    for orientation in range(1, 9):
        exif, file = PIL.Image.Exif(), io.BytesIO()
        exif[PIL.ExifTags.Base.Orientation] = orientation
        PIL.Image.fromarray(_picture()).save(file, kind, exif=exif)
        with PIL.Image.open(file) as stored:
            theirs = np.asarray(PIL.ImageOps.exif_transpose(stored))
        np.testing.assert_array_equal(decode_image(file.getvalue(), "x"), theirs)


PROGRESSIVE = cv2.imencode(".jpg", _picture(), [cv2.IMWRITE_JPEG_PROGRESSIVE, 1])[1].tobytes()


@pytest.mark.parametrize("data", [_encoded(_picture(), ".jpg"), _encoded(_picture(), ".png"), PROGRESSIVE])
def test_cut_off_anywhere(data: bytes, capfd: pytest.CaptureFixture[str]) -> None:
    image = decode_image(data, "x")
    assert image.shape == (60, 90, 3)
    np.testing.assert_array_equal(decode_image(data + b"\0" * 500, "x"), image)  # what follows does no harm
    for end in [1, 2, 3, 8, 20, 33, 40, *range(50, len(data) - 1, 97), len(data) - 1]:
        with pytest.raises(UserError, match=r"photo.file (is|cannot)") as caught:
            decode_image(data[:end], "photo.file")
        assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_a_thumbnails_end_is_not_the_jpegs() -> None:
    jpeg = _encoded(_picture(), ".jpg")
    framed = _with_segment(jpeg, 0xE1, b"Exif\0\0" + _encoded(_picture(8, 8), ".jpg"))
    np.testing.assert_array_equal(decode_image(framed, "x"), decode_image(jpeg, "x"))
    with pytest.raises(UserError, match="x is cut off"):
        decode_image(framed[:-100], "x")


DEEP = np.random.default_rng(0).integers(0, 4096, (8, 9, 3)).astype(np.uint16)
DEEP[0] = 4095


@pytest.mark.parametrize(("data", "says"), [
    (b"", "is empty"),
    (b"not an image, but a text\n" * 20, "cannot be decoded"),
    (b"BM" + bytes(100), "cannot be decoded"),
    (b"\x89PNG\r\n\x1a\n" + b"\0\0\0\4IDATabcdabcd", "is a damaged PNG"),
    (_encoded(_picture(), ".png").replace(b"IDAT", b"IDAT\1", 1), "is a damaged PNG"),
    (np.zeros((4, 4), np.uint8), "expected a uint8 image [h, w, 3], found uint8 [4, 4]"),
    (np.zeros((4, 4, 3), np.uint16), "expected a uint8 image [h, w, 3], found uint16"),
    (_encoded(DEEP.astype(np.float32), ".tif"), "holds float32 numbers, no colours: save it as PNG or JPEG"),
    (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(50), "is a HEIC picture: save pictures as JPEG or PNG"),
    (b"\0\0\0\x20ftypisom\0\0\2\0isomiso2mp41" + bytes(50), "is a video: save pictures as JPEG or PNG"),
    (b"<!DOCTYPE html>\n<html>", "is a web page"),
])  # fmt: skip
def test_no_image(data: Any, says: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match=rf"photo\.jpg:? {re.escape(says)}"):
        decode_image(data, "photo.jpg")
    assert capfd.readouterr() == ("", "")


def test_16_bits_that_are_used_are_scaled() -> None:
    deep = DEEP * 16
    np.testing.assert_array_equal(decode_image(_encoded(deep, ".png"), "x"), deep >> 8)
    narrow = (deep >> 8).astype(np.uint8)
    for data, bits in ((deep, 16), (DEEP, 12), (DEEP[..., 0], 12), (narrow, 0), (deep * 0, 0)):
        assert [codecs.read_depth(_encoded(data, kind), "x") for kind in (".png", ".tif")] == [bits, bits]


# Labels


def _label(data: Any, classes: int = 150, reduce_zero_label: bool = False) -> np.ndarray:
    return decode_label(data, "label.png", classes=classes, reduce_zero_label=reduce_zero_label)


def test_grey_labels() -> None:
    values = np.random.default_rng(0).integers(0, 150, (20, 30), dtype=np.uint8)
    values[0] = 255
    deep = values.astype(np.uint16)
    for data in (_encoded(values, ".png"), _encoded(deep, ".png"), values, values[..., None], deep):
        ours = _label(data)
        assert ours.dtype == np.uint8
        np.testing.assert_array_equal(ours, values)


@pytest.mark.parametrize("grey", [False, True])
@pytest.mark.parametrize("depth", [1, 2, 4, 8])
def test_labels_are_the_values_in_the_file(depth: int, grey: bool) -> None:
    """Packed by hand, as the PNG specification has it: 1, 2 and 4 bits of grey are not levels of 255."""
    indices = np.random.default_rng(depth).integers(0, 2**depth, (13, 21), dtype=np.uint8)
    np.testing.assert_array_equal(_label(_palette_png(indices, depth, grey=grey), classes=255), indices)


def test_interlaced_palette_label() -> None:
    rows = b"\0\x01" + b"\0\x02" + b"\0\x03\x04"  # Adam7 of 2 x 2 pixels: three passes
    data = _png((2, 2, 8, 3, 1), rows, (b"PLTE", bytes(range(30))))
    np.testing.assert_array_equal(_label(data), [[1, 2], [3, 4]])


def test_zero_label_void() -> None:
    """As the reference does it: 0 becomes 255, then all go down by one, then 254 becomes 255."""
    values = np.arange(256, dtype=np.uint8).reshape(16, 16)
    theirs = values.copy()
    theirs[theirs == 0] = 255
    theirs = theirs - 1
    theirs[theirs == 254] = 255
    np.testing.assert_array_equal(_label(_encoded(values, ".png"), classes=254, reduce_zero_label=True), theirs)
    np.testing.assert_array_equal(_label(_encoded(values, ".png"), classes=255), values)


@pytest.mark.parametrize(("values", "classes", "reduce_zero_label", "says"), [
    ([0, 149, 150, 255], 150, False, r"holds 150, but the 150 classes are 0..149 and void is 255"),
    ([0, 150, 151, 255], 150, True, r"holds 151, but the 150 classes are 1..150 \(0 is void\)"),
    ([7, 33, 34], 19, False, r"holds 33, 34, but .*labelTrainIds"),
    ([1, 256, 65535], 150, False, r"holds 256, 65535, but .*reduce_zero_label"),
    ([256, 300], 400, False, "holds 256, 300"),
    (list(range(30)), 19, False, r"holds 19, 20, 21, 22, 23, \.\.\., but"),
])  # fmt: skip
def test_values_that_are_no_class(values: list, classes: int, reduce_zero_label: bool, says: str) -> None:
    array = np.array([values], np.uint16 if max(values) > 255 else np.uint8)
    for data in (array, _encoded(array, ".png")):
        with pytest.raises(UserError, match=rf"^label.png {says}") as caught:
            _label(data, classes, reduce_zero_label)
        assert "\n" not in str(caught.value)


def test_sizes_must_agree() -> None:
    settings = config_lib.shapes()
    example = Example("x", np.zeros((4, 6, 3), np.uint8), np.zeros((4, 6), np.uint8), ("x", "label of x"))
    loader.decode_example(example, settings)
    words = r"x: the image has 6 x 4 pixels and its label 4 x 6: .* rotated by their EXIF orientation"
    with pytest.raises(UserError, match=words):
        loader.decode_example(example._replace(label=np.zeros((6, 4), np.uint8)), settings)


@pytest.mark.parametrize(("data", "says"), [
    (_encoded(_picture(), ".png"), "label.png is a colour image: labels are PNG files of one channel"),
    (_encoded(_picture()[..., 0], ".jpg"), "label.png is not a PNG"),
    (_png((4, 4, 8, 4, 0), b""), "label.png has transparency: labels are PNG files of one channel"),
    (_encoded(_picture()[..., 0], ".png")[:-3], "label.png is cut off"),
    (b"", "label.png is empty"),
    (b"text", "label.png is not a PNG"),
    (_picture(), r"expected class indices .* found uint8 \[60, 90, 3\]"),
    (np.zeros((3, 3), np.float32), "found float32"),
    (_png((4, 4, 8, 0, 0), b"\0\0"), "label.png cannot be decoded"),
])  # fmt: skip
def test_no_label(data: Any, says: str) -> None:
    with pytest.raises(UserError, match=says):
        _label(data)


# Geometry


def test_golden_resizes(golden: Find) -> None:
    with np.load(golden("preprocess.npz")) as file:
        image, label = file["image_rgb"], file["label"]
        ratios = {key.split("/")[1] for key in file if key.startswith("resize/")}
        assert len(ratios) == 5
        for ratio in ratios:
            scale = transforms.multiply_scale((2048, 256), float(ratio))
            assert scale == tuple(file[f"resize/{ratio}/scale_wh"])
            size = fit_size(image.shape[:2], scale)
            np.testing.assert_array_equal(transforms.resize_image(image, size), file[f"resize/{ratio}/image_rgb"])
            rows, columns = map(transforms.nearest_indices, label.shape, size)
            np.testing.assert_array_equal(label[np.ix_(rows, columns)], file[f"resize/{ratio}/label"])


def test_golden_eval_images(golden: Find) -> None:
    with np.load(golden("preprocess.npz")) as file:
        names = [key for key in file if key.startswith("test_input/")]
        assert len(names) == 3
        for name in names:
            path = golden(f"mini_ade/images/validation/{name.split('/')[1]}.jpg")
            image = decode_image(path.read_bytes(), path.name)
            ours = transforms.eval_image(image, scale=(2048, 512), size_divisor=32)
            np.testing.assert_array_equal(ours, file[name])


@pytest.mark.parametrize("size", [(32, 48), (128, 192), (64, 96), (96, 48), (63, 97), (21, 32)])
def test_a_corner_where_opencv_takes_other_paths(size: tuple[int, int]) -> None:
    """Halved (OpenCV averages areas then), doubled, unchanged (it copies), by thirds."""
    image = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    whole = transforms.resize_image(image, size)
    for bottom, right in [(1, 1), (7, 30), (size[0] - 1, size[1] - 1), (size[0], 9), (10, size[1])]:
        ours = transforms._resize_corner(image, size, bottom, right)
        np.testing.assert_array_equal(ours, whole[:bottom, :right])


# Crops

UNSURE = 200  # the class of pixels that rounding decides
SETTINGS: dict[str, Any] = {
    "crop_size": (40, 56),
    "scale": (96, 48),
    "ratio_range": (0.5, 2.0),
    "cat_max_ratio": 0.75,
}


def _crop(image: np.ndarray, label: np.ndarray, settings: dict[str, Any], rng: np.random.Generator) -> Any:
    data = config_lib.load(config_lib.base_config(), {f"data.{key}": value for key, value in settings.items()}).data
    return random_resize_crop(image, label, data, rng)


def _blocks(h: int, w: int, seed: int, classes: int = 4, void: float = 0.2) -> np.ndarray:
    """A label of large patches, some void: crops of it fail the test on categories now and then."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, classes, (2, 3), dtype=np.uint8)
    coarse[rng.random((2, 3)) < void] = 255
    return np.asarray(cv2.resize(coarse, (w, h), interpolation=cv2.INTER_NEAREST))


def _plainly(
    image: np.ndarray, label: np.ndarray, settings: dict[str, Any], rng: np.random.Generator
) -> tuple[dict[str, np.ndarray], int]:
    """What REFERENCE and the official pipeline say, on whole resized arrays; and how many crops were drawn."""
    ratio = rng.uniform(*settings["ratio_range"])
    long, short = (max(int(side * ratio), 1) for side in sorted(settings["scale"], reverse=True))
    h, w = label.shape
    factor = min(long / max(h, w), short / min(h, w))
    size = max(int(w * factor + 0.5), 1), max(int(h * factor + 0.5), 1)
    if "aspect_range" in settings:
        stretch = np.sqrt(np.exp(rng.uniform(*np.log(settings["aspect_range"]))))
        size = max(round(size[0] * stretch), 1), max(round(size[1] / stretch), 1)
    if "rotation" in settings:
        image, label = _turn(image, label, size, rng.uniform(-settings["rotation"], settings["rotation"]))
    else:
        image = np.asarray(cv2.resize(image, size, interpolation=cv2.INTER_LINEAR))
        label = np.asarray(cv2.resize(label, size, interpolation=cv2.INTER_NEAREST))
    height, width = settings["crop_size"]

    def draw() -> tuple[slice, slice]:
        top = rng.integers(0, max(label.shape[0] - height, 0) + 1)
        left = rng.integers(0, max(label.shape[1] - width, 0) + 1)
        return slice(top, top + height), slice(left, left + width)

    window, drawn = draw(), 1
    for _ in range(10 if settings["cat_max_ratio"] < 1 else 0):
        values, counts = np.unique(label[window], return_counts=True)
        counts = counts[values != 255]
        if len(counts) > 1 and counts.max() / counts.sum() < settings["cat_max_ratio"]:
            break
        window, drawn = draw(), drawn + 1
    h, w = label[window].shape
    images, labels = np.zeros((height, width, 3), np.uint8), np.full((height, width), 255, np.uint8)
    images[:h, :w], labels[:h, :w] = image[window], label[window]
    return {"image": images, "label": labels, "size": np.array((h, w), np.int32)}, drawn


def _turn(
    image: np.ndarray, label: np.ndarray, size: tuple[int, int], degrees: float
) -> tuple[np.ndarray, np.ndarray]:
    """Each pixel of the turned image is looked up in the source, by complex numbers: x + iy, y down.

    UNSURE where the nearest pixel is within 1/100 of another one, as OpenCV computes with 1/1024.
    """
    h, w = label.shape
    x, y = np.meshgrid(np.arange(size[0]) + 0.5, np.arange(size[1]) + 0.5)
    place = (x - size[0] / 2 + 1j * (y - size[1] / 2)) * np.exp(1j * np.deg2rad(degrees))
    x, y = (place.real / size[0] + 0.5) * w - 0.5, (place.imag / size[1] + 0.5) * h - 0.5
    black, void = np.pad(image, ((2, 2), (2, 2), (0, 0))), np.pad(label, 2, constant_values=255)
    x, y = np.clip(x + 2, 0, w + 2.99), np.clip(y + 2, 0, h + 2.99)
    unsure = (abs(x % 1 - 0.5) < 0.01) | (abs(y % 1 - 0.5) < 0.01)
    turned = np.where(unsure, UNSURE, void[np.rint(y).astype(int), np.rint(x).astype(int)]).astype(np.uint8)
    left, top = x.astype(int), y.astype(int)
    right, down = (x - left)[..., None], (y - top)[..., None]
    above = black[top, left] * (1 - right) + black[top, left + 1] * right
    below = black[top + 1, left] * (1 - right) + black[top + 1, left + 1] * right
    return np.rint(above * (1 - down) + below * down).astype(np.uint8), turned


def _compare(h: int, w: int, settings: dict[str, Any], seed: int) -> tuple[bool, int]:
    """Asserts that an example is made as the plain way makes it; whether it is padded, and the crops drawn."""
    image, label = _picture(h, w, seed), _blocks(h, w, seed)
    rng, their_rng = np.random.default_rng(seed), np.random.default_rng(seed)
    ours = _crop(image, label, settings, rng)
    theirs, drawn = _plainly(image, label, settings, their_rng)
    assert ours.keys() == theirs.keys()
    for name, array in theirs.items():
        assert ours[name].dtype == array.dtype
        np.testing.assert_array_equal(ours[name], array)
    assert rng.bit_generator.state == their_rng.bit_generator.state
    return tuple(theirs["size"]) != settings["crop_size"], drawn


@pytest.mark.parametrize("share", [0.75, 1.0])
def test_examples_as_the_plain_way(share: float) -> None:
    rng = np.random.default_rng(0)
    settings = SETTINGS | {"cat_max_ratio": share}
    seen = [_compare(int(rng.integers(20, 120)), int(rng.integers(20, 120)), settings, i) for i in range(120)]
    assert 20 < sum(padded for padded, _ in seen) < 100  # both kinds were there
    drawn = {drawn for _, drawn in seen}
    assert drawn >= {1, 2, 3, 11} if share < 1 else drawn == {1}


@pytest.mark.parametrize("rotation", [{}, {"rotation": 180.0}])
def test_turned_and_stretched_crops_as_the_plain_way(rotation: dict[str, float]) -> None:
    settings = SETTINGS | {"aspect_range": (0.5, 2.0), "cat_max_ratio": 1.0} | rotation
    seen = 0
    for seed in range(60):
        rng, their_rng = np.random.default_rng(seed), np.random.default_rng(seed)
        h, w = rng.integers(20, 120, 2).tolist()
        their_rng.integers(20, 120, 2)
        image = np.clip((_picture(h, w, seed) - 127.5) * 6 + 127.5, 0, 255).astype(np.uint8)
        label = np.random.default_rng(seed).integers(0, 4, (h, w), dtype=np.uint8)
        ours = _crop(image, label, settings, rng)
        theirs, _ = _plainly(image, label, settings, their_rng)
        assert rng.bit_generator.state == their_rng.bit_generator.state
        np.testing.assert_array_equal(ours["size"], theirs["size"])
        sure = theirs["label"] != UNSURE
        assert sure.mean() > 0.9
        np.testing.assert_array_equal(ours["label"][sure], theirs["label"][sure])
        # OpenCV 4 takes positions to 1/32, which the step to black outside makes 4 levels.
        np.testing.assert_allclose(ours["image"].astype(int), theirs["image"], atol=4 if rotation else 0)
        height, width = ours["size"]
        seen += (ours["label"][:height, :width] == 255).any()
    assert (seen > 30) == bool(rotation)  # corners from outside the image


def test_void_pixels_have_no_say() -> None:
    label = np.full((10, 10), 255, np.uint8)
    assert not transforms._is_varied(label, 0.75)
    label[0, :4] = 3, 3, 3, 7
    assert not transforms._is_varied(label, 0.75)  # 3 of 4 are class 3: not less than 0.75
    assert transforms._is_varied(label, 0.76)
    label[0, 3] = 3
    assert not transforms._is_varied(label, 1.5)  # one class alone


# Blur and JPEG


def test_degraded_as_by_scipy_and_pillow() -> None:
    image = _picture(40, 50)
    for seed in range(4):
        draws = np.random.default_rng(seed)
        draws.random()
        sigma = draws.uniform(0.1, 2)
        options = {
            "sigma": (sigma, sigma, 0),
            "mode": "mirror",
            "radius": (round(3 * sigma), round(3 * sigma), 0),
        }
        theirs = scipy.ndimage.gaussian_filter(image.astype(float), **options)
        ours = transforms.degrade(image, blur_prob=1.0, jpeg_prob=0.0, rng=np.random.default_rng(seed))
        np.testing.assert_allclose(ours, theirs, atol=1.5)
        draws = np.random.default_rng(seed)
        draws.random()
        file = io.BytesIO()
        PIL.Image.fromarray(image).save(file, "JPEG", quality=int(draws.integers(30, 96)))
        ours = transforms.degrade(image, blur_prob=0.0, jpeg_prob=1.0, rng=np.random.default_rng(seed))
        np.testing.assert_allclose(ours.astype(int), np.asarray(PIL.Image.open(file)), atol=2)
