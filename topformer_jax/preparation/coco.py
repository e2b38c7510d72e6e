"""Files of COCO's form: instances (polygons and run lengths) and panoptic ones (also in Mapillary's folders)."""

import pathlib
from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import Annotated

import msgspec

from topformer_jax.data.batch import IGNORE_LABEL
from topformer_jax.preparation import labels, own
from topformer_jax.preparation.archives import Archive, Member
from topformer_jax.preparation.own import Annotations, Pair
from topformer_jax.runtime import files
from topformer_jax.runtime.errors import UserError

BACKGROUNDS = ("background", "_background_", "__background__")  # categories that are what nothing covers
Identity = int | str
Side = Annotated[int, msgspec.Meta(ge=1, le=1 << 20)]


class Picture(msgspec.Struct):
    """A row of "images"."""

    id: Identity
    file_name: str
    height: Side | None = None
    width: Side | None = None


class Category(msgspec.Struct):
    """A row of "categories"."""

    id: Identity
    name: str
    supercategory: str | None = None


class Runs(msgspec.Struct):
    """A mask as run lengths, column after column; a text is compressed."""

    size: tuple[Side, Side]  # height, width
    counts: str | list[Annotated[int, msgspec.Meta(ge=0)]]


class Segment(msgspec.Struct):
    """A part of a panoptic mask."""

    id: Annotated[int, msgspec.Meta(ge=0, lt=1 << 24)]
    category_id: Identity


class Instance(msgspec.Struct):
    """What a row of "annotations" draws."""

    category_id: Identity | None = None
    segmentation: list[list[float]] | Runs | None = None
    bbox: list[float] | None = None  # x, y, width, height
    iscrowd: int | bool | None = None


class Instances(msgspec.Struct):
    """The rows of one picture."""

    annotations: list[Instance]


class Annotation(msgspec.Struct, omit_defaults=True):
    """A row of "annotations": an instance, whose outline is read when it is drawn, or all segments of a mask."""

    image_id: Identity
    category_id: Identity | None = None
    segmentation: msgspec.Raw = msgspec.Raw(b"null")
    bbox: list[float] | None = None
    iscrowd: int | bool | None = None
    file_name: str | None = None
    segments_info: list[Segment] | None = None


class Content(msgspec.Struct):
    """A file of COCO."""

    images: list[Picture] | None = None
    categories: list[Category] = []
    annotations: list[Annotation] | None = None

    @property
    def is_panoptic(self) -> bool:
        """Whether the annotations are masks of segments."""
        return any(row.segments_info is not None for row in self.annotations or ())

    @property
    def has_instances(self) -> bool:
        """Whether an annotation has a polygon, runs or a box; a file without any is of pictures of background."""
        if not self.annotations:
            return self.annotations is not None and bool(self.categories)
        return self.has_outlines or any(row.bbox for row in self.annotations)

    @property
    def has_outlines(self) -> bool:
        """Whether an annotation has a polygon or runs."""
        return any(bytes(row.segmentation) not in (b"null", b"[]") for row in self.annotations or ())


# Pictures of a file, each with its path, its split and its annotations.
Listed = Iterator[tuple[Picture, str, str, list[Annotation]]]


def read(source: Archive, background: str) -> Annotations:
    """Finds the annotation files, panoptic ones before those of instances, and the pictures that they name.

    Raises:
        UserError: a file is wrong, names a picture that is not there, or has other categories than the others.
    """
    found = Annotations(source)
    contents = {
        name: content for name, content in found.read_json(Content, "images") if content.images is not None
    }
    panoptic = [name for name, content in contents.items() if content.is_panoptic]
    chosen = panoptic or [name for name, content in contents.items() if content.has_instances]
    if not chosen:
        raise UserError(
            f"{source.path} holds no .json of COCO with panoptic segments, polygons or run lengths "
            f"({own.describe(source)})"
        )
    kind = "panoptic segments" if panoptic else "polygons, run lengths or boxes"
    found.leave_out(
        f"files without {kind}", (source[name] for name in contents if name not in chosen), own.FILES
    )
    categories = _find_categories(found, {name: contents[name] for name in chosen})
    where = ", ".join(chosen)[:80]
    known = () if panoptic else BACKGROUNDS
    found.classes, table, empty = own.number_classes(categories, background, where, known)
    if panoptic and empty is None:
        empty = IGNORE_LABEL  # COCO's own rule for what has no segment
    if not panoptic:
        if not any(contents[name].has_outlines for name in chosen):
            raise UserError(f"{where} has no polygons or run lengths: boxes say no pixel's class")
        labels.require_pycocotools()
        found.notes.append("overlapping regions are drawn by their area, the largest first")
    folders = {name: _mask_folder(source, name) for name in panoptic}
    masks = {_mask_name(folders[name], row) for name in panoptic for row in contents[name].annotations or ()}
    index = own.index_ends(name for name in source.members if name not in masks)
    label_of_rest = own.require_background(empty, where)
    for name in chosen:
        add = _add_panoptic if panoptic else _add_instances
        add(found, name, _list_pictures(found, name, contents[name], index), table, label_of_rest)
    return found


