"""Strict settings for every test, and the fixtures that more than one file needs."""

import atexit
import contextlib
import hashlib
import json
import os
import pathlib
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import cv2
import jax
import numpy as np
import pytest
from hypothesis import settings

if TYPE_CHECKING:
    import torch


def _open_cache() -> str:
    """The folder of compiled programs: for other tests, the commands that they start, and the next run of the tests.

    Two thirds of a first run's time are compiling. XLA compiles for the processor's instructions, so each kind of
    processor has a folder of its own. Where there is no place for it, this session has one for itself.
    """
    try:
        home = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
        base = home / "topformer_jax" / "tests"
        folder = base / hashlib.sha256(_describe_processor().encode()).hexdigest()[:8]
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (OSError, RuntimeError):  # no home, or one that cannot be written
        private = tempfile.mkdtemp(prefix="compiled-")
        atexit.register(shutil.rmtree, private, ignore_errors=True)
        return private
    for path in base.glob("*/*-cache"):
        with contextlib.suppress(OSError):  # another session deletes them too
            if time.time() - path.stat().st_mtime > 3 * 86400:
                path.unlink()
    return str(folder)


def _describe_processor() -> str:
    """The instructions that the processor knows: what XLA compiled for others must not be run."""
    information = pathlib.Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    names = ("flags", "Features", "model name")
    return "\n".join([platform.machine(), *sorted({line for line in lines if line.startswith(names)})])


os.environ.pop("TF_CPP_MIN_LOG_LEVEL", None)  # JAX has set it here; commands in other processes set their own
if "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _open_cache()
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    # JAX reports what a killed process has left unfinished in the folder, and compiles it again.
    os.environ["PYTHONWARNINGS"] = "ignore:Error reading persistent compilation cache entry"
jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")

# Compiling a program for each size takes seconds; the same examples every run, so that a failure repeats.
settings.register_profile("default", deadline=None, derandomize=True, max_examples=12, print_blob=True)
settings.register_profile("all", deadline=None, max_examples=60, print_blob=True)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="run the slow tests too, and more random examples")


def pytest_configure(config: pytest.Config) -> None:
    settings.load_profile("all" if config.getoption("--all") else "default")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--all"):
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="slow: scripts/test.sh --all runs it"))


# Files whose trainings need no fast programs: without XLA's optimizations they compile in half of the time.
PLUMBING = (
    *(
        "bad_input",
        "bucket_commands",
        "interruptions",
        "kills",
        "launchers",
        "lost_steps",
        "memory",
        "processes",
    ),
    *("reproduce", "run_folder", "slurm", "train"),
)


@pytest.fixture(scope="module", autouse=True)
def _compile_plainly(request: pytest.FixtureRequest) -> Iterator[None]:
    """Switches XLA's optimizations off for the files of `PLUMBING`, also in the commands that they start."""
    is_plumbing = request.module.__name__.rpartition("test_")[2] in PLUMBING
    with pytest.MonkeyPatch.context() as patch:
        if is_plumbing:
            patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
        jax.config.update("jax_disable_most_optimizations", is_plumbing)
        yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module", autouse=True)
def _release_programs() -> Iterator[None]:
    """Most compiled programs of a file leave memory with it: all of them take gigabytes."""
    yield
    jax.clear_caches()


@pytest.fixture
def x64() -> Iterator[None]:
    """64-bit JAX for one test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="session")
def golden() -> Callable[[str], pathlib.Path]:
    """Finds a file of the reference's outputs: the small ones here, all of them where TOPFORMER_GOLDEN says."""

    def find(name: str) -> pathlib.Path:
        folders = [pathlib.Path(__file__).parent / "golden"]
        if "TOPFORMER_GOLDEN" in os.environ:
            folders.append(pathlib.Path(os.environ["TOPFORMER_GOLDEN"]))
        for folder in folders:
            if (folder / name).exists():
                return folder / name
        pytest.skip(f"{name} is not here: set TOPFORMER_GOLDEN to the folder of the reference's outputs")

    return find


@pytest.fixture(scope="session")
def configs() -> pathlib.Path:
    """The folder of the recipes."""
    return pathlib.Path(__file__).parents[1] / "configs"


@pytest.fixture(scope="session")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A folder data set with nothing wrong: 8 pictures to train on, 3 to validate, none of them square.

    It has as many classes as the shapes, so that all runs share the compiled programs.
    """
    from topformer_jax.data import shapes  # not before pytest has set up the checks of shapes

    root = tmp_path_factory.mktemp("drawn")
    for split, folder, count in (("train", "train", 8), ("validation", "val", 3)):
        scenes = (shapes.draw(split, index, 72) for index in range(100))
        for number, (image, label) in enumerate([s for s in scenes if s[1].shape == (79, 65)][:count]):
            for path, array in (
                (root / f"images/{folder}/{number}.jpg", image[..., ::-1]),
                (root / f"annotations/{folder}/{number}.png", label),
            ):
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(cv2.imencode(path.suffix, array)[1].tobytes())
    (root / "classes.txt").write_text("".join(f"class {number}\n" for number in range(10)))
    return root


@pytest.fixture(scope="session")
def shapes_weights(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A checkpoint folder of random weights for the shapes, with a clear winner at most pixels."""
    from topformer_jax import checkpoints, config, models

    folder, settings = tmp_path_factory.mktemp("weights") / "shapes", config.shapes()
    tensors = {name: np.asarray(value) for name, value in models.state_dict(models.build(settings)).items()}
    tensors["decode_head.conv_seg.weight"] = tensors["decode_head.conv_seg.weight"] * 30
    checkpoints.save_model(folder, tensors, {"config": json.loads(settings.to_json()), "meta": {}})
    return folder


@pytest.fixture
def root(drawn: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    """A copy of the data set, to spoil."""
    return shutil.copytree(drawn, tmp_path / "set")


@pytest.fixture
def pth(tmp_path: pathlib.Path) -> Callable[..., pathlib.Path]:
    """Writes a PyTorch file and returns its path."""
    import torch

    def save(content: Any, name: str = "model.pth") -> pathlib.Path:
        torch.save(content, tmp_path / name)
        return tmp_path / name

    return save


@pytest.fixture(scope="session")
def states() -> "dict[str, torch.Tensor]":
    """The state dict of a random Tiny with 150 classes, in PyTorch."""
    from tests.reference import network as reference

    network = reference.Segmenter("tiny")
    reference.randomize(network, seed=0)
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}
