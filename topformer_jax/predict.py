"""Segments pictures: a colour overlay with a legend, and a mask of class numbers, for each.

  python -m topformer_jax.predict --config configs/topformer_b_ade.py --checkpoint B.pth --output out holiday/ '*.jpg'
  cat a.jpg | python -m topformer_jax.predict --config configs/topformer_b_ade.py --checkpoint runs/b --output out -

A picture is a file, a folder (with those below it), a pattern, or - for standard input, of any size; its EXIF
orientation is respected. For DIR/a.jpg it writes OUTPUT/a_overlay.jpg, OUTPUT/a_mask.png (palette indices are class
numbers) and, with --probabilities, OUTPUT/a_probabilities.npz (float16 [h, w, classes]).
"""

import glob
import io
import pathlib
import sys
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from topformer_jax import checkpoint as checkpoint_lib
from topformer_jax import cli, convert, files, inference, logs, models, pictures
from topformer_jax.data import loader, sources
from topformer_jax.data.codecs import decode_image
from topformer_jax.errors import UserError

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")  # looked for in folders


class Job(NamedTuple):
    """One picture, and what its outputs are called: a path below the output folder, without suffix."""

    picture: str
    output: pathlib.PurePath


def jobs(arguments: Sequence[str]) -> tuple[list[Job], list[str]]:
    """What a command line's pictures are, each once, and the files of its folders that are no pictures.

    Raises:
        UserError: there is nothing at one of them, or two would be written to the same place.
    """
    found: dict[str, pathlib.PurePath] = {}
    others: list[str] = []
    for argument in arguments:
        if argument == "-":
            found[argument] = pathlib.PurePath("stdin")
            continue
        paths = [argument] if pathlib.Path(argument).exists() else sorted(glob.glob(argument, recursive=True))
        if not paths:
            raise UserError(f"there is no picture {argument}: give files, folders, patterns, or - for stdin")
        for path in map(pathlib.Path, paths):
            if not path.is_dir():
                found[str(path)] = pathlib.PurePath(path.stem)
                continue
            inside = sorted(p for p in path.rglob("*") if p.is_file() and not p.name.startswith("."))
            chosen = [p for p in inside if p.suffix.lower() in SUFFIXES]
            others += [str(p) for p in inside if p not in set(chosen)]
            if not chosen and path == pathlib.Path(argument):
                raise UserError(f"{path} holds no picture: looked for {', '.join('*' + s for s in SUFFIXES)}")
            found |= {str(p): p.relative_to(path).with_suffix("") for p in chosen}
    owner: dict[pathlib.PurePath, str] = {}
    for picture, output in found.items():
        if output in owner:
            raise UserError(
                f"{owner[output]} and {picture} would both be written to {output}_mask.png: segment them one "
                "after the other, into two folders"
            )
        owner[output] = picture
    return [Job(*pair) for pair in found.items()], others


def predict(
    predictor: inference.Predictor,
    work: Sequence[Job],
    output: pathlib.Path,
    data_set: sources.DataSet,
    *,
    probabilities: bool,
    show: logs.Progress,
) -> list[str]:
    """Segments every picture and writes what is asked for; returns the lines of those that cannot be read."""
    failed = []
    for number, (job, image) in enumerate(loader.map_in_threads(_read, work)):
        show.update(number)
        if isinstance(image, UserError):
            show.say(f"left out: {image.line}")
            failed.append(image.line)
            continue
        labels, values = predictor.with_probabilities(image) if probabilities else (predictor(image), None)
        base = output / job.output
        overlay = pictures.overlay(image, labels, data_set)
        suffix = "jpg" if max(overlay.shape) <= pictures.JPEG_SIDE else "png"
        pictures.write(base.with_name(f"{base.name}_overlay.{suffix}"), overlay)
        pictures.write_indexed(base.with_name(f"{base.name}_mask.png"), labels, data_set.palette)
        if values is not None:
            packed = io.BytesIO()
            small = values.astype(np.float16)
            np.savez_compressed(packed, probabilities=small, classes=np.array(data_set.classes))
            files.write(base.with_name(f"{base.name}_probabilities.npz"), packed.getvalue())
    show.update(len(work))
    return failed


def _read(job: Job) -> tuple[Job, np.ndarray | UserError]:
    try:
        data = sys.stdin.buffer.read() if job.picture == "-" else pathlib.Path(job.picture).read_bytes()
        return job, decode_image(data, "standard input" if job.picture == "-" else job.picture)
    except OSError as error:
        return job, UserError(f"{job.picture} cannot be read: {error.strerror or error}")
    except UserError as error:
        return job, error


def main() -> None:
    """The command."""
    parser = cli.Parser(__doc__)
    parser.add_argument("pictures", nargs="+", metavar="PICTURE", help="files, folders, patterns, or -")
    parser.add_argument("--checkpoint", required=True, metavar="PATH", help=".pth file or checkpoint folder")
    parser.add_argument("--output", type=pathlib.Path, required=True, metavar="DIR", help="where results go")
    parser.add_argument("--probabilities", action="store_true", help="write the classes' probabilities too")
    args, config = parser.parse()
    assert config is not None  # --config is required
    work, others = jobs(args.pictures)
    if others:
        more = ", ..." if len(others) > 3 else ""
        print(f"left out, no pictures: {len(others)} files ({', '.join(others[:3])}{more})")
    model = models.build_segmenter(config)
    tensors, _ = convert.read(args.checkpoint, model, config)
    checkpoint_lib.load_state_dict(model, tensors)
    files.make_folder(args.output)
    predictor = inference.Predictor(model, config.evaluation)
    with logs.Progress(len(work), "pictures") as show:
        failed = predict(
            predictor,
            work,
            args.output,
            sources.data_set(config),
            probabilities=args.probabilities,
            show=show,
        )
    if failed:
        raise UserError(
            f"{len(failed)} of {len(work)} pictures could not be read; the others are in {args.output}"
        )
    print(f"wrote {len(work)} overlays and masks into {args.output}")


if __name__ == "__main__":
    cli.run(main)
