"""The recipes against the official table, settings that do not exist, and those that a resumed run finds changed."""

import ast
import json
import pathlib
import re
import subprocess
import sys
import textwrap
from typing import Any

import pytest
from ml_collections import ConfigDict, FrozenConfigDict

from topformer_jax import config, models
from topformer_jax.config import loading
from topformer_jax.config.loading import flatten, parse
from topformer_jax.config.settings import SETTINGS, as_markdown, as_typed
from topformer_jax.data.catalog import CATALOG
from topformer_jax.models.injection import INJECTIONS
from topformer_jax.runtime.errors import UserError
from topformer_jax.training.step import init_training

KEYS = (
    *("model.variant", "model.num_classes", "data.crop_size", "data.scale", "evaluation.scale"),
    *("evaluation.size_divisor", "data.reduce_zero_label", "batch_size", "schedule.steps", "schedule.lr"),
    *("model.head_channels", "model.depthwise_head"),
)
COMMON = {
    **{"optimizer.beta1": 0.9, "optimizer.beta2": 0.999, "optimizer.eps": 1e-8, "optimizer.weight_decay": 0.01},
    **{"optimizer.head_lr_mult": 10, "schedule.power": 1, "schedule.warmup_steps": 1500},
    **{"schedule.warmup_ratio": 1e-6, "model.drop_path_rate": 0.1, "model.dropout_ratio": 0.1},
    "data.cat_max_ratio": 0.75,
}  # fmt: skip
RECIPES: dict[str, tuple] = {
    "t_ade": ("tiny", 150, (512, 512), (2048, 512), (2048, 512), 32, True, 16, 160_000, 3e-4, None, True),
    "s_ade": ("small", 150, (512, 512), (2048, 512), (2048, 512), 32, True, 16, 160_000, 1.2e-4, None, False),
    "b_ade": ("base", 150, (512, 512), (2048, 512), (2048, 512), 32, True, 16, 160_000, 1.2e-4, None, False),
    "t_ade448": ("tiny", 150, (448, 448), (2048, 448), (2048, 448), 32, True, 16, 160_000, 3e-4, None, True),
    "t_cityscapes": ("tiny", 19, (512, 1024), (1024, 512), (1024, 512), 1, False, 8, 160_000, 3e-4, None, False),
    "b_cityscapes": ("base", 19, (512, 1024), (512, 512), (1024, 512), 1, False, 8, 80_000, 3e-4, 128, False),
}  # fmt: skip
for _short, _variant in (("t", "tiny"), ("s", "small"), ("b", "base")):
    _dw = _variant == "tiny"
    _context = ((480, 480), (520, 520), (520, 520), 1)
    RECIPES[f"{_short}_context60"] = (_variant, 60, *_context, False, 16, 80_000, 1.2e-4, None, _dw)
    RECIPES[f"{_short}_context59"] = (_variant, 59, *_context, True, 16, 80_000, 1.2e-4, None, _dw)
    _coco = ((512, 512), (2048, 512), (2048, 512), 1)
    RECIPES[f"{_short}_cocostuff10k"] = (_variant, 171, *_coco, True, 16, 80_000, 1.2e-4, None, _dw)
# Recipes without an official segmentation recipe.
OTHERS = ["s_cityscapes", "t_camvid_finetune", "t_shapes"]
OTHERS += [f"{v}_{name}" for v in "tsb" for name in ("imagenet", "imagenet_adamw", "camvid", "finetune")]


@pytest.mark.parametrize("name", RECIPES)
def test_recipe(configs: pathlib.Path, name: str) -> None:
    settings = config.load(configs / f"topformer_{name}.py")
    values = flatten(settings.to_dict())
    assert tuple(values[key] for key in KEYS) == RECIPES[name]
    assert settings.model.num_classes == len(CATALOG[settings.data.dataset].classes)
    assert COMMON.items() <= values.items()


def test_every_published_recipe_is_a_file_named_after_itself(configs: pathlib.Path) -> None:
    names = [f"topformer_{name}" for name in (*RECIPES, *OTHERS)]
    assert len(names) == 30
    for name in names:
        settings = config.load(configs / f"{name}.py")
        assert settings.name == name
    assert set(names) <= set(config.recipe_names())  # a user's own configs may be there too


def test_every_recipe_has_a_docstring_and_those_from_scratch_nothing_for_few_pictures(configs: pathlib.Path) -> None:
    for file in configs.glob("topformer_*.py"):
        for key in (
            *("data.aspect_range", "data.rotation", "data.blur_prob", "data.jpeg_prob"),
            *("data.balance", "data.mix", "evaluation.boundary_pixels"),
        ):
            assert "finetune" in file.stem or flatten(config.load(file).to_dict())[key] == SETTINGS[key].default
        docstring = ast.get_docstring(ast.parse(file.read_text())) or ""
        assert f"--config configs/{file.name}" in docstring
        assert "Published: " in docstring or "No published score" in docstring
        assert "Measured here: " in docstring


