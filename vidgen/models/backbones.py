"""The denoisers there are, by the name of `config.model.backbone`."""

from __future__ import annotations

import difflib

from flax import linen as nn
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vidgen.config import ConfigError
from vidgen.models import attend, dit, uvit
from vidgen.models.attend import Attending
from vidgen.models.linear import Layout

MODULES = {"dit": dit, "uvit": uvit}


def check(config: ConfigDict) -> None:
    """Raises ConfigError for a backbone that isn't known, and on settings that mean nothing to it."""
    _module(config).check(config)


def from_config(
    config: ConfigDict,
    features: int,
    text: nn.Module | None,
    layout: Layout | None = None,
    how: Attending = Attending(),  # noqa: B008 - frozen
) -> nn.Module:
    """The denoiser of a config, for tokens of `features` numbers; raises ConfigError.

    All have `encode_context(batch)`, `__call__(noisy, levels, batch)` and the attributes text, layout and how.

    Args:
      text: the encoder of byte ids, or None where the batch brings text as values.
      layout: where weights lie; None = one device.
      how: attention's kernel and strategy over the mesh.
    """
    return _module(config).from_config(config, features, text, layout, how)


def attending(config: ConfigDict, mesh: Mesh | None, platform: str) -> Attending:
    """How the denoiser of a config attends, by the tokens that its backbone has in a row; raises ConfigError.

    See `vidgen.models.attend.from_config`.
    """
    tokens = config.rows.tokens
    if config.model.backbone == "uvit":
        unit = uvit.LANES * (mesh.shape["context"] if mesh else 1)
        tokens += -(-uvit.prefix(config) // unit) * unit
    return attend.from_config(config, mesh, platform, tokens=tokens)


def _module(config: ConfigDict):
    name = config.model.backbone
    if name not in MODULES:
        near = difflib.get_close_matches(name, MODULES, n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"config.model.backbone={name!r}: known are {', '.join(MODULES)}{hint}")
    return MODULES[name]
