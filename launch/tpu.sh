#!/usr/bin/env bash
# Runs vidgen on all hosts of a TPU pod slice, by ssh. The slice is there already, and so is a disk that all hosts see.
#
#   gcloud compute tpus tpu-vm create pod --zone=us-east5-a --accelerator-type=v5p-512 --version=v2-alpha-tpuv5
#   bash launch/tpu.sh --name=pod --zone=us-east5-a --install                 this clone's HEAD, into ~/vidgen of each host
#   bash launch/tpu.sh --name=pod --zone=us-east5-a --topology=v5p:4x8x8 -- train --config configs/x.py --workdir /mnt/a
#   bash launch/tpu.sh --name=pod --zone=us-east5-a --logs --workdir /mnt/a   what the first host says, as it comes
#   bash launch/tpu.sh --name=pod --zone=us-east5-a --stop --workdir /mnt/a   saves, and ends it on all hosts
#
#   --project=P       of Google Cloud; gcloud's own unless given
#   --topology=T      as vidgen plan has it: sets the environment of its table
#   --dry_run         prints what would be run, here and on the hosts, and ends
#
# The run goes on when this terminal is closed. WORKDIR/logs/rank-N.log are the hosts' logs. When a process dies or hangs,
# launch/supervise.py on each host starts all again, from the last checkpoint. After a slice was taken away and made again,
# --install and the same command go on from there. For several slices: launch/gke.py.
set -euo pipefail

fail() {
    printf 'tpu.sh: error: %s\n' "$*" >&2
    exit 2
}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
name='' zone='' project='' topology='' workdir='' action=start dry=''
command=()
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
        --install | --stop | --logs) action=${1#--} ;;
        --dry_run) dry=1 ;;
        --name=* | --zone=* | --project=* | --topology=* | --workdir=*)
            key=${1%%=*}
            printf -v "${key#--}" %s "${1#*=}"
            ;;
        --name | --zone | --project | --topology | --workdir)
            [ $# -gt 1 ] || fail "$1: expected a value"
            printf -v "${1#--}" %s "$2"
            shift
            ;;
        *) fail "unknown option $1: known are --name, --zone, --project, --topology, --workdir, --install, --logs, --stop, --dry_run; the run comes after --" ;;
    esac
    shift
done
for ((i = 0; i < ${#command[@]}; i++)); do
    case ${command[i]} in
        --workdir=*) workdir=${command[i]#*=} ;;
        --workdir) workdir=${command[i + 1]:-} ;;
    esac
done

[ -n "$name" ] || fail "--name is missing: of the TPU, as gcloud compute tpus tpu-vm list has it"
[ -n "$zone" ] || fail "--zone is missing, like us-east5-a"
if [ "$action" != install ]; then
    [ "$action" != start ] || [ ${#command[@]} -gt 0 ] ||
        fail "nothing to run: expected -- and a verb of vidgen, as in -- train --config … --workdir …"
    [ -n "$workdir" ] || fail "--workdir is missing: a directory that all hosts see, like /mnt/a"
    case $workdir in
        *://*) fail "--workdir=$workdir: expected a directory; mount the bucket on all hosts (gcsfuse) and name the mounted one" ;;
        /*) ;;
        *) fail "--workdir=$workdir: expected a whole path on the hosts, like /mnt/$workdir" ;;
    esac
fi
environment='export PYTHONUNBUFFERED=1 VIDGEN_DISTRIBUTED=auto'
if [ -n "$topology" ]; then
    python=${PYTHON:-$root/.venv/bin/python}
    command -v "$python" >/dev/null || python=python3
    "$python" -c 'import ml_collections' 2>/dev/null ||
        fail "$python can't read --topology: expected a Python that has vidgen's dependencies, in PYTHON or .venv"
    environment=$(cd "$root" && "$python" -m vidgen.planning.environment "$topology") || exit 2
    case $topology in
        *\**) fail "--topology=$topology: one slice is what --name is; for several: launch/gke.py" ;;
        h100:*) fail "--topology=$topology: expected TPUs, like v5p:4x8x8; for GPUs: launch/slurm.sh" ;;
    esac
fi
[ -n "$dry" ] || command -v gcloud >/dev/null || fail "gcloud is not on PATH: https://cloud.google.com/sdk/docs/install"

run() { # prints in a dry run, else runs
    if [ -n "$dry" ]; then
        printf '%q ' "$@" | sed 's/ $/\n/'
    else
        "$@"
    fi
}
where=("--zone=$zone" ${project:+"--project=$project"})
# on HOSTS SCRIPT: the script in a shell of those hosts; in a dry run it is also printed as it is read there.
on() {
    [ -z "$dry" ] || printf 'on host %s:\n%s\n' "$1" "$2" | sed '2,$s/^/    /; s/^/# /'
    run gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" "--worker=$1" "--command=bash -c $(printf %q "$2")"
}
log=$(printf %q "$workdir/logs")
# The number of the process of this workdir, on each host. It may be another's by now, after a reboot.
pid="\$HOME/vidgen-$(printf %s "$workdir" | cksum | cut -d' ' -f1).pid"
alive="grep -qs vidgen.cli /proc/\$(cat $pid 2>/dev/null)/cmdline"

case $action in
    install)
        archive=$(mktemp --suffix=.tar.gz)
        trap 'rm -f "$archive"' EXIT
        run git -C "$root" archive --format=tar.gz --output="$archive" HEAD
        run gcloud compute tpus tpu-vm scp "$archive" "$name:vidgen.tar.gz" "${where[@]}" --worker=all
        on all 'set -eu; mkdir -p ~/vidgen; tar -xzf ~/vidgen.tar.gz -C ~/vidgen; cd ~/vidgen; . launch/python.sh; make_venv tpu'
        ;;
    start)
        # A host's number is its rank. It is asked for once more by JAX, which finds the others in the same place.
        on all "set -eu
cd ~/vidgen
if $alive; then echo \"\$(hostname): a run is at work for this workdir; stop it first\" >&2; exit 1; fi
rank=\$(curl -sf -H 'Metadata-Flavor: Google' http://metadata.google.internal/computeMetadata/v1/instance/attributes/agent-worker-number)
mkdir -p $log
$environment
setsid nohup .venv/bin/python launch/supervise.py --host \$rank -- .venv/bin/python -m vidgen.cli$(printf ' %q' "${command[@]}") </dev/null >>$log/rank-\$rank.log 2>&1 &
echo \$! >$pid"
        ;;
    logs) on 0 "tail -n 50 -F $log/rank-0.log" ;;
    stop) on all "if $alive; then kill -TERM \$(cat $pid); else echo \"\$(hostname): no run is at work for this workdir\" >&2; exit 1; fi" ;;
esac
