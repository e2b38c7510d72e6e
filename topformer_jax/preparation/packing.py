"""Packs a data set's folder into array_record shards: few large files, for disks and buckets slow with small ones.

The shards are in tensorflow-datasets' format, written and read without TensorFlow; they hold the files' bytes
unchanged. The same command resumes an interrupted one, and several processes may share the work.
"""

import contextlib
import dataclasses
import hashlib
import json
import pathlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import fsspec
import msgspec
import numpy as np
import tensorflow_datasets as tfds
from etils import epath
from tqdm import tqdm

from topformer_jax.data import records, sources
from topformer_jax.data.catalog import find_layout
from topformer_jax.data.classification import images as class_images
from topformer_jax.data.codecs import read_label_size
from topformer_jax.runtime import files
from topformer_jax.runtime.errors import UserError

Source = sources.FolderSource | class_images.ClassFolderSource
ADVICE = "; the same command goes on from here"
SHARD_BYTES = 64 << 20  # of the examples' files in a shard, about


class FolderBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    """Describes the records to tensorflow-datasets, which reads them; this file writes them."""

    VERSION = tfds.core.Version(records.VERSION)

    def __init__(self, dataset: str, folder: str, classes: Sequence[str]):
        self.name = dataset
        self.classes = list(classes)  # of a classifier's data set
        super().__init__(data_dir=folder, file_format="array_record")

    def _info(self) -> tfds.core.DatasetInfo:
        label_map = tfds.features.Image(shape=(None, None, 1), dtype=np.uint8, encoding_format="png")
        features = {
            "name": tfds.features.Text(),
            "image": tfds.features.Image(),
            "label": tfds.features.ClassLabel(names=self.classes) if self.classes else label_map,
        }
        # The order of training depends on the folder's order.
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True
        )

    def _split_generators(self, manager: Any) -> dict[str, Iterator]:
        raise NotImplementedError

    def _generate_examples(self) -> Iterator:
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Shard:
    """One file to write: consecutive examples of a split."""

    name: str
    split: str
    start: int
    stop: int
    digest: str  # of the names and sizes of its examples' files

    @property
    def part_name(self) -> str:
        return f"{records.PARTS}/{self.name}.json"


class Part(msgspec.Struct):
    """Facts of a finished shard: a file in records.PARTS."""

    digest: str
    size: int
    md5: str
    record_bytes: int
    label_sizes: list[tuple[records.Side, records.Side]]


