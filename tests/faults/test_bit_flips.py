import bit_flips
import pytest
import table

pytestmark = pytest.mark.usefixtures("quick_compiles")


def test_the_row_in_its_short_form(tmp_path):
    verdict = table.run(bit_flips.ROW, tmp_path, True, 0, print)
    assert not verdict.wrong and verdict.count > 0, verdict
