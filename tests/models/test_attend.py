import collections
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding

from vidgen.config import ConfigError, base
from vidgen.models import attend as attending
from vidgen.models.attend import Attending, attend, executed_pairs, from_config
from vidgen.parallel.mesh import AXES, TOKENS

B, H, S, L, D = 2, 4, 64, 24, 8
# Segments that cross the borders of devices, a clip without text, padding at the end and over a whole device.
IDS = np.stack([np.repeat([1, 2, 3, 0], [13, 30, 10, 11]), np.repeat([1, 2, 0], [5, 40, 19])]).astype(np.int32)
TEXT = np.stack([np.repeat([1, 3, 0], [9, 9, 6]), np.repeat([1, 2, 0], [4, 15, 5])]).astype(np.int32)
NAMES = ("attention_out", "attention_lse")


def mesh_of(**sizes):
    shape = [sizes.get(axis, 1) for axis in AXES]
    devices = np.asarray(jax.devices()[: np.prod(shape)]).reshape(shape)
    return Mesh(devices, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def arrays():
    r = np.random.default_rng(0)
    return [jnp.asarray(r.normal(size=(B, H, n, D)), jnp.float32) for n in (S, S, S, L, L, S)]


def program(hows, sort=False):
    """q, k, v, text k, text v, cotangent → for each `how`: outputs and all gradients, the first with text too."""

    def one(how, cross, *args):
        def loss(q, k, v, text_k, text_v, g):
            outs = [attend(q, k, v, IDS, IDS, how, windows=sort)]
            outs += [attend(q, text_k, text_v, IDS, TEXT, how, shared_keys=True)] if cross else []
            return sum(jnp.sum(out * g) for out in outs), outs

        (_, outs), grads = jax.value_and_grad(loss, range(5 if cross else 3), has_aux=True)(*args)
        return outs, grads

    return jax.jit(lambda *args: [one(how, i == 0, *args) for i, how in enumerate(hows)])


@pytest.fixture(scope="module")
def single():
    """Of one device: with text, and without."""
    return program([Attending()] * 2)(*arrays())


def assert_equal(found, single):
    """Output by output, gradient by gradient, to 1e-5 of the largest number in each."""
    for i, one in enumerate(found):
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(single[min(i, 1)]), strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * float(np.max(np.abs(b))), err_msg=f"the {i}th way")


ALL = {
    "context 4": (
        {"context": 4},
        [("gather", 1), ("ring", 1), ("local", 4), ("gather", 2), ("ring", 2)],
    ),
    "context 2 x tensor 2": ({"context": 2, "tensor": 2}, [("gather", 1), ("ring", 1), ("local", 2)]),
    "fsdp 2 x context 2": ({"fsdp": 2, "context": 2}, [("gather", 1), ("ring", 1), ("local", 2)]),
    "data 2 x tensor 2": ({"data": 2, "tensor": 2}, [("local", 1)]),
    "one device": ({}, [("local", 1)]),
}


@pytest.mark.parametrize("name", ALL)
def test_each_strategy_on_each_mesh_equals_one_device(name, single):
    sizes, ways = ALL[name]
    mesh = mesh_of(**sizes)
    kernels = ("dense", "blockwise") if len(ways) == 1 else ("blockwise",)
    hows = [Attending(kernel, outer, inner, mesh, 8) for kernel in kernels for outer, inner in ways]
    placed = [jax.device_put(x, NamedSharding(mesh, jax.P(TOKENS[0], "tensor", None))) for x in arrays()]
    assert_equal(program(hows, sort="fsdp" in name)(*placed), single)


def test_dense_gathers_too(single):
    assert_equal(program([Attending("dense", "gather", 2, mesh_of(context=4))])(*arrays()), single)


@pytest.mark.parametrize("outer, inner", [("ring", 1), ("gather", 2)])
def test_saved_names_spare_the_backward_pass_the_forward_loop_on_a_mesh(outer, inner):
    how = Attending("blockwise", outer, inner, mesh_of(context=4), 16)
    q, k, v, *_ = arrays()

    def loops(policy):
        def f(q, k, v):
            return jnp.sum(jnp.sin(attend(jnp.sin(q), k, v, IDS, IDS, how)))

        return str(jax.make_jaxpr(jax.grad(jax.checkpoint(f, policy=policy)))(q, k, v)).count("while[")

    saved, none = loops(jax.checkpoint_policies.save_only_these_names(*NAMES)), loops(None)
    forward = str(jax.make_jaxpr(lambda q, k, v: attend(q, k, v, IDS, IDS, how))(q, k, v)).count("while[")
    assert 0 < forward == none - saved


def test_attending_is_hashable_and_says_what_it_does():
    mesh = mesh_of(context=4)
    assert len({Attending(mesh=mesh), Attending(mesh=mesh), Attending("blockwise", mesh=mesh)}) == 2
    assert Attending().strategy == "local"
    assert Attending(outer="ring", ulysses=2, mesh=mesh).strategy == "ulysses+ring"
    assert Attending(ulysses=4, mesh=mesh).strategy == "ulysses"
    assert Attending("splash", "ring", 1, mesh).computes() == "blockwise"
    assert Attending("splash", "ring", 1, mesh).computes(shared_keys=True) == "splash"
    assert Attending("cudnn").computes(windows=True) == "blockwise"


