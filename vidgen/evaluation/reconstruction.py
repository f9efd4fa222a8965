"""The suite `reconstruction`: what is left of held-out clips after a tokenizer has taken them there and back.

A clip at a time, all tokenizers in turn, so that memory holds few clips however many are measured.
"""

from __future__ import annotations

import dataclasses
import heapq
import math
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from vidgen import perceptual
from vidgen.config import ConfigError
from vidgen.data.clip import BadClip
from vidgen.data.moving_shapes import MovingShapes
from vidgen.data.sources import Source, open_source
from vidgen.evaluation import codecs, fvd, i3d, moving_shapes, quality
from vidgen.evaluation.codecs import Codec
from vidgen.objectives import lpips
from vidgen.studio import compression, media
from vidgen.training.checkpoint import read_config

TRAINING_CLIPS = 64  # that the linear baseline is measured on
RATIOS = (6, 12, 24, 48, 96, 192)  # pixel values a value that it keeps
WORST = 4  # clips shown
SHOWN = 6
_WIDEST = 480  # pixels of a clip in pictures; of larger ones, every so-many-th is shown


@dataclasses.dataclass(frozen=True)
class Original:
    """A clip to take there and back; what is None does not apply.

    Attributes:
      video: [T,H,W,3] u8.
      boxes: [T,H,W] bool, pixels in the boxes of objects.
      scene: its ground truth, where the clip shows all of it.
    """

    name: str
    video: np.ndarray
    fps: float
    boxes: np.ndarray | None = None
    scene: Any = None

    @property
    def size(self) -> str:
        """Such as 17x64x64."""
        return "x".join(map(str, self.video.shape[:3]))


@dataclasses.dataclass
class Tally:
    """What was measured of one tokenizer on one data set: a row a clip, and the clips to show."""

    rows: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    seen: list[np.ndarray | None] = dataclasses.field(default_factory=list)  # I3D's features
    shown: list[list[np.ndarray]] = dataclasses.field(default_factory=list)
    worst: list[tuple[float, int, list[np.ndarray]]] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Judges:
    """Weights of the networks that judge, or None; and why those are missing."""

    lpips: Any
    i3d: Any
    notes: tuple[str, ...]

    @classmethod
    def load(cls, with_fvd: bool) -> Judges:
        """Those that are installed."""
        faults = (perceptual.missing("lpips"), perceptual.missing("i3d") if with_fvd else "FVD, by --nofvd")
        nets = (None if fault else jax.device_put(net.load()) for net, fault in zip((lpips, i3d), faults, strict=True))
        return cls(*nets, tuple(f"not measured: {fault}" for fault in faults if fault))


