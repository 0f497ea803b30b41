#!/usr/bin/env bash
# What needs a GPU, part by part: correctness of the kernels, their timings, the search for tiles, a training step. Results under $OUT.
#     OUT=/tmp/out bash tools/gpu_session.sh tests bench        parts: tests bench tune step; default: all, about 12 minutes on an H100
# Needs PyTorch with CUDA, Triton and pytest. First the tests: a timing of wrong numbers is worth nothing.
set -u
cd "$(dirname "$0")/.."
OUT="${OUT:-results}"
mkdir -p "$OUT"
link="$(mktemp -d)"                     # ebwm_kernels is the folder kernels/: importable without an installation
ln -s "$PWD/kernels" "$link/ebwm_kernels"
trap 'rm -r "$link"' EXIT
export PYTHONPATH="$PWD:$link:${PYTHONPATH:-}"
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader || exit 1
status=0
for part in "${@:-tests}" $([ $# -eq 0 ] && echo bench tune step); do
    echo "== $part"
    case "$part" in
        tests) timeout 400 python3 -m pytest -q tests/kernels/test_attention_gpu.py 2>&1 | tee "$OUT/gpu_tests.log"; [ "${PIPESTATUS[0]}" = 0 ] || status=1 ;;
        bench) timeout 300 python3 tools/bench_kernels.py --output "$OUT/bench_kernels.json" || status=1 ;;
        tune) timeout 400 python3 tools/bench_kernels.py --tune --sizes 4096 --repeats 10 2>"$OUT/tune.err" | tee "$OUT/tune.jsonl" ;;
        step) for precision in bf16 fp32; do
                  timeout 60 python3 tools/bench_step.py --precision $precision --size small --sequence 1024 --vocabulary 50277 --batch 8 --steps 5 \
                      --compare baseline | tee -a "$OUT/bench_step_gpu.jsonl"; done ;;
        *) echo "unknown part $part; allowed: tests bench tune step" >&2; exit 2 ;;
    esac
done
exit $status
