"""Masks in files: in colours, of CVAT, of Roboflow, and VOC's folders."""

import csv
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np

from topformer_jax import files
from topformer_jax.data.batch import IGNORE_LABEL
from topformer_jax.data.catalog import CATALOG
from topformer_jax.data.codecs import read_label_values, read_palette
from topformer_jax.errors import UserError
from topformer_jax.preparation import labels, own
from topformer_jax.preparation.archives import Archive
from topformer_jax.preparation.own import Annotations, Pair
from topformer_jax.preparation.writer import Convert

_PICTURES = ("images", "jpegimages", "img", "image")  # folders, in lower case
_MASK_ENDS = ("_mask", "-mask", "_label", "_gt")  # that a mask's name may have behind its picture's
_MASK_SUFFIXES = (".png", ".bmp", ".tif", ".tiff", ".webp")  # without loss
# NAME RED GREEN BLUE, or CVAT's NAME:RED,GREEN,BLUE:PARTS:ACTIONS
_COLOUR = re.compile(r"(.*\S)(?:\s+|:)(\d{1,3})[\s,]+(\d{1,3})[\s,]+(\d{1,3})(:[^:]*:[^:]*)?", re.ASCII)


def read_colours(source: Archive, background: str) -> Annotations:
    """Pictures below images/, masks of their names below masks/, and classes.txt with NAME RED GREEN BLUE lines.

    Raises:
        UserError: a line is wrong, a colour is there twice, or a picture has no mask.
    """
    return _read_masks_in_colours(source, background, own.CLASSES, "masks", is_complete=True)


def read_cvat(source: Archive, background: str) -> Annotations:
    """CVAT's "Segmentation mask": labelmap.txt, JPEGImages/, SegmentationClass/ and, of several subsets, ImageSets/.

    Raises:
        UserError: labelmap.txt is wrong, or there are no pictures.
    """
    return _read_masks_in_colours(source, background, "labelmap.txt", "segmentationclass", is_complete=False)


def _read_masks_in_colours(
    source: Archive, background: str, listing: str, folder: str, *, is_complete: bool
) -> Annotations:
    """The pairs of pictures and masks whose colours a file lists."""
    if listing not in source.members:
        raise UserError(f"{source.path} holds no {listing}: put it there ({own.describe(source)})")
    where, colours = source[listing].where, dict[labels.Colour, str]()
    for line in source.lines(listing):
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
    classes, table, _ = own.number_classes(colours, background, where, of_masks=True)
    found = Annotations(source, classes, read={source[listing]})
    convert = partial(labels.map_colours, table, None)
    _pair(
        found,
        _in_folders(source, _PICTURES),
        _in_folders(source, (folder,)),
        convert,
        is_complete=is_complete,
    )
    return found


def read_roboflow(source: Archive, background: str) -> Annotations:
    """Roboflow's PNG masks: in each split's folder _classes.csv, pictures, and NAME_mask.png of pixel values.

    Raises:
        UserError: there is no _classes.csv, or they differ.
    """
    listings = [name for name in source.members if name.rpartition("/")[2] == "_classes.csv"]
    if not listings:
        raise UserError(
            f"{source.path} holds no _classes.csv, as Roboflow writes it ({own.describe(source)})"
        )
    contents = {name: _read_values(source, name) for name in listings}
    first = contents[listings[0]]
    if other := next((name for name in listings if contents[name] != first), ""):
        raise UserError(f"{source[other].where} has other classes than {listings[0]}: give all the same")
    values = {IGNORE_LABEL: own.VOID} | first
    names, table, _ = own.number_classes(values, background, source[listings[0]].where, of_masks=True)
    found = Annotations(source, names, read={source[name] for name in listings})
    masks = {name: own.stem_of(name) for name in source.members if name.lower().endswith("_mask.png")}
    pictures = {
        name: own.stem_of(name) for name in filter(own.is_picture, source.members) if name not in masks
    }
    _pair(found, pictures, masks, partial(labels.map_values, table), is_complete=False)
    return found


def _read_values(source: Archive, name: str) -> dict[int, str]:
    """The class of each value that a _classes.csv lists, in the order of the values."""
    found: dict[int, str] = {}
    rows = [[cell.strip() for cell in row] for row in csv.reader(source.lines(name)) if row]
    for number, row in enumerate(rows):
        is_value = re.fullmatch(r"\d{1,9}", row[0], re.ASCII)
        if len(row) != 2 or not (is_value or number == 0):
            raise UserError(f"{source[name].where}: expected PIXEL VALUE,CLASS, found {','.join(row)[:60]!r}")
        if is_value and (int(row[0]) in found or int(row[0]) > IGNORE_LABEL):
            raise UserError(f"{source[name].where}: the value {row[0]} is there twice, or is above 255")
        if is_value:
            found[int(row[0])] = row[1]
    return dict(sorted(found.items()))


