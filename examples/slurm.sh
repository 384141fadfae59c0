#!/usr/bin/env bash
# A SLURM job on several machines. Submit from the root of the repository: sbatch examples/slurm.sh
# At its time limit SIGTERM comes 120 seconds early (--signal); preempted, as early as the partition's GraceTime says.
# Every process finishes its step and saves. A preempted job is queued again under the same number, and goes on where
# it was: the job number is the name by which it knows its own run.
# SIGUSR1 (--signal=USR1@120), on which train.py saves and goes on, is for a single process: torchrun does not know it
# and dies of it. Then replace what follows "exec srun" by: python train.py --preset gpt2, with one GPU.
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
# torchrun kills its processes 30 seconds after SIGTERM unless told otherwise, which PyTorch 2.13 can be and 2.11
# cannot: with an older one a save has to end within 30 seconds.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=110
# Since Slurm 22.05 srun does not take over --cpus-per-task by itself: all processes would share one core.
export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"
# Each task is torchrun itself, so that the signal reaches it, and through it every process.
exec srun torchrun --nnodes="$SLURM_JOB_NUM_NODES" --nproc_per_node=8 --max_restarts=3 \
    --rdzv_backend=c10d --rdzv_id="$SLURM_JOB_ID" --rdzv_endpoint="$FIRST:29500" \
    train.py --preset gpt2 --data_dir data --out_dir "out/$SLURM_JOB_ID"
