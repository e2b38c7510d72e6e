"""Masks in files: in colours, of CVAT, of Roboflow, and VOC's folders."""

import csv
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np

from topformer_jax.data.batch import IGNORE_LABEL
from topformer_jax.data.catalog import CATALOG, Colour
from topformer_jax.data.codecs import read_label_values, read_palette
from topformer_jax.preparation import labels, own
from topformer_jax.preparation.archives import Archive
from topformer_jax.preparation.own import Annotations, Pair
from topformer_jax.preparation.writer import Convert
from topformer_jax.runtime import files
from topformer_jax.runtime.errors import UserError

_PICTURES = ("images", "jpegimages", "img", "image")  # folders, in lower case
_MASK_ENDS = ("_mask", "-mask", "_label", "_gt")  # that a mask's name may have behind its picture's
# NAME RED GREEN BLUE, or CVAT's NAME:RED,GREEN,BLUE:PARTS:ACTIONS
_COLOUR = re.compile(r"(.*\S)(?:\s+|:)(\d{1,3})[\s,]+(\d{1,3})[\s,]+(\d{1,3})(:[^:]*:[^:]*)?", re.ASCII)


def read_colours(listing: str, folder: str, source: Archive, background: str) -> Annotations:
    """Reads pictures, masks of their names below a folder, and a file that lists the colour of each class.

    With labelmap.txt this is CVAT's "Segmentation mask", in which pictures may be without a mask.
    """
    annotations, colours = Annotations(source), dict[Colour, str]()
    lines, where = annotations.read_classes(listing, required=True)
    for line in lines:
        match = _COLOUR.fullmatch(line)
        if line.startswith("#") and listing != own.CLASSES:
            continue
        red, green, blue = map(int, match.groups()[1:4]) if match else (256, 0, 0)
        if not match or max(red, green, blue) > 255:
            raise UserError(f"{where}: expected NAME RED GREEN BLUE (0 to 255), found {line[:60]!r}")
        if other := colours.get((red, green, blue)):
            raise UserError(
                f"{where} gives {files.shorten(other, 40)} and {files.shorten(match[1], 40)} one colour, {red} "
                f"{green} {blue}: masks cannot tell them apart"
            )
        colours[red, green, blue] = match[1]
    if background and own.VOID not in map(str.lower, colours.values()):
        raise UserError(
            f"{where}: no colour is {own.VOID}, so there is nothing for --background {background}: leave it out"
        )
    annotations.classes, table, _ = own.number_classes(colours, background, where, of_masks=True)
    convert = partial(labels.map_colours, table)
    pictures, drawn = _in_folders(source, _PICTURES), _in_folders(source, (folder,))
    _pair(annotations, pictures, drawn, convert, is_complete=listing == own.CLASSES)
    return annotations


def read_roboflow(source: Archive, background: str) -> Annotations:
    """Reads Roboflow's PNG masks: each split's folder has _classes.csv, pictures and NAME_mask.png of values."""
    annotations = Annotations(source)
    lines, where = annotations.read_classes("_classes.csv", required=True)
    values: dict[int, str] = {}
    rows = [[cell.strip() for cell in row] for row in csv.reader(lines) if row]
    for number, row in enumerate(rows):
        is_value = re.fullmatch(r"\d{1,9}", row[0], re.ASCII)
        if len(row) != 2 or not (is_value or number == 0):
            raise UserError(f"{where}: expected PIXEL VALUE,CLASS, found {','.join(row)[:60]!r}")
        if is_value and (int(row[0]) in values or int(row[0]) > IGNORE_LABEL):
            raise UserError(f"{where}: the value {row[0]} is there twice, or is above 255")
        if is_value:
            values[int(row[0])] = row[1]
    values = dict(sorted(values.items()))
    annotations.classes, table, _ = own.number_classes(values, background, where, of_masks=True)
    stems = {name: own.stem_of(name) for name in filter(own.is_picture, source.members)}
    masks = {name: stem for name, stem in stems.items() if name.lower().endswith("_mask.png")}
    pictures = {name: stem for name, stem in stems.items() if name not in masks}
    _pair(annotations, pictures, masks, partial(labels.map_values, table))
    return annotations


