"""What a config costs on a topology by arithmetic: parameters, FLOPs for a stated mix of clips, the time of a step."""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.sharding import AbstractMesh, AxisType
from ml_collections import ConfigDict

from vidgen.geometry import Geometry
from vidgen.models import attend, backbones, remat, uvit, windows
from vidgen.models.attend import Attending
from vidgen.models.kernels import blockwise
from vidgen.parallel.mesh import AXES
from vidgen.planning import mix as mixes
from vidgen.planning.flops import Pairs, StepFlops, forward_passes, sample_flops, step_flops
from vidgen.planning.hardware import Topology
from vidgen.planning.memory import drawing_parts, host_bytes, training_parts
from vidgen.planning.mix import Mix
from vidgen.planning.parameters import images, parameters
from vidgen.planning.roofline import Roofline, budget, clip_cost, predict
from vidgen.planning.traffic import communication, drawing_traffic, memory_traffic
from vidgen.tokenizers.base import geometry_from_config

PLATFORMS = {"tpu": "tpu", "cuda": "gpu"}  # the chips' compilers → what models call the target


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A step, or the drawing of a clip, by arithmetic.

    Attributes:
      mesh: devices along each axis.
      mix: the clips of a step in words.
      parameters: of the denoiser and its text encoder.
      tokens: of all rows, padding included; `trained` of them belong to a clip.
      flops: of all devices.
      kernel: that self-attention runs, a key of `roofline.KERNELS`.
      head: width of a head.
      strategy: over the context axis.
      roofline: the predicted time.
      from_compiled: whether its transfers were read from the compiled program.
      clips: that are drawn at once; 0: a step is trained.
      notes: what the estimate leaves out, for the report.
    """

    mesh: dict[str, int]
    mix: str
    parameters: int
    tokens: int
    trained: float
    flops: StepFlops
    kernel: str
    head: int
    strategy: str
    roofline: Roofline
    from_compiled: bool
    clips: int
    notes: tuple[str, ...]

    def cost(self, topology: Topology, tokens: float, price: float | None) -> dict[str, Any]:
        """Time and money to train on so many tokens, or to draw a clip; `price`: of a chip-hour."""
        if self.clips:
            found = clip_cost(topology, self.roofline.step_s, self.clips, price)
            return {
                "chips": found.chips,
                "clips_at_once": self.clips,
                "chip_hours": found.chip_hours,
                "cost": found.cost,
            }
        return {"tokens": tokens} | dataclasses.asdict(
            budget(topology, self.roofline.step_s, self.tokens, tokens, price)
        )

    def facts(self) -> dict[str, Any]:
        """What `--json` has of it."""
        return {
            "parameters": self.parameters,
            "mesh": self.mesh,
            "mix": self.mix,
            "tokens_per_step": self.tokens,
            "trained_tokens_per_step": self.trained,
            "flops_per_step": self.flops.useful,
            "flops_matmul": self.flops.matmul,
            "flops_attention_useful": self.flops.attention_useful,
            "flops_attention_executed": self.flops.attention_executed,
            "flops_recomputed": self.flops.recomputed,
            "recomputed_flops_fraction": self.flops.recomputed_fraction,
            "attention_kernel": self.kernel,
            "attention_strategy": self.strategy,
            "predicted_step_seconds": self.roofline.step_s,
            "predicted_mfu": self.roofline.mfu,
            "predicted_tokens_per_second": self.roofline.tokens_per_second,
            "roofline": dataclasses.asdict(self.roofline),
            "estimate_notes": list(self.notes),
        }


def supposed(config: ConfigDict, mode: str = "train") -> Mix:
    """The clips that an estimate supposes; raises ConfigError where none fits into a row."""
    geometry = geometry_from_config(config.tokenizer, config.vae)
    return mixes.typical(config, geometry) if mode == "train" else mixes.one_clip(config, geometry)


def estimate(
    config: ConfigDict,
    topology: Topology,
    mode: str = "train",
    collectives: Sequence[Any] | None = None,
    shown: Mix | None = None,
) -> Estimate:
    """The estimate of a config whose mesh is that of the topology.

    Args:
      mode: train, or sample: rows that hold one clip each, drawn in `config.sample.steps` steps.
      collectives: of the compiled program, in place of those that arithmetic expects.
      shown: what `supposed` gives, to spare it.
    """
    m, s, r = config.model, config.sample, config.rows
    geometry, sizes = geometry_from_config(config.tokenizer, config.vae), {axis: config.mesh[axis] for axis in AXES}
    how, shown, training = attending(config, topology), shown or supposed(config, mode), mode == "train"
    kernel = kernel_of(config, how)
    evaluations = forward_passes(s.solver, s.steps, s.guidance)
    accumulate = config.optimizer.accumulate
    if collectives is not None:
        traffic = collectives
    else:
        traffic = communication(config, sizes, accumulate=accumulate, strategy=how.strategy, ulysses=how.ulysses)
        if not training:
            traffic = [forward_only(t, evaluations) for t in traffic if "gradients" not in t.role]
    if training:
        flops = trained_flops(config, geometry, shown, how, kernel)
        again = m.remat != "none"
        moved = memory_traffic(config, geometry.features, sizes, recomputed=again, accumulate=accumulate)
    else:
        flops = drawn_flops(config, geometry, shown, how)
        moved = drawing_traffic(config, sizes, evaluations)
    roofline = predict(
        topology,
        sizes,
        flops,
        kernel=kernel,
        head=m.width // m.heads,
        hbm_bytes=moved,
        traffic=traffic,
        tokens=r.count * r.tokens,
        host_bytes=host_bytes(config, sizes) if training else 0.0,
    )
    return Estimate(
        mesh=sizes,
        mix=shown.words + f", {s.steps} steps of {s.solver}" * (not training),
        parameters=parameters(config, geometry.features),
        tokens=r.count * r.tokens,
        trained=shown.trained,
        flops=flops,
        kernel=kernel,
        head=m.width // m.heads,
        strategy=how.strategy,
        roofline=roofline,
        from_compiled=collectives is not None,
        clips=0 if training else r.count,
        notes=(FLOAT32,) if config.dtype == "float32" else (),
    )


FLOAT32 = "float32 products: the peak counted with is bfloat16's; expect a fraction of it"


def trained_flops(config: ConfigDict, geometry: Geometry, shown: Mix, how: Attending, kernel: str) -> StepFlops:
    """Of a training step that holds the clips `shown`."""
    useful = shown.pairs(tuple(config.model.window), config.model.full_every)
    return step_flops(
        config,
        geometry.features,
        useful.full,
        useful.text,
        useful.crossed,
        useful.windowed,
        executed=executed(config, shown, how),
        saved=None if config.model.remat == "none" else remat.saved(config.model.remat),
        kernel=kernel,
    )


def drawn_flops(config: ConfigDict, geometry: Geometry, shown: Mix, how: Attending) -> StepFlops:
    """Of drawing the clips `shown`, one a row."""
    s, clips = config.sample, config.rows.count
    windowed = shown.pairs(tuple(config.model.window), config.model.full_every).windowed / clips
    run = executed(config, shown, how)
    one = sample_flops(
        config,
        geometry,
        *(s.frames, s.height, s.width, s.steps, s.guidance),
        windowed,
        row=config.rows.tokens,
        executed=Pairs(run.full / clips, run.windowed / clips, run.crossed / clips, 0.0),
    )
    return one.times(clips)


def memory_parts(config: ConfigDict, topology: Topology, mode: str = "train") -> dict[str, float]:
    """What a device holds at the peak, by the estimate, largest first: what it is → bytes."""
    how, features = attending(config, topology), geometry_from_config(config.tokenizer, config.vae).features
    sizes = {axis: config.mesh[axis] for axis in AXES}
    found = training_parts if mode == "train" else drawing_parts
    parts = found(config, features, sizes, how.strategy, how.ulysses)
    return dict(sorted(parts.items(), key=lambda part: -part[1]))


def forward_only(traffic: Any, evaluations: int) -> Any:
    """A training step's exchange as drawing has it: the forward part, as often as the model is evaluated."""
    passes = 3 if traffic.role == "ulysses" else 6 if traffic.role == "tensor" else 2
    a_pass = 2 if traffic.role == "tensor" else 1
    return dataclasses.replace(traffic, count=traffic.count // passes * a_pass * evaluations)


def attending(config: ConfigDict, topology: Topology) -> Attending:
    """How attention is computed on the topology; raises ConfigError."""
    sizes = tuple(config.mesh[axis] for axis in AXES)
    mesh = AbstractMesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES))
    return backbones.attending(config, mesh, PLATFORMS[topology.chip.platform])


