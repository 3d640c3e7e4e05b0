"""A table beside its noise: which ratios are no difference, and what is said where nothing was measured."""

import pytest

from mha_book.bench.measured import Row, Table, side_by_side

BASE = Row("base", 1.0, 0.98, 1.03, 2e-3, 4096, 0.5, None, "")
TWIN = Row("the same, again", 1.02, 0.99, 1.04, 2e-3, 4096, 0.49, None, "")
SLOW = Row("slow", 1.5, 1.45, 1.61, 3e-3, 8192, 0.33, None, "")
NONE = Row("impossible", *[None] * 7, "no backward on a CPU")


def test_a_ratio_inside_the_band_is_no_difference():
    table = Table("sample", "forward", [2, 5, 48, 6], [BASE, TWIN, SLOW, NONE])
    assert table.band == pytest.approx(0.03)
    assert [table.is_noise(row) for row in table.rows] == [True, True, False, False]


def test_a_narrower_band_makes_it_one():
    base = Row("base", 1.0, 0.99, 1.01, 2e-3, 4096, 0.5, None, "")
    assert not Table("sample", "forward", [2, 5, 48, 6], [base, TWIN]).is_noise(TWIN)


def test_a_table_that_nobody_measured_says_the_command():
    said = side_by_side({}, "ways", "forward", [1, 2, 3, 3])
    assert "not measured yet" in said and "mha-book bench ways --sizes 1,2,3,3 " in said
