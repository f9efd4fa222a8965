"""Training from given weights: all of them, a group of them, or low-rank updates beside them."""

import json
import os

import jax
import numpy as np
import pytest
from conftest import make_tiny

from vidgen import config as configs
from vidgen import train, weights
from vidgen.config import ConfigError
from vidgen.data import feed
from vidgen.data.packing import Packing
from vidgen.data.sources import open_source
from vidgen.diffusion import generator as generators
from vidgen.models import lora
from vidgen.parallel.mesh import make_mesh
from vidgen.parallel.processes import put
from vidgen.training import program as programs
from vidgen.training import start
from vidgen.training.checkpoint import Checkpoints, read_config
from vidgen.weights import flatten, nest

pytestmark = pytest.mark.usefixtures("quick_compiles")


def make(where="", **lora_settings):
    c = make_tiny()
    c.model.update(layers=2, unroll=1, weights=str(where))
    c.text.layers = 0
    c.optimizer.name = "adamw"
    c.optimizer.warmup = 0
    c.lora.update(lora_settings)
    return c


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """(a weights directory of a denoiser that isn't zero anywhere, its arrays)."""
    config = make()
    generator = generators.from_config(config)
    params = jax.jit(generator.init)(jax.random.key(3), generators.example(config))
    flat = {
        path: np.asarray(x + 0.05 * jax.random.normal(jax.random.key(x.size), x.shape))
        for path, x in flatten(params).items()
        if not path.startswith("text/")  # which imported weights don't have
    }
    where = tmp_path_factory.mktemp("given") / "transformer"
    weights.save(str(where), "denoiser", start.architecture_of(config, generator).to_dict(), nest(flat))
    return str(where), flat


def built(config, devices=1, **axes):
    config.mesh.update(axes)
    mesh = make_mesh(config.mesh, config.rows.count, config.rows.tokens, 1, jax.devices()[:devices])
    return programs.build(config, mesh)


def batch_of(config, program):
    source, tokenizer = open_source(config.data, "train"), program.generator.tokenizer
    packing = Packing(source.sizes, tokenizer.geometry, config.rows, config.seed)
    return put(feed.host_rows(source, packing, tokenizer, config, 0), program.batch_shardings)


def same(a, b):
    return all(jax.tree.leaves(jax.tree.map(np.array_equal, jax.device_get(a), jax.device_get(b))))


def test_training_starts_from_the_weights_and_so_does_their_average(given):
    where, flat = given
    program = built(make(where), devices=4, fsdp=2, context=2)
    state = program.init()
    fresh = {path for path in flatten(state.params) if path not in flat}
    assert fresh and all(path.startswith("text/") for path in fresh)
    for path, x in flat.items():
        np.testing.assert_array_equal(flatten(state.params)[path], x)
        np.testing.assert_array_equal(flatten(state.ema)[path], x)
    assert jax.tree.map(lambda x: x.sharding, state.params) == program.state_shardings.params
    assert state.frozen is None


@pytest.fixture(scope="module")
def one_step(given):
    """(program, state before, state after a step, metrics) of low-rank training on one device."""
    config = make(given[0], rank=4, alpha=8.0, targets=r"blocks/.*(query|value|out|up)$")
    program = built(config)
    before = program.init()
    kept = jax.device_get(before)
    after, metrics = program.step(before, batch_of(config, program))
    return program, kept, jax.device_get(after), jax.device_get(metrics)


def test_only_low_rank_updates_train_and_what_was_not_given(given, one_step):
    program, before, after, _ = one_step
    assert {path.rpartition("/")[2] for path in flatten(before.params) if not path.startswith("text/")} == {
        "lora_a",
        "lora_b",
    }
    assert set(flatten(before.frozen)) == set(given[1])
    np.testing.assert_array_equal(before.frozen["blocks"]["mlp"]["up"]["kernel"], given[1]["blocks/mlp/up/kernel"])
    assert same(before.frozen, after.frozen)
    moments = sum(x.size for x in jax.tree.leaves(after.opt_state))
    assert moments < 2.01 * sum(x.size for x in jax.tree.leaves(after.params)) + 10
    for path, x in flatten(after.params).items():
        if path.endswith("lora_b"):  # every one of them, each layer of the stack
            assert np.all(np.any(x != 0, axis=(1, 2))), path
        if path.endswith("lora_a"):  # whose gradient is zero as long as lora_b is
            np.testing.assert_array_equal(x, flatten(before.params)[path])


