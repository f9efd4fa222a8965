"""Measures of reconstructed clips, each against a direct statement of what it is."""

import numpy as np
import pytest

from vidgen.data.moving_shapes import MovingShapes
from vidgen.evaluation import quality


@pytest.fixture(scope="module")
def clips():
    rng = np.random.default_rng(0)
    smooth = np.cumsum(np.cumsum(rng.normal(size=(3, 24, 31, 3)), 1), 2)
    original = ((smooth - smooth.min()) / np.ptp(smooth) * 255).astype(np.uint8)
    noisy = np.clip(original + rng.normal(size=original.shape) * 12, 0, 255).astype(np.uint8)
    return original, noisy


def test_psnr_is_of_the_mean_square_and_of_the_masked_pixels_alone(clips):
    original, noisy = clips
    error = np.mean((original.astype(float) - noisy) ** 2)
    assert quality.psnr(original, noisy) == pytest.approx(10 * np.log10(255**2 / error), abs=1e-4)
    assert quality.psnr(original, original) == quality.CEILING
    mask = np.zeros(original.shape[:3], bool)
    mask[1, :5, :7] = True
    worse = original.copy()
    worse[mask] ^= 128
    assert quality.psnr(original, worse, mask) == pytest.approx(10 * np.log10(255**2 / 128**2), abs=1e-4)
    assert quality.psnr(original, worse, ~mask) == quality.CEILING
    with pytest.raises(ValueError, match="no pixel"):
        quality.psnr(original, noisy, np.zeros_like(mask))


def direct_ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Of one frame, a window at a time, in f64."""
    line = np.exp(-((np.arange(11) - 5) ** 2) / (2 * 1.5**2))
    window = np.outer(line, line) / line.sum() ** 2
    found = []
    for y in range(a.shape[0] - 10):
        for x in range(a.shape[1] - 10):
            for c in range(3):
                p, q = (v[y : y + 11, x : x + 11, c].astype(np.float64) for v in (a, b))
                mp, mq = (window * p).sum(), (window * q).sum()
                vp, vq = (window * p * p).sum() - mp**2, (window * q * q).sum() - mq**2
                cov = (window * p * q).sum() - mp * mq
                c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
                found.append((2 * mp * mq + c1) * (2 * cov + c2) / ((mp**2 + mq**2 + c1) * (vp + vq + c2)))
    return float(np.mean(found))


def test_ssim_is_the_direct_computation(clips):
    original, noisy = clips
    found = quality.ssim(original, noisy)
    np.testing.assert_allclose(found, [direct_ssim(a, b) for a, b in zip(original, noisy, strict=True)], atol=1e-5)
    assert 0.1 < found.min() < found.max() < 0.95
    # Bright and flat: where f32 loses small variances first.
    bright = 250 + (original % 3)
    np.testing.assert_allclose(quality.ssim(bright, bright ^ 1)[0], direct_ssim(bright[0], bright[0] ^ 1), atol=1e-4)
    np.testing.assert_allclose(quality.ssim(original, original), 1, atol=1e-5)
    with pytest.raises(ValueError, match="10x31 frames: expected 11x11"):
        quality.ssim(original[:, :10], noisy[:, :10])


def test_flicker_and_unsteadiness_tell_a_still_fault_from_a_changing_one():
    still = np.full((5, 16, 16, 3), 100, np.uint8)
    blink = still.copy()
    blink[::2] += 10
    assert quality.flicker(still) == 0 and quality.flicker(still[:1]) == 0
    assert quality.flicker(blink) == pytest.approx(10 / 255)
    assert quality.unsteadiness(still, still + 20) == 0
    assert quality.unsteadiness(still, blink) == pytest.approx(10 / 255)
    # It flickers less than its original, and is unsteady all the same.
    assert quality.flicker(still) < quality.flicker(blink)
    assert quality.unsteadiness(blink, still) == pytest.approx(10 / 255)


@pytest.mark.parametrize("size", [(17, 32, 32), (9, 40, 56), (1, 32, 32)])
def test_boxes_hold_the_objects_and_little_else(size):
    source = MovingShapes("full", 64, (size,), 8.0, ("en",), 0.2)
    for index in range(24):
        scene, _ = source.scene(index, 0)
        inside = quality.boxes(scene, *size)
        assert inside.shape == size and inside.any()
        assert inside.mean() < 0.95
        clip = source.read(index, 0).video
        if all(shot.background.kind == "plain" for shot in scene.shots):
            # A plain ground is one colour: whatever else is seen is an object.
            for frame, mask in zip(clip, inside, strict=True):
                outside = frame[~mask]
                assert len(outside) == 0 or np.ptp(outside, axis=0).max() <= 1


def test_lpips_of_a_clip_is_the_mean_over_its_frames(clips):
    from vidgen import perceptual
    from vidgen.objectives import lpips

    if reason := perceptual.missing("lpips"):
        pytest.skip(reason)
    params = lpips.load()
    original, noisy = (np.repeat(clip, 6, axis=0) for clip in clips)  # 18 frames: more than go through at once
    noisy[-1] = original[-1]
    found = quality.perceptual_distance(params, original, noisy)
    frames = lpips.lpips(params, *(x.astype(np.float32) / 127.5 - 1 for x in (original, noisy)))
    assert found == pytest.approx(float(np.mean(frames)), rel=1e-4)
