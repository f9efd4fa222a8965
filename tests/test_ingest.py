import csv
import json
import os
import shutil
import subprocess
import sys

import av
import numpy as np
import pytest
import tensorflow_datasets as tfds

from vidgen import ingest
from vidgen.config import ConfigError
from vidgen.data import captions
from vidgen.data.clip import BadClip
from vidgen.data.decode import VideoInfo, encode, encode_gif, encode_png
from vidgen.data.shards import ShardSource, read_index


def counting(frames, height=24, width=32):
    """Frame t is eight bars, black or white: t in binary."""
    bars = np.arange(width) * 8 // width
    lit = (np.arange(frames)[:, None] >> bars) & 1
    return np.broadcast_to((20 + 200 * lit).astype(np.uint8)[:, None, :, None], (frames, height, width, 3))


def counted(clip):
    """Which frames of `counting` a clip shows."""
    bars = np.arange(clip.video.shape[2]) * 8 // clip.video.shape[2]
    level = clip.video.mean((1, 3))
    return [sum(int(row[bars == bit].mean() > 120) << bit for bit in range(8)) for row in level]


def write(path, video, codec="libx264", rate=10):
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.height, stream.width, stream.pix_fmt = video.shape[1], video.shape[2], "yuv420p"
        for image in video:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")))
        container.mux(stream.encode(None))


