"""A classifier's examples: folders, lists, records; crops and centres against torchvision's formulas and Pillow."""

import io
import math
import os
import pathlib
import pickle
from typing import Any, ClassVar, cast

import cv2
import numpy as np
import PIL.Image
import pytest
from ml_collections import ConfigDict

from tests.test_sources import refusal
from topformer_jax import config
from topformer_jax.data import codecs, loader, records, shapes, sources
from topformer_jax.data.batch import Example
from topformer_jax.data.classification import images as class_images
from topformer_jax.preparation import packing
from topformer_jax.runtime.errors import UserError

FOLDERS = ("n01440764", "n02102040", "n03000684")


def write_images(root: pathlib.Path, train: int = 4, validation: int = 3) -> pathlib.Path:
    """A data set of three classes in ImageNet's layout; one file is a PNG, one a CMYK JPEG, one is grey."""
    number = 0
    for word, count in (("train", train), ("val", validation)):
        for folder in FOLDERS:
            for index in range(count):
                image = PIL.Image.fromarray(shapes.draw("train", number, 90 + 3 * number)[0])
                kind = "PNG" if number == 1 else "JPEG"
                image = image.convert({2: "CMYK", 3: "L"}.get(number, "RGB"))
                path = root / word / folder / f"{folder}_{index}.JPEG"
                path.parent.mkdir(parents=True, exist_ok=True)
                image.save(path, kind)
                number += 1
    return root


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return write_images(tmp_path_factory.mktemp("imagenet"))


def settings(root: pathlib.Path, **changes: Any) -> ConfigDict:
    small = {"data.root": str(root), "model.num_classes": 3, "batch_size": 8, "data.crop_size": (64, 48)}
    return config.load(
        "topformer_t_imagenet", small | {key.replace("__", "."): value for key, value in changes.items()}
    )


def test_folders(images: pathlib.Path) -> None:
    """torchvision's order: classes by their folders' names, files by theirs."""
    source = sources.open_source(settings(images), "train")
    expected = sorted(str(path.relative_to(images)) for path in (images / "train").rglob("*.JPEG"))
    assert [f"{source[index].name}.JPEG" for index in range(12)] == [path[6:] for path in expected]
    assert [int(source[index].label) for index in range(12)] == [0] * 4 + [1] * 4 + [2] * 4
    assert source[5].image == (images / expected[5]).read_bytes()
    assert len(pickle.loads(pickle.dumps(source))) == 12
    assert sources.find_data_set(settings(images)).classes == FOLDERS


def test_a_name_that_is_not_utf8(tmp_path: pathlib.Path) -> None:
    write_images(tmp_path)
    first = sorted((tmp_path / "train" / FOLDERS[0]).iterdir())[0]
    first.rename(os.fsdecode(os.fsencode(first.parent) + b"/\xe9.JPEG"))
    source = sources.open_source(settings(tmp_path), "train")
    images = [source[index].image for index in range(len(source))]
    assert len(images) == 12
    assert all(len(image) > 100 for image in images)


def test_every_kind_of_file_is_decoded(images: pathlib.Path) -> None:
    given = settings(images)
    source = sources.open_source(given, "train")
    pictures = [PIL.Image.open(io.BytesIO(cast(bytes, source[index].image))) for index in range(4)]
    assert {(picture.format, picture.mode) for picture in pictures} == {
        *(("JPEG", mode) for mode in ("RGB", "CMYK", "L")),
        ("PNG", "RGB"),
    }
    for index in range(12):
        assert loader.crop_example(source[index], given, index, epoch=0)["image"].shape == (64, 48, 3)
        assert class_images.make_evaluation_image(source[index], given).shape == (64, 48, 3)


def test_a_flat_folder_with_a_list(tmp_path: pathlib.Path) -> None:
    """Its lines may name files with or without suffix, and classes by number or folder."""
    root, expected, lines = write_images(tmp_path), {}, []
    for number, folder in enumerate(FOLDERS):
        for index, path in enumerate((root / "val" / folder).iterdir()):
            path.rename(root / "val" / path.name)
            expected[path.stem] = number
            lines.append(f"{path.name if index else path.stem} {number if index % 2 else folder}")
        (root / "val" / folder).rmdir()
    (root / "val.txt").write_text("\n".join(reversed(lines)))
    (root / "classes.txt").write_text("a fish\na dog\na saw\n")
    source = sources.open_source(settings(root), "validation")
    found = {source[index].name: int(source[index].label) for index in range(len(source))}
    assert found == expected
    assert list(found) == sorted(found)
    assert sources.find_data_set(settings(root)).classes == ("a fish", "a dog", "a saw")


