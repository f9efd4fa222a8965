"""Tables of runs: what is read, what is refused in which words, and that nothing is left out in silence."""

import csv

import pytest

from vidgen.config import ConfigError
from vidgen.scaling import table

HEAD = ["name", "parameters", "tokens", "flops", "loss"]
ROW = ["a", "100", "2000", "1.5e6", "0.5"]


def write(tmp_path, *rows, name="runs.csv"):
    path = tmp_path / name
    with open(path, "w", newline="") as f:
        csv.writer(f).writerows(rows)
    return str(path)


def test_runs_with_all_that_is_known_of_them(tmp_path):
    head = [
        *HEAD,
        "status",
        "error",
        "budget",
        "optimizer.lr",
        "batch",
        "model.width",
        "moving_shapes.all_right",
        "note",
    ]
    path = write(tmp_path, head, [*ROW, "done", "", "2e6", "0.01", "64", "32", "0.25", "x"])
    (run,) = table.read(path).runs
    assert (run.name, run.parameters, run.tokens, run.flops, run.loss) == ("a", 100, 2000, 1.5e6, 0.5)
    assert (run.budget, run.learning_rate, run.batch, run.width) == (2e6, 0.01, 64, 32)
    assert run.figures["moving_shapes.all_right"] == 0.25 and "note" not in run.figures


def test_parquet_says_the_same_as_csv(tmp_path):
    import pyarrow
    from pyarrow import parquet

    rows = [{"name": "a", "parameters": 100, "tokens": 2000, "flops": 1.5e6, "loss": 0.5, "status": "done"},
            dict.fromkeys(HEAD) | {"name": "b", "status": "failed"}]  # fmt: skip
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "runs.parquet")
    path = write(tmp_path, [*HEAD, "status"], [*ROW, "done"], ["b", "", "", "", "", "failed"])
    assert table.read(str(tmp_path / "runs.parquet")) == table.read(path)


def test_another_loss_is_the_mean_of_its_columns(tmp_path):
    head = [*HEAD, "loss/level_0", "loss/level_1"]
    path = write(tmp_path, head, [*ROW, "0.25", "0.75"], ["b", *ROW[1:], "0.25", ""])
    levels = ("loss/level_0", "loss/level_1")
    found = table.read(path, levels)
    assert [(r.name, r.loss) for r in found.runs] == [("a", 0.5)] and found.excluded[0].reason == "no loss"
    assert table.read(path, levels[:1]).runs[1].loss == 0.25
    with pytest.raises(ConfigError, match=r"no column 'loss/level_2'; is it 'loss/level_"):
        table.read(path, ("loss/level_2",))
    with pytest.raises(ConfigError, match="row 1, column loss/level_0: 'low': expected a number"):
        table.read(write(tmp_path, head, [*ROW, "low", "1"], name="text.csv"), levels)
    without = [column for column in head if column != "loss"]
    assert table.read(write(tmp_path, without, [*ROW[:4], "1", "3"], name="bare.csv"), levels).runs[0].loss == 2


def test_names_are_made_up_where_there_are_none(tmp_path):
    found = table.read(write(tmp_path, HEAD[1:], ROW[1:], ["200", *ROW[2:]]))
    assert [r.name for r in found.runs] == ["row 1", "row 2"]


def test_runs_that_cannot_be_fitted_are_told_with_their_reason(tmp_path):
    rows = [["nan", *ROW[1:4], "nan", "", ""], ["inf", *ROW[1:4], "inf", "done", ""], ["none", *ROW[1:4], "", "", ""],
            ["late", "", "", "", "", "pending", ""], ["oom", "", "", "", "", "failed", "out of\nmemory"]]  # fmt: skip
    found = table.read(write(tmp_path, [*HEAD, "status", "error"], [*ROW, "done", ""], *rows))
    assert [r.name for r in found.runs] == ["a"] and all(e.lost for e in found.excluded)
    assert {e.name: e.reason for e in found.excluded} == {
        "nan": "loss is nan", "inf": "loss is inf", "none": "no loss", "late": "pending",
        "oom": "failed: out of memory",
    }  # fmt: skip


def test_runs_to_be_made_are_no_losses(tmp_path):
    head = [*HEAD, "status"]
    found = table.read(write(tmp_path, head, [*ROW, "done"], ["next", "400", "9000", "2e7", "", "pending"]))
    assert found.wanted == (table.Wanted("next", 400, 9000),) and found.excluded == ()
    with pytest.raises(ConfigError, match=r"row 2 \(next\), column tokens: '9k': expected a number above 0"):
        table.read(write(tmp_path, head, [*ROW, "done"], ["next", "400", "9k", "", "", "pending"]))


