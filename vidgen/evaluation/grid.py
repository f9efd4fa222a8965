"""The suite `heldout`: the loss on held-out clips over a fixed grid of noise levels × durations × resolutions.

What training logs as held-out loss is of the sizes as they come, at levels of the run's own distribution
(`evaluation/heldout.py`). Here the levels are the same for every size and every run, so that a run that trains at
easier ones gains nothing by it. Each size is measured on its own, each of its clips once, with noise that is the same
whatever the batch and the devices. All sizes are packed in rows of one shape, so there is one compile.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from vidgen import config as configs
from vidgen.batch import TokenBatch
from vidgen.config import ConfigError
from vidgen.data.feed import build_row
from vidgen.data.packing import Placed, Row, pack_bins
from vidgen.data.progress import Progress
from vidgen.data.sources import Source, Subset, open_source
from vidgen.data.text import caption_lengths
from vidgen.diffusion.generator import Experts, Generator
from vidgen.evaluation import clips
from vidgen.evaluation.clips import Size, told
from vidgen.evaluation.suite import Asked, Found, Subject
from vidgen.models import places
from vidgen.objectives import flow
from vidgen.parallel import processes
from vidgen.parallel.mesh import batch_shardings
from vidgen.tokenizers import base as tokenizers

LEVELS = tuple((i + 0.5) / 8 for i in range(8))  # unless --levels says otherwise: the middles of eighths of 0 to 1
SIZES = 8  # of the run's own that are measured at most, those of most clips first


def check(config: ConfigDict, asked: Asked) -> None:
    """Raises ConfigError where there is nothing to measure at these levels and sizes."""
    within(config, asked.levels or LEVELS)
    for size in _sizes(config, asked)[0]:
        clips.sized(config, "heldout", size)


def run(subject: Subject, asked: Asked) -> Found:
    """heldout_loss: the mean over the grid, every size and level alike; heldout_loss/SIZE: over the levels of a size.

    levels: those of `asked.levels` that the run trained on. Of a source of files, the clips of a size are those that
    are at least as large, cut to it, so that a large clip may count at several sizes. `grid` has a row a size: its
    clips and tokens, the loss at each level, and their mean.

    The loss is the mean squared error in the space of config.objective.loss: it compares runs that have that and the
    tokenizer in common, whatever their shift, time_mean and time_std are, and runs with another loss don't compare. An
    error in another space, config.objective.prediction, is converted by a weight (`path.loss_weight`) that stops
    growing below config.objective.time_min and above 1 - time_min: at such levels, none of the usual ones unless
    time_min exceeds 0.0625, runs with different predictions don't compare either.
    """
    config, generator = subject.config, subject.generator
    geometry = generator.tokenizer.geometry
    levels, notes = within(config, asked.levels or LEVELS)
    own, left_out = _sizes(config, asked)
    notes += left_out
    tokens = max(config.rows.tokens, *(geometry.tokens(*size) for size in own))
    config = configs.override(config, {"rows.tokens": tokens})
    measure = _Measure(config, generator, levels)
    plans = []
    for size in own:
        source = clips.sized(config, "heldout", size)
        chosen = Subset(source, clips.spread(len(source.sizes), asked.clips))
        plans.append((size, chosen, rows_of(chosen, size, config, generator)))
    progress = Progress("heldout", sum(len(rows) for *_, rows in plans))
    grid, unread, done = [], 0, 0
    for size, chosen, rows in plans:
        total, trained, read = np.zeros(len(levels)), 0.0, 0
        for first in range(0, len(rows), measure.batch):
            errors, weight, count = measure(subject.params, chosen, rows, first, asked.seed)
            total, trained, read = total + errors, trained + weight, read + count
            done += len(rows[first : first + measure.batch])
            progress.update(done, f"{told(size)}: {read} of {len(chosen)} clips")
        if not read:
            raise ConfigError(f"config.data.source={config.data.source}: none of {len(chosen)} clips could be read")
        unread += len(chosen) - read
        by_level = (total / trained).tolist()
        grid.append(
            {
                "size": told(size),
                "clips": read,
                "tokens": int(trained),
                "loss": float(np.mean(by_level)),
                "by_level": by_level,
            }
        )
    progress.close()
    notes += clips.seen_note(config) + ([f"{unread} held-out clips could not be read"] if unread else [])
    figures = {"heldout_loss": float(np.mean([row["loss"] for row in grid]))}
    figures |= {f"heldout_loss/{row['size']}": row["loss"] for row in grid}
    rows = [[row["size"], row["clips"], row["loss"], *row["by_level"]] for row in grid]
    table = {"head": ["frames x height x width", "clips", "mean", *(f"t={t:g}" for t in levels)], "rows": rows}
    figures |= {"clips": sum(row["clips"] for row in grid), "levels": list(levels), "grid": grid, "table": table}
    figures["notes"] = notes
    decided_by = {
        "sizes": {row["size"]: {"clips": row["clips"]} for row in grid},
        "levels": list(levels),
        "clips": {
            "split": "heldout",
            "fingerprint": clips.fingerprint([chosen.fingerprint for _, chosen, _ in plans]),
        },
        "row_tokens": tokens,
        "objective": config.objective.to_dict(),
    }
    return Found(figures, decided_by)


def within(config: ConfigDict, levels: Sequence[float]) -> tuple[tuple[float, ...], list[str]]:
    """Those of the levels that the run trained on, and what was left out; raises ConfigError where none is."""
    least, most = config.objective.time_range
    kept = tuple(t for t in levels if least <= t <= most)
    if not kept:
        raise ConfigError(
            f"--levels={told_levels(levels)}: the run trained on none of them but on those within "
            f"config.objective.time_range=({least:g}, {most:g}); expected one of these, such as "
            f"--levels={(least + most) / 2:g}"
        )
    rest = [t for t in levels if t not in kept]
    about = f"trained on noise levels of {least:g} to {most:g} alone (config.objective.time_range)"
    return kept, [f"{about}: of the grid, {told_levels(rest)} are left out"] if rest else []


def told_levels(levels: Sequence[float]) -> str:
    """As --levels takes them."""
    return ",".join(map(str, levels))


def _sizes(config: ConfigDict, asked: Asked) -> tuple[Sequence[Size], list[str]]:
    """The sizes to measure, and what was left out; raises ConfigError for one that can't be measured."""
    geometry = tokenizers.geometry_from_config(config.tokenizer, config.vae)
    sizes, notes = (asked.sizes, []) if asked.sizes else own_sizes(config, geometry)
    for size in sizes:
        check_size(config, geometry, size)
    return sizes, notes


