#!/usr/bin/env bash
# Fine-tune on one GPU, or on the CPU where there is none.
#
#   ./finetune.sh                                     a GPU: Qwen2-VL-2B on train_data/; none: the demonstration, which
#                                                     goes on where it was stopped
#   ./finetune.sh --model tiny-qwen3-vl               no GPU: the demonstration of another family; or tiny-qwen2.5-vl
#   ./finetune.sh --data my_data/data.json            your own data (python finetune.py --help lists all flags)
#   ./finetune.sh --data my_data/data.json --freeze vision --activation_checkpointing full
#   CUDA_VISIBLE_DEVICES=1 ./finetune.sh              another GPU
set -euo pipefail
export STARTED_IN="$PWD" # for the command that goes on with a run, if it is stopped
cd "$(dirname "$0")"

source util/help.sh finetune.py "$@"
source util/setup.sh requirements.txt
source util/gpu.sh

run() {
    echo "\$ $*"
    "$@"
}

# Which tiny model the demonstration trains, and how its runs are named.
tiny=tiny demonstration=demonstration
case "$*" in
"--model tiny-qwen2.5-vl" | "--model tiny-qwen3-vl") tiny="$2" demonstration="demonstration_of_$2" ;;
esac

# The newest demonstration, if it was saved before its end. No other run has such a name.
interrupted() {
    local newest
    newest="$(ls -d "train_output/$demonstration"_20* 2>/dev/null | tail -n 1 || true)"
    if [ -n "$newest" ] && [ ! -e "$newest/config.json" ] && [ -n "$(ls "$newest"/checkpoints/step_*/state.json 2>/dev/null)" ]; then
        echo "$newest"
    fi
}

tool="$(tool_that_sees_a_gpu)"
if [[ " $* " != *" --device cpu "* ]] && [ -n "$tool" ]; then
    stop_unless_torch_sees_it "$tool" "To train on the CPU all the same: ./finetune.sh --device cpu --model tiny"
elif [ $# -eq 0 ] || [ "$tiny" != tiny ]; then
    echo "No GPU here that torch can train on: running the demonstration. A small Qwen-VL with random weights learns to see, in minutes on 2 cores."
    run "$python" train_data/make_data.py --demonstration
    stopped="$(interrupted)"
    if [ -n "$stopped" ]; then
        echo "Going on with the demonstration that was stopped (to begin another one, remove $stopped)."
        run "$python" finetune.py --resume "$stopped"
    else
        run "$python" finetune.py --model "$tiny" --data train_data/demonstration/data.jsonl --min_pixels 3136 \
            --epochs 6 --max_steps 600 --global_batch_size 32 --learning_rate 2e-3 \
            --output_dir "train_output/${demonstration}_$(date +%Y-%m-%d_%H-%M-%S)"
    fi
    run "$python" test_on_trained_model.py --data test_data/demonstration/data.jsonl --max_new_tokens 16 --at_least 0.9
    pictures=(test_data/demonstration/media/*_colour_*.png)
    echo "ask it yourself: $python test_on_trained_model.py --image ${pictures[0]} --question 'Where is the shape?'"
    exit
fi
if [ $# -gt 0 ]; then
    echo "\$ $python finetune.py $*"
    exec "$python" finetune.py "$@" # so that a signal to this script is one to the run
fi
run "$python" finetune.py
run "$python" test_on_trained_model.py
