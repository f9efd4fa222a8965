"""Pixels ↔ latents ↔ tokens."""

import jax.numpy as jnp
import numpy as np
import pytest

from vidgen.geometry import Geometry, from_blocks, patchify, to_blocks, unpatchify

WAN = Geometry((4, 8, 8), (1, 2, 2), 16)


@pytest.mark.parametrize(
    ("size", "fitted"),
    [
        ((81, 720, 1280), (81, 720, 1280)),
        ((80, 721, 1295), (77, 720, 1280)),
        ((1, 16, 16), (1, 16, 16)),
        ((4, 31, 17), (1, 16, 16)),
        ((9, 15, 64), (9, 0, 64)),
    ],
)
def test_fit_is_the_largest_that_cuts(size, fitted):
    assert WAN.fit(*size) == fitted


def test_fit_on_columns_equals_fit_on_numbers():
    sizes = [(81, 720, 1280), (80, 721, 1295), (4, 31, 17)]
    columns = WAN.fit(*map(np.asarray, zip(*sizes, strict=True)))
    assert list(zip(*(c.tolist() for c in columns), strict=True)) == [WAN.fit(*s) for s in sizes]


@pytest.mark.parametrize("size", [(1, 1, 1), (2, 16, 17), (5, 32, 16), (78, 700, 1270)])
def test_cover_is_the_smallest_that_cuts(size):
    cover = WAN.cover(*size)
    assert WAN.fit(*cover) == cover
    steps = ((4, 0, 0), (0, 16, 0), (0, 0, 16))
    for step in steps:
        smaller = tuple(c - s for c, s in zip(cover, step, strict=True))
        assert any(a < b for a, b in zip(smaller, size, strict=True))


def test_a_time_patch_needs_whole_patches():
    geometry = Geometry((4, 8, 8), (2, 1, 1), 16)
    assert geometry.fit(17, 8, 8) == (13, 8, 8)  # 5 latent frames, of which 4 make two patches
    assert geometry.fit(4, 8, 8)[0] == 0  # one latent frame is half a patch
    assert geometry.grid(13, 8, 8) == (2, 1, 1)


def test_wan_720p_has_75600_tokens():
    assert WAN.tokens(81, 720, 1280) == 75_600


def test_coords_are_t_major_and_in_eighths_of_a_second():
    coords = WAN.coords(5, 32, 48)
    assert coords.shape == (2 * 2 * 3, 3)
    assert coords[1].tolist() == [0, 0, 1] and coords[3].tolist() == [0, 1, 0] and coords[6].tolist() == [1, 0, 0]
    assert WAN.coords(5, 32, 48, fps=16)[6].tolist() == [2.0, 0, 0]  # 4 frames at 16 a second: a quarter of a second


@pytest.mark.parametrize("patch", [(1, 1, 1), (1, 2, 1), (2, 1, 2)])
def test_patchify_round_trip_and_order(patch):
    latents = np.arange(2 * 4 * 2 * 4 * 3).reshape(2, 4, 2, 4, 3)
    tokens = patchify(latents, patch)
    grid = tuple(n // p for n, p in zip((4, 2, 4), patch, strict=True))
    np.testing.assert_array_equal(unpatchify(tokens, grid, patch), latents)
    first = latents[0, : patch[0], : patch[1], : patch[2]]
    np.testing.assert_array_equal(tokens[0, 0], first.reshape(-1))


@pytest.mark.parametrize("xp", [np, jnp])
def test_blocks_round_trip_exactly_and_hold_the_first_frame_alone(xp):
    geometry = Geometry((4, 8, 8), (1, 1, 2), 768)
    video = xp.asarray(np.random.default_rng(0).random((2, 9, 16, 32, 3), np.float32))
    blocks = to_blocks(video, geometry)
    assert blocks.shape == (2, geometry.tokens(9, 16, 32), geometry.features)
    np.testing.assert_array_equal(from_blocks(blocks, geometry.grid(9, 16, 32), geometry), video)
    np.testing.assert_array_equal(to_blocks(video[:, :1], geometry), blocks[:, : geometry.tokens(1, 16, 32)])
