"""What torch does to a function, done to attention: traced, mapped, compiled, exported, derived forwards and twice."""

import subprocess
import sys
from functools import partial

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp

from mha_book import (
    ALiBi,
    HeadTemperature,
    MultiHeadAttention,
    RelativeBias,
    SinkAttention,
    attention,
    attention_logits,
    attention_weights,
    folded_attend,
    fused_attend,
)
from mha_book.heads.single_head import is_certain, plain_attention
from mha_book.instruments.testing import SIZES
from mha_book.kernels.backends import window_mask
from mha_book.kernels.merging import attention_with_lse
from support.refusals import refused

s = SIZES
SINKS = torch.linspace(-1, 1, s.h, dtype=torch.float64)
OURS = pytest.mark.usefixtures("own_messages")
pytestmark = [
    OURS,
    # torch has no batching rule for its kernel, and says that this is slow
    pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning"),
    # sizes become tensors while torch.jit.trace runs, and every check of them is told to be one of now
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
    # of torch itself, which scripts its forward-mode derivatives
    pytest.mark.filterwarnings("ignore:.torch.jit.:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.torch.jit.:FutureWarning"),
]


def plugged(plug):
    "A plug as a function of q, k, v."
    plug = plug.double().requires_grad_(False)
    return lambda q, k, v: plug(q, k, v, mask=None, bias=None, is_causal=False, dropout_p=0.0)


WAYS = {
    "plain": attention,
    "causal": partial(attention, is_causal=True),
    "scale": partial(attention, scale=-0.3, is_causal=True),
    "a window that hides": partial(attention, window=3),
    "a window that hides nothing yet": partial(attention, window=(8, 8)),
    "window and causal": partial(attention, window=8, is_causal=True),
    "softcap": partial(attention, softcap=2.0),
    "sinks": partial(attention, sinks=SINKS, impl="sdpa"),
    "sinks and causal": partial(attention, sinks=SINKS, is_causal=True, impl="sdpa"),
    "everything": partial(attention, impl="math", window=3, softcap=2.0, sinks=SINKS, is_causal=True),
    "fused": partial(fused_attend, is_causal=True),
    "the definition": partial(plain_attention, is_causal=True),
    "folded": folded_attend,
    "with lse": lambda q, k, v: attention_with_lse(q, k, v, window=3, sinks=SINKS)[0],
    "weights": lambda q, k, v: attention_weights(q, k, window=8, sinks=SINKS),
    "logits": lambda q, k, v: attention_logits(q, k, softcap=2.0),
    "ALiBi": plugged(ALiBi(s.h)),
    "RelativeBias": plugged(RelativeBias(s.h)),
    "SinkAttention": plugged(SinkAttention(s.h)),
    "HeadTemperature": plugged(HeadTemperature(s.h)),
}
ALL = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)


def heads(b=s.b, n=s.n, m=s.n, d=s.d):
    "Values as wide as keys: of another width, torch does not take the kernel that lacks derivatives."
    return [torch.randn(shape).double() for shape in ((b, s.h, n, d), (b, s.g, m, d), (b, s.g, m, d))]


def assert_same(got, wanted):
    torch.testing.assert_close(got, wanted, atol=1e-10, rtol=0)


# Traced: a size is a tensor there


class Called(nn.Module):
    def __init__(self, way):
        super().__init__()
        self.way = way

    def forward(self, q, k, v):
        return self.way(q, k, v)


def assert_traced_for_all_sizes(way):
    traced = torch.jit.trace(Called(way), tuple(heads()), check_trace=False)
    for n, m in (s.n, s.n), (12, 12), (3, 3), (5, 12), (1, 7):
        inputs = heads(b=3, n=n, m=m)
        assert_same(traced(*inputs), way(*inputs))


@ALL
def test_a_traced_call_serves_other_sizes(way):
    assert_traced_for_all_sizes(way)


def test_a_trace_that_fixed_its_window_is_noticed():
    def fixing(q, k, v):
        left = None if bool(q.shape[2] <= 8) else 7  # it hides nothing now, so it is forgotten
        return attention(q, k, v, window=(left, None))

    with pytest.raises(AssertionError):
        assert_traced_for_all_sizes(fixing)


@pytest.mark.parametrize(
    "options", [{}, {"num_kv_heads": 3}, {"attend": ALiBi(6)}, {"attend": partial(attention, window=8)}]
)
def test_a_traced_layer_is_the_layer(options):
    layer = MultiHeadAttention(48, 6, **options).eval().requires_grad_(False)
    traced = torch.jit.trace(layer, (torch.randn(2, 5, 48),), check_trace=False)
    x = torch.randn(3, 12, 48)
    torch.testing.assert_close(traced(x), layer(x))


