"""What is loaded runs nothing, what is named stays in its folder, what is secret is not written."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import make_tiny

from vidgen import cli, ingest, secrets, train
from vidgen import config as configs
from vidgen.config import ConfigError, base, to_json
from vidgen.data.decode import encode
from vidgen.data.shards import ShardSource, read_index
from vidgen.data.sources import open_source
from vidgen.interop import checkpoint, pipelines
from vidgen.scaling import manifest

ROOT = Path(__file__).resolve().parents[1]
# Modules that run what they read, or hand it to what does.
RUNNING = {"pickle", "_pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib", "copyreg", "code", "imp"}
BUILTINS = {"eval", "exec", "compile", "__import__"}
# Calls by attribute that do, unless a keyword says not to.
METHODS = {"read_pickle", "to_pickle", "load_pickle", "system", "popen", "full_load", "unsafe_load", "exec_module"}
# Where one may stand, with the reason. Files that a user names as Python are Python: a config, a sweep.
EXCEPTIONS = {("vidgen/config.py", "exec_module")}
CALLS = {"torch.load", "jnp.load", "yaml.load", "yaml.load_all"}


def python_files():
    for folder in ("vidgen", "launch", "configs"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        lines = [line for c in cells if c["cell_type"] == "code" for line in [*"".join(c["source"]).split("\n"), ""]]
        code = "\n".join(re.sub(r"^(\s*)[%!].*", r"\1pass", line) for line in lines)
        yield path.relative_to(ROOT).as_posix(), code


def running(code):
    """What of some Python code may run what it reads: names of modules and calls."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.split(".")[0] in RUNNING)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in RUNNING:
            yield node.module
        elif isinstance(node, ast.Call):
            said = {k.arg: getattr(k.value, "value", None) for k in node.keywords}
            if isinstance(node.func, ast.Name) and node.func.id in BUILTINS:
                yield node.func.id
            if said.get("shell") or said.get("trust_remote_code") or said.get("allow_pickle"):
                yield "a keyword"
            if isinstance(node.func, ast.Attribute):
                owner = node.func.value.id if isinstance(node.func.value, ast.Name) else ""
                call = f"{owner}.{node.func.attr}"
                if node.func.attr in METHODS:
                    yield node.func.attr
                elif call in CALLS or call in ("np.load", "numpy.load") and said.get("allow_pickle") is not False:
                    yield call


def test_nothing_that_is_loaded_is_run():
    files = dict(python_files())
    assert len(files) > 150
    found = {(path, what) for path, code in files.items() for what in running(code)}
    assert found == EXCEPTIONS


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from cloudpickle import loads",
        "def f():\n    import marshal as m",
        "np.load(p)",
        "np.load(p, allow_pickle=True)",
        "torch.load(p)",
        "yaml.load(t)",
        "eval(t)",
        "exec(t)",
        "__import__(t)",
        "subprocess.run(t, shell=True)",
        "os.system(t)",
        "pd.read_pickle(p)",
        "AutoModel.from_pretrained(d, trust_remote_code=True)",
    ],
)
def test_what_would_run_is_seen(code):
    assert list(running(code))


def test_what_runs_nothing_is_not_taken_for_it():
    code = "np.load(p, allow_pickle=False); yaml.safe_load(t); jax.eval_shape(f); re.compile(t); pickles.load(p)"
    assert not list(running(code))


def shards_of(tmp_path, rows):
    """Ingests a table of (file, caption), of which in/a.mp4 and beside.mp4 are there; the directory of shards."""
    inside = tmp_path / "in"
    inside.mkdir()
    video = encode(np.full((4, 16, 16, 3), 90, np.uint8), 8)
    (inside / "a.mp4").write_bytes(video)
    (tmp_path / "beside.mp4").write_bytes(video)
    os.symlink("loop.mp4", inside / "loop.mp4")
    os.symlink("/etc/passwd", inside / "link.mp4")
    table = inside / "clips.jsonl"
    table.write_text("\n".join(json.dumps({"video": name, "caption": text}) for name, text in rows))
    ingest.run(str(table), str(tmp_path / "shards"), threads=1)
    return tmp_path / "shards"


def test_names_in_a_table_lead_to_no_file_outside_the_output(tmp_path):
    good = ["a.mp4", "../beside.mp4", str(tmp_path / "beside.mp4")]
    bad = ["n\0l.mp4", "x" * 5000, "y" * 300 + ".mp4", "..", "/etc/passwd", "loop.mp4", "link.mp4", "\ud800.mp4"]
    before = set(tmp_path.rglob("*"))
    out = shards_of(tmp_path, [(name, "../../../etc/x\0y") for name in [*good, *bad]])
    made = set(tmp_path.rglob("*")) - before
    assert {p.parent for p in made if p.parent not in (tmp_path, tmp_path / "in")} == {out}
    assert len([json.loads(line) for line in (out / "dropped.jsonl").read_text().splitlines()]) == len(bad)
    rows = read_index(out)
    assert [row.source for row in rows] == ["a.mp4", "../beside.mp4", str(tmp_path / "beside.mp4")]
    assert ShardSource(out).read(2, 0).caption == "../../../etc/x y"


