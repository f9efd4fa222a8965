"""JobSets: what is written, that what is wrong in one is caught, and runs of a sweep as such.

No cluster is asked: the Job and its pods are checked by the schemas of Kubernetes, the JobSet around them by ours, and
kubectl is a stand-in that keeps what it is given.
"""

import copy
import dataclasses
import json
import os
import subprocess
import sys

import pytest
import yaml

from vidgen.config import ConfigError
from vidgen.planning.hardware import parse_topology
from vidgen.scaling import jobset
from vidgen.scaling.jobset import JobSet, Workload, job_name, manifest, slice_of, to_yaml, xpk_command

OPTIONS = {"topology": "v6e:2x2", "image": "r/vidgen:1"}


def workload(topology="2*v5p:4x8x8", **more):
    command = ("python3", "-m", "vidgen.cli", "train")
    return Workload("wan-1", parse_topology(topology), "r/vidgen:1", command, **more)


def job_of(found):
    (replicated,) = found["spec"]["replicatedJobs"]
    return replicated["replicas"], replicated["template"]["spec"]


@pytest.mark.parametrize(
    ("text", "shape", "slices", "hosts", "chips", "accelerator"),
    [
        ("2*v5p:4x8x8", "4x8x8", 2, 64, 4, "tpu-v5p-slice"),
        ("v5p:1x2x2", "2x2x1", 1, 1, 4, "tpu-v5p-slice"),
        ("4*v6e:16x16", "16x16", 4, 64, 4, "tpu-v6e-slice"),
        ("v6e:1x1", "1x1", 1, 1, 1, "tpu-v6e-slice"),
        ("v5e:4x2", "2x4", 1, 2, 4, "tpu-v5-lite-podslice"),
        ("tpu7x:8x4x4", "4x4x8", 1, 32, 4, "tpu7x"),
    ],
)
def test_a_slice_is_a_job_and_a_host_a_pod(text, shape, slices, hosts, chips, accelerator):
    replicas, job = job_of(manifest(workload(text)))
    pod = job["template"]["spec"]
    assert (replicas, job["parallelism"], job["completions"], job["backoffLimit"]) == (slices, hosts, hosts, 0)
    assert pod["containers"][0]["resources"] == {"limits": {"google.com/tpu": chips}}
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == shape
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-accelerator"] == accelerator
    environment = {e["name"]: e["value"] for e in pod["containers"][0]["env"]}
    assert environment.get("VIDGEN_DISTRIBUTED") == ("auto" if slices * hosts > 1 else None)


def test_preemptions_start_it_again_uncounted_and_failures_counted():
    found = manifest(workload(restarts=2, grace=60))
    policy = found["spec"]["failurePolicy"]
    assert policy["maxRestarts"] == 2
    assert [(r["action"], r["onJobFailureReasons"]) for r in policy["rules"]] == [
        ("RestartJobSetAndIgnoreMaxRestarts", ["PodFailurePolicy"])
    ]
    _, job = job_of(found)
    asked, taken = job["podFailurePolicy"]["rules"]
    assert asked["action"] == taken["action"] == "FailJob"
    # 128 + SIGINT, SIGUSR1, SIGTERM: what `vidgen train` exits with when it was asked to stop; not 1 or 2, its errors.
    assert asked["onExitCodes"] == {"containerName": "vidgen", "operator": "In", "values": [130, 138, 143]}
    assert taken["onPodConditions"][0]["type"] == "DisruptionTarget"
    pod = job["template"]["spec"]
    assert pod["restartPolicy"] == "Never" and pod["terminationGracePeriodSeconds"] == 60


