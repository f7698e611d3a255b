#!/usr/bin/env bash
# An agent that acts, from nothing to its success rate: the solver of a toy screen writes training data; tiny learns from
# it where things are, then to act; and it presses the buttons of 200 screens that it has not seen, before and after.
#
#   ./recipes/agent.sh                                  all of it, in minutes on 2 cores; exits 1 below 80 % of goals reached
#   RUN=train_output/buttons_2 ./recipes/agent.sh       another run directory (DATA, OUTPUT: other folders)
#   EPISODES=20 ./recipes/agent.sh --max_steps 2        fewer episodes to try it on; flags go to both trainings
#   MODEL=Qwen/Qwen2-VL-2B-Instruct ./recipes/agent.sh --learning_rate 1e-5        another model (with a GPU)
set -euo pipefail
cd "$(dirname "$0")/.."
source util/setup.sh requirements.txt

step() {
    echo
    echo "\$ $*"
    "$@"
}

# Trains into a run directory; a finished run that is there already is used, one that was stopped goes on.
train() {
    local directory="$1"
    shift
    if [ -f "$directory/config.json" ]; then
        echo
        echo "$directory holds a finished run, which is used; RUN=... names another folder to train into"
    else
        step "$python" finetune.py --output_dir "$directory" --epochs 9 --learning_rate 2e-3 --save_every 200 --resume auto "$@"
    fi
}

model="${MODEL:-tiny}" data="${DATA:-train_data/buttons}" run="${RUN:-train_output/buttons}"
output="${OUTPUT:-test_output/buttons_$(date +%Y-%m-%d_%H-%M-%S)}"
act=(--environment recipes/buttons.py --episodes "${EPISODES:-200}" --max_steps 8 --max_new_tokens 96 --batch_size 50)

step "$python" recipes/buttons.py "$data" --looks "${LOOKS:-16000}" --episodes "${SOLVED:-4000}"
step "$python" -m util agent "$model" "${act[@]}" --output_dir "$output/before"
train "${run}_looks" --model "$model" --data "$data/looks.jsonl" --max_steps 600 --global_batch_size 32 "$@"
train "$run" --model "${run}_looks" --data "$data/looks.jsonl*0.5" "$data/episodes.jsonl" --max_steps 130 \
    --global_batch_size 24 "$@"
step "$python" -m util agent "$run" "${act[@]}" --output_dir "$output/after" --at_least "${AT_LEAST:-0.8}"