@pytest.mark.parametrize(("overrides", "message"), [
    ({"model.dtyp": "x"}, "no setting model.dtyp: did you mean model.dtype?"),
    ({"zzzzzzzzzz": "1"}, "--help-config of any command lists all of them"),
    ({"model": "1"}, "no setting model"),
    ({"name": "../x"}, "name is '../x': expected the name of a folder"),
    ({"batch_size": "none"}, "expected a value like 16 (int)"),
    ({"data.crop_size": "512"}, "expected a value like (512, 512) (tuple)"),
    ({"batch_size": "0x" + "f" * 5000}, "batch_size is a number of thousands of digits: expected"),
    ({"model.head_channels": "wide"}, "model.head_channels cannot be 'wide': expected a number or none"),
    ({"model.depthwise_head": 1}, "expected a value like False (bool)"),
    ({"batch_size": 4, "grad_accum_steps": 4, "data.crop_size": (64, 64)},
     "batch_size is 4, grad_accum_steps 4: BatchNorm needs more than one value a channel, and a micro-batch "
     "of one image is one pixel in the last layers; set batch_size to at least twice grad_accum_steps, or "
     "data.crop_size larger than 64"),
    ({"task": "classification", "data.aspect_range": (0.5, 2.0)},
     "data.aspect_range is (0.5, 2.0): it is for task=segmentation only"),
])  # fmt: skip
def test_wrong_settings(overrides: dict, message: str) -> None:
    with pytest.raises(UserError) as error:
        config.load(config.ade20k("base"), overrides)
    assert message in str(error.value)


def test_right_settings_from_text_and_from_values() -> None:
    text = {"batch_size": "32", "schedule.lr": "1", "data.crop_size": "(64, 96)", "data.root": "/some/where"}
    text |= {"model.depthwise_head": "true", "model.head_channels": "64"}
    settings = config.load(config.ade20k("base"), text)
    assert (settings.batch_size, settings.schedule.lr, settings.data.crop_size) == (32, 1.0, (64, 96))
    assert isinstance(settings.schedule.lr, float)
    assert (settings.model.depthwise_head, settings.model.head_channels) == (True, 64)
    assert settings.data.root == "/some/where"
    other = config.load(settings, {"model.head_channels": None, "data.crop_size": [32, 32]})
    assert (other.model.head_channels, other.data.crop_size) == (None, (32, 32))
    assert config.ade20k("base").batch_size == 16  # the source is left alone


def test_epochs_or_steps() -> None:
    """A config holds both, and epochs count; a flag for one replaces the other; flags for both are an error."""
    of_epochs = config.load("topformer_t_camvid", {"schedule.epochs": 5})
    for source, flags, steps in (
        (of_epochs, {}, 459),
        (of_epochs, {"schedule.steps": 40}, 40),
        (of_epochs, {"schedule.steps": 40, "schedule.epochs": 0}, 40),
        (of_epochs, {"schedule.epochs": 0}, 10_000),
        (config.camvid("tiny"), {}, 10_000),
    ):
        resolved = config.resolve_schedule(config.load(source, flags), 367)
        found = resolved.schedule.steps, resolved.schedule.epochs, resolved.evaluate_every
        assert found == (steps, 0, 2000)
    both = {"schedule.steps": "40", "schedule.epochs": "1"}
    with pytest.raises(UserError, match=r"schedule\.steps=40 and schedule\.epochs=1 both set the length"):
        config.load(of_epochs, both)
    assert config.complete(of_epochs.to_dict()).schedule.epochs == 5  # a stored config holds both
    many = r"schedule\.epochs is 5, which is 12,500,000,000 steps for 10,000,000,000 training examples: expected 1 to"
    with pytest.raises(UserError, match=many):
        config.resolve_schedule(config.load(of_epochs, {"evaluate_every": 0}), 10**10)
    with pytest.raises(UserError, match=r"schedule\.epochs is 5: give the config that config\.resolve"):
        init_training(of_epochs)


