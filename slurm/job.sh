# shellcheck shell=bash
# What the slurm/pretrain_*.sh share: outside a job they submit themselves, inside one they set up the environment and hand over to
# ebwm_scale/cluster/job.py, which starts one srun task per GPU, and requeues the job until the run is finished. Arguments stay
# arrays all the way; no text of the user's is ever read by a shell again.

ebwm_pretrain() {       # ROOT SCRIPT DEFAULT_CONFIG [arguments ...]
    local root=$1 script=$2 config=$3 by_hand=false
    shift 3
    if [ "$root/slurm/$script" -ef "$0" ]; then      # not the copy that sbatch hands to a job
        by_hand=true
    fi
    ebwm_refuse_control_characters "$root" "$@"
    cd "$root" || exit 2
    case ${EBWM_SITE:-/} in
        /*) ;;
        *) ebwm_refuse "EBWM_SITE is $(printf '%q' "$EBWM_SITE"): must be an absolute path, since it is read from more than one directory" ;;
    esac
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
    local arguments=()
    while [ $# -gt 0 ] && [ "$1" != -- ]; do
        arguments+=("$1")
        shift
    done
    if $by_hand; then
        echo "inside job $SLURM_JOB_ID: the training runs here, in the nodes of that job, and nothing is submitted"
        if [ $# -gt 1 ]; then
            echo "warning: not used, since they are for sbatch:$(shift; printf ' %q' "$@")"
        fi
        echo "to submit a job of its own from here: env -u SLURM_JOB_ID slurm/$script ..."
    elif [ $# -gt 1 ]; then
        shift
        ebwm_refuse "options after -- are for a start without sbatch; with it they come first: sbatch$(printf ' %q' "$@") slurm/$script ..."
    fi
    exec python -u -m ebwm_scale.cluster.job --config "$config" "${arguments[@]}"
}

ebwm_refuse() {         # MESSAGE
    printf '%s\n' "$1" >&2
    exit 2
}

# A newline in a name or an option would begin another line in what reads it next. Values of --set may
# hold anything: they stay arguments.
ebwm_refuse_control_characters() {      # [arguments ...]
    local argument option='' quoted
    for argument in "$@"; do
        case $argument in
            --set=*) continue ;;
            -*) option=$argument ;;
        esac
        if [ "$option" != --set ] && [[ $argument == *[[:cntrl:]]* ]]; then
            quoted=$(printf '%q' "$argument")
            ebwm_refuse "the argument ${quoted:0:80} holds a control character: names, folders and options are one line of plain text; name it otherwise"
        fi
    done
}

# Nothing of a job around this shell reaches the new one, but which Slurm is asked and the token by
# which sites without munge know the user: SLURM_NTASKS, SLURM_CPUS_PER_TASK, SLURM_MEM_PER_CPU and
# SLURM_CPU_BIND of a shell that salloc opened would shrink it. As in cluster/slurm.py.
ebwm_leave_job() {
    local name
    for name in "${!SLURM_@}"; do
        case $name in
            SLURM_CONF | SLURM_JWT) ;;
            *) unset "$name" ;;
        esac
    done
}

ebwm_submit() {         # SCRIPT DEFAULT_CONFIG [--dry-run] [arguments ...] [-- SBATCH OPTIONS]
    local script=$1 config=$2 dry_run=false argument
    shift 2
    ebwm_leave_job
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
