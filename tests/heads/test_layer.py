"""The layer's public ways in: where a head's rows are, q, k and v, the last socket, and who commits."""

import copy
import subprocess
import sys
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from mha_book.heads.head_list import HeadList
from mha_book.heads.layer import MultiHeadAttention, commit_once, nearest_head_counts
from mha_book.heads.masks import from_torch, to_torch
from mha_book.heads.weight_split import HeadLayout, merge_heads, split_heads
from mha_book.instruments.testing import SIZES as s
from mha_book.kernels.backends import attention
from mha_book.plugs.cache import KVCache
from mha_book.plugs.logits import HeadTemperature, OutputGate, SinkAttention, largest_logits, qk_clip_
from mha_book.plugs.paged import BlockPool, PagedCache
from mha_book.plugs.rope import RoPE
from mha_book.variants.grouped import folded_attend
from support.mutants import INPUTS, LAYER
from support.padded_cache import PaddedCache
from support.refusals import refused

float64 = dict(dtype=torch.float64)
close = partial(torch.testing.assert_close, atol=1e-12, rtol=1e-12)
OTHER = 11  # the width of a context that is not the tokens'


def build(**options):
    "A grouped layer in float64 in which no number is 0 or 1."
    layer = MultiHeadAttention(s.e, s.h, **(dict(num_kv_heads=s.g, head_dim=s.d) | float64 | options))
    for p in layer.parameters():
        nn.init.normal_(p, std=0.5)
    return layer


def tokens(n=s.n, width=s.e):
    return torch.randn(s.b, n, width, **float64)


def rows_by_hand(part, head):
    "Name of the projection, and the numbers of a head's rows there, without and with a context of its own width."
    h, g, d = s.h, s.g, s.d
    first = {"q": 0, "k": h * d, "v": (h + g) * d, "o": 0}[part] + head * d
    above = h * d if part in "kv" else 0  # what stands above the keys where all parts are stacked
    one = "out_proj" if part == "o" else "in_proj"
    two = {"q": "in_proj", "o": "out_proj"}.get(part, "context_proj")
    return (one, list(range(first, first + d))), (two, list(range(first - above, first - above + d)))


EVERY_HEAD = [(part, i) for part, count in dict(q=s.h, k=s.g, v=s.g, o=s.h).items() for i in range(count)]


# Where a head's rows are


@pytest.mark.parametrize("part, head", EVERY_HEAD)
@pytest.mark.parametrize("context_dim", [None, OTHER])
def test_rows_name_the_projection_and_the_head(part, head, context_dim):
    layer = build(context_dim=context_dim)
    name, numbers = rows_by_hand(part, head)[context_dim is not None]
    proj, rows = layer.rows(part, head)
    assert proj is getattr(layer, name) and list(range(1000))[rows] == numbers


def test_rows_of_heads_and_parts_that_are_not_there_are_refused():
    layer = build()
    for part, head in (("q", s.h), ("k", s.g), ("v", s.g), ("o", s.h), ("q", -1)):
        with pytest.raises(IndexError):
            layer.rows(part, head)
    with pytest.raises(KeyError):
        layer.rows("x", 0)


