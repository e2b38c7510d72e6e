"""A user's own annotations: the rules for splits, names and counts that hold whatever annotated the pictures.

A reader (labelme.py, coco.py, yolo.py, masks.py) finds pairs of a picture and what its label is made of, and the
classes. Here each pair gets its split and its name, and whatever the reader left is counted.
"""

import dataclasses
import hashlib
import pathlib
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence

from topformer_jax import files
from topformer_jax.data.batch import IGNORE_LABEL
from topformer_jax.data.catalog import IMAGE_SUFFIXES
from topformer_jax.errors import UserError
from topformer_jax.preparation.archives import IN_FOLDER, Archive, Member, open_archive
from topformer_jax.preparation.writer import Convert, Plan, Task, plan_of

CLASSES = "classes.txt"
VOID = "void"  # the name, in any case, of what is no class
_SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}
_FOLDERS = {"train": "train", "validation": "val", "test": "test"}
_SPLIT_WORD = re.compile(rf"({'|'.join(_SPLITS)})\d*")  # train, val2017
# What stands beside the split's word in the name of a folder or a list: panoptic_train2017, "test set".
_OTHER_WORDS = {
    *(
        "images",
        "image",
        "imgs",
        "img",
        "pictures",
        "photos",
        "masks",
        "mask",
        "labels",
        "label",
        "annotations",
    ),
    *("panoptic", "instances", "set", "data", "split"),
}
_PICTURE_FOLDERS = {"images", "image", "imgs", "img", "jpegimages"}  # no part of a picture's name
_OTHER_LISTS = {"main", "layout", "action", "labels"}  # folders of .txt files that do not list pictures


@dataclasses.dataclass(frozen=True)
class Pair:
    """A picture, and what its label is made of."""

    image: Member
    path: str  # of the picture below the source, without its suffix
    suffix: str  # of the picture
    label: Member | bytes
    convert: Convert  # makes the label
    split: str = ""  # that the annotation itself names
    where: str = ""  # of a label in bytes: the file that it is of
    extract: Convert | None = None  # takes the picture out of the file that holds it


@dataclasses.dataclass
class Annotations:
    """What a reader finds in a source."""

    source: Archive
    classes: list[str]
    pairs: list[Pair] = dataclasses.field(default_factory=list)
    read: set[Member] = dataclasses.field(default_factory=set)  # other files that were used
    left_out: dict[str, list[str]] = dataclasses.field(default_factory=dict)  # files by the reason
    notes: list[str] = dataclasses.field(default_factory=list)

    def leave_out(self, reason: str, members: Iterable[Member]) -> None:
        """Counts files that nothing is made of."""
        members = list(members)
        if members:
            self.left_out.setdefault(reason, []).extend(member.name for member in members)
            self.read.update(members)


@dataclasses.dataclass(frozen=True)
class Division:
    """A plan, and what to print of it: a table of what went where, and notes."""

    plan: Plan
    table: list[list[str]]
    notes: list[str]


Reader = Callable[[Archive, str], Annotations]  # of a source and --background


def open_source(path: pathlib.Path) -> Archive:
    """Opens a folder or an archive; zip files in a folder are taken for the folders that they were made of.

    Raises:
        UserError: it cannot be read, or a name in it leads out of it.
    """
    members: dict[str, Member] = {}
    listed = open_archive(path).members
    is_zip = {name: m.offset == IN_FOLDER and name.lower().endswith(".zip") for name, m in listed.items()}
    for name in sorted(
        listed, key=lambda name: is_zip[name]
    ):  # what is unpacked beside its zip file comes first
        found = _open_inner(name, listed[name]) if is_zip[name] else {name: listed[name]}
        for key, member in found.items():
            key = key if member.offset == IN_FOLDER else key.replace("\\", "/")
            files.require_inside(key, str(path))
            members.setdefault(str(pathlib.PurePosixPath(key)), member)
    # An archive often has one folder around everything.
    while members and len(tops := {key.partition("/")[0] for key in members if "/" in key}) == 1:
        (top,) = tops
        is_split = split_of(top) and not any(
            split_of(part) for key in members for part in key.split("/")[1:-1]
        )
        if any("/" not in key for key in members) or is_split or top.lower() in _OTHER_WORDS:
            break
        members = {key.partition("/")[2]: member for key, member in members.items()}
    return Archive(path, "", members)


