"""Data sets that `prepare --format array_record` packed: reads array_record shards, and copies them to a local disk.

The layout is that of tensorflow-datasets.
"""

import base64
import concurrent.futures
import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import os
import pathlib
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Annotated, Any, Literal

import fsspec
import msgspec

from topformer_jax.data.batch import Example
from topformer_jax.data.codecs import read_label_size
from topformer_jax.runtime import files
from topformer_jax.runtime.errors import UserError
from topformer_jax.runtime.logs import Progress

VERSION = "1.0.0"  # of the layout
INFO = "dataset_info.json"  # written last: without it the data set is incomplete
FEATURES = "features.json"
CLASS_NAMES = "label.labels.txt"  # of a classifier's data set, one class per line
CHECKSUMS = "checksums.json"  # sizes and MD5 sums of the shards
LABEL_SIZES = "label_sizes.json"  # height and width of each label, by split
PARTS = "parts"  # the folder that says, while the data set is incomplete, which shards are finished
AGAIN = "; copy it, or build the data set again (python -m topformer_jax.prepare)"
ADVICE = "; --config.data.cache=DIR names another folder"
THREADS = 8  # shards that are copied at once
PIECE = 16 << 20  # bytes that one request asks for
MEGABYTE = 1_000_000
ABANDONED_SECONDS = 3600.0  # without a write, after which another host's unfinished copy is deleted
MakeProgress = Callable[[int, str], Progress]  # of the total, and of what the numbers count
SILENT: MakeProgress = functools.partial(Progress, active=False)
Side = Annotated[int, msgspec.Meta(ge=1, le=1 << 16)]


class _Feature(msgspec.Struct, forbid_unknown_fields=True):
    """A field of a record. tensorflow-datasets imports the module that a class's name begins with: only its own."""

    pythonClassName: Literal[
        "tensorflow_datasets.core.features.image_feature.Image",
        "tensorflow_datasets.core.features.text_feature.Text",
        "tensorflow_datasets.core.features.class_label_feature.ClassLabel",
    ]
    image: dict[str, Any] = {}
    text: dict[str, Any] = {}
    classLabel: dict[str, Any] = {}
    description: str = ""


class _FeatureNames(msgspec.Struct, forbid_unknown_fields=True):
    features: dict[str, _Feature]


class _Features(msgspec.Struct, forbid_unknown_fields=True):
    pythonClassName: Literal["tensorflow_datasets.core.features.features_dict.FeaturesDict"]
    featuresDict: _FeatureNames


class _Split(msgspec.Struct):
    name: str
    shardLengths: list[Annotated[str, msgspec.Meta(pattern="^[0-9]{1,12}$")]]


class _Info(msgspec.Struct):
    name: str
    splits: list[_Split]


class Sum(msgspec.Struct):
    """Size and MD5 sum of a shard."""

    size: Annotated[int, msgspec.Meta(ge=0, lt=1 << 48)]
    md5: str


class Checksums(msgspec.Struct):
    """A checksums.json."""

    source: str
    shards: dict[str, Sum]


def shard_names(dataset: str, split: str, count: int) -> list[str]:
    """The names of a split's files."""
    return [f"{dataset}-{split}.array_record-{index:05d}-of-{count:05d}" for index in range(count)]


@dataclasses.dataclass
class ArrayRecordSource:
    """The shards that preparation/packing.py wrote: records of tensorflow-datasets with the files' bytes unchanged.

    The label of a classifier is a number. The imagenet2012 of tensorflow-datasets, prepared as array_record, is read
    too. From a bucket (gs://), array_record reads each record by one request. The sizes of the labels are in a file
    beside the shards.
    """

    folder: str
    split: str

    def __post_init__(self) -> None:
        import tensorflow_datasets as tfds  # takes half a second

        folder = files.as_path(self.folder)
        features = files.read_bytes(folder / FEATURES, AGAIN)
        files.read_json(features, _Features, folder / FEATURES, AGAIN)
        skip = tfds.decode.SkipDecoding()
        try:
            builder = tfds.builder_from_directory(folder)
            decoders: Any = {"image": skip, "label": skip}
            self._records: Any = builder.as_data_source(self.split, decoders=decoders)
        except Exception as error:  # of many types, for a damaged file or a bucket
            raise UserError(
                f"the {self.split} split in {self.folder} cannot be opened ({files.explain(error)}){AGAIN}"
            ) from None

    def __reduce__(self) -> tuple:
        return ArrayRecordSource, (self.folder, self.split)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Example:
        try:
            record = self._records[index]
            name = record["name" if "name" in record else "file_name"].decode()
            files.require_inside(name, "its name")
        except IndexError:
            raise
        except Exception as error:  # a damaged file raises errors of many types
            raise UserError(
                f"record {index} of {self.split} in {self.folder} cannot be read ({files.explain(error)}){AGAIN}"
            ) from None
        where = f"{name} (record {index} of {self.split} in {self.folder})"
        example = Example(name, record["image"], record["label"], (f"image {where}", f"label {where}"))
        if sizes := vars(self).get("_sizes"):  # training does not read them
            found, size = read_label_size(example.label, example.where[1]), sizes[index]
            if found != size:
                raise UserError(
                    f"{example.where[1]} has {found[1]} x {found[0]} pixels, "
                    f"{LABEL_SIZES} says {size[1]} x {size[0]}{AGAIN}"
                )
        return example

    def label_size(self, index: int) -> tuple[int, int]:
        return self._sizes[index]

    @functools.cached_property
    def _sizes(self) -> list[tuple[int, int]]:
        """The sizes of all labels, which preparation/packing.py wrote."""
        file = files.as_path(self.folder) / LABEL_SIZES
        sizes = files.read_json(files.read_bytes(file, AGAIN), dict[str, list[tuple[Side, Side]]], file, AGAIN)
        if len(sizes.get(self.split, ())) != len(self):
            raise UserError(f"{file} does not hold the sizes of the {len(self)} labels of {self.split}{AGAIN}")
        return sizes[self.split]