def executed(config: ConfigDict, mix: Mix, how: Attending) -> Pairs:
    """The pairs that attention really computes in a typical step, skipped blocks left out."""
    r, m = config.rows, config.model
    alone = (1, 1, how.mesh.shape["context"], 1)  # of the mesh it matters how many devices share a row
    how = dataclasses.replace(how, mesh=AbstractMesh(alone, AXES, axis_types=(AxisType.Auto,) * len(AXES)))
    text = float(r.count * r.text**2)  # the text encoder's attention skips nothing
    if m.backbone == "uvit":
        levels = (r.segments + 1,) * (2 if m.classes else 1)
        return Pairs(_executed_together(mix, how, r.text * m.cross, levels), 0.0, 0.0, text)
    full, windowed, crossed = _executed(mix, how, r.text, tuple(m.window), m.full_every)
    return Pairs(full, windowed, crossed + r.count * r.tokens * images(config), text)


@functools.lru_cache(maxsize=512)  # since a search asks for the same ones often
def _executed(
    mix: Mix, how: Attending, text: int, window: tuple[int, ...], full_every: int
) -> tuple[float, float, float]:
    """(full, windowed, crossed) of `Pairs`."""
    full = windowed = crossed = 0.0
    for clips, times in collections.Counter(mix.clips).items():
        row = mix.clips.index(clips)
        ids = mix.ids(row)[None]
        full += times * _own_pairs(ids, how, False)
        crossed += times * attend.executed_pairs(ids, mix.text_ids(row, text)[None], how, shared_keys=True)
        for kind, share in mixes.windowed_layers(window, full_every).items():
            windowed += times * share * _own_pairs(_window_ids(mix, row, window, kind == "shifted"), how, True)
    return full / mix.steps, windowed / mix.steps, crossed / mix.steps


