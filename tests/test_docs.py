"""README and docs/: what they name exists, commands have flags and settings that exist, and every command runs."""

import argparse
import ast
import contextlib
import importlib.util
import json
import os
import pathlib
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import pytest
from PIL import Image

from tests.commands import LONGEST, ROOT, TINY
from topformer_jax import checkpoints, config, models
from topformer_jax.config import loading
from topformer_jax.config.settings import SETTINGS

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
OTHER_PAGES = [ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md"]
WRITTEN_BY_THE_READER = {"configs/streets.py"}
# Commands that no test can run as they stand, by what they contain, and why. Their flags are checked all the same.
NOT_RUN = {
    "git clone": "downloads",
    "python3 -m venv": "makes an environment",
    "pip install": "downloads",
    "bash scripts/quickstart.sh": "makes an environment and trains for minutes",
    "bash scripts/reproduce.sh": "tests/test_reproduce.py runs it on miniatures",
    "bash scripts/tpu_pod.sh": "needs a TPU pod",
    "sbatch": "needs SLURM",
    "--coordinator": "needs several hosts",
    "gs://": "needs a bucket: tests/test_packing.py and tests/test_cache.py have one",
    "--port 8000": "serves until it is interrupted",
    "_camvid": "needs CamVid",
    "_imagenet.py": "needs ImageNet",
    "runs/topformer_t_imagenet": "needs ImageNet",
    "python -m benchmarks.": "tests/test_benchmarks.py runs the benchmarks with small sizes",
}
OTHER_PROGRAMS = {  # flags of scripts/test.sh, sbatch, reproduce.sh, tpu_pod.sh and XLA
    *("--shm-size", "--all", "--nodes", "--backbone", "--work"),
    *("--dry-run", "--accelerator-type", "--slices", "--spot", "--xla"),
}
if shutil.which("npm") is None:
    NOT_RUN["python -m topformer_jax.demo"] = "needs npm"
# The published files that commands read, as files of random weights of these recipes.
PTH_FILES = {
    "TopFormer-T.pth": "topformer_t_ade",
    "TopFormer-B.pth": "topformer_b_ade",
    "TopFormer-B-cityscapes.pth": "topformer_b_cityscapes",
    "TopFormer-B-context60.pth": "topformer_b_context60",
    "topformer-B-224-75.3.pth": "topformer_b_imagenet",
}
TRAINED_BEFORE = {"evaluation.md": {"runs/topformer_b_ade": "topformer_b_ade"}}
# What a sentence must not have, and what to write. CONTRIBUTING.md has a pair of examples for each.
STYLE = {
    r"^(?:Of|What|With what|So is|So are)\b": "begin with the subject",
    r"^(?:How|Which|Whether)\b[^?]*, (?:the|a) \w+ (?:says|knows|tells)\b": "begin with the subject",
    r"^Where (?:the|there|a|an|it|they|nothing|all|both|two)\b": "if",
    r"\b(?:a|one) (?:file|line|row|page|process|script|bar|name|test|run|image)s? an? "
    r"(?:box|kind|class|device|chip|core|split|slice|image|picture|step|question|module|host|test|task)\b": "per",
    r"\b(?:images|pictures|samples|rows|sums|cores|chips|bytes)(?:/s)? an? \w+": "per",
    r"\bthe \w+ (?:the|it|they|you) \w* ?(?:has|have|had|holds?|needs?|takes?|gives?|names?)\b": "that",
    r"\b(?:[Mm]end|reckon|anew|in earnest|without (?:a|another) word|is yours to|hence|thereof)\b": "plain words",
    r"\b(?:[Ff]resh|mirrored|[Pp]rocessors?|never stopped)\b": "from scratch, flipped, CPU, uninterrupted",
    r"\bbut for\b": "except",
    r"\balone\b": "only",
    r"\b[Bb]eside (?:PyTorch|the official)\b": "compared with",
    r"\b[Aa] line (?:says|names|tells)\b": "the command, or the log",
    r"\b[Aa] mistake\b|\bis one line\b": "a user error prints one line",
    r"\b(?:stands?|lies?) (?:in|on|once|within)\b": "is, or a verb of its own",
}
LONGEST_SENTENCE = 40  # words
SMALL = TINY | {
    "batch_size": 2,
    "model.depths": 4,
    "data.num_workers": 0,
    "evaluation.crop_size": "(64,64)",
    "evaluation.stride": "(32,32)",
    "schedule.steps": 2,
}


class Block(NamedTuple):
    """A fenced block of a page."""

    language: str
    text: str


def blocks(page: pathlib.Path) -> list[Block]:
    found = re.findall(r"^( *)```(\w*)\n(.*?)^\1```$", page.read_text(), re.DOTALL | re.MULTILINE)
    return [Block(language, textwrap.dedent(text)) for _, language, text in found]


def prose(page: pathlib.Path) -> str:
    """A page without its fenced blocks, and without the other project's column of a table."""
    text = re.sub(r"^( *)```.*?^\1```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"^\|[^|]*\|", "|", text, flags=re.MULTILINE) if "mmseg" in page.name else text


def commands_of(block: Block) -> list[str]:
    """The commands of a bash block, a line each."""
    lines = block.text.replace("\\\n", " ").splitlines() if block.language == "bash" else []
    return [re.sub(r"  +", " ", line).strip() for line in lines if line and not line.startswith("#")]


def sentences(text: str) -> Iterator[str]:
    """The sentences of Markdown: of paragraphs, list items and table cells, with code as one word."""
    text = re.sub(r"^( *)```.*?^\1```$|^    [^\n]*$|^#[^\n]*$", "", text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"`[^`]+`", "`code`", re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)).replace("**", "")
    text = re.sub(r"^\|(.*)\|$", lambda row: "\n\n" + row[1].replace("|", "\n\n"), text, flags=re.MULTILINE)
    for paragraph in re.split(r"\n\s*\n|^ *(?:-|\d+\.) ", text, flags=re.MULTILINE):
        for sentence in re.split(r"(?<=[.!?:;]) (?=[A-Z`])", " ".join(paragraph.split())):
            if sentence:
                yield sentence


def faults_of_style(sentence: str) -> list[str]:
    """What to change in a sentence."""
    faults = [advice for pattern, advice in STYLE.items() if re.search(pattern, sentence)]
    return faults + ["fewer words"] * (len(sentence.split()) > LONGEST_SENTENCE)


COMMANDS = {page.name: [c for block in blocks(page) for c in commands_of(block)] for page in PAGES}
ALL_COMMANDS = sorted({command for commands in COMMANDS.values() for command in commands})


def why_not_run(command: str) -> str:
    return next((reason for part, reason in NOT_RUN.items() if part in command), "")


class _Captured(BaseException):
    """Carries a command's parser out of its main()."""


def parser_of(program: str) -> argparse.ArgumentParser:
    """The parser of a module's or script's main(), which goes no further."""

    def capture(parser: argparse.ArgumentParser, *_: object) -> None:
        raise _Captured(parser)

    main = (
        runpy.run_path(str(ROOT / program))["main"]
        if program.endswith(".py")
        else importlib.import_module(program).main
    )
    with (
        mock.patch.dict(os.environ),
        mock.patch.object(sys, "argv", [program]),
        mock.patch.object(argparse.ArgumentParser, "parse_args", capture),
        pytest.raises(_Captured) as captured,
    ):
        main()
    return captured.value.args[0]


def split_program(command: str) -> tuple[str, list[str]]:
    """Our program in a command, as a module or a script, and its arguments; ("", []) if there is none."""
    words = shlex.split(command.split("|")[-1], comments=True)
    for place, word in enumerate(words):
        if word == "-m" and words[place + 1].startswith(("topformer_jax", "benchmarks")):
            return words[place + 1], words[place + 2 :]
        if word == "scripts/slurm.sh":
            return "topformer_jax.train", words[place + 1 :]
        if word.endswith(".py") and place and words[place - 1] == "python":
            return word, words[place + 1 :]
    return "", []


@pytest.mark.parametrize("page", [*PAGES, *OTHER_PAGES], ids=lambda page: page.name)
def test_the_style(page: pathlib.Path) -> None:
    text = re.sub(r"^\| not \| but \|\n.*?\n\n", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    found = {sentence: faults for sentence in sentences(text) if (faults := faults_of_style(sentence))}
    assert not found, "\n".join(f"{faults}: {sentence}" for sentence, faults in found.items())


def test_the_examples_of_style_are_told_apart() -> None:
    table = (ROOT / "CONTRIBUTING.md").read_text().split("| not | but |\n|---|---|\n")[1].split("\n\n")[0]
    pairs = [row.strip("| ").split(" | ") for row in table.splitlines()]
    assert len(pairs) == 16
    assert [before for before, _ in pairs if not faults_of_style(before)] == []
    assert [after for _, after in pairs if faults_of_style(after)] == []
    assert faults_of_style("word " * 41) == ["fewer words"]


@pytest.mark.parametrize("page", [*PAGES, *OTHER_PAGES], ids=lambda page: page.name)
def test_links_resolve(page: pathlib.Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith("https://"):
            continue
        path, _, heading = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), f"{page.name} links to {target}"
        if heading:
            titles = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
            slugs = [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]
            assert heading in slugs, f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_files_and_functions_exist(page: pathlib.Path) -> None:
    text = page.read_text()
    for name in re.findall(r"(?<![\w./{])(?:topformer_jax|benchmarks|configs|docs|scripts|tests)/[\w/.]+\w", text):
        assert (ROOT / name).exists() or name in WRITTEN_BY_THE_READER, f"{page.name} names {name}"
    for name, function in re.findall(r"`([\w/]+\.py)(?::(\w+))?`", prose(page)):
        files = [file for file in (ROOT / name, ROOT / "topformer_jax" / name) if file.exists()]
        assert files or name in WRITTEN_BY_THE_READER, f"{page.name} names {name}"
        if function:
            tree = ast.parse(files[0].read_text())
            defined = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
            assert function in defined, f"{page.name} names {name}:{function}"
    for module in re.findall(r"python -m ((?:topformer_jax|benchmarks)[\w.]*\w)", text):
        assert importlib.util.find_spec(module), f"{page.name} names {module}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_settings_exist(page: pathlib.Path) -> None:
    groups = {key.split(".")[0] for key in SETTINGS if "." in key}
    for name in re.findall(rf"`((?:{'|'.join(groups)})\.\w+)`", prose(page)):
        assert name in SETTINGS, f"{page.name} names the setting {name}"
    for key, value in re.findall(r"--config\.([\w.]+)=('[^']*'|[^\s`]+)", page.read_text()):
        if key != "KEY":
            assert key in SETTINGS, f"{page.name} sets {key}"
            loading.parse(key, value.strip("'"))


@pytest.mark.parametrize("command", ALL_COMMANDS)
def test_commands_have_the_flags(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    program, words = split_program(command)
    if not program:
        assert why_not_run(command) or command.startswith("source "), f"nothing tests: {command}"
        return
    words = [word for word in words if not word.startswith("--config.")]
    try:
        args = parser_of(program).parse_args(words)
    except SystemExit:
        pytest.fail(capsys.readouterr().err)
    name = getattr(args, "config", None)
    assert name is None or name in WRITTEN_BY_THE_READER or config.load(name if "/" not in name else ROOT / name)


def test_flags_in_the_text_exist() -> None:
    programs = {split_program(command)[0] for command in ALL_COMMANDS} - {""}
    known = {flag for program in programs for flag in parser_of(program)._option_string_actions}
    for page in PAGES:
        for flag in re.findall(r"(?<![\w-])--[a-z][a-z-]*", prose(page)):
            assert flag in known | OTHER_PROGRAMS, f"{page.name} names {flag}"


def test_scripts_are_named_and_have_no_syntax_errors() -> None:
    text = "".join(page.read_text() for page in PAGES)
    for name in set(re.findall(r"scripts/\w+\.sh", text)):
        subprocess.run(["bash", "-n", ROOT / name], check=True)


def test_exceptions_are_still_needed() -> None:
    for part in NOT_RUN:
        assert any(part in command for command in ALL_COMMANDS), f"no document has {part}"


def test_the_documents_are_short() -> None:
    readme, *others = (page.read_text() for page in PAGES if page.name != "settings.md")
    assert len(readme.splitlines()) <= 120
    assert len(readme.split()) <= 750
    assert sum(len(text.split()) for text in (readme, *others)) <= 11_000
    for image in (ROOT / "docs/images").iterdir():
        assert image.stat().st_size < 200_000


def write_weights(path: pathlib.Path, recipe: str) -> None:
    """Writes a checkpoint of a recipe's fresh weights."""
    settings = config.load(recipe)
    tensors = {name: np.asarray(value) for name, value in models.state_dict(models.build(settings)).items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    checkpoints.write_checkpoint(path, tensors, {"config": settings.to_dict(), "meta": {}})


def write_data(drawn: pathlib.Path, folder: pathlib.Path, splits: dict[str, str]) -> None:
    """Writes the drawn data set in ADE20K's layout; `splits` are names of folders by those of `drawn`."""
    for split, name in splits.items():
        for kind in ("images", "annotations"):
            (folder / kind / name).mkdir(parents=True)
        for image in (drawn / f"images/{split}").iterdir():
            shutil.copy(image, folder / f"images/{name}")
            label = np.asarray(Image.open(drawn / f"annotations/{split}/{image.stem}.png"))
            Image.fromarray(label % 10).save(folder / f"annotations/{name}/{image.stem}.png")


def write_cityscapes(drawn: pathlib.Path, folder: pathlib.Path) -> None:
    """Writes the drawn validation images in the layout of Cityscapes."""
    images, labels = folder / "leftImg8bit/val/bonn", folder / "gtFine/val/bonn"
    images.mkdir(parents=True)
    labels.mkdir(parents=True)
    for image in (drawn / "images/val").iterdir():
        Image.open(image).save(images / f"{image.stem}_leftImg8bit.png")
        label = drawn / f"annotations/val/{image.stem}.png"
        shutil.copy(label, labels / f"{image.stem}_gtFine_labelTrainIds.png")


def write_labelme(drawn: pathlib.Path, folder: pathlib.Path) -> None:
    """Writes the drawn images with two polygons each, as labelme does, divided into train and val."""
    for image in drawn.glob("images/*/*.jpg"):
        place = folder / image.parent.name / image.name
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(image, place)
        areas = {"road": [[1, 1], [30, 5], [9, 40]], "house": [[40, 1], [60, 5], [50, 40]]}
        shapes = [{"label": name, "points": area, "shape_type": "polygon"} for name, area in areas.items()]
        content = {"imagePath": image.name, "imageData": None, "shapes": shapes}
        place.with_suffix(".json").write_text(json.dumps(content))


@pytest.fixture
def sandbox(drawn: pathlib.Path, tmp_path: pathlib.Path) -> Callable[[pathlib.Path], pathlib.Path]:
    """Makes a folder that looks like a clone to the commands of a page, with stand-ins for what they read."""

    def make(page: pathlib.Path) -> pathlib.Path:
        for name in ("configs", "docs", "scripts"):
            shutil.copytree(ROOT / name, tmp_path / name)
        write_data(drawn, tmp_path / "data/ade/ADEChallengeData2016", {"train": "training", "val": "validation"})
        write_cityscapes(drawn, tmp_path / "data/cityscapes")
        write_labelme(drawn, tmp_path / "drawn")
        for number, name in enumerate(("holiday/a.jpg", "more/b.jpg", "new_images/c.jpg", "street.jpg")):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            shutil.copy(drawn / f"images/train/{number}.jpg", tmp_path / name)
        read = "".join(block.text for block in blocks(page))
        if "prepare ade20k --source downloads" in read:  # which makes the folder
            archive = tmp_path / "downloads/ADEChallengeData2016"
            shutil.make_archive(str(archive), "zip", tmp_path / "data/ade", archive.name)
            shutil.rmtree(tmp_path / "data/ade")
        for name, recipe in PTH_FILES.items():
            if name in read:
                write_weights(tmp_path / name, recipe)
        for name, recipe in TRAINED_BEFORE.get(page.name, {}).items():
            write_weights(tmp_path / name, recipe)
        return tmp_path

    return make


def steps_of(page: pathlib.Path) -> Iterator[tuple[str, list[str]]]:
    """What a reader of a page runs, in order: a text to show, and the words of a process."""
    settings = " ".join(shlex.quote(f"--config.{key}={value}") for key, value in SMALL.items())
    for block in blocks(page):
        if block.language == "python":
            yield block.text, [sys.executable, "-c", block.text]
        for command in commands_of(block):
            if split_program(command)[0] and not why_not_run(command):
                small = f"{command} {settings}" if "--config " in command else command
                yield command, ["bash", "-euo", "pipefail", "-c", small]


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if any(steps_of(page))], ids=lambda page: page.name)
def test_commands_run(page: pathlib.Path, sandbox: Callable[[pathlib.Path], pathlib.Path]) -> None:
    folder = sandbox(page)
    path = f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "MYPYPATH": str(ROOT), "PATH": path}
    environment |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}

    def run(title: str, words: list[str]) -> None:
        options: dict[str, Any] = {"capture_output": True, "text": True, "check": False, "timeout": LONGEST}
        done = subprocess.run(words, cwd=folder, env=environment, **options)
        assert done.returncode == 0, f"{page.name}: {title}\n{done.stdout}{done.stderr}"

    for title, words in steps_of(page):
        if "def get_config" in title:
            (folder / "configs/streets.py").write_text(title.rstrip() + "\n")
            mypy = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml")]
            run("mypy of configs/streets.py", [*mypy, "configs/streets.py"])
        run(title, words)


def test_an_unknown_flag_is_found(capsys: pytest.CaptureFixture[str]) -> None:
    with contextlib.suppress(SystemExit):
        parser_of("topformer_jax.train").parse_args(["--config", "x", "--wrokdir", "y"])
    assert "--wrokdir" in capsys.readouterr().err
