"""A user's own annotations: the rules for splits, names and counts that hold whatever annotated the pictures.

A reader (labelme.py, coco.py, yolo.py, masks.py) finds pairs of a picture and what its label is made of, and the
classes. Here each pair gets its split and its name, and whatever the reader left is counted.
"""

import dataclasses
import functools
import hashlib
import pathlib
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

from topformer_jax.data import sources
from topformer_jax.data.batch import IGNORE_LABEL
from topformer_jax.data.catalog import IMAGE_SUFFIXES, is_name
from topformer_jax.preparation.archives import IN_FOLDER, REPLACE, Archive, Member, open_archive
from topformer_jax.preparation.writer import Convert, Plan, Task, plan_of
from topformer_jax.runtime import files
from topformer_jax.runtime.errors import UserError

CLASSES = "classes.txt"
VOID = "void"  # the name, in any case, of what is no class
PICTURES, LABELS, FILES = "pictures", "labels", "other files"  # columns of the table of what went where
FOLDERS = {"train": "train", "validation": "val", "test": "test"}  # of each split
_SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}
# What stands beside the split's word in the name of a folder or a file: panoptic_train2017, "test set", trainannot.
_BESIDE = "sets?|splits?|data|images?|imgs?|pictures|photos|masks?|labels?|annot[a-z]*|panoptic|instances"
_SPLIT_WORD = re.compile(rf"({'|'.join(_SPLITS)})({_BESIDE})?")
_PICTURE_FOLDERS = {"images", "image", "imgs", "img", "jpegimages"}  # no part of a picture's name
_OTHER_LISTS = {"main", "layout", "action", "labels"}  # folders of .txt files that do not list pictures
Content = TypeVar("Content")
Key = TypeVar("Key")


@dataclasses.dataclass
class Pair:
    """A picture, and what its label is made of."""

    name: str  # of the picture below the source
    image: Member
    label: Member | bytes
    convert: Convert  # makes the label
    split: str = ""  # that the annotation itself names
    where: str = ""  # of a label in bytes: the file that it is of
    extract: Convert | None = None  # takes the picture out of the file that holds it

    @property
    def annotation(self) -> str:
        """The annotation, as an error names it."""
        return self.label.where if isinstance(self.label, Member) else self.where


@dataclasses.dataclass
class Annotations:
    """What a reader finds in a source."""

    source: Archive
    classes: list[str] = dataclasses.field(default_factory=list)
    pairs: list[Pair] = dataclasses.field(default_factory=list)
    read: set[Member] = dataclasses.field(default_factory=set)  # other files that were used
    # Reason, column and names of files that nothing is made of.
    left_out: list[tuple[str, str, list[str]]] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)
    decider: str = ""  # what has the last word on splits: a data.yaml; empty: all that say one must agree

    def leave_out(self, reason: str, members: Iterable[Member], column: str = PICTURES) -> None:
        """Counts files that nothing is made of."""
        members = list(members)
        if members:
            self.left_out.append((reason, column, [member.name for member in members]))
            self.read.update(members)

    def read_classes(self, *names: str, is_order: bool = False) -> tuple[list[str], str]:
        """The lines of the first of these files that is there, in whatever folder, and where; ([], "") without one.

        Raises:
            UserError: files of one name differ; or the order of the lines numbers the classes (`is_order`), and a
                line is more or less than a name.
        """
        source = self.source
        for file in names:
            found = [name for name in source.members if name.lower().rpartition("/")[2] == file]
            lines = [source.lines(name, by_place=is_order) for name in found]
            for name, others in zip(found, lines, strict=True):
                if others != lines[0]:
                    raise UserError(
                        f"{source[name].where} has other classes than {found[0]}: give all the same"
                    )
            if found:
                self.read.update(source[name] for name in found)
                where = source[found[0]].where
                if is_order:
                    sources.check_class_lines(dict(enumerate(lines[0], 1)), where)
                return lines[0], where
        return [], ""

    def read_json(self, kind: type[Content], field: str) -> Iterator[tuple[str, Content]]:
        """The names and contents of the .json files that have a field; others are left out, and counted.

        Raises:
            UserError: such a file is damaged, or a value in it has another type.
        """
        others = []
        for name, member in self.source.members.items():
            if not name.lower().endswith(".json"):
                continue
            data = member.read()
            if f'"{field}"'.encode() in data:
                self.read.add(member)
                yield name, files.read_json(data, kind, member.where)
            else:
                others.append(member)
        self.leave_out(f"files without {field}", others, FILES)


