"""One rule for each kind of argument, in every entry point alike: refused in words, or the numbers that float64 has."""

import math
from functools import partial

import numpy as np
import pytest
import torch

from mha_book import (
    ALiBi,
    AttentionHead,
    HeadList,
    HeadTemperature,
    MultiHeadAttention,
    OutputGate,
    RelativeBias,
    attention,
    attention_logits,
    attention_weights,
    fused_attend,
    qk_clip_,
    z_loss,
)
from mha_book.heads.single_head import masked_softmax, plain_attention, plain_attention_weights
from mha_book.instruments.dispatch import explain_dispatch
from mha_book.instruments.testing import SIZES, reference_attention
from mha_book.kernels.backends import checked_call
from mha_book.kernels.merging import attention_with_lse
from support.refusals import refused

s = SIZES
pytestmark = pytest.mark.usefixtures("own_messages")
DTYPES = torch.float64, torch.float32, torch.bfloat16, torch.float16


def heads(dtype=torch.float32):
    return [
        torch.randn(shape).to(dtype) for shape in ((s.b, s.h, s.n, s.d), (s.b, s.g, s.m, s.d), (s.b, s.g, s.m, s.d))
    ]


def plugged(plug):
    return lambda q, k, v, **o: plug(q, k, v, **dict(mask=None, bias=None, is_causal=False, dropout_p=0.0) | o)


def of_two(function):
    return lambda q, k, v, **o: function(q, k, **o)


# what takes q, k, v, mask, bias, is_causal and scale; those of MORE take the options of `attention` too
BASIC = {
    "plain_attention": plain_attention,
    "plain_attention_weights": of_two(plain_attention_weights),
    "fused_attend": fused_attend,
}
MORE = {
    **{impl: partial(attention, impl=impl) for impl in ("auto", "math", "sdpa", "flex")},
    "attention_weights": of_two(attention_weights),
    "attention_logits": of_two(attention_logits),
    "attention_with_lse": attention_with_lse,
    "checked_call": checked_call,
    "explain_dispatch": explain_dispatch,
    "reference_attention": reference_attention,
    "HeadTemperature": plugged(HeadTemperature(s.h)),
    "RelativeBias": plugged(RelativeBias(s.h)),
    "ALiBi": plugged(ALiBi(s.h)),
}
EVERY = pytest.mark.parametrize("way", (BASIC | MORE).values(), ids=BASIC | MORE)


@EVERY
@pytest.mark.parametrize("place", range(3))
@pytest.mark.parametrize("make, words", [
    (lambda t: t.to(torch.int64), "int64"), (lambda t: t > 0, "torch.bool"),
    (lambda t: t.to(torch.complex64), "complex64"), (lambda t: t.numpy(), "torch.from_numpy"),
])  # fmt: skip
def test_queries_keys_and_values_are_tensors_of_floats(way, place, make, words):
    inputs = heads()
    inputs[place] = make(inputs[place])
    asks_v = way not in (BASIC["plain_attention_weights"], MORE["attention_weights"], MORE["attention_logits"])
    if place == 2 and not asks_v:
        return
    with refused(TypeError, "qkv"[place], words):
        way(*inputs)


@pytest.mark.parametrize("make", [
    lambda t: t.tolist(), lambda t: None, lambda t: t.to_sparse(), lambda t: t.to(torch.float8_e4m3fn),
    lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8),
])  # fmt: skip
@pytest.mark.parametrize("way", [attention, partial(attention, impl="math"), plain_attention, fused_attend])
@pytest.mark.filterwarnings("ignore:torch.quantize:UserWarning")
def test_what_else_is_no_tensor_of_floats(way, make):
    q, k, v = heads()
    for place, name in enumerate("qkv"):
        inputs = [q, k, v]
        inputs[place] = make(inputs[place])
        with refused(TypeError, f"{name} "):
            way(*inputs)


@EVERY
@pytest.mark.parametrize("options, words", [
    (dict(mask=np.ones((s.n, s.m), bool)), ["mask", "torch.from_numpy"]), (dict(mask=[[True]]), ["mask", "list"]),
    (dict(mask=torch.ones(s.n, s.m)), ["mask", "torch.bool"]),
    (dict(bias=np.zeros((s.n, s.m), np.float32)), ["bias", "torch.from_numpy"]), (dict(bias=1.0), ["bias", "float"]),
    (dict(bias=torch.ones(s.m, dtype=torch.int64)), ["bias", "int64"]),
    (dict(bias=torch.ones(s.m, dtype=torch.complex64)), ["bias", "complex64"]),
    *[(dict(is_causal=flag), ["is_causal", repr(flag)]) for flag in (np.True_, 1, 0, "no", None, torch.tensor(True))],
    *[(dict(scale=scale), ["scale", repr(scale)]) for scale in (True, "x", np.float32(0.3), torch.tensor(0.3))],
], ids=str)  # fmt: skip
def test_options_of_another_kind_are_refused(way, options, words):
    with refused(TypeError, *words):
        way(*heads(), **options)


