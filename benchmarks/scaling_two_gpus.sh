#!/usr/bin/env bash
# What docs/scaling.md says of GPUs: tests on two of them, runs to compare, and figures. About five minutes on two H100s.
#
#     bash benchmarks/scaling_two_gpus.sh DIRECTORY [tests] [ddp] [fsdp2] [figures]
#
# Leaves gpus.xml (the tests), scaling.json (the figures), scaling.md (the page with its tables) and scaling.log.
# Every part has a time limit of its own; what it found by then is written before the next one begins, and is added to
# what an earlier call left in the directory.
set -u
out=$(realpath -m "$1")
cd "$(dirname "$0")/.." || exit
steps=" ${*:2} "
[ "$steps" = "  " ] && steps=" tests ddp fsdp2 figures "
parts=$(mktemp -d)
mkdir -p "$out"
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
# More arguments, for a try without GPUs: SCALING_OPTIONS="--device cpu --shrink 32".
options=${SCALING_OPTIONS:-}

scaling() {  # seconds, command, results, options
    timeout "$1" python3 benchmarks/scaling.py "$2" --results "$parts/$3.json" "${@:4}" $options
}

check() {  # configuration
    timeout 100 python3 -m accelerate.commands.launch --config_file "examples/accelerate/$1.yaml" --num_processes 2 \
        benchmarks/scaling.py check --results "$parts/$1.json" $options
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

figures() {
    (export CUDA_VISIBLE_DEVICES=0; scaling 110 measure layers --model 8B --model 70B) &
    (export CUDA_VISIBLE_DEVICES=1; scaling 70 check alone; scaling 70 measure largest --model 405B) &
    wait
}

{
    step tests timeout 220 python3 -m pytest tests/distributed tests/compat/test_models_and_wrappers.py -m gpu \
        --junit-xml "$out/gpus.xml"
    step ddp check ddp
    step fsdp2 check fsdp2
    step figures figures
} 2>&1 | tee -a "$out/scaling.log"
