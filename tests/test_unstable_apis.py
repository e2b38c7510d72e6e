"""APIs of other packages that may change: docs/design.md lists all in use, and the installed versions have them."""

import ast
import inspect
import pathlib
import pkgutil
import re
from collections.abc import Iterator
from importlib import metadata

import pytest

ROOT = pathlib.Path(__file__).parents[1]
TABLE = (ROOT / "docs" / "design.md").read_text().partition("## APIs that may change")[2]
ROWS = re.findall(r"^\| `([\w.]+)(?:\((\w+)\))?` \| `([\w/.]+)` \|", TABLE, re.MULTILINE)
UNSTABLE = re.compile(r"(jax|flax|optax|orbax|grain|tensorflow_datasets)\..*\b(_[a-z]\w+|experimental)\b")
UNSTABLE_PACKAGES = re.compile(r"(jaxlib|jax\.extend|jax\.interpreters|litert_converter|orbax\.checkpoint\.v1)\b")


@pytest.mark.parametrize(("name", "parameter", "file"), ROWS)
def test_the_installed_version_has_it(name: str, parameter: str, file: str) -> None:
    path = ROOT / file if file.startswith("benchmarks/") else ROOT / "topformer_jax" / file
    assert (parameter or name.split(".")[-1]) in path.read_text(), f"{file} does not use {name} any more"
    first = name.split(".")[0]
    package = {"orbax": "orbax-checkpoint", "ai_edge_litert": "ai-edge-litert"}.get(first, first)
    try:
        found = pkgutil.resolve_name(name)
    except (ImportError, AttributeError) as error:
        pytest.fail(f"{package} {metadata.version(package)} has no {name}: {error}; see docs/design.md")
    if parameter and parameter not in inspect.signature(found).parameters:
        pytest.fail(f"{package} {metadata.version(package)}: {name} takes no {parameter}; see docs/design.md")


def test_the_table_lists_every_use() -> None:
    files = [*(ROOT / "topformer_jax").rglob("*.py"), *(ROOT / "benchmarks").glob("*.py")]
    for file in files:
        for used in _list_names(ast.parse(file.read_text())):
            if UNSTABLE.match(used) or UNSTABLE_PACKAGES.match(used):
                listed = (name for name, _, where in ROWS if str(file).endswith(f"/{where}"))
                assert any(name.startswith(used) or used.startswith(name) for name in listed), (file, used)


def _list_names(tree: ast.Module) -> Iterator[str]:
    """Every imported name, and every attribute of one, with its module; also those that `getattr` names."""
    full_names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            full_names |= {alias.asname or alias.name: alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            full_names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    yield from full_names.values()
    for node in ast.walk(tree):
        text = ""
        if isinstance(node, ast.Attribute):
            text = ast.unparse(node)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr", "setattr"):
            text = f"{ast.unparse(node.args[0])}.{getattr(node.args[1], 'value', '')}"
        first, _, rest = text.partition(".")
        if first in full_names:
            yield f"{full_names[first]}.{rest}"
