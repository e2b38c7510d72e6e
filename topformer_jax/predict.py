"""Segments images: writes a colour overlay with a legend and a mask of class numbers per image.

  python -m topformer_jax.predict --config configs/topformer_b_ade.py --checkpoint B.pth --output out holiday/ '*.jpg'
  cat a.jpg | python -m topformer_jax.predict --config configs/topformer_b_ade.py --checkpoint runs/b --output out -

IMAGE is a file of any size, a folder (searched recursively), a glob pattern, or - for standard input. The command
applies the EXIF orientation, follows links and skips its own results. For DIR/a.jpg it writes
OUTPUT/a_overlay.jpg, OUTPUT/a_mask.png (palette indices are class numbers) and, with --probabilities,
OUTPUT/a_probabilities.npz (float16 [h, w, classes]).
"""

import pathlib

from topformer_jax.runtime import cli, files


def make_parser() -> cli.Parser:
    """The command's flags."""
    parser = cli.Parser(__doc__)
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="files, folders, patterns, or -")
    cli.add_weights_flags(parser)
    parser.add_argument(
        "--runtime",
        choices=["auto", "jax", "onnx"],
        help="what computes a checkpoint's network; auto (default): onnxruntime on a CPU if installed, else JAX",
    )
    parser.add_argument("--output", type=files.as_path, required=True, metavar="DIR", help="result folder")
    parser.add_argument("--probabilities", action="store_true", help="write class probabilities too")
    return parser


cli.answer_help(__name__, make_parser)

import functools
import glob
import io
import sys
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import PIL.Image

from topformer_jax.data import loader, sources
from topformer_jax.data.batch import Image, Labels
from topformer_jax.data.catalog import IMAGE_SUFFIXES
from topformer_jax.data.codecs import decode_image, describe_depth, read_depth, read_image_size
from topformer_jax.inference.predictor import ExportedPredictor, Predictor, open_predictor
from topformer_jax.runtime import logs
from topformer_jax.runtime.errors import UserError
from topformer_jax.visualize import drawing

STDIN = "-"
RESULTS = {  # how the names of an image's results end, and those of the files beside each
    "_overlay.jpg": ("_mask.png",),
    "_overlay.png": ("_mask.png",),
    "_mask.png": ("_overlay.jpg", "_overlay.png"),
    "_probabilities.npz": ("_mask.png",),
}


class ImageFile(NamedTuple):
    """An image to segment, and the path of its results below the output folder, without suffix."""

    path: str  # "-" is standard input
    output: pathlib.PurePath


class Listing(NamedTuple):
    """The images that a command line names, and what is left out."""

    images: list[ImageFile]  # each once
    others: list[str]  # files in its folders that are no images
    results: list[str]  # what this command wrote: no inputs


def list_images(arguments: Sequence[str], output: files.Path) -> Listing:
    """Lists the images that a command line names, and what is left out, such as files in the folder of results.

    Raises:
        UserError: an argument names no image, or two images have the same output.
    """
    outputs: dict[str, pathlib.PurePath] = {}
    others: list[str] = []
    results: list[str] = []
    for argument in arguments:
        if argument == STDIN:
            outputs[argument] = pathlib.PurePath("stdin")
            continue
        if files.is_in_bucket(argument):
            raise UserError(f"{argument} is in a bucket: copy it to a local disk, or pipe it to the image -")
        paths = [argument] if pathlib.Path(argument).exists() else sorted(glob.glob(argument, recursive=True))
        if not paths:
            raise UserError(f"there is no image {argument}: give files, folders, patterns, or - for stdin")
        for path in map(pathlib.Path, paths):
            if not path.is_dir():
                if _is_result(path):
                    results.append(str(path))
                else:
                    outputs[str(path)] = pathlib.PurePath(path.stem)
                continue
            found = [path / name for name in sorted(sources.list_files(path))]
            inputs = [file for file in found if not (_is_result(file) or _is_below(file, path, output))]
            results += map(str, sorted({*found}.difference(inputs)))
            images = [file for file in inputs if file.suffix.lower() in IMAGE_SUFFIXES]
            others += map(str, sorted({*inputs}.difference(images)))
            if not images and inputs == found and path == pathlib.Path(argument):
                raise UserError(f"{path} holds no image: looked for {', '.join('*' + s for s in IMAGE_SUFFIXES)}")
            outputs |= {str(image): image.relative_to(path).with_suffix("") for image in images}
    if not outputs:
        there = f"nothing but {len(results)} results of this command" if results else "no image"
        raise UserError(f"{' '.join(arguments)}: {there}: name pictures ({', '.join(IMAGE_SUFFIXES)})")
    owners: dict[pathlib.PurePath, str] = {}
    for image, base in outputs.items():
        if (owner := owners.setdefault(base, image)) != image:
            raise UserError(
                f"{owner} and {image} would both be written to {base}_mask.png: segment them one after the other, "
                "into two folders"
            )
    return Listing([ImageFile(*item) for item in outputs.items()], others, sorted({*results}))


