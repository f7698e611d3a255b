#!/usr/bin/env bash
# An agent that acts, from nothing to its success rate: the solver of a toy screen writes training data; a tiny model that
# has learned to see learns to act from it; and it presses the buttons of 200 screens that it has not seen, before and after.
#
#   ./recipes/agent.sh                                  all of it; exits 1 where it reaches less than 80 % of the goals
#   RUN=train_output/buttons_2 ./recipes/agent.sh       another run directory (DATA, OUTPUT: other folders)
#   EPISODES=20 ./recipes/agent.sh --max_steps 2        fewer episodes to try it on; flags go to the training
#   MODEL=Qwen/Qwen2-VL-2B-Instruct ./recipes/agent.sh --learning_rate 1e-5        another model (with a GPU)
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
act=(--environment recipes/buttons.py --episodes "${EPISODES:-200}" --max_steps 8 --max_new_tokens 80 --batch_size 50)

if [ "$model" = train_output/demonstration ] && [ ! -f "$model/config.json" ]; then
    echo "First a tiny model learns to see, from random weights, with the demonstration of ./finetune.sh."
    step "$python" train_data/make_data.py --demonstration
    step "$python" finetune.py --model tiny --data train_data/demonstration/data.jsonl --min_pixels 3136 --epochs 9 \
        --max_steps 600 --global_batch_size 32 --learning_rate 2e-3 --save_every 200 --output_dir "$model" --resume auto
fi
step "$python" recipes/buttons.py "$data" --episodes "${SOLVED:-3000}"
step "$python" -m util agent "$model" "${act[@]}" --output_dir "$output/before"
if [ -f "$run/config.json" ]; then
    echo
    echo "$run holds a finished run, which is used; RUN=... names another folder to train into"
else
    step "$python" finetune.py --model "$model" --data "$data/episodes.jsonl" --epochs 9 --max_steps 150 \
        --global_batch_size 16 --learning_rate 2e-3 --output_dir "$run" --save_every 50 --resume auto "$@"
fi
step "$python" -m util agent "$run" "${act[@]}" --output_dir "$output/after" --at_least "${AT_LEAST:-0.8}"
