import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vidgen.config import ConfigError, base
from vidgen.models import windows
from vidgen.models.attend import Attending, attend, executed_pairs


def grid(t, y, x):
    """Coordinates of a clip's tokens, t-major, [t y x, 3]."""
    return np.stack(np.meshgrid(*map(np.arange, (t, y, x)), indexing="ij"), -1).reshape(-1, 3).astype(np.float32)


def row(*clips):
    """(segment [1,S], coords [1,S,3]) of clips packed one behind the other, and five tokens of padding."""
    coords = [grid(*clip) for clip in clips]
    segment = np.concatenate([np.full(len(c), i + 1) for i, c in enumerate(coords)] + [np.zeros(5)])
    return jnp.asarray(segment[None], jnp.int32), jnp.asarray(np.concatenate([*coords, np.zeros((5, 3))])[None])


def same(ids):
    """Which tokens share an id."""
    return np.asarray(ids)[:, :, None] == np.asarray(ids)[:, None, :]


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("window", [(2, 3, 4), (1, 2, 8), (3, 15, 16)])
def test_windows_by_brute_force(window, shift):
    segment, coords = row((3, 5, 6), (1, 4, 4), (4, 3, 9))
    ids = np.asarray(windows.window_ids(segment, coords, window, shift))[0]
    where = [
        (s, *((c + (w // 2 if shift else 0)) // w for c, w in zip(token, window, strict=True)))
        for s, token in zip(np.asarray(segment)[0].tolist(), np.asarray(coords)[0].tolist(), strict=True)
    ]
    tokens = [(w, i) for w, i in zip(where, ids.tolist(), strict=True) if w[0]]
    for a, i in tokens:
        for b, j in tokens:
            assert (i == j) == (a == b) and (i < j) == (a < b)  # one id a window, lexicographic
    np.testing.assert_array_equal(ids == 0, np.asarray(segment)[0] == 0)
    assert ids.dtype == np.int32 and ids.min() == 0


def test_windows_in_seconds_and_from_before_zero():
    t = np.arange(-3, 12) * (8 / 24) * 4  # 24 frames a second, four frames a latent, seconds x 8
    coords = jnp.asarray(np.stack([t, 0 * t, 0 * t], -1)[None], jnp.float32)
    ids = windows.window_ids(jnp.ones((1, 15), jnp.int32), coords, (4, 1, 1), False)
    np.testing.assert_array_equal(np.unique(np.asarray(ids), return_counts=True)[1], [3, 3, 3, 3, 3])


def test_a_packed_clip_has_the_windows_and_the_output_that_it_has_alone():
    segment, coords = row((2, 4, 4), (3, 3, 6))
    r = np.random.default_rng(0)
    q, k, v = (jnp.asarray(r.normal(size=(1, 2, segment.shape[1], 8)), jnp.float32) for _ in range(3))
    mine = np.asarray(segment)[0] == 2
    packed = windows.window_ids(segment, coords, (2, 2, 4), True)
    alone = windows.window_ids(segment[:, mine] // 2, coords[:, mine], (2, 2, 4), True)
    np.testing.assert_array_equal(same(packed)[:, mine][:, :, mine], same(alone))
    how = Attending("blockwise", block=16)
    run = jax.jit(lambda q, k, v, ids: attend(q, k, v, ids, ids, how, windows=True))
    out, only = run(q, k, v, packed), run(*(x[:, :, mine] for x in (q, k, v)), alone)
    np.testing.assert_allclose(out[:, :, mine], only, atol=1e-6)


def test_sorting_changes_neither_output_nor_gradient():
    segment, coords = row((3, 4, 4), (2, 3, 6))
    ids = windows.window_ids(segment, coords, (2, 2, 4), True)
    r = np.random.default_rng(0)
    q, k, v, g = (jnp.asarray(r.normal(size=(1, 2, ids.shape[1], 8)), jnp.float32) for _ in range(4))

    def both(how, sort):
        def loss(q, k, v):
            return jnp.sum(g * attend(q, k, v, ids, ids, how, windows=sort))

        return jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(q, k, v)

    wanted = both(Attending(), False)
    for sort in (False, True):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5),
            both(Attending("blockwise", block=16), sort),
            wanted,
        )


def test_sorted_windows_skip_most_of_what_unsorted_ones_compute():
    coords = grid(9, 45, 80)[None]
    segment = jnp.ones(coords.shape[:2], jnp.int32)
    ids = np.asarray(windows.window_ids(segment, jnp.asarray(coords), (3, 15, 16), False))
    how, whole = Attending("blockwise"), ids.size**2
    assert np.sum(np.unique(ids, return_counts=True)[1] ** 2) / whole == pytest.approx(1 / 45)
    assert executed_pairs(ids, ids, how) / whole == pytest.approx(0.22, abs=0.01)
    assert executed_pairs(ids, ids, how, windows=True) / whole == pytest.approx(0.055, abs=0.001)


@pytest.mark.parametrize("window", [(3, 15), (3, 0, 16), (3, 15, 2.5)])
def test_a_wrong_window_is_refused(window):
    config = base()
    config.model.window = window
    with pytest.raises(ConfigError, match="expected \\(t, y, x\\) in tokens"):
        windows.from_config(config)


def test_the_window_of_a_config():
    config = base()
    assert windows.from_config(config) is None
    config.model.window = (3, 15, 16)
    assert windows.from_config(config) == (3, 15, 16)
    config.model.full_every = -1
    with pytest.raises(ConfigError, match="full_every=-1"):
        windows.from_config(config)
