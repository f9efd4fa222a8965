"""`vidgen replay`: takes a step of a run once more, and says what each row and each clip of it did."""

from __future__ import annotations

import itertools
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from vidgen import config as configs
from vidgen import train
from vidgen.batch import TokenBatch
from vidgen.config import ConfigError
from vidgen.data.progress import Progress
from vidgen.parallel.mesh import path_name
from vidgen.studio import media
from vidgen.training import guards, metrics, optimizers, planned, restored
from vidgen.training.checkpoint import Checkpoints, read_config
from vidgen.training.course import Course
from vidgen.training.guards import Jumps, batch_step, told
from vidgen.training.planned import Piece
from vidgen.training.program import Program, build, task_of
from vidgen.training.start import check_digest
from vidgen.training.state import TrainState
from vidgen.training.step import Batch, Inputs, row_keys

FOLDER = "replay"  # of a workdir
SUSPECTS = 4  # rows whose clips are looked at one by one, at most
SHOWN = 8  # rows of the picture, and clips of a row, at most


def run(workdir: str, step: int) -> dict[str, Any]:
    """Restores the newest checkpoint before a step, takes the steps up to it again, and looks into it.

    On the mesh of the run, all that comes of it has the same bits as then. Writes WORKDIR/replay/<step>/: replay.json,
    which holds what is returned, and clips.gif and .mp4, the rows that stand out, a row each. The run itself is not
    touched, and may be under way.

    Args:
      workdir: of a training run.
      step: from 1.

    Returns:
      {"step", "batch": which of the plan, "from": the checkpoint's step or 0, "loss", "grad_norm", "usual_norm",
      "skipped", "same": whether that is what the run noted, None where it noted nothing, "not_finite": arrays whose
      gradient has such numbers, "rows": of each row its own "loss", "grad_norm" and "clips" ("index", "pass", "name",
      and for rows that stand out each clip's own "loss" and "grad_norm"), "suspects": those clips, worst first,
      "shown": names of the clips in the picture, "files"}. Numbers that are not finite are text: "nan", "inf".

    Raises ConfigError.
    """
    config = read_config(workdir)
    if not 1 <= step <= config.train.steps:
        near = min(max(step, 1), config.train.steps)
        raise ConfigError(f"--step={step}: expected 1 to {config.train.steps}, the steps of the run; nearest: {near}")
    noted = guards.read(workdir, step)
    # What is computed between steps is no part of them.
    config = configs.override(config, {"train.eval_every": 0, "train.sample_every": 0})
    program = build(*_placed(config))
    course = train.COURSES[config.task].course(program)
    checkpoints = Checkpoints(workdir, read_only=True)
    try:
        jumps, start = _way(checkpoints, step, noted)
        state = _state(program, course, checkpoints, start)
    finally:
        checkpoints.close()
    batch, state = _taken(program, course, state, start, step, jumps)
    rows = planned.rows_of(program, course.source)(batch_step(step - 1, jumps))
    found = _looked_into(program, course, rows, state, batch, step)
    found = {"step": step, "batch": batch_step(step - 1, jumps), "from": start} | found
    found["same"] = _same(workdir, found, noted)
    folder = os.path.join(workdir, FOLDER, str(step))
    found["shown"], found["files"] = _picture(folder, course, rows, found)
    found["files"] = [os.path.join(folder, "replay.json"), *found["files"]]
    media.write(found["files"][0], json.dumps(found, indent=1, ensure_ascii=False).encode())
    return found


def _placed(config: ConfigDict) -> tuple[ConfigDict, Any]:
    """(the config, its mesh), with the run's mesh where the devices here can be that, else with one that fits them."""
    task = task_of(config)
    try:
        return config, task.mesh(config)
    except ConfigError:
        _say("The devices are others than the run's: what comes of it is the same but for rounding")
    config = configs.override(config, restored.HERE)
    try:
        return config, task.mesh(config)
    except ConfigError:
        config = configs.override(config, {"mesh.fsdp": 1})
        return config, task.mesh(config, jax.devices()[:1])


def _way(checkpoints: Checkpoints, step: int, noted: dict[str, Any] | None) -> tuple[Jumps, int]:
    """(the jumps of the run that took the step, the newest good checkpoint before it on that way or 0)."""

    def good(s: int, items: Sequence[str] = ()) -> bool:
        if damage := checkpoints.damage(s, items):
            _say(f"Passing over the checkpoint of step {s}: {damage}")
        return not damage

    def jumps_of(s: int) -> Jumps:
        return tuple((start, offset) for start, offset in checkpoints.facts(s).get("guards", {}).get("jumps", ()))

    steps = sorted(checkpoints.steps, reverse=True)
    if noted:
        jumps = tuple((start, offset) for start, offset in noted["jumps"])
    else:
        jumps = next((jumps_of(s) for s in steps if good(s, ("facts",))), ())
    for s in steps:
        if s < step and good(s) and _before(jumps_of(s), s) == _before(jumps, s):
            return jumps, s
    _say(f"No checkpoint from before step {step} is left: all steps are taken again, from the first")
    return jumps, 0


