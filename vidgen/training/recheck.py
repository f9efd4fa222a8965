"""Now and then, whether the devices give the same bits twice, and hold the same bits where they hold the same array.

Hardware that computes wrongly without saying so shows in neither. What is compared are sums over the bits, taken by
each device of its own piece, so that a check needs no second state and nothing large leaves a device.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from vidgen.config import ConfigError
from vidgen.parallel import processes
from vidgen.parallel.mesh import path_name
from vidgen.parallel.processes import Restartable
from vidgen.training import incidents
from vidgen.training.program import Program
from vidgen.training.state import TrainState
from vidgen.training.step import Batch

KIND = "silent corruption"  # of an incident
DETERMINISTIC = "on a GPU, set XLA_FLAGS=--xla_gpu_deterministic_ops=true"


@dataclasses.dataclass(frozen=True)
class Odd:
    """An array that devices hold in different bits.

    Attributes:
      array: its path.
      devices: places in `mesh.devices.flat` of those that differ from most of those that hold it.
      sure: whether there is a most; else `devices` are all that hold it.
    """

    array: str
    devices: tuple[int, ...]
    sure: bool


class Recheck:
    """Checks that the gradient of a step is the same twice, and that copies of the state are; compiled when used."""

    def __init__(self, program: Program, workdir: str):
        """`workdir`: where an incident is recorded."""
        self._program, self._workdir = program, workdir
        self._passed = False
        self._copies = functools.cache(self._of_copies)
        self._gradient = functools.cache(self._of_gradient)

    def __call__(self, done: int, state: TrainState, batch: Batch) -> None:
        """Looks at what the step after `done` steps is about to be given. All processes call it alike.

        Raises, on all of them, Restartable where devices disagree, and ConfigError where the program is not one that
        gives the same bits twice.
        """
        devices = list(self._program.mesh.devices.flat)
        joined = max(start for start, _ in self._program.steps if start <= done)
        try:
            if len(devices) > 1:
                check_copies(lambda: np.asarray(self._copies()(state)), state, devices)
            check_twice(lambda: np.asarray(self._gradient(joined)(state, batch)), devices, self._passed)
        except Restartable as e:
            if processes.is_lead():
                incidents.record(self._workdir, done, KIND, str(e))
            raise
        self._passed = True

    def _of_copies(self) -> Callable[[TrainState], jax.Array]:
        program = self._program
        return self._jitted(checksums(program.state_shardings, program.mesh), program.state_shardings)

    def _of_gradient(self, done: int) -> Callable[[TrainState, Batch], jax.Array]:
        program, gradient = self._program, self._program.gradient_after(done)
        whole = NamedSharding(program.mesh, P())
        sums = checksums((whole, program.state_shardings.params), program.mesh)

        def of(state: TrainState, batch: Batch) -> jax.Array:
            found = gradient(state, batch)
            return sums((found.loss, found.grads))

        return self._jitted(of, program.state_shardings, program.batch_shardings)

    def _jitted(self, function: Callable[..., jax.Array], *places: Any) -> Callable[..., jax.Array]:
        whole = NamedSharding(self._program.mesh, P())
        options = self._program.compiler_options
        return jax.jit(function, in_shardings=places, out_shardings=whole, compiler_options=options)


def checksums(shardings: Any, mesh: Mesh) -> Callable[[Any], jax.Array]:
    """Arrays in a tree of shardings on the mesh → [devices, arrays] u32: of each device's own piece, as it lies there.

    The sum of all bits, each number times an odd one of its place: no single bit can be another without showing.
    """
    specs = tuple(sharding.spec for sharding in jax.tree.leaves(shardings))

    def of_pieces(*pieces: jax.Array) -> jax.Array:
        return jnp.stack([_checksum(piece) for piece in pieces])[None]

    of_all = jax.shard_map(of_pieces, mesh=mesh, in_specs=specs, out_specs=P(mesh.axis_names), check_vma=False)
    return lambda tree: of_all(*jax.tree.leaves(tree))


def _checksum(x: jax.Array) -> jax.Array:
    """() u32."""
    kind = jnp.dtype(f"uint{8 * x.dtype.itemsize}")
    bits = x.astype(kind) if x.dtype == bool else jax.lax.bitcast_convert_type(x, kind)
    bits = bits.astype(jnp.uint32).reshape(-1)
    return jnp.sum(bits * (2 * jnp.arange(bits.size, dtype=jnp.uint32) + 1), dtype=jnp.uint32)


def check_copies(measure: Callable[[], np.ndarray], state: Any, devices: Sequence[jax.Device]) -> None:
    """Raises Restartable unless all that lies on several devices has the same bits on each of them.

    Args:
      measure: → `checksums` of the state, taken anew.
      state: arrays, or ShapeDtypeStructs with their shardings.
      devices: of the mesh, as they lie in it.
    """
    found = differing(measure(), state, devices)
    if not found:
        return
    lasting = bool(differing(measure(), state, devices))
    first, more = found[0], f" and {len(found) - 1} more arrays" if len(found) > 1 else ""
    who = "lies in other bits" if first.sure else "lies in bits that differ (which are right, no majority says)"
    again = "and again when it was read once more" if lasting else "though not when it was read once more"
    raise Restartable(
        f"silent corruption: {first.array}{more} {who} on {_named(devices, first.devices)}, {again}; the hardware "
        "there is not to be trusted: start again without it, and the run goes on from its last checkpoint"
    )


def differing(sums: np.ndarray, state: Any, devices: Sequence[jax.Device]) -> list[Odd]:
    """The arrays of which devices hold the same piece in different bits; arguments as of `check_copies`."""
    found = []
    for column, (path, x) in zip(sums.T.tolist(), jax.tree_util.tree_leaves_with_path(state), strict=True):
        pieces = collections.defaultdict(list)
        index = x.sharding.devices_indices_map(x.shape)
        for place, device in enumerate(devices):
            pieces[tuple(part.indices(n)[:2] for part, n in zip(index[device], x.shape, strict=True))].append(place)
        for places in pieces.values():
            (most, count), *others = collections.Counter(column[place] for place in places).most_common()
            if others:
                sure = 2 * count > len(places)
                odd = tuple(place for place in places if not sure or column[place] != most)
                found.append(Odd(path_name(path), odd, sure))
    return found


def check_twice(measure: Callable[[], np.ndarray], devices: Sequence[jax.Device], passed: bool) -> None:
    """Raises Restartable unless the gradient is the same twice; ConfigError where the program seems to be the cause.

    Args:
      measure: → `checksums` of the gradient, computed anew.
      devices: of the mesh, as they lie in it.
      passed: whether this has come out well before, and the program is one that can.
    """
    first, second = measure(), measure()
    if (first == second).all():
        return
    third = measure()
    agree = [(first == third).all(), (second == third).all()]
    if not any(agree) and not passed:
        raise ConfigError(
            "config.train.recheck_every: a gradient computed three times has other bits each time, and has never been "
            f"the same, so the program is not deterministic; {DETERMINISTIC}, or config.train.recheck_every=0"
        )
    odd = np.flatnonzero((first != second).any(axis=1))
    # What one device gets wrong before gradients are summed over devices is wrong on all of them.
    where = _named(devices, odd) if len(odd) < len(devices) or len(odd) == 1 else "any of the devices"
    which = "the second time" if agree[0] else "the first time" if agree[1] else "each of three times"
    raise Restartable(
        f"silent corruption: a gradient has other bits {which}, on {where}; the hardware is not to be trusted: start "
        "again without it, and the run goes on from its last checkpoint"
    )


def _named(devices: Sequence[jax.Device], places: Sequence[int]) -> str:
    """As in "cpu:1 of process 0"."""
    told = [f"{devices[i].platform}:{devices[i].id} of process {devices[i].process_index}" for i in places]
    return ", ".join(told if len(told) <= 8 else [*told[:8], f"and {len(told) - 8} more"])