def test_shapes_that_do_not_belong_together_are_refused():
    q, k, v, text_k, *_ = arrays()
    with pytest.raises(AssertionError):
        attend(q, k, text_k, IDS, IDS, Attending())
    with pytest.raises(AssertionError):
        attend(q, k, v, IDS, TEXT, Attending())


def config_of(**changes):
    config = base()
    for key, value in changes.items():
        node, leaf = key.split("__")
        config[node][leaf] = value
    return config


@pytest.mark.parametrize(
    "heads, sizes, changes, wanted",
    [
        (6, {"tensor": 2}, {}, ("local", 1)),
        (8, {"context": 4}, {}, ("local", 4)),
        (6, {"context": 4}, {}, ("gather", 2)),
        (3, {"context": 4}, {}, ("gather", 1)),
        (8, {"context": 2, "tensor": 2}, {}, ("local", 2)),
        (8, {"context": 4}, {"mesh__ulysses": 2}, ("gather", 2)),
        (8, {"context": 4}, {"mesh__attention": "ring"}, ("ring", 1)),
        (6, {"context": 4}, {"mesh__attention": "ulysses+ring"}, ("ring", 2)),
        (8, {"context": 4}, {"mesh__attention": "ulysses+ring"}, ("local", 4)),
        (8, {"context": 4}, {"mesh__attention": "ulysses+ring", "mesh__ulysses": 2}, ("ring", 2)),
        (6, {}, {"mesh__attention": "ring"}, ("local", 1)),
    ],
)
def test_the_strategy_of_a_config(heads, sizes, changes, wanted):
    how = from_config(config_of(**changes), mesh_of(**sizes), "cpu", heads=heads)
    assert (how.outer, how.ulysses) == wanted


GIGABYTES = {"rows__tokens": 61440, "rows__count": 1, "model__width": 768}


@pytest.mark.parametrize(
    "platform, changes, wanted",
    [
        ("cpu", {"rows__tokens": 256}, "dense"),
        ("cpu", {"rows__tokens": 1024}, "blockwise"),
        ("tpu", {"rows__tokens": 256}, "dense"),
        ("tpu", {"rows__tokens": 61440}, "splash"),
        ("gpu", {"rows__tokens": 256}, "dense"),
        ("gpu", {"rows__tokens": 4096}, "cudnn"),
        ("gpu", GIGABYTES, "blockwise"),  # a mask of 7 GiB
        ("gpu", GIGABYTES | {"rows__segments": 1}, "cudnn"),  # no mask
        ("gpu", {"rows__tokens": 4096, "model__heads": 2}, "blockwise"),  # heads 192 wide
        ("gpu", {"rows__tokens": 4096, "model__attention": "dense"}, "dense"),
    ],
)
def test_the_kernel_of_a_config(platform, changes, wanted):
    how = from_config(config_of(**changes), None, platform)
    assert how.kernel == wanted and how.strategy == "local"
    assert how.one_clip == (changes.get("rows__segments") == 1)


@pytest.mark.parametrize(
    "platform, sizes, changes, message",
    [
        ("cpu", {"tensor": 4}, {}, "mesh.tensor=4: 6 heads .* tensor can be 1, 2, 3, 6"),
        ("cpu", {"context": 4}, {"mesh__attention": "ulysses"}, "context=4; context can be 1, 2, 3, 6, .* 2 x 2"),
        ("cpu", {"context": 4}, {"mesh__attention": "ulises"}, "did you mean ulysses"),
        ("cpu", {"context": 4}, {"mesh__ulysses": 3}, "ulysses=3: expected a divisor .* context=4: 1, 2"),
        ("cpu", {"context": 4}, {"mesh__ulysses": 2, "mesh__attention": "ring"}, "no meaning with .*=ring"),
        ("cpu", {"context": 4}, {"rows__tokens": 1023}, "1023 tokens .*context=4; nearest: 1024"),
        ("cpu", {}, {"model__attention": "flash"}, "'flash': known are auto, dense, blockwise, splash, cudnn"),
        ("cpu", {}, {"model__attention": "splash"}, "runs on a tpu, and this is for a cpu"),
        ("tpu", {}, {"model__attention": "cudnn"}, "runs on a gpu, and this is for a tpu"),
        ("tpu", {}, {"rows__tokens": 32400}, "multiple of 128; nearest: 32384 tokens"),
        ("tpu", {"context": 4}, {"rows__tokens": 32640}, "8160 tokens .* context=4 .* nearest: 32768 tokens"),
        ("gpu", {}, {"model__attention": "cudnn", "model__heads": 2}, "192 wide .* multiple of 8 up to 128"),
    ],
)
def test_what_does_not_fit_is_told_with_what_would(platform, sizes, changes, message):
    with pytest.raises(ConfigError, match=message) as e:
        from_config(config_of(**changes), mesh_of(**sizes), platform)
    assert "\n" not in str(e.value)


