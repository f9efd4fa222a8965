#!/usr/bin/env python3
"""Runs `vidgen` on TPU slices of a Google Kubernetes Engine cluster, one or several, as a JobSet.

  python launch/gke.py --name wan-1 --topology 2*v5p:4x8x8 --image REGION-docker.pkg.dev/P/R/vidgen:1 \\
      --mount gs://my-runs=/runs -- train --config configs/x.py --workdir /runs/wan-1

The image has this clone installed with its extra [tpu]; the workdir lies under the mount, which all hosts see. What is
set in the environment comes from the table of `vidgen plan`; with several slices the config learns of it
(config.mesh.slices). A run whose node is taken away saves and starts again, however often; one that fails starts again
--restarts times.

  --dry_run                    prints the JobSet, or xpk's command line, and ends
  --engine xpk --cluster C …   by xpk, which has to be on PATH; options it alone knows go to it as they are
  --logs --name wan-1          what the hosts say, a line each with its pod: slice-S-H is host H of slice S
  --stop --name wan-1          the run saves and ends
"""

from __future__ import annotations

import argparse
import pathlib
import shlex
import shutil
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from vidgen.config import ConfigError  # noqa: E402
from vidgen.planning.environment import for_machine  # noqa: E402
from vidgen.planning.hardware import parse_topology  # noqa: E402
from vidgen.scaling import jobset  # noqa: E402
from vidgen.scaling.jobset_schema import check  # noqa: E402
from vidgen.secrets import redacted  # noqa: E402


def main() -> int:
    """Parses the command line and runs it; the exit status."""
    try:
        return run(sys.argv[1:])
    except ConfigError as e:
        print(f"gke.py: error: {e}", file=sys.stderr)
        return 2


def run(argv: list[str]) -> int:
    """As `main`; raises ConfigError for what can't be used."""
    options, rest, command = parse(argv)
    if rest and (options.engine != "xpk" or options.stop or options.logs):
        raise ConfigError(f"unknown option {rest[0]}; expected what --help lists, and the run after --")
    if options.stop or options.logs:
        return call(told(options, rest), "", options.dry_run)
    if not options.topology:
        raise ConfigError("--topology is missing: TPUs, like v5p:4x8x8, or 2*v6e:16x16 for two slices")
    if not command:
        raise ConfigError("nothing to run: expected -- and a verb of vidgen, as in -- train --config … --workdir …")
    if any(redacted(argument) != argument for argument in command):
        raise ConfigError(
            "the command holds a credential, which the cluster would show to all who may read it; expected none: give "
            "the pods a --service_account that may do it"
        )
    topology = parse_topology(options.topology)
    w = jobset.Workload(
        name=options.name,
        topology=topology,
        image=options.image,
        command=("python3", "-m", "vidgen.cli", *for_machine(command, topology)),
        mount=options.mount,
        namespace=options.namespace,
        restarts=options.restarts,
        grace=options.grace,
        service_account=options.service_account,
        queue=options.queue,
        spot=options.spot,
    )
    check_workdir(command, w)
    if options.engine == "xpk":
        return call(jobset.xpk_command(w, rest), "", options.dry_run)
    manifest = jobset.manifest(w)
    check(manifest)
    # Not apply, which would take one that has ended for one that runs.
    status = call(["kubectl", "create", "-f", "-"], jobset.to_yaml(manifest), options.dry_run)
    if status:
        print(f"gke.py: if it is there already: --stop --name {w.name}, and then this again", file=sys.stderr)
    return status


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str], list[str]]:
    """(options, options that are not ours, the command to run)."""
    description, _, more = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="gke.py",
        usage="python launch/gke.py --name NAME --topology T --image I [options] -- VERB …",
        description=description,
        epilog=more,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--name", default="", help="of the run in the cluster")
    add("--topology", default="", help="as `vidgen plan` has it: v5p:4x8x8, 2*v6e:16x16")
    add("--image", default="", help="container image with vidgen in it")
    add("--mount", default="", help="gs://BUCKET=/PATH, or CLAIM=/PATH of a persistent volume claim")
    add("--engine", default="jobset", choices=("jobset", "xpk"), help="by kubectl, or by xpk; jobset unless given")
    add("--namespace", default="default", help="of Kubernetes")
    add("--restarts", type=int, default=3, metavar="N", help="after failures, 3 unless given")
    add("--grace", type=int, default=300, metavar="SECONDS", help="to save when a node is taken away, 300 unless given")
    add("--service_account", default="", help="of Kubernetes, that may write to the bucket")
    add("--queue", default="", help="of Kueue, to wait in")
    add("--spot", action="store_true", help="on spot nodes")
    add("--dry_run", action="store_true", help="print what would be run, and end")
    add("--logs", action="store_true", help="follow what the hosts of --name say")
    add("--stop", action="store_true", help="end the run --name, which saves")
    cut = argv.index("--") if "--" in argv else len(argv)
    options, rest = parser.parse_known_args(argv[:cut])
    if not options.name:
        raise ConfigError("--name is missing: what the run is called in the cluster")
    return options, rest, argv[cut + 1 :]


def check_workdir(command: list[str], w: jobset.Workload) -> None:
    """Raises ConfigError for a workdir that would be lost with its pod, or that is no directory."""
    found = [b if a == "--workdir" else a.partition("=")[2] for a, b in zip(command, [*command[1:], ""], strict=True)
             if a.partition("=")[0] == "--workdir"]  # fmt: skip
    if not found or not found[0]:
        raise ConfigError("--workdir is missing after the --: a folder under the mount, like --workdir /runs/a")
    if "://" in found[0]:
        bucket, _, path = found[0].partition("://")[2].partition("/")
        way = f"--mount gs://{bucket}=/runs and --workdir /runs/{path}"
        raise ConfigError(f"--workdir={found[0]}: expected a folder; mount the bucket: {way}")
    mounted = w.mount.rpartition("=")[2].rstrip("/")
    if w.mount and not f"{found[0]}/".startswith(mounted + "/"):
        raise ConfigError(f"--workdir={found[0]}: expected a folder under {mounted}, where --mount={w.mount} is")


def told(options: argparse.Namespace, rest: list[str]) -> list[str]:
    """What ends a run, or shows what it says."""
    kubectl = ["kubectl", f"--namespace={options.namespace}"]
    if options.stop:
        return [*kubectl, "delete", "jobset", options.name, *jobset.SLOWLY]
    label = f"jobset.sigs.k8s.io/jobset-name={options.name}"
    container = "vidgen" if options.engine == "jobset" else "jax-tpu"
    return [
        *kubectl,
        "logs",
        "--follow",
        "--prefix",
        "--max-log-requests=1000",
        f"--selector={label}",
        f"--container={container}",
    ]


def call(command: list[str], given: str, dry: bool) -> int:
    """Runs a command, or prints it as a shell takes it; the exit status."""
    if dry:
        print(shlex.join(command) + (f" <<'END'\n{given}END" if given else ""))
        return 0
    if not shutil.which(command[0]):
        hint = jobset.HINT if command[0] == "kubectl" else "pip install xpk, in an environment of its own"
        raise ConfigError(f"{command[0]} is not on PATH: {hint}")
    return subprocess.run(command, input=given or None, text=True).returncode


if __name__ == "__main__":
    sys.exit(main())
