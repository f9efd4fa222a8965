"""Settings: one tree, clear errors."""

import glob
import math
import os

import pytest

from vidgen import config as configs
from vidgen.config import ConfigError
from vidgen.ranges import RANGES

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def test_json_round_trip():
    c = configs.override(configs.base(), {"data.moving_shapes.sizes": "((9, 24, 24), (1, 32, 32))", "seed": 3})
    back = configs.from_json(configs.to_json(c))
    assert back.to_dict() == c.to_dict()
    assert configs.difference(back, c) == []
    assert configs.difference(configs.base(), c) == ["data.moving_shapes.sizes", "seed"]


@pytest.mark.parametrize(
    ("key", "value", "read"),
    [
        ("train.steps", "200", 200),
        ("optimizer.lr", "3e-4", 3e-4),
        ("optimizer.lr", "1", 1.0),
        ("model.time_in_seconds", "true", True),
        ("tokenizer.stride", "(2, 4, 4)", (2, 4, 4)),
        ("data.source", "tfds:mine", "tfds:mine"),
        ("sample.prompts", "['a', 'b']", ("a", "b")),
    ],
)
def test_command_line_values_take_the_type_of_the_default(key, value, read):
    c = configs.override(configs.base(), {key: value})
    for part in key.split("."):
        c = c[part]
    assert c == read and type(c) is type(read)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("train.steps", "many"),
        ("train.steps", "1.5"),
        ("optimizer.lr", "True"),
        ("sample.prompts", "'a red circle'"),
        ("tokenizer.stride", "('a', 1, 2)"),
        ("tokenizer.stride", "(4, 8, 8.5)"),
    ],
)
def test_a_value_of_another_type_is_refused(key, value):
    with pytest.raises(ConfigError, match=f"config.{key}=.*expected"):
        configs.override(configs.base(), {key: value})


def test_an_unknown_key_names_the_nearest():
    with pytest.raises(ConfigError, match="unknown setting config.train.step; did you mean config.train.steps"):
        configs.override(configs.base(), {"train.step": 3})


def test_the_tree_is_locked():
    with pytest.raises(AttributeError):
        configs.base().train.stepz = 5


@pytest.mark.parametrize(
    ("key", "value", "near"),
    [
        ("model.heads", 0, "1"),
        ("tokenizer.std", 0.0, "1e-06"),
        ("optimizer.ema", 2.0, "1"),
        ("optimizer.lr", math.inf, "1000"),
    ],
)
def test_a_number_out_of_range_names_the_nearest(key, value, near):
    with pytest.raises(ConfigError, match=f"config.{key}=.*nearest: {near}"):
        configs.check(configs.override(configs.base(), {key: value}))


def test_ranges_are_of_settings_that_are():
    assert RANGES.keys() <= set(configs._leaves(configs.base()))


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("pass", "returned NoneType; expected a ConfigDict"),
        ("import ml_collections; return ml_collections.ConfigDict()", "no clips.image_steps; start from"),
        ("c = config.base(); c.train.stepz = 5; return c", "AttributeError.*stepz"),
        ("c = config.base(); c.train.steps = 0; return c", "config.train.steps=0: expected 1"),
    ],
)
def test_a_file_that_makes_no_config_is_told(tmp_path, body, says):
    path = tmp_path / "c.py"
    path.write_text(f"from vidgen import config\ndef get_config(arg=''):\n    {body}\n")
    with pytest.raises(ConfigError, match=says):
        configs.load(str(path))


def test_overriding_leaves_the_original_alone():
    c = configs.base()
    configs.override(c, {"train.steps": 7})
    assert c.train.steps == configs.base().train.steps


def test_a_missing_file_names_the_nearest(tmp_path):
    (tmp_path / "small.py").write_text("def get_config(arg=''): ...")
    with pytest.raises(ConfigError, match="no such file; did you mean .*small.py"):
        configs.load(str(tmp_path / "smal.py"))


def test_a_broken_file_is_told_in_one_line(tmp_path):
    path = tmp_path / "broken.py"
    path.write_text("def get_config(arg):\n    return undefined\n")
    with pytest.raises(ConfigError, match="broken.py: NameError"):
        configs.load(str(path))
    path.write_text("x = 1\n")
    with pytest.raises(ConfigError, match="get_config"):
        configs.load(str(path))


@pytest.mark.parametrize("path", sorted(glob.glob(os.path.join(ROOT, "configs", "*.py"))), ids=os.path.basename)
def test_every_config_loads_and_has_the_keys_of_the_base(path):
    argument = {"wan_a14b.py": ":high"}.get(os.path.basename(path), "")
    if os.path.basename(path) == "finetune.py":
        with pytest.raises(ConfigError, match="expected .*vidgen import"):
            configs.load(path)
        return
    c = configs.load(path + argument)
    assert configs.from_json(configs.to_json(c)).to_dict() == c.to_dict()


def test_a_config_passes_its_argument(tmp_path):
    path = tmp_path / "c.py"
    path.write_text(
        "from vidgen import config\n"
        "def get_config(arg=''):\n    c = config.base()\n    c.seed = int(arg or 0)\n    return c\n"
    )
    assert configs.load(f"{path}:7").seed == 7 and configs.load(str(path)).seed == 0


def test_a_workdir_of_before_places_had_names_can_be_read():
    text = configs.to_json(configs.base())
    assert configs.from_json(text.replace('"absolute": "projected"', '"absolute": true')).model.absolute == "projected"
    assert configs.from_json(text.replace('"absolute": "projected"', '"absolute": false')).model.absolute == "none"
