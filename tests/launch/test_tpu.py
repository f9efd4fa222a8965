"""launch/tpu.sh, with a stand-in for gcloud that runs what it is given on folders of this machine, one a host: what
would be asked of Google Cloud is checked against nothing."""

import contextlib
import json
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).parents[2]
HOSTS = 3
GCLOUD = """\
import os, pathlib, shutil, subprocess, sys
here = pathlib.Path(__file__).parent
(here / "calls").open("a").write(repr(sys.argv[1:]) + "\\n")
*words, = (a for a in sys.argv[1:] if not a.startswith("--"))
flags = dict(a[2:].split("=", 1) for a in sys.argv[1:] if a.startswith("--"))
assert words[:3] == ["compute", "tpus", "tpu-vm"] and flags["zone"] == "z"
for host in range(HOSTS) if flags["worker"] == "all" else [int(flags["worker"])]:
    home = here / f"host{host}"
    home.mkdir(exist_ok=True)
    if words[3] == "scp":
        shutil.copy(words[4], home / words[5].removeprefix("pod:"))
    else:
        env = os.environ | {"HOME": str(home), "RANK": str(host), "PATH": f"{here}/onhost:" + os.environ["PATH"]}
        status = subprocess.run(["bash", "-c", flags["command"]], cwd=home, env=env).returncode
        if status:
            sys.exit(status)
"""


@pytest.fixture
def tpu(tmp_path):
    """Calls tpu.sh where hosts are folders; returns (status, stdout, stderr)."""
    (tmp_path / "gcloud.py").write_text(GCLOUD.replace("HOSTS", str(HOSTS)))
    for name, body in {
        "bin/gcloud": f'exec {sys.executable} {tmp_path}/gcloud.py "$@"',
        "onhost/curl": 'case "$*" in *Metadata-Flavor:*/agent-worker-number) printf $RANK ;; *) exit 22 ;; esac',
    }.items():
        path = tmp_path / name
        path.parent.mkdir()
        path.write_text(f"#!/bin/bash\n{body}\n")
        path.chmod(0o755)

    def call(*arguments, **more):
        env = os.environ | {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "PYTHON": sys.executable} | more
        command = ["bash", str(ROOT / "launch/tpu.sh"), *map(str, arguments)]
        done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=60)
        return done.returncode, done.stdout, done.stderr

    yield call
    for pid in tmp_path.glob("host*/vidgen-*.pid"):  # of a test that failed half-way
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid.read_text()), signal.SIGKILL)


def wait(until):
    deadline = time.monotonic() + 20
    while not until():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_run_is_started_on_all_hosts_logged_by_rank_and_stopped(tpu, tmp_path):
    for host in range(HOSTS):  # a venv whose python says what it was given
        python = tmp_path / f"host{host}/vidgen/.venv/bin/python"
        python.parent.mkdir(parents=True)
        (tmp_path / f"host{host}/vidgen/launch").symlink_to(ROOT / "launch")
        python.write_text(
            f'#!/bin/bash\n[ "$1" = -m ] || exec {sys.executable} "$@"\n'
            'trap "echo saved; exit 143" TERM\n'
            'echo $PWD $JAX_PLATFORMS $VIDGEN_DISTRIBUTED "${@: -1}" "$#"\nwhile :; do sleep 0.05; done\n'
        )
        python.chmod(0o755)
    w = tmp_path / "my run"
    pod = ("--name=pod", "--zone", "z")
    start = (*pod, "--topology=v5p:2x2x4", "--", "train", "--config", "c.py", "--workdir", w, "--config.x=(1, 'a')")
    assert tpu(*start)[::2] == (0, "")
    logs = [w / f"logs/rank-{rank}.log" for rank in range(HOSTS)]
    wait(lambda: all(log.exists() and log.read_text() for log in logs))
    for host, log in enumerate(logs):
        assert log.read_text() == f"{tmp_path}/host{host}/vidgen tpu,cpu auto --config.x=(1, 'a') 8\n"
    status, _, err = tpu(*start)
    assert status != 0 and "a run is at work for this workdir; stop it first" in err
    assert tpu(*pod, "--stop", "--workdir", w) == (0, "", "")
    wait(lambda: all(log.read_text().endswith("saved\n") for log in logs))
    told = [w / f"supervisor-{host}.json" for host in range(HOSTS)]
    wait(lambda: all(path.exists() and json.loads(path.read_text())["outcome"] == "stopped" for path in told))
    assert tpu(*pod, "--stop", "--workdir", tmp_path / "other")[0] != 0


