"""`prepare` on official downloads in miniature: what comes out, killed and resumed; bad archives."""

import functools
import io
import json
import pathlib
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable

import numpy as np
import pytest

from tests import miniatures
from topformer_jax import config as config_lib, prepare
from topformer_jax.data import sources
from topformer_jax.data.catalog import CATALOG
from topformer_jax.data.codecs import decode_label
from topformer_jax.preparation import labels, scenes
from topformer_jax.runtime.errors import UserError

ROOT = pathlib.Path(__file__).parents[1]
ALL: dict[str, Callable[[pathlib.Path], object]] = {
    **miniatures.SEGMENTATION,
    "imagenet": miniatures.imagenet,
}
Make = Callable[[pathlib.Path], miniatures.Expected]
# Kills its process when the N-th file is whole but has not its name yet.
KILLED = """
import os, pathlib, signal, sys
rename, count = pathlib.Path.replace, int(sys.argv.pop(1))
def kill_or_rename(path, target):
    global count
    count -= path.parent.name == ".partial"
    if count == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return rename(path, target)
pathlib.Path.replace = kill_or_rename
from topformer_jax.runtime import cli; from topformer_jax import prepare
from topformer_jax.preparation import writer
writer._CHUNK_FILES = 1
cli.run(prepare.main)
"""


def run(dataset: str, source: pathlib.Path, output: pathlib.Path, *flags: str) -> None:
    """The command in this process."""
    words = [
        dataset.split(" ")[0],
        "--source",
        str(source),
        "--output",
        str(output),
        "--workers",
        "0",
        *flags,
    ]
    prepare.prepare(prepare.make_parser().parse_args(words))


def refusal(dataset: str, source: pathlib.Path, output: pathlib.Path, *flags: str) -> str:
    with pytest.raises(UserError) as error:
        run(dataset, source, output, *flags)
    assert "\n" not in str(error.value)
    return str(error.value)


def tree(folder: pathlib.Path) -> dict[str, bytes]:
    """All files below a folder, hidden ones too."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


def check(expected: miniatures.Expected, **settings: str) -> None:
    """Opens what was made by the data set's config and compares it with what must be there."""
    config = config_lib.load(expected.config, {f"data.{key}": value for key, value in settings.items()})
    classes = len(sources.find_data_set(config).classes)
    for split in sources.SPLITS:
        source = sources.open_source(config, split)
        found = {source[index].name: source[index] for index in range(len(source))}
        wanted = getattr(expected, split)
        assert found.keys() == wanted.keys()
        for name, (image, values) in wanted.items():
            assert found[name].image == image
            decoded = decode_label(
                found[name].label, name, classes=classes, reduce_zero_label=config.data.reduce_zero_label
            )
            np.testing.assert_array_equal(decoded, values, err_msg=f"{split} {name}")


@pytest.mark.parametrize("make", miniatures.SEGMENTATION.items(), ids=lambda item: item[0])
def test_downloads_become_the_layout(
    make: tuple[str, Make], tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "downloads").mkdir()
    expected = make[1](tmp_path / "downloads")
    run(make[0], tmp_path / "downloads", tmp_path / "made")
    check(expected, root=str(tmp_path / "made"))
    out = capsys.readouterr().out
    assert f"train: {len(expected.train)} images (published are " in out
    assert f", {len(expected.train)} labels, " in out
    assert f"--config.data.root={tmp_path}/made" in out
    assert not list((tmp_path / "made").rglob("*.tmp"))

    before = tree(tmp_path / "made")
    manifest = json.loads(before["manifest.json"])
    assert manifest["archives"] == {
        path.name: [path.stat().st_size] for path in sorted((tmp_path / "downloads").iterdir())
    }
    rows = [line.split("\t") for line in before["files.tsv"].decode().splitlines()]
    assert {row[4] for row in rows} == before.keys() - {"manifest.json", "files.tsv"}
    sums = "".join(f"{row[0]}  {made}/{row[4]}\n" for row in rows for made in [tmp_path / "made"])
    subprocess.run(["sha256sum", "--check", "--quiet"], input=sums, text=True, check=True)
    run(make[0], tmp_path / "downloads", tmp_path / "made", "--workers", "2")  # again: nothing changes
    assert tree(tmp_path / "made") == before


