"""Which checkpoints of a run are kept: by step, by time, and by what they are worth."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict
from orbax.checkpoint.checkpoint_managers import PolicyCheckpointInfo, PreservationContext

from vidgen.config import ConfigError

TEMPORARY = "temporary"  # 1 among the figures that a checkpoint is saved with: it goes when a newer one is there

# Figures of held-out clips that checkpoints may be judged by, a kind of run each, and which way is better.
SMALLER, GREATER = "smaller", "greater"
FIGURES = {
    "denoiser": {"heldout_loss": SMALLER},
    "vae": {
        "heldout_loss": SMALLER,
        "heldout_l1": SMALLER,
        "heldout_l2": SMALLER,
        "heldout_kl": SMALLER,
        "heldout_psnr": GREATER,
    },
}


@dataclasses.dataclass(frozen=True)
class Keep:
    """Which checkpoints stay when a new one has been saved; it is asked by Orbax, as its preservation policy.

    The newest one always stays. A temporary one goes when a newer one is there.

    Attributes:
      newest: how many of those that aren't temporary, 1 or more.
      every: steps whose multiples stay for good; 0: none.
      best: figure whose best checkpoint stays; empty: none. A checkpoint saved without it, or with one that isn't
        finite, is not judged.
    """

    newest: int = 2
    every: int = 0
    best: str = ""

    @classmethod
    def from_config(cls, train: ConfigDict) -> Keep:
        """What `config.train` says."""
        return cls(train.keep, train.keep_every, train.best)

    def should_preserve(
        self, checkpoints: Sequence[PolicyCheckpointInfo], *, context: PreservationContext | None = None
    ) -> list[bool]:
        """For each of the checkpoints, oldest first, whether it stays."""
        del context
        figures = {c.step: dict(c.metrics or {}) for c in checkpoints}
        lasting = [step for step, found in figures.items() if not found.get(TEMPORARY)]
        stay = {*list(figures)[-1:], *lasting[-self.newest :]}
        if self.every:
            stay |= {step for step in lasting if step % self.every == 0}
        sign = 1 if _better(self.best) == SMALLER else -1
        judged = {step: found.get(self.best, math.nan) for step, found in figures.items()}
        judged = {step: sign * value for step, value in judged.items() if math.isfinite(value)}
        if self.best and judged:
            stay.add(min(judged, key=lambda step: (judged[step], -step)))
        return [step in stay for step in figures]


def check(config: ConfigDict) -> None:
    """Raises ConfigError for a `config.train.best` that the run's held-out clips never give."""
    train, known = config.train, FIGURES[config.task]
    if not train.best:
        return
    if train.best not in known:
        near = difflib.get_close_matches(train.best, known, n=1, cutoff=0) or list(known)
        raise ConfigError(
            f"config.train.best={train.best}: expected one of {', '.join(known)}, or nothing; nearest: {near[0]}"
        )
    if not train.eval_every:
        raise ConfigError(
            f"config.train.best={train.best}: nothing is ever judged with config.train.eval_every=0; expected it to be "
            f"1 or more, as {train.checkpoint_every}, which is config.train.checkpoint_every"
        )


def figures(keep: Keep, metrics: Mapping[str, Any] | None, temporary: bool) -> dict[str, float]:
    """What a checkpoint is saved with, for `should_preserve` to know later."""
    found = {TEMPORARY: 1.0} if temporary else {TEMPORARY: 0.0}
    value = (metrics or {}).get(keep.best) if keep.best else None
    return found if value is None or not math.isfinite(value) else found | {keep.best: float(value)}


def _better(figure: str) -> str:
    return next((ways[figure] for ways in FIGURES.values() if figure in ways), SMALLER)