def test_mistakes_in_folders(tmp_path: pathlib.Path) -> None:
    root = write_images(tmp_path)
    for change, words in (
        (
            {"model__num_classes": 1000},
            "imagenet has 3 classes, the config's model 1000: --config.model.num_cl",
        ),
        ({"data__dataset": "ade20k"}, "task=classification cannot use data.dataset=ade20k"),
        ({"task": "segmentation"}, "task=segmentation cannot use data.dataset=imagenet"),
    ):
        assert words in refusal(settings(root, **change), "validation")
    assert "nowhere does not exist; the layout must be train/<class>" in refusal(
        settings(root / "nowhere"), "validation"
    )
    (root / "val" / "n09999999").mkdir()
    assert "is a class that" in refusal(settings(root), "validation")
    (root / "val").rename(root / "elsewhere")
    assert "val does not exist: expected the validation split's images there" in refusal(settings(root), "validation")
    (root / "val").mkdir()
    (root / "val" / "a.JPEG").write_bytes(b"")
    assert "there is no" in refusal(settings(root), "validation")
    (root / "val.txt").write_text("b.JPEG 0\n")
    assert "has no line for a.JPEG (1 of 1 images)" in refusal(settings(root), "validation")
    (root / "val.txt").write_text("a 0\nc.JPEG 0\nb 1\n")
    assert "val has no image b, which" in (line := refusal(settings(root), "validation"))
    assert "(2 of 3 lines): copy the images again" in line
    (root / "val.txt").write_text("a.JPEG 3\n")
    assert "expected a file and its class, a number below 3" in refusal(settings(root), "validation")
    (root / "classes.txt").write_text("one\n")
    assert "names 1 classes" in refusal(settings(root), "validation")
    (root / "classes.txt").unlink()
    (root / "val.txt").write_text("a.JPEG 1\n")
    source = sources.open_source(settings(root), "validation")
    with pytest.raises(UserError, match=r"a\.JPEG is empty"):
        class_images.make_evaluation_image(source[0], settings(root))