def _open_inner(name: str, member: Member) -> dict[str, Member]:
    """The files of a zip file in a folder, as if it were unpacked: into a folder of its name, if it holds none."""
    inner = open_archive(pathlib.Path(member.path)).members
    folder, _, stem = name[: -len(".zip")].rpartition("/")
    has_folder = all(key.startswith(f"{stem}/") for key in inner)
    parts = [folder] if has_folder else [folder, stem]
    return {"/".join([*filter(None, parts), key]): inside for key, inside in inner.items()}


def describe(source: Archive) -> str:
    """What a source holds: how many files of which suffixes."""
    kinds = Counter(pathlib.PurePosixPath(name).suffix.lower() or "no suffix" for name in source.members)
    return (
        f"it holds {_join_first([f'{count} {kind}' for kind, count in kinds.most_common()], 6) or 'nothing'}"
    )


def is_picture(name: str) -> bool:
    """Whether a file's suffix, in any case, is that of a picture."""
    return name.lower().endswith(IMAGE_SUFFIXES)


def stem_of(name: str) -> str:
    """A path without the suffix of a picture."""
    suffix = next((suffix for suffix in IMAGE_SUFFIXES if name.lower().endswith(suffix)), "")
    return name[: len(name) - len(suffix)]


def make_pair(
    name: str,
    image: Member,
    label: Member | bytes,
    convert: Convert,
    split: str = "",
    where: str = "",
) -> Pair:
    """The pair of a picture `name` below the source."""
    return Pair(image, stem_of(name), name[len(stem_of(name)) :], label, convert, split, where)


def split_of(text: str, *, among_others: bool = False) -> str:
    """The split that the name of a folder, a list or a file says, or "".

    Args:
        text: the name, without a path.
        among_others: whether any words may stand beside the one of the split.

    >>> split_of("panoptic_VAL2017"), split_of("train_station"), split_of("streets-test", among_others=True)
    ('validation', '', 'test')
    """
    text = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", text).lower()  # trainImages
    words = [word for word in re.split(r"[\W_]+", text) if word and not word.isdecimal()]
    found = {match[1] for word in words if (match := _SPLIT_WORD.fullmatch(word))}
    others = [word for word in words if not _SPLIT_WORD.fullmatch(word) and word not in _OTHER_WORDS]
    splits = {_SPLITS[word] for word in found}
    return splits.pop() if len(splits) == 1 and (among_others or not others) else ""


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


def list_classes(names: Sequence[str], where: str, least: int = 2) -> list[str]:
    """Checks the names of classes, which are at least so many.

    Raises:
        UserError: a name is blank, has a line break, or is there twice; or there are too many or too few.
    """
    for number, name in enumerate(names):
        if not name.strip() or len(name.splitlines()) > 1 or files.CONTROL.search(name):
            raise UserError(
                f"{where}: the name of class {number} is {name[:60]!r}: give it a name of one line"
            )
    twice = [name for name, count in Counter(name.strip() for name in names).items() if count > 1]
    if twice:
        raise UserError(f"{where} has the class {twice[0][:60]!r} twice: rename one, or make them one")
    if len(names) == 1 < least:
        raise UserError(
            f"{where} has one class, {files.shorten(names[0])}, so there is nothing to learn: give a second one, "
            "by --background NAME for the pixels that nothing covers"
        )
    if not least <= len(names) <= IGNORE_LABEL:
        raise UserError(f"{where} has {len(names)} classes: from 2 to 255 fit into labels")
    return [name.strip() for name in names]


def add_background(
    classes: Sequence[str], background: str, known: Sequence[str], where: str
) -> tuple[list[str], int]:
    """The classes with the one of what nothing covers, and its label.

    Args:
        classes: the annotated ones.
        background: what --background says: a class, "void", or "".
        known: the names, in lower case, of an annotated class that is the background.
        where: the annotations, for the error.

    Raises:
        UserError: no class is known.
    """
    found = [name for name in classes if name.lower() in known]
    if background.lower() == VOID:
        return list(classes), IGNORE_LABEL
    if not background and not found:
        raise UserError(
            f"{where} covers a part of the pictures only: give the rest a class by --background NAME, or leave it "
            f"out of training and scores by --background {VOID}"
        )
    if background and background not in classes:
        if not found:
            return [background, *classes], 0
        classes = [background if name == found[0] else name for name in classes]
    return list(classes), list(classes).index(background or found[0])