Reader = Callable[[Archive, str], Annotations]  # of a source and --background


def open_source(path: pathlib.Path) -> Archive:
    """Opens a folder or a .zip; zip files in a folder are taken for the folders that they were made of.

    Names get one form: "/", composed characters, and _ for what is no character. A zip file of files that lie beside
    it is left closed.

    Raises:
        UserError: it cannot be read, or a name in it leads out of it.
    """
    if path.is_file() and path.suffix.lower() != ".zip":
        raise UserError(
            f"{path} is neither a folder nor a .zip file: unpack it, and give the folder as --source"
        )
    members: dict[str, Member] = {}
    listed = open_archive(path, advice=REPLACE).members
    is_zip = {name: m.offset == IN_FOLDER and name.lower().endswith(".zip") for name, m in listed.items()}
    # What is unpacked beside its zip file comes first.
    for name in sorted(listed, key=lambda name: is_zip[name]):
        found = _open_inner(name, listed[name], members) if is_zip[name] else {name: listed[name]}
        for key, member in found.items():
            key = key if member.offset == IN_FOLDER else key.replace("\\", "/")
            key = str(pathlib.PurePosixPath(unicodedata.normalize("NFC", files.CONTROL.sub("_", key))))
            files.require_inside(key, str(path))
            other = members.setdefault(key, member)
            if other is not member and other.archive == member.archive:
                raise UserError(f"two files in {path} are called {key[-80:]!r}: rename one of them")
    # An archive often has one folder around everything.
    while members and len(tops := {key.partition("/")[0] for key in members if "/" in key}) == 1:
        (top,) = tops
        is_split = split_of(top) and not any(
            split_of(part) for key in members for part in key.split("/")[1:-1]
        )
        if any("/" not in key for key in members) or is_split or re.fullmatch(_BESIDE, top.lower()):
            break
        members = {key.partition("/")[2]: member for key, member in members.items()}
    return Archive(path, "", members)


def _open_inner(name: str, member: Member, beside: Mapping[str, Member]) -> dict[str, Member]:
    """The files of a zip file in a folder, as if it were unpacked: into a folder of its name, if it holds none.

    Raises:
        UserError: it is damaged, or some of its pictures lie beside it.
    """
    inner = open_archive(pathlib.Path(member.path), advice=REPLACE).members
    folder, _, stem = name[: -len(".zip")].rpartition("/")
    has_folder = all(key.startswith(f"{stem}/") for key in inner)
    parts = [folder] if has_folder else [folder, stem]
    found = {"/".join([*filter(None, parts), key]): inside for key, inside in inner.items()}
    new = {key: found[place] for key, place in zip(inner, found, strict=True) if place not in beside}
    of_name: dict[str, list[str]] = defaultdict(list)
    for key in beside:
        of_name[key.rpartition("/")[2]].append(key)
    copies = [
        key
        for key, inside in new.items()
        for other in of_name[key.rpartition("/")[2]]
        if f"/{key}".endswith(f"/{other}") or f"/{other}".endswith(f"/{key}")
        if inside.size == beside[other].size and inside.read() == beside[other].read()
    ]
    if new and len(copies) == len(new):
        return {name: member}
    # Two tasks may have equal masks, such as empty ones, of different pictures.
    others = {stem_of(key.rpartition("/")[2]) for key in {*new} - {*copies}}
    copies = [key for key in copies if stem_of(key.rpartition("/")[2]) not in others]
    if pictures := [key for key in copies if is_picture(key)]:
        raise UserError(
            f"{member.where} holds {len(pictures)} of the pictures and masks that lie beside it, such as "
            f"{files.shorten(pictures[0])}: move it away, or them"
        )
    return found