@pytest.mark.parametrize("make", miniatures.SEGMENTATION.items(), ids=lambda item: item[0])
def test_downloads_become_records(
    make: tuple[str, Make], tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "downloads").mkdir()
    expected = make[1](tmp_path / "downloads")
    for _ in range(2):  # again: it is complete
        run(make[0], tmp_path / "downloads", tmp_path / "made", "--format", "array_record")
        check(expected, root=str(tmp_path / "made"), source="array_record")
        out = capsys.readouterr().out
        assert f"--config.data.source=array_record --config.data.root={tmp_path}/made" in out
        (folder,) = (tmp_path / "made").iterdir()
        assert [path.name for path in folder.iterdir()] == ["1.0.0"]  # the files have gone
    assert "published" not in out


@pytest.mark.parametrize("make", ALL.items(), ids=lambda item: item[0])
def test_a_killed_run_goes_on(make: tuple[str, Callable], tmp_path: pathlib.Path) -> None:
    (tmp_path / "downloads").mkdir()
    make[1](tmp_path / "downloads")
    run(make[0], tmp_path / "downloads", tmp_path / "whole")
    whole = tree(tmp_path / "whole")
    words = [
        make[0].split(" ")[0],
        "--source",
        str(tmp_path / "downloads"),
        "--output",
        str(tmp_path / "made"),
        "--workers",
        "0",
    ]
    count = str((len(whole) - 2) // 2)
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, count, *words], check=False, cwd=ROOT, capture_output=True
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    made = tree(tmp_path / "made")
    assert len(list((tmp_path / "made/.partial").iterdir())) == 1
    for path, content in made.items():  # what has its name is whole
        if path not in ("manifest.json", "files.tsv") and not path.startswith(".partial"):
            assert content == whole[path]
    finished = {line.split("\t")[4] for line in made["files.tsv"].decode().splitlines()}
    assert 0 < len(finished) < len(whole) - 2
    times = {path: (tmp_path / "made" / path).stat().st_mtime_ns for path in finished}
    run(make[0], tmp_path / "downloads", tmp_path / "made")
    assert tree(tmp_path / "made") == whole
    assert {path: (tmp_path / "made" / path).stat().st_mtime_ns for path in finished} == times


