"""Data sets that `prepare --format array_record` packed: array_record shards in tensorflow-datasets' layout."""

import dataclasses
import os
import threading
from typing import Annotated, Any, Literal

import msgspec

from topformer_jax.data.codecs import read_label_size
from topformer_jax.data.example import Example
from topformer_jax.runtime import files
from topformer_jax.runtime.errors import UserError

VERSION = "1.0.0"  # of the layout
INFO = "dataset_info.json"  # written last: without it the data set is incomplete
FEATURES = "features.json"
CLASS_NAMES = "label.labels.txt"  # of a classifier's data set, a line a class
CHECKSUMS = "checksums.json"  # sizes and MD5 sums of the shards
LABEL_SIZES = "label_sizes.json"  # height and width of each label, by split
PARTS = "parts"  # the folder that says, while the data set is incomplete, which shards are finished
AGAIN = "; copy it, or build the data set again (python -m topformer_jax.prepare)"
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
    """A features.json."""

    pythonClassName: Literal["tensorflow_datasets.core.features.features_dict.FeaturesDict"]
    featuresDict: _FeatureNames


class _Split(msgspec.Struct):
    name: str
    shardLengths: list[Annotated[str, msgspec.Meta(pattern="^[0-9]{1,12}$")]]


class _Info(msgspec.Struct):
    """A dataset_info.json."""

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
    """The shards that preparation/packing.py wrote: TFDS records that hold the files' bytes unchanged.

    A classifier's label is a number. tensorflow-datasets' own imagenet2012, prepared as array_record, is read too.

    From a bucket (gs://) array_record reads each record by a request of its own, as a whole. The labels' sizes are in
    a file beside the shards; those of data sets without it are read once.
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
        self._sizes: dict[int, tuple[int, int]] | None = None  # by index
        self._lock = threading.Lock()

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
        if self._sizes and index in self._sizes:
            size, found = self._sizes[index], read_label_size(example.label, example.where[1])
            if found != size:
                raise UserError(
                    f"{example.where[1]} has {found[1]} x {found[0]} pixels, "
                    f"{LABEL_SIZES} says {size[1]} x {size[0]}{AGAIN}"
                )
        return example

    def label_size(self, index: int) -> tuple[int, int]:
        with self._lock:
            if self._sizes is None:
                self._sizes = self._read_sizes()
        if index not in self._sizes:
            example = self[index]
            self._sizes[index] = read_label_size(example.label, example.where[1])
        return self._sizes[index]

    def _read_sizes(self) -> dict[int, tuple[int, int]]:
        """The sizes that preparation/packing.py wrote, none where there is no such file."""
        folder = files.as_path(self.folder)
        if not (text := read_label_sizes(folder)):
            return {}
        rows = files.read_json(text, dict[str, list[tuple[Side, Side]]], folder / LABEL_SIZES, AGAIN).get(
            self.split, []
        )
        if len(rows) != len(self):
            raise UserError(
                f"{folder / LABEL_SIZES} does not hold the sizes of the {len(self)} labels of {self.split}{AGAIN}"
            )
        return dict(enumerate(rows))


def find_records(root: str, dataset: str, hint: str) -> files.Path:
    """The folder that preparation/packing.py wrote: data.root itself, or below it.

    Raises:
        UserError: there is none (the line ends with `hint`), it is incomplete, or the bucket does not answer.
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
            f"{begun} is incomplete: run python -m topformer_jax.prepare again as it was started (with --shard I/N, "
            "for each I); it goes on where it stopped"
        )
    raise UserError(
        f"no {dataset}/{VERSION}/{INFO} in {root or 'data.root, which is empty'}: build it with python -m "
        f"topformer_jax.prepare {dataset} --source DIR --output DIR --format array_record; {hint}"
    )


def read_label_sizes(folder: files.Path) -> bytes:
    """label_sizes.json as it is; empty where an earlier version packed the data set, or its labels are numbers."""
    return files.read_existing(folder / LABEL_SIZES) or b""


def list_shards(info: bytes, split: str, folder: str | os.PathLike) -> list[str]:
    """The names of a split's files, of what dataset_info.json says; a UserError where it names no such split."""
    where = f"{os.fspath(folder)}/{INFO}"
    fields = files.read_json(info, _Info, where, AGAIN)
    files.require_inside(fields.name, where)
    lengths = {row.name: len(row.shardLengths) for row in fields.splits}
    if split not in lengths:
        raise UserError(f"{where} does not name the {split} split's shards{AGAIN}")
    return shard_names(fields.name, split, lengths[split])
