import full_disk
import pytest
import table


def test_the_row_in_its_short_form(tmp_path):
    if reason := full_disk.ROW.missing():
        pytest.skip(reason)
    verdict = table.run(full_disk.ROW, tmp_path, True, 0, print)
    assert not verdict.wrong and verdict.count > 0, verdict
