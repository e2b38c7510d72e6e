"""Packing: shards in a bucket, written by several processes, and after interruptions."""

import importlib
import json
import pathlib
import re
import shutil
import subprocess
import sys
from typing import Any

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from tests.bucket import Bucket, bucket, storage
from tests.commands import finish
from tests.test_sources import JPEG, PNG
from topformer_jax import config as config_lib, models, prepare
from topformer_jax.data import sources
from topformer_jax.data.batch import SegmentationSource
from topformer_jax.inference.evaluation import evaluate_split
from topformer_jax.preparation import packing
from topformer_jax.runtime import files as files_lib
from topformer_jax.runtime.errors import UserError

__all__ = ["bucket", "storage"]
ROOT = pathlib.Path(__file__).parents[1]
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


def test_parts_make_the_same_files(small_shards: None, files: pathlib.Path, tmp_path: pathlib.Path) -> None:
    whole, missing = packing.build("ade20k", str(files), str(tmp_path / "whole"))
    assert missing == ""
    parts = str(tmp_path / "parts")
    folder, missing = packing.build("ade20k", str(files), parts, (2, 3))
    assert missing == "1/3, 3/3"
    with pytest.raises(UserError, match=r"1\.0\.0 is incomplete: run python -m topformer_jax\.prepare again"):
        sources.open_source(records_config(parts), "train")
    assert packing.build("ade20k", str(files), parts, (3, 3))[1] == "1/3"
    assert packing.build("ade20k", str(files), parts, (1, 3))[1] == ""
    assert packing.build("ade20k", str(files), parts, (2, 3))[1] == ""  # again: nothing to do
    expected = contents(pathlib.Path(whole))
    assert contents(pathlib.Path(folder)) == expected
    assert len(expected) == 4 + 1 + 4
    assert json.loads(expected["dataset_info.json"])["splits"][0]["shardLengths"] == ["1", "2", "2", "2"]
    source = sources.open_source(records_config(parts), "train")
    assert [source[index].name for index in range(7)] == list(NAMES)


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
    expected = contents(pathlib.Path(packing.build("ade20k", str(files), str(tmp_path / "whole"))[0]))
    written: list[Any] = []
    write_shard = packing.write_shard

    def stop_at_third(*arguments: Any) -> None:
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(arguments[2])
        write_shard(*arguments)

    def count_shards(*arguments: Any) -> None:
        written.append(arguments[2])
        write_shard(*arguments)

    monkeypatch.setattr(packing, "write_shard", stop_at_third)
    with pytest.raises(KeyboardInterrupt):
        packing.build("ade20k", str(files), output)
    first, second = written
    folder = files_lib.as_path(output) / "ade20k/1.0.0"
    damaged = bytearray((folder / first.name).read_bytes())
    damaged[100] ^= 1
    (folder / first.name).write_bytes(bytes(damaged))

    written.clear()
    monkeypatch.setattr(packing, "write_shard", count_shards)
    assert packing.build("ade20k", str(files), output) == (folder, "")
    assert first in written
    assert second not in written
    assert len(written) == 4
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == expected


