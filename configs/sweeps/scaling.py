"""A scaling law of the small: sizes from 20k to 3M parameters at four budgets of FLOPs, on moving shapes.

vidgen sweep --sweep configs/sweeps/scaling.py --output runs/scaling --width 2
vidgen fit --runs runs/scaling/results.csv
"""

import os

from vidgen.scaling.algebra import Space
from vidgen.scaling.budgets import at_budgets
from vidgen.sweep import Sweep

QUICKSTART = os.path.join(os.path.dirname(__file__), os.pardir, "quickstart.py")
BUDGETS = (1.2e11, 4e11, 1.2e12, 4e12)

# Of two layers with heads of 12, as a rotary embedding of three axes wants: parameters grow with the width's square.
WIDTHS = (12, 24, 36, 48, 60, 72, 96, 120, 144, 192, 252)

# Pictures, clips of one frame of 16 x 16, in patches of 4 x 4 pixels: 16 tokens each, 24 of them a step. Of clips that
# move, a model finds the motion all at once, at a budget of its own, and no power law foresees that.
BASE = {
    "data.moving_shapes.sizes": ((1, 16, 16),),
    "data.threads": 1,
    "tokenizer.stride": (1, 4, 4),
    "rows.count": 2,
    "rows.segments": 12,
    "rows.text": 504,
    "text.width": 16,
    "text.heads": 2,
    "model.layers": 2,
    "model.unroll": 2,
    "optimizer.ema": 0.95,
    "train.log_every": 50,
    "train.checkpoint_every": 100_000,
    "train.keep": 1,
    "train.eval_rows": 64,
    "train.sample_every": 0,
    "sample.frames": 1,
    "sample.height": 16,
    "sample.width": 16,
}


def size(width: int) -> dict:
    """Learning rates of AdamW fall with the root of the width; Muon's holds for all."""
    return {"model.width": width, "model.heads": width // 12, "optimizer.lr": 2e-3 * (192 / width) ** 0.5}


def get_sweep(arg: str = "") -> Sweep:
    """All sizes at all budgets, where they would train for 450 to 9,000 steps. `arg` "4e11": at that budget alone."""
    sizes: Space = tuple(size(w) for w in WIDTHS)
    budgets = [float(arg)] if arg else BUDGETS
    found = at_budgets(QUICKSTART, sizes, budgets, steps=(450, 9_000), base=BASE)
    return Sweep(QUICKSTART, found.runs, suites=("moving_shapes",), prompts=144, notes=found.left_out)