def describe(source: Archive) -> str:
    """What a source holds: how many files of which suffixes."""
    return f"it holds {_count_suffixes(source.members) or 'nothing'}"


def is_picture(name: str) -> bool:
    """Whether a file's suffix, in any case, is that of a picture."""
    return name.lower().endswith(IMAGE_SUFFIXES)


def stem_of(name: str) -> str:
    """A path without the suffix of a picture."""
    suffix = next((suffix for suffix in IMAGE_SUFFIXES if name.lower().endswith(suffix)), "")
    return name[: len(name) - len(suffix)]


def split_path(text: str) -> list[str]:
    """The parts of a path that a file gives, with separators of any system, in the form that names have here.

    >>> split_path("..\\\\images\\\\1.jpg")
    ['images', '1.jpg']
    """
    parts = unicodedata.normalize("NFC", text.replace("\\", "/")).split("/")
    return [part for part in parts if part not in ("", ".", "..")]


@functools.lru_cache(maxsize=4096)  # most names are of few folders
def split_of(text: str) -> str:
    """The split that the name of a folder, a list or a file says, or "".

    It does by a word at its begin or its end: of both `val` and `test`, as in COCO's test-dev, it is test.

    >>> [split_of(name) for name in ("panoptic_VAL2017", "testset", "street_test", "trainval", "constraint")]
    ['validation', 'test', 'test', '', '']
    """
    text = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", text).lower()  # trainImages
    words = [word for word in re.split(r"[\W\d_]+", text) if word and not re.fullmatch(_BESIDE, word)]
    found = {_SPLITS[match[1]] for word in words[:1] + words[-1:] if (match := _SPLIT_WORD.fullmatch(word))}
    if found == {"validation", "test"}:
        return "test"
    return found.pop() if len(found) == 1 else ""


def split_of_folders(path: str) -> str:
    """The split that the folders of a path name, or "".

    Raises:
        UserError: they name two.
    """
    splits = {split for part in path.split("/")[:-1] if (split := split_of(part))}
    if len(splits) > 1:
        raise UserError(
            f"{path} lies in folders of {' and '.join(sorted(splits))}: rename one of the folders"
        )
    return splits.pop() if splits else ""


def number_classes(
    names: Mapping[Key, str],
    background: str,
    where: str,
    known: Sequence[str] = (),
    *,
    of_masks: bool = False,
) -> tuple[list[str], dict[Key, int], int | None]:
    """Numbers the classes in the order of their keys.

    Args:
        names: of each key; those called void are no class.
        background: what --background says: a class of what is void or not covered, "void", or "".
        where: the annotations, for the error.
        known: the names, in lower case, of an annotated class that is the background.
        of_masks: then the background is what is void in them, and has the last number if it is no class yet.

    Returns:
        The classes, the label of each key, and the label of the background; None where nothing says it.

    Raises:
        UserError: a name is blank, has a line break, or is there twice.
    """
    for number, name in enumerate(names.values()):
        if not is_name(name):
            raise UserError(
                f"{where}: the name of class {number} is {name[:60]!r}: give it a name of one line"
            )
    classes = [name.strip() for name in names.values() if name.strip().lower() != VOID]
    if len({*classes}) < len(classes):
        twice = next(name for name in classes if classes.count(name) > 1)
        raise UserError(f"{where} has the class {twice[:60]!r} twice: rename one, or make them one")
    labels = {name: number for number, name in enumerate(classes)}
    found = next((name for name in classes if name.lower() in known), "")
    is_void = background.lower() == VOID
    if background and not is_void and background not in labels:
        if found:
            classes[labels[found]] = background
        else:
            classes.insert(len(classes) if of_masks else 0, background)
            labels = {name: number for number, name in enumerate(classes)}
    chosen = background or found
    empty = IGNORE_LABEL if is_void else classes.index(chosen) if chosen else None
    void = empty if of_masks and empty is not None else IGNORE_LABEL
    return classes, {key: labels.get(name.strip(), void) for key, name in names.items()}, empty