def test_cudnn_wants_bfloat16():
    config = config_of(model__attention="cudnn")
    config.dtype = "float32"
    with pytest.raises(ConfigError, match="expected bfloat16"):
        from_config(config, None, "gpu")
    config.model.attention = "auto"
    assert from_config(config, None, "gpu").kernel == "blockwise"


def count(q_ids, k_ids, q_block, k_block):
    """Pairs in blocks whose ranges of ids overlap, block by block."""
    total = 0
    for q in range(0, len(q_ids), q_block):
        for k in range(0, len(k_ids), k_block):
            a, b = ([i for i in ids if i] for ids in (q_ids[q : q + q_block], k_ids[k : k + k_block]))
            total += q_block * k_block * bool(a and b and min(a) <= max(b) and min(b) <= max(a))
    return total


def test_executed_pairs_are_those_of_the_blocks_that_run():
    mesh, whole = mesh_of(context=4), B * S * S
    wanted = sum(count(row, row, 16, 16) for row in IDS.tolist())
    assert wanted < whole
    assert executed_pairs(IDS, IDS, Attending("dense")) == executed_pairs(IDS, IDS, Attending("cudnn")) == whole
    assert executed_pairs(IDS, IDS, Attending("dense", "gather", 2, mesh)) == whole
    for outer, inner in (("local", 4), ("gather", 1), ("gather", 2), ("ring", 1), ("ring", 2)):
        how = Attending("blockwise", outer, inner, mesh, 16)
        assert executed_pairs(IDS, IDS, how) == wanted, how
    assert executed_pairs(IDS, TEXT, Attending("blockwise", "ring", 1, mesh, 8), shared_keys=True) == sum(
        count(row, text, 8, 8) for row, text in zip(IDS.tolist(), TEXT.tolist(), strict=True)
    )
    assert executed_pairs(IDS, TEXT, Attending("dense", "ring", 1, mesh), shared_keys=True) == B * S * L
    # Two clips of 300 and 340 tokens in blocks of 128, which splash takes for 640: the third holds both.
    long = np.repeat([[1, 2]], [300, 340], axis=1).astype(np.int32)
    assert executed_pairs(long, long, Attending("splash", block=128)) == count(
        long[0].tolist(), long[0].tolist(), 128, 128
    )


@pytest.mark.parametrize("outer", ["gather", "ring"])
def test_executed_pairs_count_the_blocks_that_a_mesh_visits(outer, monkeypatch):
    """Each visit of a block, on any device, is told to the host."""
    visits, real = collections.Counter(), attending.blockwise.active

    def told(q_ids, k_ids, q_block, k_block):
        pairs, n = real(q_ids, k_ids, q_block, k_block)
        jax.debug.callback(lambda n: visits.update(pairs=int(n) * q_block * k_block), n)
        return pairs, n

    monkeypatch.setattr(attending.blockwise, "active", told)
    how = Attending("blockwise", outer, 1, mesh_of(context=2), 8)
    q, k, v, *_ = arrays()
    jax.block_until_ready(jax.jit(lambda q, k, v: attend(q, k, v, IDS, IDS, how))(q, k, v))
    jax.effects_barrier()
    assert visits["pairs"] == executed_pairs(IDS, IDS, how)


EIGHT = """
import jax
jax.config.update("jax_num_cpu_devices", 8)
import jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, Mesh
from vidgen.models.attend import Attending, attend
from vidgen.parallel.mesh import AXES

r = np.random.default_rng(0)
q, k, v = jnp.asarray(r.normal(size=(3, 2, 2, 32, 4)), jnp.float32)
ids = jnp.asarray(np.repeat([[1, 2, 0], [1, 2, 3]], [10, 18, 4], axis=1), jnp.int32)
mesh = Mesh(np.asarray(jax.devices()).reshape(1, 2, 4, 1), AXES, axis_types=(AxisType.Auto,) * 4)

def gradient(how):
    return jax.jit(jax.grad(lambda *x: jnp.sum(jnp.sin(attend(*x, ids, ids, how))), (0, 1, 2)))(q, k, v)

want = gradient(Attending())
for outer in ("gather", "ring"):
    for a, b in zip(gradient(Attending("blockwise", outer, 2, mesh, 8)), want):
        print(float(jnp.abs(a - b).max() / jnp.abs(b).max()))
"""


def test_two_dimensions_of_context_beside_another_axis():
    """Groups of the context axis (2 x 2) in each of two fsdp groups: eight devices."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    ran = subprocess.run([sys.executable, "-c", EIGHT], capture_output=True, text=True, check=True, env=environment)
    errors = [float(line) for line in ran.stdout.split()]
    assert len(errors) == 6 and max(errors) < 1e-5
