"""The instruments of `mha_book.testing` measure what they say."""
import pytest
import torch

from mha_book.testing import assert_as_exact, time_ratios

EXACT = torch.linspace(-1, 1, 50, dtype=torch.float64)


def off_by(error, dtype):
    "Numbers of which one is off by `error`."
    wrong = EXACT.clone()
    wrong[7] += error
    return wrong.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_rule_allows_twice_the_plain_error_and_no_more(dtype):
    eps = torch.finfo(dtype).eps
    plain = off_by(100 * eps, dtype)
    allowed = 2 * (plain.double() - EXACT).abs().max().item() + 4 * eps
    assert_as_exact(off_by(0.9 * allowed, dtype), EXACT, plain, 1.0)
    with pytest.raises(AssertionError, match=r"at \(7,\), allowed"):
        assert_as_exact(off_by(1.1 * allowed, dtype), EXACT, plain, 1.0)


def test_float64_is_held_to_1e_12():
    assert_as_exact(off_by(0.9e-12, torch.float64), EXACT, EXACT + 1, 1.0)
    with pytest.raises(AssertionError):
        assert_as_exact(off_by(1.1e-12, torch.float64), EXACT, EXACT + 1, 1.0)


@pytest.mark.parametrize("wrong", [EXACT[:49], EXACT.float() * torch.nan])
def test_other_shapes_and_nan_are_refused(wrong):
    with pytest.raises(AssertionError):
        assert_as_exact(wrong, EXACT, EXACT, 1.0)


@pytest.mark.parametrize("plain", [EXACT.float() / 0, EXACT.float()[:1]])
def test_a_reference_that_is_none_is_refused(plain):
    with pytest.raises(AssertionError):
        assert_as_exact(EXACT.float(), EXACT, plain, 1.0)


def test_timing_restores_the_threads():
    before = torch.get_num_threads()
    ratios = time_ratios({"a": lambda: None, "b": lambda: None}, rounds=3, min_seconds=1e-4)
    assert torch.get_num_threads() == before and set(ratios) == {"a", "b"} and ratios["a"].seconds > 0