@functools.lru_cache(maxsize=512)
def _executed_together(mix: Mix, how: Attending, text: int, levels: tuple[int, ...]) -> float:
    """Pairs of a U-ViT's attention, whose rows are `text` tokens, those of `levels`, and patches."""
    full = 0.0
    for clips, times in collections.Counter(mix.clips).items():
        row = mix.clips.index(clips)
        others = np.concatenate([mix.text_ids(row, text), *map(np.arange, levels)])
        others = np.pad(others, (0, uvit.filled(len(others), how) - len(others)))
        ids = uvit.join(others[None], mix.ids(row)[None], how.mesh.shape["context"])
        full += times * _own_pairs(np.asarray(ids, np.int32), how, False)
    return full / mix.steps


@functools.lru_cache(maxsize=64)
def _window_ids(mix: Mix, row: int, window: tuple[int, ...], moved: bool) -> np.ndarray:
    return np.asarray(windows.window_ids(mix.ids(row)[None], mix.coords(row)[None], window, moved))


def _own_pairs(ids_1xS: np.ndarray, how: Attending, windowed: bool) -> int:
    """`attend.executed_pairs` of self-attention, in one go where all devices cut a row into the same blocks."""
    rounds, tokens, kernel = how.rounds, ids_1xS.shape[1], how.computes(windowed)
    slab = tokens // rounds
    keys = slab if how.outer == "ring" else tokens
    if kernel == "splash":
        from vidgen.models.kernels import splash  # imports Pallas

        sides = splash.sides(*(-(-n // splash.LANES) * splash.LANES for n in (slab, keys)), how.block)
    else:
        sides = blockwise.block_size(slab, how.block), blockwise.block_size(keys, how.block)
    side = sides[0]
    if kernel not in ("splash", "blockwise") or sides != (side, side) or slab % side or side % 8:
        return attend.executed_pairs(ids_1xS, ids_1xS, how, windows=windowed)
    q_ids = k_ids = ids_1xS
    if windowed:  # which every device sorts by themselves
        q_ids, k_ids = (np.sort(ids_1xS.reshape(-1, n)).reshape(1, -1) for n in (slab, keys))
    return attend.executed_pairs(q_ids, k_ids, Attending("blockwise", block=side))


def kernel_of(config: ConfigDict, how: Attending) -> str:
    """The kernel that self-attention runs, as a key of `roofline.KERNELS`."""
    kernel, m = how.computes(), config.model
    if kernel == "splash":
        from vidgen.models.kernels.splash import fused  # imports Pallas

        tokens = config.rows.tokens
        if m.backbone == "uvit":
            tokens += uvit.filled(uvit.prefix(config), how)
        if not fused(tokens // how.rounds, tokens, m.width // m.heads, how.block):
            return "splash_unfused"
    return kernel