def find_records(root: str, dataset: str, hint: str) -> files.Path:
    """The folder that preparation/packing.py wrote: data.root itself, or below it.

    Raises UserError if there is none (the line ends with `hint`), it is incomplete, or the bucket does not answer.
    """
    base = files.as_path(root)
    folders = (base, base / VERSION, base / dataset / VERSION)
    with files.report_errors("read", root):
        found = next((folder for folder in folders if root and (folder / INFO).exists()), None)
        begun = folders[-1] if not found and root and (folders[-1] / PARTS).exists() else None
    if found:
        return found
    if begun:
        raise UserError(
            f"{begun} is incomplete: run the same python -m topformer_jax.prepare command again; it resumes"
        )
    raise UserError(
        f"no {dataset}/{VERSION}/{INFO} in {root or 'data.root, which is empty'}: build it with python -m "
        f"topformer_jax.prepare {dataset} --source DIR --output DIR --format array_record; {hint}"
    )


def list_shards(info: bytes, split: str, folder: str | os.PathLike) -> list[str]:
    """The names of a split's files in a dataset_info.json; a UserError if it names no such split."""
    where = f"{os.fspath(folder)}/{INFO}"
    fields = files.read_json(info, _Info, where, AGAIN)
    files.require_inside(fields.name, where)
    lengths = {row.name: len(row.shardLengths) for row in fields.splits}
    if split not in lengths:
        raise UserError(f"{where} does not name the {split} split's shards{AGAIN}")
    return shard_names(fields.name, split, lengths[split])


def copy_split(
    source: files.Path, dataset: str, split: str, cache: str, make_progress: MakeProgress = SILENT
) -> files.Path:
    """Copies one split's shards to a local disk, if they are not there, and returns their folder.

    One process of a host copies, the others wait. The folder's name holds a digest of the source's path,
    dataset_info.json and checksums.json, so that versions of a data set are never mixed. A shard gets its name when
    it is whole and its checksum right. After an interruption, the next call copies the missing shards. Raises
    UserError if the disk is too small, the source cannot be read or a copy differs from its checksum.
    """
    if files.is_in_bucket(cache):
        raise UserError(f"data.cache={cache} is a bucket: give a folder on a local disk, --config.data.cache=DIR")
    info, features = (files.read_bytes(source / name) for name in (INFO, FEATURES))
    sums = files.read_existing(source / CHECKSUMS) or b""
    digest = hashlib.sha256(b"\n".join([os.fspath(source).encode(), info, sums])).hexdigest()
    base = pathlib.Path(cache).expanduser()
    folder = base / f"{dataset}-{digest[:16]}"
    shards = _describe(source, list_shards(info, split, source), sums)

    def find_missing() -> dict[str, Sum]:
        paths = {name: folder / name for name in shards}
        there = {name for name, path in paths.items() if path.exists() and path.stat().st_size == shards[name].size}
        return {name: shard for name, shard in shards.items() if name not in there}

    if not find_missing() and (folder / INFO).exists():
        return folder
    with files.report_errors("write", base, ADVICE):
        folder.mkdir(parents=True, exist_ok=True)
        with _lock(folder, shards, make_progress):
            _delete_leftovers(folder)
            missing = find_missing()
            needed, free = sum(shard.size for shard in missing.values()), shutil.disk_usage(folder).free
            if needed > free:
                raise UserError(
                    f"{base} is too small: {dataset}'s {split} shards need {needed / MEGABYTE:,.1f} MB more, "
                    f"{free / MEGABYTE:,.1f} MB are free; --config.data.cache=DIR names another disk"
                )
            if missing:
                _copy(source, folder, missing, make_progress)
            if sizes := files.read_existing(source / LABEL_SIZES):
                files.write_file(folder / LABEL_SIZES, sizes, ADVICE)
            files.write_file(folder / FEATURES, features, ADVICE)
            files.write_file(folder / INFO, info, ADVICE)
    return folder


