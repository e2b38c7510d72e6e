"""Checkpoints of both formats load without loss, strictly into the model that they fit; errors name all culprits."""

import contextlib
import json
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
import pytest
import torch

from tests.parity import INJECTIONS, same_states, settings_for
from tests.reference import network as reference
from topformer_jax import checkpoints, config, load, models
from topformer_jax.checkpoints import torch_format
from topformer_jax.runtime.errors import UserError

BIAS = "decode_head.conv_seg.bias"


@pytest.mark.parametrize("injection", INJECTIONS)
def test_round_trip_of_each_injection(tmp_path: pathlib.Path, pth: Callable, injection: str) -> None:
    network = reference.Segmenter("tiny", 7, reference.OFFICIAL_NAMES.get(injection, injection))
    reference.randomize(network, seed=0)
    source = pth({"meta": {"iter": 3}, "state_dict": network.state_dict()})
    settings = settings_for("tiny", model__injection=injection, model__num_classes=7)
    tensors, metadata = checkpoints.read_checkpoint(source, models.build(settings))
    checkpoints.save_model(tmp_path / "orbax", tensors, {"config": settings.to_dict()} | metadata)
    again, metadata = checkpoints.read_model(tmp_path / "orbax")
    torch_format.write(tmp_path / "back.pth", again, metadata)
    written = torch.load(tmp_path / "back.pth", weights_only=True)
    assert same_states(written["state_dict"], network.state_dict())
    assert written["meta"] == {"iter": 3}


@pytest.fixture
def read(pth: Callable) -> Callable[..., tuple[dict[str, np.ndarray], dict[str, Any]]]:
    """Writes a file and reads it into Tiny, or into another config's model."""

    def read(content: Any, settings: Any = None, name: str = "model.pth") -> Any:
        return checkpoints.read_checkpoint(pth(content, name), models.build(settings or config.ade20k("tiny")))

    return read


def test_half_precision_files_are_widened(read: Callable, states: dict[str, torch.Tensor]) -> None:
    half = {name: t.bfloat16() if t.is_floating_point() else t for name, t in states.items()}
    tensors, _ = read({"state_dict": half})
    name = "decode_head.conv_seg.weight"
    np.testing.assert_array_equal(torch_format.to_torch(tensors[name]), half[name].float().numpy())


def test_every_misfit_is_named_with_both_shapes(read: Callable, states: dict[str, torch.Tensor]) -> None:
    broken = {name: tensor for name, tensor in states.items() if name != BIAS}
    broken |= {"backbone.extra": torch.zeros(3, 2), "backbone.tpm.stem.0.c.weight": torch.zeros(16, 3, 5, 5)}
    with pytest.raises(UserError, match=r"^/.*pth does not .*: 1 tensors missing, 1 unexpected, 1 of the ") as error:
        read({"state_dict": broken})
    assert error.value.details == [
        "  missing      decode_head.conv_seg.bias  config 150",
        "  unexpected   backbone.extra  file 3x2",
        "  wrong shape  backbone.tpm.stem.0.c.weight  file 16x3x5x5, config 16x3x3x3",
    ]


def test_an_injection_of_the_same_shapes(tmp_path: pathlib.Path) -> None:
    settings = settings_for("tiny", model__injection="fuse_sum")
    tensors = {name: np.asarray(value) for name, value in models.state_dict(models.build(settings)).items()}
    checkpoints.save_model(tmp_path / "7", tensors, {"config": settings.to_dict()})
    load(settings, tmp_path / "7")
    load(settings, tmp_path / "7" / "0")
    with pytest.raises(UserError, match="has injection fuse_sum, the config fuse_multi"):
        load(settings, tmp_path / "7", **{"model.injection": "fuse_multi"})


@pytest.mark.parametrize(
    ("settings", "advice"),
    [
        (config.ade20k("base"), "it is of variant tiny, the config of base"),
        (
            config.pascal_context("tiny", classes=60),
            "it does not have the config's 60 classes: .* --new-head",
        ),
        (config.imagenet("tiny"), "it is a segmenter's"),
        (
            config.load(config.ade20k("tiny"), {"model.depths": 2}),
            "it has 4 transformer blocks, the config 2: --config.model.depths=4",
        ),
    ],
)
def test_advice_on_a_wrong_checkpoint(read: Callable, states: dict, settings: Any, advice: str) -> None:
    with pytest.raises(UserError, match=advice):
        read({"state_dict": states}, settings)


