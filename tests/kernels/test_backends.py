"""`attention` with all options: which kernel runs, what it costs, what it refuses, and that the way changes nothing."""

import itertools
import math
import random
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from mha_book import MultiHeadAttention, fused_attend
from mha_book.heads import single_head
from mha_book.heads.single_head import query_places
from mha_book.instruments.device import peak_bytes
from mha_book.instruments.dispatch import explain_dispatch, torch_kernel
from mha_book.instruments.testing import SIZES, assert_as_exact, reference_attention
from mha_book.kernels import backends
from mha_book.kernels.backends import (
    BACKENDS,
    AttentionCall,
    Backend,
    attention,
    attention_logits,
    attention_weights,
    checked_call,
    implementations,
    window_mask,
)
from mha_book.kernels.flex import _compiled_flex, _score_mod
from support.profiler import operations
from support.refusals import refused

s = SIZES
OURS = pytest.mark.usefixtures("own_messages")  # shape checking would add operations, and its own refusals


def heads(b=s.b, h=s.h, g=s.g, n=s.n, m=s.m, d=s.d, dv=None, dtype=torch.float32, grad=False):
    shapes = (b, h, n, d), (b, g, m, d), (b, g, m, d if dv is None else dv)
    return [torch.randn(shape, dtype=dtype, requires_grad=grad) for shape in shapes]


# Which kernel


def kernel_of(call):
    "The kernel that the profiler saw."
    names = " ".join(operations(call))
    found = [
        kernel
        for kernel, sign in {
            "flash": "_scaled_dot_product_flash_attention_for_cpu",
            "math": "_scaled_dot_product_attention_math",
        }.items()
        if sign in names
    ]
    assert len(found) <= 1
    return found[0] if found else None


DISPATCH = {
    "dtype": [torch.float64, torch.float32, torch.bfloat16, torch.float16],
    "lengths": [(40, 40), (40, 70), (70, 40), (1, 70)],  # without tokens torch may run no kernel at all
    "values": [16, 12],
    "mask": [None, "m", "n m", "h n m", "1 1 n m"],
    "bias": [None, "fixed", "learned"],
    "is_causal": [False, True],
    "window": [None, 9, (3, 3), 400],
    "softcap": [None, 3.0],
    "sinks": [False, True],
    "dropout_p": [0.0, 0.2],
    "groups": [6, 2],
    "layout": ["", "width first"],
    "grad": [False, True],
    "impl": ["auto"] * 9 + ["sdpa"] * 8 + ["math", "flex"],
}


def dispatch_cases(number, seed=0):
    rng = random.Random(seed)
    return [{name: rng.choice(values) for name, values in DISPATCH.items()} for _ in range(number)]


def call_of(case):
    "Heads and options of a case."
    (n, m), grad, dtype = case["lengths"], case["grad"], case["dtype"]
    q, k, v = heads(g=case["groups"], n=n, m=m, d=16, dv=case["values"], dtype=dtype)
    if case["layout"]:
        q = q.mT.contiguous().mT
    q.requires_grad_(grad)
    options = {name: case[name] for name in ("is_causal", "window", "softcap", "dropout_p")}
    if case["mask"]:
        size = {"h": s.h, "n": n, "m": m, "1": 1}
        options["mask"] = torch.rand([size[axis] for axis in case["mask"].split()]) < 0.8
    if case["bias"]:
        options["bias"] = torch.randn(n, m, dtype=dtype, requires_grad=case["bias"] == "learned" and grad)
    if case["sinks"]:
        options["sinks"] = torch.randn(s.h, requires_grad=grad)
    return (q, k, v), options


def refusal_of(function, inputs, options):
    "The words in which a function refuses its call; None where it does not."
    try:
        function(*inputs, **options)
    except NotImplementedError as refusal:
        return str(refusal)
    return None


def assert_tells_what_ran(told, ran):
    "The explanation names the kernel that the profiler saw, and gives a reason against everything else."
    assert told.kernel == ran
    assert (told.impl == "sdpa") == (ran is not None), "torch's kernels run in sdpa, and nothing else does"
    assert set(told.impls) == set(BACKENDS) - {told.impl}
    assert set(told.kernels) == ({"flash", "efficient", "cudnn", "math"} - {ran} if ran else set())
    assert all(told.impls.values()) and all(told.kernels.values())


@OURS
def test_the_explained_kernel_is_the_one_that_runs():
    "Of 500 calls drawn at random; each of the four ways that a CPU has must be among them."
    assert operations(lambda: None) == [], "the profiler sees what is not there"
    ways = set()
    for case in dispatch_cases(500):
        inputs, options = call_of(case)
        options["impl"] = case["impl"]
        if refusal_of(explain_dispatch, inputs, options) is None:
            told = explain_dispatch(*inputs, **options)
            assert_tells_what_ran(told, kernel_of(lambda: attention(*inputs, **options)))
            ways.add((told.impl, told.kernel))
    assert ways == {("sdpa", "flash"), ("sdpa", "math"), ("math", None), ("flex", None)}


@OURS
def test_an_explanation_is_refused_in_the_same_words_as_the_call():
    refused_cases = 0
    for case in dispatch_cases(500):
        inputs, options = call_of(case)
        options["impl"] = case["impl"]
        words = refusal_of(explain_dispatch, inputs, options)
        if words is not None:
            assert refusal_of(attention, inputs, options) == words
            refused_cases += 1
    assert refused_cases > 20


@OURS
def test_an_explanation_that_names_another_kernel_is_noticed():
    q, k, v = heads(n=40, m=40)
    told = explain_dispatch(q, k, v)
    assert_tells_what_ran(told, "flash")
    for wrong in {"kernel": "math"}, {"impl": "math"}, {"impls": {}}, {"kernels": told.kernels | {"math": ""}}:
        with pytest.raises(AssertionError):
            assert_tells_what_ran(replace(told, **wrong), "flash")