@pytest.mark.parametrize("way", MORE.values(), ids=MORE)
@pytest.mark.parametrize("options, words", [
    *[(dict(softcap=cap), ["softcap", repr(cap)]) for cap in (True, "x", np.float32(3), torch.tensor(3.0))],
    *[(dict(window=window), ["window", repr(window)]) for window in (True, 2.0, np.int64(3), (1, np.int64(2)), "3")],
], ids=str)  # fmt: skip
def test_numbers_are_numbers_of_python(way, options, words):
    with refused(TypeError, *words):
        way(*heads(), **options)


@pytest.mark.parametrize("sinks", [np.zeros(s.h), [0.0], torch.zeros(s.h, dtype=torch.complex64), torch.arange(s.h)])
def test_sinks_are_a_tensor_of_floats(sinks):
    for way in attention, of_two(attention_weights), attention_with_lse, checked_call, reference_attention:
        with refused(TypeError, "sinks"):
            way(*heads(), sinks=sinks)


@pytest.mark.parametrize("dropout", [True, "x", None, np.float32(0.1), torch.tensor(0.1)], ids=repr)
def test_dropout_is_a_number(dropout):
    for way in attention, partial(attention, impl="math"), plain_attention, fused_attend:
        with refused(TypeError, "dropout", repr(dropout)):
            way(*heads(), dropout_p=dropout)


@pytest.mark.parametrize("impl", [None, 3, ["math"], b"math"], ids=repr)
def test_impl_is_a_name(impl):
    for way in attention, explain_dispatch:
        with refused(TypeError, "impl", repr(impl), "auto, math, sdpa, flex"):
            way(*heads(), impl=impl)


def test_a_float_of_numpy_that_is_one_of_pythons_is_taken():
    q, k, v = heads()
    for options in {"scale": 0.3}, {"softcap": 3.0}:
        same = {name: np.float64(x) for name, x in options.items()}
        assert torch.equal(attention(q, k, v, **options), attention(q, k, v, **same))


def test_heads_gates_and_losses_say_the_same():
    x, layer = torch.randn(2, 5, 48), MultiHeadAttention(48, 6)
    for head in AttentionHead(48, 8), HeadList(48, 6):
        with refused(TypeError, "x must be a torch.Tensor", "torch.from_numpy"):
            head(x.numpy())
        with refused(TypeError, "is_causal", "'no'"):
            head(x, is_causal="no")
        with refused(TypeError, "mask", "torch.from_numpy"):
            head(x, mask=np.ones((5, 5), bool))
    for heads_and_x, name in ((x.numpy(), x), "heads"), ((x, x.numpy()), "x"), ((x, x.long()), "x"):
        with refused(TypeError, name):
            OutputGate(48, 6)(*heads_and_x)
    for lse in x.numpy(), x.long(), x.to(torch.complex64):
        with refused(TypeError, "lse"):
            z_loss(lse)
    for largest, threshold, name in (np.ones(6), 3.0, "largest"), (torch.ones(6), np.float32(3), "threshold"):
        with refused(TypeError, name):
            qk_clip_(layer, largest, threshold)
    for logits, mask, name in (np.zeros((2, 2)), None, "logits"), (torch.zeros(2, 2), np.ones((2, 2)), "mask"):
        with refused(TypeError, name, "torch.from_numpy"):
            masked_softmax(logits, mask)


# Numbers beyond what the dtype holds


IMPLS = pytest.mark.parametrize("impl", ["math", "sdpa", "flex", "auto"])


