"""The picture and the report of a scaling law."""

import math
import xml.etree.ElementTree as ET

import pytest

from vidgen.scaling.pods import Planned
from vidgen.scaling.study import study
from vidgen.scaling.table import Excluded, Run, Table
from vidgen.studio import law as pages
from vidgen.studio import panels
from vidgen.studio.panels import Line, Panel, Points

SVG = "{http://www.w3.org/2000/svg}"


def runs(**figures):
    """Four sizes at each of three budgets, on a law without noise but a little."""
    made = []
    for c in (1e13, 1e14, 1e15):
        for i, factor in enumerate((0.35, 0.8, 1.6, 3.5)):
            n = math.sqrt(c / 2400) * factor
            d = c / (6 * n)
            loss = (0.16 + 2.1 / n**0.33 + 18 / d**0.31) * (1 + 0.001 * (-1) ** (i + round(math.log10(c))))
            made.append(Run(f"<{c:.0e}-{i}>", n, d, c, loss, c, figures={k: f(loss) for k, f in figures.items()}))
    return tuple(made)


@pytest.fixture(scope="module")
def found():
    table = Table(runs(**{"moving_shapes.all_right": lambda loss: 1 - loss}), (Excluded("bad & ugly", "loss is nan"),))
    return study(table)


def test_the_picture_has_every_run_every_minimum_and_the_prediction(found):
    drawn = ET.fromstring(pages.picture(found))
    profiles, compute, accuracy = drawn.findall(f"{SVG}g")
    assert [g.find(f"{SVG}text").text for g in (profiles, compute, accuracy)] == [
        "IsoFLOP profiles, minima ringed", "Loss against compute, the largest predicted",
        "moving_shapes.all_right against compute",
    ]  # fmt: skip

    def titles(panel):
        return [c.findtext(f"{SVG}title") or "" for c in panel.iter(f"{SVG}circle")]

    assert sum(t.startswith("<") for t in titles(profiles)) == 12
    assert sum("are best" in t for t in titles(profiles)) == len([p for p in found.profiles.profiles if not p.edge])
    best = min(found.held.runs, key=lambda r: r.loss)
    said = found.held.predicted()[found.held.runs.index(best)]
    assert f"{best.name}: predicted {said:.4g}, measured {best.loss:.4g}" in titles(compute)
    assert len(list(compute.iter(f"{SVG}polyline"))) == 2  # what was fitted, and what was foretold
    assert sum(": " in t and "%" in t for t in titles(accuracy)) == 12
    assert drawn.find(f"{SVG}style") is not None and "<style" not in pages.picture(found, alone=False)


def test_dots_stand_where_their_runs_do(found):
    drawn = ET.fromstring(pages.picture(found))
    dots = {c.findtext(f"{SVG}title"): c for c in drawn.find(f"{SVG}g").iter(f"{SVG}circle") if len(c)}
    dots = {t.split(":")[0]: (float(c.get("cx")), float(c.get("cy"))) for t, c in dots.items() if t.startswith("<")}
    by_size, by_loss = (sorted(found.runs, key=lambda r: getattr(r, name)) for name in ("parameters", "loss"))
    assert [dots[r.name][0] for r in by_size] == sorted(x for x, _ in dots.values())
    assert [dots[r.name][1] for r in by_loss] == sorted((y for _, y in dots.values()), reverse=True)


def test_the_report_says_all_of_it(found):
    page = pages.report(found, "runs.csv")
    for text in ("What to be wary of", "bad &amp; ugly", "loss is nan", "Predicted before they were seen", "6ND",
                 "IsoFLOP profiles", "Residuals", "&lt;1e+13-0&gt;"):  # fmt: skip
        assert text in page
    assert "bad & ugly" not in page and "<1e+13-0>" not in page
    for name in ("E", "alpha", "beta"):
        low, high = found.law.intervals[name]
        assert f"({low:.3g} to {high:.3g})" in page
    body = page[page.index("<main>") : page.index("</main>") + len("</main>")]
    ET.fromstring(body)  # every element is closed


def test_what_is_not_there_leaves_no_hole():
    table = Table(tuple(r for r in runs() if r.name[-2] in "03"), ())
    found = study(table, hold_out=False)
    assert pages.judged(found) == "" and not found.profiles.profiles
    drawn = ET.fromstring(pages.picture(found))
    assert [g.find(f"{SVG}text").text for g in drawn.findall(f"{SVG}g")] == ["Loss against compute"]
    page = pages.report(found, "runs.csv")
    assert "No budget has runs of three sizes." in page and "Predicted before" not in page


def test_rows_far_beyond_the_runs_are_marked(found):
    head, rows = pages.optimal_rows(found)
    assert len(head) == len(rows[0]) and [r[0].endswith("*") for r in rows] == [row.far for row in found.rows]
    plans = [Planned(row, "5m", 4, 0.4, 1e-4, None, "far") for row in found.rows]
    head, rows = pages.optimal_rows(found, "v5p:2x2x1", plans)
    assert "days on v5p:2x2x1" in head and "cost" not in head and rows[0][-3:] == ["<0.01", "40%", "5m (far)"]


def test_axes_have_round_numbers_and_powers_are_written_as_such():
    assert [panels.power(v) for v in (1e13, 2e13, 1.5e-3)] == ["10¹³", "2·10¹³", "1.5·10⁻³"]
    drawn = panels.draw([Panel("a", "x", "y", [Points([1e3, 1e9], [0.25, 0.41])])])
    texts = [t.text for t in ET.fromstring(drawn).iter(f"{SVG}text")]
    assert "0.3" in texts and "0.4" in texts and {"1k", "1M", "1G"} <= set(texts)
    assert panels.draw([Panel("a", "x", "y", [])]) == "" and len(set(panels.ramp(5))) == 5


def test_labels_do_not_lie_on_each_other_and_long_ticks_find_room():
    marks = [Line([1.0, 10.0], [1e-4, y], label=name) for name, y in (("a", 2e-4), ("b", 2.001e-4), ("c", 4e-4))]
    drawn = ET.fromstring(panels.draw([Panel("t", "x", "y", marks)])).find(f"{SVG}g")
    places = {t.text: (float(t.get("x")), float(t.get("y"))) for t in drawn.findall(f"{SVG}text")}
    assert places["a"][1] - places["b"][1] > 11.8 and places["c"][1] < places["b"][1] - 30
    ticks = [(name, x) for name, (x, _) in places.items() if name.startswith("0.000")]
    assert ticks and all(x - panels.LETTER * len(name) >= 0 for name, x in ticks)


def test_a_band_goes_there_and_back():
    mark = Line([1.0, 10.0], [1.0, 2.0], low=[0.9, 1.8], high=[1.1, 2.2])
    (polygon,) = ET.fromstring(panels.draw([Panel("a", "x", "y", [mark])])).iter(f"{SVG}polygon")
    (a, b, c, d) = [tuple(map(float, p.split(","))) for p in polygon.get("points").split()]
    assert a[0] == d[0] < b[0] == c[0] and a[1] > d[1] and b[1] > c[1]