def test_nothing_changes_at_first_and_merging_changes_nothing(given, one_step):
    """The model with its updates, and with them merged, on the same rows."""
    program, before, after, _ = one_step
    batch = jax.device_get(batch_of(program.config, program))
    generator, key = program.generator, jax.random.key(0)
    noisy = jax.random.normal(key, batch.tokens.shape)
    levels = jax.random.uniform(key, (batch.tokens.shape[0], program.config.rows.segments + 1))
    run = jax.jit(generator.predict)
    plain = nest({path: x for path, x in flatten(before.params).items() if path.startswith("text/")} | given[1])
    np.testing.assert_allclose(
        run(program.task.whole(before.params, before.frozen), noisy, levels, batch),
        run(plain, noisy, levels, batch),
        atol=1e-5,
    )
    moved = jax.tree.map(lambda x: x + 0.05, after.params)
    whole = program.task.whole(moved, after.frozen)
    merged = lora.merged(nest(flatten(moved) | flatten(after.frozen)), 8.0 / 4)
    assert not any(lora.is_low_rank(path) for path in flatten(merged))
    got, want = run(whole, noisy, levels, batch), run(merged, noisy, levels, batch)
    np.testing.assert_allclose(got, want, atol=1e-4)
    assert np.abs(np.asarray(got) - np.asarray(run(plain, noisy, levels, batch))).max() > 1e-2


@pytest.mark.parametrize("axes", [{"fsdp": 2, "context": 2}, {"context": 2, "tensor": 2}], ids=str)
def test_any_mesh_equals_one_device(one_step, axes):
    alone, _, after, metrics = one_step
    config = configs.override(alone.config, {})
    program = built(config, devices=4, data=1, **axes)
    state, told = program.step(program.init(), batch_of(config, program))
    np.testing.assert_allclose(told["loss"], metrics["loss"], rtol=1e-5)
    np.testing.assert_allclose(told["grad_norm"], metrics["grad_norm"], rtol=1e-4)
    for path, x in flatten(jax.device_get(state.params)).items():
        np.testing.assert_allclose(x, flatten(after.params)[path], atol=2e-3, err_msg=path)


def test_the_frozen_matrices_have_no_gradient_in_the_step(given, one_step):
    """Of the targets' products none is there even before the compiler looks for what nobody asks for."""
    lora_step, full = one_step[0], built(make(given[0]))

    def flops(program):
        return program.step.lower(program.state_like, program.batch_like).cost_analysis()["flops"]

    assert flops(lora_step) < 0.95 * flops(full)


