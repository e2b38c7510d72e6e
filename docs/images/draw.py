"""Draws the images of the README.

python docs/images/draw.py speed                                       speed.svg, from speed.json
python docs/images/draw.py shapes --checkpoint runs/topformer_t_shapes  shapes.png, from a trained model
"""

import argparse
import json
import pathlib

import matplotlib

from topformer_jax import checkpoints, cli, config, inference
from topformer_jax.data import loader, sources
from topformer_jax.visualize import drawing

FOLDER = pathlib.Path(__file__).parent
COLUMNS = 3  # panels side by side
BARS = {"ours": "#e06c00", "eager": "#b8bec6", "best": "#7d8794"}
NAMES = {"ours": "topformer_jax", "eager": "PyTorch, eager", "best": "PyTorch, fastest variant"}
EXAMPLES = (0, 1, 2, 5)  # validation scenes


def draw_speed(source: pathlib.Path, path: pathlib.Path) -> None:
    """Draws a panel of bars for each row of the figures, all panels from zero, each with its own scale."""
    matplotlib.use("Agg")
    # Text stays text and identifiers the same, so that the file is small and changes with the figures alone.
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "speed", "font.size": 9})
    from matplotlib import pyplot

    table = json.loads(source.read_text())
    rows = sorted(table["rows"], key=lambda row: row["model"], reverse=True)
    figure, panels = pyplot.subplots(len(rows) // COLUMNS, COLUMNS, figsize=(10, 3.4), layout="constrained")
    for row, panel in zip(rows, panels.flat, strict=True):
        values = [row[key] for key in BARS]
        bars = panel.barh(range(len(BARS)), values, color=list(BARS.values()), height=0.75)
        panel.bar_label(bars, [f"{value:,} {table['unit']}" for value in values], padding=3)
        panel.set_title(f"TopFormer-{row['model']}: {row['what']}", fontsize=9, loc="left")
        panel.set_xlim(0, max(values) * 1.25)
        panel.invert_yaxis()
        panel.set_axis_off()
    figure.legend(
        bars.patches, [NAMES[key] for key in BARS], loc="outside upper center", ncols=3, frameon=False
    )
    figure.supxlabel(f"{table['machine']}; shorter is better", fontsize=8, color="#555555")
    figure.savefig(path, metadata={"Date": None})


def draw_shapes(checkpoint: pathlib.Path, path: pathlib.Path) -> None:
    """Draws validation scenes in columns: image, label and prediction below each other."""
    settings = config.load("topformer_t_shapes")
    source, palette = sources.open_source(settings, "validation"), sources.find_data_set(settings).palette
    predict = inference.Predictor(checkpoints.load_segmenter(settings, checkpoint))
    columns = []
    for index in EXAMPLES:
        image, label = loader.decode_example(source[index], settings)
        columns.append([image, *(drawing.colorize(each, palette) for each in (label, predict(image)))])
    rows = [[column[row] for column in columns] for row in range(3)]
    drawing.write_image(path, drawing.image_grid(rows, height=104))


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("image", choices=["speed", "shapes"], help="which one to draw")
    parser.add_argument("--checkpoint", type=pathlib.Path, metavar="PATH", help="of topformer_t_shapes")
    args = parser.parse_args()
    if args.image == "speed":
        draw_speed(FOLDER / "speed.json", FOLDER / "speed.svg")
    elif args.checkpoint is None:
        parser.error("shapes needs --checkpoint PATH")
    else:
        draw_shapes(args.checkpoint, FOLDER / "shapes.png")


if __name__ == "__main__":
    cli.run(main)
