"""What a run does with its clips beside its steps, and what it tells of them: `vidgen train` asks for nothing else."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

from vidgen.data.sources import Source
from vidgen.data.stream import FeedInfo
from vidgen.training.metrics import MetricWriter
from vidgen.training.step import Batch

Pause = Callable[[], None]


@dataclasses.dataclass(frozen=True)
class Introduction:
    """What there is to say before the first step.

    Attributes:
      lines: for the terminal.
      files: name → JSON values: what the workdir keeps as name.json.
      work: what a step computes, in words.
      flops: steps done → useful FLOPs of the next one, over all devices.
      clips: that a step has, about.
    """

    lines: tuple[str, ...]
    files: dict[str, Any]
    work: str
    flops: Callable[[int], float]
    clips: float


@dataclasses.dataclass(frozen=True)
class Course:
    """A program with its clips. All processes call its functions alike.

    Attributes:
      source: the clips that are trained on.
      tokenizer: digest of the VAE on whose latents is trained; empty where there is none.
      text: digest of the frozen text encoder; empty where there is none.
      batches: steps done → the batches from there on; to be used in a `with`.
      introduce: steps done → what to say before going on.
      heldout: (averaged weights, pause) → figures on clips that are not trained on; None where none are wanted.
      draw: (averaged weights, step, workdir, the writer or None, pause) writes pictures to WORKDIR/samples/<step>/ and
        shows them beside the curves; only the process that has the writer writes.
        `pause`, of both, is called between batches, by all processes alike, and may raise to end it there.
      publish: (averaged weights, workdir) → more facts for the checkpoint, and what others are to use of the weights.
    """

    source: Source
    tokenizer: str
    batches: Callable[[int], AbstractContextManager[Iterator[tuple[Batch, FeedInfo]]]]
    introduce: Callable[[int], Introduction]
    heldout: Callable[[Any, Pause], dict[str, float]] | None
    draw: Callable[[Any, int, str, MetricWriter | None, Pause], None]
    publish: Callable[[Any, str], dict[str, Any]]
    text: str = ""
