#!/usr/bin/env bash
# Fine-tune on all GPUs of this machine, on some, or on several machines; on 2 CPU processes where there is no GPU.
#
#   ./finetune_distributed.sh                                      all GPUs, Qwen2-VL-2B on train_data/
#   NPROC_PER_NODE=4 ./finetune_distributed.sh --data my_data/data.json --sharding gradients
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 ./finetune_distributed.sh --data my_data/data.json --shard_group_size 8
#   MAX_RESTARTS=3 ./finetune_distributed.sh --save_every 100 --resume auto --output_dir train_output/my_run
set -euo pipefail
cd "$(dirname "$0")"
source util/setup.sh requirements.txt

gpus="$(nvidia-smi -L 2>/dev/null | grep -c GPU || true)"
usable="$("$python" -c 'import torch; print(torch.cuda.device_count())')"
if [ "$gpus" -gt 0 ] && [ "$usable" -eq 0 ] && [ -z "${CUDA_VISIBLE_DEVICES-unset}" ]; then
    gpus=0 # they were hidden on purpose
fi
[ "$gpus" -eq 0 ] || [ "$usable" -gt 0 ] || stop \
    "nvidia-smi sees $gpus GPU(s), but torch cannot use them: update the driver, or install a torch built for it (pytorch.org)."
if [ "$usable" -eq 0 ]; then
    echo "No GPU here: 2 processes on the CPU."
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
    usable=2
fi

command=("$python" -m torch.distributed.run
    --nproc_per_node "${NPROC_PER_NODE:-$usable}" --nnodes "${NNODES:-1}" --node_rank "${NODE_RANK:-0}"
    --master_addr "${MASTER_ADDR:-127.0.0.1}" --master_port "${MASTER_PORT:-29500}" --max_restarts "${MAX_RESTARTS:-0}"
    finetune_distributed.py "$@")
echo "\$ ${command[*]}"
exec "${command[@]}"
