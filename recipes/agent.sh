#!/usr/bin/env bash
# An agent that acts, from nothing to its success rate: a toy screen's own solver writes episodes, tiny learns from them,
# and presses the buttons of 200 screens that it has not seen, before and after. Minutes on 2 cores.
#
#   ./recipes/agent.sh                                  all of it; the last line is the share of goals reached
#   MODEL=tiny ./recipes/agent.sh                       another model to begin with (default: one that learns to see first)
#   EPISODES=20 ./recipes/agent.sh --max_steps 2        fewer episodes to try it on; flags go to the training
#   RUN=train_output/buttons_2 ./recipes/agent.sh       another run directory (DATA, OUTPUT: other folders)
set -euo pipefail
cd "$(dirname "$0")/.."
source util/setup.sh requirements.txt

step() {
    echo
    echo "\$ $*"
    "$@"
}

model="${MODEL:-train_output/demonstration}" data="${DATA:-train_data/buttons}" run="${RUN:-train_output/buttons}"
output="${OUTPUT:-test_output/buttons_$(date +%Y-%m-%d_%H-%M-%S)}"
if [ "$model" = train_output/demonstration ] && [ ! -f "$model/config.json" ]; then
    echo "First a tiny model learns to see, from random weights, with the demonstration of ./finetune.sh."
    step "$python" train_data/make_data.py --demonstration
    step "$python" finetune.py --model tiny --data train_data/demonstration/data.jsonl --min_pixels 3136 --epochs 9 \
        --max_steps 600 --global_batch_size 32 --learning_rate 2e-3 --save_every 200 --output_dir "$model" --resume auto
fi
act=(--environment recipes/buttons.py --episodes "${EPISODES:-200}" --max_steps 8 --max_new_tokens 96 --batch_size 64)

step "$python" recipes/buttons.py "$data" --looks "${LOOKS:-8000}" --episodes "${SOLVED:-2000}"
step "$python" -m util agent "$model" "${act[@]}" --output_dir "$output/before"
if [ -f "$run/config.json" ]; then
    echo
    echo "$run holds a finished run, which is used; RUN=... names another folder to train into"
else
    step "$python" finetune.py --model "$model" --data "$data/looks.jsonl" "$data/episodes.jsonl" --epochs 9 \
        --max_steps 400 --global_batch_size 32 --learning_rate 2e-3 --output_dir "$run" --save_every 100 --resume auto "$@"
fi
step "$python" -m util agent "$run" "${act[@]}" --output_dir "$output/after" --at_least "${AT_LEAST:-0.8}"