def _find_categories(found: Annotations, contents: dict[str, Content]) -> dict[Identity, str]:
    """The categories' names by their numbers, in the order of these, without Roboflow's name of the group."""
    used = {row.category_id for content in contents.values() for row in content.annotations or ()}
    categories: dict[Identity, str] | None = None
    first = next(iter(contents))
    for name, content in contents.items():
        where = found.source[name].where
        groups = {row.supercategory for row in content.categories}
        these: dict[Identity, str] = {}
        for row in sorted(content.categories, key=lambda row: (isinstance(row.id, str), row.id)):
            if row.id in these:
                raise UserError(
                    f"{where} has two categories of id {files.shorten(row.id, 40)}: give each one its own"
                )
            if row.id == 0 and row.supercategory == "none" and row.name in groups and row.id not in used:
                found.notes.append(
                    f"no class: category {files.shorten(row.name)}, which names the group of the others"
                )
            else:
                these[row.id] = row.name
        if categories not in (None, these):
            raise UserError(
                f"{where} has other categories than {first}: give all files the same, or move it away"
            )
        categories = these
    found.notes[:] = dict.fromkeys(found.notes)
    return categories or {}


def _mask_folder(source: Archive, name: str) -> str:
    """Where the masks of a panoptic file are: in the folder of its name, or beside it (Mapillary)."""
    stem = name[: -len(".json")]
    return stem if any(path.startswith(f"{stem}/") for path in source.members) else name.rpartition("/")[0]


def _mask_name(folder: str, row: Annotation) -> str:
    return "/".join([*filter(None, [folder]), *own.split_path(row.file_name or "")])


def _find_picture(index: dict[str, list[str]], file_name: str, name: str, split: str, where: str) -> str:
    """The path of a picture that a file names: of several the one nearest to the file; never one of another split."""
    parts = own.split_path(file_name)
    folder, others = name.rpartition("/")[0], list[str]()
    for start in range(len(parts)):
        present = index.get("/".join(parts[start:]), [])
        found = [path for path in present if own.is_picture(path)]
        found = [path for path in found if not split or own.split_of_folders(path) in ("", split)]
        others = others or present
        for choice in (
            [path for path in found if own.split_of_folders(path) == split],
            [path for path in found if path.rpartition("/")[0] == folder],
            found,
        ):
            if len(choice) == 1:
                return choice[0]
        if found:
            raise UserError(
                f"{where} names {files.shorten(file_name, 80)}, of which there are {len(found)}: name its folder too"
            )
    if others and not own.is_picture(others[0]):
        raise UserError(
            f"{where} names {files.shorten(file_name, 80)}, which is no picture that is read: save it as .jpg or .png"
        )
    if not others:  # the name in other letters, or with another suffix
        stem = own.stem_of("".join(parts[-1:])).lower()
        others = [
            path
            for key in index
            if "/" not in key and own.stem_of(key).lower() == stem
            for path in index[key]
        ]
    there = (f" for {split}" if split else "") + f" (there is {files.shorten(others[0])})" if others else ""
    raise UserError(
        f"{where} names {files.shorten(file_name, 80)}, which is not below --source{there}: copy it there, or "
        "correct the name"
    )