def test_records(images: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """What `prepare` packs, read in place and from a cache: the same batches."""
    folder = packing.build("imagenet", str(images), str(tmp_path / "records"))
    packed = {"data.source": "array_record", "data.root": str(tmp_path / "records")}
    given = settings(images)
    for more in ({}, {"data.cache": str(tmp_path / "cache")}):
        other = config.load(given, packed | more)
        for split in sources.SPLITS:
            one, two = sources.open_source(given, split), sources.open_source(other, split)
            assert len(one) == len(two)
            for index in range(len(one)):
                assert one[index][:2] == two[index][:2]
                assert int(one[index].label) == int(two[index].label)
    assert sources.find_data_set(config.load(given, packed)).classes == FOLDERS
    assert records.copy_split(folder, "imagenet", "train", str(tmp_path / "cache"))
    with pytest.raises(UserError, match="imagenet has 3 classes"):
        sources.open_source(config.load(given, packed | {"model.num_classes": 4}), "train")


def test_records_of_tensorflow_datasets(images: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """A folder as `tfds build imagenet2012 --file_format=array_record` makes it: other fields, another version."""
    import tensorflow_datasets as tfds

    class Imagenet2012(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
        VERSION = tfds.core.Version("5.1.0")
        url_infos: ClassVar[Any] = {}  # nothing is downloaded

        def _info(self) -> Any:
            features = {
                "image": tfds.features.Image(encoding_format="jpeg"),
                "label": tfds.features.ClassLabel(names=FOLDERS),
                "file_name": tfds.features.Text(),
            }
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, _: Any) -> Any:
            return {"train": self._generate_examples("train"), "validation": self._generate_examples("val")}

        def _generate_examples(self, word: str) -> Any:
            for path in (images / word).rglob("*.JPEG"):
                yield path.name, {"image": path, "label": path.parent.name, "file_name": path.name}

    builder = Imagenet2012(data_dir=tmp_path, file_format="array_record")
    builder.download_and_prepare()
    given = settings(pathlib.Path(builder.data_dir), data__source="array_record")
    source = sources.open_source(given, "train")
    found = {source[index].name: int(source[index].label) for index in range(len(source))}
    assert len(found) == 12
    assert all(name.startswith(FOLDERS[label]) for name, label in found.items())
    assert sources.find_data_set(given).classes == FOLDERS
    assert loader.crop_example(source[0], given, 0, epoch=0)["image"].shape == (64, 48, 3)


@pytest.mark.parametrize("size", [(375, 500), (100, 1000), (900, 90), (1, 1), (3, 200)])
def test_boxes_are_torchvisions(size: tuple[int, int]) -> None:
    """The lines of `RandomResizedCrop.get_params` with the same draws."""
    height, width = size
    for seed in range(200):
        found = class_images.random_box(size, (0.08, 1.0), np.random.default_rng(seed))
        rng = np.random.default_rng(seed)
        for _ in range(10):
            target_area = height * width * rng.uniform(0.08, 1.0)
            aspect_ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
            w = round(math.sqrt(target_area * aspect_ratio))
            h = round(math.sqrt(target_area / aspect_ratio))
            if 0 < w <= width and 0 < h <= height:
                expected = int(rng.integers(0, height - h + 1)), int(rng.integers(0, width - w + 1)), h, w
                break
        else:
            in_ratio = float(width) / float(height)
            w, h = width, height
            if in_ratio < 3 / 4:
                h = round(w / (3 / 4))
            elif in_ratio > 4 / 3:
                w = round(h * (4 / 3))
            expected = (height - h) // 2, (width - w) // 2, h, w
        assert found == expected


@pytest.mark.parametrize(
    ("size", "crop_pct", "short"),
    [((375, 500), 0.875, 73), ((640, 427), 0.8, 80), ((64, 64), 1.0, 64), ((50, 333), 0.95, 67)],
)
def test_centre_against_pillow(size: tuple[int, int], crop_pct: float, short: int) -> None:
    """`Resize(short)` and `CenterCrop` as torchvision computes them, on the whole image."""
    image = cv2.resize(shapes.draw("train", 0, 200)[0], size[::-1])
    given = settings(pathlib.Path(), evaluation__crop_pct=crop_pct)
    found = class_images.make_evaluation_image(Example("x", image, np.zeros(()), ("x", "y")), given)
    h, w = size
    new = (short, int(short * w / h)) if h < w else (int(short * h / w), short)
    whole = PIL.Image.fromarray(image).resize(new[::-1], PIL.Image.Resampling.BICUBIC)
    top, left = round((new[0] - 64) / 2), round((new[1] - 48) / 2)
    np.testing.assert_array_equal(found, np.asarray(whole)[top : top + 64, left : left + 48])


def test_only_what_is_needed_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A large JPEG is decoded at a fraction, and gives nearly what shrinking the whole image gives."""
    image = cv2.GaussianBlur(cv2.resize(shapes.draw("train", 1, 300)[0], (1600, 1200)), (0, 0), 3)
    data = cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 95])[1].tobytes()
    given = settings(pathlib.Path(), data__rand_augment=0.0)
    example = Example("x", data, np.zeros((), int), ("x", "y"))
    reductions, decode = [], codecs.decode_image

    def record(*args: Any, **flags: Any) -> np.ndarray:
        reductions.append(flags["reduction"])
        return decode(*args, **flags)

    monkeypatch.setattr(codecs, "decode_image", record)
    differences = []
    for seed in range(30):
        found = class_images.make_training_example(example, given, np.random.default_rng(seed))["image"]
        box = class_images.random_box((1200, 1600), (0.08, 1.0), np.random.default_rng(seed))
        top, left, height, width = box
        assert min(height / reductions[-1] / 64, width / reductions[-1] / 48) >= 1
        whole = image[top : top + height, left : left + width]
        expected = cv2.resize(whole, (48, 64), interpolation=cv2.INTER_AREA)
        differences.append(np.abs(found.astype(int) - expected).mean())
    assert set(reductions) == {4, 8}
    assert np.mean(differences) < 4


def test_reduced_and_unrotated_decoding() -> None:
    image = shapes.draw("train", 2, 200)[0]
    picture, file = PIL.Image.fromarray(image), io.BytesIO()
    exif = picture.getexif()
    exif[PIL.ExifTags.Base.Orientation] = 6  # to be turned by 90 degrees
    picture.save(file, "JPEG", quality=95, exif=exif)
    data, (height, width) = file.getvalue(), image.shape[:2]
    assert codecs.read_jpeg_size(data) == (height, width)
    assert codecs.decode_image(data, "x").shape == (width, height, 3)
    whole = codecs.decode_image(data, "x", orient=False)
    np.testing.assert_array_equal(whole, np.asarray(PIL.Image.open(io.BytesIO(data)).convert("RGB")))
    for reduction in (2, 4, 8):
        small = codecs.decode_image(data, "x", orient=False, reduction=reduction)
        assert small.shape == (-(-height // reduction), -(-width // reduction), 3)
        expected = cv2.resize(whole, small.shape[1::-1], interpolation=cv2.INTER_AREA)
        assert np.abs(small.astype(int) - expected).mean() < 6
    assert codecs.read_jpeg_size(data[:40]) is None
    assert codecs.read_jpeg_size(image) is None
    assert codecs.read_jpeg_size(cv2.imencode(".png", image)[1].tobytes()) is None


def test_a_class_that_the_model_lacks() -> None:
    example = Example("x", np.zeros((80, 80, 3), np.uint8), np.asarray(7), ("image x", "the class of x"))
    with pytest.raises(UserError, match="the class of x is 7: expected 0 to 2; check"):
        class_images.read_label(example, settings(pathlib.Path()))


def test_settings_that_do_not_fit(images: pathlib.Path) -> None:
    with pytest.raises(UserError, match=r"data\.mixup_alpha mixes pairs, and a micro-batch has 3 images"):
        settings(images, data__mixup_alpha=0.2, batch_size=6, grad_accum_steps=2)
    with pytest.raises(UserError, match=r"data\.crop_area is .*expected the smaller number first"):
        settings(images, data__crop_area=(0.9, 0.1))
