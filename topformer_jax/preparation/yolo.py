"""Polygons of YOLO (Ultralytics): data.yaml, and a .txt for each picture below labels/ or beside it."""

import math
import pathlib
from collections import Counter
from collections.abc import Mapping
from functools import partial

import msgspec

from topformer_jax.data.batch import IGNORE_LABEL
from topformer_jax.data.transforms import Size
from topformer_jax.preparation import coco, labels, own
from topformer_jax.preparation.archives import Archive, Member, hold
from topformer_jax.preparation.own import Annotations, Pair
from topformer_jax.runtime import files
from topformer_jax.runtime.errors import UserError

_BOXES = "boxes without a polygon, whose pixels are void"


class Settings(msgspec.Struct):
    """The content of a data.yaml; paths are of folders, or of lists of pictures."""

    names: dict[int, str | int] | list[str | int] | None = None
    train: str | list[str] | None = None
    val: str | list[str] | None = None
    test: str | list[str] | None = None
    nc: int | None = None
    kpt_shape: list[int] | None = None


def read(source: Archive, background: str) -> Annotations:
    """Finds the pictures and their polygons; a picture without a .txt is background, as for Ultralytics."""
    labels.require_pycocotools()
    annotations = Annotations(source)
    settings, where = _read_settings(annotations)
    names = settings.names or []
    rows = dict(enumerate(names)) if isinstance(names, list) else dict(sorted(names.items()))
    named = {number: str(name) for number, name in rows.items()}
    annotations.classes, table, empty = own.number_classes(named, background, where, coco.BACKGROUNDS)
    counts: Counter[str] = Counter()
    texts, polygons = set(), 0
    for name in filter(own.is_picture, source.members):
        image = source[name]
        text = next((path for path in _label_names(name) if path in source.members), "")
        texts.add(text)
        label = source[text] if text else hold(f"{image.where} (no .txt)")
        data = label.read()
        polygons += len(parse_regions(data, table, label.where, counts))
        counts["pictures with an empty .txt, all background"] += bool(text) and not data.strip()
        annotations.pairs.append(Pair(name, image, label, partial(_draw, table, empty, image)))
    if texts <= {""}:
        raise UserError(
            f"{source.path} holds no .txt of polygons below labels/ or beside a picture ({own.describe(source)})"
        )
    if polygons == counts[_BOXES]:
        raise UserError(f"{source.path} has no polygon in a .txt, and boxes say no pixel's class")
    _divide(annotations, settings, where)
    homes = {pair.folder for pair in annotations.pairs if pair.label.archive}
    # Others are no pictures to learn from: plots, masks.
    annotations.pairs = [
        pair for pair in annotations.pairs if pair.label.archive or pair.split or pair.folder in homes
    ]
    counts["pictures without a .txt, all background"] = sum(not pair.label.archive for pair in annotations.pairs)
    annotations.notes += [f"{text}: {count}" for text, count in counts.items() if count]
    annotations.notes.append("overlapping polygons are drawn by their area, the largest first")
    lost = [name for name in source.members if "/labels/" in f"/{name}" and name.lower().endswith(".txt")]
    rest = (source[name] for name in lost if name not in texts and source[name] not in annotations.read)
    annotations.leave_out("without a picture", rest, own.LABELS)
    return annotations


def _read_settings(annotations: Annotations) -> tuple[Settings, str]:
    """Reads the data.yaml, or a classes.txt in its place; returns also its path."""
    source, listings = annotations.source, list[tuple[Settings, str]]()
    for name, member in source.members.items():
        if not name.lower().endswith((".yaml", ".yml")) or b"names" not in (data := member.read()):
            continue
        try:
            settings = msgspec.yaml.decode(data, type=Settings, strict=False)
        except (msgspec.DecodeError, RecursionError, ValueError) as error:
            reason = files.shorten(" ".join(str(error).split()), 120)
            raise UserError(f"{member.where} is not the YAML file that was expected ({reason})") from None
        if settings.names:
            annotations.read.add(member)
            listings.append((settings, member.where))
    lines, where = ([], "") if listings else annotations.read_classes(own.CLASSES, is_order=True)
    if where:
        listings.append((Settings([*lines]), where))
    if not listings:
        raise UserError(f"{source.path} holds neither a data.yaml with names of classes nor a classes.txt")
    settings, where = listings[0]
    for other, place in listings[1:]:
        if other != settings:
            raise UserError(f"{where} and {place} both name classes, and differ: move one of them away")
    count = len(settings.names or ())
    if settings.nc not in (None, count):
        raise UserError(f"{where} has {count} names and says nc: {settings.nc}: make them agree")
    if settings.kpt_shape:
        raise UserError(f"{where} has a kpt_shape: its labels are points of poses, no polygons")
    return settings, where


