# shellcheck shell=bash
# What the batch scripts share. Sourced by the batch shell on the first node of a job.

# Not -e: srun's exit code is an answer, not an accident.
set -uo pipefail

# What coldpress exits with when it was asked to leave and has saved.
readonly EXIT_STOPPED=75
# What it exits with when it hung, or when another of its processes was lost.
readonly EXIT_HUNG=76
# From here on, the shell's codes for "killed by a signal": a lost node, no memory.
readonly EXIT_KILLED=128
# What a site may set: not PATH, LD_PRELOAD and the like, which would change what runs.
readonly SITE_PREFIXES='COLDPRESS_|NCCL_|TORCH_NCCL_|GLOO_|UCX_|FI_|OMP_|CUDA_'
# So many lives in a row may end without a new checkpoint.
readonly MAX_IDLE_LIVES=3

# Python must find the installed packages, not data/ or pipeline/ in the directory it was started from.
export PYTHONSAFEPATH=1
export PYTHONFAULTHANDLER=1 PYTHONUNBUFFERED=1
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
# srun does not take this over from sbatch.
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}

say() {
    printf '%s job %s.%s: %s\n' "$(date -Is)" "$SLURM_JOB_ID" "${SLURM_RESTART_COUNT:-0}" "$*"
}

# Take NAME=VALUE lines of slurm/site.env (or of the file in COLDPRESS_SITE) into the environment, as they are: nothing
# in them is run. What the submitting shell says comes first.
read_site() {
    local file=${COLDPRESS_SITE:-$SLURM_SUBMIT_DIR/slurm/site.env} line number=0
    if [[ -e $file ]]; then
        while IFS= read -r line || [[ -n $line ]]; do
            number=$((number + 1))
            take_line "$line" || {
                say "$file:$number must be NAME=VALUE, NAME beginning with one of ${SITE_PREFIXES//|/, }." >&2
                return 2
            }
        done <"$file"
    fi
    if [[ -n ${COLDPRESS_INTERFACE:-} ]]; then
        export NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-$COLDPRESS_INTERFACE}
        export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-$COLDPRESS_INTERFACE}
    fi
    read -ra srun_options <<<"${COLDPRESS_SRUN_OPTIONS:-}"
    load_modules
}

