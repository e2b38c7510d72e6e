"""Checkpoints of other trainers: prefixes, averages, extra tensors and objects, and what is printed about each."""

import collections
import contextlib
import datetime
import enum
import os
import pathlib
import subprocess
import sys
import types
from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from tests.parity import same_states
from tests.reference import network as reference
from topformer_jax import checkpoints, config, models
from topformer_jax.checkpoints import torch_format
from topformer_jax.checkpoints.load import ALIASES
from topformer_jax.runtime.errors import UserError

States = dict[str, torch.Tensor]
Pth = Callable[..., pathlib.Path]
Read = Callable[..., tuple[States, Any, list[str]]]
OTHER = "decode_head.conv_seg.bias"
N = 376  # tensors of Tiny


@pytest.fixture(scope="module")
def tiny() -> models.Segmenter:
    return models.build_segmenter(config.ade20k("tiny"))


@pytest.fixture
def read(pth: Pth, tiny: models.Segmenter, capsys: pytest.CaptureFixture[str]) -> Read:
    """Writes a file and reads it into Tiny: its tensors in PyTorch's layout, its `meta`, and the printed lines."""

    def read(content: Any) -> tuple[States, Any, list[str]]:
        path = pth(content)
        tensors, meta = checkpoints.read_checkpoint(path, tiny)
        found = {name: torch.from_numpy(torch_format.to_torch(tensor)) for name, tensor in tensors.items()}
        return found, meta, capsys.readouterr().out.replace(str(path), "FILE").splitlines()

    return read


@pytest.fixture
def refuse(pth: Pth, tiny: models.Segmenter, capsys: pytest.CaptureFixture[str]) -> Callable[[Any], UserError]:
    """Writes a file that does not go into Tiny, and returns the error, which has at most ten lines with all."""

    def refuse(content: Any) -> UserError:
        with pytest.raises(UserError) as error:
            checkpoints.read_checkpoint(pth(content), tiny)
        assert len(error.value.line) <= 300
        assert len(capsys.readouterr().out.splitlines()) + len(error.value.details) + 1 <= 10
        return error.value

    return refuse


def prefixed(states: States, prefix: str) -> States:
    return {f"{prefix}{name}": tensor for name, tensor in states.items()}


def other(states: States) -> States:
    """The same network with other numbers."""
    return {name: tensor + 1 for name, tensor in states.items()}


@pytest.mark.parametrize("prefix", ["model.", "teacher.", "module._orig_mod.model.net."])
def test_prefixes_of_all_names(read: Read, states: States, prefix: str) -> None:
    found, _, lines = read({"state_dict": prefixed(states, prefix)})
    assert same_states(found, states)
    assert lines == [f"FILE: state_dict.{prefix}* taken ({N} tensors)"]


def test_pytorch_s_own_wrappers(read: Read, states: States) -> None:
    """The names are those that PyTorch's wrappers make, before and inside the names."""
    network = reference_network(states)
    compiled: Any = torch.compile(network, backend="eager")
    averaged = torch.optim.swa_utils.AveragedModel(torch.nn.DataParallel(compiled))
    found, _, lines = read(averaged.state_dict())
    assert same_states(found, states)
    assert lines == [f"FILE: module.module._orig_mod.* taken ({N} tensors); 1 others left out (n_averaged)"]
    network.backbone = torch.compile(torch.nn.DataParallel(network.backbone), backend="eager")
    network.decode_head = checkpoint_wrapper(network.decode_head)
    found, _, lines = read(network.state_dict())
    assert same_states(found, states)
    assert lines == []


def test_averages_of_mmcv(read: Read, states: States) -> None:
    """mmcv 1's EMAHook keeps one buffer per parameter, `ema_` and the name with `_`; it swaps them around epochs."""
    parameters = [name for name, _ in reference.Segmenter("tiny").named_parameters()]
    buffers = {f"ema_{name.replace('.', '_')}": states[name] + 1 for name in parameters}
    found, _, lines = read({"state_dict": states | buffers})
    assert same_states(found, states)
    assert f"{len(parameters)} others left out (state_dict.ema_backbone_" in lines[0]
    assert lines[1].startswith("FILE: ema_* are of mmcv's EMAHook; the other tensors are averages if the file was")