def assert_as_float64(dtype, impl, zero=False, **options):
    "The numbers of the definition in float64, by the implementations that have the options."
    q, k, v = heads(dtype)
    q = q * (0 if zero else 1)
    try:
        got = attention(q, k, v, impl=impl, **options)
    except NotImplementedError as refusal:
        assert f'impl="{impl}" lacks' in str(refusal)
        return
    wide = {name: x.double() if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    exact = reference_attention(q.double(), k.double(), v.double(), **wide)
    assert (got.double() - exact).abs().max() <= 8 * torch.finfo(dtype).eps * v.abs().max() + 1e-12


@IMPLS
@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("softcap", [1e300, 1e39, 7e4, 3e38, 1e-6, 1e-46, 1e-310])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_softcap_of_any_size(dtype, softcap, zero, impl):
    assert_as_float64(dtype, impl, zero, softcap=softcap)
    assert_as_float64(dtype, impl, zero, softcap=softcap, bias=torch.randn(s.n, s.m).to(dtype), window=3)


def test_a_softcap_of_any_size_has_a_gradient():
    q, k, v = (t.requires_grad_() for t in heads())
    plain = torch.autograd.grad(attention(q, k, v).square().sum(), q)[0]
    for softcap in 1e300, 1e31:
        torch.testing.assert_close(torch.autograd.grad(attention(q, k, v, softcap=softcap).square().sum(), q)[0], plain)
    (small,) = torch.autograd.grad(attention(q, k, v, softcap=1e-46).square().sum(), q)
    assert small.abs().max() == 0


@IMPLS
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("scale", [1e-300, -1e-300, 1e-40, 0.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_scale_that_is_nothing_in_the_dtype(dtype, scale, is_causal, impl):
    assert_as_float64(dtype, impl, scale=scale, is_causal=is_causal)


@IMPLS
@pytest.mark.parametrize("scale", [300.0, 1e5, -1e5, 1e25])
def test_a_scale_beyond_which_float16_overflows(scale, impl):
    "The products are exact, so that all implementations see the same largest logit."
    q, k, v = (t.round() for t in heads())
    q[..., 0], k[..., 0] = 3.0, torch.arange(s.m) * 2.0
    got = attention(q.half(), k.half(), v.half(), scale=scale, impl=impl)
    exact = reference_attention(q.double(), k.double(), v.double(), scale=scale)
    assert (got.double() - exact).abs().max() < 0.01


@EVERY
@pytest.mark.parametrize("dtype, scale", [(torch.float32, 1e300), (torch.float16, -1e39), (torch.float64, 1e308)])
def test_a_scale_that_leaves_no_logit_finite_is_refused(way, dtype, scale):
    with refused(ValueError, f"scale {scale:.0e}", str(dtype)):
        way(*heads(dtype), scale=scale)


@IMPLS
@pytest.mark.parametrize("wide", [torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sinks_of_any_dtype_and_size(dtype, wide, impl):
    sinks = torch.tensor([70000.0, -70000.0, -math.inf, 1e30, -1e30, 0.3]).to(wide)
    for options in {}, {"is_causal": True}, {"window": 3}, {"bias": torch.randn(s.h, 1, s.m).to(dtype)}:
        assert_as_float64(dtype, impl, sinks=sinks, **options)
    out = attention(*heads(dtype), sinks=torch.full((s.h,), math.inf, dtype=wide), impl=impl)
    assert not out.any()


@IMPLS
def test_a_wide_sink_is_not_rounded_to_the_dtype_of_the_queries(impl):
    "Beside a bias of 300, a sink of 300.3 is 300 or 302 in bfloat16."
    bias, sinks = torch.full((s.m,), 300.0).bfloat16(), torch.full((s.h,), 300.3)
    assert_as_float64(torch.bfloat16, impl, zero=True, sinks=sinks, bias=bias)
    q, k, v = heads(torch.bfloat16)
    q = q * 0
    exact = reference_attention(q, k, v, sinks=sinks, bias=bias)
    assert (exact - reference_attention(q, k, v, sinks=sinks.bfloat16(), bias=bias)).abs().max() > 0.02


@pytest.mark.parametrize("impl", ["math", "sdpa", "auto"])
def test_dropout_that_leaves_weights_beyond_the_dtype_is_refused(impl):
    with refused(ValueError, "dropout 0.99999", "float16"):
        attention(*heads(torch.float16), dropout_p=0.99999, impl=impl)
    for dtype in torch.float32, torch.bfloat16:
        assert attention(*heads(dtype), dropout_p=1 - 2**-53, impl=impl).isfinite().all()


@IMPLS
@pytest.mark.parametrize("window", [10**30, 2**63, (10**30, 2), (2, 10**30)], ids=str)
def test_a_window_of_any_size(window, impl):
    assert_as_float64(torch.float32, impl, window=window)