def test_only_runs_of_the_same_settings_beat_one_another(tmp_path):
    head = [*HEAD, "optimizer.lr", "model.heads", "train.steps", "moving_shapes.all_right"]
    rows = [
        ["a", *ROW[1:4], "0.5", "0.1", "2", "10", ".2"],
        ["b", *ROW[1:4], "0.6", "0.2", "2", "10", ".1"],
        ["c", *ROW[1:4], "0.7", "0.1", "4", "11", ".3"],
        ["d", *ROW[1:4], "0.8", "0.2", "4", "11", ".4"],
    ]
    found = table.best_settings(table.read(write(tmp_path, head, *rows)))
    assert [r.name for r in found.runs] == ["a", "c"]  # as large, and as long, but with other heads
    said = "{} is the same run with a better learning rate or batch"
    assert [e.reason for e in found.excluded] == [said.format("a"), said.format("c")]


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([], "no runs in it"),
        ([HEAD], "no runs in it"),
        ([["name", "params", "tokens", "flops", "loss"], ROW], "no column 'parameters'; is it 'params'"),
        ([["name", "x", "tokens", "flops", "loss"], ROW], "no column 'parameters'; there are name, x, tokens"),
        ([HEAD, ROW, ["b", "1.2M", *ROW[2:]]], r"row 2 \(b\), column parameters: '1.2M': expected a number above 0"),
        ([HEAD, ["a", *ROW[1:4], "low"]], "row 1, column loss: 'low': expected a number"),
        ([HEAD, ["a", *ROW[1:4], "-1"]], "column loss: '-1': expected a number above 0"),
        ([HEAD, ["a", "0", *ROW[2:]]], "column parameters: '0': expected a number above 0"),
        ([HEAD, ["a", *ROW[1:3], "inf", "1"]], "column flops: 'inf'"),
        ([HEAD, ["a", "", *ROW[2:]]], "column parameters: nothing: expected"),
        ([[*HEAD, "budget"], [*ROW, "big"]], "column budget: 'big'"),
        ([HEAD, ROW, ["b", *ROW[1:]], ROW], "rows 1 and 3 are both named 'a'"),
        ([HEAD, ROW[:4]], "row 1: 4 cells under 5 columns"),
        ([[*HEAD, "loss"], [*ROW, "1"]], "two columns are named 'loss'"),
    ],
)
def test_bad_tables_are_refused_in_one_line(tmp_path, rows, says):
    with pytest.raises(ConfigError, match=says):
        table.read(write(tmp_path, *rows))


def test_files_that_are_no_tables(tmp_path):
    path = write(tmp_path, HEAD, ROW, name="results.csv")
    with pytest.raises(ConfigError, match="no such file; did you mean .*results.csv"):
        table.read(path.replace("results", "result"))
    with pytest.raises(ConfigError, match="a directory.*did you mean .*results.csv"):
        table.read(str(tmp_path))
    (tmp_path / "runs.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"expected a table, \*.csv or \*.parquet"):
        table.read(str(tmp_path / "runs.json"))
    (tmp_path / "runs.parquet").write_text("no")
    with pytest.raises(ConfigError, match="expected a Parquet file"):
        table.read(str(tmp_path / "runs.parquet"))
    (tmp_path / "latin.csv").write_bytes(b"name,\xff\n")
    with pytest.raises(ConfigError, match="expected a CSV in UTF-8"):
        table.read(str(tmp_path / "latin.csv"))


def run(name, n=100.0, d=2000.0, c=1e6, loss=0.5, **more):
    return table.Run(name, n, d, c, loss, **more)


def test_of_several_learning_rates_the_best_is_kept_and_the_others_are_named():
    runs = [run("slow", loss=0.6, learning_rate=1e-4), run("best", loss=0.5, learning_rate=1e-3),
            run("again", loss=0.52, learning_rate=1e-3), run("larger", n=200.0, loss=0.7, learning_rate=1e-4),
            run("longer", d=4000.0, c=1.05e6, loss=0.4, learning_rate=1e-4)]  # fmt: skip
    found = table.best_settings(table.Table(tuple(runs), ()))
    assert [r.name for r in found.runs] == ["best", "again", "larger", "longer"]
    (left,) = found.excluded
    assert left.name == "slow" and "best is the same run" in left.reason and not left.lost


def test_the_learning_rate_is_the_column_that_varies(tmp_path):
    head = [*HEAD, "optimizer.lr", "optimizer.muon_lr"]
    path = write(tmp_path, head, [*ROW, "0.001", "0.02"], ["b", *ROW[1:], "0.001", "0.04"])
    assert [r.learning_rate for r in table.read(path).runs] == [0.02, 0.04]


def test_budgets_are_the_column_or_flops_within_ten_per_cent():
    runs = [run("a", c=0.92e6), run("b", n=200.0, c=1.08e6), run("c", n=300.0, c=1.0e6), run("d", c=5e6)]
    first, second, third, last = table.budget_of(runs)
    assert first == second == third == pytest.approx(1e6, rel=0.01) and last == pytest.approx(5e6)
    assert list(table.by_budget(runs)) == [first]
    named = [run("a", c=1.3e6, budget=1e6), run("b", n=200.0, c=0.8e6, budget=1e6)]
    assert table.budget_of(named) == [1e6, 1e6] and table.by_budget(named) == {}
