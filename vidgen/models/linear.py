"""The matrix product that every layer here is made of, and where its weight lies while it is used.

A weight is stored in pieces (`vidgen/parallel/rules.py`), gathered in `dtype` for a product, and dropped. Its gradient
is summed over the devices' tokens and scattered back into pieces in one go, in float32. Both are written out, device by
device, and not left to the compiler, which may choose to gather by an all-reduce or to sum a whole gradient on
every device (ZeRO, Rajbhandari et al., arXiv:1910.02054; tensor parallelism as in Megatron-LM, arXiv:1909.08053).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from vidgen.parallel.mesh import ROW_AXES
from vidgen.parallel.rules import Rules, spec_of

Dtype = jnp.dtype
WEIGHTS = "weights"  # what gathered weights are called by remat: never saved


@dataclasses.dataclass(frozen=True)
class Layout:
    """The mesh and the rules by which weights lie on it; hashable, a static attribute of modules.

    Attributes:
      rematerialised: whether the module is, by a policy that drops gathered weights and so gathers them
        once for all that the backward pass wants of them. Elsewhere a product gathers again by itself.
    """

    mesh: Mesh
    rules: Rules
    rematerialised: bool = False


@dataclasses.dataclass(frozen=True)
class Product:
    """How one product x [B,…,I] · w [I,O] lies on the mesh.

    Attributes:
      mesh: of the devices; None = one device, where nothing lies in pieces.
      stored: axes of w's pieces, (inputs, outputs), each in the order in which they are cut.
      over_context: whether x's tokens are in pieces over context; text and noise levels are whole there.
      precision: of the products.
      trained: whether w has a gradient; where not, none is computed, and x is not kept for it.
    """

    mesh: Mesh | None
    stored: tuple[tuple[str, ...], tuple[str, ...]]
    over_context: bool
    precision: str | None = None
    trained: bool = True

    @property
    def x(self) -> P:
        """Spec of x: its features are in pieces where the weight's inputs are over tensor."""
        return P(ROW_AXES, "context" if self.over_context else None, "tensor" if "tensor" in self.stored[0] else None)

    @property
    def y(self) -> P:
        """Spec of the product."""
        return P(ROW_AXES, "context" if self.over_context else None, "tensor" if "tensor" in self.stored[1] else None)

    @property
    def piece(self) -> P:
        """Spec of w as stored."""
        return P(*(axes if axes else None for axes in self.stored))

    @property
    def used(self) -> P:
        """Spec of w as used: whole but for tensor."""
        return P(*("tensor" if "tensor" in axes else None for axes in self.stored))

    def size(self, axis: str) -> int:
        """Devices along an axis."""
        return self.mesh.shape[axis] if self.mesh else 1

    def run(self, body: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
        """`body` on each device's own pieces."""
        if self.mesh is None:
            return body
        return jax.shard_map(body, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def gather(w: jax.Array, how: Product) -> jax.Array:
    """A stored weight [I,O] as it is used."""

    def body(w):
        for dimension, axes in enumerate(how.stored):
            for axis in reversed(axes):
                if axis != "tensor":
                    w = jax.lax.all_gather(w, axis, axis=dimension, tiled=True)
        return w

    return how.run(body, (how.piece,), how.used)(w)


def _dot(a: jax.Array, b: jax.Array, axes: tuple[Any, Any], how: Product) -> jax.Array:
    return jax.lax.dot_general(a, b, (axes, ((), ())), precision=how.precision, preferred_element_type=jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def product(x: jax.Array, w: jax.Array, whole: jax.Array | None, how: Product) -> jax.Array:
    """x · w in x's dtype; the gradient of the weight goes to w, its stored pieces, summed in w's dtype.

    Sums over the tensor axis are in x's dtype, as the activations that they are.

    Args:
      whole: w, gathered; None: gathered here, and again for the gradient, instead of being kept till then.
    """
    whole = gather(w.astype(x.dtype), how) if whole is None else whole

    def body(x, whole):
        y = _dot(x, whole, ((x.ndim - 1,), (0,)), how).astype(x.dtype)
        return jax.lax.psum(y, "tensor") if "tensor" in how.stored[0] else y

    return how.run(body, (how.x, how.used), how.y)(x, whole)


def _forward(x, w, whole, how):
    return product(x, w, whole, how), (x if how.trained else None, w, whole)


def _backward(how, saved, dy):
    x, w, whole = saved
    whole = gather(w.astype(dy.dtype), how) if whole is None else whole
    inputs, outputs = how.stored

    def backward(whole, dy):
        dx = _dot(dy, whole, ((dy.ndim - 1,), (1,)), how).astype(dy.dtype)
        return jax.lax.psum(dx, "tensor") if "tensor" in outputs else dx

    if not how.trained:
        return how.run(backward, (how.used, how.y), how.x)(whole, dy), None, None

    def body(x, whole, dy):
        dx = backward(whole, dy)
        tokens = tuple(range(x.ndim - 1))
        dw = _dot(x, dy, (tokens, tokens), how)
        for dimension, axes in enumerate(how.stored):
            for axis in axes:
                if axis == "context" and not how.over_context:
                    # All hold the same tokens and so the same gradient: each keeps its piece.
                    n = dw.shape[dimension] // jax.lax.axis_size(axis)
                    dw = jax.lax.dynamic_slice_in_dim(dw, jax.lax.axis_index(axis) * n, n, dimension)
                elif axis != "tensor":
                    dw = jax.lax.psum_scatter(dw, axis, scatter_dimension=dimension, tiled=True)
        # What shares the tokens and holds no piece of its own holds the sum.
        shared = (*ROW_AXES, "context") if how.over_context else ROW_AXES
        shared = tuple(axis for axis in shared if axis not in (*inputs, *outputs) and how.size(axis) > 1)
        return dx, jax.lax.psum(dw, shared) if shared else dw

    dx, dw = how.run(body, (how.x, how.used, how.y), (how.x, how.piece))(x, whole, dy)
    return dx, dw.astype(w.dtype), None


product.defvjp(_forward, _backward)


class Linear(nn.Module):
    """x [B,L,I] → [B,L,O]: as `nn.Dense`, with the weight laid out by `layout`.

    Where its parameters have a `lora_a` [I,r] and a `lora_b` [r,O] beside the kernel (`vidgen/models/lora.py` puts
    them there), it adds x · lora_a · lora_b, and the kernel has no gradient (Hu et al., arXiv:2106.09685).

    Attributes:
      features: O.
      layout: of the mesh; None = one device.
      over_context: whether the L tokens lie in pieces over the context axis.
    """

    features: int
    use_bias: bool = True
    dtype: Dtype = jnp.float32
    precision: str | None = None
    kernel_init: Callable[..., jax.Array] = nn.initializers.lecun_normal()
    layout: Layout | None = None
    over_context: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x, low_rank = x.astype(self.dtype), self.has_variable("params", "lora_a")
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features), jnp.float32)
        y = self._product(x, "kernel", kernel, trained=not low_rank)
        if low_rank:
            for name in ("lora_a", "lora_b"):
                x = self._product(x, name, self.get_variable("params", name))
            y = y + x
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
            y = (y.astype(jnp.float32) + bias).astype(self.dtype)  # so that its gradient too is summed in float32
        return y

    def _product(self, x: jax.Array, name: str, w: jax.Array, trained: bool = True) -> jax.Array:
        """x · w, the parameter of that name."""
        how, whole = self._how(name, w.shape, trained), None
        if self.layout is not None and self.layout.rematerialised:
            whole = gather(jax.lax.stop_gradient(w).astype(self.dtype), how)
            whole = checkpoint_name(whole, WEIGHTS)
        return product(x, w, whole, how)

    def _how(self, name: str, shape: tuple[int, int], trained: bool) -> Product:
        if self.layout is None:
            return Product(None, ((), ()), False, self.precision, trained)
        sizes = dict(self.layout.mesh.shape)
        spec = spec_of("/".join((*self.path, name)), shape, sizes, self.layout.rules)
        inputs, outputs = ((axes,) if isinstance(axes, str) else tuple(axes or ()) for axes in (*spec, None, None)[:2])
        return Product(self.layout.mesh, (inputs, outputs), self.over_context, self.precision, trained)
