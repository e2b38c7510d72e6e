"""The loader: one order whoever makes it, exact resume, skipped and broken examples, batches on the devices."""

import itertools
import multiprocessing
import os
import pathlib
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any, cast

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from tests.commands import LONGEST
from topformer_jax import config as config_lib
from topformer_jax.data import loader, sources
from topformer_jax.data.batch import Example
from topformer_jax.preparation import packing
from topformer_jax.runtime.errors import UserError

EXAMPLES = 10
Arrays = dict[str, np.ndarray]  # a batch, to be looked through by name


def settings(**overrides: Any) -> ConfigDict:
    """Ten small scenes in batches of four, made by threads."""
    values = {
        "batch_size": 4,
        "data.shapes.train": EXAMPLES,
        "data.shapes.validation": 5,
        "data.shapes.size": 48,
        "data.scale": (48, 48),
        "data.crop_size": (32, 40),
        "data.num_workers": 0,
    }
    return config_lib.load(config_lib.shapes(), values | {k.replace("__", "."): v for k, v in overrides.items()})


def batches(config: ConfigDict, count: int, **place: Any) -> list[Arrays]:
    iterator = loader.training_batches(sources.open_source(config, "train"), config, **place)
    made = cast(list[Arrays], list(itertools.islice(iterator, count)))
    iterator.close()
    return made


def assert_same(found: list[Arrays], expected: list[Arrays]) -> None:
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.keys() == theirs.keys()
        for name, values in theirs.items():
            np.testing.assert_array_equal(ours[name], values, err_msg=name)


