"""Damaged and hostile files: each gives the right result or one line, whatever its bits, types, sizes and names are.

A campaign puts seeded damages into good files of all kinds; a sample of them runs always, all of them under `--all`.
"""

import dataclasses
import functools
import json
import pathlib
import random
import shutil
from collections.abc import Callable
from types import ModuleType
from typing import Any

import cv2
import numpy as np
import pytest

from tests import miniatures
from tests.annotations import labelme
from tests.test_packing import records_config
from tests.test_prepare import run
from tests.test_sources import JPEG, PNG
from topformer_jax import checkpoints, config
from topformer_jax.checkpoints import safetensors_format, torch_format
from topformer_jax.data import catalog, codecs, sources
from topformer_jax.data.classification import images as class_images
from topformer_jax.exporters import exported
from topformer_jax.preparation import labels, packing
from topformer_jax.runtime import logs
from topformer_jax.runtime.errors import UserError
from topformer_jax.training import run_folder

EACH = 64  # damages of each kind of file in the whole campaign
SAMPLE = 2  # that always run
TENSORS = {
    "a.weight": np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32),
    "b": np.ones(3, np.float32),
}
# Raw JSON that stands for a value: other types, signs, sizes, depths and encodings.
SHORT_VALUES = r"""
null true -1 0 1.5 1e999 -1e-999 NaN -Infinity "" "\u0020" "../../../x" "/etc/x" "C:\\x" "\ud800" "a\u0000b" "a\nb"
"\u001b[31mred" "\u2028" [] {} [[]] [1,"a",null] {"":{}} 2147483648 18446744073709551616 65537 "1" [null,null] [-1,-1]
[1e9,1e9] [0.5,0.5] [[1,2,3]] ["a","a"]
"""
LONG_VALUES = ("9" * 5000, "-" + "9" * 30, "[" * 100_000, '{"a":' * 2000, '"' + "x" * 100_000 + '"')
VALUES = (*SHORT_VALUES.split(), *LONG_VALUES)
LINES = (
    *(b"\n\n", b"\xe2\x80\xa8", b"\x0b", b"\xc2\x85", b"\r", b"\0", b"\x1b[2J", b"../../x\n", b"\xff\n"),
    b"9" * 5000,
)


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of file: `make` writes one into a folder, `read` does as commands do, `check` judges the result."""

    make: Callable[[pathlib.Path], pathlib.Path]
    read: Callable[[pathlib.Path], Any]
    check: Callable[[Any], bool] = lambda _: True


def damage(data: bytes, seed: str) -> bytes:
    """One damage, the same for a seed."""
    rng = random.Random(seed)
    of_text = ["type"] * 4 + ["key", "encoding", "bits", "cut", "noise"]
    kind = rng.choice(of_text if data[:1] in b"{[" else ["bits", "bits", "cut", "noise", "empty", "lines"])
    place = rng.randrange(len(data) + 1)
    before, after = data[:place], data[place:]
    if kind in ("type", "key"):
        return change_tree(data, rng, kind)
    if kind == "bits":
        changed = bytearray(data)
        for _ in range(rng.choice([1, 1, 8])):
            changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        return bytes(changed)
    if kind == "encoding":
        wide = data.decode().encode("utf-16")
        return rng.choice([wide, b"\xef\xbb\xbf" + data, data + b"\0", before + b"\xff" + after, data * 2])
    inserted = {"noise": rng.randbytes(40), "lines": rng.choice(LINES)}
    return {"cut": before, "empty": b""}[kind] if kind not in inserted else before + inserted[kind] + after


def change_tree(data: bytes, rng: random.Random, kind: str) -> bytes:
    """JSON with another value, or another key, at a random place."""
    tree = json.loads(data.splitlines()[0] if data.count(b"\n{") else data)
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        for key in node if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
            places.append((node, key))
            walk(node[key])

    walk(tree)
    node, key = rng.choice(places or [({}, "")])
    if kind == "key" and isinstance(node, dict):
        value = node.pop(key, None)
        if rng.random() < 0.5:
            node[rng.choice(["../x", "", "a\nb", "\u2028", key + "x"])] = value
        return json.dumps(tree).encode()
    if not places:
        return rng.choice(VALUES).encode()
    node[key] = "@@"
    return json.dumps(tree).replace('"@@"', rng.choice(VALUES), 1).encode("utf-8", "surrogatepass")


def judge(kind: Kind, path: pathlib.Path) -> str:
    """What a file gave: "" for a result, or the one line."""
    line = ""
    try:
        result = kind.read(path)
    except UserError as error:
        line = error.line
    else:
        assert kind.check(result), "it was accepted, and its result is wrong"
    assert "\n" not in line
    assert len(line) < 600
    return line


# The files


def writer_of(content: bytes | str, name: str) -> Callable[[pathlib.Path], pathlib.Path]:
    def make(folder: pathlib.Path) -> pathlib.Path:
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
        return folder / name

    return make


def make_safetensors(folder: pathlib.Path) -> pathlib.Path:
    settings = json.loads(config.ade20k("tiny").to_json())
    safetensors_format.write(folder / "x.safetensors", TENSORS, {"meta": {"CLASSES": ["a"]}, "config": settings})
    return folder / "x.safetensors"


def make_pth(folder: pathlib.Path) -> pathlib.Path:
    import torch

    tensors = {name: torch.from_numpy(value) for name, value in TENSORS.items()}
    torch.save({"state_dict": tensors}, folder / "x.pth")
    return folder / "x.pth"


def read_transposed(path: pathlib.Path) -> tuple[dict[str, np.ndarray], Any]:
    tensors, metadata = torch_format.read(path)
    return {name.rpartition("/")[2]: tensor.T for name, tensor in tensors.items()}, metadata


def equals_tensors(result: tuple[dict[str, np.ndarray], Any]) -> bool:
    found = result[0]
    return found.keys() == TENSORS.keys() and all((found[name] == TENSORS[name]).all() for name in TENSORS)


def make_step(folder: pathlib.Path, name: str) -> pathlib.Path:
    checkpoints.orbax_store.save_model(
        folder, TENSORS, {"meta": {}, "config": json.loads(config.ade20k("tiny").to_json())}
    )
    found = [path for path in (folder / "0").rglob(name) if path.is_file()]
    return max(found, key=lambda path: path.stat().st_size)


def read_step(path: pathlib.Path) -> Any:
    step = next(parent for parent in path.parents if parent.name == "0")
    return checkpoints.orbax_store.read_model(step.parent)


DESCRIPTION: dict[str, Any] = {
    **{"output": "labels", "stride": 1, "size": [8, 8], "precision": "float32"},
    "config": json.loads(config.shapes().to_json()),
    "classes": list(catalog.CATALOG["shapes"].classes),
    "palette": [list(colour) for colour in catalog.CATALOG["shapes"].palette],
    "checkpoint": {"sha256": "0"},
}


def read_description(path: pathlib.Path, values: np.ndarray | None = None) -> Any:
    values = np.zeros((1, 8, 8), np.uint8) if values is None else values
    module: Any = ModuleType("format")
    module.open_bytes, module.RUNTIME = lambda data: (lambda images: values, data), ""
    file = exported.open_bytes(str(path), path.read_bytes(), module)
    file.check_size((8, 8))
    return file._run(np.zeros((1, 8, 8, 3), np.uint8))


def make_exported(folder: pathlib.Path, suffix: str) -> pathlib.Path:
    weights = np.random.default_rng(0).normal(size=(3, 10)).astype(np.float32)
    facts = DESCRIPTION | {"output": "logits", "target": "cpu", "versions": {"topformer_jax": "0"}}
    path = folder / f"x{suffix}"
    module = exported.import_format(path)
    path.write_bytes(module.write(lambda images: images.astype(np.float32) @ weights, facts))
    exported.description_path(path).write_text(json.dumps(facts))
    return path


def run_exported(path: pathlib.Path) -> np.ndarray:
    return exported.open_exported(path)(np.full((1, 8, 8, 3), 7, np.uint8))


def equals_logits(logits: np.ndarray) -> bool:
    weights = np.random.default_rng(0).normal(size=(3, 10)).astype(np.float32)
    return bool(np.allclose(logits, weights.sum(0) * 7, rtol=1e-4, atol=1e-4))


def make_records(folder: pathlib.Path, name: str) -> pathlib.Path:
    for split in ("training", "validation"):
        for part, suffix, content in (("images", ".jpg", JPEG), ("annotations", ".png", PNG)):
            (folder / "files" / part / split).mkdir(parents=True)
            (folder / "files" / part / split / f"a{suffix}").write_bytes(content)
    packed = packing.build("ade20k", str(folder / "files"), str(folder / "packed"))
    return pathlib.Path(packed) / name


def read_records(path: pathlib.Path, cached: bool = False) -> Any:
    cache = {"data.cache": str(path.parents[3] / "cache")} if cached else {}
    source: Any = sources.open_source(records_config(str(path.parents[2]), **cache), "train")
    return [(source[index].name, source.label_size(index)) for index in range(len(source))]


def make_classes(folder: pathlib.Path) -> pathlib.Path:
    return writer_of("road\nsea and sky\ncar\n", "classes.txt")(folder)


def read_classes(path: pathlib.Path) -> Any:
    changes = {"data.dataset": "custom", "data.root": str(path.parent), "model.num_classes": 3}
    changes |= {"data.reduce_zero_label": False}
    return sources.find_data_set(config.load(config.ade20k("tiny"), changes)).classes


def make_list(folder: pathlib.Path) -> pathlib.Path:
    for name in ("train/cat/a.jpg", "train/dog/b.jpg", "val/c.jpg", "val/d.jpg"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(JPEG)
    return writer_of("c.jpg 0\nd dog\n", "val.txt")(folder)


def read_list(path: pathlib.Path) -> list[int]:
    source = class_images.open_class_folder(str(path.parent), "validation")
    return [int(source[index].label) for index in range(len(source))]


def make_prepared(folder: pathlib.Path, name: str) -> pathlib.Path:
    (folder / "source").mkdir()
    miniatures.ade20k(folder / "source")
    run("ade20k", folder / "source", folder / "made")
    return folder / "made" / name


def make_archive(folder: pathlib.Path, make: Callable[[pathlib.Path], Any], name: str) -> pathlib.Path:
    (folder / "source").mkdir()
    make(folder / "source")
    return folder / "source" / name


def make_own(folder: pathlib.Path, name: str, content: Any) -> pathlib.Path:
    (folder / "source").mkdir()
    picture = cv2.imencode(".jpg", np.zeros((20, 30, 3), np.uint8))[1].tobytes()
    for number in range(3):
        (folder / f"source/{number}.jpg").write_bytes(picture)
    for number in range(3 if name == "0.json" else 1):
        beside = name.replace("0", str(number))
        (folder / "source" / beside).write_text(json.dumps(content).replace("0.jpg", f"{number}.jpg", 1))
    return folder / "source" / name


def prepares(dataset: str, *flags: str) -> Callable[[pathlib.Path], None]:
    def read(path: pathlib.Path) -> None:
        folder = next(parent for parent in path.parents if (parent / "source").is_dir())
        if path.is_relative_to(folder / "source"):
            shutil.rmtree(folder / "made", ignore_errors=True)
        run(dataset, folder / "source", folder / "made", *flags)
        assert {p.name for p in folder.iterdir()} == {"source", "made"}

    return read


SQUARE = [[2.0, 2.0], [20.0, 2.0], [20.0, 15.0], [2.0, 15.0]]
LABELME = labelme(
    "0.jpg",
    {"label": "cat", "points": SQUARE, "shape_type": "polygon"},
    {"label": "dog", "points": SQUARE[:2], "shape_type": "rectangle"},
    size=(20, 30),
)
BOX = {"area": 234.0, "segmentation": [[2, 2, 20, 2, 20, 15, 2, 15]], "bbox": [2, 2, 18, 13], "iscrowd": 0}
COCO = {
    "images": [{"id": number, "file_name": f"{number}.jpg", "height": 20, "width": 30} for number in (0, 1, 2)],
    "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
    "annotations": [{"id": n, "image_id": n, "category_id": 1 + n % 2, **BOX} for n in (0, 1, 2)],
}
TABLE = dict.fromkeys(range(256), 0)
MAT = miniatures.mat(S=np.arange(48, dtype=np.uint8).reshape(6, 8))
RECORDS = "".join(
    json.dumps({"step": step, "kind": "train", "loss": 0.5, "accuracy": None}) + "\n" for step in (1, 2)
)
LOCK = '{"run": "a", "host": "elsewhere", "pid": 7, "boot": "x", "renewals": 3}'


def is_image(image: np.ndarray) -> bool:
    return image.dtype == np.uint8 and image.ndim == 3 and image.size < 1 << 24


def is_label(label: np.ndarray) -> bool:
    return bool((label == codecs.read_label_values(PNG, "x.png")).all())


KINDS: dict[str, Kind] = {
    "metrics.jsonl": Kind(writer_of(RECORDS, "metrics.jsonl"), logs.read_records),
    "run.lock": Kind(writer_of(LOCK, "run.lock"), lambda path: run_folder.Lease(path.parent, 1.0, 0.0).release()),
    "safetensors": Kind(make_safetensors, safetensors_format.read, equals_tensors),
    "pth": Kind(make_pth, read_transposed, equals_tensors),
    "shard": Kind(functools.partial(make_records, name="ade20k-train.array_record-00000-of-00001"), read_records),
    "checkpoint": Kind(functools.partial(make_step, name="*"), read_step, equals_tensors),
    "checkpoint metadata": Kind(functools.partial(make_step, name="_CHECKPOINT_METADATA"), read_step),
    "description": Kind(writer_of(json.dumps(DESCRIPTION), "x.json"), read_description),
    "classes.txt": Kind(make_classes, read_classes, lambda classes:
     len(classes) == 3 and all(map(catalog.is_name, classes))),
    "val.txt": Kind(make_list, read_list, lambda found: len(found) == 2),
    "features.json": Kind(functools.partial(make_records, name="features.json"), read_records),
    "dataset_info.json": Kind(functools.partial(make_records, name="dataset_info.json"), read_records),
    "label_sizes.json": Kind(functools.partial(make_records, name="label_sizes.json"), read_records),
    "checksums.json": Kind(functools.partial(make_records, name="checksums.json"), functools.partial(read_records,
     cached=True)),
    "manifest.json": Kind(functools.partial(make_prepared, name="manifest.json"), prepares("ade20k")),
    "files.tsv": Kind(functools.partial(make_prepared, name="files.tsv"), prepares("ade20k")),
    "zip": Kind(functools.partial(make_archive, make=miniatures.ade20k, name="ADEChallengeData2016.zip"),
     prepares("ade20k")),
    "tgz": Kind(functools.partial(make_archive, make=miniatures.context59, name="trainval.tar.gz"),
     prepares("context59")),
    "tar": Kind(functools.partial(make_archive, make=miniatures.context59, name="VOCtrainval_03-May-2010.tar"),
     prepares("context59")),
    **{suffix: Kind(functools.partial(make_exported, suffix=suffix), run_exported,
     equals_logits) for suffix in exported.FORMATS},
    "jpg": Kind(writer_of(JPEG, "x.jpg"), lambda path: codecs.decode_image(path.read_bytes(), str(path)), is_image),
    "png": Kind(writer_of(PNG, "x.png"), lambda path: codecs.read_label_values(path.read_bytes(), str(path)),
     is_label),
    "merged": Kind(functools.partial(make_archive, make=miniatures.context60, name="trainval_merged.json"),
     prepares("context60")),
    "labelme": Kind(functools.partial(make_own, name="0.json", content=LABELME), prepares("custom", "--from",
     "labelme", "--background", "ground")),
    "coco": Kind(functools.partial(make_own, name="instances.json", content=COCO), prepares("custom", "--from",
     "coco", "--background", "ground")),
    "mat": Kind(writer_of(MAT, "x.mat"), lambda path: labels.map_matrix(["S"], TABLE, path.read_bytes(), str(path))),
}  # fmt: skip


@functools.cache
def good(name: str, place: pathlib.Path) -> tuple[pathlib.Path, bytes]:
    """A kind's undamaged file in a folder of its own, and its content."""
    folder = place / name.replace(" ", "_")
    folder.mkdir()
    path = KINDS[name].make(folder)
    return path, path.read_bytes()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return tmp_path_factory.mktemp("damage")


@pytest.mark.parametrize("name", KINDS)
def test_a_whole_file_and_damages(name: str, place: pathlib.Path, pytestconfig: pytest.Config) -> None:
    path, content = good(name, place)
    assert judge(KINDS[name], path) == ""  # else the campaign would show nothing
    found = {}
    for number in range(EACH if pytestconfig.getoption("--all") else SAMPLE):
        path.write_bytes(damage(content, f"{name} {number}"))
        try:
            judge(KINDS[name], path)
        except Exception as error:
            found[number] = repr(error)[:200]
        path.write_bytes(content)
    assert found == {}
