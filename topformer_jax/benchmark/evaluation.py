"""evaluate: the exact evaluation of a source, beside a plain loop in PyTorch over the same files."""

import pathlib
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from topformer_jax import checkpoints, metrics, models
from topformer_jax import evaluate as evaluate_lib
from topformer_jax.benchmark import measure, samples
from topformer_jax.benchmark.measure import OURS, Options
from topformer_jax.benchmark.peer import Peers
from topformer_jax.benchmark.report import Report
from topformer_jax.data import sources

TOLERANCE = 1e-3  # of mIoU in 0..1
APART = {"float32": 1e-3, "bfloat16": 0.1}  # share of the pixels that rounding may move to another class


def evaluate(
    config: ConfigDict, options: Options, source: sources.Source, checkpoint: pathlib.Path | None = None
) -> Report:
    """Reading, network, resizing and counting, from files to the confusion matrix, on one device.

    The weights are random where there is no checkpoint. The rows hold each program's mIoU, and `agrees` says whether
    the labels are ours up to rounding.
    """
    peers = Peers(config, options, one=True)
    model = checkpoints.load_segmenter(config, checkpoint)
    if checkpoint is None:
        checkpoints.load_state_dict(model, samples.weights(model))
    tensors = {name: np.asarray(value) for name, value in models.state_dict(model).items()}
    mesh = Mesh(np.array(jax.local_devices()[:1]), ("data",))
    found: dict[str, np.ndarray] = {}

    def ours() -> None:
        found[OURS] = evaluate_lib.evaluate(model, source, config, mesh).confusion

    programs = {OURS: measure.ready(OURS, ours)}
    with peers:
        programs |= peers.make("evaluation", tensors, source)
        seconds = measure.sequential(programs, options.repeats)
    machine = measure.machine()
    rows = measure.rows(f"{len(source)} pictures", programs, seconds, images=len(source))
    return Report(
        f"evaluate: {measure.described(config)}, {config.data.dataset}, "
        f"{'random weights' if checkpoint is None else checkpoint}",
        machine.facts(),
        rows,
        peers.notes + _compared(rows, found | peers.results, config.model.dtype),
    )


def _compared(rows: list[dict[str, Any]], found: dict[str, np.ndarray], dtype: str) -> list[str]:
    """Adds to each row its mIoU and how far it is from ours, and says it in sentences."""
    notes = []
    for row in rows:
        name, confusion = row["program"], found[row["program"]]
        row["miou"] = metrics.compute_scores(confusion).miou
        if name == OURS:
            continue
        row["pixels_apart"] = int(np.abs(confusion - found[OURS]).sum()) // 2  # at least so many
        share = row["pixels_apart"] / confusion.sum()
        row["agrees"] = bool(
            confusion.sum() == found[OURS].sum()
            and abs(row["miou"] - rows[0]["miou"]) <= TOLERANCE
            and share <= APART[dtype]
        )
        notes.append(
            f"{name}: mIoU {100 * row['miou']:.4f}, ours {100 * rows[0]['miou']:.4f}: "
            f"{'they agree' if row['agrees'] else 'THEY DO NOT AGREE'} ({share:.1e} of the pixels apart)"
        )
    return notes
