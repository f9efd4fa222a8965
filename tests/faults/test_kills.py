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
        asked = [["rank", "running"] for _ in losses]
        found += [{"how": "rank", "inside": False, "starting": False} for _ in losses]
        return kills.judge([{"wrong": [], "alike": True, "asked": asked, "found": found}])

    within, beyond = kills.INTERVAL - 0.1, kills.INTERVAL + 0.1
    assert not verdict(*[within] * 6, *[beyond] * 5).wrong
    assert "more than the 3 s between checkpoints" in verdict(*[within] * 5, *[beyond] * 6).wrong[0]
    alone = verdict(beyond)
    assert not alone.wrong and alone.lost == beyond


def test_blows_that_were_not_dealt_prove_nothing():
    trials = kills.trials(False, 0)

    def verdict(dealt):
        """All of them as asked for, in and out of saves, where `dealt` says so."""
        results = []
        for trial in trials:
            asked = [[blow["how"], blow["moment"]] for blow in trial["blows"]]
            given = [{"how": a, "inside": b == "saving", "starting": False} for a, b in asked]
            found = [{"how": g["how"], "missed": True} if not dealt(n, g) else g for n, g in enumerate(given)]
            results.append({"wrong": [], "alike": True, "asked": asked, "found": found})
        return kills.judge(results)

    assert not verdict(lambda n, blow: True).wrong
    assert "only 0 of 100 blows were dealt" in verdict(lambda n, blow: False).wrong
    few = verdict(lambda n, blow: n != 9)
    assert few.wrong == ("only 90 of 100 blows were dealt",) and few.held.endswith("; 10 blows struck nobody")
    assert "never dealt: stop" in verdict(lambda n, blow: blow["how"] != "stop").wrong
    assert "never dealt: inside a save" in verdict(lambda n, blow: not blow["inside"]).wrong