def read_voc(source: Archive, background: str) -> Annotations:
    """VOC's folders: JPEGImages/, palette masks in SegmentationClass/, lists in ImageSets/Segmentation/.

    A list of names (classes.txt, class_names.txt, labels.txt) numbers the classes; else they are VOC's 21.

    Raises:
        UserError: there are no masks, or one value of them is in two colours.
    """
    lists = (own.CLASSES, "class_names.txt", "labels.txt")
    listed = next((name for name in lists if name in source.members), "")
    lines = source.lines(listed, by_place=True) if listed else list(CATALOG["voc2012"].classes)
    where = source[listed].where if listed else "PASCAL VOC"
    values = {IGNORE_LABEL: own.VOID} | dict(enumerate(name for name in lines if name != "__ignore__"))
    names, table, _ = own.number_classes(values, background, where, of_masks=True)
    found = Annotations(source, names, read={source[listed]} if listed else set())
    if not listed:
        found.notes.append("no classes.txt: the classes are the 21 of PASCAL VOC")
    masks = _in_folders(source, ("segmentationclasspng",)) or _in_folders(source, ("segmentationclass",))
    _compare_palettes(source, [name for name in masks if name.lower().endswith(".png")])
    _pair(found, _in_folders(source, _PICTURES), masks, partial(labels.map_values, table), is_complete=False)
    return found


def _compare_palettes(source: Archive, masks: Sequence[str]) -> None:
    """Raises a UserError for two masks that show a value in two colours, or of which one has no palette."""
    palettes = {name: read_palette(source[name].read()) for name in masks}
    of_palette = {palette: name for name, palette in palettes.items()}
    if len(of_palette) > 1 and b"" in of_palette:
        grey, other = of_palette.pop(b""), next(iter(of_palette.values()))
        raise UserError(
            f"{grey} is grey and {other} has a palette, so a value may be two classes: make them one"
        )
    colours: dict[int, tuple[bytes, str]] = {}
    for name, palette in palettes.items() if len(of_palette) > 1 else ():
        for value in np.unique(read_label_values(source[name].read(), source[name].where)).tolist():
            colour = palette[3 * value : 3 * value + 3]
            first, other = colours.setdefault(value, (colour, name))
            if first != colour:
                raise UserError(
                    f"{other} and {name} have different palettes, so {value} may be two classes: make them one"
                )


def _in_folders(source: Archive, folders: Sequence[str]) -> dict[str, str]:
    """Pictures that lie below one of these folders: their paths without this folder and the suffix."""
    found = {}
    for name in filter(own.is_picture, source.members):
        parts = name.split("/")
        place = next((index for index, part in enumerate(parts[:-1]) if part.lower() in folders), None)
        if place is not None:
            found[name] = own.stem_of("/".join([*parts[:place], *parts[place + 1 :]]))
    return found


def _pair(
    found: Annotations,
    pictures: Mapping[str, str],
    masks: Mapping[str, str],
    convert: Convert,
    *,
    is_complete: bool,
) -> None:
    """Adds the pairs of pictures and masks of one key, by their paths; `is_complete` refuses a picture without one.

    Raises:
        UserError: a picture has two masks, or none.
    """
    source, by_key, without = found.source, defaultdict[str, list[str]](list), []
    for name, key in masks.items():
        by_key[key].append(name)
    left = {*masks}
    taken = {*pictures.values()}  # a mask of the very name of a picture is of no other one
    for name, key in pictures.items():
        keys = [key + end for end in (*_MASK_ENDS, name[len(own.stem_of(name)) :])]
        mine = [mask for each in (key, *(k for k in keys if k not in taken)) for mask in by_key.get(each, ())]
        if len(mine) > 1:
            raise UserError(
                f"{source[name].where} has two masks, {mine[0]} and {mine[1]}: remove one of them"
            )
        if not mine:
            without.append(name)
            continue
        left.discard(mine[0])
        sized = partial(labels.convert_mask, convert, source[name])
        found.pairs.append(Pair(name, source[name], source[mine[0]], sized))
    if not found.pairs or (without and is_complete):
        expected = f"{without[0]} has no mask, of its name" if without else "no picture has a mask"
        raise UserError(
            f"{source.path}: {expected} and with one of {', '.join(_MASK_SUFFIXES)}; there are {len(pictures)} "
            f"pictures and {len(masks)} masks"
        )
    found.leave_out("without a mask", (source[name] for name in without))
    found.leave_out("without a picture", (source[name] for name in masks if name in left), own.LABELS)
