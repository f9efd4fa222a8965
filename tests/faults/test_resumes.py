import pytest
import resumes
import table


def test_the_row_in_its_short_form(tmp_path):
    if reason := resumes.ROW.missing():
        pytest.skip(reason)
    verdict = table.run(resumes.ROW, tmp_path, True, 0, print)
    assert not verdict.wrong and verdict.count > 0, verdict
