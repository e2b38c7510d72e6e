"""Runs every example in the package's docstrings, under the tests' strict settings."""

import doctest
import importlib
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1]
FILES = [file for file in sorted((ROOT / "topformer_jax").rglob("*.py")) if ">>> " in file.read_text()]


def _module_name(file: pathlib.Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@pytest.mark.parametrize("file", FILES, ids=_module_name)
def test_examples(file: pathlib.Path) -> None:
    tests = doctest.DocTestFinder(exclude_empty=True).find(importlib.import_module(_module_name(file)))
    # The finder overlooks what it takes for another module's; every line of an example must be found.
    lines = [line for line in file.read_text().splitlines() if line.lstrip().startswith(">>> ")]
    assert sum(len(test.examples) for test in tests) == len(lines)
    report: list[str] = []
    runner = doctest.DocTestRunner(verbose=False)
    for test in tests:
        runner.run(test, out=report.append)
    assert runner.failures == 0, "\n" + "".join(report)
