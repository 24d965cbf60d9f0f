#!/usr/bin/env bash
# What docs/scaling.md says of GPUs: tests on two of them, runs to compare, and figures. About ten minutes on two
# H200s, three of them for the tests.
#
#     bash benchmarks/scaling_two_gpus.sh DIRECTORY [tests] [ddp] [fsdp2] [quantizing] [alone] [stages] [figures]
#
# Leaves gpus.xml (the tests), scaling.json (the figures), scaling.md (the page with its tables) and scaling.log.
# Every part has a time limit of its own; what it found by then is written before the next one begins, and is added to
# what an earlier call left in the directory.
set -u
out=$(realpath -m "$1")
cd "$(dirname "$0")/.." || exit
steps=" ${*:2} "
[ "$steps" = "  " ] && steps=" tests ddp fsdp2 quantizing alone stages figures "
parts=$(mktemp -d)
mkdir -p "$out"
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
# More arguments, for a try without GPUs: SCALING_OPTIONS="--device cpu --shrink 32".
options=${SCALING_OPTIONS:-}

together() {  # seconds, configuration, results, work
    timeout "$1" python3 -m accelerate.commands.launch --config_file "examples/accelerate/$2.yaml" --num_processes 2 \
        benchmarks/scaling_checks.py "${@:4}" --results "$parts/$3.json" $options
}

step() {  # name, command
    [[ $steps == *" $1 "* ]] || return
    local start=$SECONDS
    "${@:2}"
    echo "== $1: exit code $?, $((SECONDS - start)) seconds"
    collect
}

collect() {
    [ -e "$out/scaling.md" ] || cp docs/scaling.md "$out/scaling.md"
    compgen -G "$parts/*.json" > /dev/null || return
    python3 benchmarks/scaling.py report --results "$out/scaling.json" --page "$out/scaling.md" --merge "$parts"/*.json
}

on() {  # GPU, seconds, script, results, arguments
    CUDA_VISIBLE_DEVICES=$1 timeout "$2" python3 "benchmarks/$3.py" --results "$parts/$4.json" "${@:5}" $options
}

alone() {
    on 0 90 scaling_checks alone "sharing out" &
    on 1 120 scaling_checks packed quantizing experts refining &
    wait
}

stages() {
    on 0 170 scaling_checks answers answers "answers, plain" &
    on 1 170 scaling_checks training training evaluating judging profile &
    wait
}

figures() {
    on 0 200 scaling layers measure --model 8B --model 70B &
    on 1 200 scaling largest measure --model 405B &
    wait
}

{
    step tests timeout --signal INT 240 python3 -m pytest tests/distributed tests/compat/test_models_and_wrappers.py -m gpu \
        --junit-xml "$out/gpus.xml"
    step ddp together 90 ddp ddp training "sharing out"
    step fsdp2 together 110 fsdp2 fsdp2 training
    step quantizing together 120 ddp quantizing quantizing experts refining
    step alone alone
    step stages stages
    step figures figures
} 2>&1 | tee -a "$out/scaling.log"
