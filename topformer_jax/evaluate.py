"""Scores a checkpoint on the validation split of a data set, exactly as mmsegmentation does; also a classifier.

  python -m topformer_jax.evaluate --config configs/topformer_b_ade.py --checkpoint TopFormer-B.pth
  python -m topformer_jax.evaluate --config configs/topformer_b_ade.py --checkpoint runs/b --img-ratios 0.5,1 --flip

It prints the table of classes and writes metrics.json, confusion.csv (a row per label, a column per prediction) and
report.html into the work directory. For a classifier it prints top-1 and top-5, and writes metrics.json. On several
hosts, start the same command on each, as for training.
"""

from topformer_jax.data.catalog import SPLITS
from topformer_jax.runtime import cli, files


def make_parser() -> cli.Parser:
    """The command's flags."""
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    cli.add_weights_flags(parser)
    add(
        "--runtime",
        choices=["jax", "onnx"],
        help="what computes a checkpoint's network (default: jax); onnx: onnxruntime, faster on a CPU, with the same "
        "labels except for ties",
    )
    add("--img-ratios", metavar="R,R,...", help="average the softmaxes at these factors of evaluation.scale")
    add("--flip", action="store_true", help="average with the flipped images")
    add("--slide", action="store_true", help="use sliding windows of evaluation.crop_size")
    add("--split", choices=SPLITS, default="validation", help="default: validation")
    add(
        "--workdir",
        type=files.as_path,
        metavar="DIR",
        help="default: runs/<config name>/evaluate, or evaluate_exported",
    )
    add("--save-predictions", type=files.as_path, metavar="DIR", help="write predictions as indexed PNG files")
    cli.add_process_flags(parser)
    return parser


cli.answer_help(__name__, make_parser)

import csv
import functools
import io
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from topformer_jax import checkpoints, config as config_lib, models
from topformer_jax.data import loader, sources
from topformer_jax.data.batch import Image, Labels
from topformer_jax.inference import metrics
from topformer_jax.inference.evaluation import (
    EvaluationResult,
    LoadedExample,
    evaluate_classifier,
    evaluate_images,
    evaluate_split,
    score_split,
)
from topformer_jax.inference.predictor import STRETCHED, ExportedPredictor, Predictor, open_predictor
from topformer_jax.runtime import logs, processes, sharding
from topformer_jax.runtime.errors import UserError
from topformer_jax.visualize import drawing, report

REPORT_IMAGES = 6  # with the most correct pixels, and so many with the fewest


def score_segmenter(
    predictor: Predictor | ExportedPredictor,
    config: ConfigDict,
    workdir: files.Path,
    *,
    origin: str,
    split: str,
    save_predictions: files.Path | None,
) -> None:
    """Scores a segmenter on a split of the config's data set, prints the table and writes the outputs.

    `origin` says in the outputs where the weights come from. `save_predictions` is a folder for each example's
    prediction as an indexed PNG.

    Raises:
        UserError: the data cannot be read, no label has a pixel of a class, or an output cannot be written.
    """
    is_first = jax.process_index() == 0
    make_progress = functools.partial(logs.Progress, active=is_first)
    source = sources.open_source(config, split, make_progress, classes=predictor.classes)
    data_set = sources.find_data_set(config, predictor.classes, predictor.palette)
    if is_first:
        files.make_folder(workdir)

    def save_prediction(example: LoadedExample, predict: Callable[[], Labels]) -> None:
        if save_predictions:
            files.require_inside(example.name, "the name of an example")
            path, labels = save_predictions / f"{example.name}.png", predict()
            writes.add(lambda: drawing.write_labels(path, labels, data_set.palette))

    with files.WriteQueue() as writes, logs.Progress(len(source), "images", active=is_first) as progress:
        calls: dict[str, Any] = {"on_example": save_prediction, "on_progress": progress.update}
        if isinstance(predictor, Predictor) and predictor.runtime == "jax":
            mesh = sharding.make_inference_mesh(jax.devices())
            result = evaluate_split(predictor.model, source, mesh, **calls)
        else:
            result = evaluate_images(predictor, source, config, **calls)
    scores, boundary = score_split(result, config, split)
    if not is_first:
        return
    print(format_table(scores, data_set.classes, boundary))
    facts = {"images": f"{len(source):,}, {result.confusion.sum():,} labelled pixels"}
    facts |= _describe(config, origin, split, _list_settings(config, predictor))
    if predictor.runtime != "jax":
        facts["devices"] = predictor.runtime
    _write_metrics(workdir, {**list_scores(scores, data_set.classes, boundary), **facts})
    rows = ([name, *row] for name, row in zip(data_set.classes, result.confusion, strict=True))
    csv.writer(table := io.StringIO()).writerows([["label", *data_set.classes], *rows])
    files.write_file(workdir / "confusion.csv", table.getvalue())
    best, worst = _choose_examples(config, predictor, source, result)
    title = f"{config.name} on {config.data.dataset}"
    report.write_report(
        workdir / "report.html",
        title=title, facts=facts, data_set=data_set, confusion=result.confusion, best=best, worst=worst,
    )  # fmt: skip
    print(f"wrote {workdir / 'metrics.json'}, confusion.csv, report.html")


