"""Scores a checkpoint on a data set's validation split, as mmsegmentation does, pixel for pixel; or a classifier.

  python -m topformer_jax.evaluate --config configs/topformer_b_ade.py --checkpoint TopFormer-B.pth
  python -m topformer_jax.evaluate --config configs/topformer_b_ade.py --checkpoint runs/b --img-ratios 0.5,1 --flip

The checkpoint is a file, a checkpoint folder or a training run's work directory. Prints the table of classes
and writes metrics.json, confusion.csv (a row per label, a column per prediction) and report.html into the work
directory; of a classifier it prints top-1 and top-5, and writes metrics.json. On several hosts, start the same
command on each, as for training.
"""

from topformer_jax.data.catalog import SPLITS
from topformer_jax.runtime import cli, files


def make_parser() -> cli.Parser:
    """The command's flags."""
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    weights = parser.add_mutually_exclusive_group(required=True)
    weights.add_argument("--checkpoint", type=files.as_path, metavar="PATH", help="a file or a folder")
    weights.add_argument(
        "--exported", metavar="FILE", help="of topformer_jax.export, to score in its runtime"
    )
    cli.add_stretch_flag(parser)
    add("--img-ratios", metavar="R,R,...", help="factors on evaluation.scale; their softmaxes are averaged")
    add("--flip", action="store_true", help="average with the mirrored images")
    add("--slide", action="store_true", help="sliding windows of evaluation.crop_size, not the whole image")
    add("--split", choices=SPLITS, default="validation", help="default: validation")
    add("--workdir", type=files.as_path, metavar="DIR", help="default: runs/<config name>/evaluate")
    add(
        "--save-predictions",
        type=files.as_path,
        metavar="DIR",
        help="write each prediction as an indexed PNG",
    )
    add("--report-images", type=int, default=6, metavar="N", help="best and worst images in the report (6)")
    cli.add_process_flags(parser)
    return parser


cli.answer_help(__name__, make_parser)

import csv
import functools
import io
import json
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np
from ml_collections import ConfigDict

from topformer_jax import checkpoints, config as config_lib, models
from topformer_jax.data import loader, sources
from topformer_jax.data.batch import Image, Labels
from topformer_jax.exporters.prediction import STRETCHED, ExportedPredictor
from topformer_jax.inference import Predictor, metrics
from topformer_jax.inference.classification import evaluate_classifier
from topformer_jax.inference.evaluation import (
    EvaluationResult,
    ExampleResult,
    evaluate_images,
    evaluate_split,
    score_split,
)
from topformer_jax.runtime import logs, processes, sharding
from topformer_jax.runtime.errors import UserError
from topformer_jax.visualize import drawing, report


