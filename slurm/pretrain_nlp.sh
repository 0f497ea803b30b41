#!/bin/bash
# Pretrain on text, preemptible and requeued: docs/cluster.md.
#
#   sbatch [SBATCH OPTIONS] slurm/pretrain_nlp.sh [CONFIG] [--set section.key=value ...] [--run-dir DIR]      from the checkout's root
#   slurm/pretrain_nlp.sh [--dry-run] [CONFIG] [--set ...] [--run-dir DIR] [-- SBATCH OPTIONS]               the same with slurm/site.sh applied
#
# --dry-run prints what would be submitted and has Slurm check it. Options given to sbatch win over the lines below.
#SBATCH --job-name=ebwm-nlp
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm/logs/%x-%j.out
set -euo pipefail
root=${EBWM_ROOT:-$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)}
if [ -z "${EBWM_ROOT:-}" ] && [ ! -f "$root/slurm/job.sh" ]; then     # sbatch runs a copy: the checkout is where it was called
    root=${SLURM_SUBMIT_DIR:-$root}
fi
if [ ! -f "$root/slurm/job.sh" ]; then
    echo "$root holds no slurm/job.sh: run sbatch in the checkout's root, or export EBWM_ROOT=/path/to/the/checkout" >&2
    exit 2
fi
# shellcheck source=slurm/job.sh
. "$root/slurm/job.sh"
ebwm_pretrain "$root" pretrain_nlp.sh configs/nlp/anchored.yaml "$@"
