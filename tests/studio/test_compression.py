"""The table and the plot of quality against compression."""

import xml.etree.ElementTree as ET

from vidgen.studio import compression


def row(name, kind, ratio, psnr, **more):
    about = {"tokenizer": name, "dataset": "a & b", "kind": kind, "stride": (4, 8, 8)}
    return about | {"pixel_values_per_latent_value": ratio, "tokens_per_clip": 80.0, "psnr": psnr} | more


ROWS = [
    row("patch", "patch", 0.8, 100.0),
    row("linear 4x8x8, 64", "linear", 12.0, 26.0),
    row("linear 4x8x8, 4", "linear", 192.0, 18.0),
    row("<mine>", "vae", 48.0, 32.5, lpips=0.05),
]


def test_the_plot_has_each_lossy_tokenizer_once_and_no_exact_one():
    drawn = ET.fromstring(compression.plot(ROWS, alone=True))
    space = "{http://www.w3.org/2000/svg}"
    dots = {dot.findtext(f"{space}title"): dot for dot in drawn.iter(f"{space}circle")}
    assert len(dots) == 3 and not any("patch" in title for title in dots)
    mine = next(dot for title, dot in dots.items() if title.startswith("<mine>"))
    other = next(dot for title, dot in dots.items() if "64" in title)
    assert float(mine.get("cy")) < float(other.get("cy")) and float(mine.get("cx")) > float(other.get("cx"))
    assert len(list(drawn.iter(f"{space}polyline"))) == 1
    assert drawn.find(f"{space}style") is not None and "<style" not in compression.plot(ROWS)
    assert compression.plot(ROWS[:1]) == ""


def test_the_table_leaves_out_what_nobody_has_and_escapes_names():
    table = compression.table(ROWS)
    assert "LPIPS" in table and "FVD" not in table and "&lt;mine&gt;" in table and "<mine>" not in table
    assert table.index(">patch<") < table.index("&lt;mine&gt;") < table.index("linear 4x8x8, 4<")
    assert table.count("–") == 3


def test_a_folder_of_files_that_parse(tmp_path):
    compression.write(str(tmp_path), ROWS)
    assert {p.name for p in tmp_path.iterdir()} == {"compression.json", "compression.html", "compression.svg"}
    page = ET.fromstring((tmp_path / "compression.html").read_text())
    assert page.find("h3").text == "a & b"
