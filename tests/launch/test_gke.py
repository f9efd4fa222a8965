"""launch/gke.py: what it prints and creates. kubectl is a stand-in; xpk is the real one, where there is one."""

import os
import pathlib
import shlex
import shutil
import subprocess
import sys

import pytest
import yaml

pytest.importorskip("kubernetes_validate", reason="the extra [gke]")

ROOT = pathlib.Path(__file__).parents[2]
RUN = ("--", "train", "--config", "c.py", "--workdir", "/runs/a")
BASE = ("--name=a", "--topology=2*v5p:4x8x8", "--image=r/v:1")


def gke(*arguments, **more):
    command = [sys.executable, str(ROOT / "launch/gke.py"), *map(str, arguments)]
    done = subprocess.run(command, env=os.environ | more, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout, done.stderr


def test_a_dry_run_prints_what_would_be_created(tmp_path):
    status, out, err = gke(*BASE, "--mount=gs://b=/runs", "--dry_run", *RUN)
    assert (status, err) == (0, "") and out.startswith("kubectl create -f - <<'END'\n") and out.endswith("\nEND\n")
    found = yaml.safe_load("".join(out.splitlines(keepends=True)[1:-1]))
    container = found["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"][0]
    assert container["command"] == ["python3", "-m", "vidgen.cli", *RUN[1:], "--config.mesh.slices=2"]

    kubectl = tmp_path / "kubectl"
    kubectl.write_text(f'#!/bin/sh\necho "$@" >{tmp_path}/told\ncat >{tmp_path}/given\n')
    kubectl.chmod(0o755)
    path = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    assert gke(*BASE, "--mount=gs://b=/runs", *RUN, "--config.mesh.slices=4", **path) == (0, "", "")
    assert (tmp_path / "told").read_text() == "create -f -\n"
    given = (tmp_path / "given").read_text()
    assert "slices=4" in given and "slices=2" not in given  # what is said outright stays
    kubectl.write_text(kubectl.read_text() + "[ $1 != create ]\n")
    status, _, err = gke(*BASE, *RUN, **path)
    assert status == 1 and err == "gke.py: if it is there already: --stop --name a, and then this again\n"
    assert gke("--name=a", "--namespace=video", "--stop", **path)[0] == 0
    assert (tmp_path / "told").read_text() == "--namespace=video delete jobset a --cascade=foreground\n"
    assert gke("--name=a", "--logs", "--dry_run")[1].startswith("kubectl --namespace=default logs --follow --prefix")


def test_xpk_takes_the_command_line(tmp_path):
    xpk = os.environ.get("VIDGEN_XPK") or shutil.which("xpk")
    if not xpk:
        pytest.skip("no xpk: 382 MB; pip install xpk in an environment of its own, and VIDGEN_XPK=…/bin/xpk")
    written = tmp_path / "w.yaml"
    own = ("--cluster=c", "--zone=us-east5-a", "--project=p", "--dry-run", "--skip-validation")
    status, out, err = gke(*BASE, "--engine=xpk", *own, f"--output-manifest-file={written}", "--dry_run", *RUN)
    assert (status, err) == (0, "")
    words = shlex.split(out)
    done = subprocess.run([xpk, *words[1:]], capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    theirs = yaml.safe_load(written.read_text())["spec"]
    ours = yaml.safe_load("".join(gke(*BASE, "--dry_run", *RUN)[1].splitlines(keepends=True)[1:-1]))["spec"]
    assert theirs["failurePolicy"]["maxRestarts"] == ours["failurePolicy"]["maxRestarts"]
    (theirs,), (ours,) = theirs["replicatedJobs"], ours["replicatedJobs"]
    assert theirs["replicas"] == ours["replicas"] == 2
    theirs, ours = theirs["template"]["spec"], ours["template"]["spec"]
    assert (theirs["parallelism"], theirs["completions"]) == (ours["parallelism"], ours["completions"]) == (64, 64)
    theirs, ours = theirs["template"]["spec"], ours["template"]["spec"]
    for same in ("nodeSelector", "restartPolicy", "hostNetwork", "dnsPolicy", "terminationGracePeriodSeconds"):
        assert theirs[same] == ours[same], same
    theirs, ours = theirs["containers"][0], ours["containers"][0]
    assert theirs["resources"] == ours["resources"] and theirs["env"] == ours["env"]
    assert f"(exec {shlex.join(ours['command'])}) & PID=$!" in theirs["command"][-1]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (BASE[1:], "--name is missing"),
        ((BASE[0], BASE[2], *RUN), "--topology is missing: TPUs, like v5p:4x8x8"),
        ((*BASE[:2], *RUN), "--image is missing"),
        (BASE, "nothing to run: expected -- and a verb of vidgen"),
        ((*BASE, "--", "train"), "--workdir is missing after the --"),
        (
            (*BASE, "--", "train", "--workdir=gs://b/x/a"),
            "mount the bucket: --mount gs://b=/runs and --workdir /runs/x/a",
        ),
        ((*BASE, "--mount=d=/disk", *RUN), "--workdir=/runs/a: expected a folder under /disk"),
        ((*BASE, "--clutser=c", *RUN), "unknown option --clutser=c; expected what --help lists"),
        ((*BASE, "--engine=xpk", *RUN), "--cluster is missing: --engine=xpk wants the cluster"),
        ((*BASE[::2], "--topology=v5p:4x8x9", *RUN), "--topology=v5p:4x8x9: v5p comes as"),
        ((*BASE, "--mount=d=/runs", *RUN), "kubectl is not on PATH: it comes with the Google Cloud SDK"),
        (("--name=a", "--stop"), "kubectl is not on PATH"),
    ],
)
def test_bad_calls(arguments, says, tmp_path):
    status, out, err = gke(*arguments, PATH=str(tmp_path))
    assert status == 2 and out == "" and says in err and err.startswith("gke.py: error: ") and err.count("\n") == 1


def test_help_teaches():
    status, out, _ = gke("--help")
    assert status == 0
    for words in (
        "--topology 2*v5p:4x8x8",
        "--mount gs://my-runs=/runs",
        "--stop --name wan-1",
        "--engine xpk",
        "--dry_run",
    ):
        assert words in out
