"""Rules for a user's own annotations that hold for every format: splits, names, classes, and counts.

A format's module finds pairs of a picture and its label, and the classes. This module gives each pair its split and
its name, and counts the files that are left out.
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
from topformer_jax.preparation.archives import Archive, Member, hold, open_archive
from topformer_jax.preparation.writer import Convert, Task
from topformer_jax.runtime import files
from topformer_jax.runtime.errors import UserError

CLASSES = "classes.txt"
VOID = "void"  # the name, in any case, of the pixels without a class
PICTURES, LABELS, FILES = "pictures", "labels", "other files"  # columns of the table of counts
FOLDERS = {"train": "train", "validation": "val", "test": "test"}  # of each split
_SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}
# Words beside the split's word in the name of a folder or a file: panoptic_train2017, "test set", trainannot.
_BESIDE = "sets?|splits?|data|images?|imgs?|pictures|photos|masks?|labels?|annot[a-z]*|panoptic|instances"
_SPLIT_WORD = re.compile(rf"({'|'.join(_SPLITS)})({_BESIDE})?")
_PICTURE_FOLDERS = {"images", "image", "imgs", "img", "jpegimages"}  # no part of a picture's name
_OTHER_LISTS = {"main", "layout", "action", "labels"}  # folders of .txt files that do not list pictures
Json = TypeVar("Json")
Key = TypeVar("Key")


@dataclasses.dataclass
class Pair:
    """A picture, and what its label is made from."""

    name: str  # of the picture below the source
    image: Member
    label: Member
    convert: Convert  # makes the label
    split: str = ""  # that the annotation names
    extract: Convert | None = None  # takes the picture out of the file that holds it

    @property
    def folder(self) -> str:
        return self.name.rpartition("/")[0]


@dataclasses.dataclass
class Annotations:
    """The annotations in a source."""

    source: Archive
    classes: list[str] = dataclasses.field(default_factory=list)
    pairs: list[Pair] = dataclasses.field(default_factory=list)
    read: set[Member] = dataclasses.field(default_factory=set)  # other files that were used
    # Reason, column and names of files that are left out.
    left_out: list[tuple[str, str, list[str]]] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)
    decider: str = ""  # a file that decides the splits, such as data.yaml; empty: all ways must agree

    def leave_out(self, reason: str, members: Iterable[Member], column: str = PICTURES) -> None:
        """Counts files that are left out."""
        members = list(members)
        if members:
            self.left_out.append((reason, column, [member.name for member in members]))
            self.read.update(members)

    def read_classes(self, *names: str, is_order: bool = False, required: bool = False) -> tuple[list[str], str]:
        """Returns the lines of the first of these files that is in any folder, and its path; ([], "") without one.

        With `is_order`, the lines number the classes: each must be a name. Files of one name must be equal.
        """
        source = self.source
        for file in names:
            found = [name for name in source.members if name.lower().rpartition("/")[2] == file]
            lines = [source.lines(name, by_place=is_order) for name in found]
            for name, others in zip(found, lines, strict=True):
                if others != lines[0]:
                    raise UserError(f"{source[name].where} has other classes than {found[0]}: make them equal")
            if found:
                self.read.update(source[name] for name in found)
                where = source[found[0]].where
                if is_order:
                    sources.check_class_lines(dict(enumerate(lines[0], 1)), where)
                return lines[0], where
        if required:
            raise UserError(f"{source.path} holds no {names[0]}, which lists classes ({describe(source)})")
        return [], ""

    def read_json(self, kind: type[Json], field: str) -> Iterator[tuple[str, Json]]:
        """Yields the names and contents of the .json files that have a field; counts the others."""
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
    """Opens a folder or a .zip. Its names get one form: "/", composed characters, and _ for what is no character."""
    if path.is_file() and path.suffix.lower() != ".zip":
        raise UserError(f"{path} is neither a folder nor a .zip file: unpack it for --source")
    members: dict[str, Member] = {}
    for name, member in open_archive(path).members.items():
        name = name if member.path else name.replace("\\", "/")
        name = str(pathlib.PurePosixPath(unicodedata.normalize("NFC", files.CONTROL.sub("_", name))))
        files.require_inside(name, str(path))
        if members.setdefault(name, member) is not member:
            raise UserError(f"two files in {path} are called {name[-80:]!r}: rename one of them")
    # An archive often has one folder around everything.
    while members and len(tops := {name.partition("/")[0] for name in members}) == 1:
        (top,) = tops
        inner = {part for name in members for part in name.split("/")[1:-1]}
        is_split = split_of(top) and not any(map(split_of, inner))
        if top in members or is_split or re.fullmatch(_BESIDE, top.lower()):
            break
        members = {name.partition("/")[2]: member for name, member in members.items()}
    return Archive(path, members)


def describe(source: Archive) -> str:
    """Says how many files of which suffixes a source holds."""
    return f"it holds {_count_suffixes(source.members) or 'nothing'}"


def is_picture(name: str) -> bool:
    """Whether a file's suffix, in any case, is that of a picture."""
    return name.lower().endswith(IMAGE_SUFFIXES)


