#!/usr/bin/env bash
# What a GPU is asked first, in five calls of under ten minutes each (benchmarks/README.md says how long, and what for):
#
#     benchmarks/gpu_session.sh tests  OUT       the tests that need a GPU, and attention kernels side by side
#     benchmarks/gpu_session.sh mfu    OUT       2B: text, images, mixed; compiled and eager; 4 micro-batches and 1
#     benchmarks/gpu_session.sh memory OUT       2B: memory against its forecast; a run that is stopped and goes on
#     benchmarks/gpu_session.sh 7b     OUT       7B: text and images
#     benchmarks/gpu_session.sh peers  OUT       2B: this loop, the plain loop and TRL on the same mixed data
#
# Flags after OUT go to each measurement, so that all of it can be rehearsed: --size tiny --device cpu
# From the environment: QWEN2_VL_REFERENCE (config and tokenizer files of the official models), WHEELS (a folder of
# wheels that this machine lacks), GIT_COMMIT (where there is no git), LIMIT (seconds of a call), PYTHON, RUNNER (what
# starts a script in place of python) and UNREAL (any word: a GPU whose numbers mean nothing; no step is profiled there
# and no losses are compared).
# OUT/rows.jsonl grows by a line as each row is measured; a row that fails says why, and the next one goes on.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

call=${1:?one of tests, mfu, memory, 7b, peers}
out=${2:-benchmarks/results/gpu_session}
extra=("${@:3}")
limit=${LIMIT:-540}
python=${PYTHON:-python3}
runner=${RUNNER:-$python}
rows=$out/rows.jsonl
failed=0
mkdir -p "$out"
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1

if [ -n "${WHEELS:-}" ]; then
    site=$(mktemp -d)
    "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$site" "$WHEELS"/*.whl ||
        exit 1
    export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
fi

# run NAME SCRIPT [ARGUMENT ...]: a script with the time that is left. If it dies, a row says so and the session goes on.
run() {
    local name=$1 began=$SECONDS status=0
    shift
    if [ $((limit - SECONDS)) -lt 20 ]; then
        printf '{"row": "%s", "error": "not begun: no time was left"}\n' "$name" >>"$rows"
        return
    fi
    timeout $((limit - SECONDS)) "$runner" "$@" 2>>"$out/$call.errors" || status=$?
    if [ "$status" -ne 0 ]; then
        printf '{"row": "%s", "error": "exit code %d"}\n' "$name" "$status" >>"$rows"
        tail -n 15 "$out/$call.errors"
        failed=1
    fi
    echo "[$name: $((SECONDS - began)) s, $SECONDS s in all]"
}

# mfu NAME [FLAG ...]: some rows of benchmarks/mfu.py
mfu() {
    run "$1" benchmarks/mfu.py --rows "$rows" --seconds $((limit - SECONDS - 40)) "${@:2}" ${extra[@]+"${extra[@]}"}
}

tests_call() {
    local files
    mapfile -t files < <(grep -lE 'needs a GPU' tests/test_*.py)
    run "tests" -m pytest "${files[@]}" --gpu -v -p no:cacheprovider --junitxml "$out/tests.xml"
    "$python" benchmarks/rows.py "$rows" --tests "$out/tests.xml"
    run "attention" benchmarks/attention.py --out "$out/attention.json" ${extra[@]+--smoke}
}

mfu_call() {
    local kinds=(text images_448 images_896 mixed)
    local compiled=(--size 2b --compiled yes) eager=(--size 2b --compiled no)
    local profiled_compiled=(--profile "$out/profile_compiled.json") profiled_eager=(--profile "$out/profile_eager.json")
    if [ -n "${UNREAL:-}" ]; then
        profiled_compiled=()
        profiled_eager=()
    fi
    mfu "compiled" "${compiled[@]}" --cases "${kinds[@]/%/:4}" ${profiled_compiled[@]+"${profiled_compiled[@]}"}
    mfu "eager" "${eager[@]}" --cases "${kinds[@]/%/:4}" ${profiled_eager[@]+"${profiled_eager[@]}"}
    mfu "compiled, 1 micro-batch" "${compiled[@]}" --cases "${kinds[@]/%/:1}" text:1:32768 text:4:8192
    mfu "eager, 1 micro-batch" "${eager[@]}" --cases "${kinds[@]/%/:1}"
}

memory_call() {
    local loads=(load_4096_4096:1 load_20480_40960:1 load_4096_4096:2)
    local once=(--size 2b --fresh --warmup 2 --steps 2)
    mfu "memory" "${once[@]}" --cases "${loads[@]}"
    mfu "memory, checkpointing" "${once[@]}" --cases "${loads[@]}" --activation_checkpointing full
    run "real run" benchmarks/real_run.py --size 2b --rows "$rows" ${UNREAL:+--no_comparison} \
        ${extra[@]+"${extra[@]}"}
    mfu "memory, LoRA" "${once[@]}" --cases "${loads[@]}" --lora_rank 16
    mfu "memory, frozen tower" "${once[@]}" --cases "${loads[@]}" --freeze vision
    mfu "memory, QLoRA" "${once[@]}" --cases "${loads[@]}" --lora_rank 16 --quantize nf4
}

seven_call() {
    local once=(--size 7b --warmup 2 --steps 3)
    mfu "7B LoRA" "${once[@]}" --compiled yes --cases text:2:8192 images_448:2:8192 --lora_rank 16
    mfu "7B in full, 8 bits" "${once[@]}" --compiled yes --cases text:2:16384 images_448:2:16384 \
        --optimizer adamw_8bit --activation_checkpointing full
    mfu "7B in full, flash" "${once[@]}" --compiled yes --cases text:2:8192 images_448:2:8192 --optimizer adamw_flash
    mfu "7B in full" "${once[@]}" --compiled yes --cases text:1:4096 images_448:1:4096 text:1:8192 \
        --activation_checkpointing full
    mfu "7B frozen tower" "${once[@]}" --compiled yes --cases images_448:2:8192 \
        --optimizer adamw_8bit --freeze vision
}

peers_call() {
    run "peers" benchmarks/peers.py --size 2b --data mixed --num_workers 8 --blocks 2 --warmup 2 --steps 4 \
        --out "$out/peers.json" ${extra[@]+"${extra[@]}"}
}

case $call in
    tests) tests_call ;;
    mfu) mfu_call ;;
    memory) memory_call ;;
    7b) seven_call ;;
    peers) peers_call ;;
    *) echo "$call: one of tests, mfu, memory, 7b, peers" >&2; exit 2 ;;
esac
exit $failed
