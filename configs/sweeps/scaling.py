"""A scaling law of the small: sizes from 20k to 3M parameters at several budgets of FLOPs, on moving shapes.

vidgen sweep --sweep configs/sweeps/scaling.py --output runs/scaling --width 2
vidgen fit --runs runs/scaling/results.csv

Of its 25 runs 19 were made: no law to plan by yet. They scatter about it by 2.8 % (RMS), and what it foretells of 1e12
FLOPs from less is up to 13 % too high. A token is 192 numbers, and the smaller models are 12 to 48 wide: what they
can't put out at all is most of their loss, which falls with the width faster than a power law.
"""

import os

from vidgen.scaling.algebra import Space
from vidgen.scaling.budgets import at_budgets
from vidgen.sweep import Sweep

QUICKSTART = os.path.join(os.path.dirname(__file__), os.pardir, "quickstart.py")
BUDGETS = (1e11, 3e11, 1e12, 3e12)

# (width, layers, heads, width of the text encoder): parameters grow about twofold from one to the next.
SIZES = (
    (12, 2, 2, 16),
    (16, 2, 2, 16),
    (24, 2, 2, 16),
    (32, 2, 2, 16),
    (48, 2, 3, 32),
    (64, 3, 4, 32),
    (96, 3, 4, 32),
    (112, 4, 4, 64),
    (128, 5, 4, 64),
    (144, 6, 6, 64),
)

# Clips of 9 x 16 x 16 in patches of 4 x 4 pixels: 48 tokens a clip, 8 clips a step. Less noise than in the quickstart,
# as a quarter of its pixels wants; and at its levels the loss falls all at once where a model finds out about motion,
# which no power law foresees.
BASE = {
    "data.moving_shapes.sizes": ((9, 16, 16),),
    "tokenizer.stride": (4, 4, 4),
    "objective.shift": 1.0,
    "sample.height": 16,
    "sample.width": 16,
    "rows.count": 2,
    "data.threads": 1,
    "optimizer.ema": 0.95,
    "train.log_every": 50,
    "train.checkpoint_every": 10_000,
    "train.keep": 1,
    "train.eval_rows": 64,
    "train.sample_every": 0,
}


def size(width: int, layers: int, heads: int, text: int) -> dict:
    """Learning rates of AdamW fall with the root of the width; Muon's holds for all."""
    return {
        "model.width": width,
        "model.layers": layers,
        "model.unroll": layers,
        "model.heads": heads,
        "text.width": text,
        "optimizer.lr": 2e-3 * (192 / width) ** 0.5,
    }


def get_sweep(arg: str = "") -> Sweep:
    """All sizes at all budgets, where they would train for 300 to 21,000 steps; `arg` "1e12": at that budget alone."""
    sizes: Space = tuple(size(*s) for s in SIZES)
    budgets = [float(arg)] if arg else BUDGETS
    found = at_budgets(QUICKSTART, sizes, budgets, steps=(300, 21_000), base=BASE)
    return Sweep(QUICKSTART, found.runs, suites=("moving_shapes",), prompts=72, notes=found.left_out)