class LowRank(nn.Module):
    "What adapters do: a Linear inside, and a product of two thin matrices beside it."

    def __init__(self, base):
        super().__init__()
        self.base, self.in_features = base, base.in_features
        self.down, self.up = nn.Linear(base.in_features, 2, False), nn.Linear(2, base.out_features, False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


class Doubling(nn.Linear):
    "A Linear with a forward of its own, which its rows do not tell."

    def forward(self, x):
        return 2 * super().forward(x)


def doubling(proj):
    new = Doubling(proj.in_features, proj.out_features, dtype=proj.weight.dtype)
    new.load_state_dict(proj.state_dict())
    return new


def quantized(proj):
    return torch.ao.quantization.quantize_dynamic(nn.Sequential(proj.float()), {nn.Linear}, torch.qint8)[0]


def hooked(kind):
    "A projection with a hook that doubles what it takes or gives."

    def hook(proj):
        def double(module, args, *out):
            return (out[0] if out else args[0]) * 2

        getattr(proj, f"register_{kind}")(double)
        return proj

    return hook


def called_otherwise(proj):
    "As libraries that bring offloaded weights do: the instance's own forward is exchanged."
    old = proj.forward
    proj.forward = lambda x: old(x) * 2
    return proj


NOT_PLAIN = {
    "a forward hook": hooked("forward_hook"),
    "a pre-hook": hooked("forward_pre_hook"),
    "another forward": called_otherwise,
    "rows cut otherwise": lambda proj: nn.Linear(proj.in_features - 1, proj.out_features - 1, **float64),
    "a low-rank adapter": LowRank,
    "a forward of its own": doubling,
    "weight_norm": parametrizations.weight_norm,
    "prune": lambda proj: prune.l1_unstructured(proj, "weight", amount=0.3),
    "int8": quantized,
}


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning")  # users still have it
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor, torch.quantize_per_channel:UserWarning")
@pytest.mark.parametrize("name", ["in_proj", "context_proj", "out_proj"])
@pytest.mark.parametrize("kind", NOT_PLAIN)
def test_rows_of_what_is_no_plain_matrix_are_refused_by_name(kind, name):
    layer = build(context_dim=OTHER)
    setattr(layer, name, NOT_PLAIN[kind](getattr(layer, name)))
    for part in layer.parts()[name]:
        with refused(TypeError, name):
            layer.rows(part, 1)
    others = set("qkvo") - set(layer.parts()[name])
    assert all(layer.rows(part, 1) for part in others)  # those of the other projections are still their own


# Queries, keys and values


def qkv_by_hand(layer, x, context=None):
    "Every head by its own rows, one after the other; q b h n d, k and v b g m d."
    source = x if context is None else context
    made = {"q": [], "k": [], "v": []}
    for part, head in EVERY_HEAD:
        if part != "o":
            name, numbers = rows_by_hand(part, head)[layer.context_proj is not None]
            proj = getattr(layer, name)
            made[part].append((x if part == "q" else source) @ proj.weight[numbers].T + proj.bias[numbers])
    return tuple(torch.stack(heads, 1) for heads in made.values())


@pytest.mark.parametrize(
    "options, width", [(dict(), None), (dict(), s.e), (dict(context_dim=OTHER), OTHER)], ids=["self", "shared", "own"]
)
def test_qkv_are_the_slices_of_the_projections(options, width):
    layer, x = build(**options), tokens()
    context = None if width is None else tokens(s.m, width)
    for got, wanted in zip(layer.qkv(x, context), qkv_by_hand(layer, x, context), strict=True):
        close(got, wanted)


def later_is_longer(q, k, *, offset):
    "A position plug that multiplies by the place, the first of which is `offset`."
    return tuple(t * (1 + offset + torch.arange(t.shape[2], dtype=t.dtype))[:, None] for t in (q, k))


@pytest.mark.parametrize("width", [None, s.e])
def test_qkv_come_after_the_norm_and_the_position(width):
    layer, x = build(qk_norm=nn.RMSNorm, position=later_is_longer), tokens()
    context = None if width is None else tokens(s.m, width)
    q, k, v = qkv_by_hand(layer, x, context)

    def placed(t, norm):
        unit = t / (t.square().mean(-1, keepdim=True) + torch.finfo(t.dtype).eps).sqrt() * norm.weight
        return torch.stack([unit[:, :, i] * (1 + 4 + i) for i in range(t.shape[2])], 2)

    wanted = placed(q, layer.q_norm), placed(k, layer.k_norm), v
    for got, right in zip(layer.qkv(x, context, offset=4), wanted, strict=True):
        close(got, right)


@pytest.mark.parametrize("name", LAYER)
def test_a_layer_that_takes_other_rows_is_noticed(name):
    layer, x = build(), tokens()
    wrong = LAYER[name].apply(layer)
    with pytest.raises(AssertionError):
        for got, wanted in zip(wrong.qkv(x), qkv_by_hand(layer, x), strict=True):
            close(got, wanted)


class Int8(nn.Module):
    "Weight-only int8: rows as whole numbers with a step each, which are made floats when the module is called."

    def __init__(self, base):
        super().__init__()
        self.in_features, self.out_features = base.in_features, base.out_features
        step = base.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("weight", (base.weight.detach() / step).round().to(torch.int8))
        self.register_buffer("step", step)
        self.bias = base.bias

    def forward(self, x):
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.step.to(x.dtype), self.bias)


class Casting(nn.Linear):
    "A projection in another dtype than the tokens, which casts on the way in and out."

    def forward(self, x):
        return super().forward(x.to(self.weight.dtype)).to(x.dtype)


def in_other_dtype(dtype):
    def change(proj):
        new = Casting(proj.in_features, proj.out_features, dtype=dtype)
        new.load_state_dict({name: t.to(dtype) for name, t in proj.state_dict().items()})
        return new

    return change


def in_float8(proj):
    "Weights in eight bits: a plain Linear whose forward is exchanged, as quantisation libraries do."
    low, bias = proj.weight.detach().to(torch.float8_e4m3fn), proj.bias
    proj.weight = nn.Parameter(low, requires_grad=False)
    proj.forward = lambda x: nn.functional.linear(x, proj.weight.to(x.dtype), bias)
    return proj


def brought_when_called(proj):
    "Offloaded, as hooks do it: the weights are on meta between calls."
    real = dict(proj.named_parameters(recurse=False))

    def bring(module, args):
        module._parameters.update(real)

    def send_away(module, args, out):
        module._parameters.update({name: nn.Parameter(p.to("meta"), False) for name, p in real.items()})

    proj.register_forward_pre_hook(bring)
    proj.register_forward_hook(send_away, always_call=True)
    send_away(proj, None, None)
    return proj


def brought_by_another_forward(proj):
    "Offloaded, as by an exchanged `forward`: the weights are on meta between calls."
    real, old = dict(proj.named_parameters(recurse=False)), proj.forward

    def forward(x):
        proj._parameters.update(real)
        y = old(x)
        proj._parameters.update({name: nn.Parameter(p.to("meta"), False) for name, p in real.items()})
        return y

    proj._parameters.update({name: nn.Parameter(p.to("meta"), False) for name, p in real.items()})
    proj.forward = forward
    return proj


def with_words(proj):
    "A hook that is told keywords, too."
    proj.register_forward_hook(lambda module, args, kwargs, y: y - 1, with_kwargs=True)
    return proj


def padded_before(proj):
    "A hook that brings tokens to the width that a padded matrix needs."
    wide = nn.Linear(proj.in_features + 3, proj.out_features, **float64)
    wide.register_forward_pre_hook(lambda module, args: (nn.functional.pad(args[0], (0, 3)),))
    return wide


WRAPPED = {
    "as it is": lambda proj: proj,
    "a hook before": hooked("forward_pre_hook"),
    "a hook after": hooked("forward_hook"),
    "a hook with keywords": with_words,
    "a hook that pads": padded_before,
    "an adapter": lambda proj: LowRank(proj).double(),
    "a subclass": doubling,
    "another forward": called_otherwise,
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "prune": lambda proj: prune.l1_unstructured(proj, "weight", amount=0.3),
    "weight-only int8": Int8,
    "float32": in_other_dtype(torch.float32),
    "bfloat16": in_other_dtype(torch.bfloat16),
    "float8": in_float8,
    "offloaded by hooks": brought_when_called,
    "offloaded by a forward": brought_by_another_forward,
    "lazy": lambda proj: nn.LazyLinear(proj.out_features, **float64),
    "compiled": lambda proj: torch.compile(proj, backend="eager"),
}


