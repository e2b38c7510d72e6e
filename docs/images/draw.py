"""Draws the images of the README.

python docs/images/draw.py speed       speed.svg, from speed.json
python docs/images/draw.py curves      curves.svg, from curves.json
python docs/images/draw.py photograph --checkpoint T.pth --picture china.jpg  photograph.jpg, by TopFormer-T of ADE20K
"""

import argparse
import json
import pathlib

import matplotlib
import PIL.Image
import PIL.ImageDraw

from topformer_jax import checkpoints, config, inference
from topformer_jax.data import codecs, sources
from topformer_jax.runtime import cli
from topformer_jax.visualize import drawing

FOLDER = pathlib.Path(__file__).parent
COLUMNS = 3  # panels side by side
BARS = {"ours": "#e06c00", "eager": "#b8bec6", "best": "#7d8794"}
NAMES = {"ours": "topformer_jax", "eager": "PyTorch, eager", "best": "PyTorch, fastest variant"}
CREDIT = "Photograph: danielbuechele, CC BY 2.0 (flickr.com/photos/danielbuechele/6061409035)"


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
    figure.legend(bars.patches, [NAMES[key] for key in BARS], loc="outside upper center", ncols=3, frameon=False)
    figure.supxlabel(f"{table['machine']}; shorter is better", fontsize=8, color="#555555")
    figure.savefig(path, metadata={"Date": None})


def draw_curves(source: pathlib.Path, path: pathlib.Path) -> None:
    """Draws the validation mIoU of training runs against their steps."""
    matplotlib.use("Agg")
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "curves", "font.size": 9})
    from matplotlib import pyplot

    table = json.loads(source.read_text())
    figure, axes = pyplot.subplots(figsize=(7, 3), layout="constrained")
    for name, points in table["runs"].items():
        axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name)
    axes.set_xlabel(table["x"])
    axes.set_ylabel(table["y"])
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, metadata={"Date": None})


def draw_photograph(checkpoint: pathlib.Path, picture: pathlib.Path, path: pathlib.Path) -> None:
    """Draws a photograph with its credit beside the overlay that `topformer_jax.predict` writes."""
    settings = config.load("topformer_t_ade")
    image = codecs.decode_image(picture.read_bytes(), str(picture))
    labels = inference.Predictor(checkpoints.load_segmenter(settings, checkpoint))(image)
    overlay = drawing.overlay(image, labels, sources.find_data_set(settings))
    height, width, _ = image.shape
    both = PIL.Image.new("RGB", (width + 8 + overlay.shape[1], overlay.shape[0]), "white")
    both.paste(PIL.Image.fromarray(image))
    both.paste(PIL.Image.fromarray(overlay), (width + 8, 0))
    PIL.ImageDraw.Draw(both).text((4, height + 12), CREDIT, "black", drawing.load_font(13))
    both.save(path, quality=82)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("image", choices=["speed", "curves", "photograph"], help="which one to draw")
    parser.add_argument("--checkpoint", type=pathlib.Path, metavar="PATH", help="of topformer_t_ade")
    parser.add_argument("--picture", type=pathlib.Path, metavar="FILE", help="the photograph")
    args = parser.parse_args()
    if args.image == "speed":
        draw_speed(FOLDER / "speed.json", FOLDER / "speed.svg")
    elif args.image == "curves":
        draw_curves(FOLDER / "curves.json", FOLDER / "curves.svg")
    elif args.checkpoint is None or args.picture is None:
        parser.error("photograph needs --checkpoint PATH and --picture FILE")
    else:
        draw_photograph(args.checkpoint, args.picture, FOLDER / "photograph.jpg")


if __name__ == "__main__":
    cli.run(main)