def test_tensors_that_the_network_does_not_need(read: Read, states: States) -> None:
    one = torch.zeros(1, dtype=torch.float64)
    extra = {"total_ops": one, "total_params": one, "backbone.tpm.total_ops": one}
    extra |= {"auxiliary_head.conv_seg.bias": one, "aux_head.1.weight": one}
    extra |= {"criterion.weight": one, "decode_head.loss_decode.class_weight": one}
    plain = {name: tensor for name, tensor in states.items() if "num_batches" not in name}
    found, _, lines = read({"state_dict": prefixed(plain | extra, "model.")})
    counters = {name: torch.zeros_like(tensor) for name, tensor in states.items() if "num_batches" in name}
    assert same_states(found, plain | counters)
    assert lines == [
        f"FILE: state_dict.model.* taken ({len(plain)} tensors); 7 others left out (state_dict.model.total_ops, "
        "state_dict.model.total_params, ...)",
        f"FILE: {len(counters)} num_batches_tracked are missing, and start at 0",
    ]


def test_a_student_and_its_teacher(read: Read, refuse: Callable, states: States) -> None:
    """If both fit, none is guessed; one of another variant or another network is the teacher."""
    student = prefixed(states, "student.")
    error = refuse({"state_dict": student | prefixed(other(states), "teacher.")})
    both = f"state_dict.student.* ({N}) and state_dict.teacher.* ({N})"
    assert f"holds 2 networks that fit, {both}: torch.save the state dict of one" in error.line
    assert refuse({"epoch": 3, "model": [states]}).line.endswith("found epoch (int), model (list)")
    base = reference.Segmenter("base").state_dict()
    segformer = {f"backbone.block{index}.norm.weight": torch.ones(32) for index in range(3)}
    for teacher in (base, segformer):
        found, _, lines = read({"state_dict": student | prefixed(teacher, "teacher.model.")})
        assert same_states(found, states)
        assert lines[0].startswith(f"FILE: state_dict.student.* taken ({N} tensors); {len(teacher)} others left")
    for prefix in ("", "module."):
        found, _, lines = read(prefixed(states | prefixed(base, "teacher."), prefix))
        assert same_states(found, states)
        assert f"; {len(base)} others left out ({prefix}teacher." in lines[0]


def test_a_name_that_comes_twice(refuse: Callable, states: States) -> None:
    for prefix in ("model.", "module."):
        error = refuse(prefixed(states, prefix) | {OTHER: states[OTHER]})
        assert f"are {OTHER}: {OTHER} is one of them" in error.line


def split(states: States) -> dict[str, States]:
    """The tensors of each module in a dictionary of its own."""
    parts: dict[str, States] = {"backbone": {}, "decode_head": {}}
    for name, tensor in states.items():
        module, _, rest = name.partition(".")
        parts[module][rest] = tensor
    return parts


def rename(states: States) -> States:
    """The names of older checkpoints."""
    old = {new: name for name, new in ALIASES.items()}
    return {".".join(old.get(part, part) for part in name.split(".")): states[name] for name in states}


def reference_network(states: States) -> Any:
    network = reference.Segmenter("tiny")
    network.load_state_dict(states)
    return network


@pytest.mark.parametrize(
    ("arrange", "taken", "left_out"),
    [
        (lambda s, o: {"state_dict": s, "optimizer_states": [{"state": {0: o}}], "epoch": 3}, "", 0),
        (lambda s, o: split(s), "", 0),
        (lambda s, o: rename(s), "", 0),
        (lambda s, o: {name.removeprefix("backbone."): tensor for name, tensor in s.items()}, "", 0),
        (lambda s, o: {name: tensor.numpy() for name, tensor in s.items()}, "", 0),
        (lambda s, o: {"state_dict": reference_network(s).state_dict(keep_vars=True), "meta": None}, "", 0),
        (lambda s, o: {"net": s, "optimizer": {"ema": o}}, "net.* taken", 0),
        (lambda s, o: {"model": {"state_dict": s, "args": {}}}, "model.state_dict.* taken", 0),
        (lambda s, o: {"mine": s, "loss": {"weight": torch.ones(3)}}, "mine.* taken", 1),
        (lambda s, o: {"state_dict": s, "teacher": o}, "state_dict.* taken", N),
        (lambda s, o: {"model": o, "model_ema": s}, "model_ema.* taken, the averages", N),
        (lambda s, o: prefixed(o, "model.") | prefixed(s, "ema."), "ema.* taken, the averages", N),
        (lambda s, o: {"model": s, "ema": {"shadow": dict([*o.items()][:100])}}, "model.* taken", 100),
        (lambda s, o: {"state_dict": o, "ema_state_dict": s}, "ema_state_dict.* taken, the averages", N),
        (  # mmengine swaps the two before it saves
            lambda s, o: {"state_dict": s, "ema_state_dict": o | {"steps": torch.tensor(5)}},
            "state_dict.* taken, the averages",
            N + 1,
        ),
    ],
)
def test_where_files_keep_their_tensors(
    read: Read, states: States, arrange: Callable, taken: str, left_out: int
) -> None:
    found, _, lines = read(arrange(states, other(states)))
    assert same_states(found, states)
    expected = f"FILE: {taken} ({N} tensors)" + (f"; {left_out} others left out (" if left_out else "")
    assert [line[: len(expected)] for line in lines] == ([expected] if taken else [])


