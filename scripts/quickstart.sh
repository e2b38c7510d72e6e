#!/usr/bin/env bash
# From nothing to a trained model in minutes, without any download of data: makes .venv, installs, trains
# TopFormer-T on the built-in synthetic shapes, scores it and writes images into runs/topformer_t_shapes.
#   bash scripts/quickstart.sh [--config.KEY=VALUE ...]
# PYTHON names the interpreter (3.11 or newer), VENV the environment's folder.
set -euo pipefail
cd "$(dirname "$0")/.."

source scripts/_venv.sh
install_into_venv .

exec python -m topformer_jax.train --config configs/topformer_t_shapes.py "$@"