@pytest.mark.parametrize("name", ["in_proj", "context_proj", "out_proj"])
@pytest.mark.parametrize("kind", WRAPPED)
def test_a_layer_that_reads_itself_is_the_layer_with_itself_as_context(kind, name):
    "Each projection is called, whatever stands on it, and what it gives is what its rows of the plain layer would."
    layer, x = build(context_dim=s.e if name == "context_proj" else None).eval(), tokens()
    setattr(layer, name, WRAPPED[kind](getattr(layer, name)))
    layer.eval()
    with torch.no_grad():
        args = (x,) if name != "context_proj" else (x, x)
        wanted, y = layer(*args), layer.qkv(*args)
        for context, value in ((x, None), (x.clone(), None), (x.clone(), x.clone()), (x, x)):
            close(layer(x, context, value=value), wanted)
        if name != "out_proj":  # the heads are the stripes of what the module itself gives
            made = getattr(layer, name)(x)
            parts = y if name == "in_proj" else y[1:]
            assert torch.equal(torch.cat([t.transpose(1, 2).flatten(2) for t in parts], -1), made)


@pytest.mark.parametrize("name", ["in_proj", "out_proj"])
@pytest.mark.parametrize("kind", WRAPPED)
def test_what_stands_on_a_projection_is_torchs_too_or_refused_by_name(kind, name):
    layer, x = MultiHeadAttention(48, s.h, **float64).eval(), torch.randn(s.b, s.n, 48, **float64)
    setattr(layer, name, WRAPPED[kind](getattr(layer, name)).eval())
    if kind == "as it is":
        return close(to_torch(layer)(x, x, x)[0], layer(x))
    with refused(TypeError, name):
        to_torch(layer)


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning")  # users still have it
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor, torch.quantize_per_channel:UserWarning")
@pytest.mark.parametrize("context_dim", [None, 32])
def test_projections_in_dynamic_int8_answer_within_its_error(context_dim):
    layer, x = MultiHeadAttention(32, 4, context_dim=context_dim).eval(), torch.randn(s.b, s.n, 32)
    small = torch.ao.quantization.quantize_dynamic(layer, {nn.Linear}, dtype=torch.qint8)
    assert type(small.in_proj) is not nn.Linear is not type(small.out_proj)
    calls = [((x, x), {}), ((x, x.clone()), {}), ((x, x), dict(value=x.clone()))]
    for args, options in calls if context_dim else [((x,), {}), *calls]:
        exact = layer(*args, is_causal=True)
        assert (small(*args, is_causal=True, **options) - exact).abs().max() < 0.1 * exact.abs().max()
    if context_dim is None:
        got = small(x, is_causal=True, cache=KVCache(s.b, 4, s.n, 8))
        assert (got - exact).abs().max() < 0.1 * exact.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_exchanged_parameters_go_through_the_same_calls(dtype):
    layer, x = MultiHeadAttention(s.e, s.h, head_dim=s.d), torch.randn(s.b, s.n, s.e)
    with torch.no_grad(), torch.autocast("cpu", dtype):
        assert torch.equal(layer(x), layer(x, x.clone(), value=x.clone())) and layer(x).dtype == dtype
    other = {name: torch.randn_like(p) for name, p in layer.named_parameters()}
    exchanged = torch.func.functional_call(layer, other, (x,))
    torch.testing.assert_close(torch.func.functional_call(layer, other, (x, x.clone())), exchanged)
    assert not torch.allclose(exchanged, layer(x))


# Advice is given where it is true


@pytest.mark.usefixtures("own_messages")
def test_advice_about_dtypes_and_devices_is_true():
    x = torch.randn(s.b, s.n, s.e)
    empty = MultiHeadAttention(s.e, s.h, head_dim=s.d, device="meta")
    with refused(ValueError, "device differs", "in_proj", "no numbers"):
        empty(x)
    with refused(ValueError, "device differs", "x meta", "make x on cpu"):
        MultiHeadAttention(s.e, s.h, head_dim=s.d)(x.to("meta"))
    for dtype in (torch.int8, torch.float8_e4m3fn):
        layer = MultiHeadAttention(s.e, s.h, head_dim=s.d)
        layer.in_proj.weight = nn.Parameter(layer.in_proj.weight.to(dtype), requires_grad=False)
        with pytest.raises(TypeError, match=f"in_proj has weights of {dtype}") as told:
            layer(x)
        assert "convert" not in str(told.value)
    layer = MultiHeadAttention(s.e, s.h, head_dim=s.d)
    with refused(TypeError, "convert with x.to(torch.float32) or layer.to(torch.float64)"):
        layer(x.double())
    with pytest.raises(TypeError, match="x.to\\(torch.float32\\)") as told:
        layer(x.to(torch.float8_e4m3fn))
    assert "layer.to" not in str(told.value)


# Values of a width of their own


def three_tensors(layer):
    "Weights as h d e and biases as h d, of q, k and v, by counting rows from above."
    own = [p for p in (layer.in_proj, layer.context_proj) if p is not None]
    (h, g, d), dv = layer.layout, layer.layout.value_dim
    heads = [("q", h, d), ("k", g, d), ("v", g, dv)]
    pieces = {}
    for kind in ("weight", "bias"):
        left = [getattr(p, kind) for p in own]
        for part, count, width in heads:
            left = [rows for rows in left if len(rows)]
            pieces[part, kind] = left[0][: count * width].unflatten(0, (count, width))
            left[0] = left[0][count * width :]
        assert not any(map(len, left))
    return pieces


