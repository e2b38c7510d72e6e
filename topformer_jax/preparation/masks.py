"""Masks in files: in colours, of CVAT, of Roboflow, and VOC's folders."""

import csv
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import partial

from topformer_jax import files
from topformer_jax.data.batch import IGNORE_LABEL
from topformer_jax.data.catalog import CATALOG
from topformer_jax.data.codecs import read_palette
from topformer_jax.errors import UserError
from topformer_jax.preparation import labels, own
from topformer_jax.preparation.archives import Archive, Member
from topformer_jax.preparation.own import Annotations
from topformer_jax.preparation.writer import Convert

_PICTURES = ("images", "jpegimages", "img", "image")  # folders, in lower case
_MASK_ENDS = ("", "_mask", "-mask", "_label", "_gt")  # that a mask's name may have behind its picture's
_MASK_SUFFIXES = (".png", ".bmp", ".tif", ".tiff", ".webp")  # without loss


def read_colours(source: Archive, background: str) -> Annotations:
    """Pictures below images/, masks of their names below masks/, and classes.txt with NAME RED GREEN BLUE lines.

    Raises:
        UserError: a line is wrong, a colour is there twice, or a picture has no mask.
    """
    listing = _take(source, own.CLASSES)
    rows = []
    for line in source.lines(own.CLASSES):
        words = line.split()
        rows.append((" ".join(words[:-3]), words[-3:], line))
    return _read_masks_in_colours(source, background, listing, rows, ("masks",), is_complete=True)


def read_cvat(source: Archive, background: str) -> Annotations:
    """CVAT's "Segmentation mask": labelmap.txt, JPEGImages/, SegmentationClass/ and, of several subsets, ImageSets/.

    Raises:
        UserError: labelmap.txt is wrong, or there are no pictures.
    """
    listing = _take(source, "labelmap.txt")
    rows = []
    for line in source.lines("labelmap.txt"):
        if line.startswith("#"):
            continue
        name, colour, *_ = [*line.rsplit(":", 3), "", ""] if line.count(":") > 2 else [line, ""]
        rows.append(
            (name, colour.split(","), line)
            if colour
            else (" ".join(line.split()[:-3]), line.split()[-3:], line)
        )
    folders = ("segmentationclass",)
    return _read_masks_in_colours(source, background, listing, rows, folders, is_complete=False)


def _read_masks_in_colours(
    source: Archive,
    background: str,
    listing: Member,
    rows: Sequence[tuple[str, Sequence[str], str]],
    folders: Sequence[str],
    *,
    is_complete: bool,
) -> Annotations:
    """The pairs of pictures and masks whose colours a file lists: (name, (red, green, blue), line) of each."""
    colours: dict[labels.Colour, str] = {}
    for name, numbers, line in rows:
        if not name or len(numbers) != 3 or not all(word.isdecimal() and int(word) < 256 for word in numbers):
            raise UserError(f"{listing.where}: expected NAME RED GREEN BLUE (0 to 255), found {line[:60]!r}")
        red, green, blue = map(int, numbers)
        if other := colours.get((red, green, blue)):
            raise UserError(
                f"{listing.where} gives {files.shorten(other, 40)} and {files.shorten(name, 40)} one colour, {red} "
                f"{green} {blue}: masks cannot tell them apart"
            )
        colours[red, green, blue] = name
    names = list(dict.fromkeys(name for name in colours.values() if name.lower() != own.VOID))
    void = IGNORE_LABEL
    if background:
        names, void = own.add_background(names, background, (), listing.where)
    classes = own.list_classes(names, listing.where)
    table = {
        colour: void if name.lower() == own.VOID else classes.index(name) for colour, name in colours.items()
    }
    found = Annotations(source, classes, read={listing})
    convert = partial(labels.map_colours, table, None)
    _pair(
        found, _in_folders(source, _PICTURES), _in_folders(source, folders), convert, is_complete=is_complete
    )
    return found


def read_roboflow(source: Archive, background: str) -> Annotations:
    """Roboflow's PNG masks: in each split's folder _classes.csv, pictures, and NAME_mask.png of pixel values.

    Raises:
        UserError: there is no _classes.csv, or they differ.
    """
    listings = {
        name: member for name, member in source.members.items() if name.rpartition("/")[2] == "_classes.csv"
    }
    if not listings:
        raise UserError(
            f"{source.path} holds no _classes.csv, as Roboflow writes it ({own.describe(source)})"
        )
    values: dict[int, str] | None = None
    for name, member in listings.items():
        these: dict[int, str] = {}
        rows = [[cell.strip() for cell in row] for row in csv.reader(source.lines(name)) if row]
        for row in rows:
            if len(row) != 2 or not (row[0].isdecimal() or row is rows[0]):
                raise UserError(f"{member.where}: expected PIXEL VALUE,CLASS, found {','.join(row)[:60]!r}")
            if row[0].isdecimal():
                if int(row[0]) in these or int(row[0]) > IGNORE_LABEL:
                    raise UserError(
                        f"{member.where}: the value {files.shorten(row[0], 20)} is there twice, or is above 255"
                    )
                these[int(row[0])] = row[1]
        if values not in (None, these):
            raise UserError(
                f"{member.where} has other classes than {next(iter(listings))}: give all the same"
            )
        values = these
    names, table = _number(values or {}, background, next(iter(listings.values())).where)
    found = Annotations(source, names, read=set(listings.values()))
    masks = {name: key for name in source.members if (key := _mask_key(name)) and own.stem_of(name) != key}
    pictures = {
        name: own.stem_of(name) for name in filter(own.is_picture, source.members) if name not in masks
    }
    _pair(found, pictures, masks, partial(labels.map_values, table), is_complete=False)
    return found