def _before(jumps: Jumps, step: int) -> Jumps:
    return tuple(jump for jump in jumps if jump[0] < step)


def _state(program: Program, course: Course, checkpoints: Checkpoints, start: int) -> TrainState:
    """After `start` steps; raises ConfigError where clips or weights are not those of the run."""
    if not start:
        return program.init()
    config, facts = program.config, checkpoints.facts(start)
    restored.check_tokenizer(course.tokenizer, facts, config.tokenizer.weights)
    restored.check_text(course.text, facts, config.text.weights)
    check_digest(config, program.task.start, facts)
    if facts["fingerprint"] != course.source.fingerprint:
        raise ConfigError(
            f"config.data.source={config.data.source}: not the clips that the run was trained on; put those back there"
        )
    return checkpoints.restore(start, program.state_like).replace(frozen=program.frozen())


def _taken(
    program: Program, course: Course, state: TrainState, start: int, step: int, jumps: Jumps
) -> tuple[Batch, TrainState]:
    """(the batch of a step, the state before it)."""
    progress = Progress("replaying", step - start)
    for done, batch in _batches(course, jumps, start, step):
        if done == step - 1:
            break
        state, _ = program.step_after(done)(state, batch)
        progress.update(done - start, f"step {done + 1} of {step}")
    progress.close()
    return batch, state


def _batches(course: Course, jumps: Jumps, start: int, stop: int) -> Iterator[tuple[int, Batch]]:
    """(steps done, the batch that the next one takes), from `start` up to but not including `stop`."""
    turns = sorted({start, stop} | {at for at, _ in jumps if start < at < stop})
    for first, last in itertools.pairwise(turns):
        with course.batches(batch_step(first, jumps)) as batches:
            for done in range(first, last):
                yield done, next(batches)[0]


def _looked_into(
    program: Program, course: Course, rows: Sequence[Sequence[Piece]], state: TrainState, batch: Batch, step: int
) -> dict[str, Any]:
    """What the step makes of the batch, as a whole and of each part; the state is used up."""
    whole = NamedSharding(program.mesh, P())
    gradient = program.gradient_after(step - 1)

    @jax.jit
    def finite(state: TrainState, batch: Batch) -> jax.Array:
        each = [jnp.isfinite(x).all() for x in jax.tree.leaves(gradient(state, batch).grads)]
        return jax.lax.with_sharding_constraint(jnp.stack(each), whole)

    paths = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(state.params)]
    good = np.asarray(finite(state, batch))
    alone, skipped = _alone(program, step - 1), int(state.skipped)

    def figures(row: int, segment: int = 0) -> dict[str, Any]:
        loss, norm = jax.device_get(alone(state, batch, np.int32(row), np.int32(segment)))
        return {"loss": told(float(loss)), "grad_norm": told(float(norm))}

    progress, listed = Progress("rows", len(rows)), []
    for i, row in enumerate(rows):
        listed.append({"row": i, **(figures(i) if row else {}), "clips": guards.clips(course.source, row)})
        progress.update(i + 1, f"row {i + 1} of {len(rows)}")
    progress.close()
    worst = sorted((row for row in listed if row["clips"]), key=_badness, reverse=True)
    broken = [row for row in worst if _badness(row) == math.inf]
    standing_out = (broken or worst[:1])[:SUSPECTS]
    for row in standing_out:
        for place, clip in enumerate(row["clips"], 1):
            single = len(row["clips"]) == 1
            clip |= {name: row[name] for name in ("loss", "grad_norm")} if single else figures(row["row"], place)
    suspects = [{**clip, "row": row["row"]} for row in standing_out for clip in row["clips"]]
    suspects.sort(key=_badness, reverse=True)
    _, last = program.step_after(step - 1)(state, batch)
    last = {name: float(value) for name, value in jax.device_get(last).items()}
    return {
        "loss": told(last["loss"]),
        "grad_norm": told(last["grad_norm"]),
        "usual_norm": told(last["usual_norm"]),
        "skipped": last["skipped"] > skipped,
        "not_finite": [path for path, is_good in zip(paths, good, strict=True) if not is_good],
        "rows": listed,
        "suspects": suspects,
    }


def _badness(part: dict[str, Any]) -> float:
    """By which rows and clips stand out: the gradient's norm, and anything that is not finite above all."""
    norm = float(part["grad_norm"])
    return norm if math.isfinite(norm) and math.isfinite(float(part["loss"])) else math.inf