def test_two_write_one_shard_on_a_disk(
    small_shards: None, files: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both have one process id; one writes all of it while the other is in the middle of a shard."""
    expected = contents(pathlib.Path(packing.build("ade20k", str(files), str(tmp_path / "whole"))[0]))
    output = str(tmp_path / "records")
    read = sources.FolderSource.__getitem__
    unfinished: list[pathlib.Path] = []

    def run_the_other(source: sources.FolderSource, index: int) -> Any:
        if index == 2 and not unfinished:
            unfinished.extend(tmp_path.rglob("*.tmp"))
            shutil.copy(unfinished[0], unfinished[0].with_name(".left.by.a.killed.process.tmp"))
            assert packing.build("ade20k", str(files), output)[1] == ""
        return read(source, index)

    monkeypatch.setattr(sources.FolderSource, "__getitem__", run_the_other)
    folder, missing = packing.build("ade20k", str(files), output)
    assert (len(unfinished), missing) == (1, "")
    assert contents(pathlib.Path(folder)) == expected


def test_sizes_that_are_not_the_labels(files: pathlib.Path, tmp_path: pathlib.Path) -> None:
    folder = pathlib.Path(packing.build("ade20k", str(files), str(tmp_path))[0])
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
    with pytest.raises(
        UserError, match=r"label g .* has 6 x 4 pixels, label_sizes\.json says 4 x 6; copy it"
    ):
        source[6]
    (files / "annotations/training/c.png").write_bytes(JPEG)
    with pytest.raises(UserError, match=r"annotations/training/c\.png is not a PNG"):
        packing.build("ade20k", str(files), str(tmp_path / "other"))


def run(*arguments: str) -> subprocess.Popen[str]:
    """The command, in a process of its own, with a shard for two examples."""
    program = f"""
import sys
from topformer_jax.runtime import cli; from topformer_jax import prepare
from topformer_jax.preparation import packing
packing.SHARD_BYTES = {2 * (len(JPEG) + len(PNG))}
sys.argv = ["prepare", "ade20k", "--format", "array_record", *{list(arguments)}]
cli.run(prepare.main)
"""
    return subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )


def test_two_processes_write_into_a_bucket(
    files: pathlib.Path, bucket: Bucket, small_shards: None, tmp_path: pathlib.Path
) -> None:
    output = f"{bucket}/records"
    common = ("--source", str(files), "--output", output)
    bucket.set_faults(fail=1, cut=1, match="upload")  # gcsfs tries again
    processes = [run(*common, "--shard", f"{index}/2") for index in (1, 2)]
    results = finish(processes)
    assert [process.returncode for process in processes] == [0, 0], results
    done = [out for out, _ in results if "gs://" in out and "is complete" in out]
    assert done, results
    assert f"--config.data.source=array_record --config.data.root={output}" in done[0]
    whole, _ = packing.build("ade20k", str(files), str(tmp_path / "whole"))
    folder = bucket / "records/ade20k/1.0.0"
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == contents(pathlib.Path(whole))
    source = sources.open_source(records_config(output), "train")
    assert [source[index].image for index in range(7)] == [JPEG + bytes([index]) for index in range(7)]


@pytest.mark.parametrize(
    ("source", "output", "line"),
    [
        ("gs://{}/ade", "{}", "pack a local copy by python -m topformer_jax.prepare ade20k"),
        (
            "files",
            "gs://absent-bucket",
            "-of-00004: there is no such bucket or object, or this account may not see it; the same command",
        ),
        ("files", "gcs://{}", "is in no known storage: expected gs://BUCKET/FOLDER, or a local path"),
        (
            "files",
            "files/images/training/a.jpg",
            "1.0.0: Not a directory; the same command goes on from here",
        ),
    ],
)
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
    """By the server's answers, each of a whole record; without the labels' sizes, in the second evaluation."""
    folder, _ = packing.build("custom", str(drawn), str(bucket))
    (shard,) = (path for path in folder.iterdir() if "validation" in path.name)
    changes = {"data.source": "array_record", "data.dataset": "custom", "data.root": str(folder)}
    config = config_lib.load(config_lib.shapes(), changes | {"evaluation.scale": (72, 72)})
    model = models.build_segmenter(config)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",))
    requests, results = [], []
    for has_sizes in (True, False):
        if not has_sizes:
            (folder / "label_sizes.json").unlink()
        source = sources.open_source(config, "validation")
        source[len(source) - 3]  # it opens the file, and reads its end
        for _ in range(2):
            bucket.set_faults()
            results.append(evaluate_split(model, source, mesh).confusion)
            requests.append(sum(shard.name in line for line in bucket.set_faults()))
    assert requests == [3, 3, 6, 3]
    assert all((result == results[0]).all() for result in results)


def test_a_part_has_a_number_from_1(small_shards: None) -> None:
    assert prepare._parse_part("3/4") == (3, 4)
    for text in ("0/4", "5/4", "4", "a/b"):
        with pytest.raises(UserError, match=f"--shard {text} is not I/N: for 4 processes, 1/4 to 4/4"):
            prepare._parse_part(text)


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
