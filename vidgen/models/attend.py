"""One `attend` for every device and every mesh: which kernel computes, and how a row's devices share its tokens.

The two choices are apart. Kernels (`vidgen/models/kernels/`) work on the arrays of one device; strategies
(`vidgen/parallel/context.py`) decide which queries and keys a device has.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math

import chex
import jax
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from vidgen.config import ConfigError
from vidgen.models.kernels import blockwise, cudnn, dense
from vidgen.models.windows import sort_by_id
from vidgen.parallel import context
from vidgen.parallel.mesh import AXES, ROW_AXES, TOKENS

KERNELS = ("dense", "blockwise", "splash", "cudnn")
STRATEGIES = ("gather", "ring", "ulysses", "ulysses+gather", "ulysses+ring")
PLATFORMS = ("cpu", "tpu", "gpu")
# Tokens a row from which on `auto` goes from dense to a kernel that holds no whole matrix of scores. On a CPU they meet
# at about 256 tokens of one clip, forward and gradient; from 512 on blockwise takes half as long.
LONG = {"cpu": 384, "tpu": 1024, "gpu": 1024}
BLOCK = {"cpu": 256, "tpu": 512, "gpu": 512}
MASK_BYTES = 2**30  # of cudnn's mask on a device, at most, before `auto` takes blockwise
CROSS_NAMES = ("cross_out", "cross_lse")


@dataclasses.dataclass(frozen=True)
class Attending:
    """How attention is computed. Hashable, so that a Flax module can have it as an attribute.

    Attributes:
      kernel: dense | blockwise | splash | cudnn, on the arrays of a device.
      outer: what the context axis does beyond ulysses: local (nothing, it has no more devices) | gather | ring. The
        ring always computes with the blockwise kernel, the one that gives a log-sum-exp to merge by.
      ulysses: neighbouring devices of the context axis that exchange heads for tokens.
      mesh: None for a single device.
      block: queries and keys in a block of scores, at most, of blockwise and splash.
      one_clip: rows hold one clip each and its text, with padding behind them; spares cudnn a mask.
    """

    kernel: str = "dense"
    outer: str = "local"
    ulysses: int = 1
    mesh: Mesh | None = None
    block: int = 512
    one_clip: bool = False

    @property
    def strategy(self) -> str:
        """As `config.mesh.attention` spells it; local where a device has all tokens."""
        named = ["ulysses"] * (self.ulysses > 1) + [self.outer] * (self.outer != "local")
        return "+".join(named) or "local"

    @property
    def groups(self) -> tuple[context.Groups, context.Groups]:
        """Places along the context axis: those that `outer` runs over, and neighbours that exchange heads."""
        return context.split(self.mesh.shape["context"], self.ulysses)

    @property
    def rounds(self) -> int:
        """Devices of the context axis that `outer` runs over."""
        return (self.mesh.shape["context"] if self.mesh else 1) // self.ulysses

    def computes(self, windows: bool = False, shared_keys: bool = False) -> str:
        """The kernel that really runs: blockwise for a ring, and for windows where only a mask would do for cudnn."""
        if (self.outer == "ring" and not shared_keys) or (windows and self.kernel == "cudnn"):
            return "blockwise"
        return self.kernel


def attend(
    q_BxHxSxD: jax.Array,
    k_BxHxLxD: jax.Array,
    v_BxHxLxD: jax.Array,
    q_ids_BxS: jax.Array,
    k_ids_BxL: jax.Array,
    how: Attending,
    shared_keys: bool = False,
    windows: bool = False,
) -> jax.Array:
    """Softmax attention of each query to the keys of its own id; scores and softmax in float32.

    Rows lie over (data, fsdp), heads over tensor, tokens over context; `k` and `v` too, unless `shared_keys`.

    Args:
      q_ids_BxS, k_ids_BxL: i32; 0 is padding, which sees nothing and gets zeros.
      shared_keys: keys are whole on every context device (text), so that nothing is exchanged.
      windows: ids are those of windows, so tokens are sorted by them on the way, and more blocks are skipped.

    Returns: [B,H,S,D] in v's dtype, laid out like q.
    """
    chex.assert_rank([q_BxHxSxD, k_BxHxLxD, v_BxHxLxD, q_ids_BxS, k_ids_BxL], [4, 4, 4, 2, 2])
    chex.assert_equal_shape_prefix([q_BxHxSxD, k_BxHxLxD], 2)
    chex.assert_equal_shape([k_BxHxLxD, v_BxHxLxD])
    chex.assert_shape(q_ids_BxS, (q_BxHxSxD.shape[0], q_BxHxSxD.shape[2]))
    chex.assert_shape(k_ids_BxL, (k_BxHxLxD.shape[0], k_BxHxLxD.shape[2]))
    with jax.named_scope("attend"):  # by which a plan tells these collectives from those of weights
        local = _kernel(how, shared_keys, windows)
        if how.mesh is not None and how.mesh.size > 1:
            local = _on_mesh(local, how, shared_keys)
        return local(q_BxHxSxD, k_BxHxLxD, v_BxHxLxD, q_ids_BxS, k_ids_BxL)


def _on_mesh(local: context.Kernel, how: Attending, shared_keys: bool) -> context.Kernel:
    if how.outer == "gather" and not shared_keys:
        local = context.gather(local, "context", how.groups[0])
    if how.ulysses > 1 and not shared_keys:
        local = context.ulysses(local, "context", how.groups[1])
    queries, q_ids = P(ROW_AXES, "tensor", "context"), TOKENS
    keys, k_ids = (P(ROW_AXES, "tensor"), P(ROW_AXES)) if shared_keys else (queries, q_ids)
    specs = (queries, keys, keys, q_ids, k_ids)
    return jax.shard_map(local, mesh=how.mesh, in_specs=specs, out_specs=queries, check_vma=False)


def _kernel(how: Attending, shared_keys: bool, windows: bool) -> context.Kernel:
    """What a device does with its own queries and keys; of a ring, the whole way round."""
    names, kernel = CROSS_NAMES if shared_keys else dense.NAMES, how.computes(windows, shared_keys)
    if how.outer == "ring" and not shared_keys:
        forward = functools.partial(blockwise.forward, block=how.block)
        backward = functools.partial(blockwise.backward, block=how.block)
        found = context.ring(forward, backward, "context", how.groups[0], names)
    elif kernel == "blockwise":
        found = lambda *args: blockwise.attend(*args, how.block, names)  # noqa: E731
    elif kernel == "splash":
        from vidgen.models.kernels import splash  # imports Pallas for TPUs, a second that no CPU should wait for

        found = functools.partial(splash.attend, block=how.block, names=names, shared_keys=shared_keys)
    elif kernel == "cudnn":
        found = functools.partial(cudnn.attend, names=names, shared_keys=shared_keys, one_clip=how.one_clip)
    else:
        return functools.partial(dense.attend, names=names)  # sorting would save it nothing
    return sort_by_id(found) if windows else found


def executed_pairs(
    q_ids_BxS: np.ndarray, k_ids_BxL: np.ndarray, how: Attending, shared_keys: bool = False, windows: bool = False
) -> int:
    """(query, key) pairs that each head really computes, over all devices, with skipped blocks left out.

    Counts what the forward pass of `attend` with the same arguments runs: all pairs of a block that some token needs,
    and what a length is padded by. The backward pass visits the same blocks, but for splash's, which are wider.
    """
    rounds = 1 if shared_keys else how.rounds
    kernel = how.computes(windows, shared_keys)
    if shared_keys and how.mesh:  # each device has a slab of the queries
        slabs = how.mesh.shape["context"]
    else:
        slabs = rounds
    total = 0
    for q_ids in np.split(np.asarray(q_ids_BxS), slabs, axis=1):
        for k_ids in np.split(np.asarray(k_ids_BxL), rounds if how.outer == "ring" else 1, axis=1):
            total += _pairs(q_ids, k_ids, kernel, how.block, windows)
    return total


def _pairs(q_ids: np.ndarray, k_ids: np.ndarray, kernel: str, block: int, windows: bool) -> int:
    if kernel in ("dense", "cudnn"):
        return q_ids.size * k_ids.shape[1]
    if windows:
        q_ids, k_ids = np.sort(q_ids, axis=-1), np.sort(k_ids, axis=-1)
    lengths = [ids.shape[1] for ids in (q_ids, k_ids)]
    if kernel == "splash":
        from vidgen.models.kernels import splash

        sides = splash.sides(*(-(-n // splash.LANES) * splash.LANES for n in lengths), block)
    else:
        sides = [blockwise.block_size(n, block) for n in lengths]
    q_ids, k_ids = (
        np.pad(ids, ((0, 0), (0, -n % side))) for ids, n, side in zip((q_ids, k_ids), lengths, sides, strict=True)
    )
    return int(blockwise.meeting(q_ids, k_ids, *sides).sum()) * math.prod(sides)


def from_config(
    config: ConfigDict, mesh: Mesh | None, platform: str, heads: int | None = None, tokens: int | None = None
) -> Attending:
    """How a config's denoiser attends on a mesh; `platform` (cpu | tpu | gpu) is the target's, which need not be here.

    `config.mesh.attention=auto` takes ulysses, which moves the least and lets any kernel run as on one device, as far
    as the heads of a device divide; the rest of the context axis gathers keys. The ring, which holds no more than a
    slab of keys but computes with the blockwise kernel, is taken on request only.

    `config.model.attention=auto` takes dense for rows shorter than `LONG`, else blockwise on a CPU, splash on a TPU,
    and on a GPU cudnn, as long as rows hold one clip each or a mask of the row fits, and blockwise otherwise.

    Args:
      heads, tokens: of the rows, where they aren't `config.model.heads` and `config.rows.tokens`.

    Raises:
      ConfigError: names the numbers that don't fit, and what would.
    """
    if platform not in PLATFORMS:
        raise ValueError(f"platform {platform!r}: expected one of {', '.join(PLATFORMS)}")
    heads, tokens = heads or config.model.heads, tokens or config.rows.tokens
    sizes = dict(mesh.shape) if mesh else dict.fromkeys(AXES, 1)
    outer, inner = _strategy(config, heads, tokens, sizes)
    kernel = _kernel_name(config, platform, tokens, sizes, inner)
    one_clip = config.rows.segments == 1
    return Attending(kernel, outer, inner, mesh, BLOCK[platform], one_clip)


def _strategy(config: ConfigDict, heads: int, tokens: int, sizes: dict[str, int]) -> tuple[str, int]:
    """(outer, devices of ulysses) of a config; raises ConfigError."""
    asked, inner, (over, tensor) = config.mesh.attention, config.mesh.ulysses, (sizes["context"], sizes["tensor"])
    if asked not in ("auto", *STRATEGIES):
        near = difflib.get_close_matches(asked, STRATEGIES, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"config.mesh.attention={asked!r}: known are auto, {', '.join(STRATEGIES)}{hint}")
    if heads % tensor:
        raise ConfigError(
            f"config.mesh.tensor={tensor}: {heads} heads don't divide over it; tensor can be {_divisors(heads)}"
        )
    if tokens % over:
        near = max(1, round(tokens / over)) * over
        raise ConfigError(f"{tokens} tokens a row don't divide over config.mesh.context={over}; nearest: {near}")
    if inner and asked not in ("auto", "ulysses+gather", "ulysses+ring"):
        raise ConfigError(
            f"config.mesh.ulysses={inner}: has no meaning with config.mesh.attention={asked}; set it to 0"
        )
    local = heads // tensor
    most = math.gcd(local, over)  # the largest that divides both
    told = f"the {local} heads of a device (model.heads={heads} over tensor={tensor})"
    if over == 1:
        return "local", 1
    if inner and (inner < 0 or local % inner or over % inner):
        raise ConfigError(
            f"config.mesh.ulysses={inner}: expected a divisor of {told} and of context={over}: {_divisors(most)}"
        )
    if asked == "ulysses" and most < over:
        rest = f", or config.mesh.attention=ulysses+gather with {most} x {over // most}" if most > 1 else ", or gather"
        raise ConfigError(
            f"config.mesh.attention=ulysses: {told} don't divide over context={over}; "
            f"context can be {_divisors(local)}{rest}"
        )
    if asked in ("gather", "ring"):
        return asked, 1
    inner = inner or most
    outer = "ring" if asked.endswith("+ring") else "gather"
    return ("local" if inner == over else outer), inner


def _kernel_name(config: ConfigDict, platform: str, tokens: int, sizes: dict[str, int], inner: int) -> str:
    """The kernel of a config, for rows of `tokens` on a mesh of `sizes`; raises ConfigError."""
    asked, slab = config.model.attention, tokens // sizes["context"]
    if asked not in ("auto", *KERNELS):
        near = difflib.get_close_matches(asked, KERNELS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"config.model.attention={asked!r}: known are auto, {', '.join(KERNELS)}{hint}")
    kernel = _best(config, platform, tokens, sizes, inner) if asked == "auto" else asked
    needs = {"splash": "tpu", "cudnn": "gpu"}.get(kernel, platform)
    if needs != platform:
        raise ConfigError(f"config.model.attention={kernel}: runs on a {needs}, and this is for a {platform}; try auto")
    if kernel == "splash" and slab % 128:
        step = 128 * sizes["context"]
        near = max(1, round(tokens / step)) * step
        raise ConfigError(
            f"config.model.attention={kernel}: {slab} tokens of a row on each of context={sizes['context']} devices, "
            f"expected a multiple of 128; nearest: {near} tokens a row, or blockwise"
        )
    if kernel == "cudnn" and (why := _not_cudnn(config)):
        raise ConfigError(f"config.model.attention=cudnn: {why}, or blockwise")
    return kernel


def _best(config: ConfigDict, platform: str, tokens: int, sizes: dict[str, int], inner: int) -> str:
    if tokens < LONG[platform]:
        return "dense"
    if platform == "tpu":
        return "splash"
    rows = -(-config.rows.count // (config.optimizer.accumulate * sizes["data"] * sizes["fsdp"]))
    fits = config.rows.segments == 1 or 2 * rows * tokens * tokens // (sizes["context"] // inner) <= MASK_BYTES
    return "cudnn" if platform == "gpu" and fits and not _not_cudnn(config) else "blockwise"


def _not_cudnn(config: ConfigDict) -> str:
    """What cuDNN's kernel would want changed, or nothing."""
    width = config.model.width // config.model.heads
    if config.dtype != "bfloat16":
        return f"config.dtype={config.dtype}, expected bfloat16"
    if width % 8 or width > 128:
        return f"heads are {width} wide (model.width / model.heads), expected a multiple of 8 up to 128"
    return ""


def _divisors(n: int) -> str:
    return ", ".join(str(i) for i in range(1, n + 1) if n % i == 0)
