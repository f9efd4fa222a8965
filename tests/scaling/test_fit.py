"""`vidgen fit`, from a table to the report."""

import json

import numpy as np
import planted
import pytest

from vidgen import cli, fit
from vidgen.config import ConfigError
from vidgen.scaling.table import Run


def call(capsys, *argv):
    """The last line of stdout, as JSON, and what stands before."""
    with pytest.raises(SystemExit) as e:
        cli.main(["fit", *argv, "--json"])
    out = capsys.readouterr().out
    assert e.value.code == 0
    *text, last = out.strip().split("\n")
    return json.loads(last), "\n".join(text)


def test_from_a_table_to_a_report(tmp_path, capsys):
    runs = planted.sweep()
    path = planted.write(tmp_path / "runs.csv", runs, **{"moving_shapes.all_right": [1 - r.loss for r in runs]})
    with open(path, "a") as f:
        f.write("nanny,1000,1000,6e6,nan,2e12,\n")
    facts, text = call(capsys, f"--runs={path}")
    for name, value in zip(("E", "A", "B", "alpha", "beta"), planted.LAW, strict=True):
        low, high = facts["intervals"][name]
        assert low < facts[name] < high and low < value < high
    assert facts["runs"] == 30 and facts["excluded"] == [{"name": "nanny", "reason": "loss is nan"}]
    assert [w for w in facts["warnings"] if "nanny (loss is nan)" in w] and "nanny (loss is nan)" in text
    assert len(facts["isoflop"]["profiles"]) == 5 and facts["isoflop"]["parameters"]["interval"]
    assert facts["optimal"][-1]["flops"] == 1e25 and facts["optimal"][-1]["extrapolated"]
    assert facts["flops_over_6nd"]["median"] == pytest.approx(1.3, abs=0.1)
    page = (tmp_path / "report.html").read_text()
    assert "nanny" in page and "loss is nan" in page and "http" not in page.replace("http://www.w3.org", "")
    assert (tmp_path / "law.svg").stat().st_size < 60_000
    assert "moving_shapes.all_right against compute" in page


def test_runs_are_predicted_before_they_are_made(tmp_path, capsys):
    path = planted.write(tmp_path / "runs.csv", planted.sweep(), status=["done"] * 30, skipped_steps=[0] * 29 + [5],
                         steps=[100] * 30)  # fmt: skip
    n, d = 3e6, 1e9
    with open(path, "a") as f:
        f.write(f"next,{n},{d},,,,pending,,\n")
    facts, text = call(capsys, f"--runs={path}")
    (found,) = facts["predicted"]
    assert found["name"] == "next" and found["parameters"] == n
    low, high = found["interval"]
    assert low < found["loss"] < high and low < planted.loss(planted.LAW, n, d) < high
    assert f"To be made: next, for which the law predicts {found['loss']:.4g}" in text
    assert facts["excluded"] == [] and "next" in (tmp_path / "report.html").read_text()
    assert "updates were skipped" in text and "c3e+14-5 (5%)" in text


def test_the_largest_budget_is_predicted_without_it(tmp_path, capsys):
    runs = planted.sweep()
    path = planted.write(tmp_path / "runs.csv", runs)
    held = call(capsys, f"--runs={path}", f"--output={tmp_path}/a")[0]["holdout"]
    assert held["budget"] == 3e14 and held["fitted_on"] == 24
    largest = [r for r in runs if r.budget == 3e14]
    assert held["names"] == [r.name for r in largest] and held["measured"] == [r.loss for r in largest]
    before = min(r.loss for r in runs if r.budget == 1e14)
    assert held["baseline"] == before
    errors = [abs(p / m - 1) for p, m in zip(held["predicted"], held["measured"], strict=True)]
    assert held["errors"] == pytest.approx(errors) and held["error"] == pytest.approx(sum(errors) / 6)
    assert held["max_error"] == pytest.approx(max(errors))
    baseline = sum(abs(before / r.loss - 1) for r in largest) / 6
    assert held["baseline_error"] == pytest.approx(baseline)
    assert held["error"] < 0.01 and held["ratio"] == pytest.approx(held["error"] / baseline) and held["ratio"] < 1 / 3
    # The held-out runs were not seen: whatever they say, the prediction is the same.
    other = planted.write(tmp_path / "other.csv", [*runs[:-6], *planted.sweep(seed=9)[-6:]])
    again = call(capsys, f"--runs={other}", f"--output={tmp_path}/b")[0]["holdout"]
    assert again["predicted"] == held["predicted"] and again["measured"] != held["measured"]
    assert call(capsys, f"--runs={path}", f"--output={tmp_path}/c", "--noholdout")[0]["holdout"] is None


