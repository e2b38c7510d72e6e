#!/usr/bin/env bash
# Trains under SLURM, one process per GPU. At the time limit and on a preemption the run saves, ends and is queued again,
# to go on from there; after scancel it saves within the 30 s that SLURM grants (KillWait) and ends. JAX gives each
# process the GPU of its number on the node: for nodes with other numbers of GPUs, change both lines with 8.
#   sbatch --nodes 2 scripts/slurm.sh --config configs/topformer_b_ade.py --workdir /shared/b_ade
#SBATCH --job-name=topformer
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=4
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=TERM@120
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"
source "${VENV:-.venv}/bin/activate"
trap : TERM # a preemption may send it to this shell too, which then still has to queue the job
status=0
srun --kill-on-bad-exit=1 python -m topformer_jax.train "$@" || status=$?
# 143: SIGTERM ended it. SLURM requeues only what it kills itself, not a job that ends in the time it was given. After
# scancel the job is COMPLETING or CANCELLED.
if [ $status -eq 143 ] && scontrol show job "$SLURM_JOB_ID" | grep -q 'JobState=RUNNING'; then
    scontrol requeue "$SLURM_JOB_ID" || echo "error: job $SLURM_JOB_ID could not be queued again: run sbatch again" >&2
fi
exit $status
