#!/usr/bin/env bash
# Everything that a GPU has still to show, in order of worth, in less than eight minutes on an H100:
#
#     bash benchmarks/gpu.sh OUT
#
# OUT gets summary.txt, a line for each step: ok, FAILED or TOO LONG with the last line of its log, or SKIPPED if less
# time is left than it needs; and gpu.tgz, with all records and logs so far, packed again after each step.
#
# BUDGET=470 is the number of seconds for all steps, PYTHON=python3 runs them, COMMIT=... names this code without git,
# and ONLY="gelu autotune" runs these steps alone.
# It needs no network, and pytest beside requirements.txt (without wandb); the steps that decode images fail without
# diffusers, those of the metrics without protobuf. Without a GPU all steps run on the CPU in small sizes, which tries
# the script.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=$(mkdir -p "${1:?usage: bash benchmarks/gpu.sh OUT}" && realpath "$1")
PYTHON=${PYTHON:-python3} BUDGET=${BUDGET:-470} SECONDS=0
WORK=$(mktemp -d) && trap 'rm -rf "$WORK"' EXIT
RECORDS=$WORK/records LOGS=$WORK/logs PLANS=$WORK/plans
mkdir "$RECORDS" "$LOGS" "$PLANS"
export HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1 PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
export TORCHINDUCTOR_CACHE_DIR=$WORK/inductor OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}

say() { echo "$*" | tee -a "$OUT/summary.txt"; }

step() { # NAME SECONDS COMMAND...: run the command if SECONDS are left, for at most twice as long
    local name=$1 needs=$2 left=$((BUDGET - SECONDS)) since=$SECONDS code limit last
    shift 2
    case " plans ${ONLY:-$name} " in *" $name "*) ;; *) return ;; esac
    case " ${ONLY_GPU:-} " in *" $name "*) say "$name: SKIPPED, needs a GPU"; return ;; esac
    if [ "$left" -lt "$needs" ]; then say "$name: SKIPPED, needs $needs s and $left are left"; return; fi
    limit=$((PATIENCE * needs < left ? PATIENCE * needs : left))
    timeout -k 5 $limit bash -c '"$@"' - "$@" > "$LOGS/$name.log" 2>&1 < /dev/null
    code=$?
    last=$(tail -n 1 "$LOGS/$name.log")
    case $code in
        0) say "$name: ok, $((SECONDS - since)) s: $last" ;;
        124 | 137) say "$name: TOO LONG, stopped after $((SECONDS - since)) s: $last" ;;
        *) say "$name: FAILED with code $code after $((SECONDS - since)) s: $last" ;;
    esac
    tar -czf "$WORK/$name.tgz" -C "$WORK" records logs
    mv "$WORK/$name.tgz" "$OUT/gpu.tgz"
}

together() { wait && say "-- $((BUDGET - SECONDS)) s left"; } # steps that ran side by side have ended

: > "$OUT/summary.txt"
say "$($PYTHON - << 'P'
import importlib.metadata, platform, re, torch

print(torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU: small sizes on the CPU")
versions = [f"Python {platform.python_version()}"]
for name in [*re.findall(r"^\w+", open("requirements.txt").read(), re.M), "pytest"]:
    try:
        versions.append(f"{name} {importlib.metadata.version(name)}")
    except ImportError:
        versions.append(f"NO {name}")
print(*versions, sep=", ")
P
)"
if $PYTHON -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then
    LARGE="--model DiT-XL/2 --images 8" DEPTH=28 ROUNDS=3 FAST="--compile --cuda-graphs" TRAINED=DiT-B/2 IMAGES=400
    MODES="eager compile graphs compile+graphs" TWO_MODES="eager compile+graphs" BEST=compile+graphs DTYPES="tf32 bf16"
    PRECISION=200 PATIENCE=2
else
    LARGE="--ckpt ckpt/fashion_mnist --images 1" DEPTH=12 ROUNDS=1 FAST="" TRAINED=DiT-S/8 IMAGES=16
    MODES="eager compile" TWO_MODES=eager BEST=compile DTYPES="fp32 bf16"
    PRECISION=10 PATIENCE=8 ONLY_GPU=gelu
