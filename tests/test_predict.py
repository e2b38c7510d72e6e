"""Prediction and browsing from the command line: what they write, and what they say about what they cannot read."""

import json
import os
import pathlib
import subprocess
import sys

import cv2
import numpy as np
import PIL.ExifTags
import PIL.Image
import pytest

from tests.commands import LONGEST
from topformer_jax import checkpoints, config, inference, load, models, predict
from topformer_jax.data.codecs import decode_image, decode_label, read_image_size
from topformer_jax.runtime.errors import UserError

ROOT = pathlib.Path(__file__).parents[1]
CONFIG = ["--config", "configs/topformer_t_shapes.py", "--config.evaluation.scale=(96,64)"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A checkpoint folder of random weights."""
    folder = tmp_path_factory.mktemp("weights") / "shapes"
    settings = config.shapes()
    tensors = {name: np.asarray(value) for name, value in models.state_dict(models.build(settings)).items()}
    checkpoints.save_model(folder, tensors, {"config": json.loads(settings.to_json()), "meta": {}})
    return str(folder)


def _write_image(path: pathlib.Path, height: int, width: int) -> np.ndarray:
    image = np.random.default_rng(height).integers(0, 256, (height, width, 3)).astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), image)
    return image


def _command(module: str, *arguments: str, stdin: bytes | None = None) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-m", f"topformer_jax.{module}", *CONFIG, *arguments],
        input=stdin,
        capture_output=True,
        cwd=ROOT,
        timeout=LONGEST,
        check=False,
    )


def test_a_folder_with_what_users_have_in_it(weights: str, tmp_path: pathlib.Path) -> None:
    inside = tmp_path / "in"
    _write_image(inside / "a.png", 40, 50)
    _write_image(inside / "deep" / "b.jpg", 1, 1)
    _write_image(inside / "long.png", 20, 20000)
    (inside / "notes.txt").write_text("not an image")
    (inside / "cut.jpg").write_bytes((inside / "deep" / "b.jpg").read_bytes()[:200])
    out = tmp_path / "out"
    done = _command("predict", "--checkpoint", weights, "--output", str(out), "--probabilities", str(inside))
    assert done.returncode == 2
    assert "notes.txt" in done.stdout.decode()
    assert "cut.jpg is cut off" in done.stdout.decode()
    assert done.stderr.decode() == f"error: 1 of 4 images could not be read; the others are in {out}\n"
    names = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    stems = ("a", "deep/b", "long")
    assert names == {
        f"{s}_{kind}" for s in stems for kind in ("overlay.jpg", "mask.png", "probabilities.npz")
    }

    model = load(config.shapes(), weights, **{"evaluation.scale": (96, 64)})
    assert isinstance(model, models.Segmenter)
    image = decode_image((inside / "a.png").read_bytes(), "a")
    labels = inference.segment(model, image)
    mask = decode_label((out / "a_mask.png").read_bytes(), "a", classes=10, reduce_zero_label=False)
    assert np.array_equal(mask, labels)
    with np.load(out / "a_probabilities.npz") as stored:
        assert stored["probabilities"].shape == (40, 50, 10)
        assert np.allclose(stored["probabilities"].astype(np.float32).sum(-1), 1, atol=5e-3)
        assert stored["classes"][0] == "gradient"


def test_standard_input(weights: str, tmp_path: pathlib.Path) -> None:
    _write_image(tmp_path / "a.png", 30, 70)
    data = (tmp_path / "a.png").read_bytes()
    done = _command("predict", "--checkpoint", weights, "--output", str(tmp_path / "out"), "-", stdin=data)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"stdin_overlay.jpg", "stdin_mask.png"}


def test_images_are_listed_once_and_outputs_differ(tmp_path: pathlib.Path) -> None:
    _write_image(tmp_path / "a.png", 4, 4)
    _write_image(tmp_path / "b" / "a.png", 4, 4)
    images, others, results = predict.list_images([str(tmp_path), str(tmp_path / "*.png")])
    assert [str(file.output) for file in images] == ["a", "b/a"]
    assert others == results == []
    with pytest.raises(UserError, match=r"would both be written to a_mask\.png"):
        predict.list_images([str(tmp_path / "a.png"), str(tmp_path / "b" / "a.png")])
    with pytest.raises(UserError, match="there is no image"):
        predict.list_images([str(tmp_path / "*.gif")])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no image"):
        predict.list_images([str(tmp_path / "empty")])


def test_links_are_followed_and_results_are_no_inputs(tmp_path: pathlib.Path) -> None:
    """Each picture once, though `loop` leads back to the folder, and no result of an earlier run."""
    inside, out = tmp_path / "in", tmp_path / "in" / "out"
    for path in (inside / "a.jpg", inside / "b_mask.png", tmp_path / "elsewhere" / "c.jpg"):
        _write_image(path, 4, 4)
    (inside / "link").symlink_to(tmp_path / "elsewhere")
    (inside / "loop").symlink_to(inside)
    pictures = ["a", "b_mask", "link/c"]
    for _ in range(2):
        images, others, results = predict.list_images([str(inside)], out)
        assert [str(file.output) for file in images] == pictures
        assert others == []
        for name in pictures:
            _write_image(out / f"{name}_overlay.jpg", 4, 4)
            _write_image(out / f"{name}_mask.png", 4, 4)
    assert len(results) == 6
    (inside / "a_overlay.jpg").write_bytes(b"")
    (inside / "a_mask.png").write_bytes(b"")
    for folder in (inside, tmp_path / "another"):  # written beside the pictures, or elsewhere
        listing = predict.list_images([str(path) for path in inside.iterdir() if path.is_file()], folder)
        assert sorted(str(file.output) for file in listing.images) == ["a", "b_mask"]
        assert len(listing.results) == 2
        assert len(predict.list_images([str(inside)], folder).results) == 8
    with pytest.raises(UserError, match="nothing but 6 results of this command"):
        predict.list_images([str(out)], out)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--count", "0"), "--count is 0, --step 1"),
        (("--count", "-1"), "--count is -1, --step 1"),
        (("--step", "-1"), "--count is 8, --step -1"),
    ],
)
def test_browse_flags_without_sense(tmp_path: pathlib.Path, flags: tuple[str, str], says: str) -> None:
    done = _command("browse", "--output", str(tmp_path / "b.png"), *flags)
    assert done.returncode == 2
    assert done.stderr.decode() == f"error: {says}: expected 1 or more\n"


def test_browse_shows_what_training_sees(tmp_path: pathlib.Path) -> None:
    done = _command(
        "browse", "--output", str(tmp_path / "b.png"), "--count", "3", "--config.data.shapes.size=64"
    )
    assert done.returncode == 0, done.stderr
    shown = cv2.imread(str(tmp_path / "b.png"))
    assert shown is not None
    assert shown.shape[0] > 3 * 256
    assert shown.shape[1] > 3 * 256
    assert len(np.unique(shown.reshape(-1, 3), axis=0)) > 100


def test_the_size_of_an_image_is_read_from_its_header(tmp_path: pathlib.Path) -> None:
    image = np.zeros((40, 60, 3), np.uint8)
    for suffix in (".png", ".jpg", ".webp", ".bmp"):
        path = tmp_path / f"a{suffix}"
        cv2.imwrite(str(path), image)
        assert read_image_size(str(path)) == (40, 60)
    turned = PIL.Image.new("RGB", (60, 40))
    exif = turned.getexif()
    exif[PIL.ExifTags.Base.Orientation] = 6
    for suffix in (".png", ".jpg", ".tif", ".webp", ".avif"):
        path = tmp_path / f"turned{suffix}"
        turned.save(path, exif=exif)
        assert read_image_size(str(path)) == decode_image(path.read_bytes(), "turned").shape[:2] == (60, 40)
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no image")
    assert read_image_size(str(broken)) is None
    os.mkfifo(tmp_path / "pipe")  # opening it would wait for a writer
    assert read_image_size(str(tmp_path / "pipe")) is None
