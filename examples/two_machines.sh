#!/usr/bin/env bash
# Several machines, no cluster manager: run this on each of them, with the name of the first.
# Usage: bash examples/two_machines.sh FIRST_MACHINE [flags of train.py]
# OUT and the data folder must be on a disk that all machines see. FIRST_MACHINE must stay alive; the other
# may die and run this again.
set -euo pipefail
FIRST=${1:?usage: bash examples/two_machines.sh FIRST_MACHINE [flags of train.py]}
shift
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 # else PyTorch waits for ever for a machine that comes back
exec torchrun --nnodes="${NODES:-2}" --nproc_per_node="${GPUS:-1}" --max_restarts=3 \
    --rdzv_backend=c10d --rdzv_id="${JOB:-nanogpt}" --rdzv_endpoint="$FIRST:29500" \
    train.py --out_dir "${OUT:-out}" "$@"