def test_the_clone_is_installed_on_all_hosts(tpu, tmp_path):
    status, out, err = tpu("--name=pod", "--zone=z", "--install", "--dry_run")
    assert (status, err) == (0, "") and not (tmp_path / "calls").exists()
    archive, copy, told, does, ssh = out.splitlines()
    assert archive.startswith(f"git -C {ROOT} archive --format=tar.gz") and archive.endswith(" HEAD")
    assert shlex.split(copy)[:5] == "gcloud compute tpus tpu-vm scp".split() and copy.endswith("--zone=z --worker=all")
    assert told == "# on host all:" and does.endswith(". launch/python.sh; make_venv tpu")
    assert shlex.split(shlex.split(ssh)[-1].removeprefix("--command="))[2] == does.removeprefix("#     ")


def test_a_dry_run_prints_what_runs_on_the_hosts(tpu, tmp_path):
    run = ("--", "train", "--config", "c.py", "--workdir=/mnt/a")
    status, out, err = tpu("--name=pod", "--zone=z", "--project=p", "--topology=v5p:2x2x4", "--dry_run", *run)
    assert (status, err) == (0, "") and not (tmp_path / "calls").exists()
    for words in (
        "#     export VIDGEN_DISTRIBUTED=auto",
        "xla_tpu_enable_all_gather_offload_tracing=true",
        "rank-$rank.log",
    ):
        assert words in out
    assert "gcloud compute tpus tpu-vm ssh pod --zone=z --project=p --worker=all --command=" in out
    assert (
        "tail -n 50 -F /mnt/a/logs/rank-0.log"
        in tpu("--name=p", "--zone=z", "--logs", "--dry_run", "--workdir=/mnt/a")[1]
    )


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "--name is missing"),
        (("--name=pod",), "--zone is missing, like us-east5-a"),
        (("--name=pod", "--zone=z"), "nothing to run: expected -- and a verb of vidgen"),
        (("--name=pod", "--zone=z", "--", "train"), "--workdir is missing: a directory that all hosts see"),
        (("--name=pod", "--zone=z", "--", "train", "--workdir=gs://b/a"), "mount the bucket on all hosts (gcsfuse)"),
        (("--name=pod", "--zone=z", "--", "train", "--workdir=a"), "expected a whole path on the hosts, like /mnt/a"),
        (
            ("--name=pod", "--zone=z", "--topology=v5p:3x3", "--", "train", "--workdir=/a"),
            "--topology=v5p:3x3: v5p wants",
        ),
        (
            ("--name=pod", "--zone=z", "--topology=2*v5p:4x4x4", "--", "train", "--workdir=/a"),
            "for several: launch/gke.py",
        ),
        (("--name=pod", "--zone=z", "--topology=h100:4x8", "--", "train", "--workdir=/a"), "for GPUs: launch/slurm.sh"),
        (("--nmae=pod",), "unknown option --nmae=pod: known are --name, --zone"),
        (("--zone",), "--zone: expected a value"),
    ],
)
def test_bad_calls(tpu, tmp_path, arguments, says):
    status, out, err = tpu(*arguments)
    assert status == 2 and out == "" and says in err and err.count("\n") == 1
    assert not (tmp_path / "calls").exists()


def test_without_gcloud_it_says_so(tpu, tmp_path):
    tools = tmp_path / "tools"
    tools.mkdir()
    for tool in ("bash", "dirname"):
        (tools / tool).symlink_to(next(f"{p}/{tool}" for p in ("/usr/bin", "/bin") if os.path.exists(f"{p}/{tool}")))
    status, _, err = tpu("--name=p", "--zone=z", "--stop", "--workdir=/a", PATH=str(tools))
    assert status == 2 and err == "tpu.sh: error: gcloud is not on PATH: https://cloud.google.com/sdk/docs/install\n"


def test_help_teaches(tpu):
    status, out, _ = tpu("--help")
    assert status == 0 and "set -euo" not in out
    for words in ("--install", "--stop --workdir /mnt/a", "rank-N.log", "--dry_run", "launch/gke.py"):
        assert words in out