def divide(annotations: Annotations, validation: float) -> Division:
    """Gives each pair its split and its name, and counts what nothing is made of.

    Args:
        annotations: what the reader found.
        validation: share of the pictures to score on, where no folder, list or file says it.

    Raises:
        UserError: a picture belongs to two splits, or a split is empty.
    """
    source, pairs = annotations.source, annotations.pairs
    _refuse_doubles(pairs)
    splits, ways = _find_splits(annotations, validation)
    for split in ("train", "validation"):
        if split not in splits:
            raise UserError(
                f"{source.path} gives no picture for {split} (of {len(pairs)}): folders, lists or files named train, "
                "val and test say where a picture belongs, and --validation the share where nothing says it"
            )
    tasks: list[Task] = []
    for pair, split, name in zip(pairs, splits, _name_pairs(pairs, splits), strict=True):
        if split:
            tasks += _make_tasks(pair, split, name)
    table = [["", "pictures", "labels"]]
    for split in _FOLDERS:
        if count := splits.count(split):
            table.append([f"{split} (by {ways[split]})", str(count), str(count)])
    classes = "".join(f"{name}\n" for name in annotations.classes).encode()
    plan = plan_of([*tasks, Task(CLASSES, "", "list", classes)])
    twins = [name for name, count in Counter(map(str.lower, annotations.classes)).items() if count > 1]
    if twins:
        annotations.notes.append(f"classes that differ in upper and lower case only: {_join_first(twins)}")
    shown = f"classes: {len(annotations.classes)} ({_join_first(annotations.classes, 12)})"
    return Division(plan, table + _count_rest(annotations), [shown, *annotations.notes])


def _refuse_doubles(pairs: Sequence[Pair]) -> None:
    """Raises a UserError where a picture has two annotations."""
    by_image: dict[Member, Pair] = {}
    for pair in pairs:
        other = by_image.setdefault(pair.image, pair)
        if other is not pair:
            first, second = (p.label.where if isinstance(p.label, Member) else p.where for p in (other, pair))
            raise UserError(
                f"{pair.image.where} has two annotations, {first} and {second}: remove one of them"
            )


def _find_splits(annotations: Annotations, validation: float) -> tuple[list[str], dict[str, str]]:
    """The split of each pair ("": it is left out), and how the pairs of each split were found."""
    pairs = annotations.pairs
    listed, is_complete = _read_lists(annotations)
    splits: list[str] = []
    ways: dict[str, set[str]] = defaultdict(set)
    for pair, split_of_list in zip(pairs, listed, strict=True):
        said = {
            "annotation file": pair.split,
            "list": split_of_list,
            "folder": split_of_folders(pair.path),
        }
        found = {split for split in said.values() if split}
        if "test" in found and len(found) > 1:
            raise UserError(
                f"{pair.image.where} belongs to {' and '.join(sorted(found))}, by its folder and by a list or an "
                "annotation file: make them agree"
            )
        way = next((way for way, split in said.items() if split), "")
        splits.append(said.get(way, ""))
        ways[splits[-1]].add(way)
    by_name = [_split_of_file(pair.path) for pair in pairs]
    if not any(splits) and all(by_name) and len(set(by_name)) > 1:
        return by_name, dict.fromkeys(by_name, "file name")
    unsaid = [index for index, split in enumerate(splits) if not split]
    if is_complete:
        annotations.leave_out("in no list", (pairs[index].image for index in unsaid))
        unsaid = []
    elif any(by_name[index] == "test" for index in unsaid):
        annotations.notes.append(
            "files named test are divided like the others: put them into a folder test to keep them apart"
        )
    if "validation" not in splits:
        unsaid += [index for index, split in enumerate(splits) if split == "train"]
    shares = {index: _hash(_short_name(pairs[index].path)) for index in unsaid}
    for index in unsaid:
        splits[index] = "validation" if shares[index] < validation else "train"
    for split, choose in (("validation", min), ("train", max)):  # few pictures: at least one in each
        if split not in splits and len(unsaid) > 1:
            splits[choose(unsaid, key=lambda index: shares[index])] = split
    for index in unsaid:
        ways[splits[index]].add("a hash of the name")
    return splits, {split: " and ".join(sorted(found - {""})) for split, found in ways.items()}