def test_runs_at_no_budget_hold_out_those_with_the_most_flops(tmp_path, capsys):
    runs = [planted.sweep(budgets=(c,), seed=i)[i % 6] for i, c in enumerate(2e12 * 1.4**k for k in range(20))]
    path = planted.write(tmp_path / "runs.csv", [r.__class__(f"r{i}", *[getattr(r, n) for n in ("parameters",
        "tokens", "flops", "loss")]) for i, r in enumerate(runs)])  # fmt: skip
    facts, _ = call(capsys, f"--runs={path}")
    assert facts["holdout"]["budget"] is None
    assert sorted(facts["holdout"]["names"]) == ["r16", "r17", "r18", "r19"]
    assert facts["isoflop"]["profiles"] == [] and [w for w in facts["warnings"] if "fewer than two budgets" in w]


def test_too_few_runs_to_hold_any_out_is_a_warning(tmp_path, capsys):
    path = planted.write(tmp_path / "runs.csv", planted.sweep(budgets=(1e13, 1e14), sizes=4))
    facts, _ = call(capsys, f"--runs={path}")
    assert facts["holdout"] is None and [w for w in facts["warnings"] if "nothing was held out" in w]


def test_a_budget_of_few_runs_is_held_out_by_its_name(tmp_path, capsys):
    runs = planted.sweep()[:-4]
    facts, _ = call(capsys, f"--runs={planted.write(tmp_path / 'runs.csv', runs)}")
    assert facts["holdout"]["budget"] == 3e14 and facts["holdout"]["names"] == [r.name for r in runs[-2:]]
    one = planted.write(tmp_path / "one.csv", planted.sweep(budgets=(1e14,), sizes=8))
    facts, _ = call(capsys, f"--runs={one}")
    assert [w for w in facts["warnings"] if "without the largest budget 0 runs are left" in w]


def test_learning_rates_are_studied_and_only_the_best_runs_fitted(tmp_path, capsys):
    runs, rates = [], []
    for r in planted.sweep(budgets=(1e13, 1e14, 1e15), sizes=4, noise=0.001):
        for rate, worse in ((1e-3, 1.05), (2e-3, 1.0), (4e-3, 1.05)):
            runs.append(r.__class__(f"{r.name}-{rate}", r.parameters, r.tokens, r.flops, r.loss * worse, r.budget))
            rates.append(rate)
    facts, text = call(capsys, f"--runs={planted.write(tmp_path / 'runs.csv', runs, learning_rate=rates)}")
    assert facts["runs"] == 12 and len(facts["excluded"]) == 24
    assert all("better learning rate" in e["reason"] for e in facts["excluded"])
    assert [o["value"] for o in facts["learning_rate"]["optima"]] == pytest.approx([2e-3] * 12, rel=0.02)
    assert not [w for w in facts["warnings"] if "not in the fit" in w]
    assert (
        "Left out: 24 runs that others with a better learning rate or batch beat: c" in text and "and 18 more" in text
    )
    assert "Learning rate" in (tmp_path / "report.html").read_text()