def plan_shards(dataset: str, splits: Mapping[str, Source]) -> list[Shard]:
    """Divides the splits' examples into shards: the same ones in every process."""
    shards = []
    for split, source in splits.items():
        rows = [source.describe(index) for index in range(len(source))]
        total = sum(part for row in rows for part in row if isinstance(part, int))
        count = max(1, min(len(rows), round(total / SHARD_BYTES)))
        for index, name in enumerate(records.shard_names(dataset, split, count)):
            start, stop = (len(rows) * edge // count for edge in (index, index + 1))
            digest = hashlib.sha256(json.dumps([name, start, rows[start:stop]]).encode()).hexdigest()
            shards.append(Shard(name, split, start, stop, digest))
    return shards


def write_shard(builder: FolderBuilder, source: Source, shard: Shard, folder: files.Path, bar: tqdm) -> Part:
    """Writes a shard, and then the file that says that it is whole."""
    from array_record.python import array_record_module

    features: Any = builder.info.features
    serializer = tfds.core.example_serializer.ExampleSerializer(features.get_serialized_info())
    record_bytes, sizes = 0, []
    with tempfile.TemporaryDirectory() as place:
        temporary = pathlib.Path(place, shard.name)
        writer = array_record_module.ArrayRecordWriter(str(temporary), "group_size:1")
        for index in range(shard.start, shard.stop):
            example = source[index]
            fields = {"name": example.name, "image": example.image, "label": example.label}
            record = serializer.get_tf_example(features.encode_example(fields))
            # A protocol buffer's map has another order in each process, unless asked for this.
            record = record.SerializeToString(deterministic=True)
            writer.write(record)
            record_bytes += len(record)
            if not builder.classes:
                sizes.append(read_label_size(example.label, example.where[1]))
            bar.update()
        writer.close()
        content = temporary.read_bytes()
    files.write_file(folder / shard.name, content, ADVICE)
    md5 = hashlib.md5(content, usedforsecurity=False).hexdigest()
    part = Part(shard.digest, len(content), md5, record_bytes, sizes)
    files.write_file(folder / shard.part_name, msgspec.json.encode(part), ADVICE)
    return part


def find_part(folder: files.Path, shard: Shard) -> Part | None:
    """Returns the facts of a finished shard; None if it is missing, damaged, or of other files."""
    try:
        part = msgspec.json.decode((folder / shard.part_name).read_bytes(), type=Part)
        system, inside = fsspec.core.url_to_fs(str(folder / shard.name))
        facts = system.info(inside)
    except (FileNotFoundError, msgspec.MsgspecError, RecursionError):
        return None
    if part.digest != shard.digest or part.size != facts["size"]:
        return None
    md5 = records.read_md5(facts)
    if not files.is_in_bucket(folder):
        with (folder / shard.name).open("rb") as file:
            md5 = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    return part if md5 in ("", part.md5) else None


def finish(builder: FolderBuilder, parts: Mapping[Shard, Part], folder: files.Path) -> None:
    """Writes the files that describe all shards."""
    infos, sizes = [], {}
    for split in sources.SPLITS:
        mine = {shard: part for shard, part in parts.items() if shard.split == split}
        lengths = [shard.stop - shard.start for shard in mine]
        size = sum(part.record_bytes for part in mine.values())
        template = tfds.core.ShardedFileTemplate(
            data_dir=builder.data_path, dataset_name=builder.name, split=split, filetype_suffix="array_record"
        )
        infos.append(
            tfds.core.SplitInfo(name=split, shard_lengths=lengths, num_bytes=size, filename_template=template)
        )
        sizes[split] = [size for part in mine.values() for size in part.label_sizes]
    builder.info.set_splits(tfds.core.splits.SplitDict(infos))
    sums = {shard.name: records.Sum(part.size, part.md5) for shard, part in parts.items()}
    checksums = records.Checksums(_digest([*parts]), sums)
    files.write_file(folder / records.CHECKSUMS, msgspec.json.encode(checksums), ADVICE)
    if not builder.classes:
        files.write_file(folder / records.LABEL_SIZES, msgspec.json.encode(sizes), ADVICE)
    with tempfile.TemporaryDirectory() as place:
        builder.info.write_to_directory(place)
        names = [records.CLASS_NAMES] if builder.classes else []
        for name in (*names, records.FEATURES, records.INFO):
            files.write_file(folder / name, (pathlib.Path(place) / name).read_bytes(), ADVICE)
    with contextlib.suppress(OSError):  # two processes may finish at once
        epath.Path(folder / records.PARTS).rmtree()


def is_complete(folder: files.Path, shards: list[Shard]) -> bool:
    """Whether the folder holds all of these shards; raises UserError if it holds those of other files."""
    if not (folder / records.INFO).exists():
        return False
    with contextlib.suppress(FileNotFoundError, msgspec.MsgspecError, RecursionError):
        text = (folder / records.CHECKSUMS).read_bytes()
        if msgspec.json.decode(text, type=records.Checksums).source == _digest(shards):
            return True
    raise UserError(
        f"{folder} is there already, from other files or an earlier version: remove it, or give another --output"
    )


def build(dataset: str, source: str, output: str, part: tuple[int, int] = (1, 1)) -> files.Path:
    """Packs train and validation of a folder, or of N parts of their shards the I-th one, for `part` (I, N).

    Returns the folder of the shards; prints which parts are missing there. Raises UserError if the source is
    incomplete, or the output cannot be written or holds something else.
    """
    layout = find_layout(dataset)
    classes = [] if layout else class_images.read_class_folders(source)
    splits: dict[str, Source] = {
        split: sources.open_folder(dataset, layout, source, split)
        if layout
        else class_images.open_class_folder(source, split)
        for split in sources.SPLITS
    }
    shards = plan_shards(dataset, splits)
    folder = files.as_path(output) / dataset / records.VERSION
    names = pathlib.Path(source).expanduser() / "classes.txt"
    with files.report_errors("write", folder, ADVICE), tempfile.TemporaryDirectory() as empty:
        if is_complete(folder, shards):
            return folder
        builder, parts = FolderBuilder(dataset, empty, classes), dict[Shard, Part]()
        mine = shards[part[0] - 1 :: part[1]]
        with tqdm(total=sum(shard.stop - shard.start for shard in mine), unit=" examples") as bar:
            for shard in mine:
                if found := find_part(folder, shard):
                    bar.update(shard.stop - shard.start)
                parts[shard] = found or write_shard(builder, splits[shard.split], shard, folder, bar)
        of_all = {shard: parts.get(shard) or find_part(folder, shard) for shard in shards}
        complete = {shard: found for shard, found in of_all.items() if found}
        if len(complete) == len(shards):
            if dataset in ("custom", "imagenet") and names.exists():
                files.write_file(folder / names.name, files.read_bytes(names), ADVICE)
            finish(builder, complete, folder)
        elif not is_complete(folder, shards):  # another process may have finished, and removed the parts
            missing = {number % part[1] + 1 for number, shard in enumerate(shards) if shard not in complete}
            shown = ", ".join(f"{number}/{part[1]}" for number in sorted(missing))
            print(f"wrote --shard {part[0]}/{part[1]} of {folder}; still missing: --shard {shown}")
    return folder


def _digest(shards: list[Shard]) -> str:
    return hashlib.sha256("".join(shard.digest for shard in shards).encode()).hexdigest()
