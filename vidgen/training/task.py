"""What the two things that are trained, denoiser and VAE, have to say for one step, state and loop to train either."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from vidgen.training.start import Start
from vidgen.training.step import Batch, LossSum, Weight


def _as_it_is(params: Any, frozen: Any) -> Any:
    del frozen
    return params


@dataclasses.dataclass(frozen=True)
class Task:
    """What is trained, without its optimizer and its clips; `vidgen.training.program.build` makes a program of it.

    Attributes:
      model: what its parameters belong to: a Generator, or a CausalVAE.
      init: key → (all parameters, f32; what `TrainState.aux` starts from, or None).
      losses: ((steps done before it counts, loss), …), the first from 0 on: one compiled step each.
      weight: of the rows of a batch, by which the loss is divided, and which is logged as tokens.
      batch_like: the largest batch of the feed, as ShapeDtypeStructs.
      batch_shardings: the same tree, of shardings; they suit every batch.
      frozen: weights that the losses look through, NumPy arrays, or None.
      start: weights that parameters start from instead of `init`'s; None: there are none. Those of them that do not
        train are `TrainState.frozen`.
      whole: (what trains, or its average; `TrainState.frozen`) → parameters as the model is called with.
    """

    model: Any
    init: Callable[[jax.Array], tuple[Any, Any]]
    losses: tuple[tuple[int, LossSum], ...]
    weight: Weight
    batch_like: Batch
    batch_shardings: Batch
    frozen: Any = None
    start: Start | None = None
    whole: Callable[[Any, Any], Any] = _as_it_is