def test_imagenet(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = miniatures.imagenet(tmp_path)
    run("imagenet", tmp_path, tmp_path / "made")
    found = tree(tmp_path / "made")
    del found["manifest.json"], found["files.tsv"]
    assert found == expected
    assert "train: 4 images (published are 1,281,167), 0 labels" in capsys.readouterr().out
    run("imagenet", tmp_path, tmp_path / "packed", "--format", "array_record")
    changes = {"data.source": "array_record", "data.root": str(tmp_path / "packed"), "model.num_classes": 2}
    source = sources.open_source(config_lib.load(config_lib.imagenet("tiny"), changes), "validation")
    images = {source[index].image for index in range(len(source))}
    assert images == {data for path, data in expected.items() if path.startswith("val/")}


def test_processes_of_a_killed_command_end_and_their_work_goes_on(tmp_path: pathlib.Path) -> None:
    members = {}
    for number in range(1500):
        word = "validation" if number % 10 == 0 else "training"
        members[f"ADEChallengeData2016/images/{word}/{number:05}.jpg"] = miniatures.jpeg(number % 7)
        members[f"ADEChallengeData2016/annotations/{word}/{number:05}.png"] = miniatures.png(
            miniatures.grid(number % 150)
        )
    miniatures.write_zip(tmp_path / "ADEChallengeData2016.zip", members)
    words = ["ade20k", "--source", str(tmp_path), "--output", str(tmp_path / "made"), "--workers", "2"]
    command = [sys.executable, "-m", "topformer_jax.prepare", *words]
    first = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    listing = tmp_path / "made/files.tsv"
    while not (listing.exists() and listing.stat().st_size):
        assert first.poll() is None
        time.sleep(0.002)
    workers = pathlib.Path(f"/proc/{first.pid}/task/{first.pid}/children").read_text().split()
    assert len(workers) >= 2
    first.kill()
    first.wait()
    while any(is_running(int(worker)) for worker in workers):  # or the test does not end
        time.sleep(0.01)
    assert json.loads((tmp_path / "made/manifest.json").read_text()).get("splits") is None
    run("ade20k", tmp_path, tmp_path / "made")
    run("ade20k", tmp_path, tmp_path / "whole")
    assert tree(tmp_path / "made") == tree(tmp_path / "whole")


def is_running(process: int) -> bool:
    try:
        return pathlib.Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


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


@pytest.mark.parametrize(
    ("dataset", "name", "damage", "line"),
    [
        ("ade20k", "ADEChallengeData2016.zip", lambda p: cut(p, 0.6), "ADEChallengeData2016.zip ("),
        (
            "ade20k",
            "ADEChallengeData2016.zip",
            lambda p: p.write_bytes(b"<html>log in</html>"),
            "no such archive",
        ),
        ("cocostuff164k", "val2017.zip", lambda p: p.write_bytes(b""), "val2017.zip (0 bytes) is cut off"),
        ("voc2012", "VOCtrainval_11-May-2012.tar", lambda p: cut(p, 0.5), "VOCtrainval_11-May-2012.tar ("),
        ("imagenet", "ILSVRC2012_img_val.tar", strip_end, "its end is missing"),
        ("voc2012", "benchmark.tgz", lambda p: cut(p, 0.9), "benchmark.tgz ("),
        ("context59", "trainval.tar.gz", lambda p: cut(p, 0.3), "trainval.tar.gz ("),
        (
            "context60",
            "trainval_merged.json",
            lambda p: cut(p, 0.5),
            "is not the JSON file that was expected",
        ),
        ("imagenet", "ILSVRC2012_img_train.tar", lambda p: cut(p, 0.7), "ILSVRC2012_img_train.tar ("),
        ("imagenet", "ILSVRC2012_img_val.tar", spoil_header, "there is no header at byte"),
        ("imagenet", "ILSVRC2012_img_val.tar", reserve, "there is nothing behind byte"),
        (
            "imagenet",
            "ILSVRC2012_img_val.tar",
            lambda p: spoil_header(p, hole=True),
            "there is no header at byte",
        ),
        (
            "imagenet",
            "ILSVRC2012_img_train.tar",
            lambda p: spoil_header(p, nested=True),
            "at n01440764.tar: there is no header at byte",
        ),
        ("imagenet", "ILSVRC2012_devkit_t12.tar.gz", lambda p: cut(p, 0.8), "ILSVRC2012_devkit_t12.tar.gz ("),
        ("ade20k", "ADEChallengeData2016.zip", pathlib.Path.unlink, "sceneparsing.csail.mit.edu"),
        ("voc2012", "benchmark.tgz", pathlib.Path.unlink, "download benchmark.tgz from the SBD site"),
        (
            "cocostuff164k",
            "train2017.zip",
            pathlib.Path.unlink,
            "download train2017.zip from cocodataset.org",
        ),
    ],
)
def test_bad_archives_are_one_line(
    dataset: str, name: str, damage: Callable[[pathlib.Path], None], line: str, tmp_path: pathlib.Path
) -> None:
    (tmp_path / "downloads").mkdir()
    ALL[dataset](tmp_path / "downloads")
    damage(tmp_path / "downloads" / name)
    said = refusal(dataset, tmp_path / "downloads", tmp_path / "made")
    assert line in said
    assert name in said
    assert "fetch it again" in said or "download" in said or "JSON" in said


def test_other_archives_are_one_line(tmp_path: pathlib.Path) -> None:
    miniatures.cityscapes(tmp_path)
    (tmp_path / "gtFine_trainvaltest.zip").rename(tmp_path / "ADEChallengeData2016.zip")
    assert "holds no images/training/: it is another archive" in refusal(
        "ade20k", tmp_path, tmp_path / "made"
    )
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
    content["annos_segmentation"][0]["segmentation"]["counts"] = [0, 5, 43]  # without compression
    file.write_text(json.dumps(content))
    run("context60", tmp_path, tmp_path / "made")
    label = (tmp_path / "made/SegmentationClassContext/2008_000002.png").read_bytes()
    found = decode_label(label, "", classes=60, reduce_zero_label=False)
    assert [CATALOG["context60"].classes[value] for value in found[1:5, 0]] == ["person"] * 4
    assert (found[1:, 1:] == 0).all()
    content["annos_segmentation"][0]["segmentation"]["counts"] = [5]
    file.write_text(json.dumps(content))
    assert "the runs of a mask are of 5 pixels, and its picture has 48" in refusal(
        "context60", tmp_path, tmp_path / "other"
    )
    content["annos_segmentation"][0]["category_id"] = 3
    file.write_text(json.dumps(content))
    assert "holds category 3, which is none of" in refusal("context60", tmp_path, tmp_path / "another")
    del content["images"]
    file.write_text(json.dumps(content))
    assert "expected (Object missing required field `images`)" in refusal(
        "context60", tmp_path, tmp_path / "x"
    )


def test_values_that_stand_for_no_class_are_named(tmp_path: pathlib.Path) -> None:
    """The last label of each archive gets a value that its data set does not have."""
    miniatures.cocostuff164k(tmp_path)
    miniatures.write_zip(tmp_path / "val2017.zip", {"val2017/1.jpg": miniatures.jpeg(1)})
    with zipfile.ZipFile(tmp_path / "stuffthingmaps_trainval2017.zip", "a") as archive:
        archive.writestr("val2017/1.png", miniatures.png(miniatures.grid(0, 182, 254)))
    line = refusal("cocostuff164k", tmp_path, tmp_path / "made")
    assert "stuffthingmaps_trainval2017.zip:val2017/1.png holds 182, 254, which stands for no class" in line


def test_colours_of_no_class_are_void_where_they_are_few(tmp_path: pathlib.Path) -> None:
    colours = {(0, 0, 0): 255, (128, 128, 128): 0}
    mask = np.full((20, 20, 3), 128)
    mask[0, :4] = 7
    found = decode_label(
        labels.map_colours(colours, 255, miniatures.png(mask), "m"), "m", classes=1, reduce_zero_label=False
    )
    assert (found == 255).sum() == 4
    mask[1, 0] = 8
    with pytest.raises(
        UserError, match=r"m: 1\.25% of the pixels have colours that no class has, such as \(7, 7, 7\)"
    ):
        labels.map_colours(colours, 255, miniatures.png(mask), "m")


def test_hidden_files_of_other_systems_are_left_out(tmp_path: pathlib.Path) -> None:
    expected = miniatures.ade20k(tmp_path / "downloads")
    with zipfile.ZipFile(tmp_path / "downloads/ADEChallengeData2016.zip") as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist() if not info.is_dir()}
    strange = "__MACOSX/ADEChallengeData2016/images/training/._ADE_train_00000001.jpg"
    miniatures.write_zip(tmp_path / "downloads/ADEChallengeData2016.zip", {strange: b"", **members})
    run("ade20k", tmp_path / "downloads", tmp_path / "made")
    check(expected, root=str(tmp_path / "made"))