def test_nothing_is_overwritten(tmp_path: pathlib.Path, states: dict[str, torch.Tensor]) -> None:
    tensors = {name: torch_format.from_torch(tensor.numpy()) for name, tensor in states.items()}
    checkpoints.save_model(tmp_path / "orbax", tensors, {})
    with pytest.raises(UserError, match="already holds a checkpoint of step 0"):
        checkpoints.save_model(tmp_path / "orbax", tensors, {})
    torch_format.write(tmp_path / "a.pth", tensors, {})
    with pytest.raises(UserError, match="is there already"):
        torch_format.write(tmp_path / "a.pth", tensors, {})
    assert {path.name for path in tmp_path.iterdir()} == {"orbax", "a.pth"}


def test_a_folder_that_cannot_be_written(tmp_path: pathlib.Path, states: dict[str, torch.Tensor]) -> None:
    (tmp_path / "file").write_text("in the way")
    tensors = {"decode_head.conv_seg.bias": states["decode_head.conv_seg.bias"].numpy()}
    for place in (tmp_path / "file" / "orbax", tmp_path / "file", pathlib.Path("/proc/orbax")):
        with pytest.raises(UserError, match="cannot write"):
            checkpoints.save_model(place, tensors, {})
    with pytest.raises(UserError, match="cannot write"):
        torch_format.write(tmp_path / "file" / "a.pth", tensors, {})


NAMES = ("backbone.tpm.stem.0.c.weight", BIAS)


@pytest.mark.parametrize(("form", "value"), [("file", np.nan), ("folder", -np.inf)])
def test_numbers_that_are_not_finite_are_refused_by_name(
    pth: Callable, states: dict[str, torch.Tensor], tmp_path: pathlib.Path, form: str, value: float
) -> None:
    broken = dict(states)
    for name in NAMES:
        broken[name] = states[name].clone()
        broken[name].view(-1)[3] = value
    path = tmp_path / "model.pth"
    if form == "file":
        pth({"state_dict": broken})
    else:
        path = tmp_path / "folder"
        tensors = {name: torch_format.from_torch(tensor.numpy()) for name, tensor in broken.items()}
        checkpoints.save_model(path, tensors, {})
    with pytest.raises(UserError) as error:
        load(config.ade20k("tiny"), path)
    assert error.value.line.startswith(f"{path} holds NaN or infinity in 2 of {len(states)} tensors (")
    assert "use an earlier checkpoint" in error.value.line
    for name in NAMES:
        assert name in error.value.line


def test_numbers_that_are_not_taken_may_be_anything(pth: Callable, states: dict[str, torch.Tensor]) -> None:
    """A new last layer replaces the broken one."""
    name = "decode_head.conv_seg.bias"
    path = pth({"state_dict": states | {name: torch.full_like(states[name], float("nan"))}})
    model = checkpoints.load_segmenter(config.ade20k("tiny"), path, part="all_but_classes")
    assert np.isfinite(models.state_dict(model)[name]).all()


def test_only_segmenters_where_one_is_needed() -> None:
    with pytest.raises(UserError, match="task=classification"):
        checkpoints.load_segmenter(config.imagenet("tiny"), "no/where.pth")


@pytest.mark.parametrize("suffix", [".PT", ""])
def test_the_suffix_decides_what_is_written(
    tmp_path: pathlib.Path, states: dict[str, torch.Tensor], suffix: str
) -> None:
    tensors = {name: torch_format.from_torch(tensor.numpy()) for name, tensor in states.items()}
    path = tmp_path / f"weights{suffix}"
    checkpoints.write_checkpoint(path, tensors, {"meta": {"iter": 3}})
    assert path.is_dir() == (suffix == "")
    model = models.build(config.ade20k("tiny"))
    again, metadata = checkpoints.read_checkpoint(path, model)
    assert metadata == {"meta": {"iter": 3}}
    assert all(np.array_equal(again[name], tensors[name]) for name in tensors)


