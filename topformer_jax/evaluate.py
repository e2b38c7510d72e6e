"""Scores a checkpoint on a data set's validation split, as mmsegmentation does, to the pixel.

  python -m topformer_jax.evaluate --config configs/topformer_b_ade.py --checkpoint TopFormer-B.pth
  python -m topformer_jax.evaluate --config configs/topformer_b_ade.py --checkpoint runs/b --img-ratios 0.5,1

The checkpoint is a .pth file, a checkpoint folder or a training run's work directory. Writes metrics.json,
confusion.csv (a row a label, a column a prediction) and report.html into the work directory.
On several machines, start the same command on each, as for training.
"""

import collections
import csv
import io
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

from topformer_jax import checkpoint as checkpoint_lib
from topformer_jax import cli, convert, files, inference, logs, metrics, models, pictures, report, sharding
from topformer_jax import config as config_lib
from topformer_jax.data import loader, sources
from topformer_jax.data.catalog import DataSet
from topformer_jax.errors import UserError
from topformer_jax.views import (
    InferenceInput,
    Labels,
    Picture,
    ShapeBucket,
    Size,
    blank,
    plan,
    prepare,
    untile,
)

IN_FLIGHT = 2  # batches that the devices may be behind


class ExampleResult(NamedTuple):
    """One example of this process, after its batch was computed; `prediction()` brings the labels to the host."""

    number: int
    name: str
    image: Picture
    label: Labels
    prediction: Callable[[], Labels]


class Result(NamedTuple):
    """What an evaluation counted; the same on every process."""

    confusion: Int[np.ndarray, "classes classes"]  # pixels, a row a label, a column a prediction
    accuracy: Float[np.ndarray, " examples"]  # of each example's pixels; nan where all are void
    miou: Float[np.ndarray, " examples"]  # of each example alone


def evaluate(
    model: models.Segmenter,
    source: sources.Source,
    config: ConfigDict,
    mesh: Mesh,
    *,
    tensors: dict[str, np.ndarray] | None = None,
    each: Callable[[ExampleResult], None] = lambda _: None,
    progress: Callable[[int, str], None] = lambda *_: None,
) -> Result:
    """Counts every example once, on all devices of all processes.

    Every process reads and computes its rows of every batch; the confusion matrix stays on the devices and is
    sum_over_processes once at the end. The labels are exact integers, whatever the number of devices, as long as
    `evaluation.per_device_batch_size` (of one device) stays the same.

    Args:
        model: it is switched to inference mode.
        source: the examples.
        config: of the model and the evaluation.
        mesh: all devices of all processes.
        tensors: by official name, where the model's own are not the ones to use.
        each: called with every example of this process.
        progress: called with the number of examples begun, and with what is being compiled ("" for nothing).

    Raises:
        UserError: an example cannot be read; a setting has a value that does not exist.
    """
    programs = inference.programs(model, config.evaluation, mesh)
    named = models.state_dict(model) if tensors is None else tensors
    values = jax.device_put(named, NamedSharding(mesh, P()))
    rows = (config.evaluation.per_device_batch_size or _images_at_once()) * mesh.size
    planned = plan(_sizes(source), config.evaluation, rows)
    mine = _own_rows(programs, rows)
    work = [
        (batch.indices[row], batch.space) for batch in planned for row in mine if row < len(batch.indices)
    ]
    dtype = programs.dtype.name

    def read(item: tuple[int, ShapeBucket]) -> _LoadedExample:
        index, space = item
        example = source[index]
        image, label = loader.decode_example(example, config)
        prepared = prepare(image, label, config.evaluation, space, dtype)
        return _LoadedExample(index, example.name, image, label, prepared)

    examples = loader.map_in_threads(read, work)
    totals = programs.totals()
    quality = np.zeros((len(source), 2), np.float32)
    behind: collections.deque[tuple[dict[int, _LoadedExample], Array, Array]] = collections.deque()
    begun = 0
    compiled: set[Size] = set()
    for batch in planned:
        new = [f"{height}x{width}" for height, width in batch.networks if (height, width) not in compiled]
        compiled |= set(batch.networks)
        progress(begun, ", ".join(new))
        local: dict[int, _LoadedExample] = {row: next(examples) for row in mine if row < len(batch.indices)}
        empty = blank(batch.networks, batch.space, config.evaluation, dtype)
        pictures = {row: local[row].prepared if row in local else empty for row in mine}
        filled = inference.stack(pictures, programs, rows)
        views = programs.views(values, filled)
        predictions, pixels, totals = programs.count(views, filled.grid, filled.labels, totals)
        behind.append((local, predictions, pixels))
        begun += len(batch.indices)
        while len(behind) > IN_FLIGHT or (behind and batch is planned[-1]):
            _finish(*behind.popleft(), quality, each)
    progress(begun, "")
    quality = sharding.gather_processes(quality).sum(0)
    return Result(
        sharding.sum_over_processes(_confusion(totals, programs.classes)), quality[:, 0], quality[:, 1]
    )


