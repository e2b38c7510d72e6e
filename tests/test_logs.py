"""The log of a run: records that a resumed run continues, TensorBoard events that others can read, plain lines."""

import json
import pathlib
import struct

import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from topformer_jax.runtime import logs

NAMES = ("loss", "pixel_accuracy", "learning_rate", "images_per_second", "data_wait", "skipped")


def crc32c(data: bytes) -> int:
    """The checksum by its definition (RFC 3720), a bit at a time."""
    value = 0xFFFFFFFF
    for byte in data:
        value ^= byte
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
    return value ^ 0xFFFFFFFF


def read_events(folder: pathlib.Path) -> list[Event]:
    """The events of TFRecords: length, checksum, data, checksum."""
    (file,) = folder.iterdir()
    data, events = file.read_bytes(), []
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        record = data[12 : 12 + length]
        for part, stored in ((data[:8], data[8:12]), (record, data[12 + length : 16 + length])):
            crc = crc32c(part)
            masked = ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
            assert struct.unpack("<I", stored) == (masked,)
        events.append(Event.FromString(record))
        data = data[16 + length :]
    return events


def test_events_are_readable_and_start_a_session(tmp_path: pathlib.Path) -> None:
    log = logs.RunLog(tmp_path, 4, 10, active=True)
    log.log_step(5, dict.fromkeys(NAMES, 0.5) | {"loss": float("inf")})
    log.log_evaluation(5, {"miou": 0.25, "macc": float("nan")})
    version, session, step, evaluation = read_events(tmp_path / "tensorboard")  # before close: it is flushed
    log.close()
    assert version.file_version == "brain.Event:2"
    assert (session.step, session.session_log.status) == (5, SessionLog.START)
    assert (step.step, evaluation.step) == (5, 5)
    found = {value.tag: value.simple_value for value in step.summary.value}
    assert found == {f"train/{name}": 0.5 for name in NAMES if name != "loss"}
    assert [(value.tag, value.simple_value) for value in evaluation.summary.value] == [("evaluation/miou", 0.25)]


def test_a_resumed_run_discards_later_records_and_cut_lines(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step, "kind": "train", "loss": 1.0}) for step in (1, 2, 3)]
    path.write_text("\n".join([*lines, lines[0][:9], "7", "{}"]))
    logs.RunLog(tmp_path, 2, 10, logs.read_records(path), active=True).close()
    assert [record["step"] for record in logs.read_records(path)] == [1, 2]
    assert path.read_text().count("\n") == 2


def test_other_processes_write_and_print_nothing(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = logs.RunLog(tmp_path, 0, 10, active=False)
    log.log_step(1, dict.fromkeys(NAMES, 0.5))
    log.log_evaluation(1, {"miou": 0.5})
    log.print_line("text")
    log.close()
    assert not list(tmp_path.iterdir())
    assert capsys.readouterr() == ("", "")


def test_progress_prints_plain_lines_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with logs.Progress(3, "images") as progress:
        progress.update(0, "512x512")
        progress.update(1)  # within 10 seconds of the last line
        progress.print_line("skipped: a.jpg")
        progress.update(3)
    assert capsys.readouterr().out == "0/3 images  compiling for 512x512\nskipped: a.jpg\n3/3 images\n"


def test_records_without_a_value_leave_gaps_in_the_curves(tmp_path: pathlib.Path) -> None:
    records = [
        {"step": step, "kind": "train", **values}
        for step, values in ((1, {}), (2, {"loss": 0.5}), (3, {"loss": None}))
    ]
    logs.save_curves(records, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 1000
