#!/usr/bin/env bash
# A SLURM job array: one block per task, on any free node. Two minutes before its time limit, a task saves a checkpoint
# and is queued again.
#   sbatch --array=0-9 launch/slurm_blocks.sh recipes/t4_wikitext103.yaml [--push_to_hub true --hub_model_id user/name]
# Run phase 1 before it: scripts/pretrain_embeddings.py with the same arguments.
#SBATCH --job-name=noprop-block
#SBATCH --gres=gpu:1
#SBATCH --cpus-per-task=4
#SBATCH --mem=16G
#SBATCH --time=08:00:00
#SBATCH --requeue
#SBATCH --signal=B:TERM@120
#SBATCH --output=runs/slurm-%A-block-%a.log
set -euo pipefail
export GOMP_SPINCOUNT=${GOMP_SPINCOUNT:-4000}

is_stopped=false
trap 'is_stopped=true; kill -TERM "$!"' TERM # the signal may come before `step` is set
srun accelerate launch --config_file launch/t4_fp16.yaml \
  scripts/train_blocks.py "$@" --blocks "$SLURM_ARRAY_TASK_ID" &
step=$!
status=0
wait "$step" || status=$?
if $is_stopped; then
  wait "$step" || true # the signal has interrupted the first wait
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
