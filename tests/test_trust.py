"""What a hostile file cannot do: run code, write or delete what is the user's, shift labels, fool a terminal."""

import functools
import gzip
import json
import os
import pathlib
import struct
import sys
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

from tests import miniatures
from tests.test_damage import (
    DESCRIPTION,
    TABLE,
    make_exported,
    make_records,
    read_classes,
    read_description,
    read_records,
    run_exported,
)
from tests.test_sources import JPEG, PNG
from topformer_jax import config
from topformer_jax.data import codecs, sources
from topformer_jax.exporters import exported, stablehlo_file
from topformer_jax.preparation import archives, labels, masks, packing
from topformer_jax.runtime import cli, files, logs
from topformer_jax.runtime.errors import UserError


def refusal(action: Callable[[], Any]) -> str:
    with pytest.raises(UserError) as error:
        action()
    assert "\n" not in error.value.line
    return error.value.line


@pytest.mark.parametrize("name", ["../../x", "/etc/x", "a/../../x", "C:\\x", "a\nb", "\x1b[2J"])
def test_names_of_records_stay_inside(name: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_folder = sources.open_folder

    def rename(*args: Any) -> sources.FolderSource:
        found = open_folder(*args)
        object.__setattr__(found, "names", (name,))
        return found

    monkeypatch.setattr(packing.sources, "open_folder", rename)
    path = make_records(tmp_path, "features.json")
    assert "is no name for a file below a folder" in refusal(lambda: read_records(path))


@pytest.mark.parametrize("change", ["first", "type", "second"])
def test_features_run_no_module(change: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hostile_module.py").write_text("raise SystemExit('it ran')")
    monkeypatch.syspath_prepend(str(tmp_path))
    path = make_records(tmp_path, "features.json")
    text = path.read_text()
    known = '"tensorflow_datasets.core.features.text_feature.Text"'
    assert known in text
    changed = {
        "first": text.replace(known, '"hostile_module.Text"'),
        "type": text.replace(known, f'{known}, "type": "hostile_module.Text", "content": {{}}'),
        "second": text.replace(known, f'{known}, "pythonClassName": "hostile_module.Text"'),
    }
    path.write_text(changed[change])
    assert "features.json is not the JSON file that was expected" in refusal(lambda: read_records(path))
    assert "hostile_module" not in sys.modules


def cholesky(images: jax.Array) -> jax.Array:
    return jnp.linalg.cholesky(images[0, :3, :3, 0].astype(jnp.float32))


@pytest.mark.parametrize("function", [cholesky, lambda images: images + 1])
def test_a_program_with_foreign_calls_is_not_compiled(function: Callable[[jax.Array], jax.Array]) -> None:
    shape = jax.ShapeDtypeStruct((1, 8, 8, 3), np.uint8)
    data = bytes(jax.export.export(jax.jit(function), platforms=("cpu",))(shape).serialize())
    if function is cholesky:
        assert "calls lapack_spotrf_ffi, which no file of export does" in refusal(
            lambda: stablehlo_file.open_bytes(data)
        )
    else:
        assert stablehlo_file.open_bytes(data)[0](np.zeros((1, 8, 8, 3), np.uint8)).max() == 1


@pytest.mark.parametrize("mode", [0o777, 0o775, 0o500, None])
def test_compiled_programs_are_this_users_alone(
    mode: int | None,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    kept = jax.config.values["jax_compilation_cache_dir"]
    folder = tmp_path / "topformer_jax"
    if mode is not None:
        folder.mkdir()
        folder.chmod(mode)
    if mode == 0o500 and os.getuid() == 0:
        pytest.skip("the root user writes everywhere")
    try:
        cli.run(lambda: None)
        used = jax.config.values["jax_compilation_cache_dir"] == str(folder)
    finally:
        jax.config.update("jax_compilation_cache_dir", kept)
    out, err = capsys.readouterr()
    assert err == ""
    assert used == (mode is None)
    assert out.startswith("note: compiled programs are not kept: ") == (mode is not None)
    assert out.count("\n") == (mode is not None)
    if mode is None:
        assert folder.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize(
    ("place", "content"),
    [(124, b"\xff" * 12), (124, b"\x80" + b"\x7f" * 11), (124, b"77777777777\0"), (156, b"S")],
    ids=["below 0", "huge", "8 GB", "sparse"],
)
def test_sizes_in_a_tar_file(place: int, content: bytes, tmp_path: pathlib.Path) -> None:
    data = bytearray(miniatures.tar_bytes({"a.txt": b"x", "b.txt": b"y"}))
    data[place : place + len(content)] = content
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data[:512])
    path = tmp_path / "x.tar"
    for archive in (bytes(data), gzip.compress(data)):
        path.write_bytes(archive)
        assert "is cut off, damaged or no such archive" in refusal(lambda: archives.open_archive(path))


def test_a_picture_that_claims_too_much() -> None:
    place = JPEG.find(b"\xff\xc0") + 5
    bomb = JPEG[:place] + b"\x75\x30\x75\x30" + JPEG[place + 4 :]  # 30,000 x 30,000
    assert "x.jpg is cut off" in refusal(lambda: codecs.decode_image(bomb, "x.jpg"))
    for change, words in (
        (struct.pack(">II", 1 << 20, 1 << 20), "is larger than OpenCV reads"),
        (struct.pack(">II", 0, 4), "is a damaged PNG"),
        (PNG[16:24] + b"\x07", "is a damaged PNG"),
    ):
        header = b"IHDR" + (change + PNG[16 + len(change) : 29])
        bad = PNG[:12] + header + struct.pack(">I", zlib.crc32(header)) + PNG[33:]
        assert words in refusal(functools.partial(codecs.read_label_values, bad, "x.png"))


def test_a_pipe_is_not_waited_for(tmp_path: pathlib.Path) -> None:
    for path in (tmp_path / "x.zip", tmp_path / "x.tar"):
        os.mkfifo(path)
        assert "it is a pipe or a device" in refusal(functools.partial(archives.open_archive, path))


# Wrong in silence


@pytest.mark.parametrize("suffix", exported.FORMATS)
def test_an_exported_file_has_a_checksum(suffix: str, tmp_path: pathlib.Path) -> None:
    path = make_exported(tmp_path, suffix)
    data = path.read_bytes()
    for place in (0, len(data) // 2, -1):
        changed = bytearray(data)
        changed[place] ^= 1
        path.write_bytes(changed)
        assert "is damaged, or of an earlier version" in refusal(lambda: run_exported(path))


def test_classes_do_not_move(tmp_path: pathlib.Path) -> None:
    """In the list of a data set, and in one that `prepare` reads."""
    blank = dict.fromkeys(("a\n\nb\n", "\na\nb\n", "a\n \t\nb\nc\n"), "is blank")
    strange = ("a\u2028b\nc\n", "a\x0bb\nc\n", "a\x85b\nc\n", "a\n\x1b[31mb\nc\n")
    for text, words in (blank | dict.fromkeys(strange, "expected one name per line")).items():
        for name in ("classes.txt", "class_names.txt"):
            (tmp_path / name).write_text(text)
        for line in (
            refusal(lambda: read_classes(tmp_path / "classes.txt")),
            refusal(lambda: masks.read_voc(archives.open_archive(tmp_path), "")),
        ):
            assert "txt: line " in line
            assert words in line
    for text in ("a\nb\nc\n", "a\r\nb\r\nc\r\n", "a\rb\rc\r", "a\nb\nc", "a\nb\nc\n\n\n"):
        (tmp_path / "classes.txt").write_bytes(f"\ufeff{text}".encode())
        assert read_classes(tmp_path / "classes.txt") == ("a", "b", "c")


def test_names_in_a_config() -> None:
    changes = {"data.dataset": "custom", "model.num_classes": 2, "data.reduce_zero_label": False}
    for names in (("a", ""), ("a", " "), ("a", "b\u2028c")):
        given = config.load(config.ade20k("tiny"), changes | {"data.class_names": names})
        assert "class 1 has the name" in refusal(functools.partial(sources.find_data_set, given))


def test_labels_of_matlab_are_whole_numbers() -> None:
    for values in (
        *(np.full((4, 4), 0.5), np.full((4, 4), 1j), np.zeros((4, 4, 3)), np.array(7)),
        *(np.array([[np.nan, 1.0]]), np.array(["a", "b"]), np.full((2, 2), 300)),
    ):
        line = refusal(functools.partial(labels.map_matrix, ["S"], TABLE, miniatures.mat(S=values), "x.mat"))
        assert "expected a matrix of class numbers" in line or "stands for no class" in line


PALETTE = DESCRIPTION["palette"]


@pytest.mark.parametrize(("change", "values", "words"), [
    ({}, np.full((1, 8, 8), 10, np.uint8), "gives the label 10, and its config has 10 classes"),
    ({}, np.full((1, 8, 8), 1, np.int64), "gives labels, int64 of shape 1x8x8: it is not what"),
    ({"output": "logits"}, np.full((1, 8, 8, 10), np.nan, np.float32), "gives NaN or infinity"),
    ({"output": "logits"}, np.zeros((1, 8, 8, 11), np.float32), "and its config has 10 classes"),
    ({"classes": DESCRIPTION["classes"][1:]}, None, "has 9 names for the 10 classes of its config"),
    ({"palette": PALETTE[1:]}, None, "has 9 colours for the 10 classes of its config"),
    ({"classes": DESCRIPTION["classes"][::-1]}, None, "has the names of shapes in another order"),
    ({"palette": PALETTE[::-1]}, None, "has the colours of shapes in another order"),
    ({"classes": [*DESCRIPTION["classes"][1:], "a\u2028b"]}, None, "which is no name"),
])  # fmt: skip
def test_an_exported_file_that_differs_from_its_config(
    change: dict[str, Any], values: np.ndarray | None, words: str, tmp_path: pathlib.Path
) -> None:
    (tmp_path / "x.json").write_text(json.dumps(DESCRIPTION | change))
    assert words in refusal(lambda: read_description(tmp_path / "x.json", values))


@pytest.mark.parametrize(
    "text", ["import sys; sys.exit()", "import sys; sys.exit(0)", "def get_config(): raise SystemExit"]
)
def test_a_config_that_exits_is_none(text: str, tmp_path: pathlib.Path) -> None:
    (tmp_path / "x.py").write_text(text)
    assert "x.py, line 1: SystemExit" in refusal(lambda: config.load(tmp_path / "x.py"))


# Terminals, pipes and processes


def test_the_terminal_sees_no_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> None:
        print("wrote \x1b[2Ja\u2028b\x9b31m\udcff")
        raise UserError("no \x1b]0;x\x07 in\na\udcffb", ["detail \x08"])

    with pytest.raises(SystemExit):
        cli.run(main)
    out, err = capsys.readouterr()
    assert out == "wrote \\x1b[2Ja\\u2028b\\x9b31m\\udcff\n"
    assert err == "detail ?\nerror: no ?]0;x? in?a?b\n"


@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_what_is_no_regular_file_is_named(kind: str, tmp_path: pathlib.Path) -> None:
    path = pathlib.Path("/dev/zero") if kind == "device" else tmp_path / "metrics.jsonl"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    assert "irectory" in (line := refusal(lambda: files.read_bytes(path))) or "it is a pipe or a device" in line
    assert f"cannot read {path}: " in refusal(lambda: logs.read_records(path))
    if kind == "pipe":
        member = archives.open_archive(tmp_path)[path.name]
        assert f"cannot read {path}: " in refusal(member.read)


def test_a_member_that_claims_too_much_is_not_read(tmp_path: pathlib.Path) -> None:
    member = archives.Member(str(tmp_path / "x.zip"), "a.png", 2**31, bytes)
    assert "x.zip:a.png has 2,147,483,648 bytes: at most" in refusal(member.read)