@pytest.fixture
def folder(tmp_path):
    """Good files of every kind, and one of each fault."""
    root = tmp_path / "videos"
    (root / "sub").mkdir(parents=True)
    mp4 = encode(counting(10), 10)
    good = {
        "chinese": "一只猫在跑。",
        "arabic": "قطة تجري",
        "control": "a\x00 cat\x07\t\r\nruns\u200d ",
        "long": "x" * 10_000,
    }
    for name, caption in good.items():
        (root / f"{name}.mp4").write_bytes(mp4)
        (root / f"{name}.txt").write_text(caption, encoding="utf-8", newline="")
    (root / "odd.mp4").write_bytes(encode(counting(7, 23, 31), 10))
    (root / "odd.json").write_text(json.dumps({"Caption": "odd sizes"}), encoding="utf-8-sig")
    (root / "sub" / "anim.gif").write_bytes(encode_gif(counting(5), 10))
    (root / "sub" / "anim.json").write_text('"a fading gif"')
    (root / "still.png").write_bytes(encode_png(counting(3)[2]))
    (root / "still.txt").write_text("a still image")
    write(root / "web.webm", counting(8), "libvpx-vp9")
    write(root / "tape.mpg", counting(8), "mpeg2video", rate=25)
    write(root / "quick.MOV", counting(8), "mpeg4")
    for name in ("web", "tape", "quick"):
        (root / f"{name}.txt").write_text(name)
    bad = {"empty": b"", "cut": mp4[: len(mp4) * 2 // 3], "text": b"just words\n" * 99, "noise": bytes(range(256)) * 9}
    for name, data in bad.items():
        (root / f"{name}.mp4").write_bytes(data)
        (root / f"{name}.txt").write_text(name)
    for name, caption in (("blank", " \n\t"), ("latin", b"caf\xe9".decode("latin-1")), ("none", None), ("two", None)):
        (root / f"{name}.mp4").write_bytes(mp4)
        if caption:
            (root / f"{name}.txt").write_text(caption, encoding="latin-1")
    (root / "two.json").write_text('{"text": ["a", "b"]}')
    (root / "README.md").write_text("not a clip")
    return root


GOOD = 10
BAD = {
    "empty file": 1,
    "truncated": 1,
    "not a video": 2,
    "missing caption": 2,
    "caption is not UTF-8": 1,
    "several captions": 1,
}


def test_a_folder_of_everything(folder, tmp_path, capsys):
    out = tmp_path / "shards"
    result = ingest.run(str(folder), str(out))
    assert (result.accepted, result.clips, result.dropped) == (GOOD, GOOD, sum(BAD.values()))
    assert result.reasons == BAD and result.ignored == {".md": 1} and result.path == str(out)
    assert json.loads(json.dumps(vars(result))) == vars(result)
    lines = [json.loads(line) for line in (out / "dropped.jsonl").read_text().splitlines()]
    assert {d["file"]: d["reason"] for d in lines}["empty.mp4"] == "empty file"
    assert len(lines) == result.dropped and "no none.txt" in [d["detail"] for d in lines if d["file"] == "none.mp4"][0]
    rows = {row.source: row for row in read_index(out)}
    assert rows["chinese.mp4"].caption == "一只猫在跑。" and rows["arabic.mp4"].caption == "قطة تجري"
    assert rows["control.mp4"].caption == "a cat runs\u200d" and len(rows["long.mp4"].caption) == 10_000
    assert (rows["odd.mp4"].frames, rows["odd.mp4"].height, rows["odd.mp4"].width) == (7, 23, 31)
    assert rows["still.png"].frames == 1 and rows["sub/anim.gif"].caption == "a fading gif"
    assert [rows[f].fps for f in ("web.webm", "tape.mpg", "quick.MOV")] == [10, 25, 10]
    source = ShardSource(out)
    for i, row in enumerate(read_index(out)):
        clip = source.read(i, 0)
        assert clip.video.shape == (row.frames, row.height, row.width, 3)
        expected = [2] if row.source == "still.png" else list(range(row.frames))
        assert counted(clip) == expected, row
    data = tfds.builder_from_directory(str(out)).as_data_source("train")
    assert [d["caption"].decode() for d in data] == [r.caption for r in read_index(out)]
    printed = capsys.readouterr()
    assert "dropped cut.mp4: truncated" in printed.err and f"accepted {GOOD} files, dropped 8" in printed.out
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_the_same_input_gives_the_same_bytes(folder, tmp_path):
    for name, threads in (("a", 1), ("b", 3)):
        ingest.run(str(folder), str(tmp_path / name), frames=4, threads=threads)
    for path in (tmp_path / "a").iterdir():
        if path.name != "ingest.json" and "array_record" not in path.name:
            assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name
    a, b = (tfds.builder_from_directory(str(tmp_path / n)).as_data_source("train") for n in "ab")
    assert [r["video"] for r in a] == [r["video"] for r in b]


def table(path, rows):
    if path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        path.write_text("\n".join(json.dumps(r, ensure_ascii=False) for r in rows) + "\n", encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_tables(tmp_path, kind):
    (tmp_path / "v").mkdir()
    (tmp_path / "v" / "a.mp4").write_bytes(encode(counting(40), 10))
    rows = [
        {"File Name": "v/a.mp4", "Prompt": "first, with\u2028commas", "start": 1.0, "end": 2.5},
        {"File Name": "./v/a.mp4", "Prompt": "to the end", "start": "0:03.2", "end": ""},
        {"File Name": str(tmp_path / "v" / "a.mp4"), "Prompt": "一", "start": "", "end": "0.4"},
        {"File Name": "v/a.mp4", "Prompt": "twice", "start": 1.0, "end": 2.5},
        {"File Name": "v/b.mp4", "Prompt": "nothing there", "start": "", "end": ""},
        {"File Name": "https://x/y.mp4", "Prompt": "far away", "start": "", "end": ""},
        {"File Name": "v/a.mp4", "Prompt": "", "start": "", "end": ""},
        {"File Name": "v/a.mp4", "Prompt": "late", "start": 4.5, "end": ""},
        {"File Name": "v/a.mp4", "Prompt": "backwards", "start": 2, "end": 1},
        {"File Name": "v/a.mp4", "Prompt": "odd", "start": "soon", "end": ""},
        {"File Name": "", "Prompt": "no file", "start": "", "end": ""},
    ]
    result = ingest.run(table(tmp_path / f"t.{kind}", rows), str(tmp_path / "out"))
    assert (result.accepted, result.dropped) == (4, 7)
    assert result.reasons == {
        "empty time range": 2,
        "missing file": 1,
        "not a local file": 1,
        "missing caption": 1,
        "time is not a number": 1,
        "missing file name": 1,
    }
    source, index = ShardSource(tmp_path / "out"), read_index(tmp_path / "out")
    clips = [source.read(i, 0) for i in range(4)]
    assert [c.caption for c in clips] == ["first, with commas", "to the end", "一", "twice"]
    assert [counted(c) for c in clips] == [list(range(10, 25)), list(range(32, 40)), [0, 1, 2, 3], list(range(10, 25))]
    assert [r.start for r in index] == [1.0, 3.2, 0, 1.0] and len({r.id for r in index}) == 4
    assert index[0].source == index[1].source == "v/a.mp4"


def test_cutting(tmp_path):
    (tmp_path / "a.mp4").write_bytes(encode(counting(50), 10))
    (tmp_path / "a.txt").write_text("counting")
    for number, (options, starts, leftover) in enumerate(
        (
            ({"frames": 16}, [(0, 16), (16, 16), (32, 16)], 2),
            ({"frames": 15}, [(0, 15), (15, 15), (30, 15), (45, 5)], 0),
            ({"frames": 20, "stride": 10}, [(0, 20), (10, 20), (20, 20), (30, 20)], 0),
            ({"frames": 10, "stride": 25}, [(0, 10), (25, 10)], 30),
            ({"frames": 64}, [(0, 50)], 0),
        )
    ):
        out = tmp_path / f"out{number}"
        result = ingest.run(str(tmp_path), str(out), **options)
        source = ShardSource(out)
        assert [counted(source.read(i, 0)) for i in range(len(source))] == [list(range(s, s + n)) for s, n in starts]
        assert [r.start for r in read_index(out)] == [s / 10 for s, _ in starts]
        assert (result.clips, result.leftover) == (len(starts), leftover)


def test_cut_keeps_within_shots():
    assert ingest.cut([(0, 10), (10, 13), (13, 30)], 8, 8) == [(0, 8), (8, 2), (10, 3), (13, 8), (21, 8)]


def test_resampling(tmp_path):
    (tmp_path / "a.mp4").write_bytes(encode(counting(20), 20))
    (tmp_path / "a.txt").write_text("counting")
    for fps, expected in ((10, list(range(0, 20, 2))), (40, [t // 2 for t in range(40)]), (20, list(range(20)))):
        out = tmp_path / f"out{fps}"
        ingest.run(str(tmp_path), str(out), fps=fps)
        clip = ShardSource(out).read(0, 0)
        assert clip.fps == fps and counted(clip) == expected


def test_a_variable_rate_is_made_even():
    times = np.array([0, 0.1, 0.2, 0.7, 0.8])
    info = VideoInfo(5, 8, 8, 5.0, False, 1.0, None, times, 0.9)
    shown, fps = ingest.resample(info, 10)
    assert shown.tolist() == [0, 1, 2, 2, 2, 2, 2, 3, 4] and fps == 10
    assert ingest.resample(info, 10, 0.15, 0.75)[0].tolist() == [1, 2, 2, 2, 2, 3]
    with pytest.raises(BadClip, match="empty time range"):
        ingest.resample(info, 10, 0.9)


@pytest.mark.parametrize(
    "options,size",
    [
        ({}, (24, 32)),
        ({"size": 12}, (12, 16)),
        ({"height": 12}, (12, 16)),
        ({"width": 48}, (36, 48)),
        ({"height": 16, "width": 16}, (16, 16)),
        ({"height": 15, "width": 41}, (15, 41)),
    ],
)
def test_sizes(tmp_path, options, size):
    y, x = np.mgrid[:24, :32]
    (tmp_path / "a.mp4").write_bytes(encode(np.stack([np.stack([7 * x, 9 * y, 0 * x], -1)] * 3).astype(np.uint8), 8))
    (tmp_path / "a.txt").write_text("a gradient")
    ingest.run(str(tmp_path), str(tmp_path / "out"), **options)
    video = ShardSource(tmp_path / "out").read(0, 0).video
    assert video.shape == (3, *size, 3)
    # The middle of the picture stays in the middle: what is cropped, is cropped alike on both sides.
    middle = video[1].astype(float).mean((0, 1))
    assert abs(middle[0] - 7 * 15.5) < 6 and abs(middle[1] - 9 * 11.5) < 6


def test_square_pixels():
    info = VideoInfo(1, 144, 176, 30.0, True, 12 / 11, None, np.zeros(1), 1.0)
    settings = ingest.Settings(1, 1, 0, 0, 72, 0.0, 8, 16.0)
    assert ingest.fit(info, settings) == ((72, 96), (72, 96))


def test_a_second_run(folder, tmp_path, capsys):
    out = str(tmp_path / "out")
    first = ingest.run(str(folder), out)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()}
    assert ingest.run(str(folder), out) == first and "nothing to do" in capsys.readouterr().err
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()}
    with pytest.raises(ConfigError, match="holds another ingest"):
        ingest.run(str(folder), out, frames=5)
    (folder / "still.txt").write_text("another caption")
    with pytest.raises(ConfigError, match="holds another ingest"):
        ingest.run(str(folder), out)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match="is not empty"):
        ingest.run(str(folder), str(tmp_path / "mine"))
    assert os.listdir(tmp_path / "mine") == ["thesis.tex"]


def test_bad_settings_inputs_and_outputs(folder, tmp_path):
    (tmp_path / "nothing").mkdir()
    (tmp_path / "file").write_text("x")
    (tmp_path / "open.csv").write_text('video,caption\na.mp4,"never closed\n')
    (tmp_path / "empty.csv").write_text("video,caption\n")
    (tmp_path / "wrong.csv").write_text("movie,caption\na,b\n")
    (tmp_path / "mute.csv").write_text("video,sound\na,b\n")
    (tmp_path / "bad.jsonl").write_text('{"video": "a"}\n{oops\n')
    for path, options, message in (
        (folder, {"frames": 0}, "--frames=0"),
        (folder, {"fps": -1}, "--fps=-1"),
        (folder, {"crf": 60}, "--crf=60"),
        (folder, {"height": -2}, "--height=-2"),
        (folder, {"size": 8, "width": 8}, "not both"),
        (tmp_path / "video", {}, "no such file or directory; did you mean .*videos"),
        (tmp_path / "nothing", {}, "no videos in it"),
        (tmp_path / "file", {}, "expected a directory of videos, or a table"),
        (tmp_path / "open.csv", {}, "unexpected end of data"),
        (tmp_path / "empty.csv", {}, "no rows"),
        (tmp_path / "wrong.csv", {}, "no column of files among movie, caption"),
        (tmp_path / "mute.csv", {}, "no column of captions among video, sound"),
        (tmp_path / "bad.jsonl", {}, "line 2: not JSON"),
    ):
        with pytest.raises(ConfigError, match=message) as error:
            ingest.run(str(path), str(tmp_path / "out"), **options)
        assert "\n" not in str(error.value) and not (tmp_path / "out").exists()
    for out in (tmp_path / "file" / "out", "/proc/out"):
        with pytest.raises(ConfigError, match=f"--output {out}: cannot write there"):
            ingest.run(str(folder), str(out))
    with pytest.raises(ConfigError, match="is not empty"):
        ingest.run(str(folder), str(tmp_path / "file"))
    bad = tmp_path / "bad"
    bad.mkdir()
    shutil.copy(folder / "empty.mp4", bad)
    with pytest.raises(ConfigError, match="no clip came of 1 files: 1 missing caption"):
        ingest.run(str(bad), str(tmp_path / "out"))
    assert sorted(p.name for p in tmp_path.iterdir() if "out" in p.name) == []


def test_an_interrupted_ingest_leaves_nothing(folder, tmp_path, monkeypatch):
    """Ctrl-C, and a disk that fills up: no directory is left, and the next run starts afresh."""
    whole = ingest.ShardWriter.add
    calls = []

    def add(self, row, video):
        calls.append(row)
        if len(calls) == 3:
            raise KeyboardInterrupt
        whole(self, row, video)

    monkeypatch.setattr(ingest.ShardWriter, "add", add)
    with pytest.raises(KeyboardInterrupt):
        ingest.run(str(folder), str(tmp_path / "out"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["videos"]
    monkeypatch.undo()

    class Full:
        """What ArrayRecord does on a full disk: it writes in the background, and says so when it is closed."""

        def __init__(self, *_):
            self.write = lambda record: None

        def close(self):
            raise RuntimeError("write() failed: No space left on device; writing shard; at byte 307200")

    monkeypatch.setattr("array_record.python.array_record_module.ArrayRecordWriter", Full)
    with pytest.raises(ConfigError, match="no space left on the disk"):
        ingest.run(str(folder), str(tmp_path / "out"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["videos"]
    monkeypatch.undo()
    assert ingest.run(str(folder), str(tmp_path / "out")).accepted == GOOD


def test_columns_and_captions():
    assert captions.clean("  a\u0000\u0085b \ud800c\ufeff\n") == "a b c"
    assert captions.clean("نمی\u200cخواهم") == "نمی\u200cخواهم" and captions.clean("👩\u200d🚀") == "👩\u200d🚀"
    for nothing in ("", " \x00\t", "\u200b\u200d", "\ufeff"):
        with pytest.raises(BadClip, match="missing caption"):
            captions.clean(nothing)


def test_memory_is_bounded(tmp_path):
    """A minute of video takes no more memory than two seconds of it: frames are streamed."""
    peaks = []
    for frames in (60, 1500):
        root = tmp_path / str(frames)
        root.mkdir()
        write(root / "a.mp4", np.broadcast_to(counting(1, 240, 320), (frames, 240, 320, 3)), rate=25)
        (root / "a.txt").write_text("grey")
        code = (
            "import resource, sys; from vidgen import ingest; ingest.run(*sys.argv[1:], frames=2000);"
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
        )
        command = [sys.executable, "-c", code, str(root), str(root / "out")]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout.split()[-1]) / 1024)
    raw = 1500 * 240 * 320 * 3 / 2**20
    assert peaks[1] - peaks[0] < 0.2 * raw, peaks
