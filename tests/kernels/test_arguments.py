"""One rule for each kind of argument, in every entry point alike: refused in words, or the numbers that float64 has."""

import math
from functools import partial

import numpy as np
import pytest
import torch

from mha_book import (
    ALiBi,
    AttentionHead,
    ExtraKeys,
    HeadList,
    HeadTemperature,
    MultiHeadAttention,
    OutputGate,
    RelativeBias,
    SinkAttention,
    attention,
    attention_logits,
    attention_weights,
    fused_attend,
    qk_clip_,
    z_loss,
)
from mha_book.heads.single_head import (
    causal_mask,
    masked_softmax,
    plain_attention,
    plain_attention_weights,
    query_places,
)
from mha_book.instruments.dispatch import explain_dispatch
from mha_book.instruments.testing import SIZES, reference_attention
from mha_book.kernels.backends import checked_call, window_mask
from mha_book.kernels.merging import attention_with_lse
from mha_book.plugs.positions import distances
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


@EVERY
@pytest.mark.parametrize("name, extra", [("mask", torch.ones(s.n, s.m) > 0), ("bias", torch.ones(s.n, s.m))])
def test_sparse_masks_and_biases_are_refused(way, name, extra):
    with refused(TypeError, f"{name} has the layout torch.sparse_coo", f"{name}.to_dense()"):
        way(*heads(), **{name: extra.to_sparse()})


@EVERY
@pytest.mark.parametrize("name", ["q", "mask", "bias"])
def test_what_is_on_meta_beside_what_is_not_has_no_numbers_to_move(way, name):
    (q, k, v), extras = heads(), {"mask": torch.ones(s.n, s.m) > 0, "bias": torch.ones(s.n, s.m)}
    options = {} if name == "q" else {name: extras[name].to("meta")}
    with refused(ValueError, "device", "meta", "cpu", "there are no numbers to move: make all on one device"):
        way(q.to("meta") if name == "q" else q, k, v, **options)


def test_lengths_are_no_floats_and_no_truth_values():
    for n, m in (2.5, 3), (True, 3), (2, 3.0), (2, False):
        for way in causal_mask, query_places, distances, partial(window_mask, window=2):
            with refused(TypeError, "counted by ints", repr(n), repr(m)):
                way(n, m)


@pytest.mark.parametrize("attend", ["math", None, 3], ids=repr)
def test_a_plug_hands_on_to_what_can_be_called(attend):
    for plug in ALiBi, RelativeBias, HeadTemperature, SinkAttention, partial(ExtraKeys, head_dim=s.d):
        with refused(TypeError, "attend must be callable", repr(attend)):
            plug(s.h, attend=attend)


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


@EVERY
@pytest.mark.parametrize("scale", [10**400, -(10**400), 2**63, 10**5000], ids=int.bit_length)
def test_an_int_beyond_those_of_torch_is_refused(way, scale):
    with refused(ValueError, f"scale is an int of {scale.bit_length()} bits", "float"):
        way(*heads(), scale=scale)
    if way in MORE.values():
        with refused(ValueError, "softcap"):
            way(*heads(), softcap=abs(scale))
    with refused(ValueError, "threshold"):
        qk_clip_(MultiHeadAttention(48, 6), torch.ones(6), abs(scale))


@IMPLS
@pytest.mark.parametrize("m", [3, s.m, 14, 15, 16, 40])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sink_that_is_nan_is_seen_in_its_head_and_in_no_other(dtype, m, impl):
    q, k, v = torch.randn(s.b, s.h, 3, s.d), torch.randn(s.b, s.g, m, s.d), torch.randn(s.b, s.g, m, s.d)
    sinks = torch.tensor([0, -math.inf, math.nan, 2, 7e4, math.inf])
    for options in (
        {},
        {"is_causal": True},
        {"bias": torch.randn(m).to(dtype)},
        {"window": 2},
        {"mask": torch.arange(m) > 1},
    ):
        out = attention(*(t.to(dtype) for t in (q, k, v)), sinks=sinks, impl=impl, **options)
        assert out[:, 2].isnan().all() and out[:, [0, 1, 3, 4, 5]].isfinite().all()


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
