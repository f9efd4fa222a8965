import json

import numpy as np
import pytest

from vidgen import ingest, inspect
from vidgen.config import ConfigError
from vidgen.data.decode import decode, encode


def flat(colour, frames=4, height=16, width=24):
    return np.full((frames, height, width, 3), colour, np.uint8)


@pytest.fixture
def shards(tmp_path):
    root = tmp_path / "videos"
    root.mkdir()
    clips = {
        "red": (flat((200, 30, 30)), "红色的画面"),
        "green": (flat((30, 200, 30), frames=8, width=16), "شاشة <b>خضراء</b>"),
        "blue": (flat((30, 30, 200), height=15, width=27), "a blue screen"),
    }
    for name, (video, caption) in clips.items():
        (root / f"{name}.mp4").write_bytes(encode(video, 8))
        (root / f"{name}.txt").write_text(caption, encoding="utf-8")
    (root / "mute.mp4").write_bytes(encode(flat((0, 0, 0)), 8))
    (root / "text.mp4").write_text("not a video at all")
    (root / "text.txt").write_text("words")
    ingest.run(str(root), str(tmp_path / "shards"))
    return tmp_path / "shards"


def test_report_of_shards(shards, capsys):
    report = inspect.run(str(shards))
    assert json.loads(json.dumps(report)) == report
    assert (report["clips"], report["accepted"], report["dropped"]) == (3, 3, 2)
    assert report["reasons"] == {"missing caption": 1, "not a video": 1}
    assert report["frames"] == 16 and report["hours"] == pytest.approx(2 / 3600)
    assert report["sizes"] == {"15x27": 1, "16x16": 1, "16x24": 1}
    assert report["lengths"] == {"4 frames": 2, "8 frames": 1}
    assert report["aspects"] == {"about 16:9": 1, "about 1:1": 1, "about 3:2": 1}
    assert report["scripts"] == {"Latin": 1, "Arabic": 1, "CJK": 1} and report["unreadable"] == {}
    assert {d["file"] for d in report["dropped_files"]} == {"mute.mp4", "text.mp4"}
    printed = capsys.readouterr().out
    for words in ("3 clips", "红色的画面", "accepted 3, dropped 2", "text.mp4: not a video", "contact_sheet.png"):
        assert words in printed


def test_contact_sheet(shards, tmp_path):
    inspect.run(str(shards), str(tmp_path / "look"))
    sheet = decode(tmp_path / "look" / "contact_sheet.png")[0][0].reshape(-1, 3).astype(int)
    for colour in ((200, 30, 30), (30, 200, 30), (30, 30, 200)):
        assert (np.abs(sheet - colour).max(-1) < 25).sum() > 3 * 100 * 100
    page = (tmp_path / "look" / "contact_sheet.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == 9 and "http" not in page
    assert "红色的画面" in page and "&lt;b&gt;خضراء" in page and "<b>" not in page
    assert not (shards / "contact_sheet.png").exists()


def test_a_damaged_clip_is_told(shards):
    lines = (shards / "index.jsonl").read_text(encoding="utf-8").split("\n")
    lines[1] = json.dumps(json.loads(lines[1]) | {"checksum": "0" * 64})
    (shards / "index.jsonl").write_text("\n".join(lines), encoding="utf-8")
    report = inspect.run(str(shards))
    assert report["unreadable"] == {"checksum differs": 1}
    assert "checksum differs" in (shards / "contact_sheet.html").read_text(encoding="utf-8")


def test_moving_shapes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    report = inspect.run("moving_shapes")
    assert report["clips"] == report["accepted"] == 1_000_000 and report["dropped"] == 0 and report["reasons"] == {}
    assert report["scripts"] == {"Latin": 24} and (tmp_path / "contact_sheet.html").exists()


def test_errors(shards, tmp_path):
    with pytest.raises(ConfigError, match="expected moving_shapes, a directory of shards"):
        inspect.run(str(tmp_path / "none"))
    with pytest.raises(ConfigError, match="no shards there"):
        inspect.run(str(tmp_path))
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot write the contact sheet"):
        inspect.run(str(shards), str(tmp_path / "file" / "look"))


def test_scripts():
    words = {
        "a cat": "Latin",
        "кошка": "Cyrillic",
        "猫": "CJK",
        "ねこ": "Hiragana",
        "बिल्ली": "Devanagari",
        "12 34!": "none",
    }
    assert {text: inspect.script(text) for text in words} == words


def test_histograms():
    widths, heights = np.array([1920, 1080, 640, 640, 100, 1]), np.array([1080, 1920, 480, 470, 100, 99])
    found = inspect._histogram("{}:{}", *inspect._aspects(widths, heights))
    assert found == {"4:3": 2, "16:9": 1, "9:16": 1, "1:1": 1, "1:3": 1}
    many = inspect._histogram("{}", np.arange(20).repeat(2))
    assert list(many.values()) == [2] * 7 + [26] and many["others"] == 26


def test_shrinking_averages():
    board = ((np.indices((320, 320)).sum(0) % 2) * 200).astype(np.uint8)[..., None].repeat(3, -1)
    assert inspect._shrink(board).shape == (160, 160, 3) and np.ptp(inspect._shrink(board)) <= 1
    assert inspect._shrink(flat((9, 8, 7), 1, 7, 20)[0]).shape == (56, 160, 3)