def _divide(annotations: Annotations, settings: Settings, where: str) -> None:
    """Gives each pair the split of data.yaml, by lists or by the nearest folder, and leaves others out."""
    folders, lists, source = dict[str, str](), dict[str, str](), annotations.source
    parents = (str(parent) for name in source.members for parent in pathlib.PurePosixPath(name).parents)
    index = {path: [path] for path in (*source.members, *parents)}
    for word, split in (("train", "train"), ("val", "validation"), ("test", "test")):
        entry = getattr(settings, word)
        for text in [entry] if isinstance(entry, str) else entry or ():
            path = "".join(own.find_ends(index, text)) if own.split_path(text) else "."
            chosen = lists if path in source.members else folders
            if path and chosen.setdefault(path, split) != split and split == "test":
                raise UserError(
                    f"{where} names {files.shorten(text)} for test and for {chosen[path]}: test on other pictures"
                )
            if not path and split != "test":  # Ultralytics writes the line without a test set too
                raise UserError(
                    f"{where} names {files.shorten(text, 80)} for {word}, which is not below {source.path}"
                )
    listed = own.read_lists(annotations, lists)
    for number, pair in enumerate(annotations.pairs):
        above = map(str, pathlib.PurePosixPath(pair.name).parents)  # the nearest first
        split = next((folders[folder] for folder in above if folder in folders), "")
        pair.split = listed.get(number, ("", ""))[0] or split
    if folders or lists:
        annotations.decider = pathlib.PurePath(where).name
        annotations.pairs = [pair for pair in annotations.pairs if pair.split or own.split_of_folders(pair.name)]


def _label_names(name: str) -> list[str]:
    """Returns where the .txt of a picture may be: in labels/ instead of the last images/, or beside it."""
    beside = f"{own.stem_of(name)}.txt"
    head, images, tail = f"/{beside}".rpartition("/images/")
    return [f"{head}/labels/{tail}".lstrip("/"), beside] if images else [beside]


def parse_regions(
    data: bytes, table: Mapping[int, int], name: str, counts: Counter[str], size: Size = (1, 1)
) -> list[labels.Region]:
    """Parses lines CLASS X Y X Y ... with numbers from 0 to 1; a box (CLASS X Y WIDTH HEIGHT) is void."""
    regions = []
    for number, line in enumerate(data.decode("utf-8-sig", "replace").splitlines(), 1):
        words = line.split()
        if not words:
            continue
        where = f"{name}, line {number}"
        try:
            kind, *values = map(float, words)
        except ValueError:
            kind, values = math.nan, []
        if len(values) < 4 or len(values) % 2 or kind % 1 or not all(map(math.isfinite, values)):
            raise UserError(f"{where}: expected CLASS X Y X Y X Y ... (0 to 1), found {line[:60]!r}")
        if int(kind) not in table:
            raise UserError(f"{where} is of class {files.shorten(words[0], 20)}, not in data.yaml")
        values = [value * size[1 - index % 2] for index, value in enumerate(values)]
        if len(values) == 4:
            x, y, width, height = values
            counts[_BOXES] += 1
            regions.append(labels.box_region(IGNORE_LABEL, x - width / 2, y - height / 2, width, height))
        else:
            regions.append(labels.Region(table[int(kind)], [values]))
    return regions


def _draw(table: Mapping[int, int], empty: int, image: Member, data: bytes, name: str) -> bytes:
    size = labels.read_size(image, None, name)
    return labels.draw_regions(empty, size, parse_regions(data, table, name, Counter(), size), name)