def test_wrong_files(configs: pathlib.Path, tmp_path: pathlib.Path) -> None:
    with pytest.raises(UserError, match=r"no config file or recipe .*did you mean .*topformer_b_ade\.py"):
        config.load(configs / "topformer_b_ad.py")
    with pytest.raises(UserError, match="give the path of a config file, or the name of a recipe"):
        config.load(tmp_path / "nothing.py")
    (tmp_path / "empty.py").write_text("x = 1\n")
    with pytest.raises(UserError, match="must define get_config"):
        config.load(tmp_path / "empty.py")
    (tmp_path / "broken.py").write_text("def get_config(:\n")
    with pytest.raises(UserError, match=r"broken\.py, line 1: SyntaxError"):
        config.load(tmp_path / "broken.py")
    with pytest.raises(UserError, match="start from a recipe"):
        config.load(ConfigDict({"seed": 1}))
    (tmp_path / "other.py").write_text("def get_config():\n    return {}\n")
    with pytest.raises(UserError, match="must define get_config"):
        config.load(tmp_path / "other.py")


def test_recipes_by_name(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # the name finds the recipe from any folder
    settings = config.load("topformer_b_ade", {"batch_size": 32})
    assert (settings.name, settings.batch_size) == ("topformer_b_ade", 32)
    for name in ("topformer_b_ad", "topformer_b_ade.py", "elsewhere/topformer_b_ade.py"):
        with pytest.raises(UserError, match="did you mean the recipe topformer_b_ade"):
            config.load(name)


def test_a_config_is_locked_and_a_frozen_one_loads_with_changes() -> None:
    settings = config.load("topformer_t_ade")
    assert isinstance(settings, ConfigDict)
    with pytest.raises(AttributeError):
        settings.nothing = 1
    frozen = FrozenConfigDict(settings)
    assert FrozenConfigDict(config.load(frozen)) == frozen
    assert config.load(frozen, {"model.head_channels": 64}).model.head_channels == 64


def test_an_unknown_setting_of_a_file_is_named_with_its_line(tmp_path: pathlib.Path) -> None:
    start = "from topformer_jax import config\n\ndef get_config():\n    c = config.ade20k('tiny')"
    file = tmp_path / "mine.py"
    for unlock, line, words in (
        (".unlock()", "c.data.workers = 2", "no setting data.workers: did you mean data.num_workers"),
        (
            "",
            "c.data.workers = 2",
            r"mine\.py, line 5: there is no setting workers: did you mean data.num_workers",
        ),
        ("", "print(c.log_evry)", r"mine\.py, line 5: there is no setting log_evry: did you mean log_every"),
    ):
        file.write_text(f"{start}{unlock}\n    {line}\n    return c\n")
        with pytest.raises(UserError, match=words):
            config.load(file)


def test_the_table_knows_what_the_code_knows() -> None:
    for key, known in (
        ("model.variant", models.VARIANTS),
        ("model.injection", INJECTIONS),
        ("model.dtype", models.DTYPES),
        ("model.conv_impl", ("auto", "single_op")),
        ("data.dataset", [*CATALOG, "imagenet", "custom"]),
    ):
        legal = SETTINGS[key].legal
        assert isinstance(legal, tuple)
        assert set(legal) == set(known)


def test_defaults_are_legal() -> None:
    defaults = config.load(config.base_config())
    for key, setting in SETTINGS.items():
        assert parse(key, setting.default) == setting.default
        text = as_typed(setting.default)
        assert parse(key, text) == setting.default or isinstance(setting.default, str)
    assert defaults.model.head_channels is None


def test_settings_page_is_up_to_date(configs: pathlib.Path) -> None:
    page = (configs.parent / "docs/settings.md").read_text()
    assert page == as_markdown() + "\n", "run: python -m topformer_jax.config > docs/settings.md"


def test_guides_own_config_stays_green(configs: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """What the guide to one's own data has one write into configs/ loads, and passes lint and format checks."""
    root = configs.parent
    pages = [root / "README.md", *sorted((root / "docs").glob("*.md"))]
    blocks = [b for page in pages for b in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)]
    own = [textwrap.dedent(block).rstrip() + "\n" for block in blocks if "def get_config" in block]
    assert own
    for text in own:
        file = tmp_path / "streets.py"
        file.write_text(text)
        assert config.load(file).name == "streets"
        for check in (["check", "--no-cache"], ["format", "--check", "--no-cache"]):
            command = ["ruff", *check, "--config", str(root / "pyproject.toml"), "--stdin-filename"]
            done = subprocess.run(
                [sys.executable, "-m", *command, "configs/streets.py", "-"],
                cwd=root, input=text, capture_output=True, text=True, check=False,
            )  # fmt: skip
            assert done.returncode == 0, done.stdout + done.stderr


# A resumed run


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
    """So does a setting that an earlier version did not have, and that has its default."""
    assert compare({}, {"log_every": 7, "max_to_keep": 9, "data.num_workers": 2, "mesh.slices": 2}) == []
    now = config.load("topformer_t_shapes")
    stored = json.loads(now.to_json())
    del stored["loss"], stored["seed"]
    assert config.compare_configs(stored, now, "") == []
