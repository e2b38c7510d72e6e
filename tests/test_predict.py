"""Prediction and browsing from the command line: what they write, and what they say about what they cannot read."""

import io
import os
import pathlib
import sys

import cv2
import numpy as np
import PIL.ExifTags
import PIL.Image
import pytest

from tests.commands import command, refused_command
from topformer_jax import browse, inference, load, predict
from topformer_jax.data.codecs import decode_image, decode_label, read_image_size
from topformer_jax.runtime.errors import UserError

ENDS = ("overlay.jpg", "mask.png", "probabilities.npz")
CONFIG = ["--config", "topformer_t_shapes", "--config.evaluation.scale=(96,64)"]


def _write_image(path: pathlib.Path, height: int, width: int) -> np.ndarray:
    image = np.random.default_rng(height).integers(0, 256, (height, width, 3)).astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), image)
    return image


def test_a_folder_with_what_users_have_in_it(
    shapes_weights: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inside, out = tmp_path / "in", tmp_path / "out"
    _write_image(inside / "a.png", 40, 50)
    _write_image(inside / "deep" / "b.jpg", 1, 1)
    _write_image(inside / "long.png", 20, 20000)
    (inside / "notes.txt").write_text("not an image")
    (inside / "cut.jpg").write_bytes((inside / "deep" / "b.jpg").read_bytes()[:200])
    flags = [*CONFIG, "--checkpoint", shapes_weights, "--output", out, "--probabilities", inside]
    said = refused_command(predict.main, *flags)
    assert said == f"error: 1 of 4 images could not be read; the others are in {out}"
    printed = capsys.readouterr().out
    assert "runtime: onnxruntime (--runtime jax for JAX)" in printed
    assert "notes.txt" in printed
    assert "cut.jpg is cut off" in printed
    names = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert names == {f"{stem}_{end}" for stem in ("a", "deep/b", "long") for end in ENDS}
    model = load("topformer_t_shapes", shapes_weights, **{"evaluation.scale": (96, 64)})
    labels = inference.segment(model, decode_image((inside / "a.png").read_bytes(), "a"), runtime="onnx")
    mask = decode_label((out / "a_mask.png").read_bytes(), "a", classes=10, reduce_zero_label=False)
    assert np.array_equal(mask, labels)
    with np.load(out / "a_probabilities.npz") as stored:
        assert stored["probabilities"].shape == (40, 50, 10)
        assert np.allclose(stored["probabilities"].astype(np.float32).sum(-1), 1, atol=5e-3)
        assert stored["classes"][0] == "gradient"


def test_standard_input(
    shapes_weights: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _write_image(tmp_path / "a.png", 30, 70)
    data = (tmp_path / "a.png").read_bytes()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    command(predict.main, *CONFIG, "--checkpoint", shapes_weights, "--output", tmp_path / "out", "-")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"stdin_overlay.jpg", "stdin_mask.png"}


def test_images_are_listed_once_and_outputs_differ(tmp_path: pathlib.Path) -> None:
    _write_image(tmp_path / "a.png", 4, 4)
    _write_image(tmp_path / "b" / "a.png", 4, 4)
    images, others, results = predict.list_images([str(tmp_path), str(tmp_path / "*.png")], tmp_path / "out")
    assert [str(file.output) for file in images] == ["a", "b/a"]
    assert others == results == []
    with pytest.raises(UserError, match=r"would both be written to a_mask\.png"):
        predict.list_images([str(tmp_path / "a.png"), str(tmp_path / "b" / "a.png")], tmp_path / "out")
    with pytest.raises(UserError, match="there is no image"):
        predict.list_images([str(tmp_path / "*.gif")], tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no image"):
        predict.list_images([str(tmp_path / "empty")], tmp_path / "out")


def test_links_are_followed_and_results_are_no_inputs(tmp_path: pathlib.Path) -> None:
    """Each picture once, though `loop` leads back to the folder, and no result of an earlier run."""
    inside, out = tmp_path / "in", tmp_path / "in" / "out"
    for path in (inside / "a.jpg", inside / "b_mask.png", tmp_path / "elsewhere" / "c.jpg"):
        _write_image(path, 4, 4)
    (inside / "link").symlink_to(tmp_path / "elsewhere")
    (inside / "loop").symlink_to(inside)
    pictures = ["a", "b_mask", "link/c"]
    for count in (0, 10):
        images, others, results = predict.list_images([str(inside)], out)
        assert [str(file.output) for file in images] == pictures
        assert others == []
        assert len(results) == count
        (out / "link").mkdir(parents=True, exist_ok=True)
        for name in (f"{picture}_{end}" for picture in pictures for end in ENDS):
            (out / name).touch()
        (out / "cut_overlay.jpg").touch()  # of an interrupted run
    for end in ENDS:
        (inside / f"a_{end}").touch()  # beside the pictures
    files = [str(path) for path in inside.iterdir() if path.is_file()]
    listing = predict.list_images(files, tmp_path / "another")
    assert sorted(str(file.output) for file in listing.images) == ["a", "b_mask"]
    assert len(listing.results) == 3
    (out / "cut_overlay.jpg").unlink()
    with pytest.raises(UserError, match="nothing but 9 results of this command"):
        predict.list_images([str(out)], out)


def test_browse(tmp_path: pathlib.Path) -> None:
    """The picture shows what training sees; flags without sense are one line."""
    words = [*CONFIG, "--output", tmp_path / "b.png", "--config.data.shapes.size=64"]
    command(browse.main, *words, "--count", 3)
    shown = cv2.imread(str(tmp_path / "b.png"))
    assert shown is not None
    assert min(shown.shape[:2]) > 3 * 256
    assert len(np.unique(shown.reshape(-1, 3), axis=0)) > 100
    for flags, says in (
        (("--count", 0), "--count is 0, --step 1"),
        (("--step", -1), "--count is 8, --step -1"),
    ):
        assert refused_command(browse.main, *words, *flags) == f"error: {says}: expected 1 or more"


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
