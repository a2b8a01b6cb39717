#!/usr/bin/env bash
# The ablation of docs/ablation.md side by side on one GPU, beside scripts/train_on_gpu.sh or after it:
#   OUT=folder scripts/ablation_on_gpu.sh
# Needs the clips and, later, the base of train_on_gpu.sh, and a core for each run. Leaves ablation/ and ode/ in $OUT:
# with the first as runs/ablation and the second as training/cache/ode beside text/, vae/ and taehv/, `python -m training.ablation`
# with the same --clock, --prompts, --seeds and --set writes the report. Exits with 1 if a part failed.
set -euo pipefail
: "${OUT:?is empty, but must be a folder}" "${PYTHON:=python3}" "${CACHE:=training/cache}" "${RUNS:=runs/ablation}"
: "${SHORT_STEPS:=350}" "${SHORT_BATCH:=96}" "${PAIRS:=10}" "${PAIRS_BATCH:=96}" "${ODE_MINUTES:=0.4}" "${CLOCK:=2.5}" "${BATCH:=64}"
: "${PROMPTS:=8}" "${SEEDS:=0 1}" "${METHODS:=teacher diffusion ode dmd sid gan}" "${DEVICE:=cuda}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
: "${PATIENCE:=600}"
say() { echo "== $SECONDS s: $*"; }
wait_for() { # for what another program makes, but not for ever
    until [ -e "$1" ]; do
        [ "$SECONDS" -lt "$PATIENCE" ] || { echo "$1 did not come in $PATIENCE s"; exit 1; }
        sleep 1
    done
}

collect() { # also when time is over
    mkdir -p "$OUT/ablation" "$OUT/ode"
    cp -r "$RUNS"/*.json "$RUNS"/*.npz "$OUT/ablation/" || true
    for run in "$RUNS"/*-[0-9]*/; do
        [ -e "$run/settings.json" ] || continue
        mkdir -p "$OUT/ablation/$(basename "$run")"
        cp "$run"/settings.json "$run"/scores*.json "$OUT/ablation/$(basename "$run")/" || true
    done
    cp -r "$CACHE/ode/settings.json" "$CACHE/ode/transformer" "$OUT/ode/" || true
}
trap collect EXIT
trap 'kill $(jobs -p) 2>/dev/null; exit 143' TERM

mkdir -p "$OUT" "$RUNS"
wait_for "$CACHE/dataset.json"
"$PYTHON" -m training causal training/configs/embedded_causal.toml "clips.folder=$CACHE" "text.folder=$CACHE/text" \
    "run.out=$CACHE/short" "run.steps=$SHORT_STEPS" "run.batch=$SHORT_BATCH" run.compile=false run.sheet_every=0 \
    run.noise=device run.keep_gathered=true run.workers=4 run.checkpoint_every=1000000 run.minutes=2.5
say "short start trained"
wait_for "$CACHE/base/settings.json"
"$PYTHON" -m training ode_pairs training/configs/embedded_ode_pairs.toml "network.init=$CACHE/base" \
    "text.folder=$CACHE/text" "run.out=$CACHE/ode_pairs" "run.batch=$PAIRS_BATCH" "run.steps=$PAIRS" run.noise=device run.keep_gathered=true
say "trajectories made"
"$PYTHON" -m training ode training/configs/embedded_ode.toml "network.init=$CACHE/short" "pairs=$CACHE/ode_pairs" \
    "text.folder=$CACHE/text" "run.out=$CACHE/ode" "run.batch=$BATCH" run.noise=device run.keep_gathered=true 'run.schedule="minutes"' \
    "run.minutes=$ODE_MINUTES" run.steps=1000000 run.checkpoint_every=1000000
say "ODE start trained"

part() {
    "$PYTHON" -m training.ablation --part --clock "$CLOCK" --prompts "$PROMPTS" --processes 1 --device "$DEVICE" \
        --data "$CACHE" --start "$CACHE/short" --ode "$CACHE/ode" --pairs "$CACHE/ode_pairs" --teacher "$CACHE/base" \
        --out "$RUNS" --set "run.batch=$BATCH" run.noise=device run.keep_gathered=true "text.folder=$CACHE/text" "$@"
}
part --methods --seeds 0 >"$OUT/real.log" 2>&1 & # real clips, for all others
real=$!
until [ -e "$RUNS/template/model_index.json" ]; do
    kill -0 "$real" 2>/dev/null || { cat "$OUT/real.log"; exit 1; }
    sleep 1
done
parts=("$real")
for method in $METHODS; do
    for seed in $SEEDS; do
        run="$method-$seed"
        (
            part --methods "$method" --seeds "$seed" --sampling few >"$OUT/$run.log" 2>&1 &
            few=$!
            case $method in teacher | diffusion) # in many steps beside that in few: it takes much longer
                until [ -e "$RUNS/$run-steps.json" ] || ! kill -0 "$few" 2>/dev/null; do sleep 1; done
                [ ! -e "$RUNS/$run-steps.json" ] ||
                    part --methods "$method" --seeds "$seed" --sampling many >"$OUT/$run-many.log" 2>&1 ;;
            esac
            wait "$few"
        ) &
        parts+=($!)
    done
done
failed=0
for one in "${parts[@]}"; do wait "$one" || failed=1; done
[ "$failed" = 0 ] && say "trained and judged" || { say "a part failed: see $OUT/*.log"; exit 1; }