def _list_settings(config: ConfigDict, predictor: Predictor | ExportedPredictor) -> dict[str, object]:
    """The settings that the score depends on."""
    settings = config.evaluation.to_dict()
    unused = ["per_device_batch_size", *([] if settings["boundary_pixels"] else ["boundary_pixels"])]
    unused += ["crop_size", "stride"] if settings["mode"] == "whole" else []
    if isinstance(predictor, ExportedPredictor) and predictor.stretched_size:
        settings["stretched to"] = predictor.stretched_size
        unused += [key.removeprefix("evaluation.") for key in STRETCHED]
    return {key: value for key, value in settings.items() if key not in unused}


def score_classifier(model: models.Classifier, workdir: files.Path, *, checkpoint: str, split: str) -> None:
    """Scores a classifier on a split of its config's data set, prints top-1 and top-5, and writes metrics.json.

    Raises:
        UserError: the data cannot be read, or the output cannot be written.
    """
    config = model.config
    is_first = jax.process_index() == 0
    source = sources.open_source(config, split, functools.partial(logs.Progress, active=is_first))
    sources.check_class_folders(config, model.classes)
    names = sources.find_data_set(config, model.classes).classes
    mesh = sharding.make_inference_mesh(jax.devices())
    with logs.Progress(len(source), "images", active=is_first) as progress:
        result = evaluate_classifier(model, source, mesh, on_progress=progress.update)
    if not is_first:
        return
    top1, top5 = result.top(1), result.top(5)
    print(f"top-1 {100 * top1:.2f}  top-5 {100 * top5:.2f}  of {len(source):,} images")
    # ImageNet has two classes "crane".
    unique = [f"{name} ({label})" if names.count(name) > 1 else name for label, name in enumerate(names)]
    classes = {unique[label]: result.of_class(label).top(1) for label in np.unique(result.labels).tolist()}
    scores = {"top1": top1, "top5": top5, "images": len(source), "classes": classes}
    settings = {"crop_size": config.data.crop_size, "crop_pct": config.evaluation.crop_pct}
    files.make_folder(workdir)
    _write_metrics(workdir, {**scores, **_describe(config, checkpoint, split, settings)})
    print(f"wrote {workdir / 'metrics.json'}")


def format_table(scores: metrics.Scores, classes: Sequence[str], boundary: metrics.Scores | None = None) -> str:
    """The scores in percent, one line per class; nan for a class that is in no label and no prediction.

    If there are scores near boundaries, their IoU gets a column too.
    """
    found = list_scores(scores, classes, boundary)
    rows = [(name, *map(_percent, row.values())) for name, row in found.pop("classes").items()]
    columns = ("class", "IoU", *(["boundary IoU"] if boundary else []), "Acc")
    line = "  ".join(f"{name.replace('_', ' ')} {_percent(mean)}" for name, mean in found.items())
    return f"{cli.table([columns, *rows])}\n{line}"


def _percent(share: float | None) -> str:
    return "nan" if share is None else f"{100 * share:.2f}"