def _steps(folder: pathlib.Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir())


def test_a_step_is_written_once_and_scored_beside_it(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The newest step and the best one stay; an older one goes when its successor is complete."""
    store = checkpoints.CheckpointStore(tmp_path, 1)
    kept = []
    for step, score in enumerate((0.2, 0.6, 0.1, 0.4, 0.5), 1):
        store.save(step, {"model": {"x": jax.numpy.full(3, step)}}, {"config": {"seed": step}})
        store.wait()
        written = (tmp_path / str(step)).stat().st_mtime_ns
        store.save(step, {"model": {"x": jax.numpy.zeros(3)}}, {"config": {}})
        store.add_score(step, score)
        store.wait()
        assert (tmp_path / str(step)).stat().st_mtime_ns == written
        kept.append(_steps(tmp_path))
    assert kept == [["1"], ["1", "2"], ["2", "3"], ["2", "4"], ["2", "5"]]
    assert store.best == (2, 0.6)
    store.close()

    store = checkpoints.CheckpointStore(tmp_path, 1, {2: 0.6, 5: 0.5, 9: 1.0})  # step 9 was never written
    assert (store.best, store.latest, store.is_evaluated(5), store.is_evaluated(9)) == ((2, 0.6), 5, True, False)
    assert store.read_metadata(5) == {"config": {"seed": 5}, "meta": {}}
    store.close()
    assert not capsys.readouterr().out

    with contextlib.closing(checkpoints.CheckpointStore(tmp_path, 1)) as store:  # the log is gone
        store.save(6, {"model": {"x": jax.numpy.zeros(3)}}, {"config": {}})
    assert capsys.readouterr().out == f"the log has no scores of steps [2] in {tmp_path}: they stay\n"
    assert _steps(tmp_path) == ["2", "6"]


def _trees() -> dict[str, Any]:
    """As a run has them: divided over devices, in several dtypes, in tuples with names."""
    divided = jax.sharding.NamedSharding(jax.make_mesh((8,), ("fsdp",)), jax.sharding.PartitionSpec("fsdp"))
    tensors = {"a": jax.device_put(np.arange(16.0, dtype=np.float32), divided), "b": jax.numpy.zeros(())}
    return {
        "model": tensors,
        "optimizer": optax.adam(1.0).init(tensors),
        "average": {name: tensor.astype(jax.numpy.bfloat16) for name, tensor in tensors.items()},
    }


@pytest.mark.parametrize("name", ["model/b", "optimizer/0/mu/a", "average/a"])
def test_changed_bits_of_a_run(tmp_path: pathlib.Path, name: str) -> None:
    """Whoever reads the array is told; a part without it can be read."""
    store, trees = checkpoints.CheckpointStore(tmp_path, 1), _trees()
    store.save(7, trees, {"config": {}})
    store.wait()
    assert all(map(np.array_equal, jax.tree.leaves(store.restore(7, trees)), jax.tree.leaves(trees)))
    path = tmp_path / "7" / "_CHECKPOINT_METADATA"
    content = json.loads(path.read_text())
    assert len(content["custom_metadata"]["crc32"]) == len(jax.tree.leaves(trees))
    content["custom_metadata"]["crc32"][name] ^= 1
    path.write_text(json.dumps(content))
    part = name.partition("/")[0]
    with contextlib.closing(checkpoints.CheckpointStore(tmp_path, 1)) as again:
        with pytest.raises(UserError, match=f"^cannot read {tmp_path}/7: it is damaged: 1 of .* {name} for one"):
            again.restore(7, trees)
        again.restore(7, {key: tree for key, tree in trees.items() if key != part})
    if part == "average":
        with pytest.raises(UserError, match=f"^{tmp_path}/7 is damaged: 1 of 2 arrays"):
            checkpoints.read_model(tmp_path)
    else:
        assert checkpoints.read_model(tmp_path)[0]["a"].dtype == jax.numpy.bfloat16
    store.close()
