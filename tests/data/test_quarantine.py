import json
import os

import jax
import numpy as np
import pytest
from conftest import make_tiny
from corrupt import KINDS, make_corrupt_set, name
from jax.sharding import Mesh

from vidgen import inspect
from vidgen.data import quarantine
from vidgen.data.feed import batches, plan
from vidgen.data.quarantine import Quarantine
from vidgen.data.sources import open_source
from vidgen.data.stream import FeedInfo
from vidgen.parallel.mesh import AXES
from vidgen.tokenizers import base as tokenizers


def info(*clips, reason="broken"):
    return FeedInfo(0.0, {reason: len(clips)}, tuple((f"clip-{i}", reason) for i in clips), tuple(clips))


def noted(workdir):
    return [(note["index"], note["step"]) for note in quarantine.read(str(workdir))]


@pytest.fixture(scope="module")
def corrupt(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corrupt") / "shards"
    return str(folder), make_corrupt_set(folder, records=400, corrupt=40, seed=3, shard_bytes=2**17)


def test_a_pass_notes_exactly_the_corrupt_clips(corrupt, tmp_path):
    folder, expected = corrupt
    assert len(expected) == 40 and set(expected.values()) == set(KINDS.values())
    config = make_tiny()
    config.data.source = folder
    source = open_source(config.data, "train")
    tokenizer = tokenizers.from_config(config.tokenizer)
    packing = plan(source, tokenizer, config)
    mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1, 1), AXES)
    notes, seen = Quarantine(str(tmp_path)), set()
    half = packing.steps_per_epoch // 2
    for first, last in ((0, half), (half - 3, packing.steps_per_epoch)):  # stopped, and resumed three steps before
        with batches(source, packing, tokenizer, config, first, mesh) as feed:
            for step in range(first, last):
                batch, said = next(feed)
                notes.add(step + 1, said)
                seen |= set(np.asarray(batch.clip).ravel().tolist())
        notes.close()
        notes = Quarantine(str(tmp_path))
    lines = [json.loads(line) for line in (tmp_path / "quarantine.jsonl").read_text().splitlines()]
    assert {line["index"]: line["reason"] for line in lines} == expected and len(lines) == 40
    assert all(line["name"] == name(line["index"]) for line in lines)
    assert seen - {-1} == set(range(400)) - set(expected)  # and all others were trained on
    first = {p.clip: step + 1 for step in reversed(range(last)) for row in packing.step(step) for p in row}
    assert {line["index"]: line["step"] for line in lines} == {i: first[i] for i in expected}


def test_each_clip_once_also_when_a_run_goes_on(tmp_path):
    one = Quarantine(str(tmp_path))
    one.add(1, info())
    assert not os.listdir(tmp_path)
    one.add(2, info(7, 3))
    one.add(3, info(7))
    again = Quarantine(str(tmp_path))
    again.add(2, info(3, 9))
    assert noted(tmp_path) == [(3, 2), (7, 2), (9, 2)]
    assert len((tmp_path / "quarantine.jsonl").read_text().splitlines()) == 3


def test_several_processes_write_files_of_their_own_and_one_has_all(tmp_path):
    first, second = Quarantine(str(tmp_path), 0), Quarantine(str(tmp_path), 1)
    first.add(5, info(1))
    second.add(3, info(1, 2))  # in the next pass another process may have the same clip
    assert noted(tmp_path) == [(1, 3), (2, 3)]
    second.close()
    first.close()
    lines = [json.loads(line) for line in (tmp_path / "quarantine.jsonl").read_text().splitlines()]
    assert [(line["index"], line["step"]) for line in lines] == [(1, 3), (2, 3)]
    alone = Quarantine(str(tmp_path))  # one process goes on
    alone.add(9, info(1, 2, 4))
    assert noted(tmp_path) == [(1, 3), (2, 3), (4, 9)]
    assert len((tmp_path / "quarantine.jsonl").read_text().splitlines()) == 3


def test_a_line_without_its_end_costs_nothing_else(tmp_path):
    one = Quarantine(str(tmp_path))
    one.add(1, info(1))
    path = tmp_path / "quarantine.jsonl"
    path.write_bytes(path.read_bytes() + b'{"name": "clip-2", "ind')
    again = Quarantine(str(tmp_path))
    again.add(4, info(2, 3))
    assert noted(tmp_path) == [(1, 1), (2, 4), (3, 4)]


def test_a_full_disk_is_told_of_once_and_what_it_refused_is_written_later(tmp_path, monkeypatch, caplog):
    one = Quarantine(str(tmp_path))
    one.add(1, info(1))
    with monkeypatch.context() as m:
        m.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, os.strerror(28))))
        one.add(2, info(2))
        one.add(3, info(3))
        assert noted(tmp_path) == [(1, 1)]
    one.add(4, info())
    assert noted(tmp_path) == [(1, 1), (2, 2), (3, 3)]
    assert len([r for r in caplog.records if "No space left" in r.getMessage()]) == 1
    gone = Quarantine(str(tmp_path / "gone"))
    (tmp_path / "gone").write_bytes(b"a file")  # where the workdir should be
    gone.add(1, info(1))
    gone.close()


def test_inspect_lists_what_a_run_could_not_read(tmp_path, capsys):
    (tmp_path / "config.json").write_text("{}")
    assert inspect.run(str(tmp_path))["quarantined"] == 0
    notes = Quarantine(str(tmp_path))
    notes.add(3, info(*range(30)))
    notes.add(8, info(77, reason="checksum differs"))
    report = inspect.run(str(tmp_path))
    assert report["quarantined"] == 31 and report["reasons"] == {"broken": 30, "checksum differs": 1}
    assert report["clips"][-1] == {"name": "clip-77", "index": 77, "reason": "checksum differs", "step": 8}
    said = capsys.readouterr().out
    assert "clip-2 (index 2): broken, first at step 3" in said and "quarantine.jsonl" in said
