"""Not a test: trains as `vidgen train` does, and writes down the clips of each step and the noise that it has.

python seen.py CONFIG.json WORKDIR OUTPUT

OUTPUT-<rank>.json: {"ids": {step: {row: clip ids}} of the rows that this process was fed, "noise": {step: digest}}.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding

from vidgen import config as configs
from vidgen import train
from vidgen.data import feed
from vidgen.objectives import flow
from vidgen.parallel import mesh as meshes
from vidgen.tokenizers import base as tokenizers
from vidgen.training.step import row_keys


@contextlib.contextmanager
def recorded(ids: dict[int, dict[int, list[int]]]) -> Iterator[None]:
    """Within it, each batch that a step of this process is given is written down: step → row → clips."""
    batches = feed.batches

    def watched(source: Any, packing: Any, tokenizer: Any, config: Any, start: int, *rest: Any) -> Any:
        stream = batches(source, packing, tokenizer, config, start, *rest)
        following, step = type(stream).__next__, start

        class Watched(type(stream)):
            def __next__(self) -> Any:
                nonlocal step
                item = following(self)
                step += 1
                own = ids.setdefault(step, {})
                for shard in item[0].clip.addressable_shards:
                    first = shard.index[0].start or 0
                    own |= {first + i: row.tolist() for i, row in enumerate(np.asarray(shard.data))}
                return item

        stream.__class__ = Watched
        return stream

    feed.batches = watched
    try:
        yield
    finally:
        feed.batches = batches


def noise(config: Any, first: int, last: int) -> dict[int, str]:
    """A digest of all that is random in each of the steps, drawn on this layout."""
    mesh = meshes.make_mesh(config.mesh, config.rows.count, config.rows.tokens)
    rows, tokens = NamedSharding(mesh, meshes.ROWS), NamedSharding(mesh, meshes.TOKENS)
    shape = (config.rows.tokens, tokenizers.from_config(config.tokenizer).geometry.features)
    draw = jax.jit(
        lambda n: flow.row_randomness(row_keys(config.seed, n, config.rows.count), config.rows.segments, shape),
        out_shardings=(rows, rows, tokens),
    )
    digests = {}
    for n in range(first, last):
        drawn = [multihost_utils.process_allgather(x, tiled=True) for x in draw(np.int32(n))]
        digests[n + 1] = hashlib.sha256(b"".join(np.ascontiguousarray(x).tobytes() for x in drawn)).hexdigest()
    return digests


def main(config_json: str, workdir: str, output: str) -> None:
    config, ids = configs.from_json(pathlib.Path(config_json).read_text()), {}
    with recorded(ids):
        train.run(config, workdir)
    ids = {step: rows for step, rows in ids.items() if step <= config.train.steps}  # a feed works ahead
    found = {"ids": ids, "noise": noise(config, min(ids) - 1, config.train.steps)}
    pathlib.Path(f"{output}-{jax.process_index()}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
