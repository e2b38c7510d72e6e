#!/usr/bin/env bash
# Trains under SLURM, one process per GPU; resumes by itself when the job is requeued. JAX gives each process the GPU
# of its number on the node: for nodes with other numbers of GPUs, change both lines with 8.
#   sbatch --nodes 2 scripts/slurm.sh --config configs/topformer_b_ade.py --workdir /shared/b_ade
#SBATCH --job-name=topformer
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=4
#SBATCH --requeue
#SBATCH --signal=TERM@120
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"
source "${VENV:-.venv}/bin/activate"
exec srun --kill-on-bad-exit=1 python -m topformer_jax.train "$@"
