"""`vidgen plan`: meshes, verdicts and bad input, with the compiler stood in for; tests/planning/test_aot.py has it."""

import dataclasses
import json
import math
import os
import pathlib
import shlex
import subprocess
import sys
import time
from unittest.mock import Mock

import jax
import numpy as np
import pytest
from conftest import make_tiny

from vidgen import cli, plan
from vidgen import config as configs
from vidgen.config import ConfigError
from vidgen.parallel.mesh import make_mesh
from vidgen.planning import aot
from vidgen.planning.hardware import parse_topology
from vidgen.planning.layout import sampling_config
from vidgen.planning.search import rank
from vidgen.studio import plans
from vidgen.training import program

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"
OOM = (
    "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom:\nXLA:TPU compile permanent error. Ran out of memory in memory space "
    "hbm. required for HLO temporaries (118.80G) exceeds available HBM (15.75G)"
)


def load(name, **changes):
    return configs.load(str(CONFIGS / name), changes)


@pytest.mark.parametrize(
    ("name", "topology", "least"),
    [
        ("dit_10b_60k.py", "v5p:4x8x8", 9.5e9),
        ("dit_10b_60k.py", "h100:32x8", 9.5e9),
        ("wan_14b_720p.py", "v5p:2x2x1", 14e9),
        ("minute_720p.py", "v5p:8x8x8", 14e9),
        ("minute_720p.py:full", "v5p:8x8x8", 14e9),
        ("dit_30b.py", "v6e:16x16", 30e9),
        ("moving_shapes.py", "v5e:4x4", 70e6),
    ],
)
def test_the_arithmetic_of_the_large_configs_takes_seconds(name, topology, least, capsys):
    start = time.perf_counter()
    facts = plan.run(load(name), topology, abstract=True, price=2.0)
    assert time.perf_counter() - start < 15  # 1 to 3 on a machine that does nothing else
    assert least < facts["parameters"] < 1.1 * least
    assert facts["fits"] is None and 0.1 < facts["predicted_mfu"] < 0.8
    assert facts["trained_tokens_per_step"] > 0.97 * facts["tokens_per_step"]
    assert facts["cost"] == pytest.approx(2.0 * facts["chip_hours"])
    said = capsys.readouterr().out
    assert f"{facts['parameters']:,}" in said and "ESTIMATE" in said and "COMPILED" not in said


def test_windows_cost_what_they_hold_and_full_attention_the_square():
    windows, full = (plan.run(load(f"minute_720p.py{a}"), "v5p:8x8x8", abstract=True) for a in ("", ":full"))
    captions = full["flops_attention_useful"] / (40 * 3 * 4 * 8 * 5120 * 1_299_600) - 1_299_600  # tokens of text a clip
    assert 0 < captions <= 512
    # Ten layers of forty see the whole minute, thirty windows of 19 x 15 x 20 or, moved, at most as many tokens.
    assert 0.25 < windows["flops_attention_useful"] / full["flops_attention_useful"] < 0.26
    assert 1.0 < windows["flops_attention_executed"] / windows["flops_attention_useful"] < 1.6


def test_recomputation_is_told_apart(capsys):
    kept, again = (
        plan.run(load("wan_14b_720p.py", **{"model.remat": r}), "v5p:2x2x1", abstract=True)
        for r in ("attention", "full")
    )
    assert kept["flops_per_step"] == again["flops_per_step"]
    assert kept["recomputed_flops_fraction"] <= 0.12 < again["recomputed_flops_fraction"]


def test_a_mesh_is_refitted_and_named(capsys):
    facts = plan.run(load("dit_10b_60k.py"), "v5p:4x4x8", abstract=True)
    assert facts["mesh"] == {"data": 1, "fsdp": 16, "context": 8, "tensor": 1}
    assert "fsdp=16 x context=8 (refitted from the config's)" in capsys.readouterr().out
    facts = plan.run(load("dit_10b_60k.py"), "v5p:4x8x8", mesh="fsdp=32,context=4,tensor=2", abstract=True)
    assert facts["mesh"]["tensor"] == 2 and "(given)" in capsys.readouterr().out
    slices = plan.run(load("dit_10b_60k.py"), "2*v5p:4x4x8", mesh="data=2,fsdp=16,context=8", abstract=True)
    assert slices["roofline"]["dcn_s"] > 0
    facts = plan.run(load("dit_10b_60k.py"), "v5p:4x8x8", mesh="fsdp=-1,context=8", abstract=True)
    assert facts["mesh"] == {"data": 1, "fsdp": 32, "context": 8, "tensor": 1}