def require_background(empty: int | None, where: str) -> int:
    """The label of the background.

    Raises:
        UserError: nothing says it.
    """
    if empty is None:
        raise UserError(
            f"{where} covers a part of the pictures only: give the rest a class by --background NAME, or leave it "
            f"out of training and scores by --background {VOID}"
        )
    return empty


def index_ends(names: Iterable[str]) -> defaultdict[str, list[str]]:
    """The names of files by each end of their paths: c.jpg, b/c.jpg, a/b/c.jpg.

    >>> index_ends(["b/c.jpg", "c.jpg"])["c.jpg"]
    ['b/c.jpg', 'c.jpg']
    """
    index = defaultdict[str, list[str]](list)
    for name in names:
        parts = name.split("/")
        for start in range(len(parts)):
            index["/".join(parts[start:])].append(name)
    return index


def divide(annotations: Annotations, validation: float) -> tuple[Plan, list[list[str]]]:
    """Gives each pair its split and its name, and counts what nothing is made of.

    Returns:
        The plan, and a table of what went where; `annotations` gets notes.

    Raises:
        UserError: a picture belongs to two splits, or a split is empty.
    """
    source, pairs, names = annotations.source, annotations.pairs, annotations.classes
    _refuse_doubles(pairs)
    if len(names) == 1:
        raise UserError(
            f"{source.path} has one class, {files.shorten(names[0])}, so there is nothing to learn: give a second "
            "one, by --background NAME for the pixels that nothing covers"
        )
    if not 2 <= len(names) <= IGNORE_LABEL:
        raise UserError(f"{source.path} has {len(names)} classes: from 2 to 255 fit into labels")
    splits, ways = _find_splits(annotations, validation)
    for split, folder in list(FOLDERS.items())[:2]:
        if split not in splits:
            there = ", ".join(f"{splits.count(s)} of {s} (by {ways[s]})" for s in FOLDERS if s in splits)
            raise UserError(
                f"{source.path} gives no picture for {split}: {there or 'none is annotated'}; put some into a folder "
                f"{folder}, or give two or more that nothing says to be of test"
            )
    tasks: list[Task] = []
    for pair, split, name in zip(pairs, splits, _name_pairs(pairs, splits), strict=True):
        if split:
            folder, suffix = FOLDERS[split], pair.name[len(stem_of(pair.name)) :]
            tasks += [
                Task(f"images/{folder}/{name}{suffix}", split, "image", pair.image, pair.extract),
                Task(
                    f"annotations/{folder}/{name}.png", split, "label", pair.label, pair.convert, pair.where
                ),
            ]
    classes = "".join(f"{name}\n" for name in names).encode()
    table = [["", PICTURES, LABELS, FILES]]
    for split in FOLDERS:
        if count := splits.count(split):
            table.append([f"{split} (by {ways[split]})", str(count), str(count), ""])
    _add_notes(annotations)
    return plan_of([*tasks, Task(CLASSES, "", "list", classes)]), table + _count_rest(annotations)


def _add_notes(annotations: Annotations) -> None:
    twins = [name for name, count in Counter(map(str.lower, annotations.classes)).items() if count > 1]
    if twins:
        annotations.notes.append(f"classes that differ in upper and lower case only: {_join_first(twins)}")
    strange = [
        member.name for member in annotations.source.members.values() if files.CONTROL.search(member.name)
    ]
    if strange:
        annotations.notes.append(
            f"names that are no text, with _ in its place: {len(strange)} ({_join_first(strange)})"
        )
    count = len(annotations.classes)
    annotations.notes.insert(0, f"classes: {count} ({_join_first(annotations.classes, 12)})")


