import kills
import pytest
import table


def test_the_row_in_its_short_form(tmp_path):
    if reason := kills.ROW.missing():
        pytest.skip(reason)
    verdict = table.run(kills.ROW, tmp_path, True, 0, print)
    assert not verdict.wrong and verdict.count > 0, verdict


def test_the_median_of_what_was_lost_is_judged_where_there_are_enough():
    def verdict(*losses):
        found = [{"how": "rank", "lost": seconds, "steps": 1} for seconds in losses]
        return kills.judge([{"wrong": [], "alike": True, "found": found}])

    within, beyond = kills.INTERVAL - 0.1, kills.INTERVAL + 0.1
    assert not verdict(*[within] * 6, *[beyond] * 5).wrong
    assert "more than the 3 s between checkpoints" in verdict(*[within] * 5, *[beyond] * 6).wrong[0]
    alone = verdict(beyond)
    assert not alone.wrong and alone.lost == beyond
