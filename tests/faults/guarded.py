"""Numbers gone wrong: a bit turned over on one device, a batch that gives no number, losses that run away."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pathlib
import random
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import jax
import numpy as np
from table import Result, Row, Trial, Verdict, all_wrong
from tiny_runs import arrays, make_config, trained

from vidgen.data import feed
from vidgen.data.packing import Packing
from vidgen.data.sources import open_source
from vidgen.parallel.processes import Restartable, put
from vidgen.training.checkpoint import Checkpoints
from vidgen.training.program import Program, build, task_of
from vidgen.training.recheck import Recheck

STEPS = 60
SPIKE = 2.0


def trials(short: bool, seed: int) -> list[Trial]:
    """20 bits of one copy of a weight, 5 batches that are no numbers, 5 stretches of bad ones; short: 2, 1 and 1."""
    rng = random.Random(f"numbers {seed}")
    bits, numbers, stretches = (2, 1, 1) if short else (20, 5, 5)
    draw = [{"what": "bit", **{k: rng.random() for k in ("array", "device", "place", "bit")}} for _ in range(bits)]
    draw += [{"what": "no number", "batch": rng.randrange(STEPS)} for _ in range(numbers)]
    return draw + [{"what": "spike", "batch": rng.randrange(42, 50)} for _ in range(stretches)]


def config(**changes: Any) -> Any:
    return make_config(**{"train.steps": STEPS, "train.checkpoint_every": 20, "train.keep": 3} | changes)


def attempt(shared: pathlib.Path, own: pathlib.Path, trial: Trial) -> Result:
    act = {"bit": a_bit_of_a_replica, "no number": a_batch_that_gives_no_number, "spike": losses_that_run_away}
    return {"wrong": [f"{trial['what']}: {text}" for text in act[trial["what"]](own, trial)], "what": trial["what"]}


def a_bit_of_a_replica(own: pathlib.Path, trial: Trial) -> list[str]:
    """One device's copy of a weight has one bit other than the three others'; what is wrong with what is said."""
    c = config()
    program = build(c, task_of(c).mesh(c))
    check, batch = Recheck(program, str(own)), put(first_rows(program), program.batch_shardings)
    state = program.init()
    check(0, state, batch)  # all is well
    leaves, shape = jax.tree.flatten(state.params)
    chosen = [i for i, x in enumerate(leaves) if x.size][int(trial["array"] * len(leaves))]
    pieces = [np.array(shard.data) for shard in leaves[chosen].addressable_shards]
    device = int(trial["device"] * len(pieces))
    bits = pieces[device].reshape(-1).view(np.uint32)
    bits[int(trial["place"] * bits.size)] ^= np.uint32(1 << int(trial["bit"] * 32))
    places = [shard.device for shard in leaves[chosen].addressable_shards]
    copies = [jax.device_put(piece, place) for piece, place in zip(pieces, places, strict=True)]
    leaves[chosen] = jax.make_array_from_single_device_arrays(leaves[chosen].shape, leaves[chosen].sharding, copies)
    try:
        check(0, state.replace(params=jax.tree.unflatten(shape, leaves)), batch)
    except Restartable as e:
        return [] if f"cpu:{places[device].id} of process 0" in str(e) else [f"another device is named: {e}"]
    return ["not found"]


def first_rows(program: Program) -> Any:
    """The first batch, on the host."""
    c, tokenizer = program.config, program.generator.tokenizer
    source = open_source(c.data, "train")
    return feed.host_rows(source, Packing(source.sizes, tokenizer.geometry, c.rows, c.seed), tokenizer, c, 0)


@contextlib.contextmanager
def spoilt(which: range, spoil: Callable[[Any], Any]) -> Iterator[Callable[[int], list[list[int]]]]:
    """Within it, these batches, from 0, are what `spoil` makes of them; yields batch → the clips of its rows."""
    batches, plans = feed.batches, []

    def watched(source: Any, packing: Any, tokenizer: Any, config: Any, start: int, *rest: Any) -> Any:
        stream, number = batches(source, packing, tokenizer, config, start, *rest), start
        following = type(stream).__next__
        plans.append(packing)

        class Spoilt(type(stream)):
            def __next__(self) -> Any:
                nonlocal number
                batch, info = following(self)
                number += 1
                return (spoil(batch) if number - 1 in which else batch), info

        stream.__class__ = Spoilt
        return stream

    with mock.patch.object(feed, "batches", watched):
        yield lambda n: [sorted(place.clip for place in row) for row in plans[-1].step(n)]


def a_batch_that_gives_no_number(own: pathlib.Path, trial: Trial) -> list[str]:
    """The step is left out and counted, and its clips are written down; what is wrong."""
    n, c, workdir = trial["batch"], config(), own / "run"
    with spoilt(range(n, n + 1), lambda x: dataclasses.replace(x, coords=x.coords * np.float32(np.nan))) as rows:
        result = trained(c, workdir)
        expected = rows(n)
    found, wrong = arrays(c, workdir, STEPS), []
    if result.step != STEPS or int(found[".skipped"]) != 1:
        wrong.append(f"ended at step {result.step} with {found['.skipped']} steps left out")
    if not all(np.isfinite(x).all() for x in found.values()):
        wrong.append("weights are not finite")
    path = workdir / "bad_steps" / f"{n + 1}.json"
    told = json.loads(path.read_text()) if path.exists() else {"rows": []}
    if [sorted(clip["index"] for clip in row) for row in told["rows"]] != expected:
        wrong.append(f"{path.name} does not hold the clips of the step")
    return wrong


def losses_that_run_away(own: pathlib.Path, trial: Trial) -> list[str]:
    """The run goes back to a checkpoint and on with other clips; what is wrong."""
    n, workdir = trial["batch"], own / "run"
    c = config(**{"train.spike": SPIKE, "optimizer.outlier": 0.0})  # else the steps are left out as outliers
    with spoilt(range(n, n + 8), lambda x: dataclasses.replace(x, tokens=x.tokens * np.uint8(0) + np.uint8(255))):
        result = trained(c, workdir)
    checkpoints = Checkpoints(str(workdir), read_only=True)
    kept = checkpoints.facts(STEPS).get("guards", {})
    checkpoints.close()
    wrong = [] if result.step == STEPS else [f"ended at step {result.step}"]
    if not kept.get("rollbacks"):
        wrong.append("it was not rolled back")
    path = workdir / "incidents.jsonl"
    if not (path.exists() and "roll" in path.read_text()):
        wrong.append("no incident tells of it")
    return wrong


def judge(results: list[Result]) -> Verdict:
    """All are found."""
    told = {"bit": "bits named with their device", "no number": "steps left out and told", "spike": "rolled back"}
    of = {what: [result for result in results if result["what"] == what] for what in told}
    good = {what: sum(not result["wrong"] for result in some) for what, some in of.items()}
    held = ", ".join(f"{good[what]} of {len(of[what])} {words}" for what, words in told.items())
    return Verdict(len(results), held, all_wrong(results))


ROW = Row(
    "numbers",
    "A bit turned over in one copy of a weight, a batch that gives no number, losses that run away",
    lambda: "",
    trials,
    attempt,
    judge,
)
