"""Not a test: trains as `vidgen train` does, then says what this layout of processes and devices saw.

python layout.py CONFIG.json WORKDIR
"""

import hashlib
import json
import pathlib
import sys

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding

from vidgen import config as configs
from vidgen import train
from vidgen.data import feed, hosts
from vidgen.data.packing import Packing
from vidgen.data.sources import open_source
from vidgen.objectives import flow
from vidgen.parallel import mesh as meshes
from vidgen.parallel import processes
from vidgen.tokenizers import base as tokenizers
from vidgen.training.step import row_keys


def clips(config, count, **axes):
    """(clip ids [count,B,K], the first batch whole, rows that this process answers for), on a mesh of other axes."""
    config = configs.override(config, {f"mesh.{axis}": n for axis, n in axes.items()})
    mesh = meshes.make_mesh(config.mesh, config.rows.count, config.rows.tokens)
    source = open_source(config.data, "train")
    tokenizer = tokenizers.from_config(config.tokenizer)
    packing = Packing(source.sizes, tokenizer.geometry, config.rows, config.seed)
    with feed.batches(source, packing, tokenizer, config, 0, mesh) as batches:
        seen = [next(batches)[0] for _ in range(count)]
    whole = [multihost_utils.process_allgather(x, tiled=True) for x in jax.tree.leaves(seen[0])]
    ids = np.stack([multihost_utils.process_allgather(batch.clip, tiled=True) for batch in seen])
    expected = jax.tree.leaves(feed.host_rows(source, packing, tokenizer, config, 0))
    for a, b in zip(whole, expected, strict=True):
        np.testing.assert_array_equal(a, b)
    return ids, hosts.counted_rows(mesh, config.rows.count)


def noise(config, steps):
    """A digest of all that is random in each of the steps, counted from 0, drawn on this layout."""
    mesh = meshes.make_mesh(config.mesh, config.rows.count, config.rows.tokens)
    rows, tokens = NamedSharding(mesh, meshes.ROWS), NamedSharding(mesh, meshes.TOKENS)
    shape = (config.rows.tokens, tokenizers.from_config(config.tokenizer).geometry.features)
    draw = jax.jit(
        lambda n: flow.row_randomness(row_keys(config.seed, n, config.rows.count), config.rows.segments, shape),
        out_shardings=(rows, rows, tokens),
    )
    digests = []
    for n in steps:
        drawn = [multihost_utils.process_allgather(x, tiled=True) for x in draw(np.int32(n))]
        digests.append(hashlib.sha256(b"".join(np.ascontiguousarray(x).tobytes() for x in drawn)).hexdigest())
    return digests


def main(config_json, workdir):
    config = configs.from_json(pathlib.Path(config_json).read_text())
    train.run(config, workdir)
    ids, _ = clips(config, config.train.steps)
    digests = noise(config, range(config.train.steps))
    # Four devices in a row: with two processes, both hold a part of each row.
    shared, answers = clips(config, 1, data=1, fsdp=1, context=-1)
    mine = np.isin(np.arange(config.rows.count), answers).astype(np.float32)
    counted = multihost_utils.process_allgather(mine, tiled=False).reshape(-1, len(mine))
    if processes.is_lead():
        seen = {"ids": ids.tolist(), "noise": digests, "shared": shared.tolist(), "counted": counted.sum(0).tolist()}
        (pathlib.Path(workdir) / "seen.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main(*sys.argv[1:])