def test_a_run_goes_on_exactly_and_is_refused_other_weights(given, tmp_path):
    """Checkpoints have what trains alone, with the digest of the rest."""
    where, flat = given
    config = make(where, rank=2)
    config.optimizer.groups = ((r"lora_b$", {"lr": 4.0}), (r"^text/", {"lr": 0.5}))
    config.train.update(steps=2, checkpoint_every=1, log_every=1)
    short = configs.override(config, {"train.steps": 1, "optimizer.schedule": "constant"})
    long = configs.override(config, {"train.steps": 2, "optimizer.schedule": "constant"})
    for c, name in ((short, "parts"), (long, "parts"), (long, "once")):
        train.run(c, str(tmp_path / name))
    program = built(config)
    ends = []
    for name in ("parts", "once"):
        checkpoints = Checkpoints(str(tmp_path / name), read_only=True)
        facts, state = checkpoints.facts(2), checkpoints.restore(2, program.state_like)
        checkpoints.close()
        assert facts["weights"] == weights.digest_of(where) and state.frozen is None
        ends.append((state.params, state.ema, state.opt_state))
    assert same(*ends)
    on_disk = sum(f.stat().st_size for f in (tmp_path / "once" / "checkpoints" / "2").rglob("*") if f.is_file())
    assert on_disk < 4 * 4 * sum(x.size for x in jax.tree.leaves(program.state_like.params)) + 2**18
    facts = json.loads((tmp_path / "once" / "environment.json").read_text())
    assert [row["name"] for row in facts["groups"]] == ["frozen by config.lora", "lora_b$", "^text/", "the rest"]
    assert sum(row["parameters"] for row in facts["groups"]) == facts["parameters"] > facts["trained"]

    # What a sampler gets: all weights of the model, merged.
    run = read_config(str(tmp_path / "once"))
    generator, checkpoints = generators.from_config(run), Checkpoints(str(tmp_path / "once"), read_only=True)
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    params = start.averaged(run, generator, checkpoints, 2, place)
    checkpoints.close()
    assert set(flatten(params)) == set(flatten(start.parameters_like(make(), generator)))
    ema = flatten(ends[1][1])
    want = flat["blocks/cross/key/kernel"] + np.asarray(ema["blocks/cross/key/lora_a"] @ ema["blocks/cross/key/lora_b"])
    np.testing.assert_allclose(flatten(params)["blocks/cross/key/kernel"], want, atol=1e-6)
    np.testing.assert_array_equal(flatten(params)["embed/kernel"], flat["embed/kernel"])

    # A run's weights are a start too.
    again = built(make(tmp_path / "once")).init()
    assert same(again.params, params)

    changed = dict(flat)
    changed["embed/bias"] = flat["embed/bias"] + 1
    about = weights.describe(where)
    weights.save(str(tmp_path / "other"), "denoiser", about["config"], nest(changed))
    moved = configs.override(long, {"model.weights": str(tmp_path / "other"), "train.steps": 3})
    with pytest.raises(ConfigError, match="the checkpoint started from"):
        train.run(moved, str(tmp_path / "once"))


def test_a_frozen_group_stays_and_the_rest_trains(given):
    where, flat = given
    config = make(where)
    config.optimizer.groups = ((r"blocks/", {"frozen": True}),)
    program = built(config)
    state = program.init()
    assert all(path.startswith("blocks/") for path in flatten(state.frozen))
    assert "blocks" not in state.params and "blocks" not in state.ema
    before = jax.device_get(state.params)
    state, metrics = program.step(state, batch_of(config, program))
    assert np.isfinite(metrics["loss"]) and not np.array_equal(before["head"]["kernel"], state.params["head"]["kernel"])
    np.testing.assert_array_equal(state.frozen["blocks"]["mlp"]["up"]["kernel"], flat["blocks/mlp/up/kernel"])
    assert same(program.frozen(), state.frozen)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.width": 64}, r"config.model.width=64: the weights in .* are of model.width=32"),
        ({"model.qk_norm": "none"}, r"config.model.qk_norm=none: .* of model.qk_norm=head"),
        ({"text.width": 64}, r"config.text_width=64: .* of text_width=32"),
        ({"model.weights": "nowhere"}, r"config.model.weights=nowhere: no such directory"),
        ({"lora.rank": 2, "lora.alpha": -1.0}, r"config.lora.alpha=-1.0: .* nearest: 0"),
        (
            {"lora.rank": 2, "lora.targets": "blocks/attn"},
            "config.lora.targets='blocks/attn': matches no layer; .*blocks/att",
        ),
        ({"lora.rank": 99}, r"config.lora.rank=99: blocks/.* is \[32, 32\]; nearest: 32"),
        ({"lora.rank": -1}, r"config.lora.rank=-1: .* nearest: 0"),
        ({"lora.rank": 2, "lora.targets": "("}, r"not a regular expression"),
        ({"lora.rank": 2, "model.weights": ""}, r"set config.model.weights"),
    ],
    ids=str,
)
def test_bad_settings(given, change, message):
    config = configs.override(make(given[0]), change)
    with pytest.raises(ConfigError, match=message):
        built(config)


