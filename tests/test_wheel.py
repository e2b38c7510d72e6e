"""The wheel: what it holds, and that it trains from another folder by a recipe's name."""

import os
import pathlib
import shutil
import subprocess
import sys
import zipfile

import pytest

from tests.commands import ROOT, TINY
from topformer_jax.version import __version__


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The wheel, built from a copy so that no build/ is left in the clone."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "setup.py", "requirements.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("topformer_jax", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    build = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"
    command = [sys.executable, "-c", build, str(folder / "dist")]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / f"dist/topformer_jax-{__version__}-py3-none-any.whl"


def test_the_wheel_holds_the_package_and_the_recipes(wheel: pathlib.Path) -> None:
    files = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "topformer_jax").rglob("*")
        if path.suffix in (".py", ".typed", ".j2") or path.parent.name == "page"
    }
    assert {"topformer_jax/py.typed", "topformer_jax/visualize/page/index.html"} <= files
    recipes = {f"topformer_jax/configs/{path.name}" for path in (ROOT / "configs").glob("*.py")}
    with zipfile.ZipFile(wheel) as archive:
        found = {name for name in archive.namelist() if ".dist-info/" not in name}
        metadata = archive.read(f"topformer_jax-{__version__}.dist-info/METADATA").decode()
    assert found == files | recipes
    assert "License-Expression: Apache-2.0" in metadata
    assert "License-File: LICENSE" in metadata


@pytest.mark.slow
def test_the_installed_wheel_trains_from_another_folder(wheel: pathlib.Path, tmp_path: pathlib.Path) -> None:
    installed, elsewhere = tmp_path / "installed", tmp_path / "elsewhere"
    elsewhere.mkdir()
    pip = ["pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(installed), str(wheel)]
    # PYTHONPATH comes before the environment's own packages, which hold this clone.
    environment = os.environ | {"PYTHONPATH": str(installed), "JAX_PLATFORMS": "cpu"}

    def python(*words: str) -> str:
        command = [sys.executable, *words]
        done = subprocess.run(command, cwd=elsewhere, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    python("-m", *pip)
    load = "import topformer_jax as t; print(t.__file__); t.load('topformer_b_ade')"
    assert pathlib.Path(python("-c", load).strip()).is_relative_to(installed)
    settings = [f"--config.{key}={value}" for key, value in (TINY | {"schedule.steps": 2}).items()]
    python("-m", "topformer_jax.train", "--config", "topformer_t_shapes", *settings)
    run = elsewhere / "runs/topformer_t_shapes"
    assert (run / "metrics.jsonl").exists()
    python(
        *("-m", "topformer_jax.evaluate", "--config", "topformer_t_shapes", "--checkpoint", str(run)),
        *settings,
    )
    assert (run / "evaluate/report.html").exists()