def own_sizes(config: ConfigDict, geometry: Any) -> tuple[list[Size], list[str]]:
    """The sizes that held-out clips have in a row, those of most clips first, SIZES at most; and what was left out."""
    sizes = open_source(config.data, "heldout").sizes
    frames, height, width = geometry.fit(*(np.asarray(n, np.int64) for n in (sizes.frames, sizes.height, sizes.width)))
    t, y, x = geometry.grid(frames, height, width)
    longest = config.rows.tokens // np.maximum(y * x, 1)  # as packing crops
    frames = np.where(t > longest, (longest * geometry.patch[0] - 1) * geometry.stride[0] + 1, frames)
    usable = (t * y * x > 0) & (longest > 0)
    if not usable.any():
        raise ConfigError(f"no held-out clip fits into a row of config.rows.tokens={config.rows.tokens} tokens")
    found, counts = np.unique(np.stack([frames, height, width], 1)[usable], axis=0, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    rest = order[SIZES:]
    notes = (
        [f"{len(rest)} more sizes, of {counts[rest].sum()} clips, are left out: --size says which"] if len(rest) else []
    )
    return [tuple(found[i].tolist()) for i in sorted(order[:SIZES])], notes


def check_size(config: ConfigDict, geometry: Any, size: Size) -> None:
    """Raises ConfigError for a size that does not cut into whole tokens, or is too large for the model."""
    if geometry.fit(*size) != tuple(size):
        raise ConfigError(
            f"--size={told(size)}: clips of frames x height x width must cut into whole tokens; the nearest that does "
            f"is {told(geometry.cover(*size))}"
        )
    places.check_fits(config.model, geometry.grid(*size), f"--size={told(size)}")


def rows_of(source: Source, size: Size, config: ConfigDict, generator: Generator) -> list[Row]:
    """Every clip of the source once, of one size, in as few rows as a plain packing finds."""
    r, tokens = config.rows, generator.tokenizer.geometry.tokens(*size)
    lengths = caption_lengths(source, generator.text, r.caption)
    lengths = np.asarray(source.sizes.text, np.int64) + 1 if lengths is None else lengths
    text = np.minimum(lengths, r.caption)
    if generator.text is not None and generator.text.pad:
        text = np.full_like(text, generator.text.pad)
    order = np.argsort(-text, kind="stable")
    bins = pack_bins(np.full(len(order), tokens), text[order], (r.tokens, r.text, r.segments))
    rows: list[list[Placed]] = [[] for _ in range(bins.max() + 1)]
    for clip, place in zip(order.tolist(), bins.tolist(), strict=True):
        row = rows[place]
        start = row[-1].text_start + row[-1].text if row else 0
        row.append(Placed(clip, 0, *size, len(row) * tokens, tokens, start, int(text[clip]), len(row) + 1))
    return [tuple(row) for row in rows]


class _Measure:
    """The jitted sums at `levels` over a batch of rows, all of one shape."""

    def __init__(self, config: ConfigDict, generator: Generator, levels: Sequence[float]):
        mesh = generator.mesh
        over = mesh.size if mesh is not None else 1
        self.batch = -(-config.rows.count // over) * over
        self._config, self._generator, self._mesh = config, generator, mesh
        self._levels = np.asarray(levels, np.float32)
        where = NamedSharding(mesh, P()) if mesh is not None else None

        def sums(params, batch: TokenBatch, levels_N: jax.Array, seed: jax.Array, numbers_B: jax.Array):
            # A key a row of the size, whatever batch it is in.
            keys = jax.vmap(lambda n: jax.random.fold_in(jax.random.key(seed), n))(numbers_B)

            def levels_of(tokens_BxK):
                return jnp.broadcast_to(levels_N[:, None, None], (len(levels_N), *tokens_BxK.shape))

            found = flow.heldout_sums(generator, params, batch, keys, config.objective, levels_of, config.control)
            return *found, jnp.sum(batch.clip >= 0)

        self._sums = jax.jit(sums, out_shardings=where)

    def __call__(
        self, params: Any, source: Source, rows: list[Row], first: int, seed: int
    ) -> tuple[np.ndarray, float, int]:
        """(summed errors at each of the N levels [N] f64, tokens, clips) of the rows from `first` on."""
        some = rows[first : first + self.batch]
        some = some + [()] * (self.batch - len(some))
        tokenizer, text = self._generator.tokenizer, self._generator.text
        built = [build_row(source, row, tokenizer, self._config, text)[0] for row in some]
        batch = jax.tree.map(lambda *leaves: np.stack(leaves), *built)
        numbers = np.arange(first, first + self.batch, dtype=np.uint32)
        if self._mesh is not None:
            batch = processes.put(batch, batch_shardings(self._mesh, batch))
        total = np.zeros(len(self._levels))
        for own, at in _experts(params, self._levels):
            errors, weight, count = jax.device_get(self._sums(own, batch, self._levels[at], np.uint32(seed), numbers))
            total[at] = errors
        return total, float(weight), int(count)


def _experts(params: Any, levels_N: np.ndarray) -> list[tuple[Any, np.ndarray]]:
    """(weights, at which of the levels they are measured, [N] bool): of two denoisers each where it would draw."""
    if not isinstance(params, Experts):
        return [(params, levels_N >= 0)]
    high = levels_N >= params.boundary
    return [(own, at) for own, at in ((params.high, high), (params.low, ~high)) if at.any()]
