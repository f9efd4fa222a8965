"""What makes a denoiser the module that it is: what its weights fit, and what stands beside them on disk."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from vidgen.config import ConfigError, base
from vidgen.geometry import Grid
from vidgen.models.rope import axis_widths

# Keys of `config.model` that weights depend on. All others (remat, attention, window, …) say how it is computed, or
# what is put in.
KEYS = (
    "backbone",
    "width",
    "layers",
    "heads",
    "mlp_dim",
    "mlp_eps",
    "bias",
    "qk_norm",
    "rope",
    "rope_pairs",
    "rope_theta",
    "level_theta",
    "absolute",
    "table",
    "cross",
    "cross_norm",
    "final",
    "classes",
    "level_per_block",
    "learned_sigma",
    "cond",
    "image_width",
    "image_tokens",
    "shared_modulation",
    "text_mlp",
)

# Those of them that add layers, or are of the first and last ones alone.
DOORS = ("absolute", "table", "cross", "classes", "learned_sigma", "cond", "image_width", "image_tokens", "text_mlp")


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A denoiser's architecture; hashable, and equal where weights of the one are weights of the other.

    But for how many learned places of text a U-ViT with absolute="table" has, which follows from `config.rows.caption`.

    Attributes:
      model: (key, value) of `config.model`, in the order of `KEYS`, with what follows from other keys spelled out:
        `mlp_dim` and `rope_pairs` are always set.
      patch: latents a token covers in (t, y, x).
      channels: of the noisy latents.
      text_width: E, of the text as it comes in; 0 where the model attends to none.
    """

    model: tuple[tuple[str, Any], ...]
    patch: Grid
    channels: int
    text_width: int

    def __getitem__(self, key: str) -> Any:
        """A value of `config.model`."""
        return dict(self.model)[key]

    @property
    def features(self) -> int:
        """P, width of a noisy token."""
        return self.channels * math.prod(self.patch)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values: {"model", "patch", "channels", "text_width"}."""
        model = {key: list(value) if isinstance(value, tuple) else value for key, value in self.model}
        return {"model": model, "patch": list(self.patch), "channels": self.channels, "text_width": self.text_width}

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> Architecture:
        """Inverse of `to_dict`; raises ConfigError for keys that are missing or unknown, or of another type."""
        told = {"model", "patch", "channels", "text_width"}
        if found.keys() != told:
            raise ConfigError(f"a denoiser's config has {sorted(found)}; expected {sorted(told)}")
        model = found["model"]
        if not isinstance(model, Mapping) or (odd := sorted(model.keys() ^ set(KEYS))):
            what = f"{'unknown' if odd[0] in model else 'no'} {odd[0]}" if isinstance(model, Mapping) else repr(model)
            raise ConfigError(f"a denoiser's config: model: {what}; expected {', '.join(KEYS)}")
        settings = base().model
        for key, value in model.items():
            try:
                settings[key] = tuple(value) if isinstance(value, list) else value
            except TypeError:
                raise ConfigError(f"a denoiser's config: model.{key}={value!r}; expected {settings[key]!r}") from None
        return of(settings, tuple(found["patch"]), found["channels"], found["text_width"])

    def to_model(self) -> dict[str, Any]:
        """Settings for `config.model.update`, which make this architecture of any config."""
        return dict(self.model)

    def with_doors_of(self, other: Architecture) -> Architecture:
        """This one but for its first and last layers, and those that can be added, which are the other's."""
        model = tuple((key, other[key] if key in DOORS else value) for key, value in self.model)
        return dataclasses.replace(other, model=model)

    def config(self) -> ConfigDict:
        """A run's config of this architecture, in float32, all else at its default."""
        config = base()
        config.dtype = "float32"
        config.model.update(self.to_model())
        return config


def of(model: ConfigDict, patch: Grid, channels: int, text_width: int) -> Architecture:
    """The architecture that `config.model` describes, for latents of so many channels and text of such a width."""
    values = {key: model[key] for key in KEYS}
    values["mlp_dim"] = mlp_dim(model)
    pairs = tuple(model.rope_pairs) or axis_widths(model.width // model.heads, 3)
    values["rope_pairs"] = pairs if model.rope else ()
    values["table"] = tuple(model.table) if model.absolute in ("table", "sincos") else ()
    return Architecture(tuple(values.items()), tuple(patch), channels, text_width if model.cross else 0)


def mlp_dim(model: ConfigDict) -> int:
    """Hidden width of a block's MLP."""
    return model.mlp_dim or int(model.width * model.mlp_ratio)


def difference(a: Architecture, b: Architecture) -> tuple[str, Any, Any] | None:
    """The first thing in which two differ: (its name, its value of each); None where they are the same."""
    for key, value in a.model:
        if b[key] != value:
            return f"model.{key}", value, b[key]
    for key in ("patch", "channels", "text_width"):
        if getattr(a, key) != getattr(b, key):
            return key, getattr(a, key), getattr(b, key)
    return None
