"""Does a training here go like one in PyTorch, from the same weights, on the same batches in the same order?

  python -m benchmarks.side_by_side --program ours --json ours.json --config topformer_t_camvid
  python -m benchmarks.side_by_side --program torch --json torch.json --config topformer_t_camvid
  python -m benchmarks.side_by_side --draw ours.json torch.json --output curves.svg

One training per call, so that each has the machine for itself. Both run the official loss and AdamW with the config's
schedule on the same augmented batches; dropout, drop path, further losses and averaged weights are off. PyTorch's
weights are scored by our evaluation. Seconds are those of the steps after the first, which compiles. PyTorch's
batches come augmented; ours augments. `--threads` only changes the order of PyTorch's sums: the difference of two
such runs is the noise to compare with.
"""

import argparse
import functools
import io
import json
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from benchmarks import runner, samples
from topformer_jax import config as config_lib, models
from topformer_jax.checkpoints import torch_format
from topformer_jax.data import loader, sources
from topformer_jax.data.augment import augment
from topformer_jax.data.batch import Batch
from topformer_jax.data.loader import count_cores
from topformer_jax.inference import metrics
from topformer_jax.inference.evaluation import evaluate_split
from topformer_jax.runtime import cli, files, sharding
from topformer_jax.runtime.errors import UserError
from topformer_jax.training import step
from topformer_jax.training.step import scaled_learning_rate

# Without what recipes add to the official loss and AdamW.
PLAIN: dict[str, Any] = {
    "model.drop_path_rate": 0.0,
    "model.dropout_ratio": 0.0,
    "ignore_void_in_mean": False,
    "loss.class_weight": (),
    "ema_decay": 0.0,
}
MEANS = 20  # steps: a point of the drawn loss is the mean of so many

Step = Callable[[Batch], tuple[float, float]]  # a batch to the loss, and to the seconds that the step took
Weights = Callable[[], Mapping[str, Any]]


def start_ours(config: ConfigDict, model: models.Segmenter) -> tuple[Step, Weights]:
    """Our training's step, and what gives its weights by name."""
    mesh = sharding.make_train_mesh(config, jax.local_devices()[:1])
    state, train_step = step.init_training(config, mesh, model)

    def make_step(batch: Batch) -> tuple[float, float]:
        nonlocal state
        start = time.perf_counter()
        state, values = train_step(state, batch)
        return float(values["loss"]), time.perf_counter() - start

    return make_step, lambda: sharding.to_host(state.params | state.stats)


def start_torch(config: ConfigDict, model: models.Segmenter, threads: int) -> tuple[Step, Weights]:
    """PyTorch's training of our own plain network, likewise."""
    import torch

    from benchmarks import torch_peer

    variant = torch_peer.Variant("eager", "cpu", config)
    torch.set_num_threads(threads)
    network = variant.network(samples.torch_weights(models.state_dict(model))).train()
    optimizer = torch_peer.make_optimizer(config, network)
    data = config.data
    options = {"seed": config.seed, "flip": data.flip_prob, "photometric": data.photometric_distortion}
    make_images = jax.jit(functools.partial(augment, **options))
    multipliers, made = (1.0, config.optimizer.head_lr_mult), 0

    def make_step(batch: Batch) -> tuple[float, float]:
        nonlocal made
        augmented = [np.asarray(array) for array in make_images(batch)]
        start = time.perf_counter()
        rate = float(scaled_learning_rate(made, config))
        for group, multiplier in zip(optimizer.param_groups, multipliers, strict=True):
            group["lr"] = rate * multiplier
        images, labels = variant.images(augmented[0]), variant.labels(augmented[1])
        loss = torch_peer.cross_entropy(variant.logits(network, images), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        made += 1
        return loss.item(), time.perf_counter() - start

    def read_weights() -> Mapping[str, Any]:
        tensors = {name: tensor.numpy().copy() for name, tensor in network.state_dict().items()}
        return {name: torch_format.from_torch(tensors[name]) for name in models.state_dict(model)}

    return make_step, read_weights


def train(config: ConfigDict, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Trains and scores; yields what is known so far after each score."""
    model = models.build_segmenter(config)
    begin = start_ours(config, model) if args.program == "ours" else start_torch(config, model, args.threads)
    make_step, read_weights = begin
    validation = sources.open_source(config, "validation")
    mesh = sharding.make_inference_mesh(jax.local_devices()[:1])
    batches = loader.training_batches(sources.open_source(config, "train"), config)
    name = "ours" if args.program == "ours" else f"PyTorch, threads: {args.threads}"
    found: dict[str, Any] = {"name": name, "losses": [], "miou": {}, "seconds": 0.0}
    scored = models.build_segmenter(config)
    try:
        for number in range(1, config.schedule.steps + 1):
            loss, seconds = make_step(next(batches))
            found["losses"].append(loss)
            found["seconds"] += seconds if number > 1 else 0.0
            if number % args.every == 0 or number == config.schedule.steps:
                result = evaluate_split(scored, validation, mesh, tensors=read_weights())
                found["miou"][number] = metrics.compute_scores(result.confusion).miou
                yield found
    finally:
        batches.close()


def draw(runs: list[dict[str, Any]], path: files.Path) -> None:
    """The losses as lines and the scores as points, in one SVG picture."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    scores = axes.twinx()
    for number, run in enumerate(runs):
        means = np.array(run["losses"][: len(run["losses"]) // MEANS * MEANS]).reshape(-1, MEANS).mean(1)
        hours, final = run["seconds"] / 3600, 100 * list(run["miou"].values())[-1]
        label = f"{run['name']}: mIoU {final:.1f}; {hours:.2f} h"
        axes.plot(MEANS * (np.arange(len(means)) + 0.5), means, color=f"C{number}", label=label)
        points = [(int(step), 100 * miou) for step, miou in run["miou"].items()]
        scores.plot(*zip(*points, strict=True), "o", color=f"C{number}")
    axes.set_xlabel("step")
    axes.set_ylabel(f"loss, mean of {MEANS} steps (lines)")
    scores.set_ylabel("validation mIoU % (points)")
    axes.legend()
    image = io.BytesIO()
    figure.savefig(image, format="svg")
    files.write_file(path, image.getvalue())


def main() -> None:
    """The command."""
    parser = cli.Parser(__doc__, config_required=False)
    parser.add_argument("--program", choices=["ours", "torch"], help="whose training to run")
    add = parser.add_argument
    add("--every", type=runner.positive, default=500, help="steps between scores (default 500)")
    add("--threads", type=runner.positive, default=count_cores(), help="of PyTorch")
    add("--json", type=pathlib.Path, metavar="FILE", help="where to write the losses and scores")
    add("--draw", type=pathlib.Path, nargs="+", metavar="FILE", help="files of --json to draw")
    add("--output", type=pathlib.Path, metavar="FILE", help="the picture, SVG")
    args, config = parser.parse()
    if args.draw and args.output:
        draw([json.loads(files.read_bytes(path)) for path in args.draw], args.output)
        return
    if config is None or not (args.program and args.json):
        raise UserError("give --program ours or torch, --config and --json FILE; or --draw FILES and --output FILE")
    for found in train(config_lib.load(config, PLAIN), args):
        files.write_file(args.json, json.dumps(found) + "\n")
        number, miou = list(found["miou"].items())[-1]
        seconds = found["seconds"] / number
        loss = found["losses"][-1]
        print(f"step {number}  loss {loss:.4f}  mIoU {100 * miou:.2f}  {seconds:.3f} s per step", flush=True)


if __name__ == "__main__":
    cli.run(main)
