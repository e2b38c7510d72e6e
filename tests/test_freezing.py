"""What a training keeps: BatchNorm's statistics as PyTorch's layers in inference mode do, and whole parts."""

import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.commands import TINY, refused_here, run_here
from tests.parity import model_from, to_nchw
from tests.reference import network as reference
from tests.test_step import _mesh, _random_batch, _settings
from topformer_jax import checkpoints, config, models
from topformer_jax.checkpoints.torch_format import to_torch
from topformer_jax.data.augment import normalize
from topformer_jax.training.step import STATISTICS, init_training

PREFIXES = {
    "token_pyramid": ("backbone.tpm.",),
    "backbone": ("backbone.tpm.", "backbone.trans."),
    "all_but_classes": ("backbone.", "decode_head.linear_fuse."),
}


@pytest.mark.parametrize("changes", [{"model__bn_frozen": True}, {"model__bn_momentum": 0.3}], ids=str)
def test_a_step_against_pytorch(x64: None, changes: dict[str, Any]) -> None:
    """Loss, gradients and statistics of one step: with BatchNorms in inference mode, and with another momentum."""
    network = reference.Segmenter("tiny", 26, "muli_sum", True, drop_path=0.0, dropout=0.0, depths=1)
    reference.randomize(network, seed=1)
    settings = _settings("float64", model__depths=1, model__num_classes=26, **changes)
    batch = _random_batch(4, 128)
    state, train_step = init_training(settings, _mesh(1), model_from(network, settings))
    state, metrics = train_step(state, batch)

    network.double().train()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = changes.get("model__bn_momentum", 0.1)
            module.train("model__bn_frozen" not in changes)
    images = np.asarray(normalize(batch["image"], jnp.float64))
    logits = F.interpolate(network(to_nchw(images)), (128, 128), mode="bilinear", align_corners=False)
    labels = torch.from_numpy(np.asarray(batch["label"], np.int64))
    loss = F.cross_entropy(logits, labels, ignore_index=255, reduction="sum") / labels.numel()
    loss.backward()
    assert float(metrics["loss"]) == pytest.approx(loss.item(), rel=1e-9)
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None
        mine = to_torch(np.asarray(state.optimizer[1].mu[name])) / (1 - 0.9)
        limit = 1e-8 * parameter.grad.abs().max().item() + 1e-11
        assert np.abs(mine - parameter.grad.numpy()).max() <= limit, name
    buffers = dict(network.named_buffers())
    assert set(state.stats) == set(buffers)
    for name, value in buffers.items():
        np.testing.assert_allclose(np.asarray(state.stats[name]), value.numpy(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("part", "fsdp"), [("token_pyramid", 1), ("backbone", 4), ("all_but_classes", 1)])
def test_frozen_parts_keep_every_bit(part: str, fsdp: int) -> None:
    """Parameters, statistics and their averages; the rest is trained, and alone has optimizer state."""
    settings = _settings(
        batch_size=8,
        optimizer__freeze=part,
        model__depths=1,
        model__drop_path_rate=0.2,
        schedule__lr=0.1,
        schedule__warmup_steps=0,
        ema_decay=0.6,  # rounding moves an average of equal numbers
        grad_accum_steps=1 if fsdp > 1 else 2,
    )
    mesh = _mesh(8 if fsdp > 1 else 1, fsdp)
    state, train_step = init_training(settings, mesh)
    before = {name: np.array(value) for name, value in (state.params | state.stats).items()}
    for step in range(2):
        state, _ = train_step(state, _random_batch(8, 64, step))
    after = state.params | state.stats
    frozen = {name for name in before if name.startswith(PREFIXES[part])}
    for name, value in before.items():
        same = [np.array_equal(value, np.asarray(tensors[name])) for tensors in (after, state.average)]
        # The gradient of some biases is 0, and so is their decay.
        assert same == [name in frozen] * 2 or (name.endswith(".bias") and name not in frozen), name
    trained = {name for name in before if not name.endswith(STATISTICS)} - frozen
    assert set(state.params) == set(state.optimizer[1].mu) == trained
    assert len(jax.tree.leaves(state.optimizer)) == 2 * len(trained) + 2  # moments, and two counters


def test_a_run_with_a_frozen_backbone(tmp_path: pathlib.Path) -> None:
    """It resumes; what would stay random, and another part than the checkpoint's, is refused."""
    settings = config.load(config.shapes(), TINY)
    tensors = {name: np.asarray(value) for name, value in models.state_dict(models.build(settings)).items()}
    metadata = {"config": json.loads(settings.to_json()), "meta": {}}
    checkpoints.write_checkpoint(tmp_path / "start", tensors, metadata)
    changes = {"init_from": tmp_path / "start", "optimizer.freeze": "backbone"}
    out = run_here(tmp_path / "run", changes | {"schedule.steps": 2})
    parameters = {name: value.size for name, value in tensors.items() if not name.endswith(STATISTICS)}
    total = sum(parameters.values())
    frozen = sum(size for name, size in parameters.items() if name.startswith(PREFIXES["backbone"]))
    assert f"{frozen:,} of {total:,} parameters, statistics of 33 BatchNorms\n" in out
    assert f"10 classes, {total:,} parameters" in out
    resumed = run_here(tmp_path / "run", changes | {"schedule.steps": 3, "init_from": ""})
    assert "from checkpoint 2" in resumed  # which has weights for what is frozen
    later, _ = checkpoints.read_model(tmp_path / "run")
    for name, value in tensors.items():
        assert np.array_equal(later[name], value) == name.startswith(PREFIXES["backbone"]), name

    line = refused_here(tmp_path / "run", changes | {"optimizer.freeze": "token_pyramid"})
    assert "holds a run with optimizer.freeze=backbone, and the config has token_pyramid" in line
    line = refused_here(tmp_path / "other", changes | {"init_from": ""})
    count = sum(name.startswith(PREFIXES["backbone"]) for name in tensors)
    assert f"optimizer.freeze=backbone, model.bn_frozen=false: {count} tensors would stay untrained" in line
    line = refused_here(tmp_path / "other", changes | {"init_part": "backbone", "model.bn_frozen": True})
    assert "model.bn_frozen=true: 30 tensors would stay untrained, backbone.SIM.1.global_act.bn." in line
