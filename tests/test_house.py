"""The rules of the house: imports go one way, heavy packages come in late, files and functions stay short."""

import ast
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "topformer_jax"
# What each part of the package may import, besides itself and errors: from numerics up to commands.
BASE = {"version", "errors", "files"}
DATA = {"config", "data"}
NETWORK = {"ops", "models"}
SHARED = {"cli", "logs", "metrics", "processes", "sharding", "visualize"}
SCORING = {"checkpoints", "classifier_evaluation", "evaluation", "inference"}
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "version": set(),
    "files": set(),
    "config": set(),
    "metrics": set(),
    "optimizer": set(),
    "profiler": set(),
    "sharding": set(),
    "processes": set(),
    "shutdown": {"processes"},
    "ops": set(),
    "data": {"files", "ops"},
    "models": {"ops"},
    "logs": {"files"},
    "visualize": {"data", "files", "metrics"},
    "cli": {"config", "files", "logs", "processes"},
    "checkpoints": {"config", "data", "files", "models", "processes"},
    "inference": {"data", "metrics", "models", "ops", "sharding"},
    "exporters": {"config", "data", "files", "inference", "models", "ops"},
    "step": {"data", "models", "ops", "optimizer", "sharding"},
    "classifier_evaluation": {"data", "evaluation", "models", "processes", "sharding"},
    "evaluation": {"data", "inference", "metrics", "models", "processes", "sharding"},
    "run_folder": {"files", "processes"},
    "run": BASE | DATA | NETWORK | SHARED | SCORING | {"run_folder", "shutdown", "step"},
    # Commands, which do not import each other.
    "browse": BASE | DATA | SHARED,
    "check": BASE | DATA | SHARED,
    "convert": BASE | DATA | NETWORK | SHARED | {"checkpoints"},
    "demo": BASE | SHARED | {"config", "exporters"},
    "evaluate": BASE | DATA | NETWORK | SHARED | SCORING | {"exporters"},
    "export": BASE | DATA | NETWORK | SHARED | {"checkpoints", "exporters"},
    "preparation": {"data", "files", "logs"},
    "prepare": BASE | DATA | {"cli", "preparation"},
    "predict": BASE | DATA | NETWORK | SHARED | SCORING | {"exporters"},
    "train": BASE
    | DATA
    | NETWORK
    | SHARED
    | {"checkpoints", "profiler", "run", "run_folder", "shutdown", "step"},
    "__init__": {"checkpoints", "config", "data", "exporters", "inference", "models", "version"},
}
# The only files that import PyTorch, when it is needed: the reading and writing of its files.
TORCH_FILES = {"checkpoints/torch_format.py"}
FILES = sorted(PACKAGE.rglob("*.py"))
SCRIPTS = [
    path for folder in ("configs", "scripts", "benchmarks") for path in sorted((ROOT / folder).rglob("*.py"))
]
LONGEST_FUNCTION = 95  # lines with docstring and comments; the loop of training


def _name(file: pathlib.Path) -> str:
    return str(file.relative_to(ROOT))


def _imports(tree: ast.AST) -> list[tuple[str, int]]:
    """Imported modules with their column: 0 is imported with the file, more is imported when needed."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.col_offset) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            found.append((str(node.module), node.col_offset))
            found += [(f"{node.module}.{alias.name}", node.col_offset) for alias in node.names]
    return found


@pytest.mark.parametrize("file", FILES, ids=_name)
def test_imports_go_one_way(file: pathlib.Path) -> None:
    part = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
    parts = {path.name.removesuffix(".py") for path in PACKAGE.iterdir()}
    for name, column in _imports(ast.parse(file.read_text())):
        first, *rest = name.split(".")
        if first == "topformer_jax" and rest and rest[0] in parts:
            assert rest[0] in ALLOWED[part] | {part, "errors"}, f"{file} imports {name}"
        assert first not in ("benchmarks", "tests"), f"{file} imports {name}, which is not shipped"
        if first in ("torch", "tensorflow"):
            assert column > 0, f"{file} imports {name} before it is needed"
            assert str(file.relative_to(PACKAGE)) in TORCH_FILES, f"{file} imports {name}"


@pytest.mark.parametrize("file", [*FILES, *SCRIPTS], ids=_name)
def test_files_and_functions_stay_short(file: pathlib.Path) -> None:
    text = file.read_text()
    assert len(text.splitlines()) <= 600
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            length = (node.end_lineno or 0) - node.lineno + 1
            assert length <= LONGEST_FUNCTION, f"{node.name} in {file} has {length} lines"


def test_the_documents_name_every_command_and_script() -> None:
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    text = "\n".join(page.read_text() for page in pages)
    commands = [file.stem for file in PACKAGE.glob("*.py") if "    cli.run(main)" in file.read_text()]
    assert "convert" in commands
    for command in commands:
        assert f"python -m topformer_jax.{command}" in text
    for script in (ROOT / "scripts").iterdir():
        assert f"scripts/{script.name}" in text or script.name.startswith("_")


def test_no_test_knows_how_fast_the_machine_is() -> None:
    """Other machines need ten times as long: tests wait for events, or for LONGEST of tests/commands.py."""
    for file in (ROOT / "tests").glob("*.py"):
        assert not re.search(r"timeout\"?[=:] ?\d\d|monotonic\(\) \+ \d", file.read_text()), file


def test_text_of_foreign_files_goes_through_one_reader() -> None:
    """files.read_json gives typed values, or one line; json.loads is for what this process has written itself."""
    pattern = re.compile(r"json\.loads?\((?!\w*\.?config\.to_json\(\))")
    assert [str(file) for file in FILES if pattern.search(file.read_text())] == []
