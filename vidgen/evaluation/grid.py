"""The suite `heldout`: the loss on held-out clips over a fixed grid of noise levels × durations × resolutions.

What training logs as held-out loss is of the sizes as they come (`evaluation/heldout.py`). Here each size is measured
on its own, each of its clips once, with noise that is the same whatever the batch and the devices. All sizes are packed
in rows of one shape, so there is one compile.
"""

from __future__ import annotations

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
from vidgen.diffusion.generator import Generator
from vidgen.diffusion.timesteps import evaluation_levels
from vidgen.evaluation import clips
from vidgen.evaluation.clips import Size, told
from vidgen.evaluation.heldout import LEVELS
from vidgen.evaluation.suite import Asked, Found, Subject
from vidgen.models import places
from vidgen.objectives import flow
from vidgen.parallel import processes
from vidgen.parallel.mesh import batch_shardings

SIZES = 8  # of the run's own that are measured at most, those of most clips first


def run(subject: Subject, asked: Asked) -> Found:
    """heldout_loss: the mean over the grid, every size and level alike; heldout_loss/SIZE: over the levels of a size.

    Levels are the middles of eighths of the levels trained on. Of a source of files, the clips of a size are those that
    are at least as large, cut to it, so that a large clip may count at several sizes. `grid` has a row a size: its
    clips and tokens, levels, the loss at each, and their mean. The loss is the run's own, in the space and with the
    weights of config.objective: it compares runs with one objective and one tokenizer.
    """
    config, generator = subject.config, subject.generator
    geometry = generator.tokenizer.geometry
    own, notes = (asked.sizes, []) if asked.sizes else own_sizes(config, geometry)
    for size in own:
        check(config, geometry, size)
    tokens = max(config.rows.tokens, *(geometry.tokens(*size) for size in own))
    config = configs.override(config, {"rows.tokens": tokens})
    measure = _Measure(config, generator)
    plans = []
    for size in own:
        source = clips.sized(config, "heldout", size)
        chosen = Subset(source, clips.spread(len(source.sizes), asked.clips))
        plans.append((size, chosen, rows_of(chosen, size, config, generator)))
    progress = Progress("heldout", sum(len(rows) for *_, rows in plans))
    grid, unread, done = [], 0, 0
    for size, chosen, rows in plans:
        total, trained, read = np.zeros(LEVELS), 0.0, 0
        for first in range(0, len(rows), measure.batch):
            errors, weight, count = measure(subject.params, chosen, rows, first, asked.seed)
            total, trained, read = total + errors, trained + weight, read + count
            done += len(rows[first : first + measure.batch])
            progress.update(done, f"{told(size)}: {read} of {len(chosen)} clips")
        if not read:
            raise ConfigError(f"config.data.source={config.data.source}: none of {len(chosen)} clips could be read")
        unread += len(chosen) - read
        levels = evaluation_levels(config.objective, np.float32(geometry.tokens(*size)), LEVELS)
        by_level = (total / trained).tolist()
        grid.append(
            {
                "size": told(size),
                "clips": read,
                "tokens": int(trained),
                "loss": float(np.mean(by_level)),
                "levels": np.asarray(levels, np.float64).round(6).tolist(),
                "by_level": by_level,
            }
        )
    progress.close()
    notes += clips.seen_note(config) + ([f"{unread} held-out clips could not be read"] if unread else [])
    figures = {"heldout_loss": float(np.mean([row["loss"] for row in grid]))}
    figures |= {f"heldout_loss/{row['size']}": row["loss"] for row in grid}
    figures |= {"clips": sum(row["clips"] for row in grid), "grid": grid, "table": _table(grid), "notes": notes}
    decided_by = {
        "sizes": {row["size"]: {"clips": row["clips"], "levels": row["levels"]} for row in grid},
        "clips": {
            "split": "heldout",
            "fingerprint": clips.fingerprint([chosen.fingerprint for _, chosen, _ in plans]),
        },
        "row_tokens": tokens,
        "objective": config.objective.to_dict(),
    }
    return Found(figures, decided_by)


def _table(grid: list[dict[str, Any]]) -> dict[str, Any]:
    same = all(row["levels"] == grid[0]["levels"] for row in grid)
    named = [f"t={t:.3f}" for t in grid[0]["levels"]] if same else [f"level {i}" for i in range(LEVELS)]
    rows = [[row["size"], row["clips"], row["loss"], *row["by_level"]] for row in grid]
    return {"head": ["frames x height x width", "clips", "mean", *named], "rows": rows}


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


def check(config: ConfigDict, geometry: Any, size: Size) -> None:
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
    """The jitted sums over a batch of rows, all of one shape."""

    def __init__(self, config: ConfigDict, generator: Generator):
        mesh = generator.mesh
        over = mesh.size if mesh is not None else 1
        self.batch = -(-config.rows.count // over) * over
        self._config, self._generator, self._mesh = config, generator, mesh
        where = NamedSharding(mesh, P()) if mesh is not None else None

        def sums(params, batch: TokenBatch, seed: jax.Array, numbers_B: jax.Array):
            # A key a row of the size, whatever batch it is in.
            keys = jax.vmap(lambda n: jax.random.fold_in(jax.random.key(seed), n))(numbers_B)
            found = flow.heldout_sums(generator, params, batch, keys, config.objective, LEVELS, config.control)
            return *found, jnp.sum(batch.clip >= 0)

        self._sums = jax.jit(sums, out_shardings=where)

    def __call__(
        self, params: Any, source: Source, rows: list[Row], first: int, seed: int
    ) -> tuple[np.ndarray, float, int]:
        """(summed errors at each level [LEVELS] f64, tokens, clips) of the rows from `first` on."""
        some = rows[first : first + self.batch]
        some = some + [()] * (self.batch - len(some))
        tokenizer, text = self._generator.tokenizer, self._generator.text
        built = [build_row(source, row, tokenizer, self._config, text)[0] for row in some]
        batch = jax.tree.map(lambda *leaves: np.stack(leaves), *built)
        numbers = np.arange(first, first + self.batch, dtype=np.uint32)
        if self._mesh is not None:
            batch = processes.put(batch, batch_shardings(self._mesh, batch))
        errors, weight, count = jax.device_get(self._sums(params, batch, np.uint32(seed), numbers))
        return np.asarray(errors, np.float64), float(weight), int(count)
