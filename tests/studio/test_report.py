"""The report: what is there is shown, what isn't is said to be missing, and no text gets out of its element."""

import html.parser
import json
import re

import numpy as np
import pytest

from vidgen import config
from vidgen.config import ConfigError
from vidgen.studio import media, page, plots, report, workdirs
from vidgen.training import metrics

EVIL = "a red <script>alert('x')</script> & \"circle\"\x07 \u202e"


class Parsed(html.parser.HTMLParser):
    """The tags, the attributes and the text of a page; says if a tag is left open."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.attributes, self.text, self.open = [], [], "", []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in ("meta", "img", "input", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] != "style":
            self.text += data


def make(workdir, **changes):
    workdir.mkdir(exist_ok=True)
    (workdir / "config.json").write_text(config.to_json(config.override(config.base(), changes)))
    return workdir


def log(workdir, rows):
    writer = metrics.MetricWriter(str(workdir))
    for step, values in rows:
        writer.scalars(step, values)
    writer.close()


def draw(workdir, step, prompts, name="grid.gif"):
    folder = workdir / "samples" / f"{step:08d}"
    media.save_video(str(folder / name), np.full((2, 16, 16, 3), step % 256, np.uint8), 8)
    (folder / "prompts.json").write_text(
        json.dumps({"prompts": prompts, "seeds": [0, 1], "guidance": 2.0, "steps": 24})
    )


def judge(workdir, name, **results):
    (workdir / "evaluation").mkdir(exist_ok=True)
    (workdir / "evaluation" / name).write_text(json.dumps(results))


def render(workdir) -> tuple[str, Parsed]:
    path = report.run(str(workdir))
    assert path == str(workdir / "report.html")
    text = (workdir / "report.html").read_text(encoding="utf-8")
    parsed = Parsed(text)
    assert not parsed.open
    return text, parsed


def test_a_run_of_a_vae(tmp_path):
    run = make(tmp_path / "vae", task="vae")
    log(run, [(s, {"loss": 1 / s, "heldout_psnr": 20.0 + s / 100}) for s in (100, 200)])
    draw(run, 200, ["clip 0: 31.5 dB"])
    about = {"prompts": ["clip 0: 31.5 dB"], "columns": ["original", "reconstruction", "error x 4"], "left_out": ["b"]}
    (run / "samples" / "00000200" / "prompts.json").write_text(json.dumps(about))
    (run / "chunks.json").write_text('{"shapes": [], "clips": 7}')
    judge(
        run, "reconstruction.json", psnr=31.25, lpips=None, tokenizers={"vae": {}}, notes=["n"], per_clip={}, step=200
    )
    row = {"tokenizer": "mine", "dataset": "d", "kind": "vae", "stride": [4, 8, 8], "psnr": 31.25,
           "pixel_values_per_latent_value": 24.0}  # fmt: skip
    judge(run, "compression.json", rows=[row])
    text, parsed = render(run)
    for expected in (
        "held-out PSNR",
        "22.00 dB",
        "original, reconstruction, error x 4 from left to right · 1 clips left out",
        "PSNR of held-out clips, dB",
        "Quality against compression",
        "psnr 31.25",
        "Chunks",
    ):
        assert expected in parsed.text, expected
    assert "lpips None" not in parsed.text and "mine 31.2" in text
    (run / "evaluation" / "compression.json").write_text("{")
    assert "compression.json: " in render(run)[1].text


def test_a_whole_run(tmp_path):
    run = make(tmp_path / "my run", **{"train.steps": 300, "model.width": 192})
    rows = [
        (s, {"loss": 1 / s, "tokens_per_second": 12_300, "mfu": 0.31, "grad_norm": 1.0}) for s in range(10, 310, 10)
    ]
    rows[-1][1]["heldout_loss"] = 0.0123
    log(run, rows)
    draw(run, 100, ["old"])
    draw(run, 300, [EVIL, "一个红色的圆"])
    judge(
        run, "moving_shapes.json", all_right=0.854, shape=0.95, flicker=0.01, prompts=144, per_prompt=[{"prompt": EVIL}]
    )
    judge(run, "moving_shapes-200.json", all_right=0.41)
    (run / "packing.json").write_text('{"fill": 0.9921, "dropped": {"too long": 3}}')
    (run / "environment.json").write_text('{"jax": "0.10.2"}')

    text, parsed = render(run)
    for expected in (
        "my run",
        "Trained for 300 steps.",
        "85.4\xa0% all right",
        "of 144 prompts",
        "0.0123",
        "12.3k",
        "一个红色的圆",
        "seeds 0, 1 from left to right · guidance 2.0 · solver steps 24",
        "41\xa0%",
        "flicker 0.01",
        "dropped.too long",
        "0.9921",
        "0.10.2",
        "model.width",
        "No lr was logged.",
    ):
        assert expected in parsed.text, expected
    assert text.count("data:image/gif;base64,") == 2
    assert parsed.tags.count("svg") == 5  # loss twice (linear, log), tokens a second, mfu, gradient norm


def test_figures_of_a_suite_that_parses_nothing_are_no_shares(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text("{}")
    table = {"head": ["", "drawn", "real"], "rows": [["motion", 0.0686, 0.0637]]}
    for step in (5, 10):
        judge(run, f"vbench-{step}.json", step=step, motion=0.0686, real_motion=0.0637, prompts=8, table=table)
    text, _ = render(run)
    assert 'class="bar"' not in text and "Over time" not in text
    assert text.count("0.0686") == text.count("0.0637") == 1 and "prompts 8" in text


def test_the_learning_rate_is_drawn_as_it_was_and_noise_is_smoothed(tmp_path):
    run = make(tmp_path / "run")
    log(run, [(s, {"lr": 200.0 - s, "grad_norm": 3.0 + s % 2}) for s in range(1, 201)])
    text, _ = render(run)
    assert re.findall(r'class="end a"[^>]*>([^<]+)<', text) == ["3.4", "0"]  # 5 of the last values: 3, 4, 3, 4, 3


def test_captions_cannot_leave_their_element(tmp_path):
    run = make(tmp_path / "<img src=x onerror=alert(1)>")
    draw(run, 1, [EVIL])
    judge(run, "moving_shapes.json", all_right=1.0, per_prompt=[{EVIL: EVIL}])
    (run / "environment.json").write_text(json.dumps({EVIL: EVIL}))
    text, parsed = render(run)
    assert "script" not in parsed.tags and parsed.tags.count("img") == 1
    assert "\x07" not in text and "\u202e" not in text
    assert "a red <script>alert('x')</script> & \"circle\"� �" in parsed.text


def test_the_page_needs_no_network(tmp_path):
    run = make(tmp_path / "run")
    log(run, [(s, {"loss": 1 / s}) for s in (1, 2, 3)])
    draw(run, 3, ["a"])
    text, parsed = render(run)
    fetched = [v for k, v in parsed.attributes if k in ("src", "href", "srcset", "data", "poster")]
    assert fetched and all(v.startswith("data:") for v in fetched)
    assert not {"link", "script", "iframe", "object"} & set(parsed.tags)
    assert "@import" not in text and not re.search(r"url\(", page.STYLE)


def test_what_is_missing_is_said(tmp_path):
    _, parsed = render(make(tmp_path / "run"))
    for expected in (
        "Nothing was logged yet.",
        "Not judged yet",
        "No samples yet",
        "No loss was logged yet.",
        "No packing.json",
        "No environment.json",
        "All settings are at their defaults.",
    ):
        assert expected in parsed.text, expected


def test_unreadable_parts_are_said_and_the_rest_is_shown(tmp_path):
    run = make(tmp_path / "run", **{"train.steps": 100})
    log(run, [(50, {"loss": 0.5}), (60, {"loss": float("nan")})])
    draw(run, 50, ["a"])
    (run / "samples" / "00000050" / "prompts.json").write_text('{"prompts": [')
    (run / "samples" / "not a step").mkdir()
    judge(run, "moving_shapes.json")
    (run / "evaluation" / "moving_shapes.json").write_text("[]")
    _, parsed = render(run)
    assert "At step 60 of 100." in parsed.text
    assert "prompts.json: " in parsed.text and "moving_shapes.json: expected a JSON object" in parsed.text
    assert "1 logged loss was not finite" in parsed.text


def test_a_large_gif_gives_way_to_its_mp4(tmp_path, monkeypatch):
    run = make(tmp_path / "run")
    draw(run, 1, ["a"], "grid.gif")
    draw(run, 1, ["a"], "grid.mp4")
    assert "data:image/gif" in render(run)[0]
    monkeypatch.setattr(workdirs, "CLIP_BYTES", 10)
    text, parsed = render(run)
    assert "data:video/mp4" in text and "data:image/gif" not in text and "video" in parsed.tags


def test_many_drawings_are_thinned_and_counted(tmp_path):
    run = make(tmp_path / "run")
    for step in range(1, 22):
        draw(run, step, ["a"])
    text, parsed = render(run)
    assert text.count("data:image/gif") == report.SAMPLES_SHOWN + 1
    assert f"Earlier ({report.SAMPLES_SHOWN} of 20, evenly chosen)" in parsed.text
    assert "step 1 " not in parsed.text and "step 1step" in parsed.text and "step 21 ·" in parsed.text


def test_what_is_no_workdir_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="no such directory"):
        report.run(str(tmp_path / "nowhere"))
    make(tmp_path / "runs").rename(tmp_path / "quickstart")
    with pytest.raises(ConfigError, match=r"no config.json in it.*did you mean .*quickstart\?"):
        report.run(str(tmp_path))
    assert not (tmp_path / "report.html").exists()


def test_chart_draws_every_finite_point_where_it_belongs():
    points = [(0, 0.0), (1, 10.0), (2, None), (3, 5.0), (4, float("nan")), (5, 10.0), (6, 0.0)]
    svg = plots.line_chart([plots.Series("s", points)], size=(200, 100))
    lines = re.findall(r'polyline class="line a" points="([^"]+)"', svg)
    assert len(lines) == 2 and svg.count('r="2.5"') == 1  # two stretches, and a point alone between two gaps
    (x0, y0), (x1, y1) = (tuple(map(float, p.split(","))) for p in lines[0].split())
    (x5, y5), (x6, y6) = (tuple(map(float, p.split(","))) for p in lines[1].split())
    assert x0 < x1 < x5 < x6 and y0 == y6 > y1 == y5
    assert "step 3: s 5" in svg and 'aria-label="s from 0 to 0"' in svg


def test_log_axis_leaves_out_what_it_cannot_show():
    series = [plots.Series("s", [(1, 100.0), (2, 0.0), (3, 10.0), (4, 1.0)])]
    svg = plots.line_chart(series, log=True, size=(200, 100))
    ys = [float(p.split(",")[1]) for p in re.findall(r'points="([^"]+)"', svg)[0].split()]
    tick = {label: float(y) for y, label in re.findall(r'y="([\d.]+)" text-anchor="end">([^<]+)<', svg)}
    assert ys[0] - ys[1] == pytest.approx((tick["10"] - tick["1"]), abs=0.2)  # a decade is a decade
    assert plots.line_chart([plots.Series("s", [(1, 0.0), (2, -1.0)])], log=True) == ""
    assert plots.line_chart([plots.Series("s", [(1, None)])]) == ""


def test_long_curves_are_thinned_to_means():
    rising = [(i, float(i)) for i in range(100_000)]
    svg = plots.line_chart([plots.Series("s", rising)])
    assert len(svg) < 60_000
    assert 300 <= len(re.findall(r'points="([^"]+)"', svg)[0].split()) <= 600


@pytest.mark.parametrize("value", [0.0, 5.0, -3.0, 1e-9, 1e12])
def test_a_constant_can_be_drawn(value):
    svg = plots.line_chart([plots.Series("s", [(1, value), (2, value)])])
    assert "nan" not in svg and "inf" not in svg and svg.count("polyline") == 1


@pytest.mark.parametrize("low, high", [(0, 1), (0.03, 0.97), (-5, 12), (1e-7, 3e-7), (0, 6e9), (99.9, 100.1)])
def test_linear_ticks_enclose_and_are_few(low, high):
    ticks = plots.linear_ticks(low, high)
    assert ticks[0] <= low + 1e-9 * abs(high) and ticks[-1] >= high * (1 - 1e-9) and 2 <= len(ticks) <= 8


@pytest.mark.parametrize("low, high", [(0.05, 1.1), (1, 1), (0.3, 0.31), (1e-8, 1e3), (2e-3, 5e4)])
def test_log_ticks_enclose_and_are_few(low, high):
    ticks = plots.log_ticks(low, high)
    assert ticks[0] <= low * 1.001 and ticks[-1] >= high * 0.999 and 2 <= len(ticks) <= 12


def test_smoothing_keeps_straight_lines_and_gaps():
    line = [(i, 2.0 * i) for i in range(20)]
    assert plots.smooth(line, 4)[:-4] == line[:-4]
    assert plots.smooth(line, 4)[-1] == (19, 34.0)  # the mean of the last five
    gapped = [(0, 1.0), (1, None), (2, 3.0), (3, 5.0)]
    assert plots.smooth(gapped, 1) == [(0, 1.0), (1, None), (2, 3.0), (3, 4.0)]
    assert plots.smooth([(0, 0.0), (1, 9.0), (2, 0.0)], 1)[1] == (1, 3.0)


def test_escape_keeps_every_script_and_drops_what_disturbs():
    assert page.escape("हिन्दी 👩\u200d🎨 一\u3000二 a\u00a0b") == "हिन्दी 👩\u200d🎨 一\u3000二 a\u00a0b"
    assert page.escape("\x00\x1b[2K\ud800\u202e<") == "��[2K��&lt;"