def _refuse_doubles(pairs: Sequence[Pair]) -> None:
    """Raises a UserError where a picture has two annotations."""
    by_image: dict[Member, Pair] = {}
    for pair in pairs:
        other = by_image.setdefault(pair.image, pair)
        if other is not pair:
            raise UserError(
                f"{pair.image.where} has two annotations, {other.annotation} and {pair.annotation}: remove one"
            )


def _find_splits(annotations: Annotations, validation: float) -> tuple[list[str], dict[str, str]]:
    """The split of each pair ("": it is left out), and how the pairs of each split were found."""
    pairs = annotations.pairs
    listed = read_lists(annotations, _find_lists(annotations))
    is_complete = any(split == "train" for split, _ in listed.values())
    splits: list[str] = []
    ways: dict[str, set[str]] = defaultdict(set)
    for number, pair in enumerate(pairs):
        way, split = _state_split(pair, listed.get(number, ("", "")), annotations.decider)
        splits.append("" if is_complete and way == "file name" else split)
        ways[splits[-1]].add(way)
    unsaid = [index for index, split in enumerate(splits) if not split]
    if is_complete:
        annotations.leave_out("in no list", (pairs[index].image for index in unsaid))
        unsaid = []
    elif unsaid and "validation" in splits:
        annotations.notes.append(f"pictures of no stated split, which are of train: {len(unsaid)}")
        for index in unsaid:
            splits[index] = "train"
        ways["train"].add("nothing else")
    if "validation" not in splits:
        unsaid += [index for index, split in enumerate(splits) if split == "train"]
        shares = {index: _hash(_short_name(pairs[index].name)) for index in unsaid}
        for index in unsaid:
            splits[index] = "validation" if shares[index] < validation else "train"
        for split, choose in (("validation", min), ("train", max)):  # few pictures: at least one in each
            if split not in splits and len(unsaid) > 1:
                splits[choose(unsaid, key=lambda index: shares[index])] = split
        for index in unsaid:
            ways[splits[index]].add("a hash of the name")
    return splits, {split: " and ".join(sorted(found - {""})) for split, found in ways.items()}


def _state_split(pair: Pair, listed: tuple[str, str], decider: str) -> tuple[str, str]:
    """What says the split of a pair, and the split: the first of these ways, which must agree; else the file's name.

    Raises:
        UserError: two ways say two splits; a `decider` has the last word, but test is never trained on.
    """
    ways = {
        decider: (pair.split, decider),
        "list": listed,
        "folder": (split_of_folders(pair.name), "its folder"),
        "annotation file": (pair.split, pair.annotation),
    }
    found = [(way, *said) for way, said in ways.items() if way and said[0]]
    others = {split: where for _, split, where in found[1:] if split != found[0][1]}
    if others and (not (decider and pair.split) or (pair.split == "train" and "test" in others)):
        (_, split, where), (other, by) = found[0], others.popitem()
        raise UserError(
            f"{pair.image.where} belongs to {split} by {where} and to {other} by {by}: make them agree"
        )
    if found:
        return found[0][:2]
    split = split_of(stem_of(pair.name).rpartition("/")[2])
    return ("file name" if split else "", split)


def _find_lists(annotations: Annotations) -> dict[str, str]:
    """The text files that list the pictures of a split, such as train.txt, by their names."""
    found, others = {}, annotations.read | {pair.label for pair in annotations.pairs}
    for name, member in annotations.source.members.items():
        folders, _, file = name.lower().rpartition("/")
        split = split_of(name.rpartition("/")[2][:-4]) if file.endswith(".txt") else ""
        if split and not _OTHER_LISTS & set(folders.split("/")) and member not in others:
            found[name] = split
    return found