def run(
    workdir: str,
    *,
    tokenizers: Sequence[str] = (),
    inputs: Sequence[str] = (),
    clips: int = 64,
    frames: int = 0,
    with_fvd: bool = True,
) -> tuple[dict[str, Any], dict[str, tuple[np.ndarray, float]]]:
    """Measures the run's tokenizer, others beside it, and the linear baseline of the same strides.

    Writes WORKDIR/evaluation/compression.json, .svg and .html.

    Args:
      workdir: of a run: its VAE where it trained one, else its tokenizer.
      tokenizers: more of them: directories of weights, workdirs, patch, wavelet.
      inputs: data sets, as `config.data.source` names them; none: the run's own. Of the run's own, the held-out side.
      clips: of each data set, evenly spread over it.
      frames: of a clip at most, from its start; 0: all.
      with_fvd: whether I3D looks at the clips, which takes most of the time on a CPU.

    Returns:
      (results, {name: (clip [T,H,W,3] u8 to show, fps)}). The results hold the run's own tokenizer on the first data
      set at the top; then `datasets`, {data set: {"all" or a size: {tokenizer: figures}}}, `tokenizers`, `notes`,
      `settings`, and `per_clip`, {data set: {tokenizer: a row a clip}}.

    Raises ConfigError.
    """
    if clips < 1 or frames < 0:
        raise ConfigError(f"--clips={clips} --frames={frames}: expected clips ≥ 1, and frames ≥ 0 (0: all)")
    config = read_config(workdir)
    data = [(name, *_opened(config, name)) for name in dict.fromkeys(inputs or (config.data.source,))]
    own = codecs.of_run(config, workdir)
    asked = codecs.distinct([own, *(codecs.named(which, config.tokenizer) for which in tokenizers)])
    measured = [*asked, *_baseline(config, asked, frames)]
    judges = Judges.load(with_fvd)

    notes = [*judges.notes, *(note for *_, note in data if note)]
    datasets, per_clip, table, pictures = {}, {}, [], {}
    for name, source, _ in data:
        originals, tallies, unused = _measure(source, measured, clips, frames, judges)
        notes += [f"{name}: {count} clips could not be used: {reason}" for reason, count in unused.items()]
        sizes = [row["size"] for row in originals.rows]
        groups = {"all": sizes} | ({size: [size] for size in sorted(set(sizes))} if len(set(sizes)) > 1 else {})
        datasets[name] = {
            group: {c.name: figures(c, tallies[c.name], originals, set(among)) for c in measured}
            for group, among in groups.items()
        }
        per_clip[name] = {c.name: tallies[c.name].rows for c in asked}
        about = [{"tokenizer": c.name, "dataset": name, "kind": c.kind, "stride": c.geometry.stride} for c in measured]
        table += [row | datasets[name]["all"][row["tokenizer"]] for row in about]
        if judges.i3d is not None and (few := fvd.about(sum(f is not None for f in originals.seen))):
            notes.append(f"FVD on {name}: {few}")
        pictures |= _pictures(name if len(data) > 1 else "", asked, tallies, originals.rows[0]["fps"])
    if judges.i3d is not None:
        notes.append("FVD of the linear baseline is not measured")

    first = data[0][0]
    results = {
        **datasets[first]["all"][asked[0].name],
        "tokenizer": asked[0].name,
        "dataset": first,
        "datasets": datasets,
        "tokenizers": {c.name: _described(c) for c in measured},
        "notes": notes,
        "settings": {
            "clips": clips,
            "frames": frames,
            "fvd": with_fvd,
            "inputs": [name for name, *_ in data],
            "tokenizers": list(tokenizers),
            "moving_shapes": config.data.moving_shapes.to_dict(),
            "holdout": config.data.holdout,
            "training_clips_of_the_baseline": TRAINING_CLIPS,
        },
        "per_clip": per_clip,
    }
    compression.write(os.path.join(workdir, "evaluation"), table)
    return results, pictures


def _opened(config: ConfigDict, name: str) -> tuple[Source, str]:
    """A data set's clips, and what to know of them."""
    data = ConfigDict(config.data)
    own = name == config.data.source
    data.source, data.holdout = name, config.data.holdout if own else 0.0
    source = open_source(data, "heldout")
    seen = own and data.holdout == 0 and not isinstance(source, MovingShapes)
    return source, f"{name}: config.data.holdout=0, so these are clips that were trained on" if seen else ""


