"""The report's part on time and incidents."""

import json
import pathlib
import re
import xml.etree.ElementTree as ET

import pytest

from vidgen import config
from vidgen.studio import goodput as shown
from vidgen.studio import report
from vidgen.training import goodput, incidents
from vidgen.training.goodput import KINDS, Attempt


def attempt(start, **seconds):
    whole = dict.fromkeys(KINDS, 0.0) | {kind.replace("_", " "): s for kind, s in seconds.items()}
    return Attempt(start, start + sum(seconds.values()), whole)


def ledger(workdir, *attempts):
    """A file in which each of (start, resumed at, seconds by kind, last step) was killed."""
    with open(workdir / goodput.FILE, "w") as f:
        for start, at, seconds, last in attempts:
            for row in (
                {"time": start, "start": start, "seconds": {}},
                {"time": start, "resumed": at, "seconds": {}},
                {"time": start + sum(seconds.values()), "step": last, "seconds": seconds},
            ):
                f.write(json.dumps(row) + "\n")


def test_bars_are_as_long_as_the_time_they_stand_for():
    svg = shown.bars([attempt(0, init=10, step=80, lost=10), attempt(200, down=100, init=20, step=80)])
    found = ET.fromstring(svg)
    rects = [(r.get("class"), float(r.get("y")), float(r.get("x")), float(r.get("width"))) for r in found.iter("rect")]
    rows = sorted({y for _, y, _, _ in rects})
    assert len(rows) == 3  # the run, and its attempts
    lengths = [sum(width for _, y, _, width in rects if y == row) for row in rows]
    assert lengths[0] == pytest.approx(lengths[2], abs=0.1) and lengths[1] == pytest.approx(lengths[2] / 2, abs=0.1)
    down, init, step = ([r for r in rects if r[1] == rows[2] and r[0] == f"k{KINDS.index(k)}"][0]
                        for k in ("down", "init", "step"))  # fmt: skip
    assert down[2] < init[2] < step[2] and step[3] == pytest.approx(4 * init[3], abs=0.1)
    assert down[2] + down[3] == pytest.approx(init[2], abs=0.02)
    texts = [t.text for t in found.iter("title")]
    assert "attempt 2, down: 1m40s, 50.0\xa0%" in texts and "the run, step: 2m40s, 53.3\xa0%" in texts
    assert found.get("aria-label") == "init 30s; step 2m40s; lost 10s; down 1m40s"


def test_of_many_attempts_the_last_are_drawn():
    svg = shown.bars([attempt(100 * n, step=50) for n in range(100)])
    labels = re.findall(r">(attempt \d+)<", svg)
    assert labels == [f"attempt {n}" for n in range(100 - shown.ATTEMPTS_SHOWN + 1, 101)]


def test_the_report_tells_of_time_and_incidents(tmp_path):
    (tmp_path / "config.json").write_text(config.to_json(config.base()))
    ledger(tmp_path, (1000.0, 0, {"init": 20.0, "step": 80.0}, 8), (1150.0, 6, {"init": 10.0, "step": 40.0}, 10))
    incidents.record(str(tmp_path), 8, "restart", "process 1 was killed <b>twice</b>")
    incidents.record(str(tmp_path), 9, "skipped step", "the loss was nan")
    text = pathlib.Path(report.run(str(tmp_path))).read_text(encoding="utf-8")
    # 60 of 80 seconds and 40 of 40 count, in 200.
    for expected in (
        "Where the time went",
        "Goodput <b>50.0\xa0%</b>",
        "3m20s since the run first began, over 2 attempts",
        "<dt>goodput</dt><dd>50\xa0%</dd>",
        "steps that had to be taken again</td><td>20s</td><td>10.0\xa0%",
        "2 incidents",
        "restart 1, skipped step 1",
        "process 1 was killed &lt;b&gt;twice&lt;/b&gt;",
    ):
        assert expected in text, expected
    assert 'class="k3"' not in text  # no data was waited for


def test_what_was_not_recorded_is_said(tmp_path):
    text = shown.section(str(tmp_path))
    assert "No goodput.jsonl: not recorded." in text and "No incidents were recorded." in text
    assert shown.share(str(tmp_path)) is None
    incidents.record(str(tmp_path), 1, "disk", "full")
    with open(tmp_path / incidents.FILE, "a") as f:
        f.write('{"time": 1e300, "step": 2, "kind": "odd", "text": "x"}\n')
    text = shown.section(str(tmp_path))
    assert "2 incidents" in text and ">–</td>" in text
