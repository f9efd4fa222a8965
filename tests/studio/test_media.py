"""Grids and files of clips."""

import os

import numpy as np
import pytest

from vidgen.config import ConfigError
from vidgen.data import decode
from vidgen.studio import media
from vidgen.training import incidents


def clip(value, frames=3, height=4, width=6):
    """Frame t has the value `value + t`."""
    video = np.empty((frames, height, width, 3), np.uint8)
    video[:] = value + np.arange(frames)[:, None, None, None]
    return video


def test_grid_places_clips_row_after_row():
    out = media.grid([clip(10), clip(100), clip(200)], columns=2, pad=1)
    assert out.shape == (3, 1 + 2 * 5, 1 + 2 * 7, 3) and out.dtype == np.uint8
    assert (out[:, 1:5, 1:7] == clip(10)).all()
    assert (out[:, 1:5, 8:14] == clip(100)).all()
    assert (out[:, 6:10, 1:7] == clip(200)).all()
    assert (out[:, 6:10, 8:14] == media.GROUND).all() and (out[:, 0] == media.GROUND).all()


def test_nested_rows_stay_rows():
    out = media.grid([[clip(10)], [clip(20), clip(30)]], pad=0)
    assert out.shape == (3, 8, 12, 3)
    assert (out[:, :4, 6:] == media.GROUND).all() and (out[:, 4:, 6:] == clip(30)).all()


def test_shorter_clips_hold_their_last_frame_and_smaller_ones_stand_in_the_middle():
    out = media.grid([clip(10, frames=5), clip(100, frames=2, height=2, width=4)], columns=2, pad=0)
    assert out.shape == (5, 4, 12, 3)
    assert out[:, 1:3, 7:11, 0].max(axis=(1, 2)).tolist() == [100, 101, 101, 101, 101]
    assert (out[:, 0, 6:] == media.GROUND).all() and (out[:, :, 6] == media.GROUND).all()


def test_scale_repeats_pixels():
    video = np.arange(2 * 2 * 2 * 3, dtype=np.uint8).reshape(2, 2, 2, 3)
    out = media.grid([video], pad=0, scale=3)
    assert out.shape == (2, 6, 6, 3)
    assert (out[:, ::3, ::3] == video).all() and (out[:, 2::3, 2::3] == video).all()


def test_grid_of_nothing_is_an_error():
    with pytest.raises(ValueError, match="at least one clip"):
        media.grid([])
    with pytest.raises(ValueError, match="at least one clip"):
        media.grid([[], []])


@pytest.mark.parametrize("name", ["deep/down/a.mp4", "a.GIF"])
def test_saved_video_reads_back(tmp_path, name):
    video = np.full((5, 16, 24, 3), 90, np.uint8)
    path = str(tmp_path / name)
    media.save_video(path, video, fps=8)
    back, fps = decode.decode(path)
    assert back.shape == video.shape and abs(fps - 8) < 0.5
    assert abs(back.astype(int) - 90).max() <= 6
    assert os.listdir(os.path.dirname(path)) == [os.path.basename(path)]


def test_one_frame_may_be_a_png(tmp_path):
    image = np.random.default_rng(0).integers(0, 255, (1, 7, 9, 3), np.uint8)
    media.save_video(str(tmp_path / "a.png"), image, fps=1)
    assert (decode.decode(str(tmp_path / "a.png"))[0] == image).all()
    with pytest.raises(ConfigError, match="a .png holds one frame and the clip has 3"):
        media.save_video(str(tmp_path / "b.png"), clip(0), fps=1)


@pytest.mark.parametrize("name", ["a.avi", "a", ".mp4"])
def test_unknown_suffix_is_refused_before_anything_is_written(tmp_path, name):
    with pytest.raises(ConfigError, match="unknown suffix .* expected .mp4 or .gif"):
        media.save_video(str(tmp_path / name), clip(0), fps=8)
    assert list(tmp_path.iterdir()) == []


def test_a_path_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cannot write .*file/a.gif: .*file is not a folder"):
        media.save_video(str(tmp_path / "file" / "a.gif"), clip(0), fps=8)
    (tmp_path / "folder.gif").mkdir()
    with pytest.raises(ConfigError, match=r"cannot write .*folder.gif: Is a directory"):
        media.save_video(str(tmp_path / "folder.gif"), clip(0), fps=8)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder.gif"]  # no half-written file left


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    media.write(str(tmp_path / "a.bin"), b"old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(media.os, "replace", full)
    with pytest.raises(ConfigError, match="No space left on device"):
        media.write(str(tmp_path / "a.bin"), b"new")
    assert (tmp_path / "a.bin").read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


def test_bytes_are_the_nearest_and_clipped():
    video = np.array([-2.0, -1.0, -1 + 0.6 / 127.5, 0.0, 1.0, 3.0], np.float32)
    assert media.to_u8(video).tolist() == [0, 0, 1, 128, 255, 255]
    every = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(media.to_u8(every / np.float32(127.5) - 1), every)


def test_a_picture_that_cannot_be_written_is_passed_over_and_recorded(tmp_path):
    said = []
    (tmp_path / "samples").write_text("in the way")
    with media.best_effort(str(tmp_path), 7, "the samples", said.append):
        media.save_video(str(tmp_path / "samples" / "00000007" / "grid.gif"), clip(0), fps=8)
        raise AssertionError("not reached")
    assert len(said) == 1 and said[0].startswith("step 7: the samples passed over: cannot write")
    (row,) = incidents.read(str(tmp_path))
    assert (row["step"], row["kind"], row["text"]) == (7, "disk", said[0])
    with pytest.raises(ConfigError, match="unknown suffix"), media.best_effort(str(tmp_path), 8, "it", said.append):
        media.save_video(str(tmp_path / "a.avi"), clip(0), fps=8)  # the user's mistake, not the disk's
    assert len(said) == 1
