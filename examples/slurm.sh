#!/usr/bin/env bash
# A SLURM job on several machines. Submit from the root of the repository: sbatch examples/slurm.sh
# Preempted, it saves (SIGTERM comes 120 seconds early), is queued again under the same job number, and goes on
# where it was: the job number is the name by which it knows its own run.
#SBATCH --job-name=nanogpt
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=TERM@120
set -euo pipefail
FIRST=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
# Each task is torchrun itself, so that the signal reaches it, and through it every process.
exec srun torchrun --nnodes="$SLURM_JOB_NUM_NODES" --nproc_per_node=8 --max_restarts=3 \
    --rdzv_backend=c10d --rdzv_id="$SLURM_JOB_ID" --rdzv_endpoint="$FIRST:29500" \
    train.py --preset gpt2 --data_dir data --out_dir "out/$SLURM_JOB_ID"
