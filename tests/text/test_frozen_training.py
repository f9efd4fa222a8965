"""A denoiser that attends to a frozen encoder: it trains, is judged and sampled, and the encoder must stay the same."""

import numpy as np
import pytest
import text_weights

from vidgen import sample, train
from vidgen.config import ConfigError
from vidgen.training import restored

pytest.importorskip("tokenizers")
pytestmark = pytest.mark.usefixtures("quick_compiles")


def test_a_run_from_captions_to_videos(tiny, tmp_path, capsys):
    encoder = text_weights.make_encoder(tmp_path)
    tiny.text.update(name="umt5", weights=encoder, pad=24)
    tiny.rows.update(caption=24, text=96)
    tiny.objective.caption_dropout = 0.5
    tiny.train.update(steps=2, log_every=1, checkpoint_every=1, eval_every=2, eval_rows=4)
    result = train.run(tiny, str(tmp_path / "run"))
    assert result.step == 2 and np.isfinite([result.metrics["loss"], result.metrics["heldout_loss"]]).all()
    config, generator, params, _ = restored.load(str(tmp_path / "run"))
    assert "text" not in params  # nothing of an encoder trains
    assert generator.text.directory == encoder

    long = "a red ball moves right. " * 9
    prompts = ["a red ball moves right", long]
    found = sample.run(str(tmp_path / "run"), prompts, str(tmp_path / "a.gif"), negative="blue")
    assert "cut to its first 24 tokens, as long as captions were in training" in capsys.readouterr().err
    red, _ = (row[0] for row in found.videos)
    assert red.shape == (5, 16, 16, 3)
    alone = sample.draw(config, generator, params, prompts[:1], seeds=[0], negative="blue")[0]
    assert np.abs(alone.astype(int) - red).max() <= 1
    texts = sample.encode_prompts(config, generator, ["red", "", "red"])
    assert list(texts) == ["red", ""] and texts[""].shape == (24, 16) and not texts[""][1:].any()

    # The same run, with other weights where its encoder was.
    tiny.train.steps = 3
    text_weights.rewrite(encoder, lambda flat: flat["norm/scale"].__imul__(2))
    for call in (lambda: train.run(tiny, str(tmp_path / "run")), lambda: restored.load(str(tmp_path / "run"))):
        with pytest.raises(ConfigError, match="config.text.weights=.*, but the checkpoint was trained with"):
            call()
