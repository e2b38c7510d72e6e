"""What goes wrong before a training and in its files: one line that says what and what to do, and nothing lost.

`pytest -s tests/test_bad_input.py` shows the lines.
"""

import pathlib
import re
import shutil
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

from tests.commands import FOLDER, refused_here, refused_run, run_here
from topformer_jax import config
from topformer_jax.config.settings import SETTINGS, Range
from topformer_jax.data import codecs
from topformer_jax.runtime import logs
from topformer_jax.runtime.errors import UserError


def write(path: pathlib.Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(cv2.imencode(path.suffix, array)[1].tobytes())


def rewrite(path: pathlib.Path, change: Callable[[np.ndarray], np.ndarray]) -> None:
    write(path, change(np.asarray(cv2.imread(str(path), cv2.IMREAD_UNCHANGED))))


def cut(path: pathlib.Path) -> None:
    path.write_bytes(path.read_bytes()[:-400])


def resave(path: pathlib.Path, mode: str = "RGB", orientation: int = 1) -> None:
    """A JPEG in another colour space, or turned to the left with a mark that says how to turn it back."""
    image = Image.open(path).convert(mode)
    exif = Image.Exif()
    exif[0x0112] = orientation
    turned = image.transpose(Image.Transpose.ROTATE_90) if orientation == 6 else image
    turned.save(path, exif=exif, quality=98)


# Settings


HUGE = 10**21
BELOW = {  # the largest values below the limits
    **dict.fromkeys(("batch_size", "grad_accum_steps", "log_every", "checkpoint_every", "max_to_keep"), 0),
    **dict.fromkeys(("schedule.steps", "data.shapes.train", "mesh.fsdp"), 0),
    **dict.fromkeys(("schedule.warmup_steps", "evaluate_every", "data.num_workers", "seed"), -1),
    **{"data.crop_size": (0, 64), "data.shapes.size": 15, "evaluation.per_device_batch_size": -1},
}
ABOVE = {"data.flip_prob": 3.0, "ema_decay": 1.0, "optimizer.beta1": 1.0, "model.num_classes": 256}


LIMITED = [
    key
    for key, row in SETTINGS.items()
    if isinstance(row.legal, Range) and row.default != () and HUGE not in row.legal
]


@pytest.mark.parametrize("key", LIMITED)
def test_every_number_has_limits(key: str) -> None:
    """Without them, these end in a traceback or take all memory."""
    default = SETTINGS[key].default
    huge = (HUGE,) * len(default) if isinstance(default, tuple) else HUGE
    for value in (huge, BELOW.get(key, huge), ABOVE.get(key, huge)):
        with pytest.raises(UserError, match=re.escape(f"{key} is {value}") + r"(\.0)?.*: expected "):
            config.load(config.shapes(), {key: str(value)})


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("batch_size=4", "evenly over 8 devices: set batch_size to a multiple of 8"),
        (f"batch_size={'9' * 5000}", "batch_size cannot be '9999"),
        ("grad_accum_steps=3", "a batch of 8 images in 3 micro-batches"),
        ("schedule.lr=1e999", "schedule.lr is inf"),
        ("data.crop_size=(64,)", "data.crop_size cannot be (64,): expected a value like (512, 512)"),
        (f"data.crop_size={'(' * 500}", "data.crop_size cannot be '((((("),
        ("data.ratio_range=(2.0,0.5)", "expected the smaller number first"),
        ("data.class_names=(1,2)", "expected a value like ('name', 'name')"),
        ("ignore_void_in_mean=some", "ignore_void_in_mean cannot be 'some'"),
        ("mesh.fsdp=3", "mesh.fsdp=3 does not divide the 8 devices of a slice"),
        ("model.variant=huge", "expected one of tiny, small, base"),
        ("evaluation.img_ratios=()", "evaluation.img_ratios cannot be ()"),
        ("data.dataset=shpes", "data.dataset is 'shpes': did you mean 'shapes'? expected one of ade20k, "),
        ("data.source=folder", "for the synthetic set both are shapes"),
        ("model.num_classes=11", "shapes has 10 classes, the config's model 11"),
        ("model.num_classes=256", "expected 1 to 255 in segmentation"),
        ("init_from=/no/where.pth", "no checkpoint /no/where.pth"),
        ("init_part=half", "expected one of all, all_but_classes, backbone"),
    ],
)
def test_settings(tmp_path: pathlib.Path, setting: str, words: str) -> None:
    key, _, value = setting.partition("=")
    assert words in refused_here(tmp_path / "run", {key: value})
    assert not (tmp_path / "run").exists()


