"""The notebooks run from top to bottom, on a few steps."""

import glob
import os

import nbformat
import pytest
from nbclient import NotebookClient

# What a notebook shows: (GIFs, pages, what is printed).
SHOWN = {
    "quickstart.ipynb": (2, 1, ("all_right", "fill 100.0%")),
    "finetune.ipynb": (2, 0, ("pytorch_lora_weights.safetensors", "model_index.json", "merged")),
}
FOLDER = os.path.join(os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))), "notebooks")


@pytest.mark.parametrize("path", sorted(glob.glob(os.path.join(FOLDER, "*.ipynb"))), ids=os.path.basename)
def test_a_notebook_runs(path, tmp_path, monkeypatch):
    monkeypatch.setenv("VIDGEN_STEPS", "3")
    monkeypatch.setenv("VIDGEN_WORKDIR", str(tmp_path))
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": FOLDER}}).execute()
    shown = [kind for cell in notebook.cells for out in cell.get("outputs", []) for kind in out.get("data", {})]
    told = "".join(out.get("text", "") for cell in notebook.cells for out in cell.get("outputs", []))
    gifs, pages, words = SHOWN[os.path.basename(path)]
    assert shown.count("image/gif") == gifs and shown.count("text/html") == pages
    assert all(word in told for word in words)
