"""scripts/reproduce.sh on official downloads in miniature, of folders and records, and docs/zoo.md beside it."""

import json
import os
import pathlib
import re
import subprocess
import sys
from collections.abc import Callable

import pytest

from tests import miniatures
from tests.commands import LONGEST
from topformer_jax import config

ROOT = pathlib.Path(__file__).parents[1]
_, _TABLE, *_ = re.split(r'ROWS="|^"$', (ROOT / "scripts/reproduce.sh").read_text(), flags=re.MULTILINE)
ROWS = {fields[0]: fields[1:] for line in _TABLE.splitlines() if (fields := line.split())}
# Crops of 64 x 64 leave one token an image, and BatchNorm over two of them has gradients without bounds.
SMALL = {
    "schedule.steps": 2,
    "schedule.warmup_steps": 1,
    "batch_size": 2,
    "data.num_workers": 0,
    "model.depths": 1,
    "data.crop_size": "(128,128)",
    "evaluation.scale": "(128,128)",
}
SMALL_SEGMENTATION = {"data.scale": "(128,128)"}
MINIATURES: dict[str, tuple[str, Callable[[pathlib.Path], object]]] = {
    "ade20k": ("t_ade_4x8", miniatures.ade20k),
    "cityscapes": ("b_cityscapes", miniatures.cityscapes),
    "context60": ("t_context60", miniatures.context60),
    "context59": ("t_context59", miniatures.context59),
    "cocostuff10k": ("t_cocostuff10k", miniatures.cocostuff10k),
    "imagenet": ("t_imagenet", miniatures.imagenet),
}


def reproduce(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "scripts/reproduce.sh", *words],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"},
        capture_output=True,
        text=True,
        timeout=LONGEST,
    )


def topformer_jax(command: str, *words: object) -> None:
    flags = [sys.executable, "-m", f"topformer_jax.{command}", *map(str, words)]
    subprocess.run(flags, cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu"}, check=True, timeout=LONGEST)


def check_row(row: str, folder: pathlib.Path, *words: str) -> None:
    settings = SMALL if row == "t_imagenet" else SMALL | SMALL_SEGMENTATION
    if row == "t_imagenet":
        settings = settings | {"model.num_classes": 2}
    flags = [f"--config.{key}={value}" for key, value in settings.items()]
    done = reproduce(row, "--work", str(folder / "work"), *words, *flags)
    assert done.returncode == 0, done.stdout + done.stderr
    published = ROWS[row][3]
    name = "top-1" if row == "t_imagenet" else "mIoU"
    beside = "no published score" if published == "-" else rf"published {published} \([+-]\d+\.\d\)"
    assert re.fullmatch(rf"{row}: {name} \d+\.\d, {beside}", done.stdout.strip().splitlines()[-1])


def test_a_row_from_downloads_to_score(tmp_path: pathlib.Path) -> None:
    miniatures.camvid(tmp_path)
    check_row("t_camvid", tmp_path, "--downloads", str(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("data_set", MINIATURES)
def test_every_data_set(data_set: str, tmp_path: pathlib.Path) -> None:
    row, make = MINIATURES[data_set]
    make(tmp_path)
    check_row(row, tmp_path, "--downloads", str(tmp_path), "--backbone", "fresh")
    run = tmp_path / "work/runs" / row
    topformer_jax("convert", "--checkpoint", run, "--output", tmp_path / "converted.pth")
    flags = ["--source", tmp_path / "work/data" / data_set, "--output", tmp_path / "records"]
    topformer_jax("prepare", data_set, "--format", "array_record", *flags)
    (tmp_path / "work").rename(tmp_path / "from_folder")
    records = {"data.source": "array_record", "data.root": tmp_path / "records"}
    words = [f"--config.{key}={value}" for key, value in records.items()]
    check_row(row, tmp_path, "--backbone", "fresh", *words)
    losses = [
        (tmp_path / folder / "runs" / row / "metrics.jsonl").read_text().splitlines()[0]
        for folder in ("from_folder", "work")
    ]
    assert json.loads(losses[0])["loss"] == json.loads(losses[1])["loss"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "there is no row '': expected one of t_ade t_ade_4x8"),
        (("t_coco", "--downloads", "x"), "there is no row 't_coco'"),
        (("t_ade",), "--downloads DIR is missing: the folder with the official archives of ade20k"),
        (("t_ade", "--downloads", "x"), "starts from ImageNet weights: give --backbone FILE"),
        (("t_ade", "--download", "x"), "unknown flag --download"),
        (("t_ade", "--downloads"), "--downloads needs a value"),
    ],
)
def test_mistakes(words: tuple[str, ...], message: str) -> None:
    done = reproduce(*words)
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_rows_are_recipes_with_their_published_scores() -> None:
    zoo = (ROOT / "docs/zoo.md").read_text()
    for row, (recipe, data_set, _, published, *flags) in ROWS.items():
        settings = config.load(recipe, dict(flag.removeprefix("--config.").split("=") for flag in flags))
        assert settings.data.dataset == data_set
        assert re.search(rf"^\| `{row}` \|.*\b{published if published != '-' else 'none'}\b", zoo, re.MULTILINE), row
        if published != "-" and not flags:
            assert f"Published: {published}" in (ROOT / f"configs/{recipe}.py").read_text()
