"""Rounding one step at a time, the tolerance rule, and what `error_report` sees, refuses and leaves alone."""

import contextlib
import copy
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mha_book.heads.layer import MultiHeadAttention
from mha_book.heads.masks import from_torch
from mha_book.heads.single_head import fused_attend
from mha_book.instruments.testing import SIZES, assert_as_exact
from mha_book.instruments.tolerance import (
    STEPS,
    ErrorReport,
    error_report,
    head_statistics,
    rounded_attention,
    tolerance,
)
from mha_book.kernels.backends import attention

s = SIZES
LOW = torch.float32, torch.bfloat16, torch.float16
MATH = partial(attention, impl="math")


def heads(size=1.0, dtype=torch.float32, **sizes):
    z = {**vars(s), **sizes}
    q, k = torch.randn(z["b"], z["h"], z["n"], z["d"]), torch.randn(z["b"], z["g"], z["m"], z["d"])
    return (q * size).to(dtype), k.to(dtype), torch.randn(z["b"], z["g"], z["m"], z["dv"]).to(dtype)


# Rounding one step at a time


def by_hand(q, k, v, dtype, step, mask):
    "One query at a time, in float64; each stage is rounded where it is called `step`."

    def stored(x, name):
        return x.to(dtype).double() if name == step else x

    b, h, n, d = q.shape
    out = torch.zeros(b, h, n, v.shape[-1], dtype=torch.float64)
    for i in range(b):
        for a in range(h):
            for j in range(n):
                seen = mask[i, 0, j].nonzero()[:, 0]
                if len(seen):
                    group = a // (h // k.shape[1])
                    query = stored(q[i, a, j].double() / d**0.5, "scale")
                    scores = stored(k[i, group, seen].double() @ query, "scores")
                    powers = stored(torch.exp(scores - scores.max()), "powers")
                    weights = stored(powers / powers.sum(), "weights")
                    out[i, a, j] = stored(weights @ v[i, group, seen].double(), "mixture")
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn])
@pytest.mark.parametrize("step", [*STEPS, None])
def test_only_the_named_step_is_rounded(step, dtype):
    q, k, v = heads(2.0)
    mask = torch.rand(s.b, 1, s.n, s.m) < 0.7
    mask[1, 0, 2] = False
    found = rounded_attention(q, k, v, dtype=dtype, steps=[step] if step else [], mask=mask)
    expected = by_hand(q, k, v, dtype, step, mask)
    assert found.dtype == torch.float64 and not found[1, :, 2].any()
    # on the border of two numbers of dtype, either may come out: rare, and then one gap of it
    close = (found - expected).abs() < 1e-12
    assert close.double().mean() > 0.9 and (found - expected).abs().max() < torch.finfo(dtype).eps * 4


def test_a_step_by_its_name_and_all_steps_at_once():
    inputs = heads()
    one = [
        rounded_attention(*inputs, dtype=torch.bfloat16, steps=steps) for steps in ("scores", ["scores"], {"scores"})
    ]
    assert torch.equal(one[0], one[1]) and torch.equal(one[1], one[2])
    every = rounded_attention(*inputs, dtype=torch.bfloat16)
    assert torch.equal(every, rounded_attention(*inputs, dtype=torch.bfloat16, steps=reversed(STEPS)))
    assert torch.equal(every.bfloat16().double(), every) and not torch.equal(one[0].bfloat16().double(), one[0])


def test_a_width_of_64_scales_without_loss():
    q, k, v = heads(dtype=torch.bfloat16, d=64)
    free = rounded_attention(q, k, v, dtype=torch.bfloat16, steps=[])
    assert torch.equal(rounded_attention(q, k, v, dtype=torch.bfloat16, steps="scale"), free)


def test_unknown_steps_and_shapes_are_refused():
    q, k, v = heads()
    with pytest.raises(ValueError, match="'softmax' is not a step of attention; there are scale, scores, powers"):
        rounded_attention(q, k, v, dtype=torch.bfloat16, steps=["scores", "softmax"])


