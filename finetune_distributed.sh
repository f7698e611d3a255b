#!/usr/bin/env bash
# Fine-tune on all GPUs of this machine, on some, or on several machines; on 2 CPU processes where there is no GPU.
#
#   ./finetune_distributed.sh                                      all GPUs, Qwen2-VL-2B on train_data/
#   NPROC_PER_NODE=4 ./finetune_distributed.sh --data my_data/data.json --sharding gradients
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 ./finetune_distributed.sh --data my_data/data.json --shard_group_size 8
#   MAX_RESTARTS=3 ./finetune_distributed.sh --save_every 100    a process that dies: all start again at the newest checkpoint
#   COLLECTIVE_TIMEOUT=600 ./finetune_distributed.sh              a job without progress for 600 s ends (default: 1800)
set -euo pipefail
export STARTED_IN="$PWD" # for the command that goes on with a run, if it is stopped
cd "$(dirname "$0")"

source util/help.sh finetune_distributed.py "$@"
source util/setup.sh requirements.txt
source util/gpu.sh

usable="$("$python" -c 'import torch; print(torch.cuda.device_count())')"
tool="$(tool_that_sees_a_gpu)"
if [ -z "${CUDA_VISIBLE_DEVICES-unset}" ] || [ -z "${HIP_VISIBLE_DEVICES-unset}" ]; then
    tool="" # the GPUs were hidden on purpose
fi
if [ -n "$tool" ] && [ "$usable" -eq 0 ]; then
    stop_unless_torch_sees_it "$tool" "To run on the CPU all the same: CUDA_VISIBLE_DEVICES= ./finetune_distributed.sh"
fi
if [ "$usable" -eq 0 ]; then
    echo "No GPU here: 2 processes on the CPU."
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
    usable=2
fi

command=("$python" -m util.parallel.launch --nproc_per_node "${NPROC_PER_NODE:-$usable}" --max_restarts "${MAX_RESTARTS:-0}")
if [ "${NNODES:-1}" -gt 1 ]; then # the machines find each other at MASTER_ADDR, and after a fault again
    address="${MASTER_ADDR:?with NNODES=$NNODES, MASTER_ADDR must name the first machine}:${MASTER_PORT:-29500}"
    host="$([ "${NODE_RANK:?with NNODES=$NNODES, NODE_RANK must number this machine from 0}" -eq 0 ] && echo 1 || echo 0)"
    command+=(--nnodes "$NNODES" --rdzv_backend c10d --rdzv_endpoint "$address" --rdzv_id "$address" --rdzv_conf "is_host=$host")
fi
command+=(finetune_distributed.py "$@")
echo "\$ ${command[*]}"
exec "${command[@]}"