def stem_of(name: str) -> str:
    """Removes the suffix of a picture from a path."""
    suffix = next((suffix for suffix in IMAGE_SUFFIXES if name.lower().endswith(suffix)), "")
    return name[: len(name) - len(suffix)]


def split_path(text: str) -> list[str]:
    """Splits a path that a file gives, with separators of any system, into the parts that names have here.

    >>> split_path("..\\\\images\\\\1.jpg")
    ['images', '1.jpg']
    """
    parts = unicodedata.normalize("NFC", text.replace("\\", "/")).split("/")
    return [part for part in parts if part not in ("", ".", "..")]


# Splits


@functools.lru_cache(maxsize=4096)  # most names are of few folders
def split_of(text: str) -> str:
    """Returns the split that the name of a folder, a list or a file says by a word at its start or end, or "".

    A name with both `val` and `test` is test.

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
    """Returns the split that the folders of a path say, or ""; raises UserError if they say two."""
    splits = {split for part in path.split("/")[:-1] if (split := split_of(part))}
    if len(splits) > 1:
        raise UserError(f"{path} lies in folders of {' and '.join(sorted(splits))}: rename one")
    return splits.pop() if splits else ""


def index_ends(names: Iterable[str]) -> defaultdict[str, list[str]]:
    """Indexes files by each end of their paths: c.jpg, b/c.jpg, a/b/c.jpg.

    >>> index_ends(["b/c.jpg", "c.jpg"])["c.jpg"]
    ['b/c.jpg', 'c.jpg']
    """
    index = defaultdict[str, list[str]](list)
    for name in names:
        parts = name.split("/")
        for start in range(len(parts)):
            index["/".join(parts[start:])].append(name)
    return index


def find_ends(index: Mapping[str, list[str]], text: str) -> list[str]:
    """Returns the files with the longest end that a path has in common with any."""
    parts = split_path(text)
    ends = ("/".join(parts[start:]) for start in range(len(parts)))
    return next((index[end] for end in ends if end in index), [])


def find_picture(index: Mapping[str, list[str]], text: str, name: str, split: str, where: str) -> str:
    """Returns the path of the picture that the text of a file called `name` (in errors `where`) names.

    Among several it is the one of the file's split or folder, and never one of another split.
    """
    present = find_ends(index, text)
    found = [path for path in present if not split or split_of_folders(path) in ("", split)]
    found = [path for path in found if is_picture(path)]
    for choice in (
        [path for path in found if split_of_folders(path) == split],
        [path for path in found if path.rpartition("/")[0] == name.rpartition("/")[0]],
        found,
    ):
        if len(choice) == 1:
            return choice[0]
    shown = f"{where} names {files.shorten(text, 80) or 'no picture'}"
    if found:
        raise UserError(f"{shown}, of which there are {len(found)}: name its folder too")
    file = "".join(split_path(text)[-1:])
    if file and not is_picture(file):
        raise UserError(f"{shown}, which is no picture that is read: save it as .jpg or .png")
    # The name in other letters, or with another suffix.
    like = (key for key in index if "/" not in key and stem_of(key).lower() == stem_of(file).lower())
    there = present or [path for key in like for path in index[key]]
    hint = (f" for {split}" if split else "") + f" (there is {files.shorten(there[0])})" if there else ""
    raise UserError(f"{shown}, which is not below --source{hint}: copy it there, or correct the name")


def _find_splits(annotations: Annotations, validation: float) -> tuple[list[str], dict[str, str]]:
    """Returns the split of each pair ("": it is left out), and what says it for the pairs of each split."""
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
        annotations.notes.append(f"pictures without a split, used for train: {len(unsaid)}")
        for index in unsaid:
            splits[index] = "train"
        ways["train"].add("nothing else")
    if "validation" not in splits:
        unsaid += [index for index, split in enumerate(splits) if split == "train"]
        # Numbers from 0 to 1: a picture stays in its split when others are added.
        hashes = {index: hashlib.sha256(_short_name(pairs[index].name).encode()).digest() for index in unsaid}
        shares = {index: int.from_bytes(digest[:4], "big") / 2**32 for index, digest in hashes.items()}
        for index in unsaid:
            splits[index] = "validation" if shares[index] < validation else "train"
        for split, choose in (("validation", min), ("train", max)):  # few pictures: at least one in each
            if split not in splits and len(unsaid) > 1:
                splits[choose(unsaid, key=lambda index: shares[index])] = split
        for index in unsaid:
            ways[splits[index]].add("a hash of the name")
    return splits, {split: " and ".join(sorted(found - {""})) for split, found in ways.items()}


def _state_split(pair: Pair, listed: tuple[str, str], decider: str) -> tuple[str, str]:
    """Returns what says the split of a pair, and the split: the first of these ways, else the file's name.

    The ways must agree; a `decider` has the last word, but test is never trained on.
    """
    ways = {
        decider: (pair.split, decider),
        "list": listed,
        "folder": (split_of_folders(pair.name), "its folder"),
        "annotation file": (pair.split, pair.label.where),
    }
    found = [(way, *said) for way, said in ways.items() if way and said[0]]
    others = {split: where for _, split, where in found[1:] if split != found[0][1]}
    if others and (not (decider and pair.split) or (pair.split == "train" and "test" in others)):
        (_, split, where), (other, by) = found[0], others.popitem()
        raise UserError(f"{pair.image.where} belongs to {split} by {where} and to {other} by {by}: make them agree")
    if found:
        return found[0][:2]
    split = split_of(stem_of(pair.name).rpartition("/")[2])
    return ("file name" if split else "", split)


def _find_lists(annotations: Annotations) -> dict[str, str]:
    """Returns the text files that list the pictures of a split, such as train.txt, with the splits."""
    found, others = {}, annotations.read | {pair.label for pair in annotations.pairs}
    for name, member in annotations.source.members.items():
        folders, _, file = name.lower().rpartition("/")
        split = split_of(name.rpartition("/")[2][:-4]) if file.endswith(".txt") else ""
        if split and not _OTHER_LISTS & set(folders.split("/")) and member not in others:
            found[name] = split
    return found


def read_lists(annotations: Annotations, lists: Mapping[str, str]) -> dict[int, tuple[str, str]]:
    """Returns the split that lists of pictures say for pairs, and the list, by the pairs' places.

    Counts lines without a picture. A line must be of one picture, and a picture in lists of one split.
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
    """Returns the pictures that a line of a list may name: by the whole line, or by its first word."""
    words = line.split()
    names_two = sum(map(is_picture, words)) > 1  # the second one is the label
    texts = words[:1] if names_two else [line, words[0]]
    return next((found for text in texts if (found := find_ends(index, stem_of(text)))), [])