# Mapped


@ALL
def test_vmap_over_all_inputs_and_over_one(way):
    many = [torch.stack([t, 2 * t, t - 1]) for t in heads(m=s.m)]
    assert_same(torch.vmap(way)(*many), torch.stack([way(*one) for one in zip(*many)]))
    q, k, v = (t[0] for t in many)
    nested = torch.vmap(torch.vmap(lambda q: way(q, k, v)))(torch.stack([many[0], many[0] + 1]))
    assert_same(nested[1, 2], way(many[0][2] + 1, k, v))


@pytest.mark.parametrize("impl", ["auto", "math", "sdpa"])
def test_vmap_over_masks_biases_and_sinks(impl):
    q, k, v = heads(m=s.m)
    for name, many in {
        "mask": torch.rand(3, s.b, 1, s.n, s.m) < 0.7,
        "bias": torch.randn(3, s.h, s.n, s.m).double(),
        "sinks": torch.randn(3, s.h).double(),
    }.items():
        out = torch.vmap(lambda one: attention(q, k, v, impl=impl, is_causal=True, **{name: one}))(many)
        assert_same(out, torch.stack([attention(q, k, v, impl="math", is_causal=True, **{name: one}) for one in many]))
    wide = torch.vmap(lambda one: attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), bias=one))(
        torch.randn(3, s.n, s.m)
    )
    assert wide.dtype == torch.bfloat16 and wide.isfinite().all()


# Derived


@ALL
def test_forward_mode_is_the_limit_of_differences(way):
    (q, k, v), step = heads(m=s.m), 1e-6
    dq, dk, dv = torch.randn_like(q), torch.randn_like(k), torch.randn_like(v)
    _, tangent = jvp(way, (q, k, v), (dq, dk, dv))
    later, before = (way(q + t * dq, k + t * dk, v + t * dv) for t in (step, -step))
    torch.testing.assert_close(tangent, (later - before) / (2 * step), atol=1e-7, rtol=1e-6)
    with forward_ad.dual_level():
        dual = way(*(forward_ad.make_dual(t, d) for t, d in zip((q, k, v), (dq, dk, dv))))
        assert_same(forward_ad.unpack_dual(dual).tangent, tangent)


def square(way, k, v):
    return lambda q: way(q, k, v).square().sum()


@ALL
def test_a_hessian_comes_out(way):
    q, k, v = heads(b=1, n=2, m=3, d=2)
    found = hessian(square(way, k, v))(q)
    across = jacfwd(jacfwd(square(way, k, v)))(q)
    assert found.abs().max() > 0
    assert_same(found, across)


def penalty(f, q):
    leaf = q.clone().requires_grad_()
    (first,) = torch.autograd.grad(f(leaf), leaf, create_graph=True)
    return torch.autograd.grad(first.square().sum(), leaf)[0]


SECOND = {
    "gradient penalty": penalty,
    "grad of grad": lambda f, q: grad(lambda q: grad(f)(q).square().sum())(q),
    "jacrev of jacrev": lambda f, q: jacrev(jacrev(f))(q),
    "functional.hessian": lambda f, q: torch.autograd.functional.hessian(f, q),
    "functional.hvp": lambda f, q: torch.autograd.functional.hvp(f, q, torch.ones_like(q))[1],
}
TWICE = pytest.mark.parametrize("twice", SECOND.values(), ids=SECOND)


@TWICE
@ALL
def test_a_second_derivative_comes_out_or_the_error_names_the_way(twice, way):
    q, k, v = heads(b=1, n=2, m=3, d=2)
    try:
        twice(square(way, k, v), q)
    except RuntimeError as told:
        assert 'impl="math"' in str(told) and "second derivative" in str(told)


@TWICE
def test_the_way_that_is_named_can(twice):
    q, k, v = heads(b=1, n=2, m=3, d=2)
    for way in partial(attention, impl="math"), plain_attention, partial(attention, softcap=2.0):
        assert twice(square(way, k, v), q).abs().max() > 0
    for way in attention, fused_attend, partial(attention, sinks=SINKS, impl="sdpa"):
        with refused(RuntimeError, 'impl="math"', "attend=plain_attention"):
            twice(square(way, k, v), q)


