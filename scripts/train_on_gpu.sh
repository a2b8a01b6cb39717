#!/usr/bin/env bash
# The embedded model trained further in ten minutes of one GPU: clips, then the base, then Self-Forcing from it.
#   OUT=folder scripts/train_on_gpu.sh
# Begins with weights/embedded; leaves base/ and dmd/ in $OUT, in half precision. Needs what requirements.txt names, 16
# cores for the clips, and no network.
set -euo pipefail
: "${OUT:?is empty, but must be a folder}" "${PYTHON:=python3}" "${CACHE:=training/cache}"
: "${CLIPS:=6000}" "${CAUSAL_BATCH:=256}" "${CAUSAL_MINUTES:=2}" "${WORKERS:=8}"
: "${DMD_BATCH:=256}" "${DMD_MINUTES:=5}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-2}" PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=true
by_the_clock=('run.schedule="minutes"' run.steps=1000000 run.checkpoint_every=1000000 run.sheet_every=0
    run.noise=device run.keep_gathered=true)
say() { echo "== $SECONDS s: $*"; }
keep() { # in half precision
    "$PYTHON" - "$CACHE/$1" "$OUT/$1" <<'PYTHON'
import sys
from pathlib import Path
from training.network import load_network
from training.settings import NetworkSettings

load_network(NetworkSettings(init=sys.argv[1])).half().save_pretrained(sys.argv[2])
Path(sys.argv[2], "settings.json").write_bytes(Path(sys.argv[1], "settings.json").read_bytes())
PYTHON
}

mkdir -p "$CACHE/text" "$OUT"
cp -r weights/embedded/{text_encoder,tokenizer} "$CACHE/text/"
cp -r weights/embedded/{vae,taehv} "$CACHE/"
[ -f "$CACHE/dataset.json" ] || "$PYTHON" -m training.data --out "$CACHE" --clips "$CLIPS" --pixel-clips 8 --pca weights/probe/pca.safetensors \
    --processes "$(nproc)"
say "clips rendered"

"$PYTHON" -m training causal training/configs/embedded_causal.toml 'network={init="weights/embedded"}' \
    "clips.folder=$CACHE" "text.folder=$CACHE/text" "run.out=$CACHE/base" run.compile=false \
    "run.workers=$WORKERS" "run.batch=$CAUSAL_BATCH" "run.minutes=$CAUSAL_MINUTES" \
    'curriculum=[[0.0, 0.05, 0.20, 0.75]]' "${by_the_clock[@]}"
keep base
say "base trained"

"$PYTHON" -m training dmd training/configs/embedded_dmd.toml 'network.init="weights/embedded"' \
    "score.teacher.init=$CACHE/base" "text.folder=$CACHE/text" "run.out=$CACHE/dmd" "run.batch=$DMD_BATCH" \
    "run.minutes=$DMD_MINUTES" rollout.long_blocks='[4, 13]' critic_warmup=20 optimizer.rate=2e-4 "${by_the_clock[@]}"
keep dmd
say "Self-Forcing done"