def _short_name(path: str) -> str:
    *folders, name = stem_of(path).split("/")
    kept = [part for part in folders if not split_of(part) and part.lower() not in _PICTURE_FOLDERS]
    return "/".join([*kept, name])


# Classes


def number_classes(
    names: Mapping[Key, str],
    background: str,
    where: str,
    known: Sequence[str] = (),
    *,
    of_masks: bool = False,
) -> tuple[list[str], dict[Key, int], int]:
    """Numbers the classes in the order of their keys; `names` called void are no class.

    `background` is the value of --background: a class, "void" or "". An annotated class with a `known` name, in lower
    case, is the background too. With `of_masks`, the background is what masks leave void, and a new class gets
    the last number; otherwise it is what no annotation covers, and a new class gets number 0.

    Returns the classes, the label of each key, and the label of the background.
    """
    for number, name in enumerate(names.values()):
        if not is_name(name):
            raise UserError(f"{where}: the name of class {number} is {name[:60]!r}: name it in one line")
    classes = [name.strip() for name in names.values() if name.strip().lower() != VOID]
    if len({*classes}) < len(classes):
        twice = next(name for name in classes if classes.count(name) > 1)
        raise UserError(f"{where} has the class {twice[:60]!r} twice: rename one, or make them one")
    labels = {name: number for number, name in enumerate(classes)}
    found = next((name for name in classes if name.lower() in known), "")
    is_void = background.lower() == VOID
    if not background and not found and not of_masks:
        raise UserError(
            f"{where} does not say what pixels without an annotation are: give them a class by --background NAME, or "
            f"leave them out of training and scores by --background {VOID}"
        )
    if background and not is_void and background not in labels:
        if found:
            classes[labels[found]] = background
        else:
            classes.insert(len(classes) if of_masks else 0, background)
            labels = {name: number for number, name in enumerate(classes)}
    chosen = "" if is_void else background or found
    empty = classes.index(chosen) if chosen else IGNORE_LABEL
    void = empty if of_masks else IGNORE_LABEL
    return classes, {key: labels.get(name.strip(), void) for key, name in names.items()}, empty