@pytest.mark.parametrize(
    ("name", "topology", "mesh"),
    [
        ("dit_10b_60k.py", "v5p:8x8x8", (1, 32, 16, 1)),
        ("dit_10b_60k.py", "8*v5p:2x4x4", (8, 4, 8, 1)),
        ("wan_14b_720p.py", "v5p:2x2x2", (1, 1, 8, 1)),
        ("minute_720p.py", "v5p:8x8x16", (1, 8, 128, 1)),
        ("quickstart.py", "v5e:4x4", (1, 8, 2, 1)),
    ],
)
def test_the_nearest_mesh_is_found_where_the_configs_does_not_divide(name, topology, mesh, capsys):
    """Though its data axis, -1, takes any number of devices; on several slices it runs over them."""
    facts = plan.run(load(name), topology, abstract=True)
    assert tuple(facts["mesh"].values()) == mesh
    assert math.prod(facts["mesh"].values()) == parse_topology(topology).devices
    assert facts["mesh_note"] == "refitted from the config's" in capsys.readouterr().out


def test_a_vae_is_planned_without_its_devices(monkeypatch, capsys):
    monkeypatch.setattr(aot, "devices", Mock(side_effect=AssertionError("arithmetic needs none")))
    c = load("vae_moving_shapes.py", **{"reconstruction.gan": 0.1, "reconstruction.gan_dim": 4})
    facts = plan.run(c, "v5e:2x4", mesh="data=4,context=2", abstract=True)
    said = capsys.readouterr().out
    assert facts["mesh"] == {"data": 4, "fsdp": 1, "context": 2, "tensor": 1}
    assert (facts["chunks"], facts["chunk"]) == (8, "9x32x32") and facts["parameters"] == 1_528_804
    assert "l1 1, l2 1, kl 1e-06, gan 0.1" in said and "1,528,804" in said and "COMPILED" not in said
    # 16 bytes a weight and more, in halves, with what trains the critics.
    assert 6 * facts["parameters"] < facts["state_bytes_per_device"] < 16 * facts["parameters"]
    assert facts["seconds_at_the_peak"] == facts["useful_flops"] / (8 * 197e12)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--search"], "--search: it ranks ways to train a denoiser"),
        (["--mode", "sample"], "--mode: a plan of task=vae"),
        (["--price", "2"], "--price: a plan of task=vae"),
        (["--tokens", "1e9"], "--tokens: a plan of task=vae"),
        (["--mesh", "tensor=4"], "config.mesh.tensor=4: a VAE has no axis of that kind"),
        (["--mesh", "data=3"], "data=3 (3) is not the 4 devices"),
        (["--config.clips.shapes=((9,32,32,6),)"], "6 chunks of 9x32x32 don't divide over 4 devices"),
        (["--config.vae.num_res_blocks=0"], "num_res_blocks=0: expected 1"),
    ],
)
def test_what_a_plan_of_a_vae_has_not_is_told_in_a_line(arguments, says, monkeypatch, capsys):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setattr(aot, "devices", Mock(side_effect=AssertionError("never asked")))
    with pytest.raises(SystemExit) as e:
        cli.main(["plan", "--config", str(CONFIGS / "vae_moving_shapes.py"), "--topology", "v5e:2x2", "--abstract",
                  *arguments])  # fmt: skip
    said = capsys.readouterr().err
    assert e.value.code == 2 and says in said and said.count("\n") == 1


def test_no_mesh_at_all_is_told_in_a_line():
    with pytest.raises(ConfigError, match="296 tokens of a row on each of context=256"):
        plan.run(load("wan_14b_720p.py"), "v5p:4x8x8", abstract=True)


