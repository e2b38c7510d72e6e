"""Checkpoints whose BatchNorms are folded: they are found, get statistics, and compute the same."""

import pathlib
from typing import Any

import numpy as np
import pytest

from tests.commands import TINY, finish, run_here, start_pair
from tests.parity import distance, run
from tests.test_folding import randomized
from topformer_jax import checkpoints, config, models, train
from topformer_jax.runtime import sharding
from topformer_jax.training.folded import find_folded, restore_statistics
from topformer_jax.training.run import Run
from topformer_jax.training.step import TrainState

SETTINGS = config.load(config.shapes(), TINY)


def fold(tensors: dict[str, np.ndarray], variance: float) -> dict[str, np.ndarray]:
    """The same network with BatchNorms that only add, as a file made from an exported network has them."""
    folded = dict(tensors)
    for name in [name.removesuffix(".running_var") for name in tensors if name.endswith(".running_var")]:
        kernel = next(key for key in (f"{name[:-3]}.c.weight", f"{name[:-3]}.conv.weight") if key in tensors)
        scale = tensors[f"{name}.weight"] / np.sqrt(tensors[f"{name}.running_var"] + 1e-5)
        folded[kernel] = tensors[kernel] * scale
        folded[f"{name}.bias"] = tensors[f"{name}.bias"] - tensors[f"{name}.running_mean"] * scale
        ones = np.ones_like(scale)
        folded |= {f"{name}.weight": ones, f"{name}.running_mean": 0 * ones}
        folded[f"{name}.running_var"] = np.float32(variance) * ones
    return folded


@pytest.mark.parametrize("variance", [1.0, 1 - 1e-5])
def test_folded_layers_are_found(variance: float) -> None:
    fresh = models.build(SETTINGS)
    assert find_folded(models.state_dict(fresh)) == []
    trained = {name: np.asarray(value) for name, value in models.state_dict(randomized(fresh)).items()}
    assert find_folded(trained) == []
    folded = fold(trained, variance)
    assert len(find_folded(folded)) == 43
    other = folded["decode_head.linear_fuse.bn.running_mean"].copy()
    other[0] = 1e-3
    assert len(find_folded(folded | {"decode_head.linear_fuse.bn.running_mean": other})) == 42


@pytest.fixture(scope="module")
def changes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Settings of a training of one step from a folded checkpoint, on one batch."""
    tensors = models.state_dict(randomized(models.build(SETTINGS)))
    folded = fold({name: np.asarray(value) for name, value in tensors.items()}, 1.0)
    path = tmp_path_factory.mktemp("weights") / "folded"
    checkpoints.write_checkpoint(path, folded, {"config": SETTINGS.to_dict(), "meta": {}})
    return {"init_from": path, "data.shapes.train": 8, "batch_size": 8, "schedule.steps": 1, "ema_decay": 0.5}


def test_a_training_starts_from_the_same_network(
    changes: dict[str, Any], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In inference mode the outputs are equal; the first batch then finds its own statistics there."""
    states: list[dict[str, Any]] = []

    def record(run: Run, state: TrainState) -> TrainState:
        new = restore_statistics(run, state)
        for each in (state, new):
            states.append(sharding.to_host(each.params | each.stats))
        for name, value in sharding.to_host(new.average).items():
            np.testing.assert_array_equal(value, states[1][name])
        return new

    monkeypatch.setattr(train, "restore_statistics", record)
    line = "43 BatchNorms are folded into the weights; their statistics are estimated from 8 training crops"
    assert line in run_here(tmp_path / "run", changes)
    before, after = states
    assert find_folded(after) == []
    images = np.random.default_rng(1).normal(size=(2, 70, 99, 3)).astype(np.float32)
    model = models.build(SETTINGS)
    model.eval()
    outputs = []
    for tensors in (before, after):
        checkpoints.load_state_dict(model, tensors)
        outputs.append(run(model, images))
    error = distance(outputs[1], outputs[0])
    print(f"outputs before and after: {error:.1e}")
    assert error <= 1e-5

    # The step moves the running statistics by 0.1 of their distance from the batch's, which are the same ones.
    later, _ = checkpoints.read_model(tmp_path / "run")
    for name in find_folded(before):
        deviation = np.sqrt(after[f"{name}.running_var"]) + 1e-3
        moved = later[f"{name}.running_mean"] - after[f"{name}.running_mean"]
        assert np.abs(moved / deviation).max() <= 1e-4, name
        ratio = (later[f"{name}.running_var"] + 1e-6) / (after[f"{name}.running_var"] + 1e-6)
        assert (ratio >= 0.9999).all(), name
        assert (ratio <= 1 + 0.1 / 7).all(), name  # unbiased, of 8 values or more
    assert "43 BatchNorms" not in run_here(tmp_path / "run", changes)
    assert len(states) == 2  # only at step 0


def test_frozen_layers_stay_folded(changes: dict[str, Any], tmp_path: pathlib.Path) -> None:
    out = run_here(tmp_path / "run", changes | {"optimizer.freeze": "backbone"})
    assert "10 BatchNorms are folded" in out
    before, after = (checkpoints.read_model(path)[0] for path in (changes["init_from"], tmp_path / "run"))
    for name, value in before.items():
        is_frozen = name.startswith(("backbone.tpm.", "backbone.trans."))
        assert np.array_equal(after[name], value) or not is_frozen, name


@pytest.mark.slow
def test_two_processes_find_the_same_statistics(changes: dict[str, Any], tmp_path: pathlib.Path) -> None:
    run_here(tmp_path / "one", changes)
    outputs = finish(pair := start_pair(tmp_path / "two", changes))
    assert [process.returncode for process in pair] == [0, 0], outputs
    assert ["43 BatchNorms are folded" in out for out, _ in outputs] == [True, False]
    one, two = (checkpoints.read_model(tmp_path / name)[0] for name in ("one", "two"))
    for name in one:
        if name.endswith((".running_mean", ".running_var")):
            assert distance(two[name], one[name]) <= 1e-4, name  # the order of float32 sums
