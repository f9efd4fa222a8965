"""Which clips stand in which row of a step, found again by arithmetic, and what their pictures are."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from vidgen.data import feed
from vidgen.data.chunks import Chunks, Shape, read_chunk
from vidgen.data.clip import BadClip
from vidgen.data.sources import Source, open_source
from vidgen.training.autoencoding import shapes, stride
from vidgen.training.program import Program


class Piece(NamedTuple):
    """A clip in a row.

    Attributes:
      clip: its place in the index.
      epoch: which pass over the data this is, from 0.
      read: → [T,H,W,3] u8, for a VAE the very chunk; None where it can't be read.
    """

    clip: int
    epoch: int
    read: Callable[[], np.ndarray | None]


def rows_of(program: Program, source: Source) -> Callable[[int], Sequence[Sequence[Piece]]]:
    """Batch of the plan, from 0 → the clips of each of its rows, by segment; the plan is made when first asked.

    `source`: of the clips that are trained on, or a cache of their latents.
    """
    config = program.config

    @functools.cache
    def pixels() -> Source:
        return open_source(config.data, "train")  # of which a cache of latents has none

    @functools.cache
    def plan() -> Any:
        if config.task == "vae":
            return Chunks(source.sizes, config.clips, shapes(config), stride(config), config.seed)
        return feed.plan(source, program.generator.tokenizer, config, program.generator.text)

    def of_vae(batch: int) -> list[list[Piece]]:
        shape = plan().shape(batch)
        return [[Piece(c.clip, c.epoch, functools.partial(_chunk, source, c, shape))] for c in plan().step(batch)]

    def of_denoiser(batch: int) -> list[list[Piece]]:
        return [
            [Piece(p.clip, p.epoch, functools.partial(_whole, pixels, p.clip, p.epoch)) for p in row]
            for row in plan().step(batch)
        ]

    return of_vae if config.task == "vae" else of_denoiser


def _chunk(source: Source, cut: Any, shape: Shape) -> np.ndarray | None:
    video, reason = read_chunk(source, cut, shape)
    return None if reason else video


def _whole(source: Callable[[], Source], clip: int, epoch: int) -> np.ndarray | None:
    try:
        return feed.read_clip(source(), clip, epoch).video
    except BadClip:
        return None
