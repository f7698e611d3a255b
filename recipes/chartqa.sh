#!/usr/bin/env bash
# ChartQA from the data to the score: prepares it, asks the base model with and without the recipe's system message,
# trains, asks the tuned model, and compares the three. Started again, it goes on where it was.
#
#   ./recipes/chartqa.sh                                a GPU: the hub's ChartQA, QLoRA of Qwen2-VL-7B; no GPU: drawn charts, tiny
#   FROM="my/ChartQA Dataset" ./recipes/chartqa.sh      a local copy in the published layout (drawn: charts drawn on the spot)
#   SHARE=0.1 ./recipes/chartqa.sh                      a tenth of the training data (TEST_SHARE: of the test data)
#   MODEL=Qwen/Qwen2-VL-2B-Instruct ./recipes/chartqa.sh --micro_batch_size 8     flags go to the training, after the recipe's
#   NPROC_PER_NODE=4 ./recipes/chartqa.sh               through torchrun; so it is on several GPUs without being asked
#   RUN=train_output/chartqa_2 ./recipes/chartqa.sh     another run directory (OUTPUT: another folder for the answers)
set -euo pipefail
cd "$(dirname "$0")/.."
source util/setup.sh requirements-chartqa.txt
source util/gpu.sh

step() {
    echo
    echo "\$ $*"
    "$@"
}

tool="$(tool_that_sees_a_gpu)"
[ -z "$tool" ] || stop_unless_torch_sees_it "$tool"
gpus="$("$python" -c 'import torch; print(torch.cuda.device_count())')"
if [ "$gpus" -gt 0 ]; then
    from="${FROM:-hub}" model="${MODEL:-Qwen/Qwen2-VL-7B-Instruct}" budget=() # bash before 4.4 takes an empty one for unset
    recipe=(--quantize nf4 --lora_rank 8 --lora_alpha 16 --lora_dropout 0.05 --lora_targets q_proj v_proj
        --epochs 3 --global_batch_size 32 --micro_batch_size 4 --learning_rate 2e-4 --warmup_ratio 0.03
        --max_grad_norm 0.3 --activation_checkpointing full --eval_every 10 --eval_samples 64 --save_every 20)
else
    from="${FROM:-drawn}" model="${MODEL:-train_output/demonstration}" budget=(--min_pixels 3136)
    recipe=(--epochs 9 --max_steps 500 --global_batch_size 32 --learning_rate 1e-3 --eval_every 100 --eval_samples 100 --save_every 100)
    echo "No GPU here: charts drawn on the spot, and all of a tiny model is trained."
    if [ "$model" = train_output/demonstration ] && [ ! -f "$model/config.json" ]; then
        echo "First it learns to see, from random weights, with the demonstration of ./finetune.sh."
        step "$python" train_data/make_data.py --demonstration
        step "$python" finetune.py --model tiny --data train_data/demonstration/data.jsonl --min_pixels 3136 --epochs 9 \
            --max_steps 900 --global_batch_size 32 --learning_rate 2e-3 --save_every 200 --output_dir "$model" --resume auto
    fi
fi
[ "$from" = drawn ] && default_share=1 || default_share=0.1 # of val: it is asked many times
data="${DATA:-train_data/chartqa}" run="${RUN:-train_output/chartqa}" output="${OUTPUT:-test_output/chartqa}"
prepare=("$python" -m util chartqa --from "$from" --output_dir "$data" --seed "${SEED:-0}" --count "${COUNT:-4000}")
ask=(--model "$model" --metrics relaxed_accuracy --max_new_tokens 64 --show 5 ${budget[@]+"${budget[@]}"})

step "${prepare[@]}" --splits train --share "${SHARE:-1}"
step "${prepare[@]}" --splits val --share "${VAL_SHARE:-$default_share}"
step "${prepare[@]}" --splits test --share "${TEST_SHARE:-1}"
step "$python" test_on_official_model.py "${ask[@]}" --data "$data/test_plain.jsonl" --output_dir "$output/base"
step "$python" test_on_official_model.py "${ask[@]}" --data "$data/test.jsonl" --output_dir "$output"

train=(--model "$model" --data "$data/train.jsonl" --eval_data "$data/val.jsonl" --eval_metrics relaxed_accuracy
    ${budget[@]+"${budget[@]}"} "${recipe[@]}" --output_dir "$run" --resume auto "$@")
if [ -f "$run/config.json" ] || [ -f "$run/adapter_config.json" ]; then
    echo
    echo "$run holds a finished run, which is used; RUN=... names another folder to train into"
elif [ -n "${NPROC_PER_NODE:-}" ] || [ "$gpus" -gt 1 ]; then
    step ./finetune_distributed.sh "${train[@]}"
else
    step "$python" finetune.py "${train[@]}"
fi
step "$python" test_on_trained_model.py "$run" "${ask[@]}" --data "$data/test.jsonl" --output_dir "$output"
step "$python" -m util compare "base=$output/base/before.jsonl" "with system message=$output/before.jsonl" \
    "tuned=$output/after.jsonl" --out "$output/scores.json"
