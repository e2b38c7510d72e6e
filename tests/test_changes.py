"""What a resumed run makes of settings that changed since its checkpoint."""

import json
from typing import Any

import pytest

from topformer_jax import config
from topformer_jax.config import loading
from topformer_jax.config.settings import SETTINGS
from topformer_jax.runtime.errors import UserError


def compare(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """The lines for a checkpoint of one config that a run with another one resumes."""
    first, second = (config.load("topformer_t_shapes", values) for values in (before, now))
    return config.compare_configs(json.loads(first.to_json()), second, "runs/t/checkpoints/2000")


def test_the_groups_name_settings_once() -> None:
    groups = (loading.REFUSED, loading.SILENT, loading.WITHOUT_EFFECT)
    names = [name for group in groups for name in group]
    assert len(names) == len({*names})
    assert {*names} <= SETTINGS.keys()


@pytest.mark.parametrize(
    ("now", "shown"),
    [
        ({"optimizer.name": "rmsprop_tf"}, "adamw, and the config has rmsprop_tf"),
        ({"model.variant": "base"}, "tiny, and the config has base"),
        ({"model.head_channels": 64}, "none, and the config has 64"),
        ({"data.reduce_zero_label": True}, "false, and the config has true"),
        ({"ema_decay": 0.99}, "0.0, and the config has 0.99"),
    ],
)
def test_what_a_run_cannot_change_is_refused(now: dict[str, Any], shown: str) -> None:
    (key,) = now
    with pytest.raises(UserError) as error:
        compare({}, now)
    before = shown.split(",")[0]
    assert error.value.line == (
        f"runs/t/checkpoints/2000 holds a run with {key}={shown}: set --config.{key}={before} to resume it, or start "
        "a new run with another --workdir"
    )


def test_what_applies_is_said() -> None:
    now = {"batch_size": 32, "seed": 1, "data.crop_size": (96, 96), "loss.class_weight": [1.0] * 9 + [2.5]}
    weights = "(1.0,1.0,1.0,1.0,1.0,1.0,1.0,1.0,1.0,2.5)"
    assert sorted(compare({}, now)) == [
        "batch_size: 16 -> 32",
        "data.crop_size: (128,128) -> (96,96)",
        f"loss.class_weight: () -> {weights}",
        "seed: 0 -> 1",
    ]
    assert compare({"ema_decay": 0.9}, {}) == ["ema_decay: 0.9 -> 0.0"]
    assert compare({}, {"init_from": "a.pth"}) == [
        "init_from:  -> a.pth (without effect: the run goes on from its checkpoint)"
    ]


def test_what_changes_nothing_passes_without_a_word() -> None:
    assert compare({}, {"log_every": 7, "max_to_keep": 9, "data.num_workers": 2, "mesh.slices": 2}) == []


def test_a_checkpoint_of_an_earlier_version_had_the_defaults() -> None:
    now = config.load("topformer_t_shapes")
    stored = json.loads(now.to_json())
    del stored["loss"], stored["seed"]
    assert config.compare_configs(stored, now, "") == []