def test_what_is_asked_for_is_there():
    found = manifest(
        workload(
            mount="gs://my-runs=/runs",
            queue="q",
            service_account="writer",
            namespace="video",
            spot=True,
            environment={"JAX_COMPILATION_CACHE_DIR": "/runs/cache"},
        )  # fmt: skip
    )
    _, job = job_of(found)
    template, pod = job["template"], job["template"]["spec"]
    assert template["metadata"]["annotations"] == {"gke-gcsfuse/volumes": "true"}
    assert pod["volumes"][1]["csi"]["volumeAttributes"]["bucketName"] == "my-runs"
    assert pod["containers"][0]["volumeMounts"][1] == {"name": "runs", "mountPath": "/runs"}
    assert {"name": "JAX_COMPILATION_CACHE_DIR", "value": "/runs/cache"} in pod["containers"][0]["env"]
    assert pod["serviceAccountName"] == "writer" and pod["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
    assert found["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "q" and found["metadata"]["namespace"] == "video"
    claim = job_of(manifest(workload(mount="disk=/d")))[1]["template"]["spec"]["volumes"][1]
    assert claim == {"name": "runs", "persistentVolumeClaim": {"claimName": "disk"}}
    assert yaml.safe_load(to_yaml(found)) == found and to_yaml(found).startswith(
        "apiVersion: jobset.x-k8s.io/v1alpha2\n"
    )


@pytest.mark.parametrize(
    ("topology", "more", "says"),
    [
        ("h100:4x8", {}, "--topology=h100:4x8: expected TPUs, like v5p:4x8x8; for GPUs: launch/slurm.sh"),
        ("v5p:1x1x1", {}, "GKE has v5p by hosts of 4 chips; the smallest is v5p:2x2x1"),
        ("v6e:2x2", {"mount": "/runs"}, "--mount=/runs: expected gs://BUCKET=/PATH or CLAIM=/PATH"),
        ("v6e:2x2", {"mount": "gs://b/c=/runs"}, "expected a whole bucket, like gs://my-runs=/runs"),
        ("v6e:2x2", {"restarts": -1}, "--restarts=-1: expected 0 or more"),
        ("v6e:2x2", {"image": ""}, "--image is missing"),
        ("v6e:2x2", {"name": "Wan 1"}, "--name=Wan 1: expected lower-case letters, digits and dashes.* like wan-1-"),
        ("v6e:2x2", {"name": "x" * 41}, "at most 40; like x{31}-"),
    ],
)
def test_what_gke_would_not_take_is_told(topology, more, says):
    with pytest.raises(ConfigError, match=says):
        manifest(dataclasses.replace(workload(topology), **more))


def test_names_are_made_of_any_text_and_differ_where_the_texts_do():
    texts = ["a", "a_b", "a-b", "A-b", "model.width=64,optimizer.lr=0.001", "9", "é", "x" * 41, "x" * 42, "-", ""]
    names = [job_name(text) for text in texts]
    assert len(set(names)) == len(texts) and names[0] == "a" and names[2] == "a-b"
    for name in names:
        manifest(Workload(name, parse_topology("v6e:2x2"), "i", ("true",)))


def test_what_is_written_passes_the_schemas_and_a_wrong_field_does_not():
    pytest.importorskip("kubernetes_validate", reason="the extra [gke]")
    from vidgen.scaling.jobset_schema import check

    good = manifest(workload(mount="gs://b=/r", queue="q", service_account="s", spot=True))
    check(good)
    check(manifest(workload("v6e:1x1")))

    def wrong(path, value, says):
        """`value` at a path of keys, None to delete: is told in a line that says so."""
        bad = copy.deepcopy(good)
        node = bad
        for key in path[:-1]:
            node = node[key]
        if value is None:
            del node[path[-1]]
        else:
            node[path[-1]] = value
        with pytest.raises(ConfigError, match=says) as e:
            check(bad)
        assert "\n" not in str(e.value)

    job = ("spec", "replicatedJobs", 0, "template", "spec")
    pod = (*job, "template", "spec")
    wrong(("spec", "failurePolcy"), {}, "JobSet: spec: unknown field 'failurePolcy'; did you mean failurePolicy?")
    wrong(
        ("spec", "replicatedJobs", 0, "replicas"), "2", "spec.replicatedJobs.0.replicas: '2' is not of type 'integer'"
    )
    wrong(("spec", "failurePolicy", "rules", 0, "action"), "Restart", "'Restart' is not one of")
    wrong(("spec", "failurePolicy", "rules", 0, "name"), None, "'name' is a required property")
    wrong(("spec", "replicatedJobs"), [], "spec.replicatedJobs: ")
    wrong(("kind",), "Job", "kind: 'JobSet' was expected")
    wrong(("metadata", "name"), "Wan", "metadata.name: 'Wan' does not match")
    wrong((*job, "paralelism"), 4, "job slice: spec: unknown field 'paralelism'; did you mean parallelism?")
    wrong((*pod, "nodeSelecter"), {}, "spec.template.spec: unknown field 'nodeSelecter'; did you mean nodeSelector?")
    wrong((*pod, "containers", 0, "image"), 3, "spec.template.spec.containers.0.image: 3 is not of type")
    wrong((*pod, "containers", 0, "name"), None, "containers.0: 'name' is a required property")
    wrong((*pod, "terminationGracePeriodSeconds"), "300", "'300' is not of type")


def test_xpk_is_asked_for_the_same():
    command = xpk_command(workload(restarts=5, spot=True), ["--cluster=c", "--storage=runs"])
    assert command[:3] == ["xpk", "workload", "create"]
    for word in (
        "--tpu-type=v5p-4x8x8",
        "--num-slices=2",
        "--max-restarts=5",
        "--spot",
        "--env=VIDGEN_DISTRIBUTED=auto",
    ):
        assert word in command
    assert command[-3:] == ["--cluster=c", "--storage=runs", "--command=exec python3 -m vidgen.cli train"]
    assert "--tpu-type=v5litepod-2x4" in xpk_command(workload("v5e:2x4"), ["--cluster", "c"])
    for more, options, says in (
        ({"mount": "d=/r"}, ["--cluster=c"], "xpk attaches volumes by name"),
        ({"queue": "q"}, ["--cluster=c"], "set by xpk itself"),
        ({}, ["--zone=z"], "--cluster is missing"),
    ):
        with pytest.raises(ConfigError, match=says):
            xpk_command(workload(**more), options)


KUBECTL = """\
import json, pathlib, sys, yaml
here = pathlib.Path(__file__).parent
_, namespace, verb, *rest = sys.argv
(here / "calls").open("a").write(json.dumps(sys.argv[1:]) + "\\n")
there = here / "cluster"
there.mkdir(exist_ok=True)
assert namespace == "--namespace=video", namespace
if (here / "down").exists():
    sys.exit("The connection to the server was refused")
if verb == "create":
    found = yaml.safe_load(sys.stdin)
    assert not (there / found["metadata"]["name"]).exists(), "AlreadyExists"
    (there / found["metadata"]["name"]).write_text(json.dumps(found))
elif verb == "delete":
    # Ended pods go at once; others save first, which kubectl is not to wait for.
    running = (there / rest[1]).exists() and '"conditions"' not in (there / rest[1]).read_text()
    assert {"--cascade=foreground", "--wait=false"} <= set(rest) or not running
    (there / rest[1]).unlink(missing_ok="--ignore-not-found" in rest)
elif verb == "get":
    print(json.dumps({"items": [json.loads(f.read_text()) for f in there.iterdir()]}))
"""


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """A folder with the JobSets that the stand-in for kubectl was given."""
    (tmp_path / "kubectl.py").write_text(KUBECTL)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/kubectl").write_text(f'#!/bin/sh\nexec {sys.executable} {tmp_path}/kubectl.py "$@"\n')
    (tmp_path / "bin/kubectl").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    monkeypatch.setattr("vidgen.scaling.commands.time.sleep", lambda _: None)
    return tmp_path / "cluster"


@pytest.fixture
def jobs(cluster, tmp_path):
    pytest.importorskip("kubernetes_validate", reason="the extra [gke]")
    return JobSet(OPTIONS | {"mount": f"disk={tmp_path}", "namespace": "video"})


def finish(cluster, handle, how):
    path = cluster / handle.partition("/")[2]
    found = json.loads(path.read_text()) | {"status": {"conditions": [{"type": how, "status": "True"}]}}
    path.write_text(json.dumps(found))


def test_runs_of_a_sweep_are_created_seen_and_deleted(jobs, cluster, tmp_path):
    argv = [sys.executable, "-m", "vidgen.sweep_run", str(tmp_path), "a=1, b='2'"]
    handles = [jobs.start(name, argv, str(tmp_path / "runs" / name)) for name in ("lr=1", "lr=2", "lr=3")]
    assert len(set(handles)) == 3 and all(handle.startswith("video/") for handle in handles)
    found = json.loads((cluster / handles[0].partition("/")[2]).read_text())
    container = job_of(found)[1]["template"]["spec"]["containers"][0]
    assert container["command"][:2] == ["bash", "-c"] and container["command"][3] == str(tmp_path / "runs/lr=1")
    assert container["command"][4:] == ["python3", "-m", "vidgen.sweep_run", str(tmp_path), "a=1, b='2'"]

    assert jobs.alive([*handles, "video/other"]) == set(handles)
    finish(cluster, handles[0], "Completed")
    finish(cluster, handles[1], "Failed")
    finish(cluster, handles[2], "Suspended")
    assert jobs.alive(handles) == {handles[2]}
    # One that failed makes room for the next attempt; one that is at work is left alone.
    assert jobs.start("lr=2", argv, str(tmp_path / "runs/lr=2")) == handles[1]
    assert jobs.start("lr=3", argv, str(tmp_path / "runs/lr=3")) == handles[2]
    assert jobs.alive(handles) == set(handles[1:])
    for handle in handles:
        jobs.stop(handle)
    jobs.stop(handles[0])
    assert jobs.alive(handles) == set() and jobs.alive([]) == set()


def test_what_a_pod_runs_writes_the_log_of_the_run(jobs, cluster, tmp_path):
    argv = ["bash", "-c", 'echo "$0"; echo bye >&2; exit 3', "it's here"]
    handle = jobs.start("a", argv, str(tmp_path / "runs/a"))
    found = json.loads((cluster / handle.partition("/")[2]).read_text())
    container = job_of(found)[1]["template"]["spec"]["containers"][0]
    assert subprocess.run(container["command"]).returncode == 3
    assert (tmp_path / "runs/a/log.txt").read_text() == "it's here\nbye\n"


def test_that_kubernetes_does_not_answer_is_not_taken_for_an_answer(jobs, tmp_path):
    (tmp_path / "down").touch()
    with pytest.raises(ConfigError, match="kubectl .* failed: The connection to the server was refused"):
        jobs.alive(["video/a"])
    assert (tmp_path / "calls").read_text().count("get") == 4
    with pytest.raises(ConfigError, match="expected a folder under .*, where pods have disk="):
        jobs.start("a", ["true"], "/elsewhere/a")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"topolgy": "v6e:2x2"}, "unknown 'topolgy'; did you mean topology?"),
        ({"image": "i", "mount": "d=/r"}, "have no topology"),
        (OPTIONS, "have no mount"),
        (OPTIONS | {"mount": "d=/r", "topology": "v6e:4x4"}, "a run of a sweep has one host"),
        (OPTIONS | {"mount": "d=/r", "topology": "v6e:3x3"}, "v6e comes as"),
        (OPTIONS | {"mount": "d"}, "--mount=d: expected gs://BUCKET=/PATH"),
    ],
)
def test_wrong_options_are_told_before_anything_begins(options, says):
    with pytest.raises(ConfigError, match=says):
        JobSet(options)


def test_every_chip_of_a_pod_is_asked_for():
    for text in ("2*v5p:4x8x8", "v6e:16x16", "v5e:2x2", "tpu7x:2x2x1"):
        topology = parse_topology(text)
        _, hosts, chips = slice_of(topology)
        assert topology.slices * hosts * chips == topology.chips and topology.slices * hosts == topology.hosts
        assert topology.chip.name in jobset.XPK