# Files that are not what they should be


@pytest.fixture(scope="module")
def trained(
    drawn: pathlib.Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[pathlib.Path, str, dict[str, Any]]:
    """A run on files of all kinds, and on one that is cut off and skipped: its folder, output and settings."""
    folder = tmp_path_factory.mktemp("kinds")
    root = shutil.copytree(drawn, folder / "set")
    images, labels = root / "images/train", root / "annotations/train"
    for number, (mode, orientation) in enumerate([("L", 1), ("CMYK", 1), ("RGB", 6)]):
        resave(images / f"{number}.jpg", mode, orientation)
    write(images / "3.png", np.asarray(cv2.imread(str(images / "3.jpg"))).astype(np.uint16) * 257)
    (images / "3.jpg").unlink()
    rewrite(labels / "4.png", lambda label: label.astype(np.uint16))
    cut(images / "5.jpg")
    changes = FOLDER | {"data.root": root, "data.num_workers": 2, "data.skip_unreadable": True}
    return folder / "run", run_here(folder / "run", changes), changes


def test_files_of_all_kinds_train(trained: tuple[pathlib.Path, str, dict], drawn: pathlib.Path) -> None:
    workdir, out, changes = trained
    told = [line for line in out.splitlines() if line.startswith("skipped: ")]
    print(*told, sep="\n")
    assert len(told) == 1  # by name once, and counted in every line
    assert f"{changes['data.root']}/images/train/5.jpg is cut off" in told[0]
    records = [r for r in logs.read_records(workdir / "metrics.jsonl") if r["kind"] == "train"]
    assert len(records) == 6
    assert records[-1]["skipped"] >= 6  # six epochs
    assert f"skipped {records[-1]['skipped']} unreadable" in out
    for number, (suffix, distance) in enumerate([("jpg", 80), ("jpg", 4), ("jpg", 4), ("png", 0)]):
        file = changes["data.root"] / f"images/train/{number}.{suffix}"
        found = codecs.decode_image(file.read_bytes(), "x")
        theirs = np.asarray(cv2.imread(str(file), cv2.IMREAD_COLOR))[..., ::-1]
        np.testing.assert_array_equal(found, theirs)
        plain = codecs.decode_image((drawn / f"images/train/{number}.jpg").read_bytes(), "x")
        assert found.shape == plain.shape == (79, 65, 3)
        assert np.abs(found.astype(float) - plain).mean() <= distance


# Work directories


def test_work_directories_that_do_not_fit(
    trained: tuple[pathlib.Path, str, dict[str, Any]], tmp_path: pathlib.Path
) -> None:
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/checkpoints").write_text("in the way")
    for workdir in (tmp_path / "file", pathlib.Path("/proc/x/run"), tmp_path / "run"):
        line = refused_here(workdir, {})
        assert f"cannot write into {workdir}/checkpoints: " in line
        assert "name another --workdir" in line
    assert (tmp_path / "file").read_text() == "in the way"


def test_checkpoints_that_do_not_fit(
    trained: tuple[pathlib.Path, str, dict[str, Any]], tmp_path: pathlib.Path
) -> None:
    workdir = shutil.copytree(trained[0], tmp_path / "run")
    changes = trained[2]
    before = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}
    # A run from before there was a setting had its default.
    described = workdir / "checkpoints/6/_CHECKPOINT_METADATA"
    content = described.read_text()
    assert '"depths": 1, ' in content
    for text, depths in ((content, 1), (content.replace('"depths": 1, ', ""), 4)):
        described.write_text(text)
        line = refused_here(workdir, changes | {"model.depths": 2})
        assert f"holds a run with model.depths={depths}, and the config has 2" in line
    described.write_text(content)
    assert {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()} == before
    # The first is read by threads that would all complain; so in a process whose whole output is seen.
    for name, command in (("model/manifest.ocdbt", refused_run), ("_CHECKPOINT_METADATA", refused_here)):
        file = workdir / "checkpoints/6" / name
        whole = file.read_bytes()
        file.write_bytes(whole[: len(whole) // 2])
        line = command(workdir, changes)
        assert f"cannot read {workdir}/checkpoints/6: " in line
        assert "if it is damaged, move it away to resume from step 4" in line
        file.write_bytes(whole)