fi
FASHION="--ckpt ckpt/fashion_mnist --num-sampling-steps 20 --ddim-sample --accelerate-method dynamiclayer"
FASHION="$FASHION --path ckpt/fashion_mnist/DDIM20_router.pt --num-fid-samples $IMAGES --balanced-labels"
LATENCY="$PYTHON -m benchmarks.latency $LARGE --repeats $ROUNDS"
CHECKS="$PYTHON -m benchmarks.gpu_checks"

deterministic() { # the same images in batches of two sizes, and again
    local batch set
    for batch in 5 8 8; do
        set=$(mktemp -d -p "$WORK")
        $PYTHON sample_ddp.py $FASHION --deterministic --per-proc-batch-size $batch --sample-dir "$set" || return
        rm -r "$set"
    done > "$WORK/sets.txt"
    grep -o "arr_0 [0-9a-f]*" "$WORK/sets.txt"
    [ "$(grep -o "arr_0 [0-9a-f]*" "$WORK/sets.txt" | uniq | wc -l)" = 1 ]
}

whole() { # a set of images made in the fastest way, and its FID
    $PYTHON sample_ddp.py $FASHION --dtype bf16 $FAST --sample-dir "$WORK/set" \
        --record "$RECORDS/sample-ddp-fashion-gpu.json" &&
        $PYTHON evaluator.py ckpt/fashion_mnist/reference.npz "$WORK"/set/*.npz \
            --graph ckpt/fashion_mnist/classifier.pb --json "$RECORDS/evaluator-fashion-gpu.json"
}
export -f deterministic whole
export PYTHON FASHION FAST WORK RECORDS

# Is it right? Side by side, because nothing here is a timing that counts.
step plans 20 $CHECKS --make-plans "$PLANS" --depth $DEPTH
step agreement 100 $CHECKS agreement --record "$RECORDS/gpu-agreement.json" &
step tests 90 $PYTHON -m pytest -q -p no:cacheprovider -m gpu tests/test_sampling.py tests/test_train_router.py \
    tests/evaluation/test_writer.py tests/evaluation/test_metrics.py &
step deterministic 70 deterministic &
step whole 80 whole &
step metrics 60 $CHECKS metrics --record "$RECORDS/gpu-metrics.json" &
together

# How fast is it? Alone on the GPU.
step latency-20 130 $LATENCY --plans "$PLANS/router20.json" "$PLANS/every3-20.json" --dtypes $DTYPES --modes $MODES \
    --reference --record "$RECORDS/latency-xl2-20-gpu.json"
step latency-50 70 $LATENCY --plans "$PLANS/router50.json" "$PLANS/every3-50.json" --dtypes $DTYPES --modes $TWO_MODES \
    --num-sampling-steps 50 --reference --record "$RECORDS/latency-xl2-50-gpu.json"
step profile 30 $LATENCY --plans "$PLANS/router20.json" --dtypes bf16 --profile
step speed 30 $CHECKS speed --record "$RECORDS/gpu-speed.json"
for name in gelu fp8; do
    step $name 50 $LATENCY --dtypes bf16 --modes $BEST --experimental $name \
        --record "$RECORDS/latency-xl2-$name-gpu.json"
done
step train 60 $PYTHON -m benchmarks.train_step --model $TRAINED --repeats $ROUNDS --record "$RECORDS/train-b2-gpu.json"
step vae 40 $CHECKS vae --record "$RECORDS/gpu-vae.json"
step precision 60 $PYTHON -m benchmarks.precision --images $PRECISION --record "$RECORDS/precision-fashion-gpu.json"
step autotune 90 $LATENCY --dtypes bf16 --modes $BEST --experimental autotune \
    --record "$RECORDS/latency-xl2-autotune-gpu.json"

# The speeds of the metrics again, alone, and what else fits.
step metrics-alone 40 $CHECKS metrics --record "$RECORDS/gpu-metrics.json"
step latency-one 60 $PYTHON -m benchmarks.latency --ckpt ckpt/fashion_mnist --path ckpt/fashion_mnist/DDIM20_router.pt \
    --dtypes $DTYPES --modes $MODES --repeats $ROUNDS --reference --record "$RECORDS/latency-fashion-gpu.json"

say "$($CHECKS --targets "$RECORDS")"
say "$SECONDS s of $BUDGET"
