"""data.cache: shards copied from a bucket or a disk once a host, checked, and continued after an interruption."""

import json
import os
import pathlib
import pickle
import shutil
import threading
import time

import numpy as np
import pytest
from etils import epath
from ml_collections import ConfigDict

from tests import machines
from tests.bucket import Bucket, bucket, storage
from tests.commands import LONGEST
from tests.test_packing import NAMES, files, records_config, small_shards
from tests.test_sources import JPEG, refusal
from topformer_jax import config as config_lib
from topformer_jax.data import loader, records, sources
from topformer_jax.preparation import packing
from topformer_jax.runtime import logs
from topformer_jax.runtime.errors import UserError
from topformer_jax.runtime.files import read_boot_id

__all__ = ["bucket", "files", "small_shards", "storage"]
TABLES = {"dataset_info.json", "features.json", "label_sizes.json"}
TRAIN = [f"ade20k-train.array_record-{index:05d}-of-00004" for index in range(4)]


@pytest.fixture
def packed(small_shards: None, files: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    """A packed data set on the disk: 7 training examples in 4 shards."""
    return pathlib.Path(packing.build("ade20k", str(files), str(tmp_path / "records")))


@pytest.fixture
def uploaded(packed: pathlib.Path, bucket: Bucket) -> epath.Path:
    """The same in a bucket."""
    folder = bucket / "records/ade20k/1.0.0"
    for file in packed.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def cached(folder: epath.Path | pathlib.Path, place: pathlib.Path | str) -> ConfigDict:
    return records_config(os.fspath(folder), **{"data.cache": str(place)})


def names_in(place: pathlib.Path) -> set[str]:
    (folder,) = place.iterdir()
    return {path.name for path in folder.iterdir()} - {".lock"}


def test_examples_are_those_of_the_source(
    uploaded: epath.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture
) -> None:
    copy = tmp_path / "copy"
    source = sources.open_source(cached(uploaded, copy), "train", logs.Progress)
    assert [source[index].image for index in range(7)] == [JPEG + bytes([index]) for index in range(7)]
    assert [pickle.loads(pickle.dumps(source))[index].name for index in range(7)] == list(NAMES)
    assert f"1/1 MB copied from {uploaded}" in capsys.readouterr().out
    assert names_in(copy) == {*TABLES, *TRAIN}  # of this split alone
    for name in TRAIN:
        assert next(copy.iterdir()).joinpath(name).read_bytes() == (uploaded / name).read_bytes()
    sources.open_source(cached(uploaded, copy), "validation")
    assert "ade20k-validation.array_record-00000-of-00001" in names_in(copy)


def test_copies_are_made_once(uploaded: epath.Path, bucket: Bucket, tmp_path: pathlib.Path) -> None:
    config = cached(uploaded, tmp_path / "copy")
    sources.open_source(config, "train")
    (folder,) = (tmp_path / "copy").iterdir()
    (folder / TRAIN[1]).unlink()
    (folder / TRAIN[2]).write_bytes(b"cut off")
    for host, age in ((read_boot_id(), 0), ("gone", 4000), ("alive", 2000)):
        left = folder / f".{TRAIN[3]}.{host}.x.tmp"
        left.write_bytes(b"of a process that was killed, or that copies on another host")
        os.utime(left, (time.time() - age,) * 2)
    bucket.set_faults()
    sources.open_source(config, "train")
    lines = bucket.set_faults()
    assert {name for name in TRAIN if any(name in line for line in lines)} == {TRAIN[1], TRAIN[2]}
    assert names_in(tmp_path / "copy") == {*TABLES, *TRAIN, f".{TRAIN[3]}.alive.x.tmp"}
    folder.chmod(0o500)
    sources.open_source(config, "train")
    folder.chmod(0o700)
    assert not any("array_record" in line for line in bucket.set_faults())


def test_versions_are_not_mixed(
    small_shards: None, files: pathlib.Path, packed: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    config = cached(packed, tmp_path / "copy")
    old = sources.open_source(config, "train")[0].label
    label = files / "annotations/training/a.png"
    label.write_bytes(label.read_bytes()[:-1] + b"\xff")  # of the same size: only its checksum tells
    shutil.rmtree(packed)
    packing.build("ade20k", str(files), str(tmp_path / "records"))
    assert sources.open_source(config, "train")[0].label == label.read_bytes() != old
    assert len(list((tmp_path / "copy").iterdir())) == 2


@pytest.mark.parametrize("sums", [True, False])
def test_a_damaged_copy_is_refused(
    uploaded: epath.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, sums: bool
) -> None:
    """By the checksums that were written with the shards, or without them by the bucket's."""
    if not sums:
        (uploaded / "checksums.json").unlink()
    read = records._read_piece

    def flip_a_bit(path: epath.Path, start: int, end: int) -> bytes:
        content = bytearray(read(path, start, end))
        content[10] ^= 1 if path.name == TRAIN[2] else 0
        return bytes(content)

    config = cached(uploaded, tmp_path / "copy")
    monkeypatch.setattr(records, "_read_piece", flip_a_bit)
    with pytest.raises(UserError, match=rf"{TRAIN[2]} is not what it was when it was written \(131072 bytes"):
        sources.open_source(config, "train")
    assert TRAIN[2] not in names_in(tmp_path / "copy")
    assert not any(name.endswith(".tmp") for name in names_in(tmp_path / "copy"))
    monkeypatch.setattr(records, "_read_piece", read)
    assert len(sources.open_source(config, "train")) == 7


def test_a_failing_bucket_is_tried_again_and_then_named(
    uploaded: epath.Path, bucket: Bucket, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "PIECE", 50_000)  # three requests a shard
    config = cached(uploaded, tmp_path / "copy")
    bucket.set_faults(fail=1, match=TRAIN[0])
    sources.open_source(config, "train")
    assert sum(TRAIN[0] in line for line in bucket.set_faults()) == 4
    shutil.rmtree(tmp_path / "copy")
    bucket.set_faults(fail=1, status=403, match=TRAIN[3])
    with pytest.raises(UserError, match=f"cannot read {uploaded}/{TRAIN[3]}: this account has no permission"):
        sources.open_source(config, "train")
    sources.open_source(config, "train")


COPIER = """
import sys
from topformer_jax.data import records
from topformer_jax.runtime import files
source = files.as_path(sys.argv[1])
records.copy_split(source, "ade20k", "validation", sys.argv[2])
print("ready")
input()
records.copy_split(source, "ade20k", "train", sys.argv[2])
"""


def test_hosts_share_a_copy(uploaded: epath.Path, bucket: Bucket, tmp_path: pathlib.Path) -> None:
    """Both are process 1, and the disk's locks hold for one host only: both copy, and neither disturbs the other."""
    sources.open_source(cached(uploaded, tmp_path / "copy"), "validation")
    (folder,) = (tmp_path / "copy").iterdir()
    hosts = [machines.make_host(tmp_path / name, folder / ".lock") for name in ("first", "second")]
    started = [machines.start(COPIER, host, uploaded, tmp_path / "copy") for host in hosts]
    bucket.set_faults(delay=2.0, match="train.array_record")
    machines.run_at_once(started)
    requests = bucket.set_faults()
    assert [sum(name in line for line in requests) for name in TRAIN] == [2] * 4
    assert {name: (folder / name).read_bytes() for name in TRAIN} == {
        name: (uploaded / name).read_bytes() for name in TRAIN
    }
    assert not list(folder.glob(".*.tmp"))


def test_a_process_waits_for_another(
    packed: pathlib.Path,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    copying, go_on, copied = threading.Event(), threading.Event(), []
    read = records._read_piece

    def read_slowly(path: epath.Path, start: int, end: int) -> bytes:
        copying.set()
        assert go_on.wait(LONGEST)
        copied.append(path.name)
        return read(path, start, end)

    def update(progress: logs.Progress, done: int) -> None:
        print(done, progress._unit)
        go_on.set()

    monkeypatch.setattr(records, "_read_piece", read_slowly)
    monkeypatch.setattr(logs.Progress, "update", update)
    config = cached(packed, tmp_path / "copy")
    first = threading.Thread(target=sources.open_source, args=(config, "train"))
    first.start()
    assert copying.wait(LONGEST)
    assert len(sources.open_source(config, "train", logs.Progress)) == 7
    assert sorted(copied) == TRAIN  # once
    assert "0 MB, copied to " in capsys.readouterr().out


def test_what_goes_wrong_is_one_line(
    packed: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "is a bucket: give a folder on a local disk" in refusal(cached(packed, "gs://b/x"))
    (tmp_path / "file").write_text("")
    line = refusal(cached(packed, tmp_path / "file"))
    assert f"cannot write {tmp_path}/file: " in line
    assert line.endswith("; --config.data.cache=DIR names another folder")
    usage = shutil.disk_usage(tmp_path)._replace(free=400_000)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage)
        line = refusal(cached(packed, tmp_path / "copy"))
    assert f"{tmp_path}/copy is too small: ade20k's train shards need 0.5 MB more, 0.4 MB are free" in line
    config = config_lib.load(config_lib.ade20k("tiny"), {"data.cache": "x"})
    assert "data.cache=x holds copies of array_record shards, but data.source=folder" in refusal(config)
    (packed / TRAIN[1]).unlink()
    assert f"/{TRAIN[1]}: No such file" in refusal(cached(packed, tmp_path / "copy"))
    (packed / "checksums.json").write_text(json.dumps({"shards": {}}))
    assert "checksums.json is not the JSON file that was expected (Object missing" in refusal(
        cached(packed, tmp_path / "copy")
    )


def test_worker_processes_read_a_bucket_in_place(packed: pathlib.Path, uploaded: epath.Path) -> None:
    settings = {"data.num_workers": 1, "batch_size": 4, "data.crop_size": (8, 8), "data.scale": (12, 12)}
    batches = []
    for root, workers in ((packed, 0), (uploaded, 1)):
        changes = settings | {"data.root": os.fspath(root), "data.num_workers": workers}
        config = config_lib.load(records_config(""), changes)
        batches.append(next(iter(loader.training_batches(sources.open_source(config, "train"), config))))
    for expected, found in zip(*batches, strict=True):
        np.testing.assert_array_equal(expected, found)