def read_md5(facts: dict[str, Any]) -> str:
    """The MD5 sum, in hexadecimal, in what Cloud Storage says about a file; "" if it names none."""
    return base64.b64decode(facts.get("md5Hash", "")).hex()


def _describe(source: files.Path, names: list[str], sums: bytes) -> dict[str, Sum]:
    """Sizes and checksums: those that preparation/packing.py wrote, else what the bucket or the disk says."""
    if sums:
        where = f"{os.fspath(source)}/{CHECKSUMS}"
        known = files.read_json(sums, Checksums, where, AGAIN).shards
        if missing := [name for name in names if name not in known]:
            raise UserError(f"{where} does not name {missing[0]}{AGAIN}")
        return {name: known[name] for name in names}

    def look_up(name: str) -> Sum:
        system, inside = fsspec.core.url_to_fs(os.fspath(source / name))
        facts = system.info(inside)
        return Sum(facts["size"], read_md5(facts))

    with files.report_errors("read", source), concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        return dict(zip(names, pool.map(look_up, names), strict=True))


def _sum_megabytes(shards: dict[str, Sum]) -> int:
    return -(-sum(shard.size for shard in shards.values()) // MEGABYTE)


@contextlib.contextmanager
def _lock(folder: pathlib.Path, shards: dict[str, Sum], make_progress: MakeProgress) -> Iterator[None]:
    """Holds the folder's lock, which ends with the process; says if another process has it."""
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with make_progress(_sum_megabytes(shards), f"MB, copied to {folder} by another process") as progress:
                progress.update(0)
                fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _delete_leftovers(folder: pathlib.Path) -> None:
    """Deletes what killed copies left: those of this host, since it holds the lock, and old ones of other hosts.

    On some shared disks, a lock holds for its own host only.
    """
    lock = folder / ".lock"
    lock.touch()
    now = lock.stat().st_mtime  # by the disk's own clock
    for left in folder.glob(".*.tmp"):
        with contextlib.suppress(FileNotFoundError):
            if f".{_name_host()}." in left.name or now - left.stat().st_mtime > ABANDONED_SECONDS:
                left.unlink()


def _name_host() -> str:
    """This machine's name in those of unfinished files: all containers on it share its locks."""
    return files.read_boot_id() or socket.gethostname()


def _copy(source: files.Path, folder: pathlib.Path, missing: dict[str, Sum], make_progress: MakeProgress) -> None:
    """Copies the missing shards by threads, which all end after an error or an interrupt."""
    copied, stopped = 0, threading.Event()
    with (
        make_progress(_sum_megabytes(missing), f"MB copied from {os.fspath(source)}") as progress,
        concurrent.futures.ThreadPoolExecutor(THREADS) as pool,
    ):
        try:
            for size in pool.map(lambda name: _copy_shard(source / name, folder, missing[name], stopped), missing):
                copied += size
                progress.update(-(-copied // MEGABYTE))
        finally:
            stopped.set()


def _copy_shard(path: files.Path, folder: pathlib.Path, shard: Sum, stopped: threading.Event) -> int:
    """Copies a file, one piece per request, and returns its size; it gets its name when it is whole and right."""
    temporary = files.temporary_path(folder / f"{path.name}.{_name_host()}")
    digest = hashlib.md5(usedforsecurity=False)
    with files.unfinished(temporary):
        with temporary.open("wb") as file:
            for start in range(0, shard.size, PIECE):
                if stopped.is_set():
                    raise UserError(f"{os.fspath(path)} was not copied: another shard failed")
                piece = _read_piece(path, start, min(start + PIECE, shard.size))
                file.write(piece)
                digest.update(piece)
            file.flush()
            os.fsync(file.fileno())
        size = temporary.stat().st_size
        if size != shard.size or (shard.md5 and digest.hexdigest() != shard.md5):
            raise UserError(
                f"{os.fspath(path)} is not what it was when it was written ({size} bytes, MD5 {digest.hexdigest()}; "
                f"expected {shard.size}, {shard.md5 or 'any'}): copy it or build it again (python -m "
                "topformer_jax.prepare)"
            )
        temporary.replace(folder / path.name)
    return shard.size


def _read_piece(path: files.Path, start: int, end: int) -> bytes:
    with files.report_errors("read", path, "; the same command goes on with the missing shards"):
        system, inside = fsspec.core.url_to_fs(os.fspath(path))
        return bytes(system.cat_file(inside, start=start, end=end))