def read_voc(source: Archive, background: str) -> Annotations:
    """Reads VOC's folders: JPEGImages/, palette masks in SegmentationClass/, lists in ImageSets/Segmentation/.

    A list of names (classes.txt, class_names.txt, labels.txt) numbers the classes; without one they are VOC's 21.
    """
    annotations = Annotations(source)
    lines, where = annotations.read_classes(own.CLASSES, "class_names.txt", "labels.txt", is_order=True)
    if not where:
        lines, where = list(CATALOG["voc2012"].classes), "PASCAL VOC"
        annotations.notes.append("no classes.txt: the classes are the 21 of PASCAL VOC")
    values = {IGNORE_LABEL: own.VOID} | dict(enumerate(name for name in lines if name != "__ignore__"))
    annotations.classes, table, _ = own.number_classes(values, background, where, of_masks=True)
    masks = _in_folders(source, ("segmentationclasspng",), ("segmentationclass",))
    _compare_palettes(source, [name for name in masks if name.lower().endswith(".png")])
    _pair(annotations, _in_folders(source, _PICTURES), masks, partial(labels.map_values, table))
    return annotations


def _compare_palettes(source: Archive, masks: Sequence[str]) -> None:
    """Raises UserError if two masks show a value in two colours, or if one has no palette and another has one."""
    palettes = {name: read_palette(source[name].read()) for name in masks}
    of_palette = {palette: name for name, palette in palettes.items()}
    if len(of_palette) > 1 and b"" in of_palette:
        grey, other = of_palette.pop(b""), next(iter(of_palette.values()))
        raise UserError(f"{grey} is grey and {other} has a palette, so a value may be two classes: make them one")
    colours: dict[int, tuple[bytes, str]] = {}
    for name, palette in palettes.items() if len(of_palette) > 1 else ():
        for value in np.unique(read_label_values(source[name].read(), source[name].where)).tolist():
            colour = palette[3 * value : 3 * value + 3]
            first, other = colours.setdefault(value, (colour, name))
            if first != colour:
                raise UserError(
                    f"{other} and {name} have different palettes, so {value} may be two classes: make them one"
                )


def _in_folders(source: Archive, *choices: Sequence[str]) -> dict[str, str]:
    """Returns pictures below the first of these folders that have any, with their paths without folder and suffix."""
    found = {}
    for folders in choices:
        for name in filter(own.is_picture, source.members):
            parts = name.split("/")
            place = next((index for index, part in enumerate(parts[:-1]) if part.lower() in folders), None)
            if place is not None:
                found[name] = own.stem_of("/".join([*parts[:place], *parts[place + 1 :]]))
        if found:
            return found
    raise UserError(f"{source.path} has no picture below {' or '.join(choices[-1])}/ ({own.describe(source)})")


def _pair(
    annotations: Annotations,
    pictures: Mapping[str, str],
    masks: Mapping[str, str],
    convert: Convert,
    is_complete: bool = False,
) -> None:
    """Adds the pairs of pictures and masks of one key, by their paths, and counts the others.

    With `is_complete`, each picture that is not of test must have a mask.
    """
    source, by_key, without = annotations.source, defaultdict[str, list[str]](list), []
    for name, key in masks.items():
        by_key[key].append(name)
    left = {*masks}
    taken = {*pictures.values()}  # a mask of the very name of a picture is of no other one
    for name, key in pictures.items():
        keys = [key + end for end in (*_MASK_ENDS, name[len(own.stem_of(name)) :])]
        mine = [mask for each in (key, *(k for k in keys if k not in taken)) for mask in by_key.get(each, ())]
        if len(mine) > 1:
            raise UserError(f"{source[name].where} has two masks, {mine[0]} and {mine[1]}: remove one")
        if not mine:
            without.append(name)
            continue
        left.discard(mine[0])
        sized = partial(labels.convert_mask, convert, source[name])
        annotations.pairs.append(Pair(name, source[name], source[mine[0]], sized))
    lacking = [name for name in without if is_complete and own.split_of_folders(name) != "test"]
    if lacking or not annotations.pairs:
        shown = f"{files.shorten(lacking[0])} has no mask" if lacking else "no picture has a mask"
        rest = f", such as {files.shorten(min(left))}" if left else ""
        raise UserError(
            f"{source.path}: {shown} of its name, with or without {', '.join(_MASK_ENDS)}; there are "
            f"{len(pictures)} pictures and {len(masks)} masks{rest}"
        )
    annotations.leave_out("without a mask", (source[name] for name in without))
    annotations.leave_out("without a picture", (source[name] for name in masks if name in left), own.LABELS)
