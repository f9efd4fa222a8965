"""What is not finite has no word in JSON."""

import json

from vidgen.plain import plain


def test_what_is_not_finite_becomes_null():
    found = {"a": (float("nan"), 1.0), "b": [{"c": -float("inf"), "d": True, "e": "inf"}]}
    assert plain(found) == {"a": [None, 1.0], "b": [{"c": None, "d": True, "e": "inf"}]}
    assert json.loads(json.dumps(plain(found), allow_nan=False)) == plain(found)
