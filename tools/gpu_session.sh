#!/usr/bin/env bash
# Everything about the kernels that needs a GPU, in one go: correctness, timings, tiles, a training step. Results under $OUT (default: results).
#     OUT=/tmp/out bash tools/gpu_session.sh
# Needs PyTorch with CUDA and Triton; DeepSpeed only where a training step is timed through it. About 10 minutes on an H100.
set -u
cd "$(dirname "$0")/.."
OUT="${OUT:-results}"
export PYTHONPATH="$PWD:${PYTHONPATH:-}"
mkdir -p "$OUT"
# ebwm_kernels is the folder kernels/: without an installation a link makes it importable
python3 -c "import ebwm_kernels" 2>/dev/null || { mkdir -p /tmp/ebwm_link && ln -sfn "$PWD/kernels" /tmp/ebwm_link/ebwm_kernels && export PYTHONPATH="/tmp/ebwm_link:$PYTHONPATH"; }
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
timeout 180 python3 -m pytest -q tests/kernels/test_attention_gpu.py 2>&1 | tee "$OUT/gpu_tests.log"
timeout 200 python3 tools/bench_kernels.py --output "$OUT/bench_kernels.json" 2>&1 | tail -40
timeout 150 python3 tools/bench_kernels.py --tune --sizes 4096 2>"$OUT/tune.err" | tee "$OUT/tune.jsonl"
timeout 60 python3 tools/bench_step.py --precision bf16 --size small --sequence 1024 --batch 8 --steps 5 --compare baseline 2>&1 | tee "$OUT/bench_step_gpu.json"
