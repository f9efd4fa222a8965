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
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import jax
import numpy as np
from jax._src import distributed, xla_bridge  # the coordination service and gloo have no public door
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from vidgen.config import ConfigError
from vidgen.passing import passes
from vidgen.secrets import redacted

START_TIMEOUT = 300  # seconds to wait for the others at the start
TIMEOUT = 600  # and later, where one may still be writing or reading what others wait for
ASKING = 5  # and for the coordinator to say who is missing
RESTART = os.EX_TEMPFAIL  # exit status, 75, of what the user need not mend: started again, the run goes on
WHO = "vidgen/who/"  # where each says in which process of which machine it is
NAMES = ("VIDGEN_COORDINATOR", "VIDGEN_PROCESSES", "VIDGEN_PROCESS")

_agreements, _barriers = itertools.count(), itertools.count()


class Restartable(ConfigError):
    """What the user need not mend, as a process that has not come: started again, the run goes on."""

    exit_status = RESTART


def start() -> None:
    """Joins the other processes where the environment says that there are some. Call it before any device is touched.

    Does nothing on one process, and nothing when called again. Raises ConfigError.
    """
    if jax.distributed.is_initialized():
        return
    told = _told(os.environ)
    if told is not None:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        # It takes SIGTERM for itself, and lets the loop alone look for it, between steps: a compilation, an evaluation
        # or a drawing of samples would run to its end. StopSignal hears at once, of three signals, and Pulse tells all.
        jax.config.update("jax_enable_preemption_service", False)
        _join(told)
        if jax.process_count() > 1:
            logging.getLogger("absl").addFilter(_with_rank)
            _client().key_value_set(f"{WHO}{jax.process_index()}", f"pid {os.getpid()} on {socket.gethostname()}")
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
        _leave(f"vidgen: error: {text}", RESTART)

    # JAX's own timeout aborts the process, with a stack trace of C++ instead of a line.
    timer = threading.Timer(START_TIMEOUT, give_up)
    timer.daemon = True
    timer.start()
    try:
        jax.distributed.initialize(**told, **_kept_at_home(told), initialization_timeout=START_TIMEOUT + 60)
    except (RuntimeError, ValueError) as e:
        hint = "" if told else ", as far as JAX can find out who they are"
        text = f"{whom} could not join the others{where}{hint}: {' '.join(str(e).split())[:300]}"
        raise (Restartable if isinstance(e, RuntimeError) else ConfigError)(text) from None
    finally:
        timer.cancel()


def _kept_at_home(told: dict[str, Any]) -> dict[str, str]:
    """Where processes of one machine meet on its loopback, nobody else can reach what they listen on.

    The coordinator would listen on every network of the machine otherwise, and gloo on the one that its name stands
    for; neither asks who is there. Returns what `jax.distributed.initialize` needs beside `told`.
    """
    address = told.get("coordinator_address", "")
    host = address.rpartition(":")[0]
    if host not in ("127.0.0.1", "localhost", "[::1]"):
        return {}
    made = functools.partial(xla_bridge._jax.make_gloo_tcp_collectives, hostname=host.strip("[]"))
    xla_bridge._jax.make_gloo_tcp_collectives = made
    return {"coordinator_bind_address": address}


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

    Waits for process 0, so what it did before is done. Raises Restartable after `timeout` seconds.
    """
    if alone():
        return value
    key = f"vidgen/agree/{next(_agreements)}"
    if is_lead():
        _client().key_value_set(key, json.dumps(value))
        return json.loads(json.dumps(value))
    return json.loads(_timed("process 0", timeout, lambda ms: _client().blocking_key_value_get(key, ms), lambda: [0]))


def barrier(name: str, timeout: float = TIMEOUT) -> None:
    """Waits until every process is here; `name`, as in "to have opened the workdir", is for the message.

    Raises Restartable, which names those that have not come, after `timeout` seconds.
    """
    if alone():
        return
    key = f"vidgen/barrier/{next(_barriers)}"

    def meet(ms: int) -> None:
        _client().key_value_set(f"{key}/{jax.process_index()}", "")
        _client().wait_at_barrier(key, ms)

    def absent() -> list[int]:
        return sorted({*range(jax.process_count())} - {*_listed(f"{key}/")})

    _timed(f"all {jax.process_count()} processes {name}", timeout, meet, absent)


def gathered(key: str, text: str, timeout: float = TIMEOUT) -> list[str]:
    """What each process, in order, called this with, for process 0; the others get []. Every process calls it.

    `key`: of the coordinator's store, the same on all and not used before. Raises Restartable as `barrier` does.
    """
    _client().key_value_set(f"{key}/{jax.process_index()}", text)
    barrier("to have told process 0 what they found", timeout)
    return [text for _, text in sorted(_listed(f"{key}/").items())] if is_lead() else []


def names() -> dict[int, str]:
    """{process: "pid 12 on host"} of those that have started."""
    return _listed(WHO)


def preempted(step: int) -> bool:
    """Whether JAX's preemption service asks all processes to save after this step; each asks once a step.

    `start` leaves the service off. Where a program that calls us has started the processes by itself it is on, and has
    heard the SIGTERM that came before a `StopSignal` was there.
    """
    service = distributed.global_state.preemption_sync_manager
    return service is not None and service.reached_sync_point(step)


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
    what started them. The exit status is that of `exit_status`; Ctrl-C twice ends it by that signal.
    """
    try:
        yield
    except BaseException as e:
        if alone():
            raise
        if not isinstance(e, ConfigError | OSError | KeyboardInterrupt | SystemExit | jax.errors.JaxRuntimeError):
            print(redacted(traceback.format_exc()), file=sys.stderr, end="")
        text = " ".join(str(e).split())[:1000] or type(e).__name__
        _leave(f"vidgen {verb}: {rank()}: error: {text}", exit_status(e), isinstance(e, KeyboardInterrupt))