def test_the_state_is_audited_without_the_compiler(capsys):
    facts = plan.run(load("dit_10b_60k.py"), "v5p:4x8x8", mesh="fsdp=32,context=8", abstract=True)
    assert {"path", "shape", "spec", "bytes_per_device"} == facts["sharding"][0].keys()
    assert facts["state_bytes_per_device"] == pytest.approx(16 * facts["parameters"] / 256, rel=0.1)
    assert "blocks/mlp/up/kernel" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="would lie whole on every device"):
        c = load("dit_10b_60k.py", **{"mesh.override": "(('up/kernel$', (None, None)),)"})
        plan.run(c, "v5p:4x8x8", abstract=True)
    plan.run(load("moving_shapes.py"), "v5e:2x2", mesh="data=4", abstract=True)
    assert "each of 4 devices holds all of it" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("topology", "mesh", "says"),
    [
        ("v9:4x4", "", "known are.*v5p:4x8x8"),
        ("v5p:4x8", "", "3 dimensions of the torus"),
        ("v5p:4x8x8", "fsdp=--3", "expected AXIS=DEVICES"),
        ("v5p:4x8x8", "fsdp=²", "expected AXIS=DEVICES"),
        ("v5p:4x8x8", "fsdp=0", "expected AXIS=DEVICES"),
        ("v5p:4x8x8", "fsdp=32,context=8,fsdp=16", "fsdp is there twice"),
        ("v5p:4x8x8", "fsdp=-1,context=-1", "both -1"),
        ("v5p:4x8x8", "fsdp=32,contxt=8", "expected AXIS=DEVICES with an axis of data, fsdp, context, tensor"),
        ("v5p:4x8x8", "fsdp=30,context=8", r"fsdp=30 x context=8 \(240\) is not the 256 devices"),
        ("v5p:4x8x8", "fsdp=64,context=4", "rows.count=32 does not divide over 64 devices.*nearest: 64"),
        ("v5p:4x8x8", "fsdp=2,context=128", "480 tokens of a row on each of context=128.*multiple of 128"),
        ("v5p:4x8x8", "fsdp=4,tensor=64", "32 heads don't divide over it; tensor can be 1, 2, 4"),
    ],
)
def test_what_does_not_fit_together_is_told_in_a_line(topology, mesh, says):
    with pytest.raises(ConfigError, match=says):
        plan.run(load("dit_10b_60k.py"), topology, mesh=mesh, abstract=True)


@pytest.mark.parametrize("how", [plan.run, plan.search])
@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("model.window", (1, 2), "three|each 1 or more"),
        ("model.window", (0, 2, 2), "each 1 or more"),
        ("model.window", (-1, 2, 2), "each 1 or more"),
        ("model.window", ("a", 2, 2), "each 1 or more"),
        ("model.full_every", -1, "full_every=-1"),
        ("model.heads", 5, "model.heads=5"),
        ("text.heads", 3, "text.heads=3"),
        ("mesh.rules", "foo", "mesh.rules='foo'"),
        ("mesh.override", (1, 2), "mesh.override"),
        ("mesh.compiler_options", "foo", "known are table, none"),
        ("dtype", "float16", "known are float32, bfloat16"),
        ("model.residual", "float16", "known are float32, bfloat16"),
        ("optimizer.name", "sgd", "optimizer.name"),
        ("sample.solver", "foo", "known are euler"),
    ],
)
def test_settings_that_the_compiler_would_refuse_are_refused_without_it(how, key, value, says):
    c = load("dit_10b_60k.py")
    c.unlock()
    *path, leaf = key.split(".")
    (c[path[0]] if path else c)[leaf] = value
    if key == "model.full_every":
        c.model.window = (2, 2, 2)
    with pytest.raises(ConfigError, match=says):
        how(c, "v5p:4x8x8", abstract=True)