@OURS
@pytest.mark.parametrize(
    "change, words",
    [
        (dict(dropout_p=0.1), "dropout"),
        (dict(dv=12), "same last dimension"),
        (dict(bias=torch.zeros(s.n, s.m, requires_grad=True)), "gradient"),
        (dict(n=0), "zero seq_len"),
    ],
)
def test_the_reason_against_the_fused_kernel_is_told(change, words):
    sizes = {name: change.pop(name) for name in ("dv", "n") if name in change}
    told = explain_dispatch(*heads(**sizes, grad=True), **change)
    assert told.kernel == "math" and words in told.kernels["flash"]
    assert told.kernels["cudnn"] == told.kernels["efficient"] == "not on cpu"
    assert "Triggered" not in str(told) and f"not the flash kernel: {told.kernels['flash']}" in str(told)


def test_a_switch_of_torchs_is_seen_and_left_as_it_was():
    q, k, v = heads()
    flags = torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.math_sdp_enabled()
    assert explain_dispatch(q, k, v).kernel == "flash"
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        told = explain_dispatch(q, k, v)
        assert told.kernel == "math" and "switched off" in told.kernels["flash"]
    assert flags == (torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.math_sdp_enabled())
    assert explain_dispatch(q, k, v).kernel == "flash"


@OURS
def test_nothing_is_computed_to_explain():
    q, k, v = heads(n=100, m=100)
    for options in {}, {"window": 7}, {"sinks": torch.randn(s.h)}, {"softcap": 2.0}, {"impl": "flex"}:
        names = operations(lambda: explain_dispatch(q, k, v, **options))
        assert not [name for name in names if "dot_product" in name or "mm" in name or "softmax" in name]


def test_every_impl_says_why_not():
    told = explain_dispatch(*heads(n=100, m=100), softcap=3.0)
    assert told.impl == "math" and told.kernel is None
    assert told.impls["sdpa"] == "lacks softcap" and "not compiled" in told.impls["flex"]
    told = explain_dispatch(*heads(n=100, m=100), impl="math")
    assert told.impls == {name: "could run; impl='math' was asked for" for name in ("sdpa", "flex")}


@OURS
def test_on_meta_it_answers_too():
    q, k, v = (t.to("meta") for t in heads())
    told = explain_dispatch(q, k, v)
    assert told.impl == "sdpa"
    for options in {}, {"window": 3}, {"softcap": 2.0}, {"sinks": torch.randn(s.h, device="meta")}:
        assert attention(q, k, v, **options).is_meta


# What it costs


@OURS
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("groups", [6, 2])
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"scale": 0.3}, {"dropout_p": 0.1}], ids=str)
def test_a_plain_call_is_torchs_kernel_and_nothing_else(options, groups, grad):
    q, k, v = heads(g=groups, m=s.n, grad=grad)
    ours, theirs = (
        operations(lambda: torch.autograd.grad(out().sum(), (q, k, v)) if grad else out())
        for out in (
            lambda: attention(q, k, v, **options),
            lambda: F.scaled_dot_product_attention(q, k, v, **options, enable_gqa=groups != 6),
        )
    )
    assert ours == theirs
    assert operations(lambda: attention(q, k, v, **options, window=2)) != theirs  # the check can tell


@OURS
def test_a_plain_call_takes_the_bytes_of_torchs_kernel():
    q, k, v = heads(n=200, m=200)
    assert peak_bytes(lambda: attention(q, k, v, is_causal=True)) == peak_bytes(
        lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    )


@OURS
def test_a_mask_and_a_bias_go_the_way_of_chapter_one():
    q, k, v = heads()
    mask, bias = torch.rand(s.n, s.m) < 0.7, torch.randn(s.h, s.n, s.m)
    for options in {"mask": mask}, {"bias": bias}, {"mask": mask, "bias": bias, "is_causal": True}:
        assert operations(lambda: attention(q, k, v, **options)) == operations(lambda: fused_attend(q, k, v, **options))


SHAPES = [  # b h g n m d dv
    (1, 1, 1, 64, 64, 16, 16),
    (1, 1, 1, 512, 512, 64, 64),
    (1, 2, 2, 16, 16, 64, 64),
    (2, 6, 3, 128, 128, 32, 32),
    (1, 4, 4, 256, 256, 64, 48),
    (2, 4, 1, 1, 300, 32, 40),
    (1, 4, 2, 300, 40, 32, 32),
    (1, 8, 8, 40, 300, 16, 32),
    (2, 6, 3, 5, 7, 8, 9),
    (3, 4, 2, 512, 16, 64, 64),
    (1, 1, 1, 33, 1, 16, 16),
]
LARGE, TINY = SHAPES[1:2] + SHAPES[3:5], [SHAPES[0], SHAPES[2], *SHAPES[-3:]]


def drawn_options(rng, shape, dtype, grad):
    "Options of a call of this shape, with a window, a softcap or sinks in it: without any of them auto is torch's."
    b, h, _, n, m, _, _ = shape
    options = {
        "window": rng.choice([None, 17, (8, 8), (None, 3), 600]),
        "is_causal": rng.random() < 0.5,
        "softcap": rng.choice([None, None, 20.0]),
        "dropout_p": rng.choice([0.0, 0.0, 0.1]),
    }
    if rng.random() < 0.5 or options["window"] is options["softcap"] is None:
        options["sinks"] = torch.randn(h, requires_grad=grad)
    if rng.random() < 0.3:
        options["bias"] = torch.randn(h, n, m, dtype=dtype, requires_grad=grad)
    if rng.random() < 0.3:
        options["mask"] = torch.rand(b, 1, n, m) < 0.8
    return options


