"""The one file of a TFDS data set that could say what is run, and is looked at before TFDS reads it."""

from __future__ import annotations

import json
import os

from vidgen.config import ConfigError

OWN = "tensorflow_datasets."  # where the classes are that a data set may name
KEYS = ("pythonClassName", "python_class_name", "type")  # under which it names them, now and in older versions


def check_features(directory: str) -> None:
    """Raises ConfigError if DIRECTORY/features.json names a class that isn't TFDS's own.

    TFDS imports the module of each class that the file names, and a data set must not say what is run.
    """
    path = os.path.join(directory, "features.json")
    try:
        with open(path, encoding="utf-8") as file:
            waiting = [json.load(file)]
    except FileNotFoundError:
        return
    except (OSError, ValueError, RecursionError) as error:
        text = " ".join(str(error).split())[:300]
        raise ConfigError(f"{path}: not the features of a data set: {text}") from None
    while waiting:
        node = waiting.pop()
        if isinstance(node, dict):
            for key in KEYS:
                name = node.get(key)
                if isinstance(name, str) and "." in name and not name.startswith(OWN):
                    raise ConfigError(f"{path}: it names {name!r}, whose module would be run; expected TFDS's features")
        waiting += node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