@pytest.mark.parametrize(
    "numbers", [{"price": -1.0}, {"price": math.nan}, {"tokens": -1.0}, {"tokens": math.nan}, {"tokens": math.inf}]
)
def test_tokens_and_prices_are_numbers(numbers):
    for how in (plan.run, plan.search):
        with pytest.raises(ConfigError, match=f"--{next(iter(numbers))}="):
            how(load("moving_shapes.py"), "v5e:4x4", abstract=True, **numbers)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--all", "--mesh", "fsdp=8"], "--mesh has no meaning with --all"),
        (["--all", "--topology", "v5e:4x4"], "--topology has no meaning with --all"),
        (["--all", "--tokens", "1e9"], "--tokens has no meaning with --all"),
        (["--all", "--config.train.steps=3"], "--config.train.steps has no meaning with --all"),
        (["--search", "--mode", "sample"], "--mode has no meaning with --search"),
        (["--search", "--mesh", "fsdp=8"], "--mesh has no meaning with --search"),
    ],
)
def test_flags_that_would_be_ignored_are_refused(arguments, says, monkeypatch, capsys):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    with pytest.raises(SystemExit) as e:
        cli.main(["plan", *arguments])
    said = capsys.readouterr().err
    assert e.value.code == 2 and says in said and said.count("\n") == 1


def test_without_the_compiler_the_extra_is_named(monkeypatch):
    def absent(**_):
        raise RuntimeError("no plugin")

    monkeypatch.setattr(aot.topologies, "get_topology_desc", absent)
    monkeypatch.setattr(aot, "_installed", lambda _: False)
    for topology, extra, kind in (("v5p:2x2x1", "tpu", "TPU"), ("h100:1x8", "cuda", "GPU")):
        with pytest.raises(ConfigError, match=rf'compiling for {kind}s .*pip install "vidgen\[{extra}\]"'):
            aot.devices(parse_topology(topology))


def small():
    """The tiny config for four devices that share rows."""
    c = make_tiny()
    c.mesh.update(data=1, fsdp=2, context=2)
    return c


def test_out_of_memory_is_a_verdict_with_what_fills_it_and_what_would_fit(monkeypatch, capsys):
    def refuses(*_):
        raise aot.OutOfMemory(OOM, 1.0)

    monkeypatch.setattr(aot, "compile_for", refuses)
    monkeypatch.setattr(plan, "compiled", lambda *_: plan.compile_for(parse_topology("v5e:2x2"), {}, None, (), {}))
    facts = plan.run(load("wan_14b_720p.py"), "v5e:2x2")
    assert facts["fits"] is False and facts["collectives"] == []
    assert facts["peak_bytes_per_device"] > facts["hbm_bytes_per_device"] == int(15.75 * 2**30)
    assert facts["estimated_parts"]["weights, their average and the optimizer's moments"] > 50 * 2**30
    assert facts["would_fit"] and facts["would_fit"][0]["topology"] != "v5e:2x2"
    json.dumps(facts)
    said = capsys.readouterr().out
    assert "OUT OF MEMORY" in said and "would fit, by the estimate" in said


def test_what_would_fit_is_not_what_does_not(monkeypatch):
    """The estimate has room where the compiler has none, so its estimates are too small by as much."""
    c, where = load("dit_10b_60k.py"), parse_topology("v5p:4x8x8")
    c, _ = plan.placed(configs.override(c, {"model.remat": "full"}), where)
    estimated = sum(plan.arithmetic.memory_parts(c, where).values())
    first = plan.would_fit(c, where)
    own = {"mesh": {a: c.mesh[a] for a in plan.AXES}, "remat": "full", "attention": "gather", "accumulate": 1}
    assert first and not any(own.items() <= way.items() for way in first)
    refused = aot.OutOfMemory(OOM.replace("118.80G", f"{3 * estimated / 2**30:.2f}G").replace("15.75G", "20G"), 1.0)
    monkeypatch.setattr(aot, "compile_for", Mock(side_effect=refused))
    found = plan.out_of_memory(c, where, "train", plan.compile_for(where, {}, None, (), {}))
    for way in found["would_fit"]:
        assert way["estimated_bytes_per_device"] <= 0.9 * where.chip.hbm_bytes
        again = configs.override(c, {f"mesh.{a}": n for a, n in way["mesh"].items()} | {"model.remat": way["remat"]})
        again = configs.override(again, {"optimizer.accumulate": way["accumulate"], "mesh.attention": way["attention"]})
        parts = plan.arithmetic.memory_parts(again, where)
        assert way["estimated_bytes_per_device"] == pytest.approx(3 * sum(parts.values()), rel=0.01)