def _mask_key(name: str) -> str:
    """The path of the picture that a mask of Roboflow belongs to, without its suffix."""
    stem = own.stem_of(name)
    return stem.removesuffix("_mask") if name.lower().endswith(".png") else ""


def _number(values: Mapping[int, str], background: str, where: str) -> tuple[list[str], dict[int, int]]:
    """The classes in the order of their values, and the label of each value; those named void are void."""
    values = dict(sorted(values.items()))
    names = list(dict.fromkeys(name for name in values.values() if name.lower() != own.VOID))
    void = IGNORE_LABEL
    if background:
        names, void = own.add_background(names, background, (), where)
    names = own.list_classes(names, where)
    table = {value: void if name.lower() == own.VOID else names.index(name) for value, name in values.items()}
    return names, {IGNORE_LABEL: void} | table


def read_voc(source: Archive, background: str) -> Annotations:
    """VOC's folders: JPEGImages/, palette masks in SegmentationClass/, lists in ImageSets/Segmentation/.

    A list of names (classes.txt, class_names.txt, labels.txt) numbers the classes; else they are VOC's 21.

    Raises:
        UserError: there are no masks, or their palettes differ.
    """
    present = {part.lower() for name in source.members for part in name.split("/")[:-1]}
    folder = next(
        (f for f in ("segmentationclasspng", "segmentationclassaug") if f in present), "segmentationclass"
    )
    lists = (own.CLASSES, "class_names.txt", "labels.txt")
    listed = next((name for name in lists if name in source.members), "")
    lines = source.lines(listed) if listed else list(CATALOG["voc2012"].classes)
    where = source[listed].where if listed else "PASCAL VOC"
    values = dict(enumerate(name for name in lines if name != "__ignore__"))
    names, table = _number(values, background, where)
    found = Annotations(source, names, read={source[listed]} if listed else set())
    if not listed:
        found.notes.append("no classes.txt: the classes are the 21 of PASCAL VOC")
    masks = _in_folders(source, (folder,))
    palettes: dict[bytes, str] = {}
    for name in masks:
        if name.lower().endswith(".png"):
            palette = read_palette(source[name].read())
            for other, first in palettes.items():
                if palette[: len(other)] != other[: len(palette)]:
                    raise UserError(
                        f"{first} and {name} have different palettes, so one value may be two classes: make them one"
                    )
            palettes.setdefault(palette, name)
    _pair(found, _in_folders(source, _PICTURES), masks, partial(labels.map_values, table), is_complete=False)
    return found


def _take(source: Archive, name: str) -> Member:
    if name not in source.members:
        raise UserError(f"{source.path} holds no {name}: put it there ({own.describe(source)})")
    return source.members[name]


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
    """Adds the pairs of pictures and masks of one key.

    Args:
        found: to which they are added.
        pictures: the key of each picture's path.
        masks: the key of each mask's.
        convert: makes a label of a mask.
        is_complete: whether a picture without a mask is an error.

    Raises:
        UserError: a picture has two masks, or none.
    """
    source = found.source
    by_key: dict[str, list[str]] = defaultdict(list)
    for name, key in masks.items():
        by_key[key].append(name)
    left = dict(masks)
    without = []
    for name, key in pictures.items():
        keys: Iterable[str] = (*(key + end for end in _MASK_ENDS), key + name[len(own.stem_of(name)) :])
        mine = [mask for each in keys for mask in by_key.get(each, ())]
        if len(mine) > 1:
            raise UserError(
                f"{source[name].where} has two masks, {mine[0]} and {mine[1]}: remove one of them"
            )
        if not mine:
            without.append(name)
            continue
        left.pop(mine[0], None)
        sized = partial(labels.convert_mask, convert, source[name])
        found.pairs.append(own.make_pair(name, source[name], source[mine[0]], sized))
    if not found.pairs or (without and is_complete):
        expected = f"{without[0]} has no mask, of its name" if without else "no picture has a mask"
        raise UserError(
            f"{source.path}: {expected} and with one of {', '.join(_MASK_SUFFIXES)}; there are {len(pictures)} "
            f"pictures and {len(masks)} masks"
        )
    found.leave_out("pictures without a mask", (source[name] for name in without))
    found.leave_out("masks without a picture", (source[name] for name in left))
