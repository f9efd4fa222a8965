"""Fréchet video distance (Unterthiner et al., arXiv:1812.01717): how far two sets of clips are apart in I3D's eyes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np

from vidgen.evaluation import i3d

RELIABLE = 256  # clips; of fewer, the value only tells which of two sets of the same size is nearer


def frechet(a_NxF: np.ndarray, b_MxF: np.ndarray) -> float:
    """The Fréchet distance of two normal distributions that are fitted to features, ≥ 0; two or more rows each.

    |μa - μb|² + tr(Σa + Σb - 2 (Σa Σb)^½), in f64 (Dowson and Landau, 1982). With Σ = XᵀX / (n - 1) of centred rows X,
    the root's trace is the sum of the singular values of Xa Xbᵀ: exact also where there are fewer clips than features
    and Σ has no full rank.
    """
    a, b = (np.asarray(x, np.float64) for x in (a_NxF, b_MxF))
    if min(len(a), len(b)) < 2:
        raise ValueError(f"Fréchet distance of {len(a)} and {len(b)} clips: expected 2 or more")
    centred = [(x - x.mean(0)) / np.sqrt(len(x) - 1) for x in (a, b)]
    root = np.linalg.svd(_short(centred[0]) @ _short(centred[1]).T, compute_uv=False).sum()
    spread = sum(np.square(x).sum() for x in centred)
    return max(0.0, float(np.square(a.mean(0) - b.mean(0)).sum() + spread - 2 * root))


def _short(x_NxF: np.ndarray) -> np.ndarray:
    """A matrix of at most F rows with the same XᵀX."""
    return np.linalg.qr(x_NxF, mode="r") if len(x_NxF) > x_NxF.shape[1] else x_NxF


def features(params: Mapping[str, Any], clips: Iterable[np.ndarray]) -> np.ndarray:
    """I3D's logits [N,400] f32 of u8 clips [T,H,W,3], T ≥ 9: one at a time, a compile for each size."""
    rows = [np.asarray(_features(params, clip[None]))[0] for clip in clips]
    return np.stack(rows) if rows else np.zeros((0, i3d.FEATURES), np.float32)


@jax.jit
def _features(params, video: jax.Array) -> jax.Array:
    return i3d.features(params, video)


def about(clips: int) -> str:
    """What to know of an FVD of so many clips; empty where there are enough."""
    return f"{clips} clips, fewer than {RELIABLE}: only relative" if clips < RELIABLE else ""