def _check_classes(annotations: Annotations) -> None:
    """Raises UserError unless there are 2 to 255 classes; notes what they are, and strange names."""
    names, where = annotations.classes, annotations.source.path
    if len(names) == 1:
        raise UserError(
            f"{where} has one class, {files.shorten(names[0])}, so there is nothing to learn: give a second one, by "
            "--background NAME for the pixels that nothing covers"
        )
    if not 2 <= len(names) <= IGNORE_LABEL:
        raise UserError(f"{where} has {len(names)} classes: from 2 to 255 fit into labels")
    annotations.notes.insert(0, f"classes: {len(names)} ({_join_first(names, 12)})")
    twins = [name for name, count in Counter(map(str.lower, names)).items() if count > 1]
    if twins:
        annotations.notes.append(f"classes that differ in upper and lower case only: {_join_first(twins)}")
    members = annotations.source.members.values()
    if strange := [member.name for member in members if files.CONTROL.search(member.name)]:
        annotations.notes.append(
            f"names that are no text, with _ in its place: {len(strange)} ({_join_first(strange)})"
        )


# The files to make


def divide(annotations: Annotations, validation: float) -> tuple[list[Task], list[list[str]]]:
    """Gives each pair its split and its name, and notes to `annotations`.

    Returns the files to make, and a table of counts.
    """
    source, pairs = annotations.source, annotations.pairs
    by_image: dict[Member, Pair] = {}
    for pair in pairs:
        if (other := by_image.setdefault(pair.image, pair)) is not pair:
            raise UserError(
                f"{pair.image.where} has two annotations, {other.label.where} and {pair.label.where}: remove one"
            )
    _check_classes(annotations)
    splits, ways = _find_splits(annotations, validation)
    for split, folder in list(FOLDERS.items())[:2]:
        if split not in splits:
            there = ", ".join(f"{splits.count(s)} of {s} (by {ways[s]})" for s in FOLDERS if s in splits)
            raise UserError(
                f"{source.path} gives no picture for {split}: {there or 'none is annotated'}; put some into a folder "
                f"{folder}, or give two or more pictures outside test"
            )
    classes = "".join(f"{name}\n" for name in annotations.classes).encode()
    tasks = [Task(CLASSES, "", "list", hold(CLASSES, classes))]
    for pair, split, name in zip(pairs, splits, _name_pairs(pairs, splits), strict=True):
        if split:
            folder, suffix = FOLDERS[split], pair.name[len(stem_of(pair.name)) :]
            image, label = f"images/{folder}/{name}{suffix}", f"annotations/{folder}/{name}.png"
            tasks.append(Task(image, split, "image", pair.image, pair.extract))
            tasks.append(Task(label, split, "label", pair.label, pair.convert))
    table = [["", PICTURES, LABELS, FILES]]
    counts = Counter(splits)
    table += [[f"{each} (by {ways[each]})", *[str(counts[each])] * 2, ""] for each in FOLDERS if counts[each]]
    return tasks, table + _count_rest(annotations)


def _name_pairs(pairs: Sequence[Pair], splits: Sequence[str]) -> list[str]:
    """Names the pairs by their paths, without the folders of the split if all names stay different."""
    short = [_short_name(pair.name) for pair in pairs]
    counts = Counter((split, name.lower()) for split, name in zip(splits, short, strict=True))
    names: dict[tuple[str, str], Pair] = {}
    for pair, split, name in zip(pairs, splits, short, strict=True):
        unique = name if counts[split, name.lower()] == 1 else stem_of(pair.name)
        other = names.setdefault((split, unique), pair)
        if other is not pair:
            raise UserError(f"{other.image.where} and {pair.image.where} would share one label: rename one")
    return [name for _, name in names]


def _count_rest(annotations: Annotations) -> list[list[str]]:
    """Returns rows of the files that are left out, each count in its column."""
    used = {member for pair in annotations.pairs for member in (pair.image, pair.label)} | annotations.read
    rest = {name: member for name, member in annotations.source.members.items() if member not in used}
    annotations.leave_out("in no annotation", (rest[name] for name in rest if is_picture(name)))
    rows = []
    for reason, column, found in annotations.left_out:
        counts = [str(len(found)) if column == each else "" for each in (PICTURES, LABELS, FILES)]
        rows.append([f"left out, {reason}: {_join_first(found)}", *counts])
    others = [name for name in rest if not is_picture(name)]
    if others:
        rows.append([f"not read: {_count_suffixes(others)}", "", "", str(len(others))])
    return rows


def _count_suffixes(names: Iterable[str]) -> str:
    kinds = Counter(pathlib.PurePosixPath(name).suffix.lower() or "without suffix" for name in names)
    return _join_first([f"{count} {kind}" for kind, count in kinds.most_common()], 6)


def _join_first(names: Sequence[str], count: int = 3) -> str:
    return ", ".join(files.shorten(name, 40) for name in names[:count]) + (", ..." if len(names) > count else "")
