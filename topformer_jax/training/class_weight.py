"""The numbers behind a name in `loss.class_weight`: weights from the pixels of all training labels."""

import json

import jax
import msgspec
import numpy as np
from jaxtyping import Int
from ml_collections import ConfigDict

from topformer_jax import config as config_lib
from topformer_jax.config.loading import flatten
from topformer_jax.config.settings import SETTINGS
from topformer_jax.data import loader, records
from topformer_jax.data.batch import Source
from topformer_jax.data.catalog import DataSet
from topformer_jax.data.class_balance import weigh_classes
from topformer_jax.data.sources import list_names
from topformer_jax.runtime import files, processes
from topformer_jax.runtime.errors import UserError
from topformer_jax.training.run_folder import RunFolder

FILE = "class_pixels.json"  # in the work directory
# With the number of labels, these decide the counts.
COUNTED_BY = (
    *("data.dataset", "data.source", "data.root", "data.train_split", "data.reduce_zero_label"),
    *("data.skip_unreadable", "data.shapes.size", "model.num_classes"),
)


class _ClassPixels(msgspec.Struct):
    """The content of the file: what decides the counts, and the pixels by class of each label."""

    settings: str
    labels: list[dict[int, int]]


def set_class_weight(
    config: ConfigDict, data_set: DataSet, pixels: Int[np.ndarray, "labels classes"] | None
) -> ConfigDict:
    """The config with numbers in place of a name in `loss.class_weight`; prints their range and the rarest class.

    Raises:
        UserError: no label holds a class, or a class is too rare.
    """
    name, classes = config.loss.class_weight, np.array(data_set.classes)
    if not isinstance(name, str):
        return config
    assert pixels is not None
    total, empty = pixels.sum(0), int((pixels.sum(1) == 0).sum())
    if empty == len(pixels):
        raise UserError(f"loss.class_weight={name} needs a training label that holds a class: run check")
    # The first process's weights count: on another kind of CPU, a logarithm may differ in the last digit.
    weights = processes.gather_processes(weigh_classes(name, pixels))[0]
    occurs = total > 0
    rarest = int(np.where(occurs, total, total.sum()).argmin())
    facts = f"{classes[rarest]}, {total[rarest]:,} of {total.sum():,} pixels, weight {weights[rarest]:.3g}"
    legal = SETTINGS["loss.class_weight"].legal
    if legal is not None and float(weights.max()) not in legal:
        raise UserError(
            f"loss.class_weight={name} has a weight beyond {legal}; the rarest class is {facts}: give numbers"
        )
    spread = f"{weights[occurs].min():.3g} to {weights.max():.3g}"
    processes.say(f"class weights: {name}, {spread}; the rarest class is {facts}")
    if absent := list_names(classes[~occurs].tolist(), "class", f" of {len(classes)}", shown=5):
        processes.say(f"class weights: 0 for {absent} without a training pixel")
    if empty:
        processes.say(f"class weights: {empty} of {len(pixels)} training labels hold no class or are unreadable")
    return config_lib.load(config, {"loss.class_weight": weights.tolist()})


def find_class_pixels(
    config: ConfigDict, source: Source, folder: RunFolder, make_progress: records.MakeProgress
) -> Int[np.ndarray, "labels classes"] | None:
    """The pixels of each class in each training label, int32, the same on every process; None if none are needed.

    The processes share the counting. A later start reads the file of the first one, and says so, since it has the
    same counts even if a label was edited in between.

    Raises:
        UserError: a label or the file cannot be read.
    """
    if not isinstance(config.loss.class_weight, str) and not loader.needs_class_draws(config):
        return None
    number, count, classes = len(source), jax.process_count(), config.model.num_classes
    values = flatten(config.to_dict())
    settings = json.dumps([number, *(values[key] for key in COUNTED_BY)])
    path, advice = folder.path / FILE, "; delete it, and the labels are counted again"
    text = files.read_existing(path, advice) or b""
    is_shared = processes.count_equal(text.decode(errors="replace")) == count
    earlier = files.read_json(text, _ClassPixels, path, advice) if text and is_shared else None
    if earlier is not None and earlier.settings == settings:
        pixels = np.zeros((number, classes), np.int32)
        for row, label in zip(pixels, earlier.labels, strict=True):
            row[list(label)] = list(label.values())
        processes.say(f"pixels per class are read from {path}: if labels have changed since, delete it")
        return pixels
    rows = -(-number // count)
    own = range(number)[jax.process_index() * rows :][:rows]
    pixels = np.zeros((rows, classes), np.int32)
    with make_progress(len(own), "training labels counted") as progress:
        for row, counts in enumerate(loader.count_pixels(source, config, own)):
            pixels[row] = counts
            progress.update(row + 1)
    pixels = processes.gather_processes(pixels).reshape(-1, classes)[:number]
    if jax.process_index() == 0:
        labels = [{int(each): int(row[each]) for each in np.flatnonzero(row)} for row in pixels]
        files.write_file(folder.local / FILE, msgspec.json.encode(_ClassPixels(settings, labels)))
    return pixels