def test_each_epoch_has_every_example_once_with_its_own_order_and_crops() -> None:
    made = batches(settings(), 3 * EXAMPLES // 4 + 1)
    assert {name: (values.shape, values.dtype.name) for name, values in made[0].items()} == {
        "image": ((4, 32, 40, 3), "uint8"),
        "label": ((4, 32, 40), "uint8"),
        "size": ((4, 2), "int32"),
        "index": ((4,), "int32"),
        "epoch": ((4,), "int32"),
    }
    images, index, epoch = (
        np.concatenate([batch[name] for batch in made])[: 3 * EXAMPLES] for name in ("image", "index", "epoch")
    )
    np.testing.assert_array_equal(epoch, np.repeat(np.arange(3), EXAMPLES))  # across the borders of batches
    orders = [tuple(order) for order in index.reshape(3, EXAMPLES)]
    assert [sorted(order) for order in orders] == [list(range(EXAMPLES))] * 3
    assert len({*orders, tuple(range(EXAMPLES))}) == 4
    crops = {image.tobytes() for image in images}
    assert len(crops) == 3 * EXAMPLES
    other = batches(settings(seed=1), 3)
    assert tuple(np.concatenate([batch["index"] for batch in other])[:EXAMPLES]) not in orders
    assert not crops & {image.tobytes() for batch in other for image in batch["image"]}


def test_degraded_batches_differ_only_inside_their_images() -> None:
    plain, degraded = batches(settings(), 4), batches(settings(data__blur_prob=1.0, data__jpeg_prob=0.5), 4)
    changed = []
    for ours, theirs in zip(degraded, plain, strict=True):
        for image, other, (height, width) in zip(ours["image"], theirs["image"], theirs["size"], strict=True):
            changed.append((image[:height, :width] != other[:height, :width]).any())
            assert not image[height:].any()
            assert not image[:, width:].any()
        assert_same([ours | {"image": theirs["image"]}], [theirs])
    assert sum(changed) > 12  # a blur of 0.1 pixels changes nothing
    assert any((batch["size"] != (32, 40)).any() for batch in plain)  # some are padded


def test_an_image_that_opencv_cannot_turn_is_named() -> None:
    image, label = np.zeros((1, 2**15 - 1, 3), np.uint8), np.zeros((1, 2**15 - 1), np.uint8)
    example = Example("long", image, label, ("long.png", "label of long"))
    assert loader.crop_example(example, settings(), 0, epoch=0)["image"].shape == (32, 40, 3)
    turned = settings(data__rotation=1.0)
    with pytest.raises(UserError, match=r"long.png has a side of 32,767 pixels: data.rotation takes at most"):
        loader.crop_example(example, turned, 0, epoch=0)
    shorter = example._replace(image=image[:, 1:], label=label[:, 1:])
    assert loader.crop_example(shorter, turned, 0, epoch=0)["image"].shape == (32, 40, 3)


def test_processes_share_one_batch() -> None:
    shares = [batches(settings(), 6, process_index=p, process_count=4) for p in range(4)]
    together = [
        {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        for parts in zip(*shares, strict=True)
    ]
    assert_same(together, batches(settings(), 6))


def test_resume() -> None:
    whole = batches(settings(), 9)
    for start in (1, 7):
        assert_same(batches(settings(), 9 - start, start_step=start), whole[start:])
    (batch,) = batches(settings(), 1, start_step=10**9)
    assert batch["epoch"][0] == 4 * 10**9 // EXAMPLES


def test_workers_make_the_same_batches_and_resume() -> None:
    half = [{name: values[2:] for name, values in batch.items()} for batch in batches(settings(), 7)[3:]]
    place = {"start_step": 3, "process_index": 1, "process_count": 2}
    assert_same(batches(settings(data__num_workers=2), 4, **place), half)
    assert not multiprocessing.active_children()


def test_files_and_records_make_the_same_batches(
    golden: Callable[[str], pathlib.Path], tmp_path: pathlib.Path
) -> None:
    changes: dict[str, Any] = {"data.num_workers": 0, "batch_size": 8, "data.crop_size": (64, 96)}
    files = config_lib.load(config_lib.ade20k("tiny"), changes | {"data.root": str(golden("mini_ade"))})
    assert [len(sources.open_source(files, split)) for split in sources.SPLITS] == [48, 12]
    found = batches(files, 4)
    labels = np.unique([batch["label"] for batch in found])
    assert labels[-1] == 255
    assert (labels[:-1] < 150).all()
    packing.build("ade20k", files.data.root, str(tmp_path))
    packed = {"data.source": "array_record", "data.root": str(tmp_path), "data.num_workers": 1}
    assert_same(batches(config_lib.load(files, packed), 4), found)


def test_uneven_processes() -> None:
    source = sources.open_source(settings(), "train")
    with pytest.raises(UserError, match=r"batch of 4 .* over 3 processes: .* multiple of 3"):
        loader.training_batches(source, settings(), process_count=3)


@pytest.fixture
def broken(golden: Callable[[str], pathlib.Path], tmp_path: pathlib.Path) -> ConfigDict:
    """A data set of 48 in which examples 11 and 12 cannot be read."""
    root = tmp_path / "ade"
    shutil.copytree(golden("mini_ade"), root)
    image = root / "images/training/ADE_train_00000012.jpg"
    image.write_bytes(image.read_bytes()[:500])
    (root / "annotations/training/ADE_train_00000013.png").write_bytes(b"")
    overrides = {"data.root": str(root), "data.num_workers": 0, "batch_size": 8, "data.crop_size": (64, 64)}
    return config_lib.load(config_lib.ade20k("tiny"), overrides)


def test_an_unreadable_example_stops_with_its_name(broken: ConfigDict) -> None:
    iterator = loader.training_batches(sources.open_source(broken, "train"), broken)
    with pytest.raises(UserError, match=r"/ADE_train_0000001[23]\.(jpg|png) ") as error:
        list(itertools.islice(iterator, 6))
    assert error.value.line == str(error.value)
    assert "\n" not in error.value.line
    assert next(iterator, None) is None


def test_an_error_in_a_worker_leaves_nothing_behind(broken: ConfigDict) -> None:
    """Python reports shared memory that nobody has freed as it exits, on a line of its own."""
    program = f"""
import topformer_jax.config as config_lib
from topformer_jax.data import loader, sources
from topformer_jax.runtime.errors import UserError

if __name__ == "__main__":
    changes = {{"data.root": {broken.data.root!r}}}
    changes |= {{"data.num_workers": 2, "batch_size": 2, "data.crop_size": (64, 64)}}
    config = config_lib.load(config_lib.ade20k("tiny"), changes)
    try:
        print(sum(1 for _ in loader.training_batches(sources.open_source(config, "train"), config)))
    except UserError as error:
        print("stopped:", error.line)
"""
    file = pathlib.Path(broken.data.root) / "program.py"
    file.write_text(program)
    environment = os.environ | {"PYTHONPATH": str(pathlib.Path(__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, file], capture_output=True, text=True, env=environment, check=False, timeout=LONGEST
    )
    assert re.fullmatch(r"stopped: .*/ADE_train_0000001[23]\.(jpg|png) .*\n", done.stdout)
    assert done.stderr == ""


@pytest.mark.parametrize(("workers", "mix"), [(0, "none"), (1, "none"), (0, "cutmix")])
def test_unreadable_examples_are_skipped_and_counted(broken: ConfigDict, workers: int, mix: str) -> None:
    """Also those that would be pasted, which are counted only where they are in the order."""
    changes = {"data.num_workers": workers, "data.skip_unreadable": True, "data.mix": mix, "data.mix_prob": 1.0}
    config = config_lib.load(broken, changes)
    iterator = loader.training_batches(sources.open_source(config, "train"), config)
    index = np.concatenate([batch["index"] for batch in itertools.islice(iterator, 6)])
    iterator.close()
    assert (iterator.skipped, iterator.unreadable) == (2, {11, 12})
    assert np.count_nonzero(index == 13) == 3  # itself, and for the two before it
    assert set(index) == set(range(48)) - {11, 12}


def test_skipping_ends_where_nothing_is_readable(broken: ConfigDict) -> None:
    config = config_lib.load(broken, {"data.skip_unreadable": True})
    source = sources.open_source(config, "train")
    shutil.rmtree(config.data.root)
    with pytest.raises(UserError, match=r"48 examples in a row are unreadable; the last: .* No such file"):
        next(loader.training_batches(source, config))


def test_a_dead_worker_is_reported() -> None:
    config = settings(data__num_workers=1, data__prefetch=1)
    iterator = loader.training_batches(sources.open_source(config, "train"), config)
    next(iterator)
    (worker,) = multiprocessing.active_children()
    worker.kill()
    with pytest.raises(UserError, match=r"a data worker died .* exit code -9\): .*--config\.data\.num_w"):
        list(itertools.islice(iterator, 10))


def test_map_in_threads_keeps_the_order_and_raises() -> None:
    def invert(number: int) -> float:
        return 1 / number

    found = loader.map_in_threads(invert, [*range(100, -1, -1)])
    assert [next(found) for _ in range(100)] == [1 / number for number in range(100, 0, -1)]
    with pytest.raises(ZeroDivisionError):
        next(found)
    assert list(loader.map_in_threads(invert, [])) == []


def sharding() -> NamedSharding:
    return NamedSharding(Mesh(np.array(jax.devices()[:4]), ("data",)), PartitionSpec("data"))


def test_batches_on_devices() -> None:
    config, expected = settings(), batches(settings(), 5)
    source = sources.open_source(config, "train")
    arrays = loader.DeviceBatches(loader.training_batches(source, config), sharding())
    for batch in expected:
        found = cast(dict[str, jax.Array], next(arrays))
        assert all(values.sharding == sharding() for values in found.values())
        assert_same([{name: np.asarray(values) for name, values in found.items()}], [batch])
    assert arrays.skipped == 0
    arrays.close()
    arrays.close()
    assert next(arrays, None) is None


def test_device_batches_stay_so_many_ahead_and_end() -> None:
    made: list[int] = []

    def numbers() -> Iterator[Any]:
        for number in range(6):
            made.append(number)
            yield {"index": np.full(4, number, np.int32)}

    arrays = loader.DeviceBatches(numbers(), sharding(), depth=2)
    assert next(arrays)["index"][0] == 0
    jax.block_until_ready(next(arrays))
    assert len(made) <= 5  # two taken, two ahead, one in hand
    assert [int(batch["index"][0]) for batch in arrays] == [2, 3, 4, 5]
    assert next(arrays, None) is None


def test_device_batches_hand_on_errors() -> None:
    def numbers() -> Iterator[Any]:
        yield {"index": np.zeros(4, np.int32)}
        raise UserError("example 7 is broken")

    arrays = loader.DeviceBatches(numbers(), sharding())
    next(arrays)
    with pytest.raises(UserError, match="example 7 is broken"):
        next(arrays)
    assert next(arrays, None) is None
