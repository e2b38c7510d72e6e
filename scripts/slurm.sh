#!/usr/bin/env bash
# Trains under SLURM, one process a node; resumes by itself when the job is requeued.
#   sbatch --nodes 2 scripts/slurm.sh --config configs/topformer_b_ade.py --workdir /shared/b_ade
#SBATCH --job-name=topformer
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --requeue
#SBATCH --signal=TERM@60
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"
source "${VENV:-.venv}/bin/activate"
exec srun --kill-on-bad-exit=1 python -m topformer_jax.train "$@"
