"""The packed DiT: each clip of a row gets exactly what it gets alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_tiny

from vidgen.batch import TokenBatch
from vidgen.config import ConfigError
from vidgen.data.text import encode_text
from vidgen.models import dit, places
from vidgen.models.attend import Attending, attend, from_config
from vidgen.models.linear import Layout
from vidgen.parallel.mesh import make_mesh
from vidgen.parallel.rules import rules_of
from vidgen.text import encoder
from vidgen.weights import flatten, nest

pytestmark = pytest.mark.usefixtures("quick_compiles")

P = 12
CLIPS = [((3, 2, 2), "a red circle"), ((1, 2, 3), "三角形"), ((2, 2, 2), "")]  # token grids and captions


def row(clips, tokens, texts):
    """One row that holds `clips` one after the other: (batch, noisy tokens, levels)."""
    rng = [np.random.default_rng(len(caption)) for _, caption in clips]
    coords, segment = np.zeros((1, tokens, 3), np.float32), np.zeros((1, tokens), np.int32)
    noisy = np.full((1, tokens, P), 7.0, np.float32)  # padding is not zero, so that a leak shows
    ids, text_segment = np.zeros((2, 1, texts), np.int32)
    levels = np.zeros((1, 4), np.float32)
    at = text_at = 0
    for k, ((grid, caption), r) in enumerate(zip(clips, rng, strict=True), start=1):
        n = int(np.prod(grid))
        coords[0, at : at + n] = np.stack(np.meshgrid(*map(np.arange, grid), indexing="ij"), -1).reshape(n, 3)
        segment[0, at : at + n] = k
        noisy[0, at : at + n] = r.normal(size=(n, P))
        levels[0, k] = r.uniform(0.1, 0.9)
        text = encode_text(caption, 40)
        ids[0, text_at : text_at + len(text)], text_segment[0, text_at : text_at + len(text)] = text, k
        at, text_at = at + n, text_at + len(text)
    batch = TokenBatch(None, coords, segment, level=segment, context={"text": (ids, text_segment)})
    return batch, noisy, levels


def model(config, **changes):
    config.model.update(changes)
    return dit.from_config(config, P, encoder.from_config(config))


def lively(net, *rows):
    """Parameters none of which is zero: adaLN-Zero starts as the identity, which proves nothing."""
    rng, shapes = np.random.default_rng(1), flatten(jax.eval_shape(net.init, jax.random.key(0), *rows)["params"])

    def values(path, shape):
        drawn = rng.normal(size=shape).astype(np.float32)
        if path.endswith("kernel"):
            return drawn / np.float32(shape[-2] ** 0.5)
        return drawn / 10 + path.endswith("scale")

    return nest({path: values(path, x.shape) for path, x in shapes.items()})


@pytest.fixture(scope="module")
def setup():
    net = model(make_tiny())
    batch, noisy, levels = row(CLIPS, 32, 48)
    params = lively(net, noisy, levels, batch)
    apply = jax.jit(lambda *inputs: net.apply({"params": params}, *inputs))
    return net, params, apply


def test_a_packed_row_gives_each_clip_what_it_gets_alone(setup):
    _, _, apply = setup
    batch, noisy, levels = row(CLIPS, 32, 48)
    packed = apply(noisy, levels, batch)
    at = 0
    for k, clip in enumerate(CLIPS):
        n = int(np.prod(clip[0]))
        alone, noisy_alone, own = row([clip], 32, 48)  # of the same shape, so that it is compiled once
        out = apply(noisy_alone, own, alone)[0, :n]
        assert np.abs(out).max() > 0.1
        assert np.abs(packed[0, at : at + n] - out).max() < 1e-5, f"clip {k}"
        at += n


def test_a_clip_does_not_depend_on_its_neighbours_or_on_padding(setup):
    _, _, apply = setup
    batch, noisy, levels = row(CLIPS, 32, 48)
    other = noisy.copy()
    other[0, 12:] = 100.0  # everything but the first clip, padding too
    a, b = apply(noisy, levels, batch), apply(other, levels, batch)
    np.testing.assert_array_equal(a[0, :12], b[0, :12])
    assert np.abs(a[0, 12:18] - b[0, 12:18]).max() > 0.1


@pytest.mark.parametrize("what", ["caption", "level", "place"])
def test_a_clip_depends_on_what_it_should(setup, what):
    _, _, apply = setup
    batch, noisy, levels = row(CLIPS[:1], 32, 48)
    before = apply(noisy, levels, batch)
    if what == "caption":
        batch = batch.replace(context={"text": row([(CLIPS[0][0], "a blue circle")], 32, 48)[0].context["text"]})
    elif what == "level":
        levels = levels + 0.05
    else:
        batch = batch.replace(coords=batch.coords * 1.5)
    assert np.abs(apply(noisy, levels, batch) - before)[0, :12].max() > 1e-3


def test_it_starts_as_zero(tiny):
    batch, noisy, levels = row(CLIPS, 32, 48)
    net = model(tiny, layers=1, unroll=1)
    out, _ = jax.jit(net.init_with_output)(jax.random.key(0), noisy, levels, batch)
    assert not np.any(out)


def test_remat_and_unrolling_change_nothing(setup, tiny):
    net, params, _ = setup
    batch, noisy, levels = row(CLIPS, 32, 48)

    def gradient(net):
        return jax.jit(jax.grad(lambda p: jnp.sum(net.apply({"params": p}, noisy, levels, batch)[0, :26] ** 2)))(params)

    for a, b in zip(
        jax.tree.leaves(gradient(net)), jax.tree.leaves(gradient(model(tiny, remat="full", unroll=1))), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * np.abs(a).max() + 1e-7)


def test_text_may_be_encoded_once(setup):
    net, params, apply = setup
    batch, noisy, levels = row(CLIPS, 32, 48)
    encoded = net.apply({"params": params}, batch, method="encode_context")
    assert encoded.context["text"][0].shape == (1, 48, 32)
    np.testing.assert_allclose(apply(noisy, levels, encoded), apply(noisy, levels, batch), atol=1e-6)


def test_attention_is_softmax_within_segments():
    rng = np.random.default_rng(0)
    q, k, v = rng.normal(size=(3, 1, 2, 6, 4)).astype(np.float32)
    segment = np.array([[1, 1, 2, 2, 2, 0]], np.int32)
    out = attend(*map(jnp.asarray, (q, k, v, segment, segment)), Attending())
    for s in range(5):
        same = segment[0] == segment[0, s]
        scores = np.exp(q[0, :, s] @ k[0, :, same].transpose(1, 2, 0) / 2)[np.arange(2), np.arange(2)]
        weights = scores / scores.sum(-1, keepdims=True)
        want = np.einsum("hl,lhd->hd", weights, v[0, :, same])
        np.testing.assert_allclose(out[0, :, s], want, atol=1e-5)
    assert np.isfinite(out).all()


# Everything that a published architecture sets, in two models.
WAN_LIKE = {
    "bias": True,
    "qk_norm": "joint",
    "rope_pairs": (4, 2, 2),
    "absolute": "none",
    "cross_norm": True,
    "final": "table",
    "mlp_dim": 50,
    "shared_modulation": True,
    "text_mlp": True,
    "cond": 5,
    "image_width": 6,
    "image_tokens": 3,
}
DIT_LIKE = {
    "bias": True,
    "qk_norm": "none",
    "rope": False,
    "absolute": "sincos",
    "cross": False,
    "classes": 7,
    "level_per_block": True,
    "learned_sigma": True,
}


def more(batch, clips, tokens, names):
    """The row with channels beside the noisy ones, labels and 11 image features, each clip's its own."""
    at, cond, image = 0, np.full((1, tokens, 5), 3.0, np.float32), []
    for grid, caption in clips:
        n, rng = int(np.prod(grid)), np.random.default_rng(99 + len(caption))
        cond[0, at : at + n] = rng.normal(size=(n, 5))
        image.append(rng.normal(size=(3, 6)))
        at += n
    labels = np.array([[7.0, *(len(caption) % 7 for _, caption in clips)]], np.float32)
    labels = np.pad(labels, ((0, 0), (0, 4 - labels.shape[1])))[..., None]
    spare = 11 - 3 * len(clips)
    image = np.concatenate([*image, np.full((spare, 6), 9.0)])[None].astype(np.float32)
    segments = np.pad(np.repeat(np.arange(1, len(clips) + 1), 3), (0, spare))[None].astype(np.int32)
    found = {"cond": cond, "vectors": labels, "image": (image, segments)}
    context = batch.context | {name: found.pop(name) for name in ("image",) if name in names}
    return batch.replace(context=context, **{name: found[name] for name in names if name != "image"})


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        (WAN_LIKE | {"window": (1, 2, 2), "full_every": 2, "remat": "full"}, ("cond", "image")),
        (DIT_LIKE | {"window": (1, 2, 2), "full_every": 2}, ("vectors",)),
        ({"absolute": "table", "table": (3, 3, 3), "classes": 7}, ("vectors",)),
    ],
    ids=["wan", "dit", "table"],
)
def test_published_architectures_keep_packed_clips_apart_and_use_all_they_have(tiny, changes, names):
    net = model(tiny, **{"unroll": 1} | changes)
    batch, noisy, levels = row(CLIPS, 32, 48)
    batch = more(batch, CLIPS, 32, names)
    # Parameters can be made of a row that has no such inputs, as the one of `generator.example`.
    params = lively(net, noisy, levels, row(CLIPS, 32, 48)[0])

    @jax.jit
    def run(noisy, levels, batch):
        """What comes out, the variance too, and the gradient of all of it."""

        def loss(p):
            out = net.apply({"params": p}, noisy, levels, batch, with_sigma=True)
            return jnp.sum(jnp.where(batch.segment[..., None] > 0, out, 0) ** 2), out

        return jax.grad(loss, has_aux=True)(params)[::-1]

    (packed, gradients), at = run(noisy, levels, batch), 0
    for k, clip in enumerate(CLIPS):
        n = int(np.prod(clip[0]))
        alone, noisy_alone, own = row([clip], 32, 48)  # of the same shape, so that it is compiled once
        out, _ = run(noisy_alone, own, more(alone, [clip], 32, names))
        assert np.abs(out[0, :n]).max() > 0.1
        assert np.abs(packed[0, at : at + n] - out[0, :n]).max() < 1e-5, f"clip {k}"
        at += n
    for name in names:
        if name == "image":
            values, segment = batch.context["image"]
            swapped = np.concatenate([values[:, 1::-1], values[:, 2:]], axis=1)  # in another order
            other = batch.replace(context=batch.context | {"image": (swapped, segment)})
        else:
            other = batch.replace(**{name: getattr(batch, name) + 1})
        assert np.abs(run(noisy, levels, other)[0] - packed)[0, :12].max() > 1e-4, name
    for path, gradient in jax.tree_util.tree_leaves_with_path(gradients):
        bias_of_keys = "key" in jax.tree_util.keystr(path) and "bias" in jax.tree_util.keystr(path)
        assert bias_of_keys or np.abs(gradient).max() > 0, path  # softmax is blind to what all keys share


