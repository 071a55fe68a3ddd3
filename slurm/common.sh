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

# Print the path of the coldpress command: in COLDPRESS_BIN, in .venv beside slurm/, or on the PATH.
find_coldpress() {
    local bin=${COLDPRESS_BIN:-$SLURM_SUBMIT_DIR/.venv/bin}
    if [[ -x $bin/coldpress ]]; then
        echo "$bin/coldpress"
    elif [[ -n ${COLDPRESS_BIN:-} ]] || ! command -v coldpress; then
        say "no coldpress in $bin; run make install in $SLURM_SUBMIT_DIR or say COLDPRESS_BIN=DIR." >&2
        return 2
    fi
}

# Let every task find the first node. What the submitting shell had of another launcher would make every task
# a run of its own.
export_rendezvous() {
    local nodes
    unset RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE
    mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    export MASTER_ADDR=${nodes[0]} MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
}

# Print the value of the last NAME=VALUE among the arguments: value_of NAME DEFAULT ARGUMENT...
value_of() {
    local name=$1 value=$2 argument
    for argument in "${@:3}"; do
        [[ $argument != "$name="* ]] || value=${argument#*=}
    done
    echo "$value"
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
    srun --kill-on-bad-exit=0 --wait=60 --label "$@" &
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

# Return whether the lives of this job still get somewhere, judged by the name of the newest checkpoint of the
# run in directory $1/$2.
makes_progress() {
    local ledger=$1/.lives/$SLURM_JOB_ID latest before='' idle=0
    latest=$(cat "$1/$2/checkpoints/latest" 2>/dev/null)
    [[ ! -e $ledger ]] || { read -r idle && read -r before; } <"$ledger"
    if [[ -n $latest && $latest != "$before" ]]; then idle=0; else idle=$((idle + 1)); fi
    mkdir -p "${ledger%/*}" && printf '%s\n%s\n' "$idle" "$latest" >"$ledger"
    ((idle < MAX_IDLE_LIVES))
}

# Put the job back into the queue; Slurm ends this shell.
requeue() {
    # Until now remembered, from now on obeyed.
    trap - TERM
    scontrol requeue "$SLURM_JOB_ID" && sleep 300
}