def exit_status(error: BaseException) -> int:
    """2: the user can mend it; 75: nobody need, a restart may do; 1: it should not have happened."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 1
    # A checkpoint that could not be written, or a clip read, because a server of files or another process was away: a
    # line for the user was raised from what says so, perhaps through another one.
    cause: BaseException = error
    while isinstance(cause, ConfigError) and not isinstance(cause, Restartable) and cause.__cause__:
        cause = cause.__cause__
    if isinstance(cause, Restartable) or passes(cause):
        return RESTART
    if cause is not error and isinstance(cause, jax.errors.JaxRuntimeError):
        return RESTART
    return 2 if isinstance(error, ConfigError | OSError) else 1


def _leave(text: str, status: int, interrupted: bool = False) -> NoReturn:
    """Says it and ends the process, without waiting for the others; `interrupted`: by SIGINT."""
    print(redacted(text), file=sys.stderr)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    if interrupted:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    os._exit(status)


def _client() -> Any:
    return distributed.global_state.client


def _timed(whom: str, timeout: float, act: Callable[[int], Any], absent: Callable[[], list[int]]) -> Any:
    """`act`, given milliseconds; Restartable names whom it waited for in vain."""
    found, error = _within(timeout + ASKING, lambda: act(round(1000 * timeout)))
    if found:
        return found[0]
    missing, _ = _within(ASKING, absent)
    known, _ = _within(ASKING, names)
    if not (missing and known):
        text = "process 0, the coordinator, does not answer"
    elif missing[0]:
        named = [f"process {p} ({known[0][p]})" if p in known[0] else f"process {p}" for p in missing[0][:8]]
        more = f" and {len(missing[0]) - 8} more" if len(missing[0]) > 8 else ""
        text = f"{', '.join(named)}{more} did not come"
    else:  # the others had given up before
        text = error[:200]
    raise Restartable(f"waited up to {timeout:g} s for {whom}, in vain: {text}")


def _listed(prefix: str) -> dict[int, str]:
    """{process: what it set under the prefix}."""
    return {int(key.rpartition("/")[2]): value for key, value in _client().key_value_dir_get(prefix)}


def _within(seconds: float, act: Callable[[], Any]) -> tuple[list[Any], str]:
    """([what `act` gives], ""), or ([], why) where it fails or takes longer: time limits of JAX's client are kept by
    the coordinator, and not where that is stopped.
    """
    found: list[Any] = []
    error: list[str] = []

    def acting() -> None:
        try:
            found.append(act())
        except jax.errors.JaxRuntimeError as e:
            error.append(" ".join(str(e).split()))

    thread = threading.Thread(target=acting, daemon=True)
    thread.start()
    thread.join(seconds)
    return found[:1], "".join(error)
