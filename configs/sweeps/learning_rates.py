"""Does the best learning rate move with the width? Three widths, six rates of AdamW's each, 300 steps.

vidgen sweep --sweep configs/sweeps/learning_rates.py --output runs/rates --width 2        # seven minutes of runs
vidgen fit --runs runs/rates/results.csv                                                   # or learning_rates.csv here

It does: from 0.011 at width 32 by 0.0085 at 64 to 0.0043 at 128, about as width^-0.7, and more than a step of the grid;
learning_rates.csv beside this has the 18 runs as they were made. `:muon` varies the rate of Muon instead, which has the
matrices inside blocks.
"""

import os

from vidgen.config import ConfigError
from vidgen.scaling.algebra import param, product, zipped
from vidgen.sweep import Sweep

QUICKSTART = os.path.join(os.path.dirname(__file__), os.pardir, "quickstart.py")
KEYS = {
    "adamw": ("optimizer.lr", (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2)),
    "muon": ("optimizer.muon_lr", (5e-3, 1e-2, 2e-2, 4e-2, 8e-2)),
}

# Clips of 9 x 16 x 16 in patches of 4 x 4 pixels: 48 tokens a clip, 16 clips a step.
BASE = {
    "data.moving_shapes.sizes": ((9, 16, 16),),
    "tokenizer.stride": (4, 4, 4),
    "sample.height": 16,
    "sample.width": 16,
    "rows.count": 4,
    "model.layers": 2,
    "model.unroll": 2,
    "text.width": 32,
    "optimizer.warmup": 30,
    "optimizer.ema": 0.95,
    "train.steps": 300,
    "train.checkpoint_every": 300,
    "train.keep": 1,
    "train.eval_rows": 64,
    "train.sample_every": 0,
}


def get_sweep(arg: str = "") -> Sweep:
    """`arg` adamw (also where it is empty) or muon: whose learning rate varies."""
    arg = arg or "adamw"
    if arg not in KEYS:
        raise ConfigError(f"{arg}: expected {' or '.join(KEYS)}")
    key, rates = KEYS[arg]
    widths = zipped(param("model.width", (32, 64, 128)), param("model.heads", (2, 4, 8)))
    return Sweep(QUICKSTART, product(widths, param(key, rates)), base=BASE)