class Mode(enum.Enum):
    """A value that a trainer keeps."""

    TRAIN = 1


class Settings(dict):
    """A trainer's dict with attributes."""


class Names(list):
    """A trainer's list."""


def test_objects_of_other_programs(read: Read, states: States) -> None:
    """mmengine's message hub, schedulers and settings: of classes that are not installed here."""
    package, module = types.ModuleType("mmengine"), types.ModuleType("mmengine.logging")
    hub = type("HistoryBuffer", (), {"__module__": module.__name__})
    module.HistoryBuffer = hub  # type: ignore[attr-defined]
    buffer, settings = hub(), Settings(lr=0.1)
    buffer.__dict__ |= {"_log_history": np.arange(3.0), "_max_length": 10}
    settings.mode = Mode.TRAIN  # type: ignore[attr-defined]
    meta = {
        "iter": np.int64(7),
        "hook_msgs": {"best_score": np.float64(0.338), "best_ckpt": np.str_("best.pth")},
        "PALETTE": np.array([[1, 2, 3], [4, 5, 6]], np.uint8, order="F"),
        "when": datetime.datetime(2024, 1, 1),
        "dates": np.array(["2024-01-01"], "datetime64[D]"),
        "where": pathlib.PurePosixPath("/runs"),
        "loss": [float("inf"), np.array([np.nan, 1.0])],
    }
    objects = [buffer, settings, Names([1, 2]), collections.deque([1]), collections.defaultdict(list, a=[1])]
    with mock.patch.dict(sys.modules, {"mmengine": package, "mmengine.logging": module}):
        content = {"state_dict": states, "meta": meta, "message_hub": objects}
        found, metadata, lines = read(content)
    assert same_states(found, states)
    assert metadata["meta"] == {
        "iter": 7,
        "hook_msgs": {"best_score": 0.338, "best_ckpt": "best.pth"},
        "PALETTE": [[1, 2, 3], [4, 5, 6]],
        "when": None,
        "dates": None,
        "where": None,
        "loss": [None, [None, 1.0]],
    }
    assert len(lines) == 1
    path = f"{pathlib.PurePosixPath.__module__}.PurePosixPath"  # its module differs between versions of Python
    assert lines[0].startswith(
        f"FILE: left out objects that are no tensors, of datetime.datetime, {path}, "
        "mmengine.logging.HistoryBuffer and "
    )


