"""Where the state lies and what a compiled step exchanges, for three small configs: a change shows as a diff.

VIDGEN_GOLDENS=write bash launch/test.sh tests/test_goldens.py      writes them anew, to be looked at with git diff
"""

import difflib
import os
import pathlib

import pytest
from conftest import make_tiny

from vidgen.parallel.mesh import AXES, make_mesh
from vidgen.parallel.rules import audit, rules_of
from vidgen.planning import hlo
from vidgen.studio.plans import spec_words
from vidgen.training import program

FOLDER = pathlib.Path(__file__).parent / "goldens"


def fsdp(c):
    c.mesh.update(data=1, fsdp=4)
    c.optimizer.name = "adamw"


def windows(c):
    c.mesh.update(data=1, fsdp=2, context=2)
    c.model.update(layers=4, window=(1, 2, 2), full_every=2, remat="attention", unroll=1)
    c.optimizer.update(name="adamw", accumulate=2)


def tensor(c):
    c.mesh.update(data=1, context=2, tensor=2, attention="ring")
    c.model.update(shared_modulation=True, text_mlp=True)


@pytest.mark.parametrize("change", [fsdp, windows, tensor], ids=lambda f: f.__name__)
def test_the_step_is_laid_out_and_exchanges_as_before(change):
    config = make_tiny()
    change(config)
    mesh = make_mesh(config.mesh, config.rows.count, config.rows.tokens, config.optimizer.accumulate)
    built = program.build(config, mesh)
    sizes = {axis: mesh.shape[axis] for axis in AXES}
    placed = sorted(audit(built.state_like, sizes, rules_of(config.mesh)), key=lambda p: p.path)
    weights = [p for p in placed if p.path.startswith("params/")]
    lines = [f"{p.path} {'x'.join(map(str, p.shape))} {spec_words(p.spec)}" for p in weights]
    lines += ["", f"bytes a device: weights {sum(p.bytes_per_device for p in weights)}"]
    lines += [f"bytes a device: state {sum(p.bytes_per_device for p in placed)}"]
    text = built.step.lower(built.state_like, built.batch_like).compile().as_text()
    counts = hlo.opcode_counts(text)
    lines += ["", "collectives", *(f"{opcode} {n}" for opcode, n in sorted(counts.items()))]

    file = FOLDER / f"{change.__name__}.txt"
    if os.environ.get("VIDGEN_GOLDENS") == "write":
        file.write_text("\n".join(lines) + "\n")
    diff = list(difflib.unified_diff(file.read_text().splitlines(), lines, "golden", "now", lineterm=""))
    assert not diff, "\n".join(["the layout or the exchanges of the step have changed:", *diff])
