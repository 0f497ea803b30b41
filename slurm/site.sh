# shellcheck shell=bash
# What differs between clusters, all of it. Keep a copy elsewhere and export EBWM_SITE=/path/to/it, or edit this one.
# Read where a job is submitted (by slurm/pretrain_*.sh without sbatch, by python -m ebwm_scale.launch, and by `. slurm/site.sh` in your
# shell before a plain sbatch) and again inside the job. Secrets do not belong here: WANDB_API_KEY comes from your environment or ~/.netrc.

# 1. Where jobs go. sbatch reads these variables; they win over #SBATCH lines, options on its command line win over them.
# export SBATCH_PARTITION=gpu
# export SBATCH_ACCOUNT=my_project
# export SBATCH_QOS=normal
# export SBATCH_TIMELIMIT=24:00:00

# 2. The environment of a job, before Python starts. It runs in the checkout's root, on the job's first node; srun hands it on.
ebwm_environment() {
    # module purge
    # module load cuda/12.8
    if [ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ] && [ -f .venv/bin/activate ]; then     # what `make` made, unless another one is active
        # shellcheck disable=SC1091
        . .venv/bin/activate
    fi
}

# 3. The network. NCCL finds InfiniBand by itself; these are for when `srun python -m ebwm_scale.doctor` says that it did not.
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}                   # INFO: prints which network and which rings it uses
# export NCCL_SOCKET_IFNAME=^lo,docker0                 # the interface to meet on; also GLOO_SOCKET_IFNAME (one name) for jobs on CPUs
# export NCCL_IB_HCA=mlx5                               # InfiniBand adapters to use, by prefix
# export NCCL_NET_GDR_LEVEL=PHB                         # GPUs and adapters under one host bridge exchange data directly

# 4. Threads. Those that wait spin for a moment and then sleep; by default they spin for long, which costs jobs that share a machine several times their time.
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive}
if [ "$OMP_WAIT_POLICY" = passive ]; then export GOMP_SPINCOUNT=${GOMP_SPINCOUNT:-1000}; fi
