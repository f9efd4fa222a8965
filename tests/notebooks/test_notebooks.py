"""The notebooks run from top to bottom, on a few steps."""

import collections
import glob
import os

import nbformat
import pytest
from nbclient import NotebookClient

# What a notebook shows: (how many of which kind, what is printed).
SHOWN = {
    "quickstart.ipynb": ({"image/gif": 2, "text/html": 1}, ("all_right", "fill 100.0%")),
    "finetune.ipynb": ({"image/gif": 2}, ("pytorch_lora_weights.safetensors", "model_index.json", "merged")),
    "own_videos.ipynb": (
        {"image/png": 1, "image/gif": 2, "text/html": 1},
        ("accepted 12", "clip12.mp4: truncated", "clip13.mp4: missing caption", "psnr_mean", "0 captions cut"),
    ),
    "plan_a_pod.ipynb": ({"image/svg+xml": 6}, ("9,911,534,592", "fsdp=7: config.mesh", "by the estimate")),
    "scaling_law.ipynb": (
        {"image/svg+xml": 2, "text/html": 1},
        ("not in the fit", "loss is NaN at step 90", "tokens follow parameters along one line", "without a law"),
    ),
}
FOLDER = os.path.join(os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))), "notebooks")


@pytest.mark.parametrize("path", sorted(glob.glob(os.path.join(FOLDER, "*.ipynb"))), ids=os.path.basename)
def test_a_notebook_runs(path, tmp_path, monkeypatch):
    for name in ("VIDGEN_PIPELINE", "VIDGEN_VIDEOS", "VIDGEN_CONFIG", "VIDGEN_TABLE"):  # the user's own data
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("VIDGEN_STEPS", "3")
    monkeypatch.setenv("VIDGEN_WORKDIR", str(tmp_path))
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": FOLDER}}).execute()
    outputs = [out for cell in notebook.cells for out in cell.get("outputs", [])]
    shown = collections.Counter(kind for out in outputs for kind in out.get("data", {}) if kind != "text/plain")
    told = "".join(out.get("text", "") for out in outputs)
    kinds, words = SHOWN[os.path.basename(path)]
    assert shown == kinds
    assert [word for word in words if word not in told] == []


@pytest.mark.parametrize("path", sorted(glob.glob(os.path.join(FOLDER, "*.ipynb"))), ids=os.path.basename)
def test_a_notebook_is_committed_without_outputs(path):
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    assert cells and not any(cell.outputs or cell.execution_count for cell in cells)
