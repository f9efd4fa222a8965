"""Which runs a sweep has, and that its folder stays one sweep's."""

import dataclasses
import json

import numpy as np
import pytest

from vidgen import config as configs
from vidgen.config import ConfigError
from vidgen.scaling import manifest
from vidgen.scaling.algebra import param, product
from vidgen.scaling.manifest import Manifest, expand

BASE = json.loads(configs.to_json(configs.base()))
SPACE = product({"train.steps": 5}, param("model.width", (32, 64)), param("optimizer.lr", (1e-3, 0.01)))


def test_runs_are_named_by_what_they_differ_in():
    runs = expand(SPACE)
    assert [run.name for run in runs] == ["width32-lr0.001", "width32-lr0.01", "width64-lr0.001", "width64-lr0.01"]
    assert all(run.varied == ("model.width", "optimizer.lr") for run in runs)
    assert runs[0].settings == {"train.steps": 5, "model.width": 32, "optimizer.lr": 1e-3}


def test_long_names_are_cut_and_stay_apart():
    sizes = tuple(tuple((9, 8 * i, 8 * (i + j)) for i in range(2, 20)) for j in range(2))
    names = [run.name for run in expand(param("data.moving_shapes.sizes", sizes))]
    assert len(set(names)) == 2 and all(len(name) == manifest.NAME for name in names)


@pytest.mark.parametrize(
    ("space", "says"),
    [
        ((), "expands to no runs"),
        ((*SPACE, SPACE[0]), "2 runs of the same settings"),
        (tuple(p | {"label.name": "a"} for p in SPACE), "4 runs named 'a'"),
        (tuple(p | {"label.name": "../a"} for p in SPACE), "names a folder"),
        (({"seed": 1, "label.name": ".."},), "names a folder"),
        (({"seed": 1, "label.name": "a" * 300},), "300 characters; expected at most 200"),
        (({"data.source": "https://me:hunter22@host/clips"},), "config.data.source holds a credential"),
        (({"seed": 1, "label.status": "good"},), "label.status: the results have a column status already"),
    ],
)
def test_what_is_no_sweep_is_refused(space, says):
    with pytest.raises(ConfigError, match=says):
        expand(space)


def test_numbers_of_numpy_are_numbers():
    (run,) = expand(({"model.width": np.int64(32), "optimizer.lr": np.float64(1e-3), "label.share": np.float32(0.5)},))
    assert json.dumps([run.settings, run.labels]) == '[{"model.width": 32, "optimizer.lr": 0.001}, {"share": 0.5}]'


def test_a_folder_keeps_to_one_sweep(tmp_path):
    folder, whole = str(tmp_path), Manifest("a.py", BASE, ("moving_shapes",), 8, expand(SPACE))
    manifest.write(folder, whole)
    assert manifest.read(folder) == whole
    # Fewer runs: what the others found stays in the table.
    manifest.write(folder, dataclasses.replace(whole, runs=whole.runs[:2]))
    assert {run.name for run in manifest.read(folder).runs} == {run.name for run in whole.runs}
    with pytest.raises(ConfigError, match="prompts=8.*not 16"):
        manifest.write(folder, dataclasses.replace(whole, prompts=16))
    # A config that was edited since: its runs would not be like those that are done.
    edited = json.loads(json.dumps(BASE))
    edited["rows"]["count"] = 99
    with pytest.raises(ConfigError, match=r"began with config.rows.count=\d+, and a.py has 99 now"):
        manifest.write(folder, dataclasses.replace(whole, base=edited))
    edited = json.loads(json.dumps(BASE))
    edited["model"]["width"] = 999  # which every run sets
    manifest.write(folder, dataclasses.replace(whole, base=edited))
    assert manifest.config_of(whole, whole.runs[0]).model.width == whole.runs[0].settings["model.width"]
    changed = tuple(dataclasses.replace(run, settings=run.settings | {"seed": 1}) for run in whole.runs)
    with pytest.raises(ConfigError, match="width32-lr0.001 has other settings"):
        manifest.write(folder, dataclasses.replace(whole, runs=changed))


def test_broken_files_are_named(tmp_path):
    with pytest.raises(ConfigError, match="manifest.json.*expected the folder of a sweep"):
        manifest.read(str(tmp_path))
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(ConfigError, match="not the manifest of a sweep"):
        manifest.read(str(tmp_path))
    (tmp_path / "runs/a").mkdir(parents=True)
    for text in ("", "[]", '{"status": "odd"}'):
        (tmp_path / "runs/a/result.json").write_text(text)
        with pytest.raises(ConfigError, match="result.json.*expected what a run of a sweep wrote"):
            manifest.result(str(tmp_path), "a")
