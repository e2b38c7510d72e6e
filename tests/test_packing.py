"""Packing: shards on a disk and in a bucket, and after interruptions."""

import importlib
import json
import pathlib
import re
import sys
from typing import Any

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from tests.bucket import Bucket, bucket, storage
from tests.test_sources import JPEG, PNG
from topformer_jax import config as config_lib, models, prepare
from topformer_jax.data import sources
from topformer_jax.data.batch import SegmentationSource
from topformer_jax.inference.evaluation import evaluate_split
from topformer_jax.preparation import packing
from topformer_jax.runtime import files as files_lib
from topformer_jax.runtime.errors import UserError

__all__ = ["bucket", "storage"]
NAMES = ("a", "b", "c", "d", "e", "f", "g")


@pytest.fixture
def files(tmp_path: pathlib.Path) -> pathlib.Path:
    """A folder of 7 examples and one for validation."""
    root = tmp_path / "files"
    for split, names in (("training", NAMES), ("validation", NAMES[:1])):
        for number, name in enumerate(names):
            for kind, suffix, content in (("images", ".jpg", JPEG), ("annotations", ".png", PNG)):
                file = root / kind / split / (name + suffix)
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(content + bytes([number]))
    return root


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two or three examples in a shard."""
    monkeypatch.setattr(packing, "SHARD_BYTES", 2 * (len(JPEG) + len(PNG)))


def records_config(root: str, **changes: str) -> ConfigDict:
    overrides = {"data.source": "array_record", "data.root": root} | changes
    return config_lib.load(config_lib.ade20k("tiny"), overrides)


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def pack(files: pathlib.Path, output: str, *flags: str) -> None:
    """Runs the command."""
    words = ["ade20k", "--format", "array_record", "--source", str(files), "--output", output, *flags]
    prepare.prepare(prepare.make_parser().parse_args(words))


@pytest.mark.parametrize("place", ["disk", "bucket"])
def test_parts_make_the_same_files(
    small_shards: None,
    files: pathlib.Path,
    tmp_path: pathlib.Path,
    bucket: Bucket,
    capsys: pytest.CaptureFixture[str],
    place: str,
) -> None:
    expected = contents(pathlib.Path(packing.build("ade20k", str(files), str(tmp_path / "whole"))))
    output = str(bucket) if place == "bucket" else str(tmp_path / "parts")
    bucket.set_faults(fail=1, cut=1, match="upload")  # gcsfs tries again
    said = []
    for part in ("2/3", "3/3", "3/3", "1/3", "2/3"):  # the last one finds all complete
        pack(files, output, "--shard", part)
        said.append(capsys.readouterr().out)
        if len(said) == 1:
            with pytest.raises(UserError, match=r"1\.0\.0 is incomplete: run the same python -m"):
                sources.open_source(records_config(output), "train")
    folder = files_lib.as_path(output) / "ade20k/1.0.0"
    assert f"wrote --shard 2/3 of {folder}; still missing: --shard 1/3, 3/3" in said[0]
    assert all("still missing: --shard 1/3\n" in text for text in said[1:3])
    assert all(f"{folder} is complete" in text and "missing" not in text for text in said[3:])
    assert not any("complete" in text for text in said[:3])
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == expected
    assert json.loads(expected["dataset_info.json"])["splits"][0]["shardLengths"] == ["1", "2", "2", "2"]
    source = sources.open_source(records_config(output), "train")
    assert [source[index][:2] for index in range(7)] == [(name, JPEG + bytes([n])) for n, name in enumerate(NAMES)]


@pytest.mark.parametrize("place", ["disk", "bucket"])
def test_an_interrupted_build_goes_on(
    small_shards: None,
    files: pathlib.Path,
    tmp_path: pathlib.Path,
    bucket: Bucket,
    monkeypatch: pytest.MonkeyPatch,
    place: str,
) -> None:
    output = str(bucket) if place == "bucket" else str(tmp_path / "records")
    expected = contents(pathlib.Path(packing.build("ade20k", str(files), str(tmp_path / "whole"))))
    written: list[Any] = []
    write_shard, most = packing.write_shard, 2

    def count_shards(*arguments: Any) -> packing.Part:
        if len(written) == most:
            raise KeyboardInterrupt
        written.append(arguments[2])
        return write_shard(*arguments)

    monkeypatch.setattr(packing, "write_shard", count_shards)
    with pytest.raises(KeyboardInterrupt):
        packing.build("ade20k", str(files), output)
    first, second = written
    with pytest.raises(
        UserError, match=r"1\.0\.0 is incomplete: run the same python -m topformer_jax\.prepare command again"
    ):
        sources.open_source(records_config(output), "train")
    folder = files_lib.as_path(output) / "ade20k/1.0.0"
    damaged = bytearray((folder / first.name).read_bytes())
    damaged[100] ^= 1
    (folder / first.name).write_bytes(bytes(damaged))

    written.clear()
    most = 9
    assert packing.build("ade20k", str(files), output) == folder
    assert first in written
    assert second not in written
    assert len(written) == 4
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == expected


def test_two_that_write_one_shard_make_the_same_files(
    small_shards: None, files: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One writes all of it while the other is in the middle of a shard."""
    expected = contents(pathlib.Path(packing.build("ade20k", str(files), str(tmp_path / "whole"))))
    output = str(tmp_path / "records")
    read = sources.FolderSource.__getitem__
    others: list[Any] = []

    def run_the_other(source: sources.FolderSource, index: int) -> Any:
        if index == 2 and not others:
            others.append(None)
            others.append(packing.build("ade20k", str(files), output))
        return read(source, index)

    monkeypatch.setattr(sources.FolderSource, "__getitem__", run_the_other)
    folder = packing.build("ade20k", str(files), output)
    assert others[1] == folder
    assert contents(pathlib.Path(folder)) == expected


