"""Not a test: trains as `vidgen train` does, and writes down the clips of each step and the noise that it has.

python seen.py CONFIG.json WORKDIR OUTPUT

OUTPUT-<rank>.json: {"ids": {step: {row: clip ids}} of the rows that this process was fed, "noise": {step: digest}}, of
the keys that belong to the counter in the state that the step was given.
"""

from __future__ import annotations

import contextlib
import json
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from vidgen import config as configs
from vidgen import train
from vidgen.data import feed
from vidgen.training import loop

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "parallel"))
import layout  # noqa: E402, where the path leads


@contextlib.contextmanager
def recorded(ids: dict[int, dict[int, list[int]]], counters: dict[int, int]) -> Iterator[None]:
    """Within it, each batch that a step of this process is given is written down, step → row → clips, and the number of
    the step in the state that it is given, by which its noise is drawn.
    """
    batches, take = feed.batches, loop.Loop._take

    def counted(self: loop.Loop, n: int, state: Any, batch: Any) -> Any:
        counters[n] = int(state.step)
        return take(self, n, state, batch)

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

    feed.batches, loop.Loop._take = watched, counted
    try:
        yield
    finally:
        feed.batches, loop.Loop._take = batches, take


def main(config_json: str, workdir: str, output: str) -> None:
    config, ids, counters = configs.from_json(pathlib.Path(config_json).read_text()), {}, {}
    with recorded(ids, counters):
        train.run(config, workdir)
    ids = {step: rows for step, rows in ids.items() if step <= config.train.steps}  # a feed works ahead
    digests = layout.noise(config, counters.values())
    found = {"ids": ids, "noise": dict(zip(counters, digests, strict=True))}
    pathlib.Path(f"{output}-{jax.process_index()}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