def _list_pictures(found: Annotations, name: str, content: Content, index: dict[str, list[str]]) -> Listed:
    """The pictures of a file, each with its path, its split and its annotations.

    Raises:
        UserError: an annotation is of no picture, two pictures have one id, or one is not there.
    """
    where = found.source[name].where
    split = own.split_of_folders(name) or own.split_of(pathlib.PurePosixPath(name).stem)
    rows: dict[Identity, list[Annotation]] = {}
    for picture in content.images or ():
        if picture.id in rows:
            raise UserError(
                f"{where} has two images of id {files.shorten(picture.id, 40)}: give each one its own"
            )
        rows[picture.id] = []
    for number, row in enumerate(content.annotations or ()):
        if row.image_id not in rows:
            raise UserError(
                f"{where}: annotation {number} is of image {files.shorten(row.image_id, 40)}, which it does not list"
            )
        rows[row.image_id].append(row)
    for picture in content.images or ():
        path = _find_picture(index, picture.file_name, name, split, where)
        yield picture, path, split, rows[picture.id]


def _add_panoptic(
    found: Annotations, name: str, listed: Listed, table: dict[Identity, int], empty: int
) -> None:
    """Adds the pairs of a panoptic file."""
    source, where, folder = found.source, found.source[name].where, _mask_folder(found.source, name)
    missing = []
    for picture, path, split, rows in listed:
        if not rows:
            missing.append(picture.file_name)
        for row in rows:
            mask = _mask_name(folder, row)
            if mask not in source.members:
                raise UserError(
                    f"{where} names the mask {files.shorten(mask)}, which is not there: put it there"
                )
            segments = {part.id: _label(part.category_id, table, where) for part in row.segments_info or ()}
            convert = partial(labels.map_segments, segments, empty)
            sized = partial(labels.convert_mask, convert, source[path])
            found.pairs.append(Pair(path, source[path], source[mask], sized, split))
    if missing:
        found.left_out.append((f"without a mask in {files.shorten(name)}", own.PICTURES, missing))


def _add_instances(
    found: Annotations, name: str, listed: Listed, table: dict[Identity, int], empty: int
) -> None:
    """Adds the pairs of a file of instances; a box without a mask is void."""
    counts: Counter[str] = Counter()
    for picture, path, split, rows in listed:
        stated = (picture.height, picture.width) if picture.height and picture.width else None
        where = f"{found.source[name].where}: {files.shorten(picture.file_name, 80)}"
        data = msgspec.json.encode({"annotations": rows})
        _read_regions(data, table, where, counts)
        counts["pictures without annotations, all background"] += not rows
        image = found.source[path]
        found.pairs.append(Pair(path, image, data, partial(_draw, table, empty, stated, image), split, where))
    found.notes += [f"{text} in {files.shorten(name)}: {count}" for text, count in counts.items() if count]


def _draw(
    table: dict[Identity, int], empty: int, stated: labels.Size | None, image: Member, data: bytes, name: str
) -> bytes:
    return labels.draw_regions(empty, stated, image, _read_regions(data, table, name, Counter()), name)


def _read_regions(
    data: bytes, table: dict[Identity, int], where: str, counts: Counter[str]
) -> list[labels.Region]:
    """What a picture's annotations draw."""
    regions = []
    for row in files.read_json(data, Instances, where).annotations:
        label = _label(row.category_id, table, where)
        if isinstance(row.segmentation, Runs):
            regions.append(labels.Region(label, runs=row.segmentation.counts, size=row.segmentation.size))
        elif polygons := labels.take_polygons(row.segmentation or (), where):
            regions.append(labels.Region(label, polygons))
        elif row.bbox and len(row.bbox) == 4 and min(row.bbox[2:]) > 0:
            counts["boxes without a mask, whose pixels are void"] += 1
            regions.append(labels.box_region(IGNORE_LABEL, *row.bbox))
        else:
            counts["annotations without an area, left out"] += 1
        counts["crowds, drawn as their class"] += bool(row.iscrowd)
    return regions


def _label(number: Identity | None, table: dict[Identity, int], where: str) -> int:
    if number not in table:
        raise UserError(
            f"{where} has an annotation of category {files.shorten(number, 40)}, which it does not list"
        )
    return table[number]
