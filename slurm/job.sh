# shellcheck shell=bash
# What the slurm/pretrain_*.sh share: outside a job they submit themselves, inside one they set up the environment and hand over to
# ebwm_scale/cluster/job.py, which starts one srun task per GPU, and requeues the job until the run is finished. Arguments stay
# arrays all the way; no text of the user's is ever read by a shell again.

ebwm_pretrain() {       # ROOT SCRIPT DEFAULT_CONFIG [arguments ...]
    local root=$1 script=$2 config=$3
    shift 3
    cd "$root" || exit 2
    # shellcheck source=slurm/site.sh
    . "${EBWM_SITE:-slurm/site.sh}"
    if [ -z "${SLURM_JOB_ID:-}" ]; then
        ebwm_submit "$script" "$config" "$@"
        return
    fi
    ebwm_environment
    if [ $# -gt 0 ] && [[ $1 != -* ]]; then
        config=$1
        shift
    fi
    exec python -u -m ebwm_scale.cluster.job --config "$config" "$@"
}

ebwm_submit() {         # SCRIPT DEFAULT_CONFIG [--dry-run] [arguments ...] [-- SBATCH OPTIONS]
    local script=$1 config=$2 dry_run=false argument
    shift 2
    local arguments=() options=()
    while [ $# -gt 0 ]; do
        argument=$1
        shift
        case $argument in
            --dry-run) dry_run=true ;;
            --) options=("$@"); break ;;
            *) arguments+=("$argument") ;;
        esac
    done
    if ! $dry_run; then
        exec sbatch "${options[@]}" "slurm/$script" "${arguments[@]}"
    fi
    echo "# slurm/site.sh sets:"
    env | grep -E '^(SBATCH|NCCL|GLOO)_' || echo "#   nothing"
    echo "# submitted would be (arguments quoted for reading; they travel as an array):"
    printf '%q ' sbatch "${options[@]}" "slurm/$script" "${arguments[@]}"
    printf '\n\n# slurm/%s\n' "$script"
    cat "slurm/$script"
    printf '\n# slurm/job.sh, which it reads\n'
    cat slurm/job.sh
    echo "# the configuration, and what each job step would run:"
    if [ ${#arguments[@]} -gt 0 ] && [[ ${arguments[0]} != -* ]]; then
        config=${arguments[0]}
        arguments=("${arguments[@]:1}")
    fi
    (ebwm_environment && python -m ebwm_scale.cluster.job --plan --config "$config" "${arguments[@]}")
    echo "# sbatch --test-only says:"
    sbatch --test-only "${options[@]}" "slurm/$script"
}
