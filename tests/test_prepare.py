"""`prepare` on official downloads in miniature: the folders it makes, interruptions, bad archives."""

import errno
import hashlib
import io
import itertools
import json
import os
import pathlib
import signal
import sys
import tarfile
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tests import miniatures
from topformer_jax import config as config_lib, prepare
from topformer_jax.data import sources
from topformer_jax.data.codecs import decode_label
from topformer_jax.preparation import labels, releases, writer
from topformer_jax.runtime import cli
from topformer_jax.runtime.errors import UserError

ALL: dict[str, Callable[[pathlib.Path], object]] = {
    **miniatures.SEGMENTATION,
    "imagenet": miniatures.imagenet,
}
Make = Callable[[pathlib.Path], miniatures.Expected]


def words_of(dataset: str, source: pathlib.Path, output: pathlib.Path, *flags: str) -> list[str]:
    return [dataset, "--source", str(source), "--output", str(output), *flags]


def run(dataset: str, source: pathlib.Path, output: pathlib.Path, *flags: str) -> None:
    """Runs the command in this process."""
    prepare.prepare(prepare.make_parser().parse_args(words_of(dataset.partition(" ")[0], source, output, *flags)))


def refusal(dataset: str, source: pathlib.Path, output: pathlib.Path, *flags: str) -> str:
    with pytest.raises(UserError) as error:
        run(dataset, source, output, *flags)
    assert "\n" not in str(error.value)
    return str(error.value)


def tree(folder: pathlib.Path) -> dict[str, bytes]:
    """All files below a folder, hidden ones too."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


@pytest.mark.parametrize("dataset", miniatures.SEGMENTATION)
def test_downloads_become_the_layout(
    dataset: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    downloads, made = tmp_path / "downloads", tmp_path / "made"
    downloads.mkdir()
    expected = miniatures.SEGMENTATION[dataset](downloads)
    run(dataset, downloads, made)
    config = config_lib.load(expected.config, {"data.root": str(made)})
    classes = len(sources.find_data_set(config).classes)
    for split in sources.SPLITS:
        source = sources.open_source(config, split)
        found = {source[index].name: source[index] for index in range(len(source))}
        wanted = getattr(expected, split)
        assert found.keys() == wanted.keys()
        for name, (image, values) in wanted.items():
            assert found[name].image == image
            reduce = config.data.reduce_zero_label
            label = decode_label(found[name].label, name, classes=classes, reduce_zero_label=reduce)
            np.testing.assert_array_equal(label, values, err_msg=f"{split} {name}")
    out = capsys.readouterr().out
    assert f"train: {len(expected.train)} images (published are " in out
    assert f", {len(expected.train)} labels, " in out
    assert f"--config.data.root={made}" in out

    before = tree(made)
    assert json.loads(before["manifest.json"])["archives"] == {
        path.name: [path.stat().st_size] for path in sorted(downloads.iterdir())
    }
    rows = [line.split("\t") for line in before["files.tsv"].decode().splitlines()]
    assert {row[4]: row[0] for row in rows} == {
        path: hashlib.sha256(data).hexdigest()
        for path, data in before.items()
        if path not in ("manifest.json", "files.tsv")
    }
    run(dataset, downloads, made)  # again: nothing changes
    assert tree(made) == before


def test_downloads_become_records(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By way of a folder below the output, which stays."""
    (tmp_path / "downloads").mkdir()
    expected, made = miniatures.ade20k(tmp_path / "downloads"), tmp_path / "made"
    before: dict[str, bytes] = {}
    for _ in range(2):  # again: it is complete
        run("ade20k", tmp_path / "downloads", made, "--format", "array_record")
        out = capsys.readouterr().out
        assert f"--config.data.source=array_record --config.data.root={made}" in out
        assert f"note: {made}/ade20k/files stays" in out
        before = before or tree(made)
        assert tree(made) == before
    changes = {"data.source": "array_record", "data.root": str(made)}
    source = sources.open_source(config_lib.load(expected.config, changes), "train")
    found = {source[index].name: source[index].image for index in range(len(source))}
    assert found == {name: image for name, (image, _) in expected.train.items()}


