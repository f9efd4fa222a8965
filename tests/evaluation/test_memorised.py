"""PSNR against clips that were learned by heart."""

import numpy as np
import pytest

from vidgen.data.clip import BadClip, Clip, ClipSizes
from vidgen.evaluation import memorised, quality
from vidgen.geometry import Geometry


def test_a_moving_clip_gains_over_its_mean_frame_and_a_still_one_cannot():
    moving = np.stack([np.full((4, 4, 3), v, np.uint8) for v in (0, 50, 100, 150)])
    wanted = memorised.Wanted("clip", "a fade", moving, 8.0)
    row = memorised.compare(wanted, moving + 1)
    assert row["psnr"] == pytest.approx(48.13, abs=0.01) and row["gain"] > 20
    worse = memorised.compare(wanted, np.full_like(moving, 75))
    assert worse["gain"] == pytest.approx(0, abs=0.1)
    assert quality.still_psnr(moving[:1].repeat(3, axis=0)) == quality.CEILING
    figures = memorised.summary([row, worse])
    assert figures["psnr_min"] == worse["psnr"] and figures["gain_min"] == worse["gain"] and figures["prompts"] == 2


def test_ssim_and_lpips_stand_beside_psnr_where_frames_are_large_enough(monkeypatch):
    video = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3)).astype(np.uint8)
    wanted = memorised.Wanted("clip", "noise", video, 8.0)
    monkeypatch.setattr(quality, "_distances", lambda net, a, b: np.full(len(a), net))
    same, other = memorised.compare(wanted, video, 0.25), memorised.compare(wanted, 255 - video)
    assert same["ssim"] == pytest.approx(1, abs=1e-5) and same["lpips"] == 0.25
    assert other["ssim"] < 0 and other["lpips"] is None
    figures = memorised.summary([same, other])
    assert figures["ssim_mean"] == pytest.approx((same["ssim"] + other["ssim"]) / 2) and figures["lpips_mean"] == 0.25
    small = memorised.Wanted("clip", "noise", video[:, :10, :10], 8.0)
    assert memorised.compare(small, small.video, 0.25)["ssim"] is None
    assert memorised.summary([memorised.compare(small, small.video)])["lpips_mean"] is None


def test_clips_are_cut_to_whole_tokens():
    class Source:
        sizes = ClipSizes(*(np.array([n] * 3) for n in (7, 20, 18, 8.0, 5)))

        def read(self, index, epoch):
            if index == 1:
                raise BadClip("truncated")
            video = np.broadcast_to(np.arange(20, dtype=np.uint8)[None, :, None, None], (7, 20, 18, 3))
            return Clip(video[:, :4] if index == 2 else video, "stripes", 8.0)

        def name(self, index):
            return "stripes.mp4"

    (clip,), unused = memorised.clips(Source(), Geometry((4, 8, 8), (1, 1, 1), 768), 5)
    assert (clip.name, clip.prompt, clip.video.shape) == ("stripes.mp4", "stripes", (5, 16, 16, 3))
    assert unused == {"truncated": 1, "smaller than one token": 1}
    assert clip.video[0, 0, 0, 0] == 2  # from the middle