def _baseline(config: ConfigDict, asked: Sequence[Codec], frames: int) -> list[Codec]:
    """The linear baseline at the strides of what was asked for, at RATIOS and at each VAE's own compression."""
    source = open_source(config.data, "train")
    training = None
    found: list[Codec] = []
    shapes = dict.fromkeys((c.geometry.stride, c.geometry.patch) for c in asked)
    for stride, patch in shapes:
        if any(s & (s - 1) for s in stride):
            continue  # no wavelet has these
        if training is None:
            training = [clip.video for clip in _clips(source, TRAINING_CLIPS, frames, Counter())]
        channels = 3 * math.prod(stride)
        kept = {channels // ratio for ratio in RATIOS}
        kept |= {c.channels for c in asked if c.kind == "vae" and c.geometry.stride == stride}
        found += codecs.linear(stride, patch, kept, training)
    return codecs.distinct(found)


def _clips(source: Source, count: int, frames: int, unused: Counter) -> Iterator[Original]:
    """`count` clips, evenly spread over the source; those that can't be read are counted in `unused`."""
    total = len(source.sizes)
    for index in np.unique(np.linspace(0, max(total - 1, 0), min(count, total)).round().astype(int)).tolist():
        try:
            clip = source.read(index, 0)
        except BadClip as e:
            unused[str(e)] += 1
            continue
        video = clip.video[: frames or None]
        boxes = scene = None
        if isinstance(source, MovingShapes):
            scene, _ = source.scene(index, 0)
            boxes = quality.boxes(scene, *clip.video.shape[:3])[: len(video)]
            scene = scene if len(video) == len(clip.video) else None
        yield Original(source.name(index), video, clip.fps, boxes, scene)


def _measure(
    source: Source, measured: Sequence[Codec], count: int, frames: int, judges: Judges
) -> tuple[Tally, dict[str, Tally], Counter]:
    """Takes clips there and back: what was measured of the originals, of each tokenizer, and what was left out."""
    unused: Counter = Counter()
    originals, tallies = Tally(), {codec.name: Tally() for codec in measured}
    every = max(1, min(count, len(source.sizes)) // SHOWN)
    for n, clip in enumerate(_clips(source, count, frames, unused)):
        right = moving_shapes.judge(clip.video, clip.scene).all_right if clip.scene else None
        originals.rows.append({"size": clip.size, "fps": clip.fps, "all_right": right})
        originals.rows[-1]["flicker"] = quality.flicker(clip.video)
        originals.seen.append(_seen(judges, clip.video))
        for codec in measured:
            other, tally = codec.reconstruct(clip.video), tallies[codec.name]
            tally.rows.append(compared(clip, other, judges))
            if codec.kind == "linear":
                continue
            tally.seen.append(_seen(judges, other))
            shown = _side_by_side(clip.video, other)
            if n % every == 0 and len(tally.shown) < SHOWN:
                tally.shown.append(shown)
            heapq.heappush(tally.worst, (-tally.rows[-1]["psnr"], n, shown))
            if len(tally.worst) > WORST:
                heapq.heappop(tally.worst)
    if not originals.rows:
        raise ConfigError(f"no clip could be used: {dict(unused) or 'the data set is empty'}")
    return originals, tallies, unused


def _seen(judges: Judges, video: np.ndarray) -> np.ndarray | None:
    """I3D's features of a clip that is long enough."""
    return fvd.features(judges.i3d, [video])[0] if judges.i3d is not None and len(video) >= i3d.LEAST else None


def compared(clip: Original, other: np.ndarray, judges: Judges) -> dict[str, Any]:
    """The figures of one clip; None where one does not apply."""
    small = min(clip.video.shape[1:3])
    masked = clip.boxes is not None and clip.boxes.any()
    return {
        "clip": clip.name,
        "size": clip.size,
        "psnr": quality.psnr(clip.video, other),
        "gain": quality.psnr(clip.video, other) - quality.still_psnr(clip.video),
        "ssim": float(quality.ssim(clip.video, other).mean()) if small >= quality.WINDOW else None,
        "lpips": quality.perceptual_distance(judges.lpips, clip.video, other)
        if judges.lpips is not None and small >= lpips.LEAST
        else None,
        "flicker": quality.flicker(other),
        "unsteadiness": quality.unsteadiness(clip.video, other),
        "box_psnr": quality.psnr(clip.video, other, clip.boxes) if masked else None,
        "all_right": moving_shapes.judge(other, clip.scene).all_right if clip.scene else None,
    }


def figures(codec: Codec, tally: Tally, originals: Tally, sizes: set[str]) -> dict[str, Any]:
    """Means over the clips of these sizes; None where a figure applies to none of them.

    psnr: mean, dB; psnr_min: the worst clip's; gain_min: the least that a clip has above its own mean frame. ssim,
    lpips: means. fvd: of `fvd_clips` clips of 9 frames or more.
    flicker, flicker_excess: of the reconstructions, and how much more than the originals'. unsteadiness: the flicker
    of the error. box_psnr: dB, inside the objects' boxes. all_right, all_right_original: share that the judge of
    moving shapes finds all right. latent_values_per_pixel_value, and pixel_values_per_latent_value, its inverse.
    tokens_per_clip.
    """
    take = [i for i, row in enumerate(tally.rows) if row["size"] in sizes]
    rows, before = [tally.rows[i] for i in take], [originals.rows[i] for i in take]

    def mean(rows: Sequence[dict[str, Any]], key: str) -> float | None:
        known = [row[key] for row in rows if row[key] is not None]
        return float(np.mean(known)) if known else None

    shapes = [tuple(map(int, row["size"].split("x"))) for row in rows]
    values = sum(codec.latent_values(*shape) for shape in shapes)
    pixels = sum(3 * math.prod(shape) for shape in shapes)
    pairs = [(tally.seen[i], originals.seen[i]) for i in take if tally.seen and tally.seen[i] is not None]
    distance = fvd.frechet(*map(np.stack, zip(*pairs, strict=True))) if len(pairs) > 1 else None
    return {
        "clips": len(rows),
        "psnr": mean(rows, "psnr"),
        "psnr_min": min(row["psnr"] for row in rows),
        "gain_min": min(row["gain"] for row in rows),
        "ssim": mean(rows, "ssim"),
        "lpips": mean(rows, "lpips"),
        "fvd": distance,
        "fvd_clips": len(pairs),
        "flicker": mean(rows, "flicker"),
        "flicker_excess": mean(rows, "flicker") - mean(before, "flicker"),
        "unsteadiness": mean(rows, "unsteadiness"),
        "box_psnr": mean(rows, "box_psnr"),
        "all_right": mean(rows, "all_right"),
        "all_right_original": mean(before, "all_right"),
        "latent_values_per_pixel_value": values / pixels,
        "pixel_values_per_latent_value": pixels / values,
        "tokens_per_clip": float(np.mean([codec.tokens(*shape) for shape in shapes])),
    }


def _described(codec: Codec) -> dict[str, Any]:
    geometry = dataclasses.asdict(codec.geometry)
    return {"kind": codec.kind, **geometry, "weights": codec.source, "digest": codec.digest}


def _side_by_side(original: np.ndarray, other: np.ndarray) -> list[np.ndarray]:
    """[original, reconstruction, error × 4], small enough to show."""
    error = np.abs(original.astype(np.int16) - other)
    step = -(-original.shape[2] // _WIDEST)
    return [x[:, ::step, ::step] for x in (original, other, np.minimum(4 * error, 255).astype(np.uint8))]


def _pictures(
    dataset: str, asked: Sequence[Codec], tallies: dict[str, Tally], fps: float
) -> dict[str, tuple[np.ndarray, float]]:
    """File name → clip: `reconstruction` of the run's own tokenizer, and `reconstruction_worst` of each."""
    found = {}
    for i, codec in enumerate(asked):
        tally = tallies[codec.name]
        # With one tokenizer and one data set, the plain names.
        suffix = "".join(
            f"_{re.sub('[^A-Za-z0-9.]+', '_', part)}" for part in (dataset, codec.name if i else "") if part
        )
        scale = max(1, 128 // tally.shown[0][0].shape[2])
        worst = [shown for *_, shown in sorted(tally.worst, key=lambda w: -w[0])]
        for name, rows in (("reconstruction", tally.shown), ("reconstruction_worst", worst)):
            found[name + suffix] = (media.grid(rows, scale=scale), fps)
    return found


def told(results: dict[str, Any]) -> str:
    """The results as a table for a terminal."""
    shown = [(key, name, how) for key, name, how in compression.COLUMNS if key != "dataset"]
    lines = []
    for dataset, groups in results["datasets"].items():
        for group, found in groups.items():
            clips = next(iter(found.values()))["clips"]
            lines += ["", f"{dataset}{'' if group == 'all' else f', {group}'}: {clips} clips"]
            rows = [{"tokenizer": name} | row for name, row in found.items()]
            columns = [c for c in shown if any(row.get(c[0]) is not None for row in rows)]
            cells = [[name for _, name, _ in columns]]
            cells += [["–" if row[key] is None else how.format(row[key]) for key, _, how in columns] for row in rows]
            widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
            for line in cells:
                first, *rest = (
                    f"{cell:{'<' if n == 0 else '>'}{width}}"
                    for n, (cell, width) in enumerate(zip(line, widths, strict=True))
                )
                lines.append("  ".join(["", first, *rest]))
            right = next(iter(found.values()))["all_right_original"]
            lines += [f"  the judge finds {right:.1%} of the originals all right"] if right is not None else []
    lines += ["", *(f"note: {note}" for note in results["notes"])] if results["notes"] else []
    return "\n".join(lines[1:])