def held_by(impl, inputs, options, grad):
    "The most bytes that a call holds, with its backward pass where gradients are asked for."
    leaves = [*inputs, options["sinks"]] if "sinks" in options else inputs

    def run():
        out = attention(*inputs, impl=impl, **options)
        return torch.autograd.grad(out, leaves, out.detach()) if grad else out

    return peak_bytes(run)


@OURS
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_auto_never_holds_more_than_math(shape):
    "And it takes the other way where sequences are long, and never for a few tokens."
    rng, chosen = random.Random(sum(shape)), set()
    for grad, dtype in itertools.product([False, True], [torch.float64, torch.float32, torch.bfloat16]):
        for _ in range(12):
            inputs = heads(*shape, dtype, grad)
            options = drawn_options(rng, shape, dtype, grad)
            impl = explain_dispatch(*inputs, **options).impl
            chosen.add(impl)
            if impl != "math":
                auto, math_ = (held_by(way, inputs, options, grad) for way in ("auto", "math"))
                assert auto <= math_, (options, dtype, grad)
    if shape in LARGE:
        assert chosen == {"math", "sdpa"}
    if shape in TINY:
        assert chosen == {"math"}


@OURS
def test_a_way_that_holds_more_than_math_is_noticed():
    "Torch's kernel for eight tokens: its workspace is larger than the weights that it saves."
    inputs, options = heads(1, 1, 1, 8, 8, 64), {"window": 3}
    sdpa, math_ = (held_by(way, inputs, options, False) for way in ("sdpa", "math"))
    assert sdpa > math_


@OURS
@pytest.mark.parametrize(
    "options",
    [
        dict(window=64, is_causal=True),
        dict(sinks=True),
        dict(sinks=True, is_causal=True),
        dict(sinks=True, window=(64, 64)),
    ],
    ids=str,
)
@pytest.mark.parametrize("grad", [False, True])
def test_long_sequences_hold_no_weights(options, grad):
    q, k, v = heads(1, 8, 8, 1024, 1024, 64, grad=grad)
    if "sinks" in options:
        options = options | {"sinks": torch.randn(8, requires_grad=grad)}

    def run(impl):
        out = attention(q, k, v, impl=impl, **options)
        return torch.autograd.grad(out.sum(), q) if grad else out

    assert peak_bytes(lambda: run("auto")) < peak_bytes(lambda: run("math")) / 5


# The way changes nothing


@pytest.mark.parametrize("impl", ["math", "sdpa", "auto"])
@pytest.mark.parametrize(
    "window, is_causal, n, m",
    list(
        itertools.product(
            [1, 3, 7, 99, (2, 1), (0, 0), (None, 0), (None, 2), (None, 3), (0, None), (3, 99), (None, None)],
            [False, True],
            [1, 5],
            [1, 5, 7],
        )
    ),
)
def test_windows_are_exact(impl, window, is_causal, n, m):
    q, k, v = heads(n=n, m=m, dtype=torch.float64)
    got = attention(q, k, v, window=window, is_causal=is_causal, impl=impl)
    exact = reference_attention(q, k, v, window=window, is_causal=is_causal)
    torch.testing.assert_close(got, exact, atol=1e-12, rtol=0)


def test_window_masks_are_the_sentence():
    for n, m in (5, 7), (6, 6), (7, 5), (1, 4), (0, 3), (3, 0):
        for left, right in itertools.product([None, 0, 2, 10**30], [None, 0, 3, 10**30]):
            expected = [
                [
                    (left is None or j >= m - n + i - left) and (right is None or j <= m - n + i + right)
                    for j in range(m)
                ]
                for i in range(n)
            ]
            assert window_mask(n, m, (left, right)).tolist() == expected
    assert torch.equal(window_mask(5, 7, 3), window_mask(5, 7, (2, 0)))


@pytest.mark.parametrize("n, m", [(5, 7), (6, 6), (7, 5), (1, 4)])
def test_a_window_lies_around_the_places_of_the_queries(n, m):
    ahead = torch.arange(m) - query_places(n, m)[:, None]
    assert torch.equal(window_mask(n, m, (2, 1)), (ahead >= -2) & (ahead <= 1))
    assert not torch.equal(window_mask(n, m, (1, 0)), (ahead >= -2) & (ahead <= 1))


@pytest.mark.parametrize(
    "window, error", [(0, ValueError), (True, TypeError), ((1,), TypeError), ((-1, 2), ValueError)]
)
def test_a_mask_of_no_window_is_refused(window, error):
    with refused(error, "window", repr(window)):
        window_mask(5, 7, window)


@pytest.mark.parametrize("impl", ["math", "sdpa", "auto"])
@pytest.mark.parametrize("b, n, m", [(0, 5, 7), (2, 0, 7), (2, 5, 0), (2, 0, 0)])
def test_empty_inputs(impl, b, n, m):
    q, k, v = heads(b=b, n=n, m=m, dv=s.dv)
    for options in {}, {"window": 3}, {"sinks": torch.zeros(s.h)}, {"is_causal": True}:
        out = attention(q, k, v, impl=impl, **options)
        assert out.shape == (b, s.h, n, s.dv) and not out.any()


