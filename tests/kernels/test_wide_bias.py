"""A bias counts in the wider of its dtype and the queries', by every implementation, alone and beside anything else."""

import itertools
import math
from dataclasses import replace
from functools import partial

import pytest
import torch

from mha_book import (
    ALiBi,
    MultiHeadAttention,
    RelativeBias,
    SinkAttention,
    attention,
    attention_logits,
    attention_weights,
    folded_attend,
    fused_attend,
)
from mha_book.heads.single_head import plain_attention, plain_attention_weights
from mha_book.instruments.device import peak_bytes
from mha_book.instruments.testing import SIZES, assert_as_exact, reference_attention
from mha_book.kernels.backends import BACKENDS, checked_call
from mha_book.kernels.merging import attention_with_lse

s = SIZES
DTYPES = torch.float16, torch.bfloat16, torch.float32, torch.float64
WIDER = [
    (narrow, wide) for narrow, wide in itertools.product(DTYPES, DTYPES) if torch.promote_types(narrow, wide) != narrow
]
LOWEST = torch.finfo(torch.float32).min
OURS = pytest.mark.usefixtures("own_messages")
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")


def heads(dtype, grad=False, b=s.b, n=s.n, m=s.m):
    shapes = (b, s.h, n, s.d), (b, s.g, m, s.d), (b, s.g, m, s.dv)
    return [torch.randn(shape).to(dtype).requires_grad_(grad) for shape in shapes]


def column(number, n=s.n, m=s.m):
    "One key that everybody is told to look at, or not to."
    bias = torch.randn(n, m)
    bias[:, 1] = number
    return bias


def some_rows():
    "Rows that see nothing, or only some keys."
    bias = torch.randn(s.h, s.n, s.m)
    bias[:, 2] = -math.inf
    bias[:, 3, ::2] = -math.inf
    return bias


# numbers that float16, or bfloat16, rounds to something else or has not
BIASES = {
    "fine steps at 30": lambda: 30 + torch.arange(s.m) / 64,
    "70000": lambda: column(7e4),
    "-70000": lambda: column(-7e4),
    "1e30": lambda: column(1e30),
    "all lowest": lambda: torch.full((s.n, s.m), LOWEST),
    "-inf": some_rows,
    "a head each": lambda: torch.randn(s.h, 1, s.m) * 20,
    "one number": lambda: torch.tensor(7e4),
}
BESIDE = {
    "alone": {},
    "causal": {"is_causal": True},
    "mask": {"mask": torch.rand(s.b, 1, s.n, s.m, generator=torch.Generator().manual_seed(0)) < 0.7},
    "scale": {"scale": -0.4, "is_causal": True},
    "window": {"window": (3, 1)},
    "sinks": {"sinks": torch.tensor([0.3, -1.0, 2.0, -math.inf, 7e4, 1.0])},
    "softcap": {"softcap": 2.0},
}
PLAIN_OPTIONS = {"mask", "is_causal", "scale"}


