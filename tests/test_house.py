"""The rules that keep the house small: imports go one way, heavy packages come in late, files stay short."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "topformer_jax"
# Whom a part of the package may import, besides itself and errors.
ALLOWED = {
    "ops": set(),
    "models": {"ops"},
    "data": set(),
    "checkpoint": {"models"},
    "config": set(),
    "cli": {"config"},
    "errors": set(),
    "version": set(),
    "optimizer": set(),
    "files": set(),
    "metrics": set(),
    "logs": {"files"},
    "pictures": {"data", "files"},
    "report": {"data", "files", "metrics", "pictures"},
    "sharding": set(),
    "views": {"data", "ops"},
    "inference": {"config", "data", "metrics", "models", "ops", "views"},
    "step": {"data", "models", "ops", "optimizer", "sharding"},
    # Commands. Training starts from a PyTorch file too, which the converter reads.
    "convert": {"checkpoint", "cli", "data", "models", "version"},
    "evaluate": {
        *(
            "checkpoint",
            "cli",
            "config",
            "convert",
            "data",
            "files",
            "inference",
            "logs",
            "metrics",
            "models",
        ),
        *("pictures", "report", "sharding", "views"),
    },
    "predict": {
        *("checkpoint", "cli", "convert", "data", "files", "inference", "logs", "models", "pictures"),
    },
    "browse": {"cli", "config", "data", "pictures"},
    "train": {
        *("checkpoint", "cli", "convert", "data", "evaluate", "files", "logs", "metrics", "models"),
        *("pictures", "sharding", "step"),
    },
    "__init__": {"checkpoint", "config", "convert", "models", "version"},
}
FILES = sorted(PACKAGE.rglob("*.py"))


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


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_go_one_way(file: pathlib.Path) -> None:
    part = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
    parts = {p.name.removesuffix(".py") for p in PACKAGE.iterdir()}
    for name, column in _imports(ast.parse(file.read_text())):
        first, *rest = name.split(".")
        if first == "topformer_jax" and rest and rest[0] in parts:
            assert rest[0] in ALLOWED[part] | {part, "errors"}, f"{file} imports {name}"
        assert first not in ("benchmarks", "tests"), f"{file} imports {name}, which is not shipped"
        if first in ("torch", "tensorflow"):
            assert column > 0, f"{file} imports {name} before it is needed"
            assert part in {"torch": ("convert",), "tensorflow": ("export",)}[first]


@pytest.mark.parametrize(
    "file",
    [
        *FILES,
        *(
            file
            for folder in ("benchmarks", "configs", "scripts")
            for file in sorted((ROOT / folder).glob("*.py"))
        ),
        *sorted((ROOT / "tests" / "reference").glob("*.py")),
    ],
    ids=lambda file: str(file.relative_to(ROOT)),
)
def test_files_stay_short(file: pathlib.Path) -> None:
    assert len(file.read_text().splitlines()) <= 350


def test_readme_names_every_command_and_script() -> None:
    readme = (ROOT / "README.md").read_text()
    mains = [file for file in FILES if "\nif __name__ ==" in file.read_text()]
    commands = [file.parent.name if file.stem == "__main__" else file.stem for file in mains]
    assert "convert" in commands
    for name in [f"python -m topformer_jax.{command}" for command in commands]:
        assert name in readme
    for script in (ROOT / "scripts").iterdir():
        assert f"scripts/{script.name}" in readme or script.name.startswith("_")
