"""A product whose weight lies in pieces equals the plain one, and gathers and reduces as written."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import AxisType, Mesh, NamedSharding

from vidgen.models.linear import Layout, Linear
from vidgen.parallel.mesh import AXES, ROWS, TOKENS
from vidgen.parallel.rules import PRESETS


def layout(**sizes):
    shape = tuple(sizes.get(axis, 1) for axis in AXES)
    return Layout(
        Mesh(np.asarray(jax.devices()).reshape(shape), AXES, axis_types=(AxisType.Auto,) * 4), PRESETS["default"]
    )


class Pair(nn.Module):
    """up to a wider layer and down again, by names that tensor parallelism knows, and one that it does not."""

    layout: Layout | None = None
    over_context: bool = True
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        def linear(features, name):
            return Linear(features, dtype=self.dtype, layout=self.layout, over_context=self.over_context, name=name)

        return linear(8, "embed")(linear(8, "down")(nn.gelu(linear(16, "up")(x))))


@pytest.fixture(scope="module")
def world():
    x = jax.random.normal(jax.random.key(1), (4, 8, 8))
    params = Pair().init(jax.random.key(0), x)
    target = jax.random.normal(jax.random.key(2), (4, 8, 8))
    return params, x, target


def loss(module, params, x, target):
    return jnp.sum((module.apply(params, x) - target) ** 2)


@pytest.mark.parametrize("over_context", [True, False], ids=["tokens", "text"])
@pytest.mark.parametrize(
    "sizes",
    [{"data": 2, "fsdp": 2}, {"fsdp": 2, "context": 2}, {"context": 2, "tensor": 2}, {"data": 2, "tensor": 2}],
    ids=str,
)
def test_any_mesh_equals_one_device(world, sizes, over_context):
    params, x, target = world
    want = jax.jit(jax.value_and_grad(lambda p, x: loss(Pair(), p, x, target), argnums=(0, 1)))(params, x)
    place = layout(**sizes)
    module = Pair(place, over_context)
    x = jax.device_put(x, NamedSharding(place.mesh, TOKENS if over_context else ROWS))
    got = jax.jit(jax.value_and_grad(lambda p, x: loss(module, p, x, target), argnums=(0, 1)))(params, x)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_weights_are_gathered_in_the_products_dtype_and_gradients_reduced_in_float32(world):
    params, x, target = world
    place = layout(fsdp=4)
    module = Pair(place, dtype=jnp.bfloat16)
    grads = jax.jit(jax.grad(lambda p, x: loss(module, p, x, target)))
    text = grads.lower(params, x).as_text()  # as written, before a CPU widens bfloat16
    gathered = re.findall(r"all_gather.*?-> tensor<([^>]*)>", text)
    reduced = re.findall(r"reduce_scatter.*?\n(?:.*\n)*?.*?-> tensor<([^>]*)>", text)
    # Three forward, and again backward but for the first, of whose input no gradient is asked.
    assert len(gathered) == 3 + 2 and all(shape.endswith("bf16") for shape in gathered)
    assert len(reduced) == 3 and all(shape.endswith("f32") for shape in reduced)
    assert {x.dtype for x in jax.tree.leaves(grads(params, x))} == {jnp.dtype("float32")}


def test_gradients_of_bfloat16_products_do_not_depend_on_the_mesh(world):
    """They leave the product in float32, on one device too, and are not rounded on the way."""
    params, x, target = world

    def gradient(place):
        module = Pair(place, dtype=jnp.bfloat16)
        return jax.jit(jax.grad(lambda p: loss(module, p, x.astype(jnp.bfloat16), target)))(params)

    grads = [gradient(place) for place in (None, layout(fsdp=2, context=2))]
    for a, b in zip(*map(jax.tree.leaves, grads), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    kernel = grads[0]["params"]["embed"]["kernel"]
    assert np.any(np.asarray(kernel) != np.asarray(kernel.astype(jnp.bfloat16).astype(jnp.float32)))


@pytest.mark.parametrize("sizes", [{}, {"fsdp": 2, "context": 2}, {"context": 2, "tensor": 2}], ids=str)
def test_a_low_rank_update_is_a_product_beside_the_kernel(world, sizes):
    """On any mesh, x · (kernel + a · b) and its gradients, and none of the kernel's."""
    params, x, target = world
    place = layout(**sizes) if sizes else None
    low = jax.tree.map(jnp.copy, params)
    for name, layer in low["params"].items():
        keys = jax.random.split(jax.random.key(len(name)), 2)
        layer["lora_a"] = jax.random.normal(keys[0], (layer["kernel"].shape[0], 2))
        layer["lora_b"] = jax.random.normal(keys[1], (2, layer["kernel"].shape[1]))

    def plain(p, x):
        whole = {
            n: {"kernel": q["kernel"] + q["lora_a"] @ q["lora_b"], "bias": q["bias"]} for n, q in p["params"].items()
        }
        return loss(Pair(), {"params": whole}, x, target)

    want = jax.jit(jax.value_and_grad(plain, argnums=(0, 1)))(low, x)
    if place:
        x = jax.device_put(x, NamedSharding(place.mesh, TOKENS))
    got = jax.jit(jax.value_and_grad(lambda p, x: loss(Pair(place), p, x, target), argnums=(0, 1)))(low, x)
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
    np.testing.assert_allclose(got[1][1], want[1][1], rtol=1e-4, atol=1e-6 * float(jnp.abs(want[1][1]).max()))
    for name, layer in got[1][0]["params"].items():
        assert not np.any(layer["kernel"])
        for half in ("lora_a", "lora_b", "bias"):
            like = want[1][0]["params"][name][half]
            np.testing.assert_allclose(
                layer[half], like, rtol=1e-4, atol=1e-4 * float(jnp.abs(like).max()), err_msg=name
            )