@pytest.mark.parametrize(
    ("changes", "names"), [(WAN_LIKE, ("cond", "image")), (DIT_LIKE, ("vectors",))], ids=["wan", "dit"]
)
def test_over_a_mesh_nothing_changes(tiny, changes, names):
    tiny.mesh.update(data=1, context=2, tensor=2)
    one = model(tiny, **{"unroll": 1, "remat": "full"} | changes)
    batch, noisy, levels = row(CLIPS, 32, 48)
    batch = more(batch, CLIPS, 32, names)
    params = lively(one, noisy, levels, batch)
    mesh = make_mesh(tiny.mesh, 1, 32)
    layout, how = Layout(mesh, rules_of(tiny.mesh)), from_config(tiny, mesh, "cpu", tokens=32)
    several = one.clone(layout=layout, how=how, text=one.text and one.text.clone(layout=layout))

    def value_and_gradient(net):
        def loss(p):
            out = net.apply({"params": p}, noisy, levels, batch, with_sigma=True)
            return jnp.sum(jnp.where(batch.segment[..., None] > 0, out, 0) ** 2)

        return jax.jit(jax.value_and_grad(loss))(params)

    for a, b in zip(*map(jax.tree.leaves, map(value_and_gradient, (one, several))), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * np.abs(a).max() + 1e-4)


