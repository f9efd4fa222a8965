#!/usr/bin/env bash
# Runs vidgen as a job of a Slurm cluster: one process a GPU, or one a node where there are none. They find each other
# through Slurm. What stands before -- goes to sbatch as it is.
#
#   bash launch/slurm.sh --nodes=4 --gpus-per-node=8 --time=24:00:00 -- train --config configs/x.py --workdir /shared/x
#   bash launch/slurm.sh --topology=h100:4x8 --time=24:00:00 -- train …     nodes, GPUs and environment as in vidgen plan
#   bash launch/slurm.sh --stop --workdir /shared/x      saves and ends the job that runs there, or takes it off the queue
#
#   --dry_run     prints what would be run, here and in the job, and ends
#   PYTHON=…      the Python of the job; .venv/bin/python of the clone where there is one, else python3
#
# Five minutes before the time is up (--signal=USR1@SECONDS says otherwise) the run is asked to save; the job then goes
# back to the queue, starts again by itself and goes on bit for bit. So does one that Slurm preempts, which has the
# partition's GraceTime to save, one that gets SIGTERM from anyone but --stop, and one whose node fails.
# One whose processes die or hang starts again on the nodes that it has, by launch/supervise.py; one that was told to
# stop, that scancel JOB has cancelled, or that the user can mend, ends. The workdir must lie on a disk that all nodes
# see: WORKDIR/logs/rank-N.log are the processes' logs, slurm-JOB.log the job's own, WORKDIR/slurm_job its number.
# Where nodes can't be reached by their names, set JAX_COORDINATOR_ADDRESS=HOST:PORT.
set -euo pipefail

# 128 + SIGUSR1 or SIGTERM: the exit status of a run that was asked to save, or hadn't come so far that it could be. Slurm
# sends the first before the time is up, the second when a job is preempted or cancelled, as --stop does.
asked=' 138 143 '

say() { printf 'slurm.sh: %s\n' "$*" >&2; }
fail() {
    say "error: $*"
    exit 2
}
newest() { # the newest checkpoint of a workdir, if there is one
    { find "$1/checkpoints" -mindepth 1 -maxdepth 1 -printf '%f\n' 2>/dev/null || true; } | sort -n | tail -n 1
}
alive() { [ -n "$(squeue --noheader --jobs="$1" 2>/dev/null)" ]; }

# in_job WORKDIR TOPOLOGY ROOT PYTHON COMMAND…: what the job runs, on its first node.
in_job() {
    local workdir=$1 topology=$2 root=$3 python=$4 status=0 run='' again=1 told='' facts='' before
    # This shell is told as well, and passes it on: between two attempts there is no step of the job that could be. As
    # SIGUSR1, since srun makes SIGKILL of SIGTERM; those who hear both take them for one.
    trap 'told=1 again=1; [ -z "$run" ] || kill -USR1 "$run" 2>/dev/null || true' TERM USR1
    export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
    [ -z "$topology" ] || eval "$("$python" -m vidgen.planning.environment "$topology")"
    before=$(newest "$workdir")
    "${@:5}" &
    run=$!
    [ -z "$told" ] || kill -USR1 "$run" 2>/dev/null || true
    while [ -n "$again" ]; do # a signal ends the wait, and not what is waited for
        again='' status=0
        wait "$run" || status=$?
    done
    if [[ $asked == *" $status "* ]] || [[ -n $told && $status != [02] ]]; then
        facts=$(scontrol --oneliner show job "$SLURM_JOB_ID")
    fi
    # --stop sets Requeue=0. What was cancelled is not RUNNING, nor is what Slurm puts back by itself.
    if [[ $facts != *' JobState=RUNNING '* || $facts != *' Requeue=1 '* ]]; then
        say "job $SLURM_JOB_ID ended with exit status $status"
        exit "$status"
    fi
    # One that is preempted as soon as it starts is none that would be asked to end each time.
    if [ "$SECONDS" -lt 60 ] && [ "$(newest "$workdir")" = "$before" ] && [[ $facts == *' PreemptTime=None '* ]]; then
        say "job $SLURM_JOB_ID was asked to end after $SECONDS s, before it had saved anything, and is not started again:" \
            "is --time well above the seconds of --signal=USR1@SECONDS?"
        exit "$status"
    fi
    say "job $SLURM_JOB_ID was asked to end, has saved, and goes back to the queue"
    scontrol requeue incomplete "$SLURM_JOB_ID" # not one that is cancelled meanwhile, which it would bring back to life
}

if [ "${1:-}" = --in_job ]; then
    shift
    in_job "$@"
    exit 0
fi

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
stop='' dry='' topology='' workdir='' gpus='' tasks=''
unclear='' sbatch=() command=()
while [ $# -gt 0 ]; do
    case $1 in
        --)
            command=("${@:2}")
            break
            ;;
        -h | --help)
            sed -n '2,/^set /s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
            exit 0
            ;;
        --stop) stop=1 ;;
        --dry_run) dry=1 ;;
        --topology=*) topology=${1#*=} ;;
        --workdir=*) workdir=${1#*=} ;;
        --topology | --workdir)
            [ $# -gt 1 ] || fail "$1: expected a value"
            [ "$1" = --workdir ] && workdir=$2 || topology=$2
            shift
            ;;
        --signal | --signal=*)
            if [ "$1" = --signal ]; then
                [ $# -gt 1 ] || fail "$1: expected a value"
                set -- "$1=$2" "${@:3}"
            fi
            # To the job's shell, which tells the others.
            [[ $1 == *:* ]] && sbatch+=("$1") || sbatch+=("--signal=B:${1#*=}")
            ;;
        *)
            case $1 in
                --gpus-per-node=*) gpus=${1##*[=:]} ;;
                --gpus-per-node) gpus=${2:-} gpus=${gpus##*:} ;;
                # Of these it can't be told how many GPUs a node has, and one process would leave all but one idle.
                --gpus | --gpus=* | -G* | --gres=*gpu*) unclear=$1 ;;
                --gres) [[ ${2:-} != *gpu* ]] || unclear="$1 $2" ;;
                --ntasks* | -n*) tasks=1 ;;
            esac
            sbatch+=("$1")
            ;;
    esac
    shift