def evaluate(
    model: models.Segmenter,
    workdir: files.Path,
    *,
    checkpoint: str,
    split: str = "validation",
    save_predictions: files.Path | None = None,
    num_report_images: int = 6,
    predict: ExportedPredictor | None = None,
) -> EvaluationResult:
    """Scores a model on a split of its config's data set, prints the table and writes the outputs.

    Args:
        model: its config says which data, and how to evaluate; classes have the names of its checkpoint.
        workdir: for metrics.json, confusion.csv and report.html.
        checkpoint: where the weights come from, for the outputs.
        split: "train" or "validation".
        save_predictions: a folder for each example's prediction as an indexed PNG.
        num_report_images: in the report, so many with the most correct pixels and so many with the fewest.
        predict: an exported file that labels the images instead of the model, of which the config alone is used.

    Raises:
        UserError: the data cannot be read, no label has a pixel of a class, or an output cannot be written.
    """
    config, weights = model.config, predict or model
    is_first = jax.process_index() == 0
    make_progress = functools.partial(logs.Progress, active=is_first)
    source = sources.open_source(config, split, make_progress, classes=weights.classes)
    data_set = sources.find_data_set(config, weights.classes, weights.palette)
    if is_first:
        files.make_folder(workdir)

    def save_prediction(example: ExampleResult) -> None:
        if save_predictions:
            files.require_inside(example.name, "the name of an example")
            path, labels = save_predictions / f"{example.name}.png", example.prediction()
            writes.add(lambda: drawing.write_labels(path, labels, data_set.palette))

    mesh = sharding.make_inference_mesh(jax.devices())
    with files.WriteQueue() as writes, logs.Progress(len(source), "images", active=is_first) as progress:
        score = (
            functools.partial(evaluate_split, model, source, mesh)
            if predict is None
            else functools.partial(evaluate_images, predict, source, config)
        )
        result = score(on_example=save_prediction, on_progress=progress.update)
    scores = score_split(result, config, split)
    if is_first:
        print(format_table(scores, data_set.classes))
        unused = (
            "per_device_batch_size",
            *(("crop_size", "stride") if config.evaluation.mode == "whole" else ()),
        )
        settings = {key: value for key, value in config.evaluation.to_dict().items() if key not in unused}
        facts = {"images": f"{len(source):,}, {result.confusion.sum():,} labelled pixels"}
        facts |= _describe(config, checkpoint, split, settings)
        if predict is not None:
            facts["devices"] = predict.runtime
            if predict.stretched_size:
                facts["evaluation"] += f"; stretched to {predict.stretched_size}, not scale and size_divisor"
        _write_scores(workdir, scores, result, data_set.classes, facts)
        label = predict or Predictor(model)
        pictures = _choose_examples(config, label, source, result, num_report_images)
        report.write_report(
            workdir / "report.html",
            title=f"{config.name} on {config.data.dataset}",
            facts=facts,
            data_set=data_set,
            confusion=result.confusion,
            best=pictures[0],
            worst=pictures[1],
        )
        print(f"wrote {workdir / 'metrics.json'}, confusion.csv, report.html")
    return result


