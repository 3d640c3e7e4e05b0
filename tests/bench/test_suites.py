"""Only what computes the same is raced: outputs and gradients of every contest, and steps that can be taken again."""

from dataclasses import replace

import pytest
import torch

from mha_book.bench import suites_flex
from mha_book.bench.suites import Setting, backends, decode, layers, no_compiler, ways
from mha_book.bench.suites_flex import flex
from mha_book.bench.suites_language import language

pytestmark = pytest.mark.usefixtures("own_messages")
SMALL = Setting(2, 9, 48, 6, torch.device("cpu"), torch.float32)
MODES = {("forward", False), ("forward", True), ("forward and backward", True), ("one token", False)}


def results(contest, call):
    "The output; where it is a whole training step, the gradients of the inputs."
    for t in contest.inputs:
        t.grad = None
    y = call()
    return [t.grad for t in contest.inputs] if y is None else [y.detach()]


def check_equal(contest):
    "AssertionError where a call computes something else than the first one, or where there is nothing to compare."
    with torch.set_grad_enabled(contest.train):
        calls = [call for name, call in contest.calls.items() if name not in contest.others]
        wanted, *others = (results(contest, call) for call in calls)
    assert others and all(t.abs().max() > 1e-3 for t in wanted)
    for got in others:
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-4)


def test_all_calls_of_a_contest_compute_the_same():
    seen = set()
    for suite in (layers, ways, backends, decode):
        for contest in suite(SMALL):
            check_equal(contest)
            seen.add((contest.mode.split(",")[0], contest.train))
    assert seen == MODES


@pytest.mark.parametrize("suite", [layers, decode])
def test_a_call_that_computes_something_else_is_seen(suite):
    contest = next(suite(SMALL))
    name, call = list(contest.calls.items())[-1]
    for other in ({name: lambda: call() * 1.01}, {}):
        calls = {key: one for key, one in contest.calls.items() if key != name} if other else {name: call}
        with pytest.raises(AssertionError):
            check_equal(replace(contest, calls=calls | other))


def test_a_step_of_a_language_model_can_be_timed_again():
    at = Setting(2, 5, 24, 3, torch.device("cpu"), torch.float64)
    for contest in language(at):
        with torch.no_grad():
            for call in contest.calls.values():
                assert torch.equal(call(), call())


FLEX = Setting(1, 64, 64, 4, torch.device("cpu"), torch.float32)


def uncompiled(function, inputs, options, dynamic=None):
    "Stands for a compiler."
    return function, 0.1


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_kernels_of_flexattention_compute_what_they_are_raced_for_and_say_so_where_they_do_not(monkeypatch):
    monkeypatch.setattr(suites_flex, "compile_now", uncompiled)
    for contest in flex(FLEX):
        check_equal(contest)
        first, *rest = contest.calls.values()
        assert set(contest.others) | set(contest.notes) == set(contest.calls)
        assert all("no window" in name for name in contest.others)
        for name in contest.others:
            assert (contest.calls[name]() - first()).abs().max() > 0.01, "it says that it is something else"
        assert all(float(note.split()[-1]) < 1e-5 for note in contest.notes.values())


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_a_kernel_with_another_window_is_seen(monkeypatch):
    monkeypatch.setattr(suites_flex, "compile_now", uncompiled)
    add = suites_flex._add_kernel
    monkeypatch.setattr(suites_flex, "_add_kernel", lambda *args: add(*args[:3], args[3] + 1, *args[4:]))
    contest = next(flex(FLEX))
    assert float(contest.notes["FlexAttention, compiled"].split()[-1]) > 0.01
    with pytest.raises(AssertionError):
        check_equal(contest)


def test_a_kernel_of_flexattention_is_compiled():
    if reason := no_compiler(torch.device("cpu")):
        pytest.skip(reason)
    contest = next(flex(FLEX))
    check_equal(contest)
    assert list(contest.compile_seconds) == ["FlexAttention, compiled", "FlexAttention, compiled, no window"]
    assert all(seconds > 0.01 for seconds in contest.compile_seconds.values())
