"""Bits that should be the same: of a gradient computed twice, of copies on several devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from vidgen.config import ConfigError
from vidgen.data import feed
from vidgen.data.sources import open_source
from vidgen.parallel.mesh import make_mesh
from vidgen.parallel.processes import Restartable
from vidgen.training import incidents, recheck
from vidgen.training.program import build
from vidgen.training.recheck import Recheck, check_copies, check_twice, checksums, differing

pytestmark = pytest.mark.usefixtures("quick_compiles")


def flipped(x, device, place=0, bit=0):
    """The same array, but for one bit in what one device holds."""
    pieces = []
    for shard in x.addressable_shards:
        own = np.array(shard.data)
        if shard.device == device:
            own.reshape(-1).view(f"u{own.itemsize}")[place] ^= np.array(1 << bit, f"u{own.itemsize}")
        pieces.append(jax.device_put(own, shard.device))
    return jax.make_array_from_single_device_arrays(x.shape, x.sharding, pieces)


@pytest.fixture(scope="module")
def mesh():
    return Mesh(np.asarray(jax.devices()[:4]).reshape(2, 2), ("data", "fsdp"))


@pytest.fixture(scope="module")
def arrays(mesh):
    """Some that lie whole on each device, in pairs, and in pieces of which each is there once."""
    made = {
        "whole": (jnp.arange(15, dtype=jnp.float32).reshape(3, 5), P()),
        "pairs": (jnp.arange(16, dtype=jnp.bfloat16).reshape(4, 4), P("fsdp")),
        "pieces": (jnp.arange(8, dtype=jnp.int32), P(("data", "fsdp"))),
        "one": (jnp.float32(3.0), P()),
    }
    return {name: jax.device_put(x, NamedSharding(mesh, spec)) for name, (x, spec) in made.items()}


@pytest.fixture(scope="module")
def measure(mesh, arrays):
    of = jax.jit(checksums(jax.tree.map(lambda x: x.sharding, arrays), mesh), out_shardings=NamedSharding(mesh, P()))
    return lambda tree: np.asarray(of(tree))


def test_every_bit_counts_and_so_does_its_place(measure, arrays):
    usual = measure(arrays)
    assert usual.shape == (4, 4) and usual.dtype == np.uint32
    columns = dict(zip(sorted(arrays), range(4), strict=True))
    for name, places, bits in (("whole", 15, 32), ("pairs", 8, 16), ("pieces", 2, 32), ("one", 1, 32)):
        for place, bit in {(0, 0), (places - 1, bits - 1), (places // 2, 7)}:
            other = measure(arrays | {name: flipped(arrays[name], jax.devices()[1], place, bit)})
            assert np.argwhere(other != usual).tolist() == [[1, columns[name]]], (name, place, bit)
    swapped = jnp.asarray(arrays["pieces"])[::-1]
    assert (measure(arrays | {"pieces": jax.device_put(swapped, arrays["pieces"].sharding)}) != usual).any()


def test_copies_that_differ_are_named_by_majority(measure, arrays):
    devices = jax.devices()[:4]
    check_copies(lambda: measure(arrays), arrays, devices)
    bad = arrays | {"whole": flipped(arrays["whole"], devices[2], 14, 30)}
    with pytest.raises(Restartable, match="whole lies in other bits on cpu:2 of process 0, and again"):
        check_copies(lambda: measure(bad), bad, devices)
    bad = arrays | {"pairs": flipped(arrays["pairs"], devices[3], 3, 1)}
    (odd,) = differing(measure(bad), bad, devices)
    assert odd.array == "pairs" and odd.devices == (1, 3) and not odd.sure  # two copies: none is in the majority
    with pytest.raises(Restartable, match="no majority says.* cpu:1 of process 0, cpu:3 of process 0"):
        check_copies(lambda: measure(bad), bad, devices)
    once = iter([measure(arrays | {"one": flipped(arrays["one"], devices[0])}), measure(arrays)])
    with pytest.raises(Restartable, match="one lies in other bits on cpu:0 .*though not when it was read once more"):
        check_copies(lambda: next(once), arrays, devices)
    bad = arrays | {"pieces": flipped(arrays["pieces"], devices[3])}
    check_copies(lambda: measure(bad), bad, devices)  # of which there are no copies: the gradient has to tell


def sums(*changed):
    found = np.ones((4, 3), np.uint32)
    for device in changed:
        found[device, 1] = device + 7
    return found


def measured(*results):
    left = iter(results)
    return lambda: next(left)


def test_a_gradient_that_differs_is_told_from_a_program_that_does():
    devices = jax.devices()[:4]
    check_twice(measured(sums(), sums()), devices, False)
    with pytest.raises(Restartable, match="other bits the second time, on cpu:2 of process 0"):
        check_twice(measured(sums(), sums(2), sums()), devices, False)
    with pytest.raises(Restartable, match="other bits the first time, on any of the devices"):
        check_twice(measured(sums(0, 1, 2, 3), sums(), sums()), devices, True)
    with pytest.raises(Restartable, match="each of three times"):
        check_twice(measured(sums(1), sums(2), sums(3)), devices, True)
    with pytest.raises(ConfigError, match="not deterministic; on a GPU, set XLA_FLAGS") as e:
        check_twice(measured(sums(1), sums(2), sums(3)), devices, False)
    assert not isinstance(e.value, Restartable)


def test_a_step_is_checked_on_a_mesh_and_a_flipped_bit_ends_the_run(tiny, tmp_path, monkeypatch):
    tiny.model.update(layers=1, unroll=1)
    tiny.text.layers = 0
    tiny.optimizer.name = "adamw"
    tiny.mesh.update(data=2, fsdp=2)
    program = build(tiny, make_mesh(tiny.mesh, tiny.rows.count, tiny.rows.tokens))
    source = open_source(tiny.data, "train")
    tokenizer = program.generator.tokenizer
    with feed.batches(source, feed.plan(source, tokenizer, tiny), tokenizer, tiny, 0, program.mesh) as batches:
        batch = next(batches)[0]
    state = program.init()
    check = Recheck(program, str(tmp_path))
    check(0, state, batch)
    check(0, state, batch)
    assert not incidents.read(str(tmp_path))

    kernel = state.params["head"]["kernel"] if "head" in state.params else jax.tree.leaves(state.params)[0]
    path = jax.tree_util.tree_leaves_with_path(state.params)
    (keys,) = (p for p, x in path if x is kernel)
    bad = flipped(kernel, jax.devices()[1], 0, 3)
    params = jax.tree_util.tree_map_with_path(lambda p, x: bad if p == keys else x, state.params)
    with pytest.raises(Restartable, match=f"{recheck.path_name(keys)} .*cpu:1 of process 0"):
        check(0, state.replace(params=params), batch)
    (row,) = incidents.read(str(tmp_path))
    assert row["kind"] == "silent corruption" and "cpu:1 of process 0" in row["text"]

    # Devices that add wrongly now and then: a program whose gradient differs.
    right, calls = check._gradient(0), []

    def wrong(state, batch):
        calls.append(0)
        return right(state, batch) + jnp.uint32(len(calls) == 2)

    monkeypatch.setattr(check, "_gradient", lambda done: wrong)
    with pytest.raises(Restartable, match="other bits the second time, on any of the devices"):
        check(0, state, batch)
    assert len(calls) == 3 and len(incidents.read(str(tmp_path))) == 2
