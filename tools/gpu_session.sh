#!/usr/bin/env bash
# What needs a GPU, part by part: correctness of the kernels, their timings, a training step, the search for tiles. Results under $OUT, kept as they come.
#     OUT=/tmp/out bash tools/gpu_session.sh                    tests, bench, step: bounded by their time-outs to 9 minutes in all
#     OUT=/tmp/out bash tools/gpu_session.sh tune               5 minutes more
# Needs PyTorch with CUDA, Triton, pytest, pytest-xdist and PyYAML. First the tests: a timing of wrong numbers is worth nothing.
set -u
cd "$(dirname "$0")/.." || exit 1
OUT="${OUT:-results}"
mkdir -p "$OUT"
link="$(mktemp -d)"                     # ebwm_kernels is the folder kernels/: importable without an installation
ln -s "$PWD/kernels" "$link/ebwm_kernels"
trap 'rm -r "$link"' EXIT
export PYTHONPATH="$PWD:$link:${PYTHONPATH:-}" PYTHONUNBUFFERED=1
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader || exit 1
status=0
[ $# -gt 0 ] || set -- tests bench step

step() {        # one line per call; V 50277, bf16
    timeout 30 python3 tools/bench_step.py --vocabulary 50277 --precision bf16 --steps 5 "$@" | tee -a "$OUT/bench_step_gpu.jsonl"
    [ "${PIPESTATUS[0]}" = 0 ] || { echo "bench_step $*: failed or beyond 30 s" | tee -a "$OUT/failed.log"; status=1; }
}

for part in "$@"; do
    echo "== $part"
    case "$part" in
        tests) timeout 200 python3 -m pytest -q -n 8 tests/kernels/test_attention_gpu.py 2>&1 | tee "$OUT/gpu_tests.log"; [ "${PIPESTATUS[0]}" = 0 ] || status=1 ;;
        bench) timeout 150 python3 tools/bench_kernels.py --sizes 256 1024 4096 16384 --output "$OUT/bench_kernels.json" || status=1 ;;
        step) for size in small medium; do
                  step --size $size --sequence 1024 --batch 8 --compare baseline
                  step --size $size --sequence 1024 --batch 8 --set refinement.tile_rows=8192     # the whole batch's states at once
              done
              step --size small --sequence 256 --batch 32                                         # the released job's batch: peak - weights_and_optimizer
              step --size small --sequence 1024 --batch 8 --profile ;;
        tune) timeout 300 python3 tools/bench_kernels.py --tune --sizes 4096 --repeats 10 2>"$OUT/tune.err" | tee "$OUT/tune.jsonl" ;;
        *) echo "unknown part $part; allowed: tests bench step tune" >&2; exit 2 ;;
    esac
done
exit $status