def test_learning_rates_are_studied_without_a_law(tmp_path, capsys):
    """Three sizes at five rates each, as configs/sweeps/learning_rates.py makes them: no law, and a verdict."""
    runs, rates, widths = [], [], []
    for i, width in enumerate((32, 64, 128)):
        for rate in (5e-4, 1e-3, 2e-3, 4e-3, 8e-3):
            worse = 0.02 * np.log2(rate / (2e-3 * 2**-i)) ** 2 + 1e-4 * (len(runs) % 3)
            runs.append(Run(f"w{width}-{rate}", 1e3 * width**2, 1e7, 6e10 * width**2, 0.5 - 0.05 * i + worse))
            rates.append(rate)
            widths.append(width)
    path = planted.write(tmp_path / "runs.csv", runs, learning_rate=rates, width=widths)
    facts, text = call(capsys, f"--runs={path}")
    assert facts["E"] is None and "no law: 3 runs can be fitted" in facts["warnings"][0]
    assert [o["value"] for o in facts["learning_rate"]["optima"]] == pytest.approx([2e-3, 1e-3, 5e-4], rel=0.1)
    transfer = facts["learning_rate"]["transfer"]
    assert not transfer["transfers"] and transfer["slope"]["exponent"] == pytest.approx(-1, abs=0.1)
    assert "it doesn't transfer; scale it as width^-1" in text and "The best learning rate at 4.1M parameters" in text
    assert (
        "transfer; scale it as width^-1" in (tmp_path / "report.html").read_text()
        and not (tmp_path / "law.svg").exists()
    )
    with pytest.raises(ConfigError, match="3 runs can be fitted"):
        fit.run(path, topology="v5p:8x8x8")


def test_runs_without_a_law_still_end_in_valid_json(tmp_path, capsys):
    rng = np.random.default_rng(1)
    runs = [
        Run(f"r{i}", n, d, 6 * n * d, y)
        for i, (n, d, y) in enumerate(
            zip(10 ** rng.uniform(5, 8, 20), 10 ** rng.uniform(7, 10, 20), 0.5 * rng.uniform(0.8, 1.2, 20), strict=True)
        )
    ]
    with pytest.raises(SystemExit) as e:
        cli.main(["fit", f"--runs={planted.write(tmp_path / 'runs.csv', runs)}", "--json"])
    last = capsys.readouterr().out.strip().split("\n")[-1]
    facts = json.loads(last, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    assert e.value.code == 0 and [w for w in facts["warnings"] if "isn't the shape of this loss" in w]


def test_days_and_cost_stand_beside_what_to_train(tmp_path, capsys):
    path = planted.write(tmp_path / "runs.csv", planted.sweep())
    facts, text = call(capsys, f"--runs={path}", "--topology=v5p:8x8x8", "--price=2")
    last = facts["optimal"][-1]
    assert last["chips"] == 512 and last["days"] > 100
    assert last["cost"] == pytest.approx(last["days"] * 24 * 512 * 2)
    assert "days on v5p:8x8x8" in text and "cost" in text


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"price": 2.0}, "--price has no meaning without --topology"),
        ({"family": "configs/dit_video.py"}, "--family has no meaning without --topology"),
        ({"price": -1.0, "topology": "v5p:8x8x8"}, "--price=-1.0: expected what a chip-hour costs"),
        ({"seed": -1}, "--seed=-1: expected 0 or more"),
        ({"topology": "v5q:8x8x8"}, "did you mean|known"),
    ],
)
def test_flags_that_make_no_sense_are_refused(tmp_path, given, says):
    path = planted.write(tmp_path / "runs.csv", planted.sweep(budgets=(1e13, 1e14), sizes=4))
    with pytest.raises(ConfigError, match=says):
        fit.run(path, **given)


def test_a_bad_table_ends_in_one_line(tmp_path, capsys):
    path = planted.write(tmp_path / "runs.csv", planted.sweep()[:5])
    with pytest.raises(SystemExit) as e:
        cli.main(["fit", f"--runs={path}"])
    out, err = capsys.readouterr()
    assert e.value.code == 2 and out == "" and err.count("\n") == 1 and "5 runs can be fitted" in err
    with open(path, "a") as f:
        f.write("nanny,1000,1000,6e6,nan,2e12\n")
    with pytest.raises(ConfigError, match=r"5 runs can be fitted: .*; 1 run is not in the fit: nanny \(loss is nan\)"):
        fit.run(path)