def _read_lists(annotations: Annotations) -> tuple[list[str], bool]:
    """The split of each pair by lists such as train.txt, and whether a list of train is there, so that lists are all.

    Raises:
        UserError: two lists name one picture, or a line could be of two.
    """
    source, pairs = annotations.source, annotations.pairs
    index: dict[str, list[int]] = defaultdict(list)
    for number, pair in enumerate(pairs):
        parts = pair.path.split("/")
        for start in range(len(parts)):
            index["/".join(parts[start:])].append(number)
    splits, lists = [""] * len(pairs), {}
    for name, member in source.members.items():
        folders, _, file = name.rpartition("/")
        split = split_of(file[:-4]) if file.lower().endswith(".txt") else ""
        if not split or _OTHER_LISTS & set(folders.lower().split("/")) or member in annotations.read:
            continue
        lines = source.lines(name)
        found = [_find_line(line, index, splits, pairs, split, member.where) for line in lines]
        if any(place is not None for place in found):
            lists[split] = member
            annotations.read.add(member)
            missing = [line for line, place in zip(lines, found, strict=True) if place is None]
            if missing:
                annotations.left_out[f"in {member.name} without picture and label"] = missing
    return splits, "train" in lists


def _find_line(
    line: str, index: dict[str, list[int]], splits: list[str], pairs: Sequence[Pair], split: str, where: str
) -> int | None:
    """Marks the pair that a line of a list names, and returns its number; None: there is none."""
    for text in dict.fromkeys((line, line.split()[0])):  # a second column names the label
        parts = [part for part in stem_of(text.replace("\\", "/")).split("/") if part not in ("", ".", "..")]
        keys = ("/".join(parts[start:]) for start in range(len(parts)))
        found = next((index[key] for key in keys if key in index), [])
        if len(found) > 1:
            found = [number for number in found if split_of_folders(pairs[number].path) == split] or found
        if len(found) > 1:
            raise UserError(
                f"{where}: {files.shorten(line, 80)} could be {len(found)} pictures: write their folders too"
            )
        for number in found:
            if splits[number] not in ("", split):
                raise UserError(
                    f"{where}: {files.shorten(line, 80)} is in the list of {splits[number]} too: it belongs to one"
                )
            splits[number] = split
            return number
    return None


def _name_pairs(pairs: Sequence[Pair], splits: Sequence[str]) -> list[str]:
    """What the pairs are called: their paths without the folders that say the split, if all stay apart without."""
    short = [_short_name(pair.path) for pair in pairs]
    counts = Counter((split, name.lower()) for split, name in zip(splits, short, strict=True))
    names: dict[tuple[str, str], Pair] = {}
    for pair, split, name in zip(pairs, splits, short, strict=True):
        other = names.setdefault((split, name if counts[split, name.lower()] == 1 else pair.path), pair)
        if other is not pair:
            raise UserError(
                f"{other.image.where} and {pair.image.where} would share one label: keep one, or rename it"
            )
    return [name for _, name in names]


def _short_name(path: str) -> str:
    *folders, name = path.split("/")
    kept = [part for part in folders if not split_of(part) and part.lower() not in _PICTURE_FOLDERS]
    return "/".join([*kept, name])


def _split_of_file(path: str) -> str:
    """The split that a file's name begins with: train_001, test12; "": none."""
    match = re.match(
        rf"({'|'.join(sorted(_SPLITS, key=len, reverse=True))})(?![a-z])", path.rpartition("/")[2].lower()
    )
    return _SPLITS[match[1]] if match else ""


def _hash(name: str) -> float:
    """A number from 0 to 1: a picture stays in its split when others are added."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") / 2**32


def _make_tasks(pair: Pair, split: str, name: str) -> list[Task]:
    """The tasks of a picture and its label."""
    folder = _FOLDERS[split]
    return [
        Task(f"images/{folder}/{name}{pair.suffix}", split, "image", pair.image, pair.extract),
        Task(f"annotations/{folder}/{name}.png", split, "label", pair.label, pair.convert, pair.where),
    ]


def _count_rest(annotations: Annotations) -> list[list[str]]:
    """Rows of the files that nothing is made of."""
    used = {member for pair in annotations.pairs for member in (pair.image, pair.label)} | annotations.read
    rest = [member for member in annotations.source.members.values() if member not in used]
    annotations.leave_out("in no annotation", (member for member in rest if is_picture(member.name)))
    rows = [
        [f"left out, {reason}: {_join_first(found)}", str(len(found)), ""]
        for reason, found in annotations.left_out.items()
    ]
    others = [member.name for member in rest if not is_picture(member.name)]
    if others:
        kinds = Counter(pathlib.PurePosixPath(name).suffix.lower() or "without suffix" for name in others)
        texts = [f"{count} {kind}" for kind, count in kinds.most_common()]
        rows.append([f"not read, other files: {_join_first(texts, 6)}", "", ""])
    return rows


def _join_first(names: Sequence[str], count: int = 3) -> str:
    """The first of some names, in one line."""
    return ", ".join(files.shorten(name, 40) for name in names[:count]) + (
        ", ..." if len(names) > count else ""
    )
