"""Which steps a run takes notice of, where it goes back to, and with which batches it goes on."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest

from vidgen.config import ConfigError
from vidgen.training import guards, incidents
from vidgen.training.guards import BadSteps, Detector, Guards, Verdict, batch_step
from vidgen.training.planned import Piece


def numbers(loss=1.0, norm=1.0, skipped=0):
    return {"loss": loss, "grad_norm": norm, "usual_norm": 1.0, "tokens": 96.0, "skipped": skipped}


def kinds(tiny, losses, start=None):
    watch = Guards(tiny, start)
    return [watch.seen(n, numbers(loss)).kind for n, loss in enumerate(losses, 1)]


def noisy(count, spread=0.05, seed=0):
    return np.exp(spread * np.random.default_rng(seed).standard_normal(count)).tolist()


@pytest.fixture
def watched(tiny):
    tiny.train.update(spike=2.0, checkpoint_every=10, rollbacks=2)
    return tiny


def test_batches_are_left_out_from_a_step_on():
    jumps = ((10, 4), (30, 9))
    assert [batch_step(done, ()) for done in (0, 7)] == [0, 7]
    assert [batch_step(done, jumps) for done in (0, 9, 10, 29, 30, 31)] == [0, 9, 14, 33, 39, 40]


def test_three_high_losses_in_a_row_are_a_spike_and_two_are_none(watched):
    usual = noisy(100)
    assert set(kinds(watched, [*usual, 3.0, 3.0, *usual])) == {""}
    assert kinds(watched, [*usual, 3.0, 3.0, 3.0])[-3:] == ["", "", "spike"]
    assert kinds(watched, [*usual, 3.0, math.nan, math.inf])[-1] == "spike"
    watched.train.spike = 0.0
    assert set(kinds(watched, [*usual, 3.0, 3.0, 3.0, 3.0])) == {""}


def test_losses_that_fall_settle_or_are_noisy_are_no_spike(watched):
    warming = [7.0 * math.exp(-n / 30) + 0.2 for n in range(400)]
    assert set(kinds(watched, warming)) == {""}
    rising = np.exp(np.linspace(0, 2, 2000)).tolist()  # slowly: the mean goes along
    assert set(kinds(watched, rising)) == {""}
    assert set(kinds(watched, noisy(3000, spread=0.8))) == {""}  # doubles all the time
    assert set(kinds(watched, [1.0, 50.0, 80.0, 90.0, 2.0, 1.0])) == {""}  # the first steps say little


def test_the_detector_knows_mean_and_spread():
    detector = Detector()
    for loss in noisy(100, spread=0.3):
        detector = detector.after(loss, 1e6)
    logs = np.log(noisy(100, spread=0.3))
    assert detector.count == 100
    np.testing.assert_allclose([detector.mean, math.sqrt(detector.square)], [logs.mean(), logs.std()], rtol=1e-6)
    assert detector.after(-1.0, 2.0) == detector


def test_a_run_that_was_stopped_anywhere_decides_as_one_that_was_not(watched):
    losses = [*noisy(60), 3.0, 3.0, 3.0]
    for stop in (1, 40, 61, 62):
        watch = Guards(watched)
        for n, loss in enumerate(losses[:stop], 1):
            watch.seen(n, numbers(loss))
        watch = Guards(watched, json.loads(json.dumps(watch.facts() | {"tokens_seen": 1.0})))
        verdicts = [watch.seen(n, numbers(loss)) for n, loss in enumerate(losses[stop:], stop + 1)]
        assert [v.kind for v in verdicts] == [""] * (62 - stop) + ["spike"]
        assert verdicts[-1].before == 59  # 61 is the first that is high, and 60 may have done it


def test_a_spike_goes_back_to_a_checkpoint_by_step_from_before_it(watched):
    spike = Verdict(63, "spike", "a loss", numbers(), 59)
    watch = Guards(watched)
    assert watch.target(spike, [40, 50, 57, 60, 63]) == 50  # 57 was saved by the clock, 60 may be too late
    assert watch.target(spike, []) == 0
    with pytest.raises(ConfigError, match="oldest checkpoint left, of step 60, is not from before it; .*train.keep"):
        watch.target(spike, [60])


def test_after_a_spike_all_batches_are_new_and_the_run_gives_up_at_last(watched):
    watch, spike = Guards(watched), Verdict(63, "spike", "a loss", numbers(), 59)
    at_50 = Guards(watched).facts()
    watch = watch.rolled_back(spike, 50, at_50)
    assert watch.jumps == ((50, 14),) and batch_step(50, watch.jumps) == 64  # 0 … 63 may have been taken
    second = watch.rolled_back(Verdict(58, "spike", "a loss", numbers(), 54), 50, at_50)
    assert second.jumps == ((50, 23),) and batch_step(50, second.jumps) == batch_step(58, watch.jumps) + 1
    earlier = watch.rolled_back(Verdict(52, "spike", "a loss", numbers(), 48), 40, at_50)
    assert batch_step(39, earlier.jumps) == 39 and batch_step(40, earlier.jumps) == 67
    later = Guards(watched, json.loads(json.dumps(watch.facts())))
    assert later.jumps == watch.jumps and later.rollbacks == 1
    with pytest.raises(ConfigError, match="rolled back 2 times, as often as config.train.rollbacks allows"):
        second.target(spike, [50])


def test_skipped_steps_say_why(tiny):
    watch = Guards(tiny)
    verdicts = [
        watch.seen(1, numbers()),
        watch.seen(2, numbers(loss=math.nan, skipped=1)),
        watch.seen(3, numbers(norm=math.inf, skipped=2)),
        watch.seen(4, numbers(norm=20.0, skipped=3)),
        watch.seen(5, numbers(skipped=3)),
    ]
    assert [v.kind for v in verdicts] == ["", "skipped", "skipped", "skipped", ""]
    assert "loss is not finite" in verdicts[1].why and "gradient is not finite" in verdicts[2].why
    assert verdicts[3].why == "a gradient norm of 20, an outlier beside the usual 1"


def bad_steps(tiny, workdir, say):
    source = SimpleNamespace(name=lambda index: f"clip {index}")

    def rows(batch):
        return [[Piece(batch, 0, None), Piece(7, 1, None)], []]

    return BadSteps(str(workdir), tiny, source, rows, say)


def test_the_clips_of_a_skipped_step_are_written_down(tiny, tmp_path):
    said = []
    verdict = Guards(tiny).seen(30, numbers(loss=math.nan, skipped=1))
    bad_steps(tiny, tmp_path, said.append).write(verdict, ((20, 5),), [10, 20, 30])
    found = guards.read(str(tmp_path), 30)
    assert found["batch"] == 34 and found["jumps"] == [[20, 5]] and found["checkpoint"] == 20
    assert found["rows"][0] == [
        {"index": 34, "pass": 0, "name": "clip 34"},
        {"index": 7, "pass": 1, "name": "clip 7"},
    ]
    assert found["numbers"]["loss"] == "nan" and found["numbers"]["grad_norm"] == 1.0 and found["seed"] == tiny.seed
    assert said == ["Step 30: the loss is not finite; its update is left out"]
    assert guards.read(str(tmp_path), 31) is None
    assert [(row["step"], row["kind"]) for row in incidents.read(str(tmp_path))] == [(30, "skipped step")]


def test_many_bad_steps_and_a_disk_that_refuses_them_are_told_once(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(guards, "MOST_FILES", 2)
    said = []
    bad = bad_steps(tiny, tmp_path, said.append)
    for n in range(1, 6):
        bad.write(Verdict(n, "skipped", "why", numbers()), (), [])
    assert sorted(p.name for p in (tmp_path / "bad_steps").iterdir()) == ["1.json", "2.json"]
    assert len(said) == 5 + 1 and "holds 2 files" in " ".join(said)
    (tmp_path / "file").write_text("")
    said.clear()
    bad = bad_steps(tiny, tmp_path / "file", said.append)
    for n in range(1, 4):
        bad.write(Verdict(n, "skipped", "why", numbers()), (), [])
    assert len(said) == 3 + 1 and "training goes on" in " ".join(said)


def test_a_factor_that_means_nothing(tiny):
    tiny.train.spike = 0.5
    with pytest.raises(ConfigError, match="config.train.spike=0.5: expected more than 1"):
        guards.check(tiny)