def test_a_damaged_member_is_named(tmp_path: pathlib.Path) -> None:
    miniatures.ade20k(tmp_path)
    archive = tmp_path / "ADEChallengeData2016.zip"
    data = bytearray(archive.read_bytes())
    place = data.index(b"ADE_train_00000002.jpg") + 40  # after the first header of that name
    data[place] ^= 255
    archive.write_bytes(bytes(data))
    line = refusal("ade20k", tmp_path, tmp_path / "made")
    assert "at ADEChallengeData2016/images/training/ADE_train_00000002.jpg" in line


def test_a_folder_is_of_one_thing(tmp_path: pathlib.Path) -> None:
    miniatures.ade20k(tmp_path)
    miniatures.cocostuff10k(tmp_path)
    run("ade20k", tmp_path, tmp_path / "made")
    assert "made of something else (other dataset, archives)" in refusal(
        "cocostuff10k", tmp_path, tmp_path / "made"
    )
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine.txt").write_text("x")
    assert "was not made by this command: name another --output" in refusal(
        "ade20k", tmp_path, tmp_path / "full"
    )
    assert "has the layout of ade20k already" in refusal("ade20k", tmp_path / "made", tmp_path / "new")
    (tmp_path / "made/annotations/validation/ADE_val_00000004.png").unlink()
    assert "1 image (ADE_val_00000004.jpg) in " in refusal("ade20k", tmp_path / "made", tmp_path / "new")
    assert "--shard 1/2 and --output" in refusal("ade20k", tmp_path, tmp_path / "new", "--shard", "1/2")
    assert "--from coco is for your own data" in refusal(
        "ade20k", tmp_path, tmp_path / "new", "--from", "coco"
    )
    assert "--workers is -1" in refusal("ade20k", tmp_path, tmp_path / "new", "--workers", "-1")


def test_context_of_59_and_60_classes_is_one_folder(tmp_path: pathlib.Path) -> None:
    miniatures.context60(tmp_path)
    run("context60", tmp_path, tmp_path / "made")
    before = tree(tmp_path / "made")
    run("context59", tmp_path, tmp_path / "made")
    assert tree(tmp_path / "made") == before


