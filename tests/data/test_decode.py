import io

import av
import numpy as np
import pytest

from vidgen.data import decode as d
from vidgen.data.clip import BadClip


def moving(frames=12, height=40, width=56):
    """A red block that moves over a gradient: no two frames are alike."""
    y, x = np.mgrid[:height, :width]
    video = np.stack([np.stack([y * 3, x * 2, 0 * x + 60], -1)] * frames).astype(np.uint8)
    for t in range(frames):
        video[t, 4 : min(20, height), 2 * t : 2 * t + 10] = (220, 20, 20)
    return video


def write(video, form, codec, pix_fmt, times=None, rotate=0, rate=10, options=None):
    file = io.BytesIO()
    with av.open(file, "w", format=form) as container:
        stream = container.add_stream(codec, rate=rate, options=options or {})
        stream.height, stream.width, stream.pix_fmt = video.shape[1], video.shape[2], pix_fmt
        if times is not None:
            stream.codec_context.time_base = d.Fraction(1, 1000)
        if rotate:
            stream.set_display_rotation(rotate)
        for i, image in enumerate(video):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = round(1000 * times[i]), d.Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return file.getvalue()


def error(a, b):
    return np.abs(a.astype(int) - b).mean()


@pytest.mark.parametrize("size", [(5, 32, 48), (9, 33, 47), (1, 17, 16), (4, 2, 2), (3, 1, 1)])
@pytest.mark.parametrize("full_chroma", [False, True])
def test_every_size_round_trips(size, full_chroma):
    video = moving(*size)
    data = d.encode(video, 12.5, full_chroma=full_chroma)
    back, fps = d.decode(data)
    assert back.shape == video.shape and back.dtype == np.uint8 and fps == 12.5
    info = d.probe(data)
    assert (info.frames, info.height, info.width, info.fps, info.constant) == (*size, 12.5, True)
    assert error(back, video) < (8 if min(size[1:]) > 2 else 40)


def test_the_same_frames_give_the_same_bytes():
    noise = np.random.default_rng(0).integers(0, 30, (9, 64, 96, 3), np.uint8)
    video = moving(9, 64, 96) + noise
    files = set()
    for i in range(12):
        np.random.default_rng(i).integers(0, 255, 1 << 20, np.uint8)  # another state of the heap each time
        files.add(d.encode(video, 12.5, full_chroma=True))
    assert len(files) == 1


def test_full_chroma_keeps_the_colour_of_small_things():
    video = moving(8, 32, 32)
    full, half = (error(d.decode(d.encode(video, 8, full_chroma=c))[0], video) for c in (True, False))
    assert full < 2 and full < 0.8 * half


def test_frames_by_seek_are_bit_exact():
    data = d.encode(moving(30), 25, gop=7)
    whole, _ = d.decode(data)
    for start, count in ((0, 30), (1, 3), (6, 2), (7, 1), (13, 9), (29, 1)):
        part, fps = d.decode(data, start, count)
        assert np.array_equal(part, whole[start : start + count]) and fps == 25
    assert np.array_equal(d.decode(data, 20)[0], whole[20:])
    for start, count in ((0, 31), (29, 2), (30, 1), (-1, 1)):
        with pytest.raises(BadClip, match="too short"):
            d.decode(data, start, count)


@pytest.mark.parametrize("form", ["mp4", "matroska"])
def test_seek_into_open_gops(form):
    """Frames that follow a key frame in the file and precede it in time can't be decoded from it."""
    options = {"x264-params": "open-gop=1:keyint=8:min-keyint=8:bframes=3:b-adapt=0:scenecut=0:log-level=error"}
    data = write(moving(40), form, "libx264", "yuv420p", options=options)
    whole, _ = d.decode(data)
    for start in range(1, 40, 3):
        assert np.array_equal(d.decode(data, start, 1)[0], whole[start : start + 1]), start


@pytest.mark.parametrize(
    "form,codec,pix_fmt",
    [
        ("mov", "mpeg4", "yuv420p"),
        ("webm", "libvpx-vp9", "yuv420p"),
        ("mpeg", "mpeg2video", "yuv420p"),
        ("mpegts", "mpeg2video", "yuv420p"),
        ("avi", "mpeg4", "yuv420p"),
        ("matroska", "libx264", "yuv420p"),
    ],
)
def test_containers(tmp_path, form, codec, pix_fmt):
    video = moving(25, 48, 64)
    path = tmp_path / "file"
    path.write_bytes(write(video, form, codec, pix_fmt, rate=25))
    info = d.probe(path)
    assert (info.frames, info.height, info.width, info.constant) == (25, 48, 64, True)
    assert info.fps == pytest.approx(25, rel=0.001)
    whole, fps = d.decode(str(path))
    assert error(whole, video) < 12 and fps == pytest.approx(25, rel=0.001)
    assert np.array_equal(d.decode(path, 13, 5)[0], whole[13:18])