def score_classifier(
    model: models.Classifier, workdir: files.Path, *, checkpoint: str, split: str = "validation"
) -> dict[str, float]:
    """Scores a classifier on a split of its config's data set, prints top-1 and top-5, and writes metrics.json.

    Returns:
        The scores as shares of 1.

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
    scores = {"top1": result.top(1), "top5": result.top(5)}
    if is_first:
        print(
            f"top-1 {100 * scores['top1']:.2f}  top-5 {100 * scores['top5']:.2f}  of {len(source):,} images"
        )
        settings = {"crop_size": config.data.crop_size, "short_side": config.evaluation.short_side}
        # ImageNet has two classes "crane".
        unique = [f"{n} ({label})" if names.count(n) > 1 else n for label, n in enumerate(names)]
        values = scores | {
            "images": len(source),
            "classes": {unique[label]: result.of_class(label).top(1) for label in np.unique(result.labels)},
            **_describe(config, checkpoint, split, settings),
        }
        files.make_folder(workdir)
        files.write_file(workdir / "metrics.json", json.dumps(values, indent=2) + "\n")
        print(f"wrote {workdir / 'metrics.json'}")
    return scores


def format_table(scores: metrics.Scores, classes: Sequence[str]) -> str:
    """The scores in percent, a line per class; nan where a class is in no label and no prediction."""
    rows = [("class", "IoU", "Acc")]
    rows += [
        (name, f"{100 * iou:.2f}", f"{100 * accuracy:.2f}")
        for name, iou, accuracy in zip(classes, scores.iou, scores.accuracy, strict=True)
    ]
    means = f"mIoU {100 * scores.miou:.2f}  mAcc {100 * scores.macc:.2f}  aAcc {100 * scores.aacc:.2f}"
    return f"{cli.table(rows)}\n{means}"


def _describe(
    config: ConfigDict, checkpoint: str, split: str, settings: Mapping[str, object]
) -> dict[str, str]:
    """What was evaluated and how, for metrics.json and the report."""
    return {
        "checkpoint": checkpoint,
        "split": split,
        "config": config.name,
        "data": f"{config.data.dataset}, {config.data.root or config.data.source}",
        "evaluation": ", ".join(f"{key} {value}" for key, value in settings.items()),
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
    }


def _write_scores(
    workdir: files.Path,
    scores: metrics.Scores,
    result: EvaluationResult,
    classes: Sequence[str],
    facts: Mapping[str, str],
) -> None:
    """Writes metrics.json and confusion.csv."""
    values = {
        "mIoU": scores.miou,
        "mAcc": scores.macc,
        "aAcc": scores.aacc,
        "images": len(result.accuracy),
        "classes": {
            name: {"IoU": _number_or_none(iou), "Acc": _number_or_none(accuracy)}
            for name, iou, accuracy in zip(classes, scores.iou, scores.accuracy, strict=True)
        },
        **facts,
    }
    files.write_file(workdir / "metrics.json", json.dumps(values, indent=2) + "\n")
    lines = io.StringIO()
    writer = csv.writer(lines)
    writer.writerow(["label", *classes])
    writer.writerows([name, *row] for name, row in zip(classes, result.confusion, strict=True))
    files.write_file(workdir / "confusion.csv", lines.getvalue())


def _choose_examples(
    config: ConfigDict,
    predict: Callable[[Image], Labels],
    source: sources.Source,
    result: EvaluationResult,
    num_images: int,
) -> tuple[list[report.ReportExample], list[report.ReportExample]]:
    """The images for the report that have the largest and the smallest share of correct pixels."""

    def load_example(index: int) -> report.ReportExample:
        example = source[index]
        image, label = loader.decode_example(example, config)
        return report.ReportExample(
            example.name, result.accuracy[index], result.miou[index], image, label, predict(image)
        )

    order = [int(index) for index in np.argsort(result.accuracy) if np.isfinite(result.accuracy[index])]
    count = min(num_images, len(order) // 2)
    best, worst = ([load_example(index) for index in some[:count]] for some in (order[::-1], order))
    return best, worst


def _number_or_none(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def main() -> None:
    """The command."""
    args, config = make_parser().parse()
    assert config is not None  # --config is required
    if args.report_images < 0:
        raise UserError(f"--report-images is {args.report_images}: expected 0 or more")
    if args.stretch and not args.exported:
        raise UserError("--stretch is for --exported")
    processes.start_processes(args.coordinator, args.processes, args.process_id)
    overrides: dict[str, object] = {}
    if args.img_ratios:
        overrides["evaluation.img_ratios"] = cli.numbers("--img-ratios", args.img_ratios)
    if args.flip:
        overrides["evaluation.flip"] = True
    if args.slide:
        overrides["evaluation.mode"] = "slide"
    config = config_lib.load(config, overrides)
    workdir = args.workdir or files.as_path("runs") / config.name / "evaluate"
    if config.task == "classification":
        if overrides or args.exported or args.save_predictions:
            raise UserError(
                f"{config.name} is a classifier: --exported, --img-ratios, --flip, --slide and --save-predictions "
                "are for segmentation"
            )
        classifier = checkpoints.load_model(config, args.checkpoint)
        assert isinstance(classifier, models.Classifier)
        checkpoints.print_differences(classifier, config)
        score_classifier(classifier, workdir, checkpoint=str(args.checkpoint), split=args.split)
        return
    if args.exported and jax.process_count() > 1:
        raise UserError("--exported runs in one process: start one")
    model = checkpoints.load_segmenter(config, args.checkpoint)
    exported = ExportedPredictor(args.exported, model, args.stretch) if args.exported else None
    weights: checkpoints.Weights = exported or model
    checkpoints.check_label_rules(weights, config)
    checkpoints.print_differences(weights, config, given=(*overrides, *(STRETCHED if args.stretch else ())))
    evaluate(
        model,
        workdir,
        checkpoint=str(args.checkpoint or args.exported),
        split=args.split,
        save_predictions=args.save_predictions,
        num_report_images=args.report_images,
        predict=exported,
    )


if __name__ == "__main__":
    cli.run(main)
