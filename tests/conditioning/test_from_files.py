"""Frames out of images and videos, at a sample's size."""

import numpy as np
import pytest

from vidgen.conditioning import from_files
from vidgen.config import ConfigError
from vidgen.data import decode


@pytest.fixture
def config(tiny):
    tiny.sample.update(frames=13, height=16, width=24, fps=8.0)
    tiny.control.masks = (("first", 0.3), ("first_last", 0.3), ("extend", 0.3))
    return tiny


@pytest.fixture
def picture(tmp_path):
    """32 x 40 pixels: left half red, right half blue, a row of green on top."""
    image = np.zeros((32, 40, 3), np.uint8)
    image[:, :20, 0] = image[:, 20:, 2] = 200
    image[:2] = (0, 200, 0)
    (tmp_path / "a.png").write_bytes(decode.encode_png(image))
    return str(tmp_path / "a.png")


def video_of(path, frames, fps=8.0, height=16, width=24):
    """Frame n is grey of 8·n."""
    video = (
        np.repeat(np.arange(frames, dtype=np.uint8)[:, None, None, None] * 8, height, 1).repeat(width, 2).repeat(3, 3)
    )
    path.write_bytes(decode.encode(video, fps))
    return str(path)


def test_a_picture_covers_the_sample_and_its_middle_is_taken(config, picture):
    found = from_files.read(config, first_frame=picture)
    assert found.kind == "first" and found.first.shape == (16, 24, 3) and found.first.dtype == np.uint8
    # 32 x 40 becomes 19 x 24, of which one row goes above: green is gone from all but the first row.
    assert found.first[3:, 1:10, 0].min() > 150 and found.first[3:, 14:, 2].min() > 150
    assert found.first[3:, :, 1].max() < 40


def test_a_picture_of_the_sample_s_size_is_taken_as_it_is(config, tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (16, 24, 3), np.uint8)
    (tmp_path / "b.png").write_bytes(decode.encode_png(image))
    np.testing.assert_array_equal(from_files.read(config, first_frame=str(tmp_path / "b.png")).first, image)


def test_a_video_gives_its_first_or_its_last_frame(config, tmp_path):
    path = video_of(tmp_path / "v.mp4", 20)
    found = from_files.read(config, first_frame=path, last_frame=path)
    assert found.kind == "first_last"
    assert abs(found.first.mean() - 0) < 3 and abs(found.last.mean() - 19 * 8) < 3


@pytest.mark.parametrize(
    ("frames", "fps", "levels", "told"),
    [
        (9, 8.0, [0, 1, 2, 3, 4, 5, 6, 7, 8], ""),
        (7, 8.0, [2, 3, 4, 5, 6], "starts with 5 frames, the end of 7"),
        (25, 16.0, [16, 18, 20, 22, 24], "its 16 a second read at 8"),
        (30, 8.0, [25, 26, 27, 28, 29], "starts with 5 frames, the end of 30"),
    ],
)
def test_the_end_of_a_clip_at_the_sample_s_rate(config, tmp_path, capsys, frames, fps, levels, told):
    found = from_files.read(config, extend=video_of(tmp_path / "v.mp4", frames, fps))
    assert found.kind == "extend"
    np.testing.assert_allclose(found.extend.mean((1, 2, 3)), 8 * np.array(levels), atol=3)
    said = capsys.readouterr().err
    assert told in said and bool(told) == bool(said)


def test_nothing_asked_for_is_nothing_given(config):
    assert from_files.read(config) is None


@pytest.mark.parametrize("control", [{"masks": (("first", 1.0),)}, {"masks": (), "channels": "wan"}])
def test_a_model_that_always_saw_frames_wants_one(config, control):
    config.control.update(control)
    with pytest.raises(ConfigError, match="always saw frames beside the caption: expected --first_frame"):
        from_files.read(config)


def test_bad_files_are_told_in_one_line(config, tmp_path, picture):
    (tmp_path / "text.png").write_text("hello")
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "tiny.png").write_bytes(decode.encode_png(np.zeros((2, 2, 3), np.uint8)))
    whole = video_of(tmp_path / "v.mp4", 20)
    with open(whole, "rb") as f:
        (tmp_path / "cut.mp4").write_bytes(f.read()[:-200])
    for arguments, says in [
        ({"first_frame": str(tmp_path / "b.png")}, "--first_frame=.*b.png: no such file; did you mean .*a.png"),
        ({"first_frame": str(tmp_path)}, "--first_frame=.*: a folder"),
        ({"first_frame": str(tmp_path / "text.png")}, "text.png: not a video; expected an image or a video"),
        ({"first_frame": str(tmp_path / "empty.png")}, "empty.png: empty file"),
        ({"first_frame": str(tmp_path / "tiny.png")}, "2x2 pixels are too few for a sample of 16x24; expected 4x6"),
        ({"extend": str(tmp_path / "cut.mp4")}, "--extend=.*cut.mp4: "),
        ({"last_frame": picture}, "--last_frame goes with --first_frame"),
        ({"extend": whole, "first_frame": picture}, "--extend gives the first frames"),
    ]:
        with pytest.raises(ConfigError, match=says) as e:
            from_files.read(config, **arguments)
        assert "\n" not in str(e.value)


def test_a_model_that_was_not_trained_with_it_is_told_before_the_file_is_read(config):
    config.control.masks = (("extend", 0.5),)
    with pytest.raises(ConfigError, match="--first_frame: this model was trained with extend only"):
        from_files.read(config, first_frame="nowhere.png")