@pytest.mark.parametrize("impl", ["math", "sdpa", "flex", "auto"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_extreme_sinks(impl, dtype):
    q, k, v = heads(n=50, m=50, dtype=dtype)
    plain = attention(q, k, v, impl="math", is_causal=True)
    for sink, expected in (-math.inf, plain), (-3e4, plain), (3e4, torch.zeros_like(plain)):
        out = attention(q, k, v, impl=impl, is_causal=True, sinks=torch.full((s.h,), sink))
        torch.testing.assert_close(out, expected, atol=4e-3 if dtype == torch.float16 else 1e-6, rtol=0)


@pytest.mark.parametrize("impl", ["math", "auto"])
def test_sinks_without_logits(impl):
    q, k, v = heads(dtype=torch.float64)
    sinks = torch.randn(s.h, dtype=torch.float64)
    exact = reference_attention(q, k, v, scale=0.0, sinks=sinks)
    torch.testing.assert_close(attention(q, k, v, scale=0.0, sinks=sinks, impl=impl), exact, atol=1e-12, rtol=0)
    with refused(NotImplementedError, 'impl="sdpa" lacks sinks with scale=0', "math"):
        attention(q, k, v, scale=0.0, sinks=sinks, impl="sdpa")


@pytest.mark.parametrize("impl", ["math", "sdpa", "auto"])
@pytest.mark.parametrize("extra", [{}, {"window": 3}, {"sinks": True}], ids=str)
def test_dropout_keeps_the_mean(impl, extra):
    options = {"sinks": torch.randn(1)} if "sinks" in extra else extra
    q, k, v = (t.expand(4000, -1, -1, -1) for t in heads(b=1, h=1, g=1))
    outs = attention(q, k, v, dropout_p=0.3, impl=impl, **options)
    plain = attention(q[:1], k[:1], v[:1], impl="math", **options)
    spread = outs.std(0)
    assert spread.min() > 0
    assert ((outs.mean(0) - plain[0]).abs() / (spread / math.sqrt(4000))).max() < 6


def test_the_weights_are_the_function_with_the_identity_as_values():
    q, k, _ = heads(dtype=torch.float64)
    eye = torch.eye(s.m, dtype=torch.float64).expand(s.b, s.g, -1, -1)
    bias, mask = torch.randn(s.n, s.m).double(), torch.rand(s.b, 1, s.n, s.m) < 0.7
    for options in (
        {},
        {"window": (2, 1)},
        {"softcap": 1.5},
        {"sinks": torch.randn(s.h).double()},
        dict(mask=mask, bias=bias, is_causal=True, window=3, scale=0.3),
    ):
        weights = attention_weights(q, k, **options)
        torch.testing.assert_close(weights, reference_attention(q, k, eye, **options), atol=1e-12, rtol=0)


def test_the_options_are_plugs_for_the_layer():
    x, sinks = torch.randn(2, 40, 48, dtype=torch.float64), torch.randn(6, dtype=torch.float64, requires_grad=True)
    padding = torch.arange(40) < torch.tensor([[40], [30]])
    layer = MultiHeadAttention(48, 6, num_kv_heads=3, dtype=torch.float64)
    outs = {}
    for impl in "math", "sdpa", "auto":
        layer.attend = partial(attention, window=9, sinks=sinks, impl=impl)
        weights = layer.attention_map(x, key_mask=padding, is_causal=True)
        assert torch.equal(weights[1, 0] > 0, window_mask(40, 40, 9) & padding[1])
        outs[impl] = layer(x, key_mask=padding, is_causal=True)
        (learned,) = torch.autograd.grad(outs[impl].sum(), sinks)
        assert learned.abs().min() > 0
    for out in outs.values():
        torch.testing.assert_close(out, outs["math"], atol=1e-12, rtol=0)


class Handed(TorchFunctionMode):
    "Notes the mask that torch's attention is handed."

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            self.mask = kwargs["attn_mask"]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"is_causal": True},
        {"window": 3},
        {"window": (None, 0)},
        {"window": 99},
        {"window": 99, "is_causal": True},
        {"mask": True},
        {"bias": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("n, m", [(6, 6), (5, 7), (1, 7), (7, 5)])
def test_a_call_knows_whether_it_needs_a_mask(options, n, m):
    made = {"mask": torch.ones(n, m, dtype=torch.bool), "bias": torch.zeros(n, m)}
    options = {name: made[name] if name in made else value for name, value in options.items()}
    q, k, v = heads(n=n, m=m)
    with Handed() as handed:
        attention(q, k, v, impl="sdpa", **options)
    assert checked_call(q, k, v, **options).needs_mask == (handed.mask is not None)


@pytest.fixture
def checks(monkeypatch):
    "How often the inputs of attention have been checked."
    counted, check = Counter(), single_head.check_inputs

    def counting(*args):
        counted["checks"] += 1
        check(*args)

    for module in backends, single_head:
        monkeypatch.setattr(module, "check_inputs", counting)
    return counted


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"window": 3}, {"sinks": True}], ids=str)
@pytest.mark.parametrize("impl", ["auto", "math", "sdpa", "flex"])
def test_inputs_are_checked_once(checks, impl, options):
    options = options | ({"sinks": torch.zeros(s.h)} if "sinks" in options else {})
    attention(*heads(), impl=impl, **options)
    assert checks["checks"] == 1


def test_a_second_check_is_counted(checks):
    "A backend that goes by chapter 1's public function."
    BACKENDS["twice"] = Backend(lambda call: fused_attend(call.q, call.k, call.v), lambda call: None, lambda call: None)
    try:
        attention(*heads(), impl="twice")
    finally:
        del BACKENDS["twice"]
    assert checks["checks"] == 2


def test_a_call_is_built_by_keyword_and_not_changed():
    q, k, v = heads()
    call = checked_call(q, k, v, window=3, is_causal=True)
    assert call.sides == (2, 0) and call.windowed
    with pytest.raises(AttributeError):
        call.sides = (None, None)
    with pytest.raises(TypeError):
        AttentionCall(q, k, v)