def test_sizes_that_are_not_the_labels(files: pathlib.Path, tmp_path: pathlib.Path) -> None:
    folder = pathlib.Path(packing.build("ade20k", str(files), str(tmp_path)))
    table = folder / "label_sizes.json"
    assert json.loads(table.read_text()) == {"train": [[4, 6]] * 7, "validation": [[4, 6]]}
    rows = [[4, 6]] * 6

    def open_with(content: str) -> SegmentationSource:
        table.write_text(content)
        source = sources.open_source(records_config(str(tmp_path)), "train")
        assert isinstance(source, SegmentationSource)
        return source

    for content in ("{", "[]", json.dumps({"train": rows}), json.dumps({"train": [*rows, 5]})):
        with pytest.raises(
            UserError, match=r"label_sizes\.json (is not the JSON|does not hold the sizes of the 7 labels)"
        ):
            open_with(content).label_size(0)
    source = open_with(json.dumps({"train": [*rows, [6, 4]]}))
    assert source.label_size(6) == (6, 4)
    assert source[5].name == "f"
    with pytest.raises(UserError, match=r"label g .* has 6 x 4 pixels, label_sizes\.json says 4 x 6"):
        source[6]
    (files / "annotations/training/c.png").write_bytes(JPEG)
    with pytest.raises(UserError, match=r"annotations/training/c\.png is not a PNG"):
        packing.build("ade20k", str(files), str(tmp_path / "other"))


@pytest.mark.parametrize(("source", "output", "line"), [
    ("gs://{}/ade", "{}", "pack a local copy by python -m topformer_jax.prepare ade20k"),
    ("files", "gs://absent-bucket",
     "-of-00004: there is no such bucket or object, or this account may not see it; the same command"),
    ("files", "gcs://{}", "is in no known storage: expected gs://BUCKET/FOLDER, or a local path"),
    ("files", "files/images/training/a.jpg", "1.0.0: Not a directory; the same command goes on from here"),
])  # fmt: skip
def test_what_goes_wrong_is_one_line(
    small_shards: None,
    files: pathlib.Path,
    bucket: Bucket,
    monkeypatch: pytest.MonkeyPatch,
    source: str,
    output: str,
    line: str,
) -> None:
    monkeypatch.chdir(files.parent)
    with pytest.raises(UserError, match=re.escape(line)) as error:
        packing.build("ade20k", source.format(bucket.root.name), output.format(bucket.root.name))
    assert "\n" not in str(error.value)


def test_an_evaluation_reads_each_picture_once(drawn: pathlib.Path, bucket: Bucket) -> None:
    """By the server's answers, each of a whole record."""
    folder = packing.build("custom", str(drawn), str(bucket))
    (shard,) = (path for path in folder.iterdir() if "validation" in path.name)
    changes = {"data.source": "array_record", "data.dataset": "custom", "data.root": str(folder)}
    config = config_lib.load(config_lib.shapes(), changes | {"evaluation.scale": (72, 72)})
    source = sources.open_source(config, "validation")
    source[len(source) - 3]  # it opens the file, and reads its end
    bucket.set_faults()
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",))
    evaluate_split(models.build_segmenter(config), source, mesh)
    assert sum(shard.name in line for line in bucket.set_faults()) == len(source) == 3


def test_a_folder_layout_in_a_bucket_is_refused(bucket: Bucket) -> None:
    for dataset in ("ade20k", "custom"):
        changes = {"data.root": f"{bucket}/ade", "data.dataset": dataset}
        words = f"prepare {dataset} --source DIR --output {bucket}/ade/records"
        with pytest.raises(UserError, match=words):
            sources.open_source(config_lib.load(config_lib.ade20k("tiny"), changes), "train")


def test_without_gcsfs_the_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    known = importlib.import_module("fsspec.registry")  # the package hides it
    monkeypatch.delitem(known._registry, "gs", raising=False)
    line = (
        "gs://somewhere/records is in Google Cloud Storage, and gcsfs is not installed: pip install "
        "'topformer_jax[gcs]' (from a clone: pip install -e '.[gcs]')"
    )
    with pytest.raises(UserError) as error:
        sources.open_source(records_config("gs://somewhere/records"), "train")
    assert str(error.value) == line