def test_numbers_of_numpy_1(pth: Pth, states: States, tiny: models.Segmenter, tmp_path: pathlib.Path) -> None:
    """numpy 1 calls its module `core`, numpy 2 `_core`; big-endian numbers too."""
    content = {"state_dict": states, "meta": {"a": np.float32(0.5), "b": np.arange(3, dtype=">i4")}}
    torch.save(content, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    data = (tmp_path / "old.pth").read_bytes()
    assert b"numpy._core.multiarray" in data
    (tmp_path / "old.pth").write_bytes(data.replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    assert checkpoints.read_checkpoint(tmp_path / "old.pth", tiny)[1]["meta"] == {"a": 0.5, "b": [0, 1, 2]}


class Payload:
    """Runs something when it is unpickled without care."""

    def __init__(self, function: Callable, *arguments: Any):
        self.reduced = function, arguments

    def __reduce__(self) -> Any:
        return self.reduced


def test_nothing_of_a_file_runs(pth: Pth, states: States, tiny: models.Segmenter, tmp_path: pathlib.Path) -> None:
    """What the file names is not called, wherever it stands; the payloads are real ones."""
    marker = tmp_path / "was here"
    for index, payload in enumerate(
        (
            Payload(exec, f"open({str(marker)!r}, 'w').close()"),
            Payload(subprocess.call, ["touch", str(marker)]),
            Payload(pathlib.Path.touch, marker),
            Payload(getattr, Payload(exec, f"open({str(marker)!r}, 'w').close()"), "real"),
        )
    ):
        path = pth({"state_dict": states, "meta": {"a": payload}}, f"{index}.pth")
        _, meta = checkpoints.read_checkpoint(path, tiny)
        assert meta["meta"] == {"a": None}
        path = pth({"state_dict": states | {OTHER: payload}}, f"{index}_in.pth")
        with pytest.raises(UserError, match="1 tensors missing"):
            checkpoints.read_checkpoint(path, tiny)
        assert not marker.exists()
        with contextlib.suppress(AttributeError):
            torch.load(path, weights_only=False)
        assert marker.exists()
        marker.unlink()


def test_a_function_that_pytorch_blocks(pth: Pth, states: States, tiny: models.Segmenter) -> None:
    path = pth({"state_dict": states, "meta": Payload(os.mkdir, "no/where")})
    with pytest.raises(UserError, match=r"is refused: it asks for posix\.mkdir, and only tensors"):
        checkpoints.read_checkpoint(path, tiny)


def test_an_error_has_at_most_ten_lines(refuse: Callable, states: States) -> None:
    names = list(states)
    broken = {name: tensor for name, tensor in states.items() if name not in names[:40]}
    broken |= {f"extra.{index}": torch.zeros(2) for index in range(50)}
    broken |= {name: torch.zeros(7) for name in names[100:200]}
    plain = {name: tensor for name, tensor in broken.items() if "num_batches" not in name}
    plain |= {f"ema_{name.replace('.', '_')}": tensor for name, tensor in plain.items()}
    both = prefixed(plain, "student.") | prefixed(reference.Segmenter("base").state_dict(), "teacher.")
    error = refuse({"mine": both, "meta": {"when": datetime.datetime(2024, 1, 1)}})  # much is printed before
    assert "40 tensors missing, 50 unexpected" in error.line
    error = refuse(broken)
    assert "40 tensors missing, 50 unexpected, 100 of the wrong shape" in error.line
    counts = [line.rpartition(" (")[2] for line in error.details]
    assert counts == ["and 39 more)", "and 49 more)", "and 99 more)"]
    error = refuse(states | {"pixel_mean": torch.zeros(3)})
    assert "1 unexpected, 0 of the wrong shape; the model has no place for the unexpected" in error.line


def test_another_network(refuse: Callable, pth: Pth, states: States) -> None:
    """The names are of SeaFormer's official code; some of its head's are TopFormer's too."""
    blocks = [f"backbone.trans{stage}.transformer_blocks.{block}" for stage in (1, 2) for block in range(4)]
    seaformer = {f"{block}.attn.to_q.c.weight": torch.zeros(64, 128, 1, 1) for block in blocks}
    seaformer |= {name: tensor for name, tensor in states.items() if name.startswith("decode_head.conv_seg")}
    error = refuse({"state_dict": seaformer})
    assert "it is of another network (names such as backbone.trans1.transformer_blocks.0." in error.line
    assert "2 of its 10 tensors have names of TopFormer's" in error.line
    # More blocks of the same network are no other network.
    block = {name: tensor for name, tensor in states.items() if ".transformer_blocks.0." in name}
    deep = {name.replace("blocks.0", f"blocks.{i}"): t for i in range(40) for name, t in block.items()}
    assert "it has 40 transformer blocks, the config 4" in refuse(states | deep).line


@pytest.mark.filterwarnings("ignore:.*torch.jit.:DeprecationWarning")
def test_programs_and_pickled_models(refuse: Callable, tiny: models.Segmenter, tmp_path: pathlib.Path) -> None:
    assert "holds a torch.nn.modules.linear.Linear: expected a dictionary" in refuse(torch.nn.Linear(2, 2)).line
    assert "save the model's state_dict()" in refuse(torch.nn.Linear(2, 2)).line
    torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)).save(tmp_path / "script.pt")
    with pytest.raises(UserError, match="is a TorchScript archive, a program: save"):
        checkpoints.read_checkpoint(tmp_path / "script.pt", tiny)
    torch.save({"a": torch.ones(2)}, tmp_path / "protocol.pth", pickle_protocol=4)
    with pytest.raises(UserError, match=r"torch\.save it again with the default pickle_protocol"):
        checkpoints.read_checkpoint(tmp_path / "protocol.pth", tiny)