def _describe(config: ConfigDict, checkpoint: str, split: str, settings: Mapping[str, object]) -> dict[str, str]:
    """The facts of an evaluation, for metrics.json and the report."""
    return {
        "checkpoint": checkpoint,
        "split": split,
        "config": config.name,
        "data": f"{config.data.dataset}, {config.data.root or config.data.source}",
        "evaluation": ", ".join(f"{key} {value}" for key, value in settings.items()),
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
    }


def _write_metrics(workdir: files.Path, values: Mapping[str, object]) -> None:
    files.write_file(workdir / "metrics.json", json.dumps(values, indent=2) + "\n")


def list_scores(scores: metrics.Scores, classes: Sequence[str], boundary: metrics.Scores | None) -> dict[str, Any]:
    """The scores of metrics.json, as shares of 1; null for a class that is in no label and no prediction."""
    means = {"mIoU": scores.miou, "mAcc": scores.macc, "aAcc": scores.aacc}
    columns = {"IoU": scores.iou}
    if boundary:
        means["boundary_mIoU"] = boundary.miou
        columns["boundary_IoU"] = boundary.iou
    columns["Acc"] = scores.accuracy
    rows = {
        name: {key: _number_or_none(values[label]) for key, values in columns.items()}
        for label, name in enumerate(classes)
    }
    return {key: _number_or_none(mean) for key, mean in means.items()} | {"classes": rows}


def _choose_examples(
    config: ConfigDict, predict: Callable[[Image], Labels], source: sources.Source, result: EvaluationResult
) -> tuple[list[report.ReportExample], list[report.ReportExample]]:
    """The images for the report that have the largest and the smallest share of correct pixels."""

    def load_example(index: int) -> report.ReportExample:
        example = source[index]
        image, label = loader.decode_example(example, config)
        scores = result.example_accuracy[index], result.example_miou[index]
        return report.ReportExample(example.name, *scores, image, label, predict(image))

    accuracy = result.example_accuracy
    order = [int(index) for index in np.argsort(accuracy) if np.isfinite(accuracy[index])]
    count = min(REPORT_IMAGES, len(order) // 2)
    best, worst = ([load_example(index) for index in some[:count]] for some in (order[::-1], order))
    return best, worst


def _number_or_none(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def main() -> None:
    """The command."""
    args, config = make_parser().parse()
    assert config is not None  # --config is required
    processes.start_processes(args.coordinator, args.processes, args.process_id)
    overrides: dict[str, object] = {}
    if args.img_ratios:
        overrides["evaluation.img_ratios"] = cli.numbers("--img-ratios", args.img_ratios)
    if args.flip:
        overrides["evaluation.flip"] = True
    if args.slide:
        overrides["evaluation.mode"] = "slide"
    config = config_lib.load(config, overrides)
    folder = "evaluate_exported" if args.exported else "evaluate"
    workdir = args.workdir or files.as_path("runs") / config.name / folder
    if config.task == "classification":
        if overrides or args.exported or args.stretch or args.save_predictions or args.runtime == "onnx":
            raise UserError(
                f"{config.name} is a classifier: --exported, --runtime, --stretch, --img-ratios, --flip, --slide and "
                "--save-predictions are for segmentation"
            )
        classifier = checkpoints.load_model(config, args.checkpoint)
        assert isinstance(classifier, models.Classifier)
        checkpoints.print_differences(classifier, config)
        score_classifier(classifier, workdir, checkpoint=args.checkpoint, split=args.split)
        return
    if (args.exported or args.runtime == "onnx") and jax.process_count() > 1:
        raise UserError("--exported and --runtime onnx run in one process: start one")
    args.runtime = args.runtime or ("jax" if args.checkpoint else None)
    predictor = open_predictor(config, args, given=overrides)
    checkpoints.check_label_rules(predictor, config)
    outputs: dict[str, Any] = {"split": args.split, "save_predictions": args.save_predictions}
    score_segmenter(predictor, config, workdir, origin=args.checkpoint or args.exported, **outputs)


if __name__ == "__main__":
    cli.run(main)