def test_lists_and_colours_of_camvid() -> None:
    """Counts, ends and order of SegNet's lists; a few pixels in no class's colour are void."""
    lists = {word: [*releases.list_camvid(word)] for word in ("train", "val", "test")}
    assert {word: len(names) for word, names in lists.items()} == {"train": 367, "val": 101, "test": 233}
    assert all(names == sorted(names) for names in lists.values())
    assert len({name for names in lists.values() for name in names}) == 701
    ends = [(names[0], names[-1]) for names in lists.values()]
    assert ends[0] == ("0001TP_006690", "0016E5_08640")
    assert ends[2] == ("0001TP_008550", "Seq05VD_f05100")
    mask, name = np.full((20, 20, 3), 128), "0016E5_07959_L.png"
    mask[0, :4] = 7
    colours = {(128, 128, 128): 0}
    data = labels.map_colours(colours, miniatures.png(mask), name, void_share=0.01)
    assert (decode_label(data, name, classes=1, reduce_zero_label=False) == 255).sum() == 4
    mask[1, 0] = 8
    with pytest.raises(UserError, match=r"1\.25% of the pixels have colours that no class has, such as \(7"):
        labels.map_colours(colours, miniatures.png(mask), name, void_share=0.01)


class Killed(BaseException):
    """Stands for a kill: nobody cleans up after it."""