@pytest.mark.usefixtures("own_messages")
def test_what_does_not_fit_is_refused():
    q, k, v = heads()
    with pytest.raises(ValueError, match="width differs"):
        rounded_attention(q, k[..., 1:], v, dtype=torch.bfloat16)
    with pytest.raises(TypeError, match="int32"):
        rounded_attention(q, k, v, dtype=torch.int32)


# The rule


@pytest.mark.parametrize("dtype", LOW)
def test_the_rule_is_twice_the_plain_error_and_four_gaps(dtype):
    assert tolerance(0.5, dtype, 3.0) == 1.0 + 12 * torch.finfo(dtype).eps
    assert tolerance(0.0, dtype, 0.0) == 0.0 and math.isnan(tolerance(math.nan, dtype, 1.0))


def test_in_float64_the_rule_is_relative_above_1():
    assert tolerance(1.0, torch.float64, 0.1) == 1e-12 and tolerance(1.0, torch.float64, 300.0) == 3e-10


def test_the_tests_of_the_book_use_this_rule(monkeypatch):
    exact = torch.zeros(3, dtype=torch.float64)
    assert_as_exact(exact.float() + 0.1, exact, exact.float() + 0.06, 1.0)
    monkeypatch.setattr("mha_book.instruments.testing.tolerance", lambda *_: 0.05)
    with pytest.raises(AssertionError, match="allowed 5.00e-02"):
        assert_as_exact(exact.float() + 0.1, exact, exact.float() + 0.06, 1.0)


# Statistics


