"""Classes and settings of a checkpoint, and what commands print if their config or data differ."""

import json
import pathlib
import types
from collections.abc import Callable
from typing import Any
from unittest import mock

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from ml_collections import ConfigDict, FrozenConfigDict

import topformer_jax
from tests.commands import command, refused_command as refused
from tests.reference import network as reference
from topformer_jax import checkpoints, config, convert, evaluate, export, models, predict
from topformer_jax.checkpoints import origin
from topformer_jax.data import sources
from topformer_jax.data.catalog import CATALOG
from topformer_jax.inference import compile_inference
from topformer_jax.runtime import sharding
from topformer_jax.runtime.errors import UserError

Find = Callable[[str], pathlib.Path]
NAMES = [f"class {number}" for number in range(10)]  # of the folder that tests draw
COLOURS = [[number, 2 * number, 255] for number in range(10)]
OWN = {"data.dataset": "custom", "data.source": "folder", "evaluation.scale": "(96,96)"}


def save(folder: pathlib.Path, settings: ConfigDict, meta: dict[str, Any]) -> pathlib.Path:
    """A checkpoint folder as training writes it, of random weights."""
    tensors = {name: np.asarray(value) for name, value in models.state_dict(models.build(settings)).items()}
    checkpoints.save_model(folder, tensors, {"config": json.loads(settings.to_json()), "meta": meta})
    return folder


def flags(changes: dict[str, Any], recipe: str = "topformer_t_shapes") -> list[str]:
    return ["--config", recipe, *(f"--config.{key}={value}" for key, value in changes.items())]


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A checkpoint of a user's own data set, whose folder is somewhere else now."""
    settings = config.load("topformer_t_shapes", OWN | {"data.root": "/no/where"})
    meta = {"epoch": 0, "iter": 5, "CLASSES": NAMES, "PALETTE": COLOURS}
    return save(tmp_path_factory.mktemp("own") / "run", settings, meta)