class _LoadedExample(NamedTuple):
    """An example on the host, ready for the devices."""

    number: int
    name: str
    image: Picture
    label: Labels
    prepared: InferenceInput


def _images_at_once() -> int:
    return 1 if jax.default_backend() == "cpu" else 8


def _sizes(source: sources.Source) -> list[Size]:
    """The size of every example; each process looks at its share."""
    mine = range(jax.process_index(), len(source), jax.process_count())
    found = np.zeros((len(source), 2), np.int64)
    for index, size in zip(mine, loader.map_in_threads(source.label_size, mine), strict=True):
        found[index] = size
    return [(int(height), int(width)) for height, width in sharding.sum_over_processes(found)]


def _own_rows(programs: inference.CompiledInference, rows: int) -> list[int]:
    """The rows of a batch that lie on this process's devices, in order."""
    indices: Any = programs.over_devices.addressable_devices_indices_map((rows,)).values()
    return sorted(row for index in indices for row in range(*index[0].indices(rows)))


def _finish(
    local: dict[int, _LoadedExample],
    predictions: Array,
    pixels: Array,
    quality: np.ndarray,
    each: Callable[[ExampleResult], None],
) -> None:
    """Takes from the devices what a batch gave: it waits for them."""
    found = _rows_of(pixels)
    for row, (number, name, image, label, _) in local.items():
        right, labelled, predicted = found[row].astype(np.float64)
        with np.errstate(invalid="ignore", divide="ignore"):
            ious = right / (labelled + predicted - right)
            known = np.isfinite(ious)
            quality[number] = right.sum() / labelled.sum(), ious[known].sum() / known.sum()

        def prediction(row: int = row, size: Size = (label.shape[0], label.shape[1])) -> Labels:
            return untile(_rows_of(predictions)[row], size)

        each(ExampleResult(number, name, image, label, prediction))


def _rows_of(array: Array) -> dict[int, np.ndarray]:
    """The rows of a global array that this process holds."""
    return {
        (shard.index[0].start or 0) + number: row
        for shard in array.addressable_shards
        for number, row in enumerate(np.asarray(shard.data))
    }


def _confusion(totals: Array, classes: int) -> Int[np.ndarray, "classes classes"]:
    """The counts of this process's devices."""
    halves = np.stack(list(_rows_of(totals).values())).astype(np.int64).sum(0)
    return (halves[0] + (halves[1] << inference.LIMB)).reshape(classes, classes)


def run(config: ConfigDict, model: models.Segmenter, workdir: pathlib.Path, options: "Options") -> Result:
    """The command after its arguments were read: evaluates and writes what is asked for."""
    source = sources.open_source(config, options.split)
    data_set = sources.data_set(config)
    if jax.process_index() == 0:
        files.make_folder(workdir)

    def save(seen: ExampleResult) -> None:
        if options.predictions:
            path = options.predictions / f"{seen.name}.png"
            pictures.write_indexed(path, seen.prediction(), data_set.palette)

    mesh = Mesh(np.array(jax.devices()), ("data",))
    with logs.Progress(len(source), "images", active=jax.process_index() == 0) as bar:
        result = evaluate(model, source, config, mesh, each=save, progress=bar.update)
    if jax.process_index() == 0:
        _write(result, config, model, source, data_set, workdir, options)
    return result


