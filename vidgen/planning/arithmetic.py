"""What a config costs on a topology by arithmetic: parameters, FLOPs for a stated mix of clips, the time of a step."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.sharding import AbstractMesh, AxisType
from ml_collections import ConfigDict

from vidgen import config as configs
from vidgen.models import attend, remat, windows
from vidgen.models.attend import Attending
from vidgen.models.dit import layer_pattern
from vidgen.parallel.mesh import AXES
from vidgen.planning import mix as mixes
from vidgen.planning import search
from vidgen.planning.flops import Pairs, StepFlops, parameters, sample_flops, step_flops
from vidgen.planning.hardware import Topology
from vidgen.planning.mix import Mix
from vidgen.planning.roofline import Roofline, budget, clip_cost, predict
from vidgen.planning.search import Candidate
from vidgen.planning.traffic import communication, memory_traffic
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
      drawn: whether a clip is drawn, instead of a step trained.
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
    drawn: bool

    def cost(self, topology: Topology, tokens: float, price: float | None) -> dict[str, Any]:
        """Time and money to train on so many tokens, or to draw a clip; `price`: of a chip-hour."""
        if self.drawn:
            found = clip_cost(topology, self.roofline.step_s, price=price)
            return {"chips": found.chips, "chip_hours": found.chip_hours, "cost": found.cost}
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
        }


def estimate(
    config: ConfigDict, topology: Topology, mode: str = "train", collectives: Sequence[Any] | None = None
) -> Estimate:
    """The estimate of a config whose mesh is that of the topology.

    Args:
      mode: train, or sample: rows that hold one clip each, drawn in `config.sample.steps` steps.
      collectives: of the compiled program, in place of those that arithmetic expects.
    """
    geometry = geometry_from_config(config.tokenizer)
    sizes = {axis: config.mesh[axis] for axis in AXES}
    how = attending(config, topology)
    shown = mixes.typical(config, geometry) if mode == "train" else None
    evaluations = 1
    if mode == "train":
        useful = shown.pairs(tuple(config.model.window))
        flops = step_flops(
            config,
            geometry.features,
            useful.full,
            useful.text,
            useful.crossed,
            useful.windowed,
            executed=executed(config, shown, how),
            saved=None if config.model.remat == "none" else remat.saved(config.model.remat),
            kernel=kernel_of(config, how),
        )
        words, trained = shown.words, shown.trained
    else:
        s = config.sample
        size = geometry.cover(s.frames, s.height, s.width)
        window = tuple(config.model.window)
        grid = tuple(map(int, geometry.grid(*size)))
        windowed = sum(mixes.window_pairs(grid, window, moved) for moved in (False, True)) / 2 if window else 0.0
        flops = sample_flops(config, geometry, *size, s.steps, s.guidance, windowed)
        words, trained = f"1 clip of {'x'.join(map(str, size))}, {s.steps} steps of {s.solver}", geometry.tokens(*size)
        evaluations = (2 * s.steps - 1 if s.solver == "heun" else s.steps) * (1 if s.guidance == 1 else 2)
    if collectives is None:
        traffic = communication(
            config, sizes, accumulate=config.optimizer.accumulate, strategy=config.mesh.attention, ulysses=how.ulysses
        )
        if mode == "sample":
            traffic = [forward_only(t, evaluations) for t in traffic if "gradients" not in t.role]
    else:
        traffic = collectives
    everything = config.model.remat == "none"
    moved = memory_traffic(
        config, geometry.features, sizes, recomputed=not everything, accumulate=config.optimizer.accumulate
    )
    roofline = predict(
        topology,
        sizes,
        flops,
        kernel=kernel_of(config, how),
        head=config.model.width // config.model.heads,
        hbm_bytes=moved if mode == "train" else moved / 4 * evaluations,
        traffic=traffic,
        tokens=config.rows.count * config.rows.tokens,
    )
    return Estimate(
        mesh=sizes,
        mix=words,
        parameters=parameters(config, geometry.features),
        tokens=config.rows.count * config.rows.tokens,
        trained=trained,
        flops=flops,
        kernel=kernel_of(config, how),
        head=config.model.width // config.model.heads,
        strategy=how.strategy,
        roofline=roofline,
        from_compiled=collectives is not None,
        drawn=mode == "sample",
    )


def rank(config: ConfigDict, topology: Topology) -> list[Candidate]:
    """Ways to lay the step of a config on a topology, those that fit first, fastest first.

    Raises ConfigError where no mesh divides the step.
    """
    geometry = geometry_from_config(config.tokenizer)
    shown = mixes.typical(config, geometry)
    alone = configs.override(
        config, {f"mesh.{axis}": 1 for axis in AXES} | {"mesh.attention": "auto", "mesh.ulysses": 0}
    )
    how = attending(alone, topology)
    return search.rank(
        config,
        geometry.features,
        topology,
        shown.pairs(tuple(config.model.window)),
        executed(config, shown, how),
        remat.PRESETS,
        how.computes(),
    )


def memory_parts(config: ConfigDict, topology: Topology) -> dict[str, float]:
    """What a device holds at the peak of a step, by the estimate, largest first: what it is → bytes."""
    actions = remat.parse(config.model.remat)
    how = attending(config, topology)
    parts = search.memory_parts(
        config,
        geometry_from_config(config.tokenizer).features,
        {axis: config.mesh[axis] for axis in AXES},
        accumulate=config.optimizer.accumulate,
        saved={n for n, act in (actions | {"residual": actions["residual"].replace("recompute", "save")}).items()
               if act == "save"},
        everything=config.model.remat == "none",
        strategy=how.strategy,
    )  # fmt: skip
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
    return attend.from_config(config, mesh, PLATFORMS[topology.chip.platform])


def executed(config: ConfigDict, mix: Mix, how: Attending) -> Pairs:
    """The pairs that attention really computes in a typical step, skipped blocks left out."""
    r, window = config.rows, tuple(config.model.window)
    kinds = set(layer_pattern(window, config.model.full_every)) - {"segment"}
    full = windowed = crossed = 0.0
    alike = collections.Counter(mix.clips)
    for clips, times in alike.items():
        row = mix.clips.index(clips)
        ids = mix.ids(row)[None]
        full += times * attend.executed_pairs(ids, ids, how)
        captions = mix.text_ids(row, r.text)[None]
        crossed += times * attend.executed_pairs(ids, captions, how, shared_keys=True)
        for kind in kinds:
            moved = np.asarray(windows.window_ids(ids, mix.coords(row)[None], window, kind == "shifted"))
            windowed += times / len(kinds) * attend.executed_pairs(moved, moved, how, windows=True)
    text = float(r.count * r.text**2)  # the text encoder's attention skips nothing
    return Pairs(full / mix.steps, windowed / mix.steps, crossed / mix.steps, text)


def kernel_of(config: ConfigDict, how: Attending) -> str:
    """The kernel that self-attention runs, as a key of `roofline.KERNELS`."""
    kernel, m = how.computes(), config.model
    if kernel == "splash":
        from vidgen.models.kernels.splash import fused  # imports Pallas

        if not fused(config.rows.tokens // how.rounds, config.rows.tokens, m.width // m.heads, how.block):
            return "splash_unfused"
    return kernel