def _alone(program: Program, done: int) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """(state, batch, row, segment) → (loss, norm of its gradient) of one row, or of one clip of it; segment 0: all.

    The row has the noise that it has in the step. As many copies of it are computed as the mesh shares rows over.
    """
    loss_sum, weight, mesh = program.loss_after(done), program.task.weight, program.mesh
    copies = mesh.shape["data"] * mesh.shape["fsdp"]
    whole = NamedSharding(mesh, P())

    def alone(state: TrainState, batch: Batch, row: jax.Array, segment: jax.Array) -> tuple[jax.Array, jax.Array]:
        keys = row_keys(program.config.seed, state.step, jax.tree.leaves(batch)[0].shape[0])
        batch, keys = jax.tree.map(lambda x: x[jnp.full(copies, row)], (batch, keys))
        batch = jax.lax.with_sharding_constraint(_only(batch, segment), program.batch_shardings)
        total = jnp.maximum(jnp.sum(weight(batch, keys)), 1.0)

        def loss(params: Any) -> jax.Array:
            return loss_sum(params, Inputs(batch, keys, state.aux, state.frozen))[0] / total

        value, grads = jax.value_and_grad(loss)(state.params)
        return value, optimizers.clipped(grads, 0.0)[0]

    return jax.jit(alone, out_shardings=whole)


def _only(batch: Batch, segment: jax.Array) -> Batch:
    """Rows with one of their clips, the others padding: zeros, so that what is wrong with those stays out."""
    if not isinstance(batch, TokenBatch):
        return batch

    def own(segments: jax.Array) -> jax.Array:
        return (segments == segment) | (segment == 0)

    def kept(values: jax.Array, mask: jax.Array) -> jax.Array:
        return jnp.where(mask.reshape(mask.shape + (1,) * (values.ndim - mask.ndim)), values, jnp.zeros_like(values))

    tokens, segments = own(batch.segment), jnp.arange(batch.clip.shape[1]) + 1
    return batch.replace(
        **{name: kept(getattr(batch, name), tokens) for name in ("tokens", "coords", "segment", "level")},
        clip=jnp.where(own(segments), batch.clip, -1),
        context={
            name: (values, own_by) if name == "empty" else (kept(values, own(own_by)), kept(own_by, own(own_by)))
            for name, (values, own_by) in batch.context.items()
        },
    )


def _same(workdir: str, found: dict[str, Any], noted: dict[str, Any] | None) -> bool | None:
    """Whether the run noted the same numbers, of a bad step or in metrics.jsonl; None where it noted none."""
    if noted:
        return all(found[name] == noted["numbers"][name] for name in ("loss", "grad_norm"))
    rows = [row for row in metrics.read(workdir) if row["step"] == found["step"]]
    return found["grad_norm"] == rows[-1]["grad_norm"] if rows else None


def _picture(
    folder: str, course: Course, rows: Sequence[Sequence[Piece]], found: dict[str, Any]
) -> tuple[list[list[str]], list[str]]:
    """(names of the clips shown, in rows; files): the rows that stand out most, as far as they can be read."""
    worst = sorted((row for row in found["rows"] if row["clips"]), key=_badness, reverse=True)[:SHOWN]
    names, videos = [], []
    for row in worst:
        read = [(clip["name"], piece.read()) for clip, piece in zip(row["clips"], rows[row["row"]], strict=True)]
        if there := [(name, video) for name, video in read[:SHOWN] if video is not None]:
            names.append([name for name, _ in there])
            videos.append([video for _, video in there])
    if not videos:
        return [], []
    widest = max(video.shape[2] for row in videos for video in row)
    shown = media.grid(videos, scale=max(1, 512 // (SHOWN * widest)))
    fps = float(course.source.sizes.fps[rows[worst[0]["row"]][0].clip])
    files = [os.path.join(folder, f"clips.{suffix}") for suffix in ("gif", "mp4")]
    for path in files:
        media.save_video(path, shown, fps)
    return names, files


def table(found: dict[str, Any]) -> str:
    """What `run` gave, for a terminal."""
    out = "skipped" if found["skipped"] else "taken"
    words = {True: "as the run noted it", False: "not what the run noted", None: "the run noted nothing of it"}
    lines = [
        f"step {found['step']}, {out}: loss {_number(found['loss'])}, gradient norm {_number(found['grad_norm'])} "
        f"(usually {_number(found['usual_norm'])}); {words[found['same']]}"
    ]
    if found["not_finite"]:
        more = f" and {len(found['not_finite']) - 3} more" if len(found["not_finite"]) > 3 else ""
        lines.append(f"  gradients that are not finite: {', '.join(found['not_finite'][:3])}{more}")
    lines.append(f"  {'row':>4}  {'loss':>9}  {'gradient':>9}  clips")
    for row in found["rows"]:
        if row["clips"]:
            names = ", ".join(clip["name"] for clip in row["clips"])
            figures = f"{_number(row['loss']):>9}  {_number(row['grad_norm']):>9}"
            lines.append(f"  {row['row']:>4}  {figures}  {names[:200]}{'…' if len(names) > 200 else ''}")
    lines.append("  clips of the rows that stand out, each alone:")
    for clip in found["suspects"][:10]:
        figures = f"{_number(clip['loss']):>9}  {_number(clip['grad_norm']):>9}"
        lines.append(f"  {clip['row']:>4}  {figures}  {clip['name']} (index {clip['index']}, pass {clip['pass']})")
    return "\n".join([*lines, f"  {', '.join(found['files'])}"])


def _number(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.4g}"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