def by_einsum(layer, x, keys, values, is_causal=False):
    "Attention as Keras writes it, with key_dim and value_dim apart: one einsum a step, in float64."
    weights, (h, g, _) = three_tensors(layer), layer.layout

    def project(part, t):
        return torch.einsum("bne,hde->bhnd", t, weights[part, "weight"]) + weights[part, "bias"][:, None]

    q, k, v = project("q", x), project("k", keys), project("v", values)
    k, v = (t.repeat_interleave(h // g, 1) for t in (k, v))
    logits = torch.einsum("bhnd,bhmd->bhnm", q, k) / q.shape[-1] ** 0.5
    if is_causal:
        n, m = logits.shape[-2:]
        logits = logits.masked_fill(torch.ones(n, m).tril(m - n) == 0, -torch.inf)
    mixed = torch.einsum("bhnm,bhmv->bnhv", logits.softmax(-1), v)
    out = layer.out_proj.weight.unflatten(1, (h, -1))
    return torch.einsum("bnhv,ohv->bno", mixed, out) + layer.out_proj.bias


@pytest.mark.parametrize("d, dv", [(s.d, 5), (s.d, 13), (192, 128)])
@pytest.mark.parametrize("g", [s.h, s.g, 1])
@pytest.mark.parametrize("width", [None, s.e, OTHER])
def test_values_of_a_width_of_their_own_are_the_definition(d, dv, g, width):
    own = width if width == OTHER else None
    layer, x = build(num_kv_heads=g, head_dim=d, value_dim=dv, context_dim=own), tokens()
    assert layer.layout.sizes == (s.h * d, g * d, g * dv) and layer.out_proj.in_features == s.h * dv
    context = None if width is None else tokens(s.m, width)
    answers = x if width is None else context
    q, k, v = layer.qkv(x, context)
    assert q.shape[-1] == k.shape[-1] == d and v.shape == (s.b, g, answers.shape[1], dv)
    wanted = by_einsum(layer, x, answers, answers)
    got = layer(x, context)
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)
    parameters = [*layer.parameters()]
    upstream = torch.randn_like(got)
    for mine, theirs in zip(
        torch.autograd.grad(got, parameters, upstream), torch.autograd.grad(wanted, parameters, upstream)
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)


def test_values_of_a_width_of_their_own_pass_through_a_cache():
    layer, x, cache = build(value_dim=5), tokens(), KVCache(s.b, s.g, s.n, s.d, value_dim=5, **float64)
    steps = [layer(piece, is_causal=True, cache=cache) for piece in x.split((2, 1, s.n - 3), dim=1)]
    close(torch.cat(steps, 1), by_einsum(layer, x, x, x, is_causal=True))
    weights = layer.attention_map(x, is_causal=True)
    v = layer.qkv(x)[2].repeat_interleave(s.h // s.g, 1)
    close(layer.out_proj((weights @ v).transpose(1, 2).flatten(2)), layer(x, is_causal=True))


PLUGS = {
    "folded": lambda: dict(attend=folded_attend),
    "window": lambda: dict(attend=partial(attention, window=3, softcap=9.0)),
    "sinks": lambda: dict(attend=SinkAttention(s.h, **float64)),
    "temperatures": lambda: dict(attend=HeadTemperature(s.h, **float64)),
    "RoPE": lambda: dict(position=RoPE(s.d)),
    "norms": lambda: dict(qk_norm=nn.RMSNorm),
}


@pytest.mark.parametrize("name", PLUGS)
def test_plugs_take_values_of_a_width_of_their_own(name):
    "A wide value is two narrow ones side by side: the layer is that of its halves, whatever is plugged in."
    layer, x = build(value_dim=10, **PLUGS[name]()), tokens()
    q, k, v = layer.qkv(x)
    options = dict(mask=None, bias=None, is_causal=True, dropout_p=0.0)
    halves = torch.cat([layer.attend(q, k, half, **options) for half in v.split((4, 6), -1)], -1)
    close(layer(x, is_causal=True), layer.out_proj(halves.transpose(1, 2).flatten(2)))


@pytest.mark.parametrize(
    "build_cache", [KVCache, lambda *sizes, **o: PagedCache(BlockPool(9, 2, *sizes[1::2], **o), 2)]
)
def test_a_gate_a_clip_and_every_cache_know_the_width_of_values(build_cache):
    layer, x = build(value_dim=5, finish=OutputGate(s.e, s.h, head_dim=5, **float64)), tokens()
    cache = build_cache(s.b, s.g, s.n, s.d, value_dim=5, **float64)
    steps = [layer(piece, is_causal=True, cache=cache) for piece in x.split((2, s.n - 2), 1)]
    close(torch.cat(steps, 1), layer(x, is_causal=True))
    sizes, values = largest_logits(layer, x), layer.in_proj.weight[sum(layer.layout.sizes[:2]) :].clone()
    qk_clip_(layer, sizes, sizes.min().item() / 2)
    close(largest_logits(layer, x), sizes.min().expand(s.h) / 2)
    assert torch.equal(layer.in_proj.weight[-len(values) :], values)


def test_every_row_belongs_to_one_head_where_values_have_their_own_width():
    for context_dim in None, OTHER:
        layer = build(value_dim=5, context_dim=context_dim)
        counted = {name: torch.zeros(getattr(layer, name).weight.shape[name == "out_proj"]) for name in layer.parts()}
        for part, head in EVERY_HEAD:
            proj, rows = layer.rows(part, head)
            name = next(name for name in counted if proj is getattr(layer, name))
            counted[name][rows] += 1
            if part == "v":
                first = proj.weight[rows][0]
                assert torch.equal(first, three_tensors(layer)["v", "weight"][head][0])
        assert all((count == 1).all() for count in counted.values())


def test_the_width_of_values_is_saved_and_compared():
    plain, other = build(), build(value_dim=5)
    assert plain.get_extra_state().tolist() == [s.h, s.g, s.d] == build(value_dim=s.d).get_extra_state().tolist()
    assert other.get_extra_state().tolist() == [s.h, s.g, s.d, 5]
    assert HeadLayout(s.h, s.g, s.d) == HeadLayout(s.h, s.g, s.d, s.d) and [*other.layout] == [s.h, s.g, s.d]
    again = build(value_dim=5)
    again.load_state_dict(other.state_dict())
    assert torch.equal(again(tokens().zero_()), other(tokens().zero_()))
    before = other.in_proj.weight.clone()
    for layer, state in ((plain, other.state_dict()), (other, plain.state_dict())):
        with refused(RuntimeError, f"[{s.h}, {s.g}, {s.d}]", f"[{s.h}, {s.g}, {s.d}, 5]", "value_dim"):
            layer.load_state_dict(state)
    assert torch.equal(other.in_proj.weight, before)
    assert "value_dim=5" in repr(other) and "value_dim" not in repr(plain)


@pytest.mark.usefixtures("own_messages")
@pytest.mark.parametrize("saved", [None, [6, 3, 8], "6 3 8"], ids=str)
def test_head_counts_that_are_no_tensor_are_refused_in_words(saved):
    layer = build()
    before = layer.in_proj.weight.clone()
    with refused(TypeError, "saved head counts", "torch.Tensor"):
        layer.load_state_dict(build().state_dict() | {"_extra_state": saved})
    with refused(TypeError, "meta"):
        layer.set_extra_state(layer.get_extra_state().to("meta"))
    assert torch.equal(layer.in_proj.weight, before)


@pytest.mark.usefixtures("own_messages")
def test_widths_of_values_that_are_no_counts_are_refused():
    for wrong, error in ((0, ValueError), (2.0, TypeError), (True, TypeError), ("5", TypeError)):
        with refused(error, "value_dim"):
            HeadLayout(6, 3, 8, wrong)
        with refused(error, "value_dim"):
            MultiHeadAttention(s.e, s.h, head_dim=s.d, value_dim=wrong)


# Three inputs


@pytest.mark.parametrize("dv", [s.d, 5])
@pytest.mark.parametrize("width", [None, s.e, OTHER])
def test_values_of_an_input_of_their_own_are_the_definition(width, dv):
    own = width if width == OTHER else None
    layer, x = build(context_dim=own, value_dim=dv), tokens()
    context = None if width is None else tokens(s.m, width)
    keys = x if width is None else context
    value = torch.randn_like(keys)
    got, wanted = layer(x, context, value=value), by_einsum(layer, x, keys, value)
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)
    assert not torch.allclose(got, layer(x, context))
    parameters, upstream = [*layer.parameters()], torch.randn_like(got)
    for mine, theirs in zip(
        torch.autograd.grad(got, parameters, upstream), torch.autograd.grad(wanted, parameters, upstream)
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)
    weights, v = layer.attention_map(x, context, value=value), layer.qkv(x, context, value=value)[2]
    mixed = weights @ v.repeat_interleave(s.h // s.g, 1)
    close(layer.out_proj(mixed.transpose(1, 2).flatten(2)), got)
    close(layer(x, context, value=keys), layer(x, context))  # one input, told twice


@pytest.mark.parametrize("width", [None, OTHER])
def test_three_inputs_are_those_of_torchs_layer(width):
    theirs = nn.MultiheadAttention(48, s.h, kdim=width, vdim=width, batch_first=True, dtype=torch.float64)
    q, k, v = (tokens(n, width) for n, width in ((s.n, 48), (s.m, width or 48), (s.m, width or 48)))
    real = torch.arange(s.m) < torch.tensor([[s.m], [s.m - 3]])
    wanted, weights = theirs(q, k, v, key_padding_mask=~real, average_attn_weights=False)
    close(from_torch(theirs)(q, k, value=v, key_mask=real), wanted)
    close(from_torch(theirs).attention_map(q, k, value=v, key_mask=real), weights)


def test_values_of_their_own_pass_through_a_cache():
    layer, x, value = build(), tokens(), tokens()
    cache = KVCache(s.b, s.g, s.n, s.d, **float64)
    pieces = zip(x.split((2, 1, s.n - 3), 1), value.split((2, 1, s.n - 3), 1))
    steps = [layer(x, value=value, is_causal=True, cache=cache) for x, value in pieces]
    close(torch.cat(steps, 1), layer(x, value=value, is_causal=True))


def test_each_input_goes_through_the_projection_once():
    layer, x, context, value, calls = build(), tokens(), tokens(s.m), tokens(s.m), []
    layer.in_proj.register_forward_hook(lambda proj, args, y: calls.append(args[0]))
    for args, options, wanted in (
        ((x,), {}, [x]),
        ((x, x), {}, [x]),
        ((x, context), {}, [x, context]),
        ((x, context), dict(value=value), [x, context, value]),
        ((x, context), dict(value=context), [x, context]),
        ((x, x), dict(value=x), [x]),
    ):
        calls.clear()
        layer(*args, **options)
        assert len(calls) == len(wanted) and all(a is b for a, b in zip(calls, wanted))


@pytest.mark.usefixtures("own_messages")
def test_values_that_do_not_fit_the_keys_are_refused():
    layer, x, context = build(), tokens(), tokens(s.m)
    for value, error, words in (
        (tokens(s.n), ValueError, ["value has shape", "one for each key", f"({s.b}, {s.m})"]),
        (tokens(s.m)[:1], ValueError, ["value has shape", f"({s.b}, {s.m})"]),
        (tokens(s.m, OTHER), ValueError, ["value has shape", f"{s.e}"]),
        (tokens(s.m).float(), TypeError, ["value torch.float32", "value.to(torch.float64)"]),
        (tokens(s.m).numpy(), TypeError, ["value must be a torch.Tensor", "from_numpy"]),
    ):
        with refused(error, *words):
            layer(x, context, value=value)
    with refused(ValueError, "keys need a context"):
        build(context_dim=OTHER)(x, value=tokens(s.n, OTHER))


@pytest.mark.parametrize("name", INPUTS)
def test_a_layer_that_takes_other_inputs_is_noticed(name):
    layer, x, context, value = build(), tokens(), tokens(s.m), tokens(s.m)
    layer.in_proj.register_forward_hook(lambda proj, args, y: y * 2)
    wrong = INPUTS[name].apply(layer)
    close(wrong(x), layer(x))
    with pytest.raises(AssertionError):
        close(wrong(x, context, value=value), layer(x, context, value=value))


# Arguments of another kind


@pytest.mark.usefixtures("own_messages")
@pytest.mark.parametrize("name", ["x", "context", "value", "mask", "key_mask", "bias"])
@pytest.mark.parametrize("other", ["numpy", "list", "str"])
def test_what_is_no_tensor_is_refused_before_anything_is_computed(name, other):
    calls = []
    layer = build(attend=lambda q, k, v, **options: v[..., :1, :].expand(q.shape[0], s.h, q.shape[2], -1))
    layer.in_proj.register_forward_hook(lambda *args: calls.append(1))
    arguments = dict(x=tokens(), context=tokens(s.m), value=tokens(s.m))
    arguments |= dict(mask=torch.ones(s.n, s.m) > 0, key_mask=torch.ones(s.b, s.m) > 0, bias=torch.randn(s.n, s.m))
    wrong = dict(numpy=lambda t: t.numpy(), list=lambda t: t.tolist(), str=str)[other](arguments[name])
    for call in (layer, layer.attention_map):
        with refused(TypeError, f"{name} must be a torch.Tensor"):
            call(**arguments | {name: wrong})
    cache = Counting(s.b)
    if name != "context":
        own = dict(x=tokens()) | {name: wrong}
        with refused(TypeError, f"{name} must be a torch.Tensor"):
            layer(**own, cache=cache)
    assert not calls and cache.commits == 0 and cache.kept is None


@pytest.mark.usefixtures("own_messages")
@pytest.mark.parametrize("wrong", ["no", 1, 0, None, torch.tensor(True)], ids=str)
def test_causality_by_another_word_is_refused_before_anything_is_computed(wrong):
    calls, cache = [], Counting(s.b)
    layer = build(attend=lambda q, k, v, **options: q)
    layer.in_proj.register_forward_hook(lambda *args: calls.append(1))
    for call in (layer, layer.attention_map):
        with refused(TypeError, "is_causal must be True or False"):
            call(tokens(), is_causal=wrong, cache=cache)
    assert not calls and cache.commits == 0 and cache.kept is None


@pytest.mark.usefixtures("own_messages")
def test_constructor_arguments_of_another_kind_are_refused():
    for options, word in (
        (dict(bias="no"), "bias must be True or False"),
        (dict(bias=1), "bias must be True or False"),
        (dict(dtype=torch.int64), "dtype"),
        (dict(dtype=torch.complex64), "dtype"),
        (dict(dtype="float64"), "dtype"),
        (dict(out_dim=3.0), "out_dim"),
        (dict(context_dim=True), "context_dim"),
    ):
        with refused(TypeError, word):
            MultiHeadAttention(48, 6, **options)
    for wrong in (torch.zeros(s.b, s.n, s.e, dtype=torch.complex128), torch.zeros(s.b, s.n, s.e, dtype=torch.int32)):
        with refused(TypeError, "x has dtype", "embeddings"):
            build()(wrong)


# Torch's name for a mask of the opposite meaning


def test_torchs_name_for_padding_is_refused_with_the_way_out():
    layer, x = build(), tokens()
    padding = torch.zeros(s.b, s.n, dtype=torch.bool)
    for call in (layer, layer.attention_map):
        with pytest.raises(Exception, match="key_padding_mask"):  # with the checker of shapes too
            call(x, key_padding_mask=padding)


@pytest.mark.usefixtures("own_messages")
def test_torchs_name_for_padding_is_refused_in_words():
    layer, x = build(), tokens()
    for call in (layer, layer.attention_map):
        with refused(TypeError, "True = padding", "key_mask=~key_padding_mask"):
            call(x, key_padding_mask=torch.zeros(s.b, s.n, dtype=torch.bool))


# The last socket


def test_finish_gets_the_merged_heads_and_the_tokens_before_the_last_product():
    got = []

    def finish(heads, x):
        got.append((heads, x))
        return heads * 2 + 1

    layer, x, context = build(finish=finish), tokens(), tokens(s.m)
    y = layer(x, context)
    ((heads, asked),) = got
    q, k, v = qkv_by_hand(layer, x, context)
    size = s.h // s.g
    merged = torch.cat(
        [(q[:, i] @ k[:, i // size].mT * s.d**-0.5).softmax(-1) @ v[:, i // size] for i in range(s.h)], -1
    )
    assert asked is x and heads.shape == (s.b, s.n, s.h * s.d)
    close(heads, merged)
    close(y, (2 * merged + 1) @ layer.out_proj.weight.T + layer.out_proj.bias)


# Who commits


class Counting(PaddedCache):
    "A cache that counts its commits."

    commits = 0

    def commit(self):
        super().commit()
        self.commits += 1


def test_a_layer_commits_its_own_cache_once_a_call():
    layer, cache = build(), Counting(s.b)
    for calls in (1, 2):
        layer(tokens(), cache=cache)
        assert cache.commits == calls and cache.seen.tolist() == [calls * s.n] * s.b


def test_the_outermost_block_commits_every_cache_once():
    layers, caches = [build(), build()], [Counting(s.b), Counting(s.b)]
    with commit_once(*caches):
        with commit_once(caches[0]):
            for layer, cache in zip(layers, caches):
                layer(tokens(), cache=cache)
        assert [cache.commits for cache in caches] == [0, 0]
    assert [cache.commits for cache in caches] == [1, 1]
    layers[0](tokens(), cache=caches[0])  # and afterwards each call is its own again
    assert [cache.commits for cache in caches] == [2, 1]


def test_one_block_may_be_entered_again_and_stand_before_a_function():
    layer, cache = build(), Counting(s.b)
    block = commit_once(cache)
    with block, block:
        layer(tokens(), cache=cache)
    assert cache.commits == 1 and not cache.in_hand

    @block
    def write(times):
        return write(times - 1) if times else layer(tokens(), cache=cache)

    write(2)
    assert cache.commits == 2 and not cache.in_hand


@pytest.mark.parametrize("nested", [False, True])
def test_a_block_that_fails_keeps_nothing(nested):
    layer, caches = build(), [Counting(s.b), Counting(s.b)]
    with pytest.raises(ZeroDivisionError), commit_once(*caches):
        layer(tokens(), cache=caches[0])
        with commit_once(*caches[nested:]):
            layer(tokens(), cache=caches[1])
            raise ZeroDivisionError
    assert all(cache.commits == 0 and cache.kept is None for cache in caches)
    layer(tokens(), cache=caches[1])  # a failure leaves no cache in anybody's hands
    assert caches[1].commits == 1


RIGHT = commit_once


@contextmanager
def commits_in_every_block(*caches):
    yield
    for cache in caches:
        cache.commit()


@contextmanager
def commits_after_a_failure(*caches):
    try:
        with RIGHT(*caches):
            yield
    except Exception:
        for cache in caches:
            cache.commit()
        raise


@contextmanager
def never_lets_go(*caches):
    with RIGHT(*caches):
        yield
    for cache in caches:
        cache.in_hand = True


@contextmanager
def never_commits(*caches):
    yield


COMMITS = [commits_in_every_block, commits_after_a_failure, never_lets_go, never_commits]


def fails(holds) -> bool:
    "Whether a property does not hold."
    try:
        holds()
    except AssertionError:
        return True
    return False


@pytest.mark.parametrize("wrong", COMMITS, ids=lambda wrong: wrong.__name__)
def test_another_way_to_commit_is_noticed(monkeypatch, wrong):
    monkeypatch.setattr("mha_book.heads.layer.commit_once", wrong)
    monkeypatch.setitem(globals(), "commit_once", wrong)
    assert any(
        map(
            fails,
            [
                test_a_layer_commits_its_own_cache_once_a_call,
                test_the_outermost_block_commits_every_cache_once,
                partial(test_a_block_that_fails_keeps_nothing, True),
                partial(test_a_block_that_fails_keeps_nothing, False),
            ],
        )
    )


@pytest.mark.usefixtures("own_messages")
def test_a_call_that_fails_late_keeps_nothing():
    layer, cache = build(finish=lambda heads, x: heads[..., :3]), Counting(s.b)
    with pytest.raises(RuntimeError):
        layer(tokens(), cache=cache)
    assert cache.commits == 0 and cache.kept is None


def test_a_layer_is_copied_with_its_sockets():
    layer, x = build(finish=lambda heads, x: heads * 2), tokens()
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))


# What only calls go through, and what an open batch leaves open


def test_numbers_that_a_pre_hook_would_change_are_not_given():
    layer, x = build(), tokens()
    map_of, sizes = layer.attention_map(x), largest_logits(layer, x)
    hook = layer.register_forward_pre_hook(lambda module, args: (args[0] * 2, *args[1:]))
    before = [p.clone() for p in layer.parameters()]
    for call in (layer.attention_map, partial(largest_logits, layer), lambda _: qk_clip_(layer, sizes, 1e-3)):
        with refused(TypeError, "forward pre-hooks", "take them off"):
            call(x)
    assert all(map(torch.equal, before, layer.parameters()))
    hook.remove()
    layer.register_forward_hook(lambda module, args, y: None)  # runs when all is computed
    close(layer.attention_map(x), map_of)
    close(largest_logits(layer, x), sizes)


@pytest.mark.usefixtures("own_messages")
@pytest.mark.parametrize("makes", [lambda d: None, lambda d: torch.ones(d), lambda d: nn.RMSNorm], ids=str)
def test_a_norm_is_a_module(makes):
    with refused(TypeError, "qk_norm must make a module"):
        build(qk_norm=makes)


@pytest.mark.usefixtures("own_messages")
@pytest.mark.parametrize("kind", [KVCache, PagedCache])
def test_the_class_of_a_cache_is_no_cache(kind):
    layer, x = build(), tokens()
    for call in (layer, layer.attention_map):
        with refused(TypeError, "cache must have", f"the class {kind.__name__}"):
            call(x, cache=kind)
    with refused(TypeError, f"the class {kind.__name__}"), commit_once(kind):
        pass


@pytest.mark.parametrize("embed_dim, near", [(360, 7), (97, 3), (49, 7), (2**40, 3), (1, 1), (12, 100)])
def test_the_nearest_counts_divide(embed_dim, near):
    below, above = nearest_head_counts(embed_dim, near)
    small = range(1, min(embed_dim, 5000) + 1)
    assert below == max((h for h in small if h < near and embed_dim % h == 0), default=None)
    assert above == min((h for h in small if h > near and embed_dim % h == 0), default=None)


@pytest.mark.usefixtures("own_messages")
@pytest.mark.parametrize("wrong", [(0, 3), (-16, 3), (2**70, 3), (16, 0), (16, 2.5), (16.0, 3), (True, 3), (16, None)])
def test_counts_near_none_are_refused(wrong):
    with refused((TypeError, ValueError), "embed_dim" if wrong[0] != 16 or type(wrong[0]) is float else "near"):
        nearest_head_counts(*wrong)


@pytest.mark.usefixtures("own_messages")
def test_heads_are_cut_from_three_axes_and_merged_from_four():
    for call, wrong in (
        (partial(split_heads, num_heads=2), [torch.ones(6), torch.ones(5, 6), torch.ones(2, 3, 5, 6)]),
        (merge_heads, [torch.ones(5, 6), torch.ones(2, 5, 6), torch.ones(1, 2, 3, 5, 6)]),
    ):
        for x in wrong:
            with refused(ValueError, f"x has shape {tuple(x.shape)}", "needed: (batch"):
                call(x)
        with refused(TypeError, "x must be a torch.Tensor"):
            call(None)
    for count, error in ((0, ValueError), (-2, ValueError), (2.0, TypeError), (True, TypeError)):
        with refused(error, "num_heads"):
            split_heads(torch.ones(2, 5, 6), count)


@pytest.mark.usefixtures("own_messages")
def test_a_list_of_heads_says_what_it_takes():
    heads = HeadList(s.e, s.h, s.d)
    for x, error in ((torch.ones(2, 5, s.e + 1), ValueError), (torch.ones(5, s.e), ValueError), (tokens(), TypeError)):
        with refused(error, "x"):
            heads(x)
    for wrong in ((s.e, s.h, s.d, "no"), (0, s.h), (None, s.h), (-s.h, s.h)):
        with pytest.raises((TypeError, ValueError), match="embed_dim|bias"):
            HeadList(*wrong)


# The map under whatever records a call or passes through it, in a process without the checks of shapes

MAPS = """
import torch, warnings
from functools import partial
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
warnings.filterwarnings("ignore")
from mha_book import *
from mha_book.heads.single_head import plain_attention, plain_attention_weights
b, h, g, n, d = 2, 6, 3, 5, 8
class Map(nn.Module):
    def __init__(self, **plugs):
        super().__init__()
        self.layer = MultiHeadAttention(20, h, num_kv_heads=g, head_dim=d, dtype=torch.float64, **plugs).eval()
    def forward(self, x):
        return self.layer.attention_map(x, is_causal=True)
def dual(look, x):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(look(forward_ad.make_dual(x, torch.ones_like(x)))).primal
def fake(look, x):
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert look(mode.from_tensor(x)).shape == (b, h, n, n)
    return look(x)
compiled = partial(torch.compile, fullgraph=True, backend="eager")
WAYS = {
    "eager": lambda look, x: look(x),
    "compiled": lambda look, x: compiled(look)(x),
    "compiled for any length": lambda look, x: compiled(look, dynamic=True)(x),
    "exported": lambda look, x: torch.export.export(look, (x,)).module()(x),
    "exported strictly": lambda look, x: torch.export.export(look, (x,), strict=True).module()(x),
    "traced": lambda look, x: torch.jit.trace(look, (x,), check_trace=False)(x),
    "mapped": lambda look, x: torch.vmap(look)(x[:, None])[:, 0],
    "dual": dual, "fake": fake,
}
PLUGS = {
    "none": {}, "definition": dict(attend=plain_attention), "window": dict(attend=partial(attention, window=3)),
    "RoPE": dict(position=RoPE(d)), "sinks": dict(attend=SinkAttention(h, dtype=torch.float64)),
    "ALiBi": dict(attend=ALiBi(h)), "norms": dict(qk_norm=nn.RMSNorm),
}
x = torch.randn(b, n, 20, dtype=torch.float64)
with torch.no_grad():
    for plug, options in PLUGS.items():
        look = Map(**options)
        q, k, _ = look.layer.qkv(x)
        want = look(x)
        if plug in ("none", "definition", "RoPE", "norms"):
            torch.testing.assert_close(want, plain_attention_weights(q, k, is_causal=True), atol=1e-12, rtol=0)
        for name, way in WAYS.items():
            torch._dynamo.reset()
            torch.testing.assert_close(way(look, x), want, atol=1e-12, rtol=0, msg=f"{plug}, {name}")
def bent(q, k, v, **options):
    return plain_attention(q, k, v.tanh(), **options)
def says(way, attend):
    try:
        return tuple(WAYS[way](Map(attend=attend), x).shape)
    except ValueError as error:
        return str(error)[:34]
refusal = "attend is not linear in its values"
seen = [says("eager", bent), says("dual", bent)]
assert seen == [refusal] * 2, seen
with torch.no_grad():
    seen = {way: says(way, bent) for way in WAYS if way not in ("eager", "dual", "fake")}
assert set(seen.values()) == {(b, h, n, n)}, seen
print("agree")
"""


def test_the_map_is_the_eager_one_whatever_records_it_and_only_the_eager_one_is_checked():
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", MAPS], capture_output=True, text=True)
    assert done.stdout == "agree\n", done.stderr[-2000:]
