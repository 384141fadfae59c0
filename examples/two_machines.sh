#!/usr/bin/env bash
# Several machines, no cluster manager: run this on each of them, with the name of the first.
# Usage: bash examples/two_machines.sh FIRST_MACHINE [flags of train.py]
# OUT and the data folder must be on a disk that all machines see. FIRST_MACHINE must stay alive; the other
# may die and run this again.
set -euo pipefail
FIRST=${1:?usage: bash examples/two_machines.sh FIRST_MACHINE [flags of train.py]}
shift
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 # else PyTorch waits for ever for a machine that comes back
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-110}" # seconds to save after Ctrl-C, not 30
# If the machines wait for each other for ever, name the network interface between them (`ip address` lists them):
# export GLOO_SOCKET_IFNAME=eth0 NCCL_SOCKET_IFNAME=eth0
exec torchrun --nnodes="${NODES:-2}" --nproc_per_node="${GPUS:-1}" --max_restarts=3 \
    --rdzv_backend=c10d --rdzv_id="${JOB:-nanogpt}" --rdzv_endpoint="$FIRST:29500" \
    train.py --out_dir "${OUT:-out}" "$@"