take_line() {
    [[ ! $1 =~ ^[[:space:]]*(#|$) ]] || return 0
    [[ $1 =~ ^(($SITE_PREFIXES)[A-Z0-9_]*)=(.*)$ ]] || return 1
    [[ -v ${BASH_REMATCH[1]} ]] || export "${BASH_REMATCH[1]}=${BASH_REMATCH[3]}"
}

# Load the environment modules in COLDPRESS_MODULES, words with spaces between them.
load_modules() {
    local modules
    read -ra modules <<<"${COLDPRESS_MODULES:-}"
    ((${#modules[@]})) || return 0
    if ! command -v module >/dev/null; then
        say "COLDPRESS_MODULES=$COLDPRESS_MODULES, and the shell of this job has no module command." >&2
        return 2
    fi
    module load "${modules[@]}" || return 2
}

# Print the path of the coldpress command: in COLDPRESS_BIN, in .venv beside slurm/, or on the PATH. In a container this
# shell cannot look.
find_coldpress() {
    local bin=${COLDPRESS_BIN:-$SLURM_SUBMIT_DIR/.venv/bin}
    if [[ ${COLDPRESS_SRUN_OPTIONS:-} == *--container-image* ]]; then
        echo "${COLDPRESS_BIN:+$COLDPRESS_BIN/}coldpress"
    elif [[ -x $bin/coldpress ]]; then
        echo "$bin/coldpress"
    elif [[ -n ${COLDPRESS_BIN:-} ]] || ! command -v coldpress; then
        say "no coldpress in $bin; run make install in $SLURM_SUBMIT_DIR or say COLDPRESS_BIN=DIR." >&2
        return 2
    fi
}

# Print the words of this array task's line of the file in COLDPRESS_SWEEP, one a line. Quotes keep spaces together;
# nothing is run.
sweep_words() {
    [[ -n ${COLDPRESS_SWEEP:-} ]] || return 0
    local line
    line=$(sed -n "${SLURM_ARRAY_TASK_ID:-0}p" "$COLDPRESS_SWEEP" 2>/dev/null)
    if [[ -z ${line// /} ]]; then
        say "$COLDPRESS_SWEEP has no line ${SLURM_ARRAY_TASK_ID:-for a job that is no array}; say --array=1-LINES." >&2
        return 2
    fi
    xargs printf '%s\n' <<<"$line"
}

# Let every task find the first node. What the submitting shell had of another launcher would make every task
# a run of its own.
export_rendezvous() {
    local nodes
    unset RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE
    mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    export MASTER_ADDR=${nodes[0]} MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
    while listens "$MASTER_ADDR" "$MASTER_PORT"; do
        say "somebody listens on port $MASTER_PORT; taking the next"
        MASTER_PORT=$((MASTER_PORT + 1))
    done
}

# Return whether somebody listens on a port of a host: listens HOST PORT
listens() {
    (exec 3<>"/dev/tcp/$1/$2") 2>/dev/null
}

# Print the value of the last NAME=VALUE among the arguments: value_of NAME DEFAULT ARGUMENT...
value_of() {
    local name=$1 value=$2 argument
    for argument in "${@:3}"; do
        [[ $argument != "$name="* ]] || value=${argument#*=}
    done
    echo "$value"
}

# Of COLDPRESS_SRUN_OPTIONS: a container's, for instance.
srun_options=()

# With COLDPRESS_CHECKUP=true look at all nodes, the network between them and the disks: check_nodes COLDPRESS ARGUMENT...
# If some are unfit, the job goes back into the queue, to be run without them.
check_nodes() {
    [[ ${COLDPRESS_CHECKUP:-false} == true ]] || return 0
    local said code unfit
    # A node that hangs must not hang the check-up: ten minutes.
    said=$(srun "${srun_options[@]}" --kill-on-bad-exit=0 --wait=60 --time=10 "$1" doctor "${@:2}" quick=true)
    code=$?
    printf '%s\n' "$said"
    unfit=$(sed -n 's/^nodes to leave out: //p' <<<"$said")
    if [[ -n $unfit ]] && makes_progress "$(value_of runs runs "$@")" "$(newest_checkpoint "$@")"; then
        say "back into the queue, to be run without $unfit"
        requeue_without "$unfit"
    fi
    return "$code"
}

# With COLDPRESS_GPU_EXPORTER=true watch the GPUs of each node, beside what runs there: watch_gpus COLDPRESS ARGUMENT...
# The step shares everything with the run's and leaves when Slurm asks all steps of the job to; whatever becomes of it,
# nobody waits for it. It comes later, so that the run's step keeps the number 0.
watch_gpus() {
    [[ ${COLDPRESS_GPU_EXPORTER:-false} == true ]] || return 0
    local number=$SLURM_JOB_NUM_NODES
    (
        sleep 5
        exec srun "${srun_options[@]}" --overlap --nodes="$number" --ntasks="$number" --ntasks-per-node=1 --cpus-per-task=1 \
            --kill-on-bad-exit=0 --label "$1" gpu-exporter "runs=$(value_of runs runs "${@:2}")" \
            "address=$(value_of monitor.address auto "${@:2}")"
    ) </dev/null &
}

cancelled=''
step_pid=''
signaled=''

# Run a command on all tasks and return srun's exit code. SIGUSR2, with which Slurm announces the end of the
# time limit to this shell, goes to every task; SIGTERM, which they all get from Slurm, is only remembered:
# srun would answer it by killing them. A task that ends leaves the others a minute to end as well: killed at
# once, they would not finish saving.
run_tasks() {
    trap 'signaled=1; cancelled=1' TERM
    trap 'signaled=1; [[ -z $step_pid ]] || kill -USR2 "$step_pid"' USR2
    srun "${srun_options[@]}" --kill-on-bad-exit=0 --wait=60 --label "$@" &
    step_pid=$!
    local code
    while signaled=''; do
        wait "$step_pid"
        code=$?
        # A trapped signal interrupts wait with a code of its own.
        [[ -n $signaled ]] || return "$code"
    done
}

# Return whether the job should run again after its tasks ended with code $1: they saved because they were
# asked to, hung, or were killed, and it was not the user who asked.
wants_requeue() {
    local code=$1
    ((code == EXIT_STOPPED || code == EXIT_HUNG || code >= EXIT_KILLED)) || return 1
    [[ -z $cancelled && $(squeue --noheader --job "$SLURM_JOB_ID" --format %T) == RUNNING ]]
}

# Print the name of the newest checkpoint of the run that the arguments name, nothing if there is none.
newest_checkpoint() {
    cat "$(value_of runs runs "$@")/$(value_of run '' "$@")/checkpoints/latest" 2>/dev/null
}

# Print a word that changes when an evaluation of the run that the arguments name has got further: files in eval/ and
# checkpoints of fine-tunings.
evaluated() {
    local run
    run=$(value_of runs runs "$@")/$(value_of run '' "$@")
    stat --format '%n %Y' "$run"/eval/* "$run"-finetune-*/checkpoints/latest 2>/dev/null | cksum
}

# Return whether the lives of this job still get somewhere, judged by a word that changes when they do:
# makes_progress RUNS WORD
makes_progress() {
    local ledger=$1/.lives/$SLURM_JOB_ID latest=$2 before='' idle=0
    [[ ! -e $ledger ]] || { read -r idle && read -r before; } <"$ledger"
    if [[ -n $latest && $latest != "$before" ]]; then idle=0; else idle=$((idle + 1)); fi
    mkdir -p "${ledger%/*}" && printf '%s\n%s\n' "$idle" "$latest" >"$ledger"
    ((idle < MAX_IDLE_LIVES))
}

# Put the job back into the queue and let it stay away from nodes: requeue_without NODES
requeue_without() {
    local before
    before=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/.*ExcNodeList=\([^ ]*\).*/\1/p')
    [[ $before != '(null)' ]] || before=''
    # Slurm takes the list only once the job does not run any more, and then ends this shell.
    trap '' TERM
    if scontrol requeue "$SLURM_JOB_ID"; then
        # Where Slurm knows none of these names the job comes back to them, as often as lives may be idle.
        scontrol update "JobId=$SLURM_JOB_ID" "ExcNodeList=${before:+$before,}$1"
        exit 1
    fi
    trap - TERM
}

# Put the job back into the queue; Slurm ends this shell.
requeue() {
    # Until now remembered, from now on obeyed.
    trap - TERM
    scontrol requeue "$SLURM_JOB_ID" && sleep 300
}