@pytest.mark.parametrize("window, is_causal, sides", [
    (None, False, (None, None)), (None, True, (None, 0)), (3, False, (2, 0)), ((2, 1), True, (2, 0)),
    (99, True, (None, 0)), ((99, 99), False, (None, None)), ((6, 4), False, (None, None)), ((5, 3), False, (5, 3)),
])  # fmt: skip
def test_the_sides_of_a_call_are_those_that_hide_something(window, is_causal, sides):
    assert checked_call(*heads(), window=window, is_causal=is_causal).sides == sides


def test_implementations_are_what_impl_takes():
    assert implementations() == ("auto", "math", "sdpa", "flex")
    for impl in implementations():
        assert attention(*heads(), impl=impl).shape == (s.b, s.h, s.n, s.d)
    with refused(ValueError, "impl 'fast' is not known", ", ".join(implementations())):
        attention(*heads(), impl="fast")


# The registry


@pytest.fixture
def tiled():
    "A backend of a later chapter: it knows windows only, and wants causal calls of `auto`."

    def run(call):
        assert isinstance(call, AttentionCall)
        ran.append(call)
        return fused_attend(call.q, call.k, call.v, mask=call.all_masks)

    ran = []
    BACKENDS["tiled"] = Backend(
        run,
        lacks=lambda call: "sinks" if call.sinks is not None else "softcap" if call.softcap else None,
        declines=lambda call: None if call.sides[1] == 0 else "only causal calls pay",
    )
    yield ran
    del BACKENDS["tiled"]


def test_a_later_chapter_enters_its_own(tiled):
    q, k, v = heads(n=40, m=40)
    exact = attention(q, k, v, window=5, is_causal=True, impl="math")
    torch.testing.assert_close(attention(q, k, v, window=5, is_causal=True), exact)
    torch.testing.assert_close(attention(q, k, v, window=5, is_causal=True, impl="tiled"), exact)
    assert len(tiled) == 2
    attention(q, k, v, window=(4, 1))
    attention(q, k, v, is_causal=True)  # a plain call is torch's
    attention(q, k, v, window=5, is_causal=True, sinks=torch.zeros(s.h))
    assert len(tiled) == 2
    told = explain_dispatch(q, k, v, window=(4, 1))
    assert told.impls["tiled"] == "only causal calls pay"
    assert explain_dispatch(q, k, v, window=5, is_causal=True).impl == "tiled"
    with refused(NotImplementedError, 'impl="tiled" lacks sinks', "math and sdpa and flex"):
        attention(q, k, v, sinks=torch.zeros(s.h), impl="tiled")


def test_it_is_gone_again():
    assert list(BACKENDS) == ["math", "sdpa", "flex"]


# Bad input


@OURS
class TestBadOptions:
    @pytest.mark.parametrize("impl", ["auto", "math"])
    @pytest.mark.parametrize(
        "window, error, word",
        [
            (0, ValueError, "at least 1"),
            (-3, ValueError, "at least 1"),
            (True, TypeError, "number of keys"),
            (2.0, TypeError, "number of keys"),
            ((1,), TypeError, "(left, right)"),
            ((1, 2, 3), TypeError, "(left, right)"),
            ((-1, 2), ValueError, "at least 0"),
            ((1, 2.5), TypeError, "(left, right)"),
            ("3", TypeError, "'3'"),
            ([2, 1], TypeError, "[2, 1]"),
            ((True, 0), TypeError, "(left, right)"),
        ],
        ids=str,
    )
    def test_windows(self, impl, window, error, word):
        with refused(error, "window", word, repr(window)):
            attention(*heads(), window=window, impl=impl)

    @pytest.mark.parametrize(
        "softcap, error",
        [
            (0, ValueError),
            (-1.0, ValueError),
            (math.inf, ValueError),
            (math.nan, ValueError),
            ("30", TypeError),
            (True, TypeError),
            (torch.tensor(3.0), TypeError),
        ],
        ids=str,
    )
    def test_softcaps(self, softcap, error):
        with refused(error, "softcap"):
            attention(*heads(), softcap=softcap)

    @pytest.mark.parametrize(
        "sinks, error, word",
        [
            (torch.zeros(s.g), ValueError, "(6,)"),
            (torch.zeros(s.h, 1), ValueError, "(6, 1)"),
            (torch.zeros(s.h, dtype=torch.long), TypeError, "floating"),
            (0.0, TypeError, "torch.Tensor"),
            (torch.zeros(s.h, device="meta"), ValueError, "meta"),
        ],
        ids=str,
    )
    def test_sinks(self, sinks, error, word):
        with refused(error, "sinks", word):
            attention(*heads(), sinks=sinks)

    def test_unknown_impls(self):
        with refused(ValueError, "'flash'", "auto, math, sdpa, flex"):
            attention(*heads(), impl="flash")
        with refused(ValueError, "'flash'"):
            explain_dispatch(*heads(), impl="flash")

    @pytest.mark.parametrize("impl", ["auto", "math", "sdpa", "flex"])
    @pytest.mark.parametrize("extra", [{}, {"window": 2}], ids=str)
    def test_what_chapter_one_refuses(self, impl, extra):
        q, k, v = heads()
        with refused(ValueError, "length differs: key 7, value 5"):
            attention(q, k, v[:, :, :5], impl=impl, **extra)
        with refused(TypeError, "torch.bool"):
            attention(q, k, v, mask=torch.ones(s.m), impl=impl, **extra)
        with refused(ValueError, "[0, 1)"):
            attention(q, k, v, dropout_p=1.0, impl=impl, **extra)

    @pytest.mark.parametrize(
        "impl, options, grad, missing, others",
        [
            ("sdpa", {"softcap": 2.0}, False, "softcap", "math and flex"),
            ("flex", {"dropout_p": 0.1}, False, "dropout_p", "math and sdpa"),
            ("flex", {"empty": True}, False, "empty inputs", "math and sdpa"),
            ("flex", {}, True, "gradients on a CPU", "math and sdpa"),
            ("sdpa", {"softcap": 2.0}, True, "softcap", "math can do"),
            ("flex", {"sinks": torch.zeros(s.h, requires_grad=True)}, False, "gradients", "math and sdpa"),
        ],
        ids=str,
    )
    def test_what_an_impl_lacks(self, impl, options, grad, missing, others):
        inputs = heads(n=0 if "empty" in options else s.n, grad=grad)
        options = {name: value for name, value in options.items() if name != "empty"}
        with refused(NotImplementedError, f'impl="{impl}" lacks {missing}', others, 'impl="auto"'):
            attention(*inputs, impl=impl, **options)
        attention(*inputs, **options)  # auto does it

    def test_weights_are_checked_too(self):
        with refused(ValueError, "window"):
            attention_weights(*heads()[:2], window=0)


