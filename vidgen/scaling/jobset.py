"""Runs on Google Kubernetes Engine: the JobSet of a run over one or several TPU slices, and sweeps of such.

A JobSet (jobset.sigs.k8s.io) has a Job a slice, and a Job a pod a host. GKE tells the pods of a slice of each other
(TPU_WORKER_ID, TPU_WORKER_HOSTNAMES), and those of several slices as well (MEGASCALE_…); JAX reads that.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import math
import os
import re
import shlex
import sys
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from vidgen.config import ConfigError
from vidgen.planning.environment import environment
from vidgen.planning.hardware import Topology, parse_topology
from vidgen.scaling.commands import told
from vidgen.scaling.jobset_schema import check

# What GKE calls the chips, as node labels have it; what xpk does.
ACCELERATORS = {"v5e": "tpu-v5-lite-podslice", "v5p": "tpu-v5p-slice", "v6e": "tpu-v6e-slice", "tpu7x": "tpu7x"}
XPK = {"v5e": "v5litepod", "v5p": "v5p", "v6e": "v6e", "tpu7x": "tpu7x"}
# Exit statuses of a run that was asked to end and has saved: 128 + SIGINT, SIGUSR1, SIGTERM.
ASKED = (130, 138, 143)
PORTS = (8471, 8080, 8482)  # of the TPU runtime, of several slices, of JAX's coordinator
SLOWLY = ("--cascade=foreground",)  # it stays until its pods have ended, else it would be gone while they save
MOST_NAME = 40  # characters: GKE makes longer names of it, of at most 63
HINT = "it comes with the Google Cloud SDK (gcloud components install kubectl)"


@dataclasses.dataclass(frozen=True)
class Workload:
    """One run on GKE.

    Attributes:
      name: lower-case letters, digits and dashes, at most 40.
      topology: of TPUs; a Job for each of its slices.
      image: that has vidgen in it.
      command: what each host runs.
      mount: where runs are written: "gs://BUCKET=/PATH" (by Cloud Storage FUSE) or "CLAIM=/PATH" (a volume claim).
      environment: more than what the topology wants.
      namespace: of Kubernetes.
      restarts: times that the run starts again after it failed. Those after a preemption are not counted.
      grace: seconds that it has to save when its node is taken away.
      service_account: of Kubernetes; one that may write to the bucket.
      queue: of Kueue, that it waits in.
      spot: whether on spot nodes.
    """

    name: str
    topology: Topology
    image: str
    command: tuple[str, ...]
    mount: str = ""
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)
    namespace: str = "default"
    restarts: int = 3
    grace: int = 300
    service_account: str = ""
    queue: str = ""
    spot: bool = False


def manifest(w: Workload) -> dict[str, Any]:
    """The JobSet of a run. Raises ConfigError for a name, a mount or a topology that GKE would not take.

    When a process ends by a preemption or because it was asked to, or a pod is evicted, its Job fails by the pod
    failure policy, and the whole JobSet starts again without that being counted; any other failure counts.
    """
    if not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", w.name) or len(w.name) > MOST_NAME:
        raise ConfigError(
            f"--name={w.name}: expected lower-case letters, digits and dashes, a letter first, at most {MOST_NAME}; "
            f"like {job_name(w.name)}"
        )
    for key in ("restarts", "grace"):
        if getattr(w, key) < 0:
            raise ConfigError(f"--{key}={getattr(w, key)}: expected 0 or more")
    if not w.image:
        raise ConfigError(
            "--image is missing: a container image with vidgen in it, like REGION-docker.pkg.dev/P/R/vidgen"
        )
    shape, hosts, chips = slice_of(w.topology)
    names = environment(w.topology) | dict(w.environment)
    volume, where, annotations = _mounted(w.mount)
    container = {
        "name": "vidgen",
        "image": w.image,
        "command": list(w.command),
        "env": [{"name": name, "value": value} for name, value in names.items()],
        "ports": [{"containerPort": port} for port in PORTS],
        "resources": {"limits": {"google.com/tpu": chips}},
        "securityContext": {"privileged": True},  # to lock memory for transfers to the chips
        "volumeMounts": [{"name": "shm", "mountPath": "/dev/shm"}, *where],
    }
    labels = {"vidgen.dev/run": w.name}
    nodes = {
        "cloud.google.com/gke-tpu-accelerator": ACCELERATORS[w.topology.chip.name],
        "cloud.google.com/gke-tpu-topology": shape,
    }
    pod = {
        "restartPolicy": "Never",  # all start again, or none
        "hostNetwork": True,
        "dnsPolicy": "ClusterFirstWithHostNet",
        "terminationGracePeriodSeconds": w.grace,
        "nodeSelector": nodes | ({"cloud.google.com/gke-spot": "true"} if w.spot else {}),
        "tolerations": [
            {"key": key, "operator": "Exists"} for key in ["google.com/tpu"] + ["cloud.google.com/gke-spot"] * w.spot
        ],
        "containers": [container],
        "volumes": [{"name": "shm", "emptyDir": {"medium": "Memory"}}, *volume],
    }
    if w.service_account:
        pod["serviceAccountName"] = w.service_account
    job = {
        "parallelism": hosts,
        "completions": hosts,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        "podFailurePolicy": {
            "rules": [
                {
                    "action": "FailJob",
                    "onExitCodes": {"containerName": "vidgen", "operator": "In", "values": list(ASKED)},
                },
                {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
            ]
        },
        "template": {"metadata": {"labels": labels, "annotations": annotations}, "spec": pod},
    }
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {
            "name": w.name,
            "namespace": w.namespace,
            "labels": labels | ({"kueue.x-k8s.io/queue-name": w.queue} if w.queue else {}),
            # A slice is a node pool, and a Job has one to itself.
            "annotations": {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"},
        },
        "spec": {
            "failurePolicy": {
                "maxRestarts": w.restarts,
                "rules": [
                    {
                        "name": "asked",
                        "action": "RestartJobSetAndIgnoreMaxRestarts",
                        "onJobFailureReasons": ["PodFailurePolicy"],
                    }
                ],
            },
            "network": {"enableDNSHostnames": True},
            "replicatedJobs": [{"name": "slice", "replicas": w.topology.slices, "template": {"spec": job}}],
        },
    }


def slice_of(topology: Topology) -> tuple[str, int, int]:
    """(topology of a slice as GKE spells it, hosts of a slice, chips of a host). Raises ConfigError."""
    if topology.chip.name not in ACCELERATORS:
        raise ConfigError(f"--topology={topology.text}: expected TPUs, like v5p:4x8x8; for GPUs: launch/slurm.sh")
    shape = sorted(topology.shape)
    if shape == [1, 2, 2]:
        shape = [2, 2, 1]
    chips = min(math.prod(shape), topology.chip.chips_per_host)
    if topology.chip.name == "v5p" and chips < 4:
        raise ConfigError(f"--topology={topology.text}: GKE has v5p by hosts of 4 chips; the smallest is v5p:2x2x1")
    return "x".join(map(str, shape)), math.prod(shape) // chips, chips


def to_yaml(document: Mapping[str, Any]) -> str:
    """A manifest as kubectl reads it, its keys in their order."""
    import yaml

    return yaml.safe_dump(dict(document), sort_keys=False, width=120)


def job_name(text: str) -> str:
    """A name that Kubernetes takes, made of any text; two texts that differ have names that differ."""
    plain = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "run"
    plain = plain if plain[0].isalpha() else f"r-{plain}"
    if plain == text and len(plain) <= MOST_NAME:
        return plain
    return f"{plain[: MOST_NAME - 9].rstrip('-')}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def xpk_command(w: Workload, options: Sequence[str]) -> list[str]:
    """The xpk command line of the same run; `options` (--cluster, --zone, --storage, …) go to it as they are.

    Raises ConfigError as `manifest` does, and for what xpk has another way for.
    """
    manifest(w)
    shape, _, _ = slice_of(w.topology)
    if w.mount:
        raise ConfigError(f"--mount={w.mount}: xpk attaches volumes by name: xpk storage attach, then --storage=NAME")
    if w.queue or w.service_account:
        raise ConfigError("--queue and --service_account are set by xpk itself; leave them away with --engine=xpk")
    if not any(option.partition("=")[0] == "--cluster" for option in options):
        raise ConfigError("--cluster is missing: --engine=xpk wants the cluster, and its --project and --zone")
    values = environment(w.topology) | dict(w.environment)
    return [
        *("xpk", "workload", "create", f"--workload={w.name}"),
        f"--tpu-type={XPK[w.topology.chip.name]}-{shape}",
        f"--num-slices={w.topology.slices}",
        f"--docker-image={w.image}",
        f"--max-restarts={w.restarts}",
        f"--termination-grace-period-seconds={w.grace}",
        *(f"--env={name}={value}" for name, value in values.items()),
        *(["--spot"] if w.spot else []),
        *(f"--namespace={w.namespace}" for _ in range(w.namespace != "default")),
        *options,
        # xpk signals its own child, which is to be the run.
        f"--command=exec {shlex.join(w.command)}",
    ]


class JobSet:
    """A launcher of sweeps: a JobSet a run, by kubectl. A handle is NAMESPACE/NAME.

    The sweep's folder must lie under the mount, at the same path here and in the pods; the config that its runs start
    from must be at the same path as well, under the mount or in the image.

    Attributes:
      pause: seconds between looks at the cluster.
    """

    name = "jobset"
    pause = 5.0

    def __init__(self, options: Mapping[str, Any]):
        """Takes what a `Workload` says, apart from its name and command.

        Args:
          options: `topology` ("v6e:2x2", …), `image` and `mount`, which must be there; `namespace`, `restarts`,
            `grace`, `service_account`, `queue`, `spot`, `environment`; `python`, of the image: python3.

        Raises ConfigError for an option that is unknown, naming the nearest, or missing, or can't be used.
        """
        known = {field.name for field in dataclasses.fields(Workload)} - {"name", "command"} | {"python"}
        for name in options:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(sorted(known))}"
                raise ConfigError(f"the sweep's options for JobSet: unknown {name!r}; {hint}")
        for name in ("topology", "image", "mount"):
            if not options.get(name):
                raise ConfigError(f"the sweep's options for JobSet have no {name}")
        more = {name: value for name, value in options.items() if name != "python"}
        self._like = Workload("run", command=("true",), **more | {"topology": parse_topology(options["topology"])})
        self._python = options.get("python", "python3")
        if self._like.topology.hosts > 1:
            raise ConfigError(
                f"the sweep's options for JobSet: topology={options['topology']}: a run of a sweep has one host"
            )
        check(manifest(self._like))

    def start(self, name: str, argv: Sequence[str], folder: str) -> str:
        """Creates a JobSet that runs `argv`, its output into FOLDER/log.txt; returns its handle. Raises ConfigError."""
        folder = os.path.abspath(folder)
        mounted = self._like.mount.partition("=")[2].rstrip("/")
        if not folder.startswith(mounted + "/"):
            raise ConfigError(f"{folder}: expected a folder under {mounted}, where pods have {self._like.mount}")
        command = [self._python if word == sys.executable else word for word in argv]
        script = 'mkdir -p "$0" && exec "$@" >>"$0/log.txt" 2>&1'
        w = dataclasses.replace(self._like, name=job_name(folder), command=("bash", "-c", script, folder, *command))
        # One of that name that has ended, perhaps by failing, makes room for this attempt.
        handle = f"{w.namespace}/{w.name}"
        if handle not in self.alive([handle]):
            told(_kubectl(w.namespace, "delete", "jobset", w.name, "--ignore-not-found"), HINT)
            told(_kubectl(w.namespace, "create", "-f", "-"), HINT, given=to_yaml(manifest(w)))
        return handle

    def alive(self, handles: Collection[str]) -> set[str]:
        """Those that are there and have not come to their end. Raises ConfigError where Kubernetes does not say."""
        found = set()
        for namespace in {handle.partition("/")[0] for handle in handles}:
            listed = json.loads(told(_kubectl(namespace, "get", "jobset", "-l", "vidgen.dev/run", "-o", "json"), HINT))
            found |= {f"{namespace}/{item['metadata']['name']}" for item in listed["items"] if not _ended(item)}
        return set(handles) & found

    def stop(self, handle: str) -> None:
        """Deletes it: its pods are asked to save and have the grace period to; it is alive until they have ended."""
        namespace, _, name = handle.partition("/")
        told(_kubectl(namespace, "delete", "jobset", name, "--ignore-not-found", *SLOWLY, "--wait=false"), HINT)


def _kubectl(namespace: str, *words: str) -> list[str]:
    return ["kubectl", f"--namespace={namespace}", *words]


def _ended(item: Mapping[str, Any]) -> bool:
    conditions = item.get("status", {}).get("conditions", [])
    return any(c["type"] in ("Completed", "Failed") and c["status"] == "True" for c in conditions)


def _mounted(mount: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]], dict[str, str]]:
    """(volumes, mounts, annotations of the pod)."""
    if not mount:
        return [], [], {}
    what, equals, path = mount.rpartition("=")
    if not (equals and what and re.fullmatch(r"/[^:]+", path)):
        raise ConfigError(f"--mount={mount}: expected gs://BUCKET=/PATH or CLAIM=/PATH, like gs://my-runs=/runs")
    where = [{"name": "runs", "mountPath": path}]
    if not what.startswith("gs://"):
        return [{"name": "runs", "persistentVolumeClaim": {"claimName": what}}], where, {}
    bucket = what.removeprefix("gs://").rstrip("/")
    if not bucket or "/" in bucket:
        raise ConfigError(f"--mount={mount}: expected a whole bucket, like gs://my-runs={path}")
    # On the host's network the driver takes the pod's service account only when told so.
    attributes = {"bucketName": bucket, "hostNetworkPodKSA": "true"}
    csi = {"driver": "gcsfuse.csi.storage.gke.io", "volumeAttributes": attributes}
    return [{"name": "runs", "csi": csi}], where, {"gke-gcsfuse/volumes": "true"}