def ways(options):
    "Everything that can compute a call with these options."
    yield "weights", lambda q, k, v, **o: attention_weights(q, k, **o) @ v.repeat_interleave(s.h // s.g, 1)
    yield "with lse", lambda q, k, v, **o: attention_with_lse(q, k, v, **o)[0]
    yield "auto", attention
    for impl in BACKENDS:
        if "softcap" not in options or impl != "sdpa":
            yield impl, partial(attention, impl=impl)
    if options.keys() <= PLAIN_OPTIONS:
        yield "plain", plain_attention
        yield "fused", fused_attend
        yield "folded", folded_attend


def assert_counts_as_it_is(way, inputs, bias, options, exact):
    got = way(*inputs, bias=bias, **options)
    eps, largest = torch.finfo(got.dtype).eps, inputs[2].abs().max().item()
    assert got.dtype == inputs[0].dtype
    # the rule allows twice the error of the definition: logits are rounded to the dtype of the queries
    assert_as_exact(got, exact, exact + 4 * eps * largest, largest)


@OURS
@pytest.mark.parametrize("narrow, wide", WIDER, ids=str)
@pytest.mark.parametrize("name", BIASES)
def test_a_wide_bias_is_added_as_it_is(name, narrow, wide):
    bias = BIASES[name]().to(wide)
    if not bias.isfinite().all() and name != "-inf":
        pytest.skip(f"{wide} does not hold it")
    for options in BESIDE.values():
        inputs = heads(narrow)
        exact = reference_attention(*inputs, bias=bias, **options)
        for _, way in ways(options):
            assert_counts_as_it_is(way, inputs, bias, options, exact)


@OURS
@pytest.mark.parametrize("narrow", [torch.float16, torch.bfloat16])
def test_a_bias_that_is_rounded_first_is_noticed(narrow):
    def rounding(q, k, v, *, bias):
        return attention(q, k, v, bias=bias.to(q.dtype))

    inputs, bias = heads(narrow), torch.randn(s.h, s.n, s.m) + 1000
    exact = reference_attention(*inputs, bias=bias)
    assert_counts_as_it_is(attention, inputs, bias, {}, exact)
    with pytest.raises(AssertionError, match="error|nothing to compare"):
        assert_counts_as_it_is(rounding, inputs, bias, {}, exact)


@OURS
@pytest.mark.parametrize("narrow, wide", [(torch.bfloat16, torch.float32), (torch.float32, torch.float64)], ids=str)
@pytest.mark.parametrize("length", [5, 40])
@pytest.mark.parametrize("impl", ["math", "sdpa", "auto"])
def test_gradients_come_in_the_dtype_of_each_input(narrow, wide, impl, length):
    inputs, bias = heads(narrow, True, n=length), (torch.randn(s.h, length, s.m) * 5).to(wide).requires_grad_()
    exact_inputs = [t.detach().double().requires_grad_() for t in (*inputs, bias)]
    for options in {}, {"sinks": torch.randn(s.h)}, {"is_causal": True}:
        *q_k_v, exact_bias = exact_inputs
        out = attention(*inputs, bias=bias, impl=impl, **options)
        exact = (
            plain_attention(*q_k_v, bias=exact_bias)
            if not options
            else attention(*q_k_v, bias=exact_bias, impl="math", **options)
        )
        upstream = torch.randn_like(exact)
        grads = torch.autograd.grad(out, (*inputs, bias), upstream.to(narrow))
        for grad, leaf, true in zip(grads, (*inputs, bias), torch.autograd.grad(exact, exact_inputs, upstream)):
            assert grad.dtype == leaf.dtype
            assert (grad.double() - true).abs().max() <= 8 * torch.finfo(narrow).eps * true.abs().max()


@OURS
@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, None])
@pytest.mark.parametrize("wide", [torch.float32, torch.float64])
def test_autocast_narrows_the_queries_and_not_the_bias(narrow, dtype, wide):
    "Two keys whose biases differ by .7 at 1000: of halves they are one number, or another."
    inputs, bias = heads(dtype or narrow), column(1000.7).to(wide)
    bias[:, 2] = 1000.0
    exact = reference_attention(*inputs, bias=bias)
    for name, way in ways({}):
        with torch.autocast("cpu", narrow):
            got = way(*inputs, bias=bias)
        assert (got.double() - exact).abs().max() < 0.05, name
        rounded = reference_attention(*inputs, bias=bias.to(narrow))
        assert (rounded - exact).abs().max() > 0.1


@OURS
def test_the_logits_are_in_the_wider_dtype_and_the_weights_in_that_of_the_queries():
    q, k, _ = heads(torch.bfloat16)
    bias = torch.randn(s.h, s.n, s.m)
    logits = attention_logits(q, k, bias=bias)
    assert logits.dtype == torch.float32
    assert torch.equal(logits, (q * s.d**-0.5) @ k.repeat_interleave(2, 1).mT + bias)
    assert attention_logits(q, k).dtype == attention_logits(q, k, bias=bias.half().bfloat16()).dtype == q.dtype
    for weights in attention_weights(q, k, bias=bias), plain_attention_weights(q, k, bias=bias):
        assert weights.dtype == q.dtype