@TWICE
def test_a_layer_names_it_too(twice):
    layer, x = MultiHeadAttention(8, 2).eval(), torch.randn(1, 3, 8)
    with refused(RuntimeError, 'impl="math"', "attend=plain_attention"):
        twice(lambda x: layer(x).square().sum(), x)
    layer.attend = plain_attention
    assert twice(lambda x: layer(x).square().sum(), x).abs().max() > 0


def test_a_graph_of_first_derivatives_is_no_second_derivative():
    "Gradients made with create_graph=True are those made without, and other things derive them."
    q, k, v = (t.requires_grad_() for t in heads(m=s.m))
    plain = torch.autograd.grad(attention(q, k, v).sum(), (q, k, v))
    graph = torch.autograd.grad(attention(q, k, v).sum(), (q, k, v), create_graph=True)
    for one, other in zip(plain, graph):
        assert torch.equal(one, other)
    factor = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad((factor * attention(q, k, v)).sum(), factor, create_graph=True)
    assert first.grad_fn is not None


def test_derivatives_of_layers():
    layer, x = MultiHeadAttention(8, 2).eval().double().requires_grad_(False), torch.randn(1, 3, 8).double()
    plain = MultiHeadAttention(8, 2, attend=plain_attention).eval().double().requires_grad_(False)
    plain.load_state_dict(layer.state_dict())
    assert_same(jacfwd(layer)(x), jacrev(plain)(x))
    for way in hessian, lambda f: jacfwd(jacfwd(f)):
        assert_same(way(lambda x: layer(x).square().sum())(x), way(lambda x: plain(x).square().sum())(x))


@pytest.mark.parametrize("transform", ["trace", "vmap", "jvp", "dual"])
def test_flex_says_what_it_cannot_pass_through(transform):
    "Bare, it loses a tangent without a word."
    way, inputs = partial(attention, impl="flex"), heads()
    with refused(NotImplementedError, 'impl="flex" lacks forward mode, vmap and torch.jit.trace', "math"):
        if transform == "trace":
            torch.jit.trace(Called(way), tuple(inputs), check_trace=False)
        if transform == "vmap":
            torch.vmap(way)(*(t[None] for t in inputs))
        if transform == "jvp":
            jvp(way, tuple(inputs), tuple(inputs))
        if transform == "dual":
            with forward_ad.dual_level():
                way(forward_ad.make_dual(inputs[0], inputs[0]), *inputs[1:])


# Compiled and exported for sizes that are open; in a process of its own, for shape checking wraps every function

