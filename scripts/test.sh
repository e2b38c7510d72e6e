#!/usr/bin/env bash
# Installs the project with its development tools into .venv, lints, type-checks and runs the tests.
#   bash scripts/test.sh          everything but the tests marked slow
#   bash scripts/test.sh --all    those too, and more random examples
# Further arguments go to pytest. PYTHON names the interpreter (3.11 or newer), VENV the environment's folder.
set -euo pipefail
cd "$(dirname "$0")/.."

source scripts/_venv.sh
install_into_venv '.[convert,export,dev]'

ruff check .
ruff format --check .
mypy
# Two at a time: compiling is most of the work, and that is done by one core.
exec python -m pytest --numprocesses 2 --dist loadfile "$@"