def test_drawing_out_of_memory_says_what_fills_it_and_what_has_room(monkeypatch, capsys):
    monkeypatch.setattr(aot, "devices", lambda _: jax.devices())
    monkeypatch.setattr(plan, "compiled", lambda *_: plan.compile_for(parse_topology("v5e:2x2"), {}, None, (), {}))
    monkeypatch.setattr(aot, "compile_for", Mock(side_effect=aot.OutOfMemory(OOM, 1.0)))
    facts = plan.run(load("wan_14b_720p.py"), "v5e:2x2", mode="sample")
    assert facts["fits"] is False and facts["estimated_parts"]["weights"] > 10 * 2**30
    (way,) = facts["would_fit"]
    assert parse_topology(way["topology"]).chips > 4
    assert "what fills it" in capsys.readouterr().out


def test_what_the_compiler_refuses_ends_neither_a_search_nor_all_plans(monkeypatch, capsys):
    refused = jax.errors.JaxRuntimeError("INVALID_ARGUMENT: No such compile option: 'xla_foo'\nmore")
    function = Mock(lower=Mock(side_effect=refused))
    monkeypatch.setattr(plan, "compiled", lambda config, topology, mode="train": aot.compile_for(function, ()))
    rows = plan.search(load("moving_shapes.py"), "v5e:4x4")["candidates"]
    assert len(rows) == 6 and all("No such compile option: 'xla_foo'" in r["error"] for r in rows)
    assert "config.mesh.compiler_options=none" in rows[0]["error"] and "more" not in rows[0]["error"]
    assert all("No such compile option" in p["error"] for p in plan.run_all()["plans"])


def test_the_step_of_a_plan_is_the_one_that_trains_and_its_text_is_read(monkeypatch, capsys):
    """On four CPU devices in place of a topology's."""
    monkeypatch.setattr(aot, "devices", lambda _: jax.devices())
    found = plan.compiled(small(), parse_topology("v5e:2x2"))
    assert found.fits and 0 < found.headroom < 1
    kinds = {(x.opcode, x.role) for x in found.collectives}
    assert ("all-gather", "weights") in kinds and ("reduce-scatter", "gradients") in kinds
    assert found.facts()["overlap"]["weights_by_all_reduce"] == 0
    json.dumps(found.facts())


def test_a_search_ranks_and_compiles_the_best(monkeypatch, capsys):
    facts = plan.search(load("dit_10b_60k.py"), "v5p:4x8x8", abstract=True)["candidates"]
    times = [c["estimated_step_seconds"] for c in facts if c["estimated_fits"]]
    assert len(facts) == 20 and times == sorted(times)
    seen = []

    def compiled(config, topology, mode="train"):
        seen.append((config.mesh.to_dict(), config.model.remat))
        text = "HloModule m, is_scheduled=true\n\nENTRY main {\n  ROOT p = f32[] parameter(0)\n}\n"
        made = aot.Compiled(text, 2**30, 1, 1, 2.0)
        monkeypatch.setattr(aot, "compile_for", lambda *_: made)
        return plan.compile_for(topology, {axis: config.mesh[axis] for axis in plan.AXES}, None, (), {})

    monkeypatch.setattr(plan, "compiled", compiled)
    rows = plan.search(load("dit_10b_60k.py"), "v5p:4x8x8")["candidates"]
    assert len(rows) == len(seen) == 6 and all(r["fits"] for r in rows)
    assert [r["mesh"] for r in rows] == [{a: m[a] for a in plan.AXES} for m, _ in seen]
    assert "* = no other is both faster and smaller" in capsys.readouterr().out