def test_learned_sigma_comes_behind_the_prediction(tiny):
    net = model(tiny, **DIT_LIKE)
    batch, noisy, levels = row(CLIPS, 32, 48)
    batch = more(batch, CLIPS, 32, ("vectors",))
    params = lively(net, noisy, levels, batch)
    both = net.apply({"params": params}, noisy, levels, batch, with_sigma=True)
    assert both.shape == (1, 32, 2 * P)
    np.testing.assert_array_equal(net.apply({"params": params}, noisy, levels, batch), both[..., :P])


def test_inputs_that_the_model_lacks_or_wants(tiny):
    batch, noisy, levels = row(CLIPS, 32, 48)

    def init_and_apply(changes, given):
        net = model(tiny.copy_and_resolve_references(), **changes)
        params = jax.eval_shape(net.init, jax.random.key(0), noisy, levels, batch)
        jax.eval_shape(net.apply, params, noisy, levels, given)

    for changes, given, says in (
        ({"cond": 5}, batch, r"model.cond=5: expected rows with cond \[1, 32, 5\], found none"),
        ({"classes": 3}, batch, r"model.classes=3: expected rows with vectors \[1, 4, 1\], found none"),
        ({"image_width": 6}, batch, "model.image_width=6: expected rows with image features"),
        ({}, more(batch, CLIPS, 32, ("cond",)), r"model.cond=0: rows bring cond \[1, 32, 5\]; expected no numbers"),
        ({"cond": 4}, more(batch, CLIPS, 32, ("cond",)), r"rows bring cond \[1, 32, 5\]; expected 4 numbers"),
        ({"image_width": 5}, more(batch, CLIPS, 32, ("image",)), "rows bring image features"),
    ):
        with pytest.raises(ConfigError, match=says):
            init_and_apply(changes, given)