def segment_files(
    predictor: Predictor | ExportedPredictor,
    images: Sequence[ImageFile],
    output: files.Path,
    data_set: sources.DataSet,
    *,
    probabilities: bool,
    progress: logs.Progress,
) -> list[str]:
    """Segments each image and writes its results into an existing folder.

    It skips images that cannot be read, and returns a line for each.
    """
    errors = []
    with files.WriteQueue() as writes:
        for number, (file, image) in enumerate(loader.map_in_threads(_read_image, images)):
            progress.update(number)
            if isinstance(image, UserError):
                progress.print_line(f"skipped: {image.line}")
                errors.append(image.line)
                continue
            base = output / file.output
            if probabilities:
                labels, values = predictor.with_probabilities(image)
                data = io.BytesIO()
                names = np.array(data_set.classes)
                np.savez_compressed(data, probabilities=values.astype(np.float16), classes=names)
                # At once: hundreds of megabytes an image are too many to wait for a thread.
                files.write_file(base.with_name(f"{base.name}_probabilities.npz"), data.getvalue())
            else:
                labels = predictor(image)
            writes.add(functools.partial(_write_pictures, base, image, labels, data_set))
    progress.update(len(images))
    return errors


def _is_result(path: pathlib.Path) -> bool:
    """Whether a file is a result beside another one of the same image, by their names."""
    for end, partners in RESULTS.items():
        if path.name.endswith(end):
            base = path.name.removesuffix(end)
            return any(path.with_name(base + partner).exists() for partner in partners)
    return False


def _is_below(file: pathlib.Path, folder: pathlib.Path, output: files.Path) -> bool:
    """Whether a file is in an output folder that lies below a folder: an interrupted run leaves single results."""
    if files.is_in_bucket(output):
        return False
    inside = output.resolve()
    return folder.resolve() in inside.parents and inside in file.resolve().parents


def _read_image(file: ImageFile) -> tuple[ImageFile, Image | UserError]:
    """Reads and decodes an image, or returns the error."""
    name = "standard input" if file.path == STDIN else file.path
    try:
        data = sys.stdin.buffer.read() if file.path == STDIN else pathlib.Path(file.path).read_bytes()
        image = decode_image(data, name)
        if words := describe_depth(read_depth(data, name)):
            raise UserError(f"{name} has {words}")
        return file, image
    except OSError as error:
        return file, UserError(f"{file.path} cannot be read: {error.strerror or error}")
    except UserError as error:
        return file, error


def _write_pictures(base: files.Path, image: Image, labels: Labels, data_set: sources.DataSet) -> None:
    """Writes an image's overlay and mask."""
    overlay = drawing.overlay(image, labels, data_set)
    suffix = "jpg" if max(overlay.shape) <= drawing.MAX_JPEG_SIDE else "png"
    drawing.write_image(base.with_name(f"{base.name}_overlay.{suffix}"), overlay)
    drawing.write_labels(base.with_name(f"{base.name}_mask.png"), labels, data_set.palette)


def main() -> None:
    """The command."""
    args, config = make_parser().parse()
    assert config is not None  # --config is required
    images, others, results = list_images(args.images, args.output)
    for why, left_out in (("not an image", others), ("written by this command", results)):
        if left_out:
            more = ", ..." if len(left_out) > 3 else ""
            print(f"skipped, {why}: {len(left_out)} files ({', '.join(left_out[:3])}{more})")
    with warnings.catch_warnings(action="ignore", category=PIL.Image.DecompressionBombWarning):
        found = list(loader.map_in_threads(read_image_size, [image.path for image in images]))
    sizes = [size for size in found if size is not None]
    predictor = open_predictor(config, args, image_sizes=sizes)
    if args.checkpoint and predictor.runtime != "jax":
        print(f"runtime: {predictor.runtime} (--runtime jax for JAX)")
    files.make_folder(args.output)
    data_set = sources.find_data_set(config, predictor.classes, predictor.palette)
    with logs.Progress(len(images), "images") as progress:
        errors = segment_files(
            predictor, images, args.output, data_set, probabilities=args.probabilities, progress=progress
        )
    if errors:
        raise UserError(f"{len(errors)} of {len(images)} images could not be read; the others are in {args.output}")
    print(f"wrote {len(images)} overlays and masks into {args.output}")


if __name__ == "__main__":
    cli.run(main)
