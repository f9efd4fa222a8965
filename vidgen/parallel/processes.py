"""Several processes that train as one: how they start, agree, wait for each other, and end.

All of them run the same program. The environment says who they are, in one of three ways:

    VIDGEN_COORDINATOR=HOST:PORT VIDGEN_PROCESSES=N VIDGEN_PROCESS=0…N-1     said outright; launch/local.py does
    an srun of several tasks, or several TPU_WORKER_HOSTNAMES                found by JAX's own cluster detection
    VIDGEN_DISTRIBUTED=auto                                                  the same, where only the user knows

VIDGEN_DISTRIBUTED=off starts one process, whatever there is. Processes meet at the coordinator, which process 0 runs,
and a workdir must lie where all of them see it.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import logging
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax._src import distributed  # the coordination service has no public door
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from vidgen.config import ConfigError

START_TIMEOUT = 300  # seconds to wait for the others at the start
TIMEOUT = 600  # and later, where one may still be writing or reading what others wait for
NAMES = ("VIDGEN_COORDINATOR", "VIDGEN_PROCESSES", "VIDGEN_PROCESS")

_agreements, _barriers = itertools.count(), itertools.count()


def start() -> None:
    """Joins the other processes where the environment says that there are some. Call it before any device is touched.

    Does nothing on one process, and nothing when called again. Raises ConfigError.
    """
    if jax.distributed.is_initialized():
        return
    told = _told(os.environ)
    if told is not None:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        # It would swallow each SIGTERM until the loop is there to look; StopSignal and Pulse do its work.
        jax.config.update("jax_enable_preemption_service", False)
        _join(told)
        if jax.process_count() > 1:
            logging.getLogger("absl").addFilter(_with_rank)
    elif jax.process_count() > 1:  # a TPU pod's devices know of each other, but nothing else would
        raise ConfigError(
            f"{jax.process_count()} processes share the devices, and have not been introduced; "
            "set VIDGEN_DISTRIBUTED=auto in the environment of each"
        )


def _join(told: dict[str, Any]) -> None:
    whom = f"process {told['process_id']} of {told['num_processes']}" if told else "this process"
    where = f" at {told['coordinator_address']}" if told else ""

    def give_up() -> None:
        text = f"{whom} waited {START_TIMEOUT} s for the others to meet{where}; do all run, and can they reach it?"
        print(f"vidgen: error: {text}", file=sys.stderr, flush=True)
        os._exit(2)

    # JAX's own timeout aborts the process, with a stack trace of C++ instead of a line.
    timer = threading.Timer(START_TIMEOUT, give_up)
    timer.daemon = True
    timer.start()
    try:
        jax.distributed.initialize(**told, initialization_timeout=START_TIMEOUT + 60)
    except (RuntimeError, ValueError) as e:
        hint = "" if told else ", as far as JAX can find out who they are"
        raise ConfigError(f"{whom} could not join the others{where}{hint}: {' '.join(str(e).split())[:300]}") from None
    finally:
        timer.cancel()


def _told(env: dict[str, str] | os._Environ) -> dict[str, Any] | None:
    """What `jax.distributed.initialize` needs to be told, {} where it finds out by itself, None for one process."""
    mode = env.get("VIDGEN_DISTRIBUTED", "")
    if mode not in ("", "auto", "off"):
        raise ConfigError(f"VIDGEN_DISTRIBUTED={mode}: expected auto or off")
    if mode == "off":
        return None
    given = [name for name in NAMES if name in env]
    if given:
        if missing := [name for name in NAMES if name not in env]:
            raise ConfigError(f"{given[0]} is set but not {' and '.join(missing)}; set all three or none")
        count, rank = (_integer(env, name) for name in NAMES[1:])
        host, colon, port = env[NAMES[0]].rpartition(":")
        if not (host and colon and port.isdigit()):
            raise ConfigError(f"VIDGEN_COORDINATOR={env[NAMES[0]]}: expected HOST:PORT, the same for every process")
        if not 0 <= rank < count:
            raise ConfigError(f"VIDGEN_PROCESS={rank}: expected 0 to {count - 1}, since VIDGEN_PROCESSES={count}")
        return {"coordinator_address": env[NAMES[0]], "num_processes": count, "process_id": rank} if count > 1 else None
    # libtpu may put a warning in the place of names, with commas of its own.
    hosts = re.fullmatch(r"[^\s,]+(,[^\s,]+)+", env.get("TPU_WORKER_HOSTNAMES", ""))
    several = hosts or env.get("SLURM_STEP_NUM_TASKS", "1") != "1"
    return {} if several or mode == "auto" else None


def _integer(env: dict[str, str] | os._Environ, name: str) -> int:
    try:
        return int(env[name])
    except ValueError:
        raise ConfigError(f"{name}={env[name]}: expected a whole number") from None


def _with_rank(record: logging.LogRecord) -> bool:
    if not str(record.msg).startswith("process "):
        record.msg = f"process {jax.process_index()}: {record.msg}"
    return True


def is_lead() -> bool:
    """Whether this is process 0, which alone writes what a run has one of."""
    return jax.process_index() == 0


def alone() -> bool:
    """Whether there is one process."""
    return jax.process_count() == 1


def rank() -> str:
    """As in "process 1 of 4", for messages."""
    return f"process {jax.process_index()} of {jax.process_count()}"


def agree(value: Any, timeout: float = TIMEOUT) -> Any:
    """What process 0 called this with, as JSON brings it back; every process calls it, in the same order.

    Waits for process 0, so what it did before is done. Raises ConfigError after `timeout` seconds.
    """
    if alone():
        return value
    key = f"vidgen/agree/{next(_agreements)}"
    if is_lead():
        _client().key_value_set(key, json.dumps(value))
        return json.loads(json.dumps(value))
    return json.loads(_timed("process 0", timeout, lambda ms: _client().blocking_key_value_get(key, ms)))


def barrier(name: str, timeout: float = TIMEOUT) -> None:
    """Waits until every process is here; raises ConfigError after `timeout` seconds. `name` is for the message."""
    if jax.process_count() > 1:
        key = f"vidgen/barrier/{next(_barriers)}"
        _timed(f"all {jax.process_count()} processes: {name}", timeout, lambda ms: _client().wait_at_barrier(key, ms))


class Pulse:
    """A few numbers of each process, told to all of them every step without anyone waiting.

    The numbers go over the devices behind the step that was just started. What is returned are those of the call
    before, the same on every process, which is what lets all of them stop after the same step. On one process it is
    the numbers themselves, at once.
    """

    def __init__(self, count: int):
        """`count`: how many numbers."""
        self._flying: jax.Array | np.ndarray = np.zeros((jax.process_count(), count), np.float32)

    def __call__(self, *values: float) -> np.ndarray:
        """[processes, count] f32. Every process calls it once a step."""
        mine = np.asarray(values, np.float32)
        if alone():
            return mine[None]
        before, self._flying = self._flying, _gather(mine)
        return np.asarray(before)


def _gather(mine: np.ndarray) -> jax.Array:
    """[k] of each process → [processes, k], on all of them, under way."""
    rows, pick = _gatherer()
    each = jax.make_array_from_callback((jax.device_count(), len(mine)), rows, lambda _: mine[None])
    return pick(each)


@functools.cache
def _gatherer() -> tuple[NamedSharding, Callable[[jax.Array], jax.Array]]:
    """(the sharding of a row a device, what brings each process's first row to all)."""
    devices = jax.devices()
    mesh = Mesh(np.asarray(devices), ("device",), axis_types=(AxisType.Auto,))
    ranks = [d.process_index for d in devices]
    firsts = np.asarray([ranks.index(process) for process in range(jax.process_count())])
    return NamedSharding(mesh, P("device")), jax.jit(lambda x: x[firsts], out_shardings=NamedSharding(mesh, P()))


def put(tree: Any, shardings: Any) -> Any:
    """NumPy arrays that every process holds alike → global arrays in a tree of shardings."""

    def place(x: np.ndarray, sharding: NamedSharding) -> jax.Array:
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(place, tree, shardings)


@contextlib.contextmanager
def as_one(verb: str) -> Iterator[None]:
    """Where several processes run, an error inside ends this one at once, with a line that names it.

    Python's ordinary way out would wait for the others at the coordinator, and they for this one in the next
    collective. That a process is gone is what ends the others: by their connections (gloo), by the heartbeat, or by
    what started them. Exit status: 2 for what the user can mend, 1 for all else; Ctrl-C twice ends it by that signal.
    """
    try:
        yield
    except BaseException as e:
        if alone():
            raise
        status = 2 if isinstance(e, ConfigError | OSError) else 1
        if not isinstance(e, ConfigError | OSError | KeyboardInterrupt | jax.errors.JaxRuntimeError):
            traceback.print_exc()
        text = " ".join(str(e).split())[:1000] or type(e).__name__
        print(f"vidgen {verb}: {rank()}: error: {text}", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        if isinstance(e, KeyboardInterrupt):
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        os._exit(status)


def _client() -> Any:
    return distributed.global_state.client


def _timed(whom: str, timeout: float, act: Callable[[int], Any]) -> Any:
    """`act`, given milliseconds."""
    try:
        return act(round(1000 * timeout))
    except jax.errors.JaxRuntimeError as e:
        text = " ".join(str(e).split())[:200]
        raise ConfigError(f"waited up to {timeout:g} s for {whom}, in vain: {text}") from None