@pytest.mark.parametrize("dataset", ["voc2012", "imagenet"])  # one pass over a .tgz, and nested archives
def test_an_interrupted_run_goes_on(dataset: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    downloads, made = tmp_path / "downloads", tmp_path / "made"
    downloads.mkdir()
    ALL[dataset](downloads)
    run(dataset, downloads, tmp_path / "whole")
    whole = tree(tmp_path / "whole")
    rename, numbers = pathlib.Path.replace, itertools.count(1)

    def end_before_rename(path: pathlib.Path, target: pathlib.Path) -> pathlib.Path:
        if path.parent.name == ".partial" and next(numbers) > len(whole) // 2:
            raise Killed
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(pathlib.Path, "replace", end_before_rename)
        with pytest.raises(Killed):
            run(dataset, downloads, made)
    left = tree(made)
    assert any(path.startswith(".partial") for path in left)
    finished = {line.split("\t")[4] for line in left["files.tsv"].decode().splitlines()}
    assert 0 < len(finished) < len(whole) - 2
    for path in finished:  # what has its name is whole
        assert left[path] == whole[path]
    times = {path: (made / path).stat().st_mtime_ns for path in finished}
    run(dataset, downloads, made)
    assert tree(made) == whole
    assert {path: (made / path).stat().st_mtime_ns for path in finished} == times


def test_imagenet(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = miniatures.imagenet(tmp_path)
    run("imagenet", tmp_path, tmp_path / "made")
    found = tree(tmp_path / "made")
    del found["manifest.json"], found["files.tsv"]
    assert found == expected
    assert "train: 4 images (published are 1,281,167), 0 labels" in capsys.readouterr().out


def test_what_was_damaged_later_is_made_again(tmp_path: pathlib.Path) -> None:
    miniatures.ade20k(tmp_path)
    run("ade20k", tmp_path, tmp_path / "made")
    whole = tree(tmp_path / "made")
    first, second, third = sorted((tmp_path / "made/images/training").iterdir())
    first.unlink()
    second.write_bytes(second.read_bytes()[:-1])
    third.write_bytes(third.read_bytes()[:-1] + b"x")  # of the same size
    run("ade20k", tmp_path, tmp_path / "made")
    assert {path for path, data in tree(tmp_path / "made").items() if data != whole[path]} == {
        third.relative_to(tmp_path / "made").as_posix()
    }
    run("ade20k", tmp_path, tmp_path / "made", "--verify")
    assert tree(tmp_path / "made") == whole


def cut(path: pathlib.Path, part: float) -> None:
    path.write_bytes(path.read_bytes()[: int(len(path.read_bytes()) * part)])


def strip_end(path: pathlib.Path) -> None:
    """Cuts a tar file off between two members, where its format alone does not show it."""
    data = path.read_bytes().rstrip(b"\0")
    path.write_bytes(data + bytes(-len(data) % 512))


def list_tar(data: bytes) -> list[tarfile.TarInfo]:
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return tar.getmembers()


def reserve(path: pathlib.Path) -> None:
    """As a download that has its size from the start, and not yet its second half."""
    data = path.read_bytes() + bytes(4 << 20)
    path.write_bytes(data[:1536] + bytes(len(data) - 1536))


def spoil_header(path: pathlib.Path, nested: bool = False, hole: bool = False) -> None:
    """Changes a letter in a tar file's second header, or puts zeros in its place: tarfile's list ends there."""
    data = bytearray(path.read_bytes())
    start = list_tar(bytes(data))[0].offset_data if nested else 0
    second = list_tar(bytes(data[start:]))[1].offset + start
    data[second : second + 512] = bytes(512) if hole else data[second : second + 511] + b"x"
    path.write_bytes(data)


def spoil_member(path: pathlib.Path) -> None:
    data = bytearray(path.read_bytes())
    data[data.index(b"ADE_train_00000002.jpg") + 40] ^= 255  # after the first header of that name
    path.write_bytes(data)


ADE, VOC, VAL = "ADEChallengeData2016.zip", "VOCtrainval_11-May-2012.tar", "ILSVRC2012_img_val.tar"
TRAIN, KIT = "ILSVRC2012_img_train.tar", "ILSVRC2012_devkit_t12.tar.gz"
DAMAGES: list[tuple[str, str, Callable[[pathlib.Path], object], str]] = [
    ("ade20k", ADE, lambda path: cut(path, 0.6), f"{ADE} ("),
    ("ade20k", ADE, lambda path: path.write_bytes(b"<html>log in</html>"), "no such archive"),
    ("ade20k", ADE, pathlib.Path.unlink, "sceneparsing.csail.mit.edu"),
    ("ade20k", ADE, spoil_member, "at ADEChallengeData2016/images/training/ADE_train_00000002.jpg"),
    ("cocostuff164k", "val2017.zip", lambda path: path.write_bytes(b""), "val2017.zip (0 bytes) is cut off"),
    ("voc2012", VOC, lambda path: cut(path, 0.5), f"{VOC} ("),
    ("voc2012", "benchmark.tgz", lambda path: cut(path, 0.9), "benchmark.tgz ("),
    ("context59", "trainval.tar.gz", lambda path: cut(path, 0.3), "trainval.tar.gz ("),
    ("context60", "trainval_merged.json", lambda path: cut(path, 0.5), "is not the JSON file"),
    ("imagenet", KIT, lambda path: cut(path, 0.8), f"{KIT} ("),
    ("imagenet", TRAIN, lambda path: cut(path, 0.7), f"{TRAIN} ("),
    ("imagenet", TRAIN, lambda path: spoil_header(path, nested=True), "at n01440764.tar: there is no header"),
    ("imagenet", VAL, strip_end, "its end is missing"),
    ("imagenet", VAL, spoil_header, "there is no header at byte"),
    ("imagenet", VAL, reserve, "there is nothing behind byte"),
    ("imagenet", VAL, lambda path: spoil_header(path, hole=True), "there is no header at byte"),
]


@pytest.mark.parametrize(("dataset", "name", "damage", "line"), DAMAGES)
def test_bad_archives_are_one_line(
    dataset: str, name: str, damage: Callable[[pathlib.Path], None], line: str, tmp_path: pathlib.Path
) -> None:
    (tmp_path / "downloads").mkdir()
    ALL[dataset](tmp_path / "downloads")
    damage(tmp_path / "downloads" / name)
    said = refusal(dataset, tmp_path / "downloads", tmp_path / "made")
    assert line in said
    assert name in said
    assert "replace it" in said or "download" in said or "JSON" in said


def test_other_archives_are_one_line(tmp_path: pathlib.Path) -> None:
    miniatures.cityscapes(tmp_path)
    (tmp_path / "gtFine_trainvaltest.zip").rename(tmp_path / "ADEChallengeData2016.zip")
    assert "holds no images/training/: it is another" in refusal("ade20k", tmp_path, tmp_path / "made")
    line = refusal("cityscapes", tmp_path, tmp_path / "made")
    assert "download gtFine_trainvaltest.zip from cityscapes-dataset.com" in line
    line = refusal("context60", tmp_path, tmp_path / "made")
    assert "VOCtrainval_03-May-2010.tar from the PASCAL VOC site" in line
    assert "trainval_merged.json from" in line
    assert ", or " in line
    assert not (tmp_path / "made").exists()


def test_pascal_context_has_59_classes(tmp_path: pathlib.Path) -> None:
    miniatures.context60(tmp_path)
    file = tmp_path / "trainval_merged.json"
    content = json.loads(file.read_text())
    first = content["annos_segmentation"][0]
    for key, value, line in (
        ("segmentation", {"counts": [5]}, "the runs of a mask are of 5 pixels, and its picture has 48"),
        ("category_id", 3, "holds category 3, which is none of"),
        ("image_id", None, "expected (Expected `int`, got `null`"),
    ):
        first[key] = value
        file.write_text(json.dumps(content))
        assert line in refusal("context60", tmp_path, tmp_path / key)


def test_a_folder_is_of_one_thing(tmp_path: pathlib.Path) -> None:
    miniatures.ade20k(tmp_path)
    miniatures.cocostuff10k(tmp_path)
    run("ade20k", tmp_path, tmp_path / "made")
    line = refusal("cocostuff10k", tmp_path, tmp_path / "made")
    assert "made of something else (other dataset, archives)" in line
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine.txt").write_text("x")
    line = refusal("ade20k", tmp_path, tmp_path / "full")
    assert "was not made by this command: name another --output" in line
    line = refusal("ade20k", tmp_path / "made", tmp_path / "new")
    assert "has the layout of ade20k already: use it with" in line
    for flag, value, words in (
        ("--from", "coco", "--from coco is for your own data"),
        ("--shard", "1/2", "--shard 1/2, --output"),
        *(
            ("--shard", part, f"--shard {part} is not I/N: for 4 processes, 1/4")
            for part in ("0/4", "5/4", "4", "a/b")
        ),
        ("--validation", "1", "--validation is 1.0: expected a share"),
    ):
        assert words in refusal("ade20k", tmp_path, tmp_path / "new", flag, value)
    assert "where files are made" in refusal("ade20k", tmp_path / "made/images", tmp_path / "made")
    (tmp_path / "made/annotations/validation/ADE_val_00000004.png").unlink()
    for kind in ("folder", "array_record"):
        line = refusal("ade20k", tmp_path / "made", tmp_path / "new", "--format", kind)
        assert "1 image (ADE_val_00000004.jpg) in " in line


def test_context_of_59_and_60_classes_is_one_folder(tmp_path: pathlib.Path) -> None:
    miniatures.context60(tmp_path)
    run("context60", tmp_path, tmp_path / "made")
    before = tree(tmp_path / "made")
    run("context59", tmp_path, tmp_path / "made")
    assert tree(tmp_path / "made") == before


def test_two_commands_do_not_share_a_folder(tmp_path: pathlib.Path) -> None:
    import fcntl

    miniatures.ade20k(tmp_path)
    run("ade20k", tmp_path, tmp_path / "made")
    with (tmp_path / "made/files.tsv").open() as listing:
        fcntl.flock(listing, fcntl.LOCK_EX)
        assert "another process writes into" in refusal("ade20k", tmp_path, tmp_path / "made")


def test_a_full_disk_is_one_line_and_leaves_no_part(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    miniatures.ade20k(tmp_path)

    def fail(path: pathlib.Path, data: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(pathlib.Path, "write_bytes", fail)
    line = refusal("ade20k", tmp_path, tmp_path / "made")
    assert "No space left on device; the same command goes on from here" in line
    assert not list((tmp_path / "made").glob("images/*/*"))


def test_ctrl_c_is_one_line(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """While threads write files."""
    miniatures.ade20k(tmp_path)
    make, once = writer.make_file, iter([signal.SIGINT])  # a second one could end pytest itself

    def interrupt(*args: Any) -> writer.Record:
        for number in once:
            signal.raise_signal(number)
        return make(*args)

    monkeypatch.setattr(writer, "make_file", interrupt)
    monkeypatch.setattr(sys, "argv", ["prepare", *words_of("ade20k", tmp_path, tmp_path / "made")])
    with pytest.raises(SystemExit) as end:
        cli.run(prepare.main)
    assert (capsys.readouterr().err, end.value.code) == ("interrupted\n", 130)