def test_gif_and_png():
    video = moving(6)
    data = d.encode_gif(video, 10)
    assert data[:6] == b"GIF89a" and b"NETSCAPE2.0" in data
    info = d.probe(data)
    assert (info.frames, info.fps) == (6, 10)
    assert error(d.decode(data)[0], video) < 6
    image = d.encode_png(video[3])
    assert np.array_equal(d.decode(image)[0], video[3:4])
    assert d.probe(image).frames == 1
    assert d.decode(d.encode_gif(video[:1], 8))[0].shape == (1, 40, 56, 3)


def test_rotation_is_applied():
    video = moving(3, 40, 56)
    data = write(video, "mp4", "libx264", "yuv420p", rotate=90)
    info = d.probe(data)
    assert (info.height, info.width) == (56, 40)
    shown = d.decode(data)[0]
    assert shown.shape == (3, 56, 40, 3)
    assert error(shown, np.rot90(video, 1, (1, 2))) < 8 < 20 < error(shown, np.rot90(video, -1, (1, 2)))
    scaled = [d.to_rgb(f, 28, 20) for f in d.stream_frames(data, info, 0, 3)]
    assert scaled[0].shape == (28, 20, 3)


def test_variable_rate_has_its_times():
    times = [0, 0.1, 0.2, 0.9, 1.0, 1.1]
    info = d.probe(write(moving(6), "matroska", "libx264", "yuv420p", times))
    assert not info.constant
    np.testing.assert_allclose(info.times, times, atol=0.002)
    assert info.fps == pytest.approx(5 / 1.1, rel=0.01)


@pytest.mark.parametrize(
    "form,codec", [("mp4", "libx264"), ("mov", "mpeg4"), ("webm", "libvpx-vp9"), ("avi", "mpeg4"), ("gif", "gif")]
)
def test_truncated(form, codec):
    data = write(moving(50), form, codec, "yuv420p") if form != "gif" else d.encode_gif(moving(20), 10)
    d.probe(data)
    for share in (0.1, 0.3, 0.7, 0.97):
        with pytest.raises(BadClip, match="^truncated$"):
            d.probe(data[: int(len(data) * share)])


def test_truncated_behind_its_index(tmp_path):
    """An MP4 with its index in front opens, and lacks frames."""
    path = tmp_path / "clip.mp4"
    with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=10)
        stream.height, stream.width, stream.pix_fmt = 40, 56, "yuv420p"
        for image in moving(40):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))
    data = path.read_bytes()
    assert data.index(b"moov") < data.index(b"mdat") and d.probe(path).frames == 40
    for read in (d.probe, d.decode):
        with pytest.raises(BadClip, match="^truncated$"):
            read(data[: len(data) * 2 // 3])


@pytest.mark.parametrize(
    "data,reason",
    [
        (b"", "empty file"),
        (b"This is a text file.\n" * 50, "not a video"),
        (b"#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1/x.ts\n", "not a video"),
        (b"ffconcat version 1.0\nfile 'x.mp4'\n", "not a video"),
        (bytes(range(256)) * 40, "not a video"),
        (b"\0" * 5000, "not a video"),
        (d.encode_png(moving(1)[0])[:150], "truncated"),
    ],
)
def test_bad_bytes(tmp_path, data, reason):
    path = tmp_path / "clip.mp4"
    path.write_bytes(data)
    for source in (data, path):
        with pytest.raises(BadClip, match=f"^{reason}$"):
            d.probe(source)
        with pytest.raises(BadClip, match=f"^{reason}$"):
            d.decode(source)


def test_overwritten_bytes_are_noticed():
    data = bytearray(d.encode(np.random.default_rng(0).integers(0, 256, (8, 48, 64, 3), np.uint8), 8))
    middle = len(data) // 2
    data[middle : middle + len(data) // 4] = bytes(len(data) // 4)
    with pytest.raises(BadClip, match="^damaged$"):
        d.decode(bytes(data))


def test_missing_file_and_sound_alone(tmp_path):
    with pytest.raises(BadClip, match="^missing file$"):
        d.probe(tmp_path / "none.mp4")
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=44100, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 44100
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with pytest.raises(BadClip, match="^no frames$"):
        d.probe(file.getvalue())


def test_encode_refuses_what_is_no_video():
    for wrong in (moving().astype(np.float32), moving()[0], moving()[:0], moving()[..., :1]):
        with pytest.raises(ValueError, match="expected video"):
            d.encode(wrong, 8)
    with pytest.raises(ValueError, match="fps"):
        d.encode(moving(), 0)
