"""The rules of the house: imports go one way, heavy packages come in late, files and functions stay short."""

import ast
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "topformer_jax"
COMMANDS = "train evaluate predict convert export prepare check browse demo"
# The package from bottom to top. A part imports parts of lower layers, never one of its own layer.
LAYERS = [
    layer.split()
    for layer in (
        "version runtime",
        "config",
        "cli ops",
        "models data",
        "checkpoints",
        "exporters",
        "inference",
        "visualize",
        "inspection preparation",
        "training",
        COMMANDS + " __init__",
    )
]
HEIGHT = {part: height for height, layer in enumerate(LAYERS) for part in layer}
# The only files that import PyTorch, when it is needed: the reading and writing of its files.
TORCH_FILES = {"checkpoints/torch_format.py"}
FILES = sorted(PACKAGE.rglob("*.py"))
SCRIPTS = [path for folder in ("configs", "scripts", "benchmarks") for path in sorted((ROOT / folder).rglob("*.py"))]
LONGEST_FUNCTION = 60  # lines with docstring and comments
THE_LOOP = "topformer_jax/train.py", "train"  # may be longer


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


def _part(name: str) -> str:
    """The part of the package that holds a module: its folder or file at the root; `runtime.cli` is its own."""
    first, *rest = name.split(".")[1:]
    return "cli" if [first, *rest[:1]] == ["runtime", "cli"] else first


@pytest.mark.parametrize("file", FILES, ids=_name)
def test_imports_go_one_way(file: pathlib.Path) -> None:
    part = _part(".".join(file.relative_to(ROOT).with_suffix("").parts))
    for name, column in _imports(ast.parse(file.read_text())):
        first, *rest = name.split(".")
        if first == "topformer_jax" and rest and _part(name) in HEIGHT:
            other = _part(name)
            assert other == part or HEIGHT[other] < HEIGHT[part], f"{file} imports {name}"
        assert first not in ("benchmarks", "tests"), f"{file} imports {name}, which is not shipped"
        if first in ("torch", "tensorflow"):
            assert column > 0, f"{file} imports {name} before it is needed"
            assert str(file.relative_to(PACKAGE)) in TORCH_FILES, f"{file} imports {name}"


def test_the_root_holds_commands_and_folders() -> None:
    """What only one command uses stands in a folder: the root shows what is what."""
    modules = {file.stem for file in PACKAGE.glob("*.py")}
    assert modules == {*COMMANDS.split(), "__init__", "version"}
    folders = {file.parent.name for file in PACKAGE.glob("*/__init__.py")}
    assert len(folders) <= 12
    assert modules | folders | {"cli"} == set(HEIGHT)


@pytest.mark.parametrize("file", [*FILES, *SCRIPTS], ids=_name)
def test_files_and_functions_stay_short(file: pathlib.Path) -> None:
    text = file.read_text()
    assert len(text.splitlines()) <= 600
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef) and (_name(file), node.name) != THE_LOOP:
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