def _write(
    result: Result,
    config: ConfigDict,
    model: models.Segmenter,
    source: sources.Source,
    data_set: DataSet,
    workdir: pathlib.Path,
    options: "Options",
) -> None:
    """Prints the table and writes metrics.json, confusion.csv and the report."""
    scores = metrics.scores(result.confusion)
    print(table(scores, data_set.classes))
    evaluation = config.evaluation.to_dict()
    unused = {"batch_size"} | ({"crop", "stride"} if config.evaluation.mode == "whole" else set())
    facts = {
        "config": config.name,
        "checkpoint": str(options.checkpoint),
        "data": f"{config.data.dataset}, {options.split}, {config.data.root or config.data.source}",
        "images": f"{len(source):,}, {result.confusion.sum():,} labelled pixels",
        "evaluation": ", ".join(f"{key} {value}" for key, value in evaluation.items() if key not in unused),
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
    }
    numbers = {
        "mIoU": scores.miou,
        "mAcc": scores.macc,
        "aAcc": scores.aacc,
        "images": len(source),
        "classes": {
            name: {"IoU": _number(iou), "Acc": _number(accuracy)}
            for name, iou, accuracy in zip(data_set.classes, scores.iou, scores.accuracy, strict=True)
        },
        **facts,
    }
    files.write(workdir / "metrics.json", json.dumps(numbers, indent=2) + "\n")
    lines = io.StringIO()
    writer = csv.writer(lines)
    writer.writerow(["label", *data_set.classes])
    writer.writerows([name, *row] for name, row in zip(data_set.classes, result.confusion, strict=True))
    files.write(workdir / "confusion.csv", lines.getvalue())

    predict = inference.Predictor(model, config.evaluation)

    def shown(index: int) -> report.ReportExample:
        example = source[index]
        image, label = loader.decode_example(example, config)
        return report.ReportExample(
            example.name, result.accuracy[index], result.miou[index], image, label, predict(image)
        )

    order = [int(index) for index in np.argsort(result.accuracy) if np.isfinite(result.accuracy[index])]
    count = min(options.pictures, len(order) // 2)
    report.write_report(
        workdir / "report.html",
        title=f"{config.name} on {config.data.dataset}",
        facts=facts,
        data_set=data_set,
        confusion=result.confusion,
        best=[shown(index) for index in order[::-1][:count]],
        worst=[shown(index) for index in order[:count]],
    )
    print(f"wrote {workdir / 'metrics.json'}, confusion.csv, report.html")


def table(scores: metrics.Scores, classes: Sequence[str]) -> str:
    """The scores in percent, a line a class; nan where a class is in no label and no prediction."""
    rows = [("class", "IoU", "Acc")]
    rows += [
        (name, f"{100 * iou:.2f}", f"{100 * accuracy:.2f}")
        for name, iou, accuracy in zip(classes, scores.iou, scores.accuracy, strict=True)
    ]
    means = f"mIoU {100 * scores.miou:.2f}  mAcc {100 * scores.macc:.2f}  aAcc {100 * scores.aacc:.2f}"
    return f"{cli.table(rows)}\n{means}"


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


class Options(NamedTuple):
    """What the command line says beside the config."""

    checkpoint: pathlib.Path
    split: str
    predictions: pathlib.Path | None
    pictures: int


def main() -> None:
    """The command."""
    parser = cli.Parser(__doc__)
    parser.add_argument(
        "--checkpoint", type=pathlib.Path, required=True, metavar="PATH", help=".pth or folder"
    )
    parser.add_argument("--img-ratios", metavar="S,S,...", help="factors on evaluation.scale, averaged")
    parser.add_argument("--flip", action="store_true", help="average with the mirrored images")
    parser.add_argument(
        "--slide", action="store_true", help="windows of evaluation.crop_size instead of the whole"
    )
    parser.add_argument("--split", choices=sources.SPLITS, default="validation", help="default: validation")
    parser.add_argument(
        "--workdir", type=pathlib.Path, metavar="DIR", help="default: runs/<config name>/evaluate"
    )
    parser.add_argument("--save-predictions", type=pathlib.Path, metavar="DIR", help="as indexed PNG files")
    parser.add_argument(
        "--pictures",
        type=int,
        default=6,
        metavar="N",
        help="in the report: so many with the most right pixels, and with the fewest",
    )
    sharding.add_process_flags(parser)
    args, config = parser.parse()
    assert config is not None  # --config is required
    if args.pictures < 0:
        raise UserError(f"--pictures is {args.pictures}: expected 0 or more")
    sharding.start_processes(args.coordinator, args.processes, args.process_id)
    changes: dict[str, object] = {}
    if args.img_ratios:
        changes["evaluation.img_ratios"] = cli.numbers("--img-ratios", args.img_ratios)
    if args.flip:
        changes["evaluation.flip"] = True
    if args.slide:
        changes["evaluation.mode"] = "slide"
    config = config_lib.load(config, changes)
    model = models.build_segmenter(config)
    tensors, _ = convert.read(args.checkpoint, model, config)
    checkpoint_lib.load_state_dict(model, tensors)
    workdir = args.workdir or pathlib.Path("runs") / config.name / "evaluate"
    run(config, model, workdir, Options(args.checkpoint, args.split, args.save_predictions, args.pictures))


if __name__ == "__main__":
    cli.run(main)