def read_lists(annotations: Annotations, lists: Mapping[str, str]) -> dict[int, tuple[str, str]]:
    """The split of pairs by lists of pictures, and the list: by the pairs' places.

    What a list names and is not there is counted.

    Raises:
        UserError: two lists of different splits name one picture, or a line could be of two.
    """
    source, found = annotations.source, dict[int, tuple[str, str]]()
    numbers = {stem_of(pair.name): number for number, pair in enumerate(annotations.pairs)}
    index = index_ends(numbers)
    for name, split in lists.items():
        member, lost = source[name], list[str]()
        for line in source.lines(name):
            places = _find_line(line, index)
            places = [path for path in places if split_of_folders(path) == split] or places
            if len(places) > 1:
                raise UserError(
                    f"{member.where}: {files.shorten(line, 80)} could be {len(places)} pictures: write their folders"
                )
            if not places:
                lost.append(line)
            elif (other := found.setdefault(numbers[places[0]], (split, member.where)))[0] != split:
                raise UserError(
                    f"{files.shorten(line, 80)} is in {other[1]} and in {member.where}: a picture belongs to one list"
                )
        annotations.read.add(member)
        if lost:
            annotations.left_out.append((f"in {name}, but without picture or label", PICTURES, lost))
    return found


def _find_line(line: str, index: Mapping[str, list[str]]) -> list[str]:
    """The pictures that a line of a list may name: the whole line, or its first word."""
    words = line.split()
    names_two = sum(map(is_picture, words)) > 1  # the second one is the label
    for text, is_whole in ((line, names_two), (words[0], False), (line, False)):
        parts = split_path(stem_of(text))
        for start in range(1 if is_whole else len(parts)):
            if places := index.get("/".join(parts[start:])):
                return places
    return []


def _name_pairs(pairs: Sequence[Pair], splits: Sequence[str]) -> list[str]:
    """What the pairs are called: their paths without the folders that say the split, if all stay apart without."""
    short = [_short_name(pair.name) for pair in pairs]
    counts = Counter((split, name.lower()) for split, name in zip(splits, short, strict=True))
    names: dict[tuple[str, str], Pair] = {}
    for pair, split, name in zip(pairs, splits, short, strict=True):
        unique = name if counts[split, name.lower()] == 1 else stem_of(pair.name)
        other = names.setdefault((split, unique), pair)
        if other is not pair:
            raise UserError(
                f"{other.image.where} and {pair.image.where} would share one label: keep one, or rename it"
            )
    return [name for _, name in names]


def _short_name(path: str) -> str:
    *folders, name = stem_of(path).split("/")
    kept = [part for part in folders if not split_of(part) and part.lower() not in _PICTURE_FOLDERS]
    return "/".join([*kept, name])


def _hash(name: str) -> float:
    """A number from 0 to 1: a picture stays in its split when others are added."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") / 2**32


def _count_rest(annotations: Annotations) -> list[list[str]]:
    """Rows of the files that nothing is made of, each count in its column."""
    used = {member for pair in annotations.pairs for member in (pair.image, pair.label)} | annotations.read
    rest = {name: member for name, member in annotations.source.members.items() if member not in used}
    annotations.leave_out("in no annotation", (rest[name] for name in rest if is_picture(name)))
    zips = [name for name in rest if rest[name].offset == IN_FOLDER and name.lower().endswith(".zip")]
    annotations.leave_out("copies of files beside them", (rest[name] for name in zips), FILES)
    rows = []
    for reason, column, found in annotations.left_out:
        counts = [str(len(found)) if column == each else "" for each in (PICTURES, LABELS, FILES)]
        rows.append([f"left out, {reason}: {_join_first(found)}", *counts])
    others = [name for name in rest if not is_picture(name) and name not in zips]
    if others:
        rows.append([f"not read: {_count_suffixes(others)}", "", "", str(len(others))])
    return rows


def _count_suffixes(names: Iterable[str]) -> str:
    kinds = Counter(pathlib.PurePosixPath(name).suffix.lower() or "without suffix" for name in names)
    return _join_first([f"{count} {kind}" for kind, count in kinds.most_common()], 6)


def _join_first(names: Sequence[str], count: int = 3) -> str:
    """The first of some names, in one line."""
    return ", ".join(files.shorten(name, 40) for name in names[:count]) + (
        ", ..." if len(names) > count else ""
    )