def test_matrices_of_another_kind_are_one_line() -> None:
    other = miniatures.mat(other=np.zeros((2, 2)))
    struct = miniatures.mat(GTcls=np.array([[(1,)]], dtype=[("Boundaries", object)]))
    with pytest.raises(UserError, match=r"x\.mat has not the fields that were expected \(ValueError"):
        labels.read_boundaries_benchmark(struct, "x.mat")
    for read in (functools.partial(labels.map_matrix, "LabelMap", {}), labels.read_boundaries_benchmark):
        with pytest.raises(UserError, match=r"x\.mat has not the fields that were expected"):
            read(other, "x.mat")


def test_the_command_prints_one_line(tmp_path: pathlib.Path) -> None:
    command = [
        sys.executable,
        "-m",
        "topformer_jax.prepare",
        "ade20k",
        "--source",
        str(tmp_path),
        "--output",
        "x",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 2
    assert done.stderr.startswith(
        f"error: {tmp_path} does not hold what ade20k is made of: download ADEChallengeData"
    )
    assert len(done.stderr.splitlines()) == 1
    code = (
        "import runpy, sys\nsys.argv = ['topformer_jax.prepare', '--help']\n"
        "try:\n    runpy.run_module('topformer_jax.prepare', run_name='__main__')\n"
        "except SystemExit as end:\n    assert end.code == 0\n"
        "assert not {'jax', 'numpy', 'cv2', 'scipy'} & set(sys.modules)\n"
    )
    assert "--format" in subprocess.check_output([sys.executable, "-c", code], text=True)


def test_two_commands_do_not_share_a_folder(tmp_path: pathlib.Path) -> None:
    import fcntl

    miniatures.ade20k(tmp_path)
    run("ade20k", tmp_path, tmp_path / "made")
    with (tmp_path / "made/files.tsv").open() as listing:
        fcntl.flock(listing, fcntl.LOCK_EX)
        assert "another process writes into" in refusal("ade20k", tmp_path, tmp_path / "made")


def test_a_full_disk_is_one_line_and_leaves_no_part(tmp_path: pathlib.Path) -> None:
    miniatures.ade20k(tmp_path)
    code = (
        "import resource, signal\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (600, 600))\n"  # less than a picture
        "from topformer_jax.runtime import cli; from topformer_jax import prepare\n"
        "cli.run(prepare.main)\n"
    )
    words = ["ade20k", "--source", str(tmp_path), "--output", str(tmp_path / "made"), "--workers", "0"]
    done = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 2, done.stderr
    assert "the same command goes on from here" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not list((tmp_path / "made").glob("images/*/*"))


def test_runs_of_pycocotools() -> None:
    """Masks and their runs as pycocotools 2.0 encodes them."""
    text = "021O0010O141MNO011OO01011NO0021OOO00023"
    mask = """100011111 110101011 000011101 111100110 011010100 101011010 000100000"""
    expected = np.array([[int(bit) for bit in row] for row in mask.split()])
    runs = labels.decode_runs(text)
    flat = np.repeat(np.arange(len(runs)) % 2, runs)
    np.testing.assert_array_equal(flat.reshape(9, 7).T, expected)
    assert miniatures.encode_runs(expected) == text


def test_camvid_lists() -> None:
    """Counts, ends and order of the SegNet tutorial's lists."""
    lists = {word: list(scenes._list_camvid(word)) for word in ("train", "val", "test")}
    assert {word: len(names) for word, names in lists.items()} == {"train": 367, "val": 101, "test": 233}
    assert all(names == sorted(names) for names in lists.values())
    assert len({name for names in lists.values() for name in names}) == 701
    assert lists["train"][0] == "0001TP_006690"
    assert lists["train"][-1] == "0016E5_08640"
    assert lists["test"][-1] == "Seq05VD_f05100"


def test_classes_of_new_data_sets() -> None:
    voc = CATALOG["voc2012"]
    assert (len(voc.classes), voc.classes[0], voc.classes[15]) == (21, "background", "person")
    assert voc.palette[:3] == ((0, 0, 0), (128, 0, 0), (0, 128, 0))
    assert voc.palette[15] == (192, 128, 128)  # of the VOC development kit
    assert CATALOG["cocostuff164k"].classes[11] == "stop sign"
    assert len(CATALOG["camvid"].classes) == 11