def test_a_file_whose_name_is_no_utf8_is_a_clip(tmp_path):
    folder = os.fsencode(tmp_path / "in")
    os.mkdir(folder)
    for name, data in ((b"\xff.mp4", encode(np.full((4, 16, 16, 3), 90, np.uint8), 8)), (b"\xff.txt", b"a wall")):
        Path(os.fsdecode(os.path.join(folder, name))).write_bytes(data)
    ingest.run(str(tmp_path / "in"), str(tmp_path / "shards"), threads=1)
    (row,) = read_index(tmp_path / "shards")
    assert row.source == "\\udcff.mp4" and ShardSource(tmp_path / "shards").read(0, 0).caption == "a wall"


def test_a_data_set_names_no_code(tmp_path, monkeypatch):
    shards = shards_of(tmp_path, [("a.mp4", "a wall")])
    (tmp_path / "planted.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    path = shards / "features.json"
    text = path.read_text()
    path.write_text(text.replace("tensorflow_datasets.core.features.text_feature.Text", "planted.Text", 1))
    for source in (str(shards), f"tfds:{shards}"):
        data = base().data
        data.source = source
        with pytest.raises(ConfigError, match="names 'planted.Text'.*expected TFDS's"):
            open_source(data, "train")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a/b", ".."])
def test_names_in_weights_stay_in_their_directory(tmp_path, name):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    index = tmp_path / "model" / f"{checkpoint.TENSORS.removesuffix('.safetensors')}{checkpoint.INDEX}"
    index.write_text(json.dumps({"weight_map": {"w": name if name == ".." else f"{name}.safetensors"}}))
    with pytest.raises(ConfigError, match="expected a safetensors file in the same directory"):
        checkpoint._files(str(tmp_path / "model"))
    (tmp_path / "pipe").mkdir()
    (tmp_path / "pipe" / checkpoint.PIPELINE).write_text(json.dumps({name: ["diffusers", "X"]}))
    with pytest.raises(ConfigError, match="expected the name of a directory"):
        pipelines.read_index(str(tmp_path / "pipe"))


PLANTED = {
    "HF_TOKEN": "hf_" + "Qx7" * 10,
    "WANDB_API_KEY": "0f1e2d3c4b" * 4,
    "AWS_ACCESS_KEY_ID": "AKIA" + "Z7Q4" * 4,
    "AWS_SECRET_ACCESS_KEY": "wJalr/XUtnFEMI+K7MDENGbPxRfiCY" + "k" * 10,
    "DB_PASSWORD": "tr0ub4dor&3",
}


@pytest.mark.parametrize("name", PLANTED)
def test_secrets_are_blanked_out_wherever_they_stand(name):
    secret = PLANTED[name].partition("&")[0]
    for text in (
        f"{name}={PLANTED[name]}",
        f"export {name}='{PLANTED[name]}'",
        f"--{name.lower()} {PLANTED[name]}",
        f"cannot read s3://me:{secret}@bucket/x: denied",
        f"GET https://host/x?a=1&token={secret}&b=2",
        json.dumps({"env": {name: PLANTED[name]}}),
        f"Authorization: Bearer {secret}",
        f"vidgen train: error: headers: Authorization: Bearer {secret}",
        f"a flag that is not known: {name}={PLANTED[name]}",
    ):
        found = secrets.redacted(text)
        assert secret not in found and "***" in found, text
    tree = {"env": [{name: PLANTED[name], "steps": 3}], "tokens_seen": 5, "token": 7}
    assert secrets.redacted(tree) == {"env": [{name: "***", "steps": 3}], "tokens_seen": 5, "token": 7}


@pytest.mark.parametrize(
    "text",
    [
        "config.rows.tokens=1024: expected 64 to 512; nearest: 512",
        "the text encoder 0123456789abcdef encodes online, captions of at most 77 tokens",
        "tokens_seen: 12345678901234567890, tokenizer: wavelet, config.tokenizer.weights=/a/b@c",
        "http://localhost:8080/a@b, gs://bucket/a@b, ssh://git@host/x",
        "token: expected a word; a token of 12 bytes; rows.tokens is missing",
        "clip walks/a.mp4@1.500s+17 (index 3) is left out: checksum differs",
        "process 1 of 4 could not join the others at 127.0.0.1:1234",
        "code 3df8774c1b2a3948576a7b8c9d0e1f2a3b4c5d6e",
        "eyJhbGciOi",
    ],
)
def test_what_is_no_secret_stays(text):
    assert secrets.redacted(text) == text


def test_a_long_text_is_looked_through_once():
    for text in ("a" * 10**6, "a_-" * 10**5):  # as many steps as the square of it would take hours
        assert secrets.redacted(text) == text


def test_no_setting_is_called_like_a_secret():
    flat = configs._leaves(base())
    assert not [key for key in flat if secrets.names_secret(key)] and not secrets.credentials(flat)


@pytest.mark.parametrize(
    "key, value",
    [
        ("train.checkpoints", "s3://AKIAZ7Q4Z7Q4Z7Q4Z7Q4:abc/def@bucket/run"),
        ("train.checkpoints", "https://store/run?X-Amz-Signature=0123abcd&x=1"),
        ("train.wandb", "hf_" + "Qx7" * 10),
        ("sample.prompts", ("a cat", "ghp_" + "a1B2" * 9)),
    ],
)
def test_credentials_in_a_config_are_found(key, value):
    config = make_tiny()
    config = configs.override(config, {key: value})
    assert secrets.credentials(configs._leaves(config)) == [key]
    assert secrets.redacted(to_json(config)) != to_json(config)
    assert secrets.credentials(configs._leaves(make_tiny())) == []


GUARDED = """
import logging, sys, threading
from vidgen import secrets

secrets.guard()
secrets.guard()
held = "https://store/a?X-Goog-Signature=0123abcd token=hf_" + "Qx7" * 10
logging.getLogger("some.library").warning("asked for %s", held)
try:
    raise OSError(held)
except OSError:
    logging.exception("it failed")
thread = threading.Thread(target=lambda: int(held))
thread.start()
thread.join()
raise RuntimeError(held)
"""


def test_tracebacks_and_logs_hold_no_credential():
    done = subprocess.run(
        [sys.executable, "-c", GUARDED], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.count("Traceback") == 3 and done.stderr.count("it failed") == 1
    assert "asked for https://store/a?X-Goog-Signature=***" in done.stderr
    assert "RuntimeError: https://store/a?X-Goog-Signature=***" in done.stderr.splitlines()[-1]
    assert "0123abcd" not in done.stderr and "hf_Qx7" not in done.stderr


def test_no_file_of_a_workdir_holds_a_secret_of_the_environment(tmp_path, monkeypatch, capfd):
    for name, value in PLANTED.items():
        monkeypatch.setenv(name, value)
    config = make_tiny()
    config.train.update(steps=2, checkpoint_every=2)
    train.run(config, str(tmp_path / "run"))
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    said = [path.read_bytes() for path in files] + ["".join(capfd.readouterr()).encode()]
    assert len(files) > 5
    assert not [name for name, value in PLANTED.items() if any(value.encode() in text for text in said)]


LISTENING = """
import glob, os, socket, sys
import jax, jax.numpy as jnp
from vidgen.parallel import processes

processes.start()
processes.barrier("to be there")
told = processes.Pulse(1)
told(1), told(2)
sockets = [os.readlink(f) for f in glob.glob("/proc/self/fd/*") if os.path.exists(f) or os.path.islink(f)]
for kind, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
    for line in open(f"/proc/self/net/{kind}").read().splitlines()[1:]:
        _, local, _, state, *_, inode = line.split()[:10]
        if state == "0A" and f"socket:[{inode}]" in sockets:
            raw = bytes.fromhex(local.partition(":")[0])
            print("LISTENS", socket.inet_ntop(family, b"".join(raw[i : i + 4][::-1] for i in range(0, len(raw), 4))))
processes.barrier("to have looked")
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/net/tcp"), reason="only Linux says who listens")
def test_processes_of_one_machine_listen_on_its_loopback_alone(tmp_path):
    (tmp_path / "listening.py").write_text(LISTENING)
    command = [ROOT / "launch/local.py", f"--logs={tmp_path}", "--", tmp_path / "listening.py"]
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    logs = [(tmp_path / f"rank-{rank}.log").read_text() for rank in range(2)]
    found = [re.findall(r"^LISTENS (\S+)$", log, re.MULTILINE) for log in logs]
    assert len(found[0]) >= 2 and len(found[1]) >= 1  # the coordinator, and gloo
    assert {address.removeprefix("::ffff:") for address in sum(found, [])} <= {"127.0.0.1", "::1"}


def test_a_config_with_a_credential_is_refused():
    config = configs.override(make_tiny(), {"train.checkpoints": "s3://AKIAZ7Q4Z7Q4Z7Q4Z7Q4:abc/def@bucket/run"})
    with pytest.raises(ConfigError, match="config.train.checkpoints holds a credential.*environment") as e:
        configs.check(config)
    assert "abc/def" not in str(e.value)


def test_an_error_line_has_no_secret(capsys):
    with pytest.raises(SystemExit):
        cli.main(["inspect", "s3://me:tr0ub4dor@bucket/c"])
    said = capsys.readouterr().err
    assert "tr0ub4dor" not in said and "***@bucket/c" in said


@pytest.mark.parametrize("name", ["../x", "/etc/x", "..", ""])
def test_a_run_of_a_sweep_stays_in_its_folder(tmp_path, name):
    run = {"name": name, "settings": {}, "labels": {}, "varied": []}
    found = {"config": "c.py", "suites": [], "prompts": 1, "runs": [run]}
    (tmp_path / "manifest.json").write_text(json.dumps(found))
    with pytest.raises(ConfigError, match="is no name of a folder"):
        manifest.read(str(tmp_path))