OPEN = """
import logging, sys, torch, warnings
from functools import partial
from torch import nn
warnings.filterwarnings("ignore")
torch._logging.set_logs(dynamo=logging.CRITICAL)
from mha_book import *
from mha_book.kernels.backends import attention_weights
sinks = torch.randn(6)
WAYS = {
    "plain": attention, "causal": partial(attention, is_causal=True), "window": partial(attention, window=4),
    "two sides": partial(attention, window=(3, 1)), "wide": partial(attention, window=(40, 0)),
    "window and causal": partial(attention, window=8, is_causal=True),
    "huge": partial(attention, window=(10 ** 30, 2)), "softcap": partial(attention, softcap=2.0, window=6),
    "sinks": partial(attention, sinks=sinks), "sinks causal": partial(attention, sinks=sinks, is_causal=True),
    "all": partial(attention, sinks=sinks, window=3, softcap=2.0, impl="math"),
    "sdpa": partial(attention, sinks=sinks, window=3, impl="sdpa"), "folded": folded_attend,
    "fused": partial(fused_attend, is_causal=True), "ALiBi": ALiBi(6, attend=partial(attention, window=5)),
    "a wide bias": lambda q, k, v: attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), bias=q[..., :1] * 30),
    "weights": lambda q, k, v, **o: attention_weights(q, k, window=(9, 0)),
}
class Called(nn.Module):
    def __init__(self, way):
        super().__init__()
        self.way = way
    def forward(self, q, k, v):
        if isinstance(self.way, nn.Module):
            return self.way(q, k, v, mask=None, bias=None, is_causal=False, dropout_p=0.0)
        return self.way(q, k, v)
def heads(b=2, n=7, m=7):
    return torch.randn(b, 6, n, 8), torch.randn(b, 3, m, 8), torch.randn(b, 3, m, 8)
def agree(got, way, lengths):
    for n, m in lengths:
        inputs = heads(3, n, m)
        torch.testing.assert_close(got(*inputs), way(*inputs))
torch.set_grad_enabled(False)
b, n, m = (torch.export.Dim(name, min=1 + (name != "b"), max=64) for name in "bnm")
for name, way in WAYS.items():
    call = Called(way)
    if sys.argv[1] == "compile":
        torch._dynamo.reset()
        whole = torch.compile(call, backend="eager", fullgraph=True, dynamic=True)
        agree(whole, call, [(7, 7), (12, 12), (3, 3), (5, 33), (9, 4)])
        continue
    square, apart = [(3, 3), (4, 4), (5, 5), (9, 9), (33, 33)], [(3, 9), (9, 3), (4, 4), (2, 50)]
    for keys, lengths in (n, square), (m, apart):
        sizes = dict(zip("qkv", ({0: b, 2: n}, {0: b, 2: keys}, {0: b, 2: keys})))
        inputs = heads(n=7 if keys is n else 6)
        program = torch.export.export(call, inputs, dynamic_shapes=sizes, strict=sys.argv[1] == "strict")
        agree(program.module(), call, lengths)
layer = MultiHeadAttention(48, 6, attend=partial(attention, window=9)).eval()
if sys.argv[1] != "compile":
    program = torch.export.export(layer, (torch.randn(2, 7, 48),), dynamic_shapes={"x": {0: b, 1: n}}).module()
    for length in 3, 9, 10, 50:
        x = torch.randn(3, length, 48)
        torch.testing.assert_close(program(x), layer(x))
    inputs = dict(context=torch.randn(2, 6, 48), value=torch.randn(2, 6, 48))
    sizes = dict(x={0: b, 1: n}, context={0: b, 1: m}, value={0: b, 1: m})
    layer = MultiHeadAttention(48, 6).eval()
    program = torch.export.export(layer, (torch.randn(2, 7, 48),), inputs, dynamic_shapes=sizes,
                                  strict=sys.argv[1] == "strict").module()
    x, inputs = torch.randn(5, 3, 48), {name: torch.randn(5, 9, 48) for name in inputs}
    torch.testing.assert_close(program(x, **inputs), layer(x, **inputs))
print("agree")
"""


@pytest.mark.parametrize("kind", ["compile", "strict", "not strict"])
def test_one_program_serves_all_sizes(kind):
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", OPEN, kind], capture_output=True, text=True)
    assert done.stdout == "agree\n", done.stderr[-2000:]


def test_what_is_certain_of_sizes():
    assert is_certain(3 == 3) and not is_certain(3 == 4)
    known = []

    def note(n):
        known.extend([is_certain(n.shape[0] == n.shape[0]), is_certain(n.shape[0] >= 5), is_certain(n.shape[1] == 4)])
        return n + 1

    size = torch.export.Dim("size", min=2, max=50)

    class Noting(nn.Module):
        def forward(self, x):
            return note(x)

    torch.export.export(Noting(), (torch.zeros(7, 4),), dynamic_shapes=({0: size},), strict=False)
    assert known == [True, False, True]


@pytest.mark.parametrize("window", [1, 3, (2, 1), (None, 2), (3, None), (10**30, 0), (None, None)], ids=str)
def test_the_mask_of_open_sizes_is_the_mask(window):
    class Mask(nn.Module):
        def forward(self, x):
            return window_mask(x.shape[0], x.shape[1], window) & x

    traced = torch.jit.trace(Mask(), (torch.ones(5, 7, dtype=torch.bool),), check_trace=False)
    for n, m in (5, 7), (9, 9), (9, 4), (1, 6), (3, 20):
        assert torch.equal(traced(torch.ones(n, m, dtype=torch.bool)), window_mask(n, m, window))


@pytest.mark.parametrize("way", [fused_attend, attention, partial(attention, impl="sdpa")])
def test_a_gradient_beside_a_bias_that_learns_elsewhere(way):
    "torch's fused kernel has no derivative by its mask, which the definition has."
    q, k, v = heads(m=s.m)
    bias = torch.randn(s.n, s.m, dtype=q.dtype, requires_grad=True)
    call = lambda attend: lambda x: (attend(q * x, k, v, bias=bias) * x).sum()  # noqa: E731
    one = torch.ones((), dtype=q.dtype)
    torch.testing.assert_close(grad(call(way))(one), grad(call(plain_attention))(one))
    torch.testing.assert_close(
        grad(lambda x: (way(q, k, v, bias=bias) * x).sum())(one), plain_attention(q, k, v, bias=bias).sum()
    )
