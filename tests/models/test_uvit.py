"""The packed U-ViT: the published computation, and each clip of a row as if it were alone."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_tiny

from vidgen.batch import TokenBatch
from vidgen.config import ConfigError
from vidgen.models import backbones, uvit
from vidgen.models.linear import Layout
from vidgen.parallel.mesh import make_mesh
from vidgen.parallel.rules import rules_of
from vidgen.weights import flatten, nest

pytestmark = pytest.mark.usefixtures("quick_compiles")
P, E, CLASSES = 12, 20, 7
CLIPS = [((3, 2, 2), 5), ((1, 2, 3), 3), ((2, 2, 2), 1)]  # token grids, and text tokens


def make_config(**changes):
    c = make_tiny()
    c.rows.update(count=4, tokens=32, text=16, caption=8, segments=3)
    c.model.update(backbone="uvit", layers=3, unroll=1, qk_norm="none", rope=False, absolute="table", table=(3, 2, 3))
    c.model.update(changes)
    return c


def row(clips, tokens=32, texts=16, classes=0):
    """One row of `clips` side by side, text as values: (noisy tokens, levels, batch)."""
    coords, segment = np.zeros((1, tokens, 3), np.float32), np.zeros((1, tokens), np.int32)
    noisy = np.full((1, tokens, P), 7.0, np.float32)  # padding is not zero, so that a leak shows
    values, whose = np.full((1, texts, E), 5.0, np.float32), np.zeros((1, texts), np.int32)
    levels, labels = np.zeros((1, 4), np.float32), np.zeros((1, 4, 1), np.float32)
    at = text_at = 0
    for k, (grid, length) in enumerate(clips, start=1):
        n, r = math.prod(grid), np.random.default_rng(math.prod(grid))
        coords[0, at : at + n] = np.stack(np.meshgrid(*map(np.arange, grid), indexing="ij"), -1).reshape(n, 3)
        segment[0, at : at + n] = k
        noisy[0, at : at + n] = r.normal(size=(n, P))
        levels[0, k], labels[0, k] = r.uniform(0.1, 0.9), r.integers(CLASSES)
        values[0, text_at : text_at + length] = r.normal(size=(length, E))
        whose[0, text_at : text_at + length] = k
        at, text_at = at + n, text_at + length
    context = {"text": (values, whose)}
    vectors = labels if classes else None
    return noisy, levels, TokenBatch(None, coords, segment, level=segment, vectors=vectors, context=context)


def lively(net, *rows):
    """Parameters none of which is zero: zeros and ones prove nothing."""
    rng, shapes = np.random.default_rng(1), flatten(jax.eval_shape(net.init, jax.random.key(0), *rows)["params"])

    def values(path, shape):
        drawn = rng.normal(size=shape).astype(np.float32)
        if path.endswith("kernel"):
            return drawn / np.float32(shape[-2] ** 0.5)
        return drawn / 10 + path.endswith("scale")

    return nest({path: values(path, x.shape) for path, x in shapes.items()})


def made(config, rows):
    """(module, its parameters)."""
    net = backbones.from_config(config, P, None)
    return net, lively(net, *rows)


@pytest.fixture(scope="module")
def setup():
    net, params = made(make_config(), row(CLIPS))
    return net, params, jax.jit(lambda *inputs: net.apply({"params": params}, *inputs))


def published(p, heads, patches, time, others, places):
    """U-ViT as its authors' code has it, in NumPy, without the last convolution (their `conv=False`).

    Args:
      p: parameters; `others`: embedded label or text tokens [L,W]; `places`: of time, others and patches, [1+L+S,W].
    """

    def linear(q, x):
        return x @ q["kernel"] + q.get("bias", 0)

    def norm(q, x):
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * q["scale"] + q["bias"]

    def attend(q, x):
        n, width = x.shape
        cut = (linear(q[name], x).reshape(n, heads, -1).transpose(1, 0, 2) for name in ("query", "key", "value"))
        query, key, value = cut
        scores = query @ key.transpose(0, 2, 1) / math.sqrt(width // heads)
        share = np.exp(scores - scores.max(-1, keepdims=True))
        out = (share / share.sum(-1, keepdims=True)) @ value
        return out.transpose(1, 0, 2).reshape(n, width) @ q["out"]["kernel"]

    def block(q, x, skip=None):
        if skip is not None:
            x = linear(q["skip"], np.concatenate([x, skip], axis=-1))
        x = x + attend(q["attention"], norm(q["attention_norm"], x)) + q["attention_bias"]
        h = linear(q["up"], norm(q["mlp_norm"], x))
        return x + linear(q["down"], 0.5 * h * (1 + np.vectorize(math.erf)(h / math.sqrt(2))))

    def layer(stack, i):
        return jax.tree.map(lambda a: a[i], p["blocks"][stack])

    width = p["embed"]["kernel"].shape[1]
    angle = 1000 * time * np.exp(-math.log(10_000) * np.arange(width // 2) / (width // 2))
    x = np.concatenate([[np.concatenate([np.cos(angle), np.sin(angle)])], others, linear(p["embed"], patches)]) + places
    skips, half = [], len(p["blocks"]["in"]["attention_bias"])
    for i in range(half):
        x = block(layer("in", i), x)
        skips.append(x)
    x = block(layer("middle", 0), x)
    for i in range(half):
        x = block(layer("out", i), x, skips.pop())
    return linear(p["head"], norm(p["final_norm"], x))[1 + len(others) :]


@pytest.mark.parametrize(("told", "grid"), [("class", (1, 2, 3)), ("text", (3, 2, 2))])  # an image, a clip
def test_it_is_the_published_computation(told, grid):
    config = make_config(layers=5, cross=told == "text", classes=CLASSES if told == "class" else 0)
    rows = noisy, levels, batch = row([(grid, 5)], classes=config.model.classes)
    net, params = made(config, rows)
    ours = jax.jit(lambda p: net.apply({"params": p}, *rows))(params)[0, : math.prod(grid)]
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    n = math.prod(grid)
    t, y, x = batch.coords[0, :n].astype(int).T
    places = [p["level_place"][None], p["place_table"][(t * 2 + y) * 3 + x]]
    if told == "text":
        others = batch.context["text"][0][0, :5] @ p["text_in"]["kernel"] + p["text_in"]["bias"]
        places.insert(1, p["text_places"][:5])
    else:
        others = p["class_embedding"][batch.vectors[0, 1].astype(int)]
        places.insert(1, np.zeros_like(others))  # the authors' place of the label is part of its embedding here
    theirs = published(p, 2, noisy[0, :n], levels[0, 1], others, np.concatenate(places))
    assert np.abs(theirs).max() > 0.5
    assert np.abs(ours - theirs).max() < 2e-4


def test_a_packed_row_gives_each_clip_what_it_gets_alone(setup):
    _, _, apply = setup
    packed, at = apply(*row(CLIPS)), 0
    for k, clip in enumerate(CLIPS):
        n = math.prod(clip[0])
        alone = apply(*row([clip]))[0, :n]  # of the same shape, so that it is compiled once
        assert np.abs(alone).max() > 0.1
        assert np.abs(packed[0, at : at + n] - alone).max() < 1e-5, f"clip {k}"
        at += n


def test_a_clip_does_not_depend_on_its_neighbours_or_on_padding(setup):
    _, _, apply = setup
    noisy, levels, batch = row(CLIPS)
    values, whose = batch.context["text"]
    others = batch.replace(context={"text": (np.where(whose[..., None] == 1, values, 9.0), whose)})
    changed = np.where(batch.segment[..., None] == 1, noisy, 100.0)
    a, b = apply(noisy, levels, batch), apply(changed, levels * [1, 1, 0.5, 0.5], others)
    np.testing.assert_allclose(a[0, :12], b[0, :12], atol=1e-6)
    assert np.abs(a[0, 12:18] - b[0, 12:18]).max() > 0.1


@pytest.mark.parametrize("what", ["text", "level", "place", "given", "label"])
def test_a_clip_depends_on_what_it_should(setup, what):
    _, _, apply = setup
    noisy, levels, batch = row(CLIPS[:1])
    if what == "label":
        noisy, levels, batch = row(CLIPS[:1], classes=CLASSES)
        net, params = made(make_config(classes=CLASSES), (noisy, levels, batch))
        apply = jax.jit(lambda *inputs: net.apply({"params": params}, *inputs))
    before = apply(noisy, levels, batch)
    if what == "text":
        values, whose = batch.context["text"]
        batch = batch.replace(context={"text": (values[:, ::-1], whose[:, ::-1])})
    elif what == "level":
        levels = levels + 0.05
    elif what == "place":
        batch = batch.replace(coords=batch.coords[:, ::-1])
    elif what == "given":
        batch = batch.replace(level=np.where(np.arange(32) < 4, 0, batch.level))
    else:
        batch = batch.replace(vectors=batch.vectors + 1)
    assert np.abs(apply(noisy, levels, batch) - before)[0, :12].max() > 1e-3


def test_it_starts_as_zero():
    rows = row(CLIPS)
    net = backbones.from_config(make_config(cross=False), P, None)
    out, _ = jax.jit(net.init_with_output)(jax.random.key(0), *rows)
    assert not np.any(out)


@pytest.mark.parametrize("changes", [{"qk_norm": "joint", "bias": True}, {"rope": True, "absolute": "projected"}])
def test_gradient_flows_to_every_parameter(changes):
    noisy, levels, batch = row(CLIPS, classes=CLASSES)
    batch = batch.replace(level=np.where(np.arange(32) < 4, 0, batch.level), cond=noisy[..., :2])
    net, params = made(make_config(classes=CLASSES, cond=2, **changes), (noisy, levels, batch))
    out = lambda p: net.apply({"params": p}, noisy, levels, batch)  # noqa: E731
    gradient = jax.jit(jax.grad(lambda p: jnp.sum(out(p)[0, :26] ** 2)))(params)
    for path, x in jax.tree_util.tree_leaves_with_path(gradient):
        assert np.isfinite(x).all() and np.abs(x).max() > 1e-5, jax.tree_util.keystr(path)


@pytest.mark.parametrize("changes", [{"remat": "products", "unroll": 3}, {"residual": "bfloat16"}])
def test_remat_and_unrolling_change_nothing(setup, changes):
    net, params, _ = setup
    rows = row(CLIPS)

    def gradient(net):
        return jax.jit(jax.grad(lambda p: jnp.sum(net.apply({"params": p}, *rows)[0, :26] ** 2)))(params)

    other = backbones.from_config(make_config(**changes), P, None)
    wide = 0.1 if "residual" in changes else 1e-4
    for a, b in zip(jax.tree.leaves(gradient(net)), jax.tree.leaves(gradient(other)), strict=True):
        np.testing.assert_allclose(a, b, rtol=wide, atol=wide * np.abs(a).max() + 1e-7)


ROWS = jax.tree.map(
    lambda *x: np.concatenate(x), *(row(clips, 32, 15) for clips in (CLIPS, CLIPS[::-1], CLIPS[:1], CLIPS[1:]))
)


def outcome(net, params):
    """What comes out of four rows, and the gradient."""
    own = ROWS[2].segment[..., None] > 0

    def loss(p):
        out = net.apply({"params": p}, *ROWS) * own
        return jnp.sum(out**2), out

    (_, out), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    return [out, *jax.tree.leaves(gradient)]


@pytest.fixture(scope="module")
def single(setup):
    return outcome(*setup[:2])


@pytest.mark.parametrize(
    ("axes", "attention"),
    [({"data": 2, "fsdp": 2}, "auto"), ({"context": 4, "data": 1}, "gather"), ({"fsdp": 2, "context": 2}, "ulysses")],
)
def test_any_mesh_equals_one_device(setup, single, axes, attention):
    """Also where the 15 + 4 tokens beside the patches don't divide over the context axis before they are filled up."""
    config = make_config()
    config.mesh.update(axes | {"attention": attention})
    mesh = make_mesh(config.mesh, 4, 32)
    how = backbones.attending(config, mesh, "cpu")
    spread = backbones.from_config(config, P, None, Layout(mesh, rules_of(config.mesh)), how)
    for a, b in zip(single, outcome(spread, setup[1]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * np.abs(a).max() + 1e-6)


def test_joined_sequences_come_apart_and_stay_on_their_devices():
    first, second = np.arange(4)[None, :, None] + 100, np.arange(8)[None, :, None]
    whole = uvit.join(jnp.asarray(first), jnp.asarray(second), 2)
    assert whole[0, :, 0].tolist() == [100, 101, 0, 1, 2, 3, 102, 103, 4, 5, 6, 7]
    np.testing.assert_array_equal(uvit.patches_of(whole, 4, 2), second)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"layers": 4}, "config.model.layers=4.*nearest: 5"),
        ({"layers": 1}, "nearest: 3"),
        ({"shared_modulation": True}, "shared_modulation=True: means nothing to config.model.backbone=uvit"),
        ({"window": (1, 2, 2)}, "config.model.window"),
        ({"absolute": "tabel"}, "did you mean table"),
        ({"table": ()}, "config.model.table"),
        ({"heads": 5}, "config.model.heads=5"),
        ({"backbone": "u-vit"}, "known are dit, uvit; did you mean uvit"),
        ({"backbone": "unet"}, "known are dit, uvit"),
    ],
)
def test_settings_that_mean_nothing_are_refused(changes, said):
    with pytest.raises(ConfigError, match=said):
        backbones.check(make_config(**changes))


def test_rows_must_bring_what_the_model_was_made_for(setup):
    net, params, _ = setup
    noisy, levels, batch = row(CLIPS)
    with pytest.raises(ConfigError, match=r"config.model.cond=0: rows bring cond \[1, 32, 2\]"):
        net.apply({"params": params}, noisy, levels, batch.replace(cond=noisy[..., :2]))
    labelled = backbones.from_config(make_config(classes=3), P, None)
    with pytest.raises(ConfigError, match="config.model.classes=3: expected rows with vectors"):
        labelled.apply({"params": params | {"class_embedding": np.zeros((4, 32))}}, noisy, levels, batch)
    ids = batch.replace(context={"text": (np.zeros((1, 16), np.int32), batch.context["text"][1])})
    with pytest.raises(ConfigError, match="no encoder"):
        net.apply({"params": params}, noisy, levels, ids)