done
for ((i = 0; i < ${#command[@]}; i++)); do
    case ${command[i]} in
        --workdir=*) workdir=${command[i]#*=} ;;
        --workdir) workdir=${command[i + 1]:-} ;;
    esac
done

[ -n "$stop" ] || [ ${#command[@]} -gt 0 ] ||
    fail "nothing to run: expected -- and a verb of vidgen, as in -- train --config … --workdir …"
[ -n "$workdir" ] || fail "--workdir is missing: it is where logs and the job's number are kept"
case $workdir in
    *://*) fail "--workdir=$workdir: expected a directory that all nodes see; mount a bucket to have one" ;;
    /*) ;;
    *) workdir=$PWD/$workdir ;;
esac
run() { # prints in a dry run, else runs
    if [ -n "$dry" ]; then
        printf '%q ' "$@" | sed 's/ $/\n/'
    else
        "$@"
    fi
}
for tool in sbatch squeue scancel scontrol; do
    [ -n "$dry" ] || command -v $tool >/dev/null || fail "$tool is not on PATH: is this a login node of a Slurm cluster?"
done
job=$(cat "$workdir/slurm_job" 2>/dev/null || true)

if [ -n "$stop" ]; then
    [ -n "$job" ] || fail "$workdir/slurm_job: no such file; no job was started for this workdir by slurm.sh"
    [ -n "$dry" ] || alive "$job" || fail "$workdir: its job $job has ended already"
    run scontrol update "JobId=$job" Requeue=0 || fail "$workdir: its job $job can't be kept from starting again, see above"
    run scancel --quiet --state=PENDING "$job" || ! alive "$job"
    # They save, and the job ends by itself. Without a signal named they'd have KillWait seconds. The job's shell is told
    # last, for what waits to be started again.
    run scancel --quiet --signal=TERM "$job" || ! alive "$job"
    run scancel --quiet --batch --signal=TERM "$job" || ! alive "$job"
    exit 0
fi
if [ -n "$job" ] && [ -z "$dry" ] && alive "$job"; then
    fail "$workdir: job $job is there already; stop it first: bash launch/slurm.sh --stop --workdir $workdir"
fi

python=${PYTHON:-}
if [ -z "$python" ]; then
    python=$root/.venv/bin/python
    [ -x "$python" ] || python=python3
fi
if [ -n "$topology" ]; then
    "$python" -c 'import ml_collections' 2>/dev/null ||
        fail "$python can't read --topology: expected a Python that has vidgen's dependencies, in PYTHON or .venv"
    environment=$(cd "$root" && "$python" -m vidgen.planning.environment "$topology") || exit 2
    case $environment in
        *cuda*) ;;
        *) fail "--topology=$topology: expected GPUs, hosts x GPUs like h100:4x8; for TPUs: launch/tpu.sh, launch/gke.py" ;;
    esac
    shape=${topology#*:}
    gpus=${shape#*x}
    sbatch+=("--nodes=${shape%x*}" "--gpus-per-node=$gpus")
fi
[ -z "$unclear" ] || [ -n "$gpus$tasks" ] ||
    fail "$unclear: expected --gpus-per-node=N, which has a process a GPU; or say --ntasks-per-node=N as well"
# JAX gives each process of a node the GPU of its number.
[ -n "$tasks" ] || sbatch+=("--ntasks-per-node=${gpus:-1}")
# A process that ends before the others may be saving still; one that failed ends them by itself, or after a minute. What
# srun has started is killed with it.
srun=("$python" "$root/launch/supervise.py" -- srun --kill-on-bad-exit=0 --wait=60 --open-mode=append
    --output="$workdir/logs/rank-%t.log" "$python" -m vidgen.cli "${command[@]}")
submit=(sbatch --parsable --job-name="vidgen-$(basename "$workdir")" --requeue --signal=B:USR1@300
    --open-mode=append --output="$workdir/logs/slurm-%j.log" "${sbatch[@]}"
    "${BASH_SOURCE[0]}" --in_job "$workdir" "$topology" "$root" "$python" "${srun[@]}")

if [ -n "$dry" ]; then
    run mkdir -p "$workdir/logs"
    run "${submit[@]}"
    printf '# which runs in the job, again after each requeue:\n'
    [ -z "$topology" ] || printf '%s\n' "$environment"
    run "${srun[@]}"
    exit 0
fi
mkdir -p "$workdir/logs" || fail "$workdir: expected a directory that can be written"
job=$("${submit[@]}") || fail "sbatch refused the job, see above"
job=${job%%;*}
printf '%s\n' "$job" >"$workdir/slurm_job"
say "job $job; its processes' logs: $workdir/logs/rank-*.log; to stop it: bash launch/slurm.sh --stop --workdir $workdir"
