"""incidents.jsonl."""

import json
import os

from vidgen.training import incidents


def test_rows_are_kept_in_order_with_what_else_there_is_to_know(tmp_path):
    incidents.record(str(tmp_path), 3, "skipped step", "the loss was nan", clips=[1, 2])
    incidents.record(str(tmp_path), 4, "rollback", "“ü”\nand a second line \ud800")
    one, two = incidents.read(str(tmp_path))
    assert (one["step"], one["kind"], one["text"], one["clips"]) == (3, "skipped step", "the loss was nan", [1, 2])
    assert two["text"].startswith("“ü”\nand a second line") and two["time"] >= one["time"] > 1e9


def test_what_a_kill_leaves_of_a_row_costs_no_other(tmp_path):
    incidents.record(str(tmp_path), 1, "restart", "a")
    with open(tmp_path / incidents.FILE, "a") as f:
        f.write('{"time": 1.0, "step": 2, "ki')
    incidents.record(str(tmp_path), 3, "restart", "b")
    with open(tmp_path / incidents.FILE, "a") as f:
        f.write('[]\n{"time": "x", "step": 1}\n{"time": 1, "step": 1}\nnull\n')
    assert [row["text"] for row in incidents.read(str(tmp_path))] == ["a", "b"]
    assert incidents.read(str(tmp_path / "nowhere")) == []


def test_a_disk_that_refuses_is_said_once_and_gets_the_rows_later(tmp_path, capsys):
    workdir = tmp_path / "run"
    for step in (1, 2):
        incidents.record(str(workdir), step, "disk", "full")
    assert capsys.readouterr().err.count("No such file or directory; its rows are kept in memory") == 1
    os.mkdir(workdir)
    incidents.record(str(workdir), 3, "disk", "well again")
    assert [row["step"] for row in incidents.read(str(workdir))] == [1, 2, 3]
    lines = (workdir / incidents.FILE).read_text().splitlines()
    assert len(lines) == 3 and all(json.loads(line) for line in lines)
