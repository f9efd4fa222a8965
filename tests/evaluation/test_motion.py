"""Motion and VBench's measures on clips whose motion is known."""

import numpy as np
import pytest

from vidgen.evaluation import motion, vbench

SIDE = 32


def ground(seed: int = 0, size: int = 3 * SIDE) -> np.ndarray:
    """A smooth texture [size,size,3] f32 of 0 to 255."""
    noise = np.random.default_rng(seed).normal(size=(size, size, 3))
    for axis in (0, 1):
        noise = sum(np.roll(noise, s, axis) for s in range(-2, 3))
    return (noise - noise.min()) / np.ptp(noise) * 255


def panned(speed: tuple[int, int], frames: int = 9) -> np.ndarray:
    """A window over the ground that moves by `speed` (y, x) a frame."""
    rows = [(SIDE + t * speed[0], SIDE + t * speed[1]) for t in range(frames)]
    return np.stack([ground()[y : y + SIDE, x : x + SIDE] for y, x in rows]).astype(np.uint8)


def square(speed: int, frames: int = 9, colour=(220, 40, 40)) -> np.ndarray:
    """A square of 8 pixels on black that moves to the right."""
    video = np.zeros((frames, SIDE, SIDE, 3), np.uint8)
    for t in range(frames):
        video[t, 12:20, 2 + speed * t : 10 + speed * t] = colour
    return video


@pytest.mark.parametrize("speed", [(0, 0), (0, 2), (-3, 1)])
def test_flow_is_the_known_motion(speed):
    a, b = panned(speed, 2).astype(np.float32)
    found = motion.flow(a, b)
    assert found.shape == (SIDE, SIDE, 2)
    # What the window sees moves the other way.
    inside = found[6:-6, 6:-6]
    assert (inside == np.negative(speed)).all(-1).mean() > 0.98


def test_a_plain_frame_and_faint_noise_do_not_move():
    plain = np.full((SIDE, SIDE, 3), 90, np.float32)
    noise = np.random.default_rng(0).normal(scale=3, size=(2, *plain.shape)).astype(np.float32)
    assert not motion.flow(plain, plain + 20).any()
    assert (motion.flow(plain + noise[0], plain + noise[1]) == 0).all(-1).mean() > 0.99


def test_the_frame_between_two_is_the_one_that_was_left_out():
    a, middle, b = panned((1, -2), 3).astype(np.float32)
    inside = (slice(6, -6), slice(6, -6))
    assert np.abs(motion.between(a, b) - middle)[inside].max() < 1
    assert np.abs((a + b) / 2 - middle)[inside].mean() > 10  # no mere mean


def test_large_clips_are_shrunk_by_means():
    video = np.random.default_rng(0).integers(0, 256, (2, 130, 200, 3)).astype(np.uint8)
    small = motion.shrunk(video)
    assert small.shape == (2, 43, 66, 3) and small.dtype == np.float32  # 130 / 3, 200 / 3
    np.testing.assert_allclose(small[1, 4, 7], video[1, 12:15, 21:24].mean((0, 1)), rtol=1e-5)
    assert motion.shrunk(video[:, :64]).shape == (2, 64, 200, 3)


def test_measures_order_still_smooth_shuffled_and_flickering_clips():
    still = np.repeat(panned((0, 0), 1), 9, axis=0)
    smooth = panned((0, 2))
    shuffled = smooth[[0, 5, 2, 7, 1, 8, 4, 6, 3]]
    flicker = still.copy()
    flicker[1::2] = np.minimum(flicker[1::2].astype(int) + 30, 255)
    found = {
        name: vbench.measured(video, 8.0)
        for name, video in (("still", still), ("smooth", smooth), ("shuffled", shuffled), ("flicker", flicker))
    }
    row = found["still"]
    assert row["temporal_flickering"] == row["motion_smoothness"] == 1 and row["motion"] == 0 and not row["dynamic"]
    assert row["subject_consistency"] == pytest.approx(1)
    assert found["smooth"]["dynamic"] and found["smooth"]["motion"] == pytest.approx(2 / SIDE, rel=0.1)
    assert found["smooth"]["motion_smoothness"] > 0.98 > found["shuffled"]["motion_smoothness"] + 0.02
    assert found["flicker"]["temporal_flickering"] == pytest.approx(1 - 30 / 255, abs=0.01)
    assert found["flicker"]["motion_smoothness"] == pytest.approx(1 - 30 / 255, abs=0.01)
    # Light that changes is no motion.
    assert not found["flicker"]["dynamic"] and found["flicker"]["motion"] < 0.5 / SIDE
    means = vbench.summary(list(found.values()))
    assert means["dynamic_degree"] == 0.5 and means["subject_consistency_vgg"] is None
    assert means["motion"] == pytest.approx(np.mean([row["motion"] for row in found.values()]))


def test_a_small_object_on_black_is_seen_to_move_and_to_stay_itself():
    assert vbench.measured(square(2), 8.0)["dynamic"] and not vbench.measured(square(0), 8.0)["dynamic"]
    assert vbench.measured(square(2), 8.0)["motion"] == pytest.approx(2 / SIDE, rel=0.3)
    steady = vbench.subject_consistency(square(2))
    changed = square(2)
    changed[4:] = square(2, colour=(40, 40, 220))[4:]
    gone = square(2)
    gone[4:] = 0
    assert steady == pytest.approx(1)
    assert vbench.subject_consistency(changed) < vbench.subject_consistency(gone) < steady - 0.01


def test_what_is_fast_depends_on_the_frames_a_second():
    slow = panned((0, 1), 9)
    assert vbench.measured(slow, 8.0)["dynamic"]  # 1 pixel of 32 is more than 6 of 256
    assert not vbench.measured(slow, 4.0)["dynamic"]  # but less than 12
    # At 16 frames a second every second one is looked at.
    assert vbench.measured(slow, 16.0)["motion"] == pytest.approx(2 / SIDE, rel=0.1)