# FlexAttention


def test_flex_warns_nobody_and_needs_no_grad():
    q, k, v = heads(grad=True)
    with torch.no_grad(), pytest.warns() as heard:
        import warnings

        warnings.warn("one", stacklevel=1)
        out = attention(q, k, v, impl="flex", window=3)
    assert len(heard) == 1
    torch.testing.assert_close(out, attention(q, k, v, impl="math", window=3))


def test_other_numbers_make_no_other_kernel():
    "A softcap, a bias or a mask of other values runs the graph that is there."
    compiled, graphs = counted(torch.nn.attention.flex_attention.flex_attention)
    q, k, v = heads(g=s.h, n=40, m=40)
    for cap, seed in (3.0, 1), (4.0, 2), (5.5, 3):
        torch.manual_seed(seed)
        call = checked_call(q, k, v, mask=torch.rand(40, 40) < 0.9, bias=torch.randn(40, 40), softcap=cap)
        out = compiled(q, k, v, score_mod=_score_mod(call))
        torch.testing.assert_close(out, attention(q, k, v, mask=call.mask, bias=call.bias, softcap=cap))
    assert len(graphs) == 1


@pytest.mark.parametrize("own", [True, False])
def test_more_than_eight_kinds_are_compiled(own, monkeypatch):
    "As many graphs as widths; with torch's own limit, eight, the ninth would run uncompiled."
    compiler, graphs = torch.compile, []

    def note(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def counting(function, **options):
        if "backend" in options:  # what FlexAttention itself does where it is not compiled
            return compiler(function, **options)
        return compiler(function, backend=note, **options if own else {})

    monkeypatch.setattr(torch, "compile", counting)
    torch._dynamo.reset()
    compiled, widths = _compiled_flex.__wrapped__(), range(16, 26)
    for d in widths:
        q, k, v = heads(b=1, h=1, g=1, n=3, m=4, d=d)
        torch.testing.assert_close(compiled(q, k, v), attention(q, k, v))
    assert (len(graphs) == len(widths)) == own


def counted(function):
    graphs = []

    def note(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    return torch.compile(function, backend=note), graphs


# torch.compile; in a process of its own, for shape checking wraps every function

GRAPHS = """
import logging, sys, torch
from functools import partial
torch._logging.set_logs(dynamo=logging.CRITICAL)
from mha_book import MultiHeadAttention
from mha_book.kernels.backends import attention
if sys.argv[1] == "default":
    torch.set_default_device("cpu")
layer, x, sinks = MultiHeadAttention(48, 6, num_kv_heads=3), torch.randn(2, 40, 48), torch.randn(6)
mask = torch.rand(40, 40) < 0.8
for impl, options, call in [
        ("auto", {}, {"is_causal": True}), ("auto", {}, {"mask": mask}), ("auto", {"window": 5}, {"is_causal": True}),
        ("auto", {"softcap": 2.0}, {"mask": mask}), ("auto", {"sinks": sinks}, {"is_causal": True}),
        ("math", {"window": 5, "sinks": sinks}, {}), ("sdpa", {"window": 5, "sinks": sinks}, {"mask": mask}),
        ("flex", {"softcap": 2.0, "window": 5}, {"mask": mask})]:
    layer.attend = partial(attention, impl=impl, **options)
    with torch.set_grad_enabled(impl != "flex"):
        torch._dynamo.reset()
        whole = torch.compile(layer, backend="eager", fullgraph=True)
        torch.testing.assert_close(whole(x, **call), layer(x, **call))
def broken(q, k, v, **options):
    return attention(q if q.max() > 0 else q, k, v, **options)
layer.attend = broken
torch._dynamo.reset()
try:
    torch.compile(layer, backend="eager", fullgraph=True)(x)
except torch._dynamo.exc.Unsupported:
    print("whole")
"""


@pytest.mark.parametrize("device", ["", "default"])
def test_the_layer_is_one_graph(device):
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", GRAPHS, device], capture_output=True, text=True)
    assert done.stdout == "whole\n", done.stderr[-2000:]


def test_a_mask_of_rank_three_is_no_trap_here():
    "Bare, it falls back; through the book's function, it does not."
    q, k, v = heads(g=s.h, n=40, m=40)
    mask = torch.rand(s.h, 40, 40) < 0.8
    assert torch_kernel(q, k, v, attn_mask=mask)[0] == "math"
    assert explain_dispatch(q, k, v, mask=mask).kernel == "flash"


# What a hostile review found


@OURS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [None, 2.0, -2.0, 1e-3])
@pytest.mark.parametrize("sink", [3.0, -3e4, -float("inf")])
@pytest.mark.parametrize("impl", ["math", "sdpa", "flex", "auto"])
def test_sinks_of_any_size_under_any_scale(dtype, scale, sink, impl):
    q, k, v = heads(n=12, m=12, dtype=dtype)
    sinks = torch.full((s.h,), sink, dtype=dtype)
    exact = reference_attention(q, k, v, sinks=sinks.double().clamp(min=-1e6), scale=scale, is_causal=True)
    got = attention(q, k, v, sinks=sinks, scale=scale, is_causal=True, impl=impl)
    plain = attention(q, k, v, sinks=sinks, scale=scale, is_causal=True, impl="math")
    bound = 2 * (plain.double() - exact).abs().max() + 8 * torch.finfo(dtype).eps * v.abs().max().double()
    assert (got.double() - exact).abs().max() <= max(bound.item(), 1e-9 if dtype == torch.float64 else 0)


@OURS
def test_a_sink_that_never_speaks_survives_autocast():
    q, k, v = heads(n=40, m=40)
    with torch.autocast("cpu", torch.bfloat16):
        out = attention(q, k, v, sinks=torch.full((s.h,), -float("inf")))
    torch.testing.assert_close(out.float(), attention(q, k, v), atol=0.05, rtol=0.05)


@OURS
def test_auto_refuses_nothing_where_torch_cannot_be_asked():
    q, k, v = heads(n=40, m=40, g=s.h)
    each = torch.vmap(lambda *one: attention(*(t[None] for t in one), window=5)[0])(q, k, v)
    torch.testing.assert_close(each, attention(q, k, v, window=5))
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
        assert attention(q, k, v, window=5, dropout_p=0.1).shape == q.shape
        assert explain_dispatch(q, k, v, window=5, dropout_p=0.1).impl == "math"


@OURS
def test_flex_keeps_no_block_mask_of_a_passing_mode():
    q, k, v = heads(n=33, m=33)
    with torch.inference_mode():
        attention(q, k, v, window=7, impl="flex")
    from mha_book.kernels.flex import _near_once

    assert not _near_once(33, 33, 6, None, q.device).kv_num_blocks.is_inference()
    with torch._subclasses.FakeTensorMode() as fake:
        attention(*(fake.from_tensor(t) for t in heads(n=35, m=35)), window=7, impl="flex")
    attention(*heads(n=35, m=35), window=7, impl="flex")


@OURS
def test_flex_caps_in_the_width_of_its_inputs():
    q, k, v = heads(dtype=torch.float64)
    exact = reference_attention(q, k, v, softcap=1.3)
    assert (attention(q, k, v, softcap=1.3, impl="flex") - exact).abs().max() < 1e-12


@OURS
def test_flex_gives_nothing_to_a_blind_query_without_a_sink():
    q, k, v = heads()
    mask = torch.ones(s.n, s.m, dtype=torch.bool)
    mask[1] = False
    out = attention(q, k, v, mask=mask, sinks=torch.full((s.h,), -float("inf")), impl="flex")
    assert (out[:, :, 1] == 0).all() and out.isfinite().all()


@OURS
@pytest.mark.parametrize("impl", ["auto", "math"])
@pytest.mark.parametrize(
    "scale, error", [("x", TypeError), (True, TypeError), (float("nan"), ValueError), (float("inf"), ValueError)]
)
def test_a_scale_that_is_none_is_refused(impl, scale, error):
    with pytest.raises(error, match="scale"):
        attention(*heads(), scale=scale, impl=impl)


@OURS
def test_a_wide_bias_beside_sinks_is_not_held_in_its_own_width():
    q, k, v = heads(n=200, m=200, dtype=torch.bfloat16)
    options = dict(
        bias=torch.zeros(s.h, 200, 200, dtype=torch.float64), window=17, sinks=torch.zeros(s.h, dtype=torch.bfloat16)
    )
    with torch.no_grad():
        held = {impl: peak_bytes(lambda: attention(q, k, v, impl=impl, **options)) for impl in ("auto", "math")}
    assert held["auto"] <= held["math"]


@OURS
def test_decoding_with_sinks_runs_the_kernel():
    "The definition copies keys and values for every query head; one query against many keys must not."
    q, k, v = heads(h=8, g=2, n=1, m=2048, d=64)
    sinks = torch.zeros(8)
    assert explain_dispatch(q, k, v, sinks=sinks).impl == "sdpa"
    with torch.no_grad():
        held = {impl: peak_bytes(lambda: attention(q, k, v, sinks=sinks, impl=impl)) for impl in ("auto", "math")}
    assert held["auto"] < held["math"]


# What the softmax takes


@OURS
def test_logits_are_dot_products_and_what_is_done_to_them():
    q, k, _ = heads(2, 6, 3, 5, 7, 8, dtype=torch.float64)
    mask, bias = torch.rand(2, 1, 5, 7) < 0.7, torch.randn(6, 5, 7)
    logits = attention_logits(q, k, mask=mask, bias=bias, window=(2, 1), scale=0.3, softcap=2.0)
    for b, h, i, j in itertools.product(range(2), range(6), range(5), range(7)):
        position = 7 - 5 + i
        if not mask[b, 0, i, j] or not position - 2 <= j <= position + 1:
            assert logits[b, h, i, j] == -torch.inf
            continue
        dot = sum(float(x) * float(y) for x, y in zip(q[b, h, i], k[b, h // 2, j]))
        exact = 2.0 * math.tanh(0.3 * dot / 2.0) + float(bias[h, i, j])
        assert abs(logits[b, h, i, j].item() - exact) < 1e-12


# What random search found (tests/test_options.py)


@OURS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [None, 1e-3, -1e4])
@pytest.mark.parametrize("impl", ["sdpa", "auto"])
def test_a_sink_is_never_held_back(dtype, scale, impl):
    "One of minus infinity takes nothing from logits of -3e4, and one of 3e4 is 3e4 beside logits that are."
    q, k, v = heads(m=40, dtype=dtype)
    q = q / (1.0 if scale is None else abs(scale) * 3)
    for sink, level in (-math.inf, -3e4), (3e4, 3e4), (-3e4, -3e4):
        sinks, bias = torch.full((s.h,), sink, dtype=dtype), torch.full((s.n, 40), level, dtype=dtype)
        options = dict(sinks=sinks, bias=bias, scale=scale)
        exact = reference_attention(q, k, v, **options)
        plain = attention(q, k, v, impl="math", **options)
        assert_as_exact(attention(q, k, v, impl=impl, **options), exact, plain)
        assert exact.abs().max() > 0.1


@OURS
@pytest.mark.parametrize("scale", [0.0, 1e-6, 1e6, -1e30])
def test_scales_that_a_sink_cannot_be_divided_by(scale):
    options = dict(scale=scale, sinks=torch.zeros(s.h))
    with refused(NotImplementedError, f'impl="sdpa" lacks sinks with scale={scale}', "math"):
        attention(*heads(), impl="sdpa", **options)
    assert attention(*heads(), **options).isfinite().all()


LOWEST = {dtype: torch.finfo(dtype).min / 2 for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)}


@OURS
@pytest.mark.parametrize("dtype", LOWEST)
@pytest.mark.parametrize("impl", ["sdpa", "auto"])
def test_a_bias_may_be_lower_than_a_sink_of_minus_infinity(dtype, impl):
    q, k, v = heads(m=40, dtype=dtype)
    bias = torch.zeros(s.n, 40, dtype=dtype)
    bias[:3] = LOWEST[dtype]
    for sinks in (torch.full((s.h,), -math.inf), torch.tensor([-math.inf, 0.0, 1.0, -3e4, math.inf, 9.0])):
        options = dict(sinks=sinks.to(dtype), bias=bias)
        exact = reference_attention(q, k, v, **options)
        plain = attention(q, k, v, impl="math", **options)
        assert_as_exact(attention(q, k, v, impl=impl, **options), exact, plain)


@OURS
@pytest.mark.parametrize(
    "dtype, level", [(torch.float16, 5e4), (torch.bfloat16, 1e18), (torch.float32, 1e18), (torch.float64, 1e18)]
)
def test_an_infinite_sink_is_beyond_any_logit(dtype, level):
    "Logits of -level, without a bias: minus infinity takes nothing, and plus infinity takes all."
    q, k, v = heads(b=1, h=2, g=2, m=40, dtype=dtype)
    q, k = torch.full_like(q, math.sqrt(level / s.d)), torch.full_like(k, -math.sqrt(level / s.d))
    out = attention(q, k, v, impl="sdpa", scale=1.0, sinks=torch.tensor([-math.inf, math.inf], dtype=dtype))
    torch.testing.assert_close(out[:, 0], v[:, 0].mean(1, keepdim=True).expand_as(out[:, 0]), atol=2e-2, rtol=2e-2)
    assert not out[:, 1].any()


@OURS
@pytest.mark.parametrize("scale", [2.0**-15, 2.0**-9, 0.5, 2.0**14])
@pytest.mark.parametrize("sign", [1, -1])
def test_a_sink_is_carried_exactly_under_any_power_of_two(scale, sign):
    "Halves, the narrowest: the largest sink that they have takes half of the weight from its equal."
    q = torch.zeros(1, 3, 2, s.d, dtype=torch.float16)
    k, v = torch.zeros(1, 3, 1, s.d, dtype=torch.float16), torch.ones(1, 3, 1, s.d, dtype=torch.float16)
    sinks = torch.tensor([65504.0, 1.5, -65504.0]).half()
    bias = sinks[:, None, None].expand(3, 2, 1)
    out = attention(q, k, v, impl="sdpa", scale=sign * scale, sinks=sinks, bias=bias)
    torch.testing.assert_close(out, torch.full_like(out, 0.5))


@OURS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [4e-5, 3e-4, 0.3, 7.0, 3e4])
def test_a_sink_under_any_scale(dtype, scale):
    q, k, v = heads(m=40, dtype=dtype)
    q = q / max(1.0, scale * 3)
    for sinks in torch.randn(s.h), 10 * torch.randn(s.h), torch.full((s.h,), -math.inf):
        options = dict(scale=scale, sinks=sinks.to(dtype))
        exact = reference_attention(q, k, v, **options)
        plain = attention(q, k, v, impl="math", **options)
        assert_as_exact(attention(q, k, v, impl="sdpa", **options), exact, plain, 2 * v.abs().max().item())


@OURS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16])
def test_sinks_survive_any_autocast(dtype, cast):
    q, k, v = heads(m=40, dtype=dtype)
    sinks = torch.tensor([-math.inf, math.inf, 0.5, 3e4, -3e4, 1.0]).to(dtype)
    exact = reference_attention(q, k, v, sinks=sinks)
    for impl in "sdpa", "auto":
        with torch.autocast("cpu", cast):
            out = attention(q, k, v, sinks=sinks, impl=impl)
        assert (out.double() - exact).abs().max() < 0.05


# torch has no batching rule for its kernel, and says that this is slow
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@OURS
@pytest.mark.parametrize("impl", ["sdpa", "auto"])
def test_sinks_alone_under_vmap(impl):
    q, k, v = heads(b=1, h=3, g=3, n=50, m=50)
    sinks = torch.randn(4, 3)
    out = torch.func.vmap(lambda row: attention(q, k, v, sinks=row, impl=impl))(sinks)
    for mine, row in zip(out, sinks):
        torch.testing.assert_close(mine, attention(q, k, v, sinks=row, impl="math"))