@OURS
@pytest.mark.parametrize("plug", [ALiBi(6), RelativeBias(6), SinkAttention(6)], ids=lambda plug: type(plug).__name__)
def test_a_layer_in_bfloat16_adds_a_float32_bias(plug):
    layer = MultiHeadAttention(48, 6, attend=plug, dtype=torch.bfloat16).eval()
    x, bias = torch.randn(2, 9, 48, dtype=torch.bfloat16), 1000 + torch.randn(9, 9)
    q, k, v = layer.qkv(x)
    total = bias + (plug.bias(9, 9) if hasattr(plug, "bias") else 0)
    sinks = plug.sinks if hasattr(plug, "sinks") else None
    exact = reference_attention(q, k, v, bias=total, sinks=sinks)
    weights = layer.attention_map(x, bias=bias)
    assert ((weights @ v).double() - exact).abs().max() < 0.06
    rounded = reference_attention(q, k, v, bias=total.bfloat16(), sinks=sinks)
    assert (rounded - exact).abs().max() > 0.3
    under = MultiHeadAttention(48, 6, attend=plug).eval()
    under.load_state_dict(layer.state_dict())
    with torch.autocast("cpu", torch.bfloat16):
        assert (under(x.float(), bias=bias) - layer(x, bias=bias)).abs().max() < 0.06


@OURS
def test_dropout_beside_a_wide_bias_keeps_the_mean():
    q, k, v = (t.expand(4000, -1, -1, -1) for t in heads(torch.bfloat16, b=1))
    bias = 1000 + torch.randn(s.n, s.m)
    outs = attention(q, k, v, bias=bias, dropout_p=0.3).float()
    plain = attention(q[:1], k[:1], v[:1], bias=bias).float()
    assert ((outs.mean(0) - plain[0]).abs() / (outs.std(0) / math.sqrt(4000) + 0.004)).max() < 6


@OURS
def test_a_wide_bias_beside_halves_takes_the_bytes_of_torchs_kernel():
    "Torch takes a float32 mask beside bfloat16; that of a window, or of causality, is joined to it in a copy."
    q, k, v = (torch.randn(1, 4, 300, 32, dtype=torch.bfloat16) for _ in range(3))
    bias = torch.randn(4, 300, 300)
    torchs = peak_bytes(lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias[None]))
    assert peak_bytes(lambda: attention(q, k, v, bias=bias)) <= torchs
    for options in {"window": 9}, {"window": 99, "is_causal": True}, {"is_causal": True}:
        assert peak_bytes(lambda: attention(q, k, v, bias=bias, **options)) <= torchs + 2 * bias.nbytes
    assert peak_bytes(lambda: attention(q, k, v, bias=bias, impl="math")) > torchs + 2 * bias.nbytes


@OURS
@pytest.mark.parametrize("narrow, wide", WIDER, ids=str)
def test_auto_never_holds_more_than_math_beside_a_wide_bias(narrow, wide):
    for n, m, d in (40, 300, 16), (300, 300, 64), (128, 64, 32), (16, 16, 16):
        q, k, v = (torch.randn(1, 4, length, d).to(narrow) for length in (n, m, m))
        for shape in (4, n, m), (m,):
            bias = torch.randn(shape).to(wide)
            for options in {"window": 17}, {"sinks": torch.randn(4)}, {"window": (8, 8), "sinks": torch.randn(4)}:
                auto, math_ = (
                    peak_bytes(partial(attention, q, k, v, bias=bias, impl=impl, **options))
                    for impl in ("auto", "math")
                )
                assert auto <= math_, (n, m, d, shape, options)


@OURS
def test_a_call_of_another_device_kind_is_computed_in_the_wider_dtype():
    "What torch's kernel takes is known of the CPU alone: elsewhere queries are widened."
    q, k, v = (t.to("meta") for t in heads(torch.bfloat16))
    out = attention(q, k, v, bias=torch.zeros(s.n, s.m, device="meta"))
    assert out.dtype == torch.bfloat16 and out.is_meta
    call = checked_call(q, k, v, bias=torch.zeros(s.n, s.m, device="meta"))
    assert BACKENDS["sdpa"].run(replace(call, scale=0.3)).dtype == torch.bfloat16
