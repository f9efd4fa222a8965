"""Each row of the fault table in its short form, and the harness itself."""

import json

import pytest
import suite
import table


def test_what_is_tried_is_kept_and_not_tried_again(tmp_path):
    seen, said = [], []

    def attempt(shared, own, trial):
        seen.append(trial["n"])
        (own / "left").touch()
        return {"wrong": ["it broke"] * (trial["n"] == 1)}

    def judge(results):
        return table.Verdict(len(results), "all", table.all_wrong(results), lost=0.5)

    row = table.Row("a", "A fault", lambda: "", lambda short, seed: [{"n": n} for n in range(3)], attempt, judge)
    for _ in range(2):
        verdict = table.run(row, tmp_path / "a", False, 0, said.append)
        assert verdict == table.Verdict(3, "all", ("it broke",), 0.5) and seen == [0, 1, 2]
    assert [line.partition(" | eta ")[0] for line in said] == ["a 1/3: held", "a 2/3: it broke", "a 3/3: held"]
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["002", "results.jsonl"]
    text = table.markdown([(row, verdict), (row, "no disk")])
    assert "| A fault | 3 | all | 0.5 s |  | missed: it broke |" in text and "not run: no disk" in text


@pytest.mark.parametrize("row", suite.ROWS, ids=lambda row: row.name)
def test_the_long_form_is_the_same_every_time(row):
    trials = row.trials(False, 0)
    assert json.dumps(trials) == json.dumps(row.trials(False, 0)) and len(row.trials(True, 0)) <= max(len(trials), 1)


def test_the_counts_are_the_promised_ones():
    trials = {row.name: row.trials(False, 0) for row in suite.ROWS}
    assert sum(len(run["blows"]) for run in trials["kills"]) >= 100
    assert sum(trial["saved"] != trial["resumed"] for trial in trials["resumes"]) >= 12
    assert len(trials["bit-flips"]) >= 50 and len(trials["full-disk"]) >= 20
    assert [(trial["records"], trial["corrupt"]) for trial in trials["corrupt-records"]] == [(10_000, 1000)]


def test_the_benchmark_is_read_as_it_prints(tmp_path, monkeypatch):
    script = tmp_path / "benchmark.py"
    line = "time: 280.0 ms a step, 289.8 with a save each 50: {:+.2f} % (medians of 5 times 50 steps each)"
    monkeypatch.setattr(suite.cost, "BENCHMARK", script)
    for share, wrong in ((2.5, []), (3.5, ["costs 3.5 %"])):
        script.write_text(f"print({line.format(share)!r})\nprint('processor time: … +9.00 % (…)')\n")
        result = suite.cost.attempt(tmp_path, tmp_path, {"turns": 5})
        assert result == {"wrong": wrong, "overhead": pytest.approx(share / 100)}
    script.write_text("print('nothing')")
    assert "the benchmark failed" in suite.cost.attempt(tmp_path, tmp_path, {"turns": 5})["wrong"][0]