def test_statistics_with_bias_and_causality():
    q, k, _ = heads(n=5, m=7)
    bias = torch.randn(s.h, 5, 7)
    found = head_statistics(q, k, bias=bias, is_causal=True)
    keys = k.double().repeat_interleave(s.h // s.g, dim=1)
    unscaled = q.double() @ keys.mT
    visible = torch.ones(5, 7, dtype=torch.bool).tril(2)
    logits = unscaled / s.d**0.5 + bias
    weights = logits.masked_fill(~visible, -math.inf).softmax(-1)
    entropy = -(weights * weights.clamp(min=1e-300).log()).sum(-1).mean((0, 2))
    for one, other in zip(
        found,
        (logits.where(visible, 0).abs().amax((0, 2, 3)), unscaled.where(visible, 0).abs().amax((0, 2, 3)), entropy),
    ):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_queries_that_see_nothing_do_not_dilute_the_entropy():
    q, k = torch.zeros(1, 1, 3, 4), torch.zeros(1, 1, 8, 4)
    mask = torch.ones(3, 8, dtype=torch.bool)
    mask[1] = False
    torch.testing.assert_close(head_statistics(q, k, mask=mask).entropy, torch.tensor([math.log(8)]).double())


def test_statistics_of_halves_do_not_overflow_and_hidden_keys_do_not_count():
    q, k = torch.full((1, 2, 3, 64), 300.0).half(), torch.full((1, 2, 4, 64), 300.0).half()
    k[:, :, 3] = 60000.0
    mask = torch.tensor([True, True, True, False]).expand(2, 3, 4).clone()
    mask[1] = False  # head 1 sees nothing
    found = head_statistics(q, k, mask=mask)
    assert found.unscaled.tolist() == [64 * 300.0**2, 0.0] and found.largest.tolist() == [8 * 300.0**2, 0.0]
    torch.testing.assert_close(found.entropy, torch.tensor([math.log(3), 0.0]).double())


# The report: who passes, who does not


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("size", [0.1, 1.0, 3.0])
def test_torchs_kernel_and_the_definition_pass(size, seed):
    torch.manual_seed(seed)
    inputs = heads(size, n=40, m=70, d=32, dv=32)
    for fn in (fused_attend, MATH, partial(attention, impl="auto")):
        report = error_report(fn, *inputs, dtypes=(torch.float64, *LOW))
        assert report.passes, report
        assert [(row.dtype, row.head) for row in report.rows] == [
            (dtype, head) for dtype in (torch.float64, *LOW) for head in range(s.h)
        ]


def in_head_2(change):
    "Attention whose head 2 alone is spoilt."

    def spoilt(q, k, v):
        out = MATH(q, k, v).clone()
        out[:, 2] = change(out[:, 2])
        return out

    return spoilt


@pytest.mark.parametrize(
    "change, dtypes",
    [
        (torch.zeros_like, LOW),
        (lambda o: o * 1.1, LOW),
        (lambda o: o * (1 + 1e-4), (torch.float32,)),
        (lambda o: o.bfloat16().to(o.dtype), (torch.float32,)),
        (lambda o: o.flip(1), LOW),
        (lambda o: o + math.nan, LOW),
        (lambda o: o / 0, LOW),
    ],
)
def test_a_head_that_is_wrong_is_named_and_no_other(change, dtypes):
    report = error_report(in_head_2(change), *heads())
    assert {(row.dtype, row.head) for row in report.failing} == {(dtype, 2) for dtype in dtypes} and not report.passes
    assert f"{len(dtypes)} of 18 fail" in str(report)


def test_zeros_are_refused_at_any_length():
    q, k, v = heads(b=1, h=2, g=2, m=16384, d=16, dv=16)
    report = error_report(lambda q, k, v: torch.zeros_like(q), q, k, v)
    assert len(report.failing) == 6


def test_the_first_place_that_is_not_finite_is_named():
    def broken(q, k, v):
        out = MATH(q, k, v).clone()
        if q.dtype == torch.float16:
            out[1, 4, 3, 6], out[1, 4, 4, 0] = -math.inf, math.nan
        return out

    report = error_report(broken, *heads())
    (row,) = report.failing
    assert row.reason == "fn: -inf at (1, 4, 3, 6)" and row.reason in str(report)


def test_a_definition_that_overflows_excuses_nothing():
    q, k, v = heads(3000.0, d=64)  # unscaled and scaled scores are beyond float16
    k = k * 30
    right = error_report(fused_attend, q, k, v, dtypes=[torch.float16])
    assert not any(math.isfinite(row.plain) for row in right.rows) and right.passes
    wrong = error_report(lambda q, k, v: fused_attend(q, k, v) * 1.1, q, k, v, dtypes=[torch.float16])
    assert len(wrong.failing) == s.h and all(math.isfinite(row.bound) for row in wrong.rows)


def test_inputs_that_are_not_finite_once_rounded_are_no_fault_of_rounding():
    q, k, v = heads()
    v[0, 1, 2, 3] = 1e6  # kv head 1 serves query heads 2 and 3; infinite in float16
    report = error_report(fused_attend, q, k, v)
    assert {(row.dtype, row.head) for row in report.failing} == {(torch.float16, 2), (torch.float16, 3)}
    assert all(row.reason.startswith("exact: inf at (0, ") for row in report.failing)


def test_a_finite_answer_where_there_is_none_does_not_pass():
    report = error_report(lambda x: (1 / x).clamp(max=5.0), torch.tensor([0.0, 1.0]), definition=lambda x: 1 / x)
    assert len(report.failing) == 3 and report.rows[0].reason == "exact: inf at (0,)"


# Only the computation is judged


def test_inputs_are_rounded_before_anything_is_exact():
    x = torch.tensor([1 + 2**-12])
    report = error_report(lambda x: x, x, definition=lambda x: x)
    assert [row.error for row in report.rows] == [0.0, 0.0, 0.0]


def test_weights_are_rounded_before_anything_is_exact():
    class Weight(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.tensor([1 + 2**-12]))
            self.register_buffer("offset", torch.tensor([1 + 2**-13]))

        def forward(self, x):
            y = x.double() * self.weight.double() + self.offset.double()  # exact in every dtype
            return y if x.dtype == torch.float64 else y.float()

    module = Weight()
    report = error_report(module, torch.ones(1), definition=module, dtypes=LOW)
    assert [row.error for row in report.rows] == [0.0, 0.0, 0.0]


def test_truths_and_integers_stay_what_they_are():
    seen = []

    def masked(q, k, v, mask, count, nothing):
        seen.append((q.dtype, mask.dtype, count.dtype, nothing))
        return MATH(q, k, v, mask=mask)

    mask = torch.rand(s.n, s.m) < 0.5
    assert error_report(masked, *heads(), mask, torch.arange(3), None, definition=masked, dtypes=torch.float16).passes
    assert seen == [
        (dtype, torch.bool, torch.int64, None) for dtype in (torch.float64, torch.float64, torch.float16, torch.float16)
    ]


def test_keywords_of_a_partial_are_rounded_too_and_no_gradient_is_kept():
    seen = []

    def shifted(x, by):
        seen.append((x.dtype, by.dtype, torch.is_grad_enabled()))
        return x + by

    by = torch.tensor([1 + 2**-12], requires_grad=True)
    fn = partial(shifted, by=by)
    report = error_report(fn, torch.zeros(1), definition=fn, dtypes=torch.bfloat16)
    assert [row.error for row in report.rows] == [0.0]
    assert seen == [(dtype, dtype, False) for dtype in [torch.float64] * 2 + [torch.bfloat16] * 2]


# Modules


def torchs_layer():
    class SelfAttention(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.MultiheadAttention(12, 3, dropout=0.4, batch_first=True)

        def forward(self, x):
            return self.layer(x, x, x)

    return SelfAttention()


def test_torchs_layer_passes_against_ours_and_a_changed_one_does_not():
    theirs, x = torchs_layer(), torch.randn(s.b, s.n, 12)
    ours = from_torch(theirs.layer)
    ours.attend = MATH
    report = error_report(theirs, x, definition=ours)
    assert report.passes and [row.head for row in report.rows] == [None] * 3
    with torch.no_grad():
        ours.in_proj.weight[0] *= 1.5
    assert not error_report(theirs, x, definition=ours).passes


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("grad", [True, False])
def test_everything_is_left_as_it_was(training, grad):
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.drop = nn.BatchNorm1d(4), nn.Dropout(0.5)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            torch.rand(3)
            return self.drop(self.norm(x)).mul_(2)

    module, x = Counting().train(training), torch.randn(5, 4, requires_grad=True)
    module.norm.weight.grad = torch.ones(4)
    state, before, rng = copy.deepcopy(module.state_dict()), x.detach().clone(), torch.get_rng_state()
    with torch.set_grad_enabled(grad):
        first, second = (error_report(module, x, definition=module) for _ in range(2))
        assert torch.is_grad_enabled() == grad
    assert first == second and first.passes
    assert torch.equal(torch.get_rng_state(), rng) and torch.equal(x, before) and x.grad is None and x.requires_grad
    assert all(torch.equal(state[name], t) for name, t in module.state_dict().items())
    assert all(m.training == training for m in module.modules()) and torch.equal(module.norm.weight.grad, torch.ones(4))


def test_a_function_may_write_over_its_inputs():
    x = torch.randn(3, 4)
    before = x.clone()
    assert error_report(lambda x: x.mul_(2), x, definition=lambda x: x * 2).passes and torch.equal(x, before)


def test_partials_and_methods_of_modules_are_converted_too():
    layer, x = MultiHeadAttention(12, 3, attend=MATH), torch.randn(s.b, s.n, 12)
    for fn in (partial(layer, is_causal=True), partial(layer.forward, is_causal=True)):
        assert error_report(fn, x, definition=partial(layer, is_causal=True)).passes
    report = error_report(layer.attention_map, x, definition=layer.attention_map)
    assert report.passes and [row.head for row in report.rows] == [0, 1, 2] * 3
    mask = torch.ones(s.n, s.n, dtype=torch.bool).tril()
    bias = torch.randn(s.n, s.n)
    fn = partial(layer, mask=mask, bias=bias)
    assert error_report(fn, x, definition=fn, dtypes=(torch.float64, *LOW)).passes
    assert layer.in_proj.weight.dtype == torch.float32


def test_a_definition_that_is_an_empty_container_is_one():
    "`nn.Sequential()` is false, and the identity."
    assert error_report(lambda x: x, torch.randn(3), definition=nn.Sequential()).passes


def test_autocast_outside_changes_nothing():
    inputs = heads()
    alone = error_report(fused_attend, *inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert error_report(fused_attend, *inputs) == alone


# Shapes of outputs, and the table


@pytest.mark.parametrize(
    "shape, count", [((), 1), ((3,), 1), ((2, 3), 1), ((2, 3, 4), 1), ((2, 3, 4, 5), 3), ((2, 3, 4, 5, 6), 1)]
)
def test_rank_4_has_heads(shape, count):
    x = torch.randn(shape)
    report = error_report(lambda x: (x.sin(), None), x, definition=lambda x: x.sin(), dtypes=[torch.float16])
    assert report.passes and len(report.rows) == count
    assert [row.head for row in report.rows] == (list(range(3)) if count == 3 else [None])


def test_no_line_is_wider_than_78():
    def broken(q, k, v):
        out = MATH(q, k, v).clone()
        out[1, 11, -1, -1] = -math.inf
        return out

    q, k, v = (torch.randn(2, 12, 200, 200) for _ in range(3))
    text = str(error_report(broken, q, k, v, dtypes=(torch.float64, *LOW)))
    lines = text.splitlines()
    assert max(map(len, lines)) <= 78 and len(lines) == 50
    assert lines[0].split() == ["dtype", "head", "error", "plain", "allowed"]
    assert "fn: -inf at (1, 11, 199, 199)" in text and lines[-1] == "4 of 48 fail"


def test_a_report_without_failures_says_so():
    report = error_report(fused_attend, *heads())
    assert isinstance(report, ErrorReport) and str(report).endswith("18 pass") and report.failing == ()


# What cannot be judged


class Broken(nn.Module):
    "Runs in float32 only."

    def forward(self, x):
        if x.dtype != torch.float32:
            raise ValueError("I want float32")
        return x


class Tied(nn.Module):
    "Holds a tensor that torch refuses to copy."

    def __init__(self):
        super().__init__()
        self.made = torch.ones(2, requires_grad=True) * 2

    def forward(self, x):
        return x


@pytest.mark.usefixtures("own_messages")
@pytest.mark.parametrize(
    "error, words, call",
    [
        (TypeError, "fn must be callable, got int", lambda q: error_report(3, q, q, q)),
        (TypeError, "definition must be callable, got str", lambda q: error_report(MATH, q, definition="math")),
        (ValueError, "among 0 inputs there is no floating-point tensor", lambda q: error_report(MATH)),
        (ValueError, "among 2 inputs there is no floating-point", lambda q: error_report(MATH, 1.0, torch.arange(3))),
        (ValueError, "without definition= the inputs are q, k, v; got 1", lambda q: error_report(MATH, q)),
        (
            TypeError,
            "dtypes must be some of torch.float64, .*; got torch.int32",
            lambda q: error_report(MATH, q, q, q, dtypes=[torch.float32, torch.int32]),
        ),
        (TypeError, "got torch.float8_e5m2", lambda q: error_report(MATH, q, q, q, dtypes=torch.float8_e5m2)),
        (TypeError, "got none", lambda q: error_report(MATH, q, q, q, dtypes=[])),
        (
            ValueError,
            r"fn gives shape \(2, 6, 5\), the definition \(2, 6, 5, 8\)",
            lambda q: error_report(lambda q, k, v: q[..., 0], q, q, q),
        ),
        (TypeError, "fn must return a floating-point tensor.*got str", lambda q: error_report(lambda *_: "x", q, q, q)),
        (TypeError, "got torch.int64", lambda q: error_report(lambda *_: torch.arange(3), q, q, q)),
        (TypeError, "got None", lambda q: error_report(MATH, q, q, q, dtypes=None)),
        (TypeError, "got 'float16'", lambda q: error_report(MATH, q, q, q, dtypes="float16")),
        (
            ValueError,
            "definition gives another result with another seed",
            lambda q: error_report(lambda *_: torch.zeros(3), q, q, q, definition=partial(MATH, dropout_p=0.5)),
        ),
        (
            ValueError,
            "definition gives torch.float32 for inputs in torch.float64",
            lambda q: error_report(torch.sin, q, definition=lambda x: x.float().sin()),
        ),
        (
            ValueError,
            r"definition gives \(0, 6, 5, 8\): nothing to compare",
            lambda q: error_report(MATH, q[:0], q[:0], q[:0]),
        ),
        (
            RuntimeError,
            "definition failed in torch.float64, it must run in float64 on the CPU: ValueError: width differs",
            lambda q: error_report(MATH, q, q[..., 1:], q),
        ),
        (
            RuntimeError,
            "definition failed in torch.float64, .*: ValueError: I want float32",
            lambda q: error_report(nn.Identity(), q, definition=Broken()),
        ),
        (
            RuntimeError,
            "fn failed in torch.bfloat16, leave it out of dtypes=.*: ValueError: I want float32",
            lambda q: error_report(Broken(), q, definition=nn.Identity()),
        ),
        (
            RuntimeError,
            "fn failed in torch.float32.*deepcopy",
            lambda q: error_report(Tied(), q, definition=nn.Identity()),
        ),
    ],
)
def test_what_cannot_be_judged_is_refused(error, words, call):
    q, *_ = heads()
    with pytest.raises(error, match=words):
        call(q)
    assert torch.is_grad_enabled()


def test_after_an_error_all_is_as_before():
    inputs, rng = heads(), torch.get_rng_state()
    with contextlib.suppress(RuntimeError):
        error_report(lambda *_: F.dropout(torch.ones(3)) / (1 // 0), *inputs)
    assert torch.equal(torch.get_rng_state(), rng) and torch.is_grad_enabled()


# The figures


# numpy 2 tells matplotlib of torch's tensors, which take no `copy`
@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")
def test_the_figures_draw_every_head():
    from mha_book.figures import head_color, head_errors, head_grid

    report = error_report(in_head_2(lambda o: o + math.nan), *heads())
    ax = head_errors(report.rows)
    assert len(ax.lines) == 18
    crosses = [line for line in ax.lines if line.get_marker() == "X"]
    assert [line.get_color() for line in crosses] == [head_color(2)] * 3
    assert [t.get_text() for t in ax.get_xticklabels()] == ["float32", "bfloat16", "float16"]
    values = torch.rand(3, 5)
    image = head_grid(values).images[0]
    assert image.get_clim()[0] == 0 and torch.equal(torch.tensor(image.get_array().data), values)


# What a hostile review found


class Rotated(nn.Module):
    "A buffer of complex numbers."

    def __init__(self):
        super().__init__()
        self.register_buffer("turn", torch.polar(torch.ones(4), torch.randn(4)))

    def forward(self, x):
        wide = x.double() if x.dtype == torch.float64 else x.float()
        return torch.view_as_real(torch.view_as_complex(wide.unflatten(-1, (4, 2))) * self.turn).flatten(-2).to(x.dtype)


def test_complex_buffers_stay_complex():
    layer = Rotated()

    def by_hand(x):
        real, imag = x.unflatten(-1, (4, 2)).unbind(-1)
        c, s = (t.to(x.dtype) for t in (layer.turn.real, layer.turn.imag))
        return torch.stack([real * c - imag * s, real * s + imag * c], -1).flatten(-2)

    x = torch.randn(5, 8)
    assert error_report(by_hand, x, definition=layer, dtypes=[torch.float32]).passes
    wrong = error_report(lambda x: x * layer.turn.real.repeat_interleave(2).to(x.dtype), x, definition=layer)
    assert not any(row.passes for row in wrong.rows)


def test_a_method_is_judged_by_itself_and_not_by_its_name():
    class Base(nn.Module):
        def forward(self, x):
            return x

    class Sub(Base):
        def forward(self, x):
            return x + 100

        def base(self):
            return super().forward

    x = torch.randn(3)
    assert error_report(Sub().base(), x, definition=torch.clone).passes
    assert not error_report(Sub().forward, x, definition=torch.clone).passes


def test_lists_and_dicts_of_tensors_are_copied_and_rounded():
    w = torch.full((3,), 1 / 3)
    seen = []

    def fn(x, more):
        seen.append(more["w"][0].dtype)
        return more["w"][0].mul_(2) * x

    more = {"w": [w], "name": "w"}
    report = error_report(fn, torch.randn(3), more, definition=lambda x, more: 2 * more["w"][0] * x)
    assert report.passes and torch.equal(w, torch.full((3,), 1 / 3))
    assert set(seen) == {torch.float32, torch.bfloat16, torch.float16}


def test_what_was_one_tensor_stays_one():
    kinds = []

    def fn(q, k, v):
        kinds.append(q is k is v)
        return MATH(q, k, v)

    x = torch.randn(2, 6, 5, 8)
    error_report(fn, x, x, x)
    assert all(kinds)


def test_a_model_of_words_can_be_judged():
    words = torch.arange(4)
    layer = nn.Embedding(5, 3)
    assert error_report(layer, words, definition=layer).passes
    with pytest.raises(ValueError, match="no floating-point tensor"):
        error_report(torch.clone, words, definition=layer)


def test_positional_arguments_of_a_partial_and_lists_that_are_returned():
    w = torch.full((3,), 1 / 3)

    def scaled(w, x):
        return [w * x, None]

    report = error_report(partial(scaled, w), torch.randn(3), definition=partial(lambda w, x: w * x, w))
    assert report.passes and all(row.error <= row.plain for row in report.rows)


def test_keys_that_a_bias_hides_do_not_count_and_nothing_leaves_a_graph():
    q, k = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 5, 4)
    k[:, :, 2] = 1e4
    bias = torch.zeros(5).masked_fill(torch.arange(5) == 2, -math.inf).requires_grad_()
    found = head_statistics(q, k, bias=bias)
    without = head_statistics(q, k[:, :, [0, 1, 3, 4]])
    for a, b in zip(found, without):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)
        assert not a.requires_grad
    for b, n, m in ((0, 3, 5), (1, 0, 5), (1, 3, 0)):
        empty = head_statistics(torch.ones(b, 2, n, 4), torch.ones(b, 2, m, 4))
        assert all(torch.equal(t, torch.zeros_like(t)) and t.shape == (2,) for t in empty)
    with pytest.raises(TypeError):
        head_statistics(q, k.half())


@pytest.mark.usefixtures("own_messages")
def test_steps_and_dtypes_that_are_none():
    q, k, v = heads()
    for steps in (None, [1, "x"], [["scores"]]):
        with pytest.raises(ValueError, match="is not a step of attention"):
            rounded_attention(q, k, v, dtype=torch.bfloat16, steps=steps)
    with pytest.raises(TypeError, match="int8"):
        rounded_attention(q, k, v, dtype=torch.int8, steps=[])
    nothing = rounded_attention(q, k[:, :, :0], v[:, :, :0], dtype=torch.bfloat16)
    assert nothing.shape == (*q.shape[:3], v.shape[3]) and not nothing.any()


def test_very_low_scores_are_shifted_by_their_own_largest():
    q, k = torch.full((1, 1, 1, 4), 1e4), torch.full((1, 1, 2, 4), -1e4)
    k[:, :, 1] *= 1.0001
    v = torch.tensor([1.0, 3.0]).view(1, 1, 2, 1)
    assert rounded_attention(q, k, v, dtype=torch.float32, steps=[]).item() == 1.0
