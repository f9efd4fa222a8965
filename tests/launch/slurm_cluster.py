"""A real Slurm on this machine: munged, slurmctld and two slurmd, each a node, with files and ports of their own.

Needs root and Debian's packages: apt-get install -y --no-install-recommends slurm-wlm munge. `slurm` is the fixture, of
the whole session; what is missing is said in the reason that its tests are skipped for.
"""

import contextlib
import dataclasses
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import tempfile
import time

import pytest

COMMANDS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol", "scancel", "sinfo")
CONFIG = """\
ClusterName=vidgen-test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# A job that is put back on the queue begins again so many seconds later, 5 at the least; 120 unless told.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=1
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=5
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=4
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=4
PartitionName=all Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP GraceTime=60
PartitionName=urgent Nodes=n1,n2 MaxTime=INFINITE State=UP PriorityTier=2 PreemptMode=OFF
"""


@dataclasses.dataclass(frozen=True)
class Cluster:
    """A running one. `environment` is what its commands, and the jobs that they start, find."""

    folder: pathlib.Path
    environment: dict[str, str]

    def __call__(self, *command: str) -> str:
        """What a command of Slurm prints."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout

    def fact(self, job: str, name: str) -> str:
        """Of what scontrol tells of a job: JobState, Restarts, …"""
        told = self("scontrol", "--oneliner", "show", "job", job)
        return next(word.split("=", 1)[1] for word in told.split() if word.startswith(f"{name}="))

    def preempt(self, node: str) -> None:
        """Takes a node from the jobs of the partition `all` that are on it, for a moment, when they have saved."""
        where = ("--partition=urgent", f"--nodelist={node}", "--nodes=1", "--ntasks=4")
        self("sbatch", *where, "--output=/dev/null", "--wrap=true")

    def wait(self, until, seconds: float, told) -> None:
        """Until `until()`; after so many seconds fails, saying `told()`."""
        deadline = time.monotonic() + seconds
        while not until():
            assert time.monotonic() < deadline, told()
            time.sleep(0.2)


def missing() -> str:
    """Why there can't be one here; empty where there can."""
    if os.geteuid() != 0:
        return "a Slurm for tests needs root"
    absent = [command for command in COMMANDS if not shutil.which(command)]
    hint = "; apt-get install -y --no-install-recommends slurm-wlm munge"
    return f"not on PATH: {', '.join(absent)}{hint}" if absent else ""


@contextlib.contextmanager
def cluster():
    """Starts a `Cluster` and ends it, its jobs and daemons with it."""
    with tempfile.TemporaryDirectory(prefix="vidgen-slurm-") as name, contextlib.ExitStack() as stack:
        folder = pathlib.Path(name)
        folder.chmod(0o755)  # munge wants its socket where all can reach it
        (folder / "munge.key").write_bytes(os.urandom(128))
        (folder / "munge.key").chmod(0o600)
        (folder / "state").mkdir()
        config = CONFIG.format(host=socket.gethostname(), folder=folder, ports=_ports(3))
        (folder / "slurm.conf").write_text(config)
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SBATCH", "PYTEST"))}
        running = Cluster(folder, environment | {"SLURM_CONF": str(folder / "slurm.conf")})

        def daemon(*command: str) -> None:
            log = stack.enter_context(open(folder / f"{command[0]}.out", "ab"))
            process = subprocess.Popen(command, stdout=log, stderr=log, env=running.environment, start_new_session=True)
            stack.callback(_end, process)

        files = (
            f"--{what}-file={folder}/munge.{ext}" for what, ext in (("key", "key"), ("pid", "pid"), ("log", "log"))
        )
        seed = f"--seed-file={folder}/munge.seed"
        # --force: the folder lies in /tmp, which it would rather not.
        daemon("munged", "--foreground", "--force", f"--socket={folder}/munge.socket", *files, seed)
        running.wait((folder / "munge.socket").exists, 20, (folder / "munged.out").read_text)
        daemon("slurmctld", "-D")
        for node in ("n1", "n2"):
            daemon("slurmd", "-D", "-N", node)

        def idle() -> bool:
            done = subprocess.run(
                ["sinfo", "-h", "-o", "%T %D"], env=running.environment, capture_output=True, text=True
            )
            return done.stdout.split() == ["idle", "2"]

        running.wait(idle, 40, lambda: "\n".join(log.read_text()[-2000:] for log in sorted(folder.glob("*.log"))))
        try:
            yield running
        finally:
            subprocess.run(["scancel", "--user=root"], env=running.environment, timeout=60)
            deadline = time.monotonic() + 20
            while time.monotonic() < deadline and running("squeue", "-h"):
                time.sleep(0.2)


def _ports(count: int) -> list[int]:
    """That nobody listens on now."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] for s in sockets]


def _end(process: subprocess.Popen) -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


@pytest.fixture(scope="session")
def slurm():
    """A cluster of two nodes of four CPUs (said to be), for the whole session."""
    if why := missing():
        pytest.skip(why)
    with cluster() as running:
        yield running
