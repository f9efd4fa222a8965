"""The quickstart's task with three backbones of equal parameters: `config.model` differs, and the U-ViT takes twice the
steps.

    vidgen train    --config configs/backbones.py:dit  --workdir runs/backbone_dit
    vidgen train    --config configs/backbones.py:uvit --workdir runs/backbone_uvit
    vidgen train    --config configs/backbones.py:wan  --workdir runs/backbone_wan
    vidgen evaluate --workdir runs/backbone_uvit --suite moving_shapes

dit is the quickstart itself.
"""

import os

from ml_collections import ConfigDict

from vidgen import config as configs


def get_config(arg: str = "dit") -> ConfigDict:
    """`arg` dit, uvit or wan."""
    changes = {"dit": {}, "uvit": UVIT, "wan": WAN}
    if (arg or "dit") not in changes:
        raise configs.ConfigError(f"configs/backbones.py:{arg}: expected {', '.join(changes)}")
    c = configs.load(os.path.join(os.path.dirname(__file__), "quickstart.py"))
    c.model.update(changes[arg or "dit"])
    c.train.steps = 2000 if arg == "uvit" else 1000
    return c


# Queries and keys are normalised and turned by where they are, and places projected: with places learned alone, as
# published, colours are right after 1,000 steps and patches don't agree on where the object is (held-out loss 0.137, no
# clip all right). It sees text and patches in one sequence, and takes twice the steps.
UVIT = {
    "backbone": "uvit",
    "layers": 7,
    "unroll": 7,
    "heads": 4,
}

# Wan's block: one modulation for all of them, biases, joint norms of queries and keys, a norm before the text.
WAN = {
    "layers": 5,
    "unroll": 5,
    "heads": 4,
    "bias": True,
    "qk_norm": "joint",
    "absolute": "none",
    "cross_norm": True,
    "final": "table",
    "shared_modulation": True,
    "text_mlp": True,
}
