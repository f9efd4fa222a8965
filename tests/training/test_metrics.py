"""metrics.jsonl, TensorBoard's files and the progress line."""

import io
import json
import math
import resource
import shutil
import struct
import sys
import types

import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from vidgen.config import ConfigError
from vidgen.training import incidents, metrics


def events(workdir) -> list[Event]:
    """All events of a workdir, oldest file first; a TFRecord is length, checksum, data, checksum."""
    found = []
    for path in sorted((workdir / "tensorboard").iterdir()):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (size,) = struct.unpack_from("<Q", data, at)
            found.append(Event.FromString(data[at + 12 : at + 12 + size]))
            at += size + 16
    return found


def test_flushed_rows_are_on_disk_and_finite_or_null(tmp_path):
    writer = metrics.MetricWriter(str(tmp_path / "new" / "run"))
    writer.scalars(1, {"loss": np.float32(0.5), "lr": 1e-3})
    writer.scalars(2, {"loss": float("nan"), "grad_norm": float("inf")})
    assert writer.flush() == 0
    lines = (tmp_path / "new" / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"step": 1, "loss": 0.5, "lr": 1e-3},
        {"step": 2, "loss": None, "grad_norm": None},
    ]
    assert writer.close() == 0


def test_resume_drops_what_is_measured_again(tmp_path):
    first = metrics.MetricWriter(str(tmp_path))
    for step in (1, 2, 3, 4):
        first.scalars(step, {"loss": step})
    first.close()
    with open(tmp_path / "metrics.jsonl", "a") as f:
        f.write('{"step": 5, "lo')  # killed in the middle of a line
    second = metrics.MetricWriter(str(tmp_path))
    second.resume(3)
    second.scalars(3, {"loss": 30})
    second.close()
    assert metrics.read(str(tmp_path)) == [
        {"step": 1, "loss": 1},
        {"step": 2, "loss": 2},
        {"step": 3, "loss": 30},
    ]
    starts = [e.step for e in events(tmp_path) if e.session_log.status == SessionLog.START]
    assert starts == [3]  # what TensorBoard forgets from
    assert [p.name for p in tmp_path.iterdir() if p.name.endswith(".tmp")] == []


def test_an_unfinished_line_does_not_swallow_the_next(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n{"step": 2')
    assert metrics.read(str(tmp_path)) == [{"step": 1, "loss": 1.0}]
    writer = metrics.MetricWriter(str(tmp_path))
    writer.scalars(2, {"loss": 2.0})
    writer.close()
    assert metrics.read(str(tmp_path)) == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 2.0}]


def test_a_run_that_rolls_back_drops_its_own_rows(tmp_path):
    writer = metrics.MetricWriter(str(tmp_path))
    writer.resume(1)
    for step in (1, 2, 3, 4, 3, 4):
        if step == 3:
            writer.resume(3)
        writer.scalars(step, {"loss": 10 * step})
    writer.close()
    assert [row["step"] for row in metrics.read(str(tmp_path))] == [1, 2, 3, 4]


