#!/usr/bin/env bash
# Runs one command on every host of a TPU pod slice, in the project's folder there.
#   TPU=my-slice ZONE=us-west4-a bash scripts/tpu_pod.sh python -m topformer_jax.train \
#       --config configs/topformer_b_ade.py --config.data.root=/data/ade --workdir /shared/b_ade
# FOLDER is the clone on the hosts (default ~/topformer_jax, with its .venv). The hosts find each other by
# themselves; data and work directory must be where all of them can reach them.
set -euo pipefail
: "${TPU:?name the slice: TPU=NAME}" "${ZONE:?name its zone: ZONE=NAME}"
if [ $# -eq 0 ]; then
    echo "error: no command to run" >&2
    exit 2
fi
printf -v command '%q ' "$@"
exec gcloud compute tpus tpu-vm ssh "$TPU" --zone "$ZONE" --worker all \
    --command "cd ${FOLDER:-topformer_jax} && source .venv/bin/activate && $command"