def test_places():
    coords = np.zeros((1, 4, 3), np.float32)
    coords[0] = [(0, 0, 0), (1, 0, 2), (0, 1, 2), (2, 0, 0)]
    table = np.arange(2 * 2 * 3)[:, None] * np.ones(4)
    found = places.looked_up(jnp.asarray(table), (2, 2, 3), jnp.asarray(coords))
    np.testing.assert_array_equal(found[0, :, 0], [0, 8, 5, np.nan])  # the last is outside
    settings = make_tiny().model
    settings.update(absolute="table", table=(2, 2, 3))
    places.check_fits(settings, (2, 1, 3), "a clip")
    with pytest.raises(ConfigError, match=r"config.model.table=\(2, 2, 3\): a clip has \(t, y, x\) = \(3, 1, 1\)"):
        places.check_fits(settings, (3, 1, 1), "a clip")
    flat, deep = (places.sincos(jnp.asarray(coords), 32, time) for time in (False, True))
    np.testing.assert_array_equal(flat[0, 1, :16], flat[0, 2, :16])  # of equal x
    np.testing.assert_array_equal(flat[0, 1, 16:], flat[0, 0, 16:])  # of equal y
    np.testing.assert_array_equal(flat[0, 0], flat[0, 3])
    assert np.abs(deep[0, 0] - deep[0, 3]).max() > 0.5
    np.testing.assert_allclose(flat[0, 2, [0, 8, 16, 24]], np.array([np.sin(2), np.cos(2), np.sin(1), np.cos(1)]), 1e-6)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"heads": 5}, "config.model.heads=5.*nearest: 4"),
        ({"remat": "some"}, "neither a preset"),
        ({"qk_norm": "heads"}, "config.model.qk_norm='heads': known are head, joint, none; did you mean head"),
        ({"absolute": "True"}, "config.model.absolute='True': known are projected, sincos"),
        ({"final": "tables"}, "did you mean table"),
        ({"rope_pairs": (4, 4, 4)}, r"sum to 8, half of a head of 16; nearest: \(3, 3, 2\)"),
        ({"absolute": "table"}, "expected config.model.table"),
        ({"absolute": "table", "table": (2, 2, 2), "time_in_seconds": True}, "a table has places in latent frames"),
        ({"table": (1, 0, 2)}, "config.model.table=.*each 1 or more"),
        ({"cross": False, "text_mlp": True}, "config.model.text_mlp=True: has no meaning without config.model.cross"),
        ({"image_tokens": 3}, "without config.model.image_width"),
        ({"level_per_block": True, "shared_modulation": True}, "one modulation has one embedding"),
        ({"cond": -1}, "config.model.cond=-1: expected 0 or more"),
    ],
)
def test_bad_settings(tiny, change, says):
    with pytest.raises(ConfigError, match=says):
        model(tiny, **change)