def test_what_is_frozen_lies_in_bfloat16_where_it_is_that_on_disk(given, tmp_path):
    """At half the memory, and the step is that of the same values in float32, to the bit."""
    where, flat = given
    about, short = weights.describe(where)["config"], {p: x.astype("bfloat16") for p, x in flat.items()}
    weights.save(str(tmp_path / "short"), "denoiser", about, nest(short))
    weights.save(str(tmp_path / "long"), "denoiser", about, nest({p: x.astype(np.float32) for p, x in short.items()}))
    ends = []
    for name, dtype in (("short", "bfloat16"), ("long", "float32")):
        program = built(make(tmp_path / name, rank=4))
        state, metrics = program.step(program.init(), batch_of(program.config, program))
        assert {x.dtype.name for x in jax.tree.leaves(state.frozen)} == {dtype}
        assert {x.dtype.name for x in jax.tree.leaves((state.params, state.ema))} == {"float32"}
        ends.append((state.params, metrics["loss"], metrics["grad_norm"]))
    assert same(*ends)


def test_weights_with_an_array_too_many_or_too_few(given, tmp_path):
    where, flat = given
    about = weights.describe(where)["config"]
    for name, arrays, message in (
        ("many", flat | {"blocks/extra/kernel": np.zeros(3, np.float32)}, "array blocks/extra/kernel is no part"),
        ("few", {p: x for p, x in flat.items() if p != "head/bias"}, "no array head/bias of shape"),
        ("odd", flat | {"head/bias": np.zeros(3, np.float32)}, r"head/bias has shape \[3\]; expected \[768\]"),
    ):
        weights.save(str(tmp_path / name), "denoiser", about, nest(arrays))
        with pytest.raises(ConfigError, match=message):
            built(make(tmp_path / name))
    assert os.path.isdir(where)


def test_a_layer_of_another_size_starts_from_nothing(given):
    """A head that puts out a variance as well, on weights whose head doesn't; and clips cut into other patches."""
    where, flat = given
    config = make(where)
    config.model.learned_sigma = True
    with pytest.raises(ConfigError, match="learned_sigma=True: the weights in .* are of model.learned_sigma=False"):
        built(config)
    config.model.fresh = ("^embed/",)
    with pytest.raises(ConfigError, match="head/bias has shape .768.; expected .1536. .* config.model.fresh may name"):
        built(config)
    config.model.fresh = ("^head/",)
    params = flatten(built(config).init().params)
    assert params["head/bias"].shape == (1536,) and not params["head/bias"].any()
    for path in flat.keys() - {"head/bias", "head/kernel"}:
        np.testing.assert_array_equal(params[path], flat[path], err_msg=path)
    other = make(where)
    other.tokenizer.stride = (4, 4, 4)
    other.rows.update(tokens=96)
    other.model.fresh = ("^head/", "^embed/")
    assert flatten(built(other).init().params)["embed/kernel"].shape[0] == 192
    config.model.fresh = ("(",)
    with pytest.raises(ConfigError, match=r"config.model.fresh: '\(' is no regular expression"):
        built(config)


def test_a_runs_weights_with_a_new_head_and_another_optimizer(tmp_path):
    c = make()
    c.train.steps = 1
    train.run(c, str(tmp_path / "run"))
    kept = Checkpoints(str(tmp_path / "run"), read_only=True)
    c = make(tmp_path / "run")
    c.optimizer.name, c.model.fresh = "adafactor", ("^head/",)
    program = built(c, devices=2, data=1, fsdp=2)
    averaged = flatten(kept.restore_ema(1, program.state_like.ema))
    kept.close()
    params = flatten(program.init().params)
    assert params.keys() == averaged.keys() and averaged["head/kernel"].any()
    for path in params:
        assert np.array_equal(params[path], averaged[path]) == (not path.startswith("head/")), path
    c.mesh.update(data=-1, fsdp=2)
    c.train.steps = 1
    assert train.run(c, str(tmp_path / "tuned")).step == 1


def test_a_vae_takes_no_denoisers_settings():
    config = configs.load(os.path.join(os.path.dirname(configs.__file__), "..", "configs", "vae_moving_shapes.py"))
    config.lora.rank = 4
    config.model.weights = "somewhere"
    with pytest.raises(ConfigError, match="config.task=vae trains none"):
        programs.check(config)
