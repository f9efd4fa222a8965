"""Training a VAE: a mesh and microbatches change nothing of what is computed; critics join when they are told to."""

import jax
import numpy as np
import pytest
from optax.contrib import MuonDimensionNumbers

from vidgen import config as configs
from vidgen.config import ConfigError
from vidgen.data import chunks
from vidgen.data.chunks import Chunks
from vidgen.data.sources import open_source
from vidgen.parallel.mesh import path_name
from vidgen.training import autoencoding, optimizers
from vidgen.training import program as programs
from vidgen.training.program import build, check


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Compiled as it comes: these steps are run a few times only."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(programs, "compiler_options", lambda device: {"xla_backend_optimization_level": 0})
        yield


def make_config(**changes):
    """A VAE of stride 2x2x2 and width 8 on chunks of 3 frames of 16 x 16 pixels."""
    c = configs.base()
    c.task, c.dtype = "vae", "float32"
    c.data.moving_shapes.level = "easy"
    c.data.moving_shapes.sizes = ((3, 16, 16),)
    c.data.moving_shapes.clips = 64
    c.vae.update(base_dim=8, dim_mult=(1, 1), temporal_downsample=(True,), num_res_blocks=1, z_dim=4, remat=False)
    c.clips.shapes = ((3, 16, 16, 4),)
    c.reconstruction.update(kl=1e-2, gan_dim=4, gan_layers=1, lpips_frames=2)
    c.optimizer.update(name="adamw", lr=1e-3, warmup=2, ema=0.9)
    return configs.override(c, changes)


def steps(config, count=2, devices=4, program=None):
    """(program, state, metrics of each step) of a run's first steps."""
    if program is None:
        program = build(config, autoencoding.mesh(config, jax.devices()[:devices]))
    source = open_source(config.data, "train")
    plan = Chunks(
        source.sizes, config.clips, autoencoding.shapes(config), program.task.model.config.stride, config.seed
    )
    state, seen = program.init(), []
    for n in range(count):
        state, metrics = program.step_after(n)(state, chunks.load(source, plan, n, program.mesh))
        seen.append(jax.device_get(metrics))
    return program, state, seen


@pytest.fixture(scope="module")
def alone():
    return steps(make_config(**{"reconstruction.gan": 0.5}), devices=1)


@pytest.mark.parametrize(
    "axes",
    [{"data": 2, "context": 2}, {"data": 1, "fsdp": 2, "context": 2}],
    ids=str,
)
def test_any_mesh_equals_one_device(alone, axes):
    config = make_config(**{"reconstruction.gan": 0.5} | {f"mesh.{k}": v for k, v in axes.items()})
    program, state, seen = steps(config)
    for ours, theirs in zip(seen, alone[2], strict=True):
        np.testing.assert_allclose(ours["loss"], theirs["loss"], rtol=1e-5)
        for name in theirs:
            np.testing.assert_allclose(ours[name], theirs[name], rtol=2e-3, err_msg=name)
    for state_, program_ in ((state, program), (alone[1], alone[0])):
        facts = [(x.shape, x.dtype, x.sharding) for x in jax.tree.leaves(state_)]
        assert facts == [(x.shape, x.dtype, x.sharding) for x in jax.tree.leaves(program_.state_like)]
    kernel = state.params["vae"]["decoder"]["mid_block"]["resnets_0"]["conv1"]["kernel"]
    share = kernel.size // (axes.get("fsdp", 1) * axes.get("context", 1))
    assert kernel.addressable_shards[0].data.size == share


def test_microbatches_give_the_whole_batchs_loss():
    small = {"vae.dim_mult": (1,), "vae.temporal_downsample": ()}
    one, two = (steps(make_config(**small | {"optimizer.accumulate": n}), 1, devices=1)[2][0] for n in (1, 2))
    assert one.keys() == two.keys()
    for name in one:
        np.testing.assert_allclose(two[name], one[name], rtol=1e-4, err_msg=name)
    assert one["tokens"] == 4 * 3 * 16 * 16  # latents of four chunks