@pytest.mark.parametrize("line", ["nonsense", "[1, 2]", '{"loss": 1.0}', "null", "\0" * 40])
def test_a_broken_line_costs_no_other_and_no_run_its_end(tmp_path, line):
    rows = [json.dumps({"step": n, "loss": n / 2}) for n in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("\n".join([rows[0], line, *rows[1:]]) + "\n")
    assert [row["step"] for row in metrics.read(str(tmp_path))] == [1, 2, 3]
    said = []
    writer = metrics.MetricWriter(str(tmp_path), say=said.append)
    writer.resume(3)
    writer.scalars(3, {"loss": 9.0})
    writer.close()
    assert [(row["step"], row["loss"]) for row in metrics.read(str(tmp_path))] == [(1, 0.5), (2, 1.0), (3, 9.0)]
    assert [text for text in said if "1 of its lines are no rows, and are passed over" in text]


def test_tensorboard_gets_scalars_and_animated_gifs(tmp_path):
    video = np.random.default_rng(0).integers(0, 255, (5, 12, 16, 3), np.uint8)
    writer = metrics.MetricWriter(str(tmp_path))
    writer.scalars(7, {"loss": 0.25})
    writer.videos(7, {"samples/a red circle": video}, fps=8)
    writer.close()
    head, scalar, image = events(tmp_path)
    assert head.file_version == "brain.Event:2"
    assert (scalar.step, scalar.summary.value[0].tag, scalar.summary.value[0].simple_value) == (7, "loss", 0.25)
    shown = image.summary.value[0]
    assert (image.step, shown.tag, shown.image.height, shown.image.width) == (7, "samples/a red circle", 12, 16)
    gif = shown.image.encoded_image_string
    assert gif[:6] == b"GIF89a" and gif.count(b"\x21\xf9\x04") == 5  # a graphic control block a frame


def test_two_writers_in_one_second_keep_both_event_files(tmp_path):
    for step in (1, 2):
        writer = metrics.MetricWriter(str(tmp_path))
        writer.scalars(step, {"loss": 1.0})
        writer.close()
    assert [e.step for e in events(tmp_path) if e.summary.value] == [1, 2]


def test_unwritable_workdir_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot write to .*file/run: Not a directory"):
        metrics.MetricWriter(str(tmp_path / "file" / "run"))


def test_a_full_disk_ends_nothing_and_costs_no_row(tmp_path):
    said = []
    writer = metrics.MetricWriter(str(tmp_path), say=said.append)
    writer.scalars(1, {"loss": 1.0})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, limits[1]))  # of each file
    try:
        for step in range(2, 20):
            writer.scalars(step, {"loss": float(step)})
        assert 0 < writer.flush() < 18
        assert metrics.read(str(tmp_path))[0] == {"step": 1, "loss": 1.0}
        writer.resume(11)
        writer.scalars(11, {"loss": 11.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert writer.close() == 0
    assert [row["step"] for row in metrics.read(str(tmp_path))] == list(range(1, 12))
    assert [e.step for e in events(tmp_path) if e.summary.value] == [*range(1, 20), 11]  # whole, and in order
    texts = [text for text in said if "metrics.jsonl" in text]
    assert len(texts) == 2 and "File too large" in texts[0] and "can be written again" in texts[1]
    assert {row["text"] for row in incidents.read(str(tmp_path))} == set(said)


def test_rows_that_stay_lost_are_counted(tmp_path, capsys):
    writer = metrics.MetricWriter(str(tmp_path / "run"))
    shutil.rmtree(tmp_path / "run")
    writer.scalars(1, {"loss": 1.0})
    writer.scalars(2, {"loss": 1.0})
    writer.resume(2)
    assert writer.close() == 1
    err = capsys.readouterr().err
    assert "metrics.jsonl: No such file or directory; its rows are kept" in err or "cannot write" in err
    assert "1 rows are lost" in err


def test_wandb_missing_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"config.train.wandb='p' .*pip install 'vidgen\[wandb\]'"):
        metrics.MetricWriter(str(tmp_path), wandb_project="p")


def test_a_resumed_workdir_is_one_wandb_run(tmp_path, monkeypatch):
    runs, logged = [], []
    fake = types.ModuleType("wandb")
    fake.init = lambda **kw: (
        runs.append(kw) or types.SimpleNamespace(log=lambda v, step: logged.append((step, v)), finish=lambda: None)
    )
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for step in (1, 2):
        writer = metrics.MetricWriter(str(tmp_path), wandb_project="p", config_json='{"seed": 3}')
        writer.scalars(step, {"loss": 1.0})
        writer.close()
    assert runs[0]["id"] == runs[1]["id"] and runs[0]["resume"] == "allow" and runs[0]["config"] == {"seed": 3}
    assert logged == [(1, {"loss": 1.0}), (2, {"loss": 1.0})]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def ticking(*seconds):
    return iter(seconds).__next__


VALUES = {"loss": 0.12344, "tokens_per_second": 12_300.0, "mfu": 0.31, "data_wait_fraction": 0.001, "goodput": 0.97}


def test_progress_in_a_log_is_a_line_an_update():
    out = io.StringIO()
    progress = metrics.Progress(1000, stream=out, clock=ticking(100.0, 120.0))
    progress.update(20, {"loss": 1.0})
    progress.update(120, VALUES)  # 100 steps in 20 s, 880 to go
    progress.close()
    assert out.getvalue().splitlines() == [
        "step 20/1000 2% | loss 1.0000 | eta –",
        "step 120/1000 12% | loss 0.1234 | 12.3k tok/s | mfu 31% | data wait 0.1% | goodput 97% | eta 2m56s",
    ]


def test_progress_on_a_terminal_is_one_line(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    out = Terminal()
    progress = metrics.Progress(1000, stream=out, clock=ticking(0.0, 1.0))
    progress.update(10, VALUES)
    progress.say("checkpoint saved")
    progress.update(20, VALUES)
    progress.close()
    first, second, _ = out.getvalue().split("\n")
    assert first.endswith("\r\x1b[2Kcheckpoint saved") and second.startswith("\r\x1b[2Kstep 20/1000 2%")
    lines = [part.removeprefix("\x1b[2K").rstrip("\n") for part in out.getvalue().split("\r")]
    assert max(map(len, lines)) == 39


def test_progress_tolerates_what_is_not_finite():
    out = io.StringIO()
    metrics.Progress(10, stream=out).update(1, {"loss": math.nan, "mfu": None})
    assert out.getvalue() == "step 1/10 10% | loss nan | eta –\n"


@pytest.mark.parametrize(
    "seconds, text", [(0, "0s"), (59.4, "59s"), (200, "3m20s"), (7500, "2h05m"), (273_600, "3d04h")]
)
def test_duration(seconds, text):
    assert metrics.duration(seconds) == text


@pytest.mark.parametrize(
    "value, text", [(0.5, "0.5"), (999, "999"), (12_300, "12.3k"), (4.56e9, "4.56G"), (3e17, "300P")]
)
def test_si(value, text):
    assert metrics.si(value) == text