def test_a_reordered_classes_txt(own: pathlib.Path, root: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """The labels are the same, so scores and names are those of the folder before the change.

    Flags that change a score on purpose are no difference.
    """
    words = [*flags(OWN | {"data.root": root}), "--checkpoint", own]
    scored = [*words, "--config.evaluation.scale=(80,80)", "--flip", "--workdir"]
    scales = "--config.evaluation.scale='(96,96)'; this command uses (80,80)\n"
    before = command(evaluate.main, *scored, tmp_path / "before")
    assert before.startswith(f"the checkpoint was trained and scored with {scales}")
    (root / "classes.txt").write_text("".join(f"{name}\n" for name in reversed(NAMES)))
    line = (
        f"classes.txt in {root} differs from the checkpoint: label 0 is 'class 9' there, 'class 0' in the checkpoint "
        "(and 9 more); the checkpoint's own names are used\n"
    )
    after = command(evaluate.main, *scored, tmp_path / "after")
    assert after.startswith(line)
    assert "differs" not in before
    before, after = ((tmp_path / name / "confusion.csv").read_text() for name in ("before", "after"))
    assert before == after
    assert before.startswith(f"label,{','.join(NAMES)}\n")
    assert list(json.loads((tmp_path / "after/metrics.json").read_text())["classes"]) == NAMES
    settings = config.load("topformer_t_shapes", OWN | {"data.root": str(root)})
    model = checkpoints.load_model(settings, own)
    assert export.describe_model(settings, "", model)["classes"] == NAMES

    (root / "classes.txt").write_text("one\ntwo\n")
    more = "names 2 classes, the checkpoint 10: the checkpoint's own names are used\n"
    assert command(convert.main, *words, "--output", tmp_path / "c.pth").count(more) == 1
    (root / "classes.txt").unlink()
    assert len(sources.open_source(settings, "validation", classes=NAMES)) == 3


def test_predict_and_export_need_no_data_folder(
    own: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cv2.imwrite(str(tmp_path / "a.png"), np.zeros((64, 64, 3), np.uint8))
    (tmp_path / "classes.txt").write_text("nothing to do with it\n")
    words = [*flags(OWN), "--checkpoint", own]
    out = tmp_path / "out"
    monkeypatch.chdir(tmp_path)
    said = command(predict.main, *words, "--output", out, "--probabilities", tmp_path / "a.png")
    assert said.splitlines()[-1] == f"wrote 1 overlays and masks into {out}"
    assert "checkpoint" not in said
    with np.load(out / "a_probabilities.npz") as stored:
        assert list(stored["classes"]) == NAMES
    mask = (out / "a_mask.png").read_bytes()
    start = mask.index(b"PLTE") + 4
    assert list(mask[start : start + 30]) == np.ravel(COLOURS).tolist()

    settings = config.load("topformer_t_shapes", OWN)
    facts = export.describe_model(settings, "", checkpoints.load_model(settings, own))
    assert (facts["classes"], facts["palette"]) == (NAMES, COLOURS)
    unnamed = save(tmp_path / "unnamed", config.load("topformer_t_shapes", OWN), {"iter": 5})
    words = [*flags(OWN | {"data.root": tmp_path / "no"}), "--checkpoint", unnamed, "--output", out]
    assert "is not there: give --config.data.root=DIR" in refused(predict.main, *words, str(tmp_path / "a.png"))


def test_a_loaded_model_names_its_classes(pth: Callable, states: dict[str, torch.Tensor]) -> None:
    ade = config.ade20k("tiny")
    names, colours = [f"thing {number}" for number in range(150)], [[7, 8, number] for number in range(150)]
    official = {"state_dict": states, "meta": {"CLASSES": tuple(names), "PALETTE": colours}}
    model = topformer_jax.load(ade, pth(official))
    other = topformer_jax.load(ade, pth({"state_dict": states, "meta": {"CLASSES": None}}))
    assert (model.classes, model.palette) == (tuple(names), tuple(map(tuple, colours)))
    assert (other.classes, other.palette) == (CATALOG["ade20k"].classes, CATALOG["ade20k"].palette)
    assert model.checkpoint_config is other.checkpoint_config is None
    changes: dict[str, Any] = {"data.dataset": "custom", "data.class_names": tuple(names)}
    named = topformer_jax.load(ade, **changes)
    assert (named.classes, named.palette[0]) == (tuple(names), (128, 0, 0))
    assert topformer_jax.load(ade, **{"data.dataset": "custom"}).classes == ()
    mesh = sharding.make_inference_mesh(jax.devices()[:1])
    # A transform of flax gives a model back what it was traced with.
    segmenters = [each for each in (model, other) if isinstance(each, models.Segmenter)]
    assert len({id(compile_inference(each, mesh)) for each in segmenters}) == 1  # names change no program
    forward = nnx.jit(lambda model, images: model(images))
    for each, first in ((model, "thing 0"), (other, "wall"), (model, "thing 0")):
        forward(each, jnp.zeros((1, 64, 64, 3)))
        assert each.classes[0] == nnx.clone(each).classes[0] == first
    part = checkpoints.load_model(config.pascal_context("tiny", classes=60), pth(official), part="all_but_classes")
    assert part.classes == CATALOG["context60"].classes


@pytest.mark.parametrize(
    ("meta", "said"),
    [
        ({"CLASSES": ["a", "b"]}, "meta.CLASSES, 2 names for 10 classes"),
        ({"CLASSES": list(range(10))}, "meta.CLASSES, which is no list of names"),
        ({"CLASSES": NAMES, "PALETTE": COLOURS[1:]}, "meta.PALETTE, which is not 10 colours"),
        ({"CLASSES": NAMES, "PALETTE": [[0, 0, 0.5]] * 10}, "meta.PALETTE, which is not 10 colours"),
        ({"CLASSES": NAMES, "PALETTE": "random"}, "meta.PALETTE, which is not 10 colours"),
        ({}, ""),
    ],
)
def test_names_that_cannot_be_the_models(meta: dict[str, Any], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = origin.read_names({"meta": meta}, config.shapes(), "x.pth")
    assert found is not None
    is_own = meta.get("CLASSES") == NAMES
    assert found.classes == (tuple(NAMES) if is_own else CATALOG["shapes"].classes)
    assert found.palette[0] == ((128, 0, 0) if is_own else CATALOG["shapes"].palette[0])
    printed = capsys.readouterr().out
    assert printed.startswith(f"left out of x.pth: {said}" if said else "")
    assert bool(printed) == bool(said)


CAMVID = {"evaluation.scale": (480, 360)}
ADE = {"evaluation.scale": (2048, 512), "evaluation.size_divisor": 32}
MANY = {"evaluation.flip": True, "evaluation.img_ratios": (0.5, 1.0, 1.5)}
WINDOWS = {"evaluation.crop_size": (64, 96)}
SLIDE = {"evaluation.mode": "slide"} | WINDOWS


@pytest.mark.parametrize(
    ("stored", "changes", "given", "said"),
    [
        # A run on 480 x 360 images that was scored with a recipe of ADE20K: 58.65 for its 49.95.
        (
            CAMVID,
            ADE,
            (),
            "--config.evaluation.scale='(480,360)' --config.evaluation.size_divisor=1; this command uses "
            "(2048,512), 32",
        ),
        (CAMVID, CAMVID, (), ""),
        (CAMVID | {"batch_size": 3, "evaluation.max_canvases": 2}, CAMVID, (), ""),
        ({}, MANY, ("evaluation.flip", "evaluation.img_ratios"), ""),
        ({}, SLIDE, ("evaluation.mode",), ""),  # the checkpoint does not
        (
            SLIDE,
            {},
            (),
            "--config.evaluation.mode=slide --config.evaluation.crop_size='(64,96)'; this command uses whole, "
            "(512,512)",
        ),
    ],
)
def test_settings_that_a_score_depends_on(
    stored: dict, changes: dict, given: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = FrozenConfigDict(config.load("topformer_t_shapes", stored))
    weights = types.SimpleNamespace(classes=(), palette=(), checkpoint_config=settings)
    origin.print_differences(weights, config.load("topformer_t_shapes", changes), given=given)
    out = capsys.readouterr().out
    assert out == (f"the checkpoint was trained and scored with {said}\n" if said else "")


def test_a_config_of_an_earlier_version() -> None:
    """A setting that it lacks had its default; one that is gone since is nobody's."""
    stored = json.loads(config.camvid("tiny").to_json())
    del stored["evaluation"]["size_divisor"]
    stored["evaluation"]["gone"] = stored["gone"] = 1
    found = origin.complete_config({"config": stored})
    assert found is not None
    assert (found.evaluation.scale, found.evaluation.size_divisor) == ((480, 360), 1)
    for metadata in (
        {},
        {"config": "a text"},
        {"config": {"name": "x"}},
        {"config": {"evaluation": {"scale": 3}}},
    ):
        assert origin.complete_config(metadata) is None


def test_label_rules_that_shift_every_label_are_refused(
    own: pathlib.Path, root: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--checkpoint", own, "--workdir", tmp_path]
    shifted = OWN | {"data.root": root, "data.reduce_zero_label": "true"}
    said = "the checkpoint was trained with data.reduce_zero_label=false, and this command's is true"
    assert refused(evaluate.main, *flags(shifted), *words) == (
        f"error: {said}, which shifts every label by one: give --config.data.reduce_zero_label=false"
    )
    names = [f"thing {number}" for number in range(10)]  # of another data set, which counts from 1
    others = shifted | {"data.root": str(root), "data.class_names": names}
    settings = config.load("topformer_t_shapes", others)
    checkpoints.check_label_rules(checkpoints.load_model(settings, own), settings)
    line = f"{said}: this is right only if the two data sets number their labels differently\n"
    assert capsys.readouterr().out.endswith(line)


def test_an_exported_file_has_the_commands_settings(
    own: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where they differ from those that the checkpoint was scored with, export says so as evaluate does."""
    other = OWN | {"evaluation.scale": "(300,200)", "data.crop_size": "(64,96)"}
    shifted = other | {"data.reduce_zero_label": "true"}
    for changes, line in ((other, "far enough"), (shifted, "which shifts every label by one: give ")):
        settings = config.load("topformer_t_shapes", changes)
        choices = export.Choices(size=(64, 96))
        with (
            mock.patch.object(export.network, "make_function", side_effect=UserError("far enough")),
            pytest.raises(UserError, match=line),
        ):
            export.export_model(settings, str(own), tmp_path / "t.stablehlo", choices)
    assert capsys.readouterr().out.startswith(
        "the checkpoint was trained and scored with --config.evaluation.scale='(96,96)' "
        "--config.data.crop_size='(128,128)'; this command uses (300,200), (64,96)\n"
    )
    settings = config.load("topformer_t_shapes", other)
    facts = export.describe_model(settings, "", checkpoints.load_model(settings, own))
    assert facts["config"]["evaluation"]["scale"] == [300, 200]


def official_init_segmentor(path: pathlib.Path, classes: int) -> tuple[Any, Any]:
    """What mmsegmentation 0.19's `init_segmentor` and `show_result` read of a file, and what they ask of it."""
    checkpoint = torch.load(path, map_location="cpu", weights_only=False)
    network = reference.Segmenter("tiny", classes)
    network.load_state_dict(checkpoint["state_dict"], strict=True)
    names, palette = checkpoint["meta"]["CLASSES"], np.array(checkpoint["meta"]["PALETTE"])
    assert palette.shape == (len(names), 3)
    assert palette.dtype.kind == "i"
    assert len(names) == classes
    return names, palette.tolist()


@pytest.mark.parametrize("dataset", [*CATALOG, "custom"])
def test_the_official_code_reads_what_convert_writes(dataset: str, tmp_path: pathlib.Path) -> None:
    """As checkpoints were before they named their classes: the names are the data set's, of every one."""
    known = CATALOG.get(dataset)
    names = list(known.classes) if known else ["sky", "sea"]
    colours = known.palette if known else ((128, 0, 0), (0, 128, 0))
    changes = {"data.dataset": dataset, "model.num_classes": len(names), "data.root": str(tmp_path)}
    settings = config.load("topformer_t_ade", changes)
    (tmp_path / "classes.txt").write_text("sky\nsea\n")
    expected = names, [list(colour) for colour in colours]
    meta = convert._make_meta({}, settings, None)
    assert (meta["CLASSES"], meta["PALETTE"]) == expected
    if dataset in ("context59", "custom"):
        save(tmp_path / "run", settings, {"epoch": 0, "iter": 3})
        said = command(convert.main, "--checkpoint", tmp_path / "run", "--output", tmp_path / "t.pth")
        assert said == f"wrote {tmp_path / 't.pth'}: 376 tensors\n"
        assert official_init_segmentor(tmp_path / "t.pth", len(names)) == expected


def test_convert_keeps_what_the_checkpoint_says(own: pathlib.Path, tmp_path: pathlib.Path) -> None:
    command(convert.main, "--checkpoint", own, "--output", tmp_path / "t.pth")
    assert official_init_segmentor(tmp_path / "t.pth", 10) == (NAMES, COLOURS)
    command(convert.main, *flags(OWN), "--checkpoint", tmp_path / "t.pth", "--output", tmp_path / "again")
    assert checkpoints.read_model(tmp_path / "again")[1]["meta"]["CLASSES"] == NAMES

    other = OWN | {"evaluation.scale": "(300,200)", "data.reduce_zero_label": "true"}
    said = command(convert.main, *flags(other), "--checkpoint", own, "--output", tmp_path / "kept")
    assert (
        "the checkpoint was trained and scored with --config.evaluation.scale='(96,96)' "
        "--config.data.reduce_zero_label=false; the output keeps them, and not (300,200), true\n"
    ) in said
    stored = checkpoints.read_model(tmp_path / "kept")[1]["config"]
    assert (stored["evaluation"]["scale"], stored["data"]["reduce_zero_label"]) == ([96, 96], False)

    # Settings of a version that had others: nobody can check names against them.
    tensors, _ = checkpoints.read_model(own)
    strange = {"config": {"evaluation": {"scale": 3}}, "meta": {"CLASSES": NAMES, "PALETTE": COLOURS}}
    checkpoints.save_model(tmp_path / "strange", tensors, strange)
    command(convert.main, "--checkpoint", tmp_path / "strange", "--output", tmp_path / "s.pth")
    assert official_init_segmentor(tmp_path / "s.pth", 10) == (NAMES, COLOURS)

    unnamed = save(tmp_path / "unnamed", config.load("topformer_t_shapes", OWN), {"iter": 3})
    said = command(convert.main, "--checkpoint", unnamed, "--output", tmp_path / "u.pth")
    assert said.startswith(f"{tmp_path / 'u.pth'} names no classes, which the official code asks for: convert again")
    assert "CLASSES" not in torch.load(tmp_path / "u.pth", weights_only=True)["meta"]


def test_a_classifiers_names(tmp_path: pathlib.Path) -> None:
    """They have no colours. A folder that is renamed moves others, whose labels would be read as other classes."""
    classes = ["ant", "bee", "cat"]
    for name in classes:
        (tmp_path / "images/train" / name).mkdir(parents=True)
    small = {"model.num_classes": 3, "data.root": str(tmp_path / "images")}
    settings = config.load("topformer_t_imagenet", small)
    run = save(tmp_path / "run", settings, {"iter": 3, "CLASSES": classes, "PALETTE": []})
    command(convert.main, "--checkpoint", run, "--output", tmp_path / "c.pth")
    meta = torch.load(tmp_path / "c.pth", weights_only=True)["meta"]
    assert (meta["CLASSES"], "PALETTE" in meta) == (classes, False)
    model = topformer_jax.load(settings, tmp_path / "c.pth")
    assert (model.classes, model.palette) == (tuple(classes), ())
    assert export.describe_model(settings, "", model)["classes"] == classes

    sources.check_class_folders(settings, classes)
    (tmp_path / "images/train/bee").rename(tmp_path / "images/train/bees")  # in its place
    sources.check_class_folders(settings, classes)
    assert "label 1 is 'bees' there, 'bee' in the checkpoint" in sources.compare_classes(settings, classes)
    (tmp_path / "images/train/ant").rename(tmp_path / "images/train/zebra")
    with pytest.raises(UserError, match="give 'cat' the number 1, the checkpoint 2: labels would be read as"):
        sources.check_class_folders(settings, classes)
    (tmp_path / "images/classes.txt").write_text("bee\nant\ncat\n")  # names to show
    sources.check_class_folders(settings, classes)