def test_critics_join_after_gan_start():
    config = make_config(**{"reconstruction.gan": 0.5, "reconstruction.gan_start": 1})
    program = build(config, autoencoding.mesh(config, jax.devices()[:1]))
    assert [start for start, _ in program.steps] == [0, 1] and program.step is program.steps[1][1]
    assert [program.step_after(n) for n in (0, 1, 9)] == [program.steps[i][1] for i in (0, 1, 1)]
    (_, one, seen), (_, two, more) = (steps(config, n, program=program) for n in (1, 2))
    states = [jax.device_get((s.params["critics"], s.aux)) for s in (program.init(), one, two)]
    jax.tree.map(np.testing.assert_array_equal, states[0], states[1])
    moved = jax.tree.leaves(jax.tree.map(lambda a, b: np.any(a != b), states[1], states[2]))
    assert sum(moved) >= len(moved) - 4  # the last layers have one channel: a vector of ±1, a bias that both sides pull
    assert "gan_weight" not in seen[0] and more[1]["gan_weight"] > 0 and more[0] == seen[0]


def test_without_critics_there_are_none():
    program = build(make_config(), autoencoding.mesh(make_config(), jax.devices()[:1]))
    assert program.state_like.params.keys() == {"vae"} and program.state_like.aux is None
    assert program.batch_like.video.shape == (4, 3, 16, 16, 3) and len(program.steps) == 1


@pytest.mark.parametrize("residual", [False, True])
def test_muon_takes_the_convolutions_inside_the_levels_and_nothing_else(residual):
    config = make_config(**{"reconstruction.gan": 0.5, "vae.residual": residual, "vae.base_dim": 2})
    task = autoencoding.task(config, autoencoding.mesh(config, jax.devices()[:1]))
    params, _ = jax.eval_shape(task.init, jax.random.key(0))
    found = jax.tree_util.tree_leaves_with_path(
        optimizers.muon_dimensions(params), is_leaf=lambda d: d is None or isinstance(d, MuonDimensionNumbers)
    )
    arrays = {path_name(path): x for path, x in jax.tree_util.tree_leaves_with_path(params)}
    found = {path_name(path): d for path, d in found}
    assert found.keys() == arrays.keys()
    levels = ("vae/encoder/down_blocks", "vae/encoder/mid_block", "vae/decoder/mid_block", "vae/decoder/up_blocks")
    for name, d in found.items():
        if name.startswith(levels) and name.endswith("kernel"):
            last = arrays[name].ndim - 1
            assert d == MuonDimensionNumbers(reduction_axis=tuple(range(last)), output_axis=last), name
        else:
            assert d is None, name
    sizes = {arrays[name].ndim for name, d in found.items() if d}
    assert sizes == {4, 5} and {"critics", "vae"} == {name.split("/")[0] for name, d in found.items() if not d}


def test_muon_makes_an_update_orthogonal_as_windows_and_inputs_by_outputs():
    draw = np.random.default_rng(0)
    gradient = draw.normal(size=(3, 3, 3, 4, 8)) * np.geomspace(1, 10, 8)
    tree = {"vae": {"decoder": {"mid_block": {"resnets_0": {"conv1": {"kernel": gradient.astype(np.float32)}}}}}}
    optimizer = optimizers.from_config(make_config(**{"optimizer.name": "muon", "optimizer.weight_decay": 0.0}))
    updates, _ = optimizer.update(tree, optimizer.init(tree), tree)
    before, after = (
        np.linalg.svd(jax.tree.leaves(x)[0].reshape(-1, 8), compute_uv=False) for x in (tree, jax.device_get(updates))
    )
    assert before.max() / before.min() > 8 and after.max() / after.min() < 2  # five iterations: 1, nearly


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"task": "vea"}, "config.task='vea': known are denoiser, vae; did you mean vae"),
        ({"mesh.tensor": 2}, "config.mesh.tensor=2: a VAE has no axis of that kind"),
        ({"vae.temporal_downsample": (True, True)}, "temporal_downsample"),
        ({"clips.shapes": ((4, 16, 16, 4),)}, "nearest: 3x16x16"),
        ({"clips.shapes": ((3, 16, 16, 3),)}, "3 chunks of 3x16x16 don't divide over 4 devices .* nearest: 4"),
        ({"mesh.context": 4, "clips.shapes": ((3, 18, 16, 4),)}, "height of 3x18x16 doesn't divide over context=4"),
        ({"dtype": "float16"}, "config.dtype='float16'"),
    ],
)
def test_settings_that_do_not_fit(changes, says):
    config = make_config(**changes)
    with pytest.raises(ConfigError, match=says):
        check(config)
        autoencoding.mesh(config)