def test_drawing_is_planned_too():
    facts = plan.run(load("wan_14b_720p.py"), "v5p:2x2x1", mode="sample", abstract=True, price=4.0)
    assert facts["tokens_per_step"] == 75_776 and facts["chips"] == 4
    assert facts["cost"] == pytest.approx(4.0 * facts["chip_hours"])
    # 50 steps, each with and without the prompt, forward only.
    train = plan.run(load("wan_14b_720p.py"), "v5p:2x2x1", abstract=True)
    assert facts["flops_per_step"] == pytest.approx(100 / 3 * train["flops_per_step"], rel=0.02)


def test_slices_draw_a_clip_each(capsys):
    one, two = (
        plan.run(load("wan_14b_720p.py"), f"{n}v5p:2x2x1", mode="sample", abstract=True, price=1.0) for n in ("", "2*")
    )
    assert (one["clips_at_once"], two["clips_at_once"]) == (1, 2)
    assert two["flops_per_step"] == 2 * one["flops_per_step"]
    assert two["cost"] == pytest.approx(one["cost"], rel=0.01)
    with pytest.raises(ConfigError, match="draw one clip together"):
        plan.run(load("wan_14b_720p.py"), "v5p:2x2x1", mode="sample", mesh="fsdp=4", abstract=True)


def test_float32_products_move_twice_as_much_and_say_so(capsys):
    half, full = (
        plan.run(load("dit_10b_60k.py", dtype=d), "v5p:4x8x8", abstract=True) for d in ("bfloat16", "float32")
    )
    assert full["roofline"]["hbm_s"] > half["roofline"]["hbm_s"]
    assert 1.5 * half["roofline"]["ici_s"] < full["roofline"]["ici_s"] < 2 * half["roofline"]["ici_s"]
    assert capsys.readouterr().out.count("float32 products: ") == 1


def test_what_a_plan_compiles_for_drawing_draws():
    c = sampling_config(small(), parse_topology("v5e:2x2"))
    c = configs.override(c, {"mesh.context": 4})
    mesh = make_mesh(c.mesh, 1, c.rows.tokens)
    built = program.build(c, mesh, "cpu")
    function, (params, batch, _, _) = plan.drawing(built)
    state = built.init()
    zeros = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), batch)
    out = function(state.params, zeros, zeros, np.int32(0))
    assert out.shape == (1, c.rows.tokens, 768) and np.isfinite(np.asarray(out)).all()


def test_the_lowered_program_is_flat_in_depth():
    sizes = {}
    for layers in (24, 48):
        c = small()
        c.model.update(layers=layers, unroll=1, remat="attention")
        c.optimizer.name = "adamw"
        built = program.build(c, make_mesh(c.mesh, c.rows.count, c.rows.tokens))
        sizes[layers] = len(built.step.lower(built.state_like, built.batch_like).as_text())
    assert sizes[48] == pytest.approx(sizes[24], rel=0.05)


def test_the_command_line_has_it_all(tmp_path):
    command = [sys.executable, "-m", "vidgen.cli", "plan"]
    ran = subprocess.run(
        [*command, "--config", str(CONFIGS / "dit_30b.py"), "--topology", "v6e:16x16", "--abstract", "--json",
         "--tokens", "1e12", "--config.model.remat=products"],
        capture_output=True, text=True, check=True, env=os.environ, cwd=tmp_path,
    )  # fmt: skip
    facts = json.loads(ran.stdout.splitlines()[-1])
    assert facts["tokens"] == 1e12 and facts["recomputed_flops_fraction"] < 0.01
    for arguments, says in (
        ((), "expected --config FILE and --topology"),
        (("--config", str(CONFIGS / "dit_30b.py"), "--topology", "v6e"), "expected CHIP:SHAPE"),
    ):
        ran = subprocess.run([*command, *arguments], capture_output=True, text=True, env=os.environ)
        assert ran.returncode == 2 and says in ran.stderr and "Traceback" not in ran.stderr


def test_a_candidate_is_told_as_flags_that_a_shell_takes():
    best = rank(load("wan_14b_720p.py"), parse_topology("v5p:2x2x2"))[0]
    best = dataclasses.replace(best, remat="attention, residual=offload")
    words = shlex.split(plans.way(best))
    assert "--config.model.remat=attention, residual=offload" in words and words[0] == "--mesh"
