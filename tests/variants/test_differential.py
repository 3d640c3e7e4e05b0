"""Heads that are subtracted, in both forms, and weights without a sum: by loops in plain numbers; cache, padding,
groups, masks, gradients, low precision; what is plain attention, what folds away; what is refused."""

import copy
import math
import subprocess
import sys
from functools import partial

import pytest
import torch
from torch import nn

from mha_book.heads.layer import MultiHeadAttention
from mha_book.heads.single_head import causal_mask, plain_attention
from mha_book.instruments.testing import SIZES, assert_as_exact
from mha_book.kernels.backends import attention, attention_weights
from mha_book.plugs.cache import KVCache
from mha_book.plugs.logits import HeadTemperature, OutputGate
from mha_book.plugs.rope import RoPE
from mha_book.variants.differential import (
    DifferentialAttention,
    DifferentialHeads,
    SigmoidAttention,
    SubtractHeads,
    pair_heads,
)
from support.mutants_differential import PAIRS, SIGMOIDS, SUBTRACTIONS
from support.padded_cache import PaddedCache
from support.refusals import refused

s = SIZES
float64 = dict(dtype=torch.float64)
close = partial(torch.testing.assert_close, atol=1e-12, rtol=0)
random = partial(torch.randn, **float64)


def heads(h=s.h, g=2, n=s.n, m=s.m, dv=s.dv):
    shapes = (s.b, h, n, s.d), (s.b, g, m, s.d), (s.b, g, m, dv)
    return [random(*shape).requires_grad_() for shape in shapes]


def pairs(h=s.h, make=DifferentialAttention, **options):
    plug = make(h, s.d, 2, **(float64 | options))
    for p in plug.parameters():
        nn.init.normal_(p, std=0.4)
    return plug


MASKS = {
    "everything": lambda h: {},
    "causal": lambda h: dict(is_causal=True),
    "a mask": lambda h: dict(mask=torch.rand(s.b, 1, s.n, s.m) < 0.6),
    "a mask and a bias for each head": lambda h: dict(
        mask=torch.rand(h, s.n, s.m) < 0.7, bias=random(h, s.n, s.m), is_causal=True
    ),
    "nothing": lambda h: dict(mask=torch.zeros(s.m, dtype=torch.bool)),
}


def seen_by(options, h):
    "Which keys each query may see, and what is added to its logits: h n m, for each sequence."
    mask = options.get("mask", torch.ones((), dtype=torch.bool)).expand(s.b, h, s.n, s.m)
    mask = mask & causal_mask(s.n, s.m) if options.get("is_causal") else mask
    return mask, options.get("bias", torch.zeros((), **float64)).expand(s.b, h, s.n, s.m)


def mean(q, keys, values, mask, bias):
    "One query's mean of values, in plain numbers."
    seen = [j for j in range(len(keys)) if mask[j]]
    logits = [sum(a * b for a, b in zip(q, keys[j])) / len(q) ** 0.5 + bias[j] for j in seen]
    weights = [math.exp(x) for x in logits]
    total = sum(weights) or 1.0
    return [sum(w * values[j][c] for w, j in zip(weights, seen)) / total for c in range(len(values[0]))]


def by_loops(plug, q, k, v, options):
    "Differential attention, pair by pair, query by query."
    (b, h, n, _), g = q.shape, k.shape[1]
    mask, bias = seen_by(options, h)
    dots = [sum((a * c).tolist()) for a, c in ((plug.lambda_q1, plug.lambda_k1), (plug.lambda_q2, plug.lambda_k2))]
    factor = math.exp(dots[0]) - math.exp(dots[1]) + 0.8 - 0.6 * math.exp(-0.6)
    out = torch.zeros(b, h, n, v.shape[-1], **float64)
    for a in range(b):
        for i in range(h // 2):
            j = i // (h // g)  # both halves of the values, and the keys of either head
            wide = torch.cat([v[a, j], v[a, j + g // 2]], -1).tolist()
            for row in range(n):
                both = [
                    mean(q[a, p, row].tolist(), k[a, p // (h // g)].tolist(), wide, mask[a, p, row], bias[a, p, row])
                    for p in (i, i + h // 2)
                ]
                left = [one - factor * two for one, two in zip(*both)]
                root = math.sqrt(sum(x * x for x in left) / len(left) + 1e-5)
                left = torch.tensor(left, **float64) / root * (0.2 + 0.6 * math.exp(-0.6))
                out[a, 2 * i : 2 * i + 2, row] = left.view(2, -1)
    return out


GROUPS = [(6, 2), (8, 4), (4, 4), (12, 2)]


def defined_in_pairs(make):
    for h, g in GROUPS:
        for title in MASKS if h == 6 else ["causal"]:
            plug, (q, k, v), options = pairs(h, make), heads(h, g), MASKS[title](h)
            close(plug(q, k, v, **options), by_loops(plug, q, k, v, options))


def subtracted(layer, x, factors, plug=None):
    "Two query heads for each head, the second of which is subtracted."
    q, k, v = layer.qkv(x)
    out = plain_attention(q, k, v, is_causal=True)
    left = [out[:, 2 * i] - factors[..., i, None] * out[:, 2 * i + 1] for i in range(out.shape[1] // 2)]
    left = torch.cat(left, -1)
    return layer.out_proj(left if plug is None else plug(left, x))


def paired(make=SubtractHeads, **options):
    layer = DifferentialHeads(s.e, s.h, **(dict(num_kv_heads=s.g, head_dim=s.d, value_dim=s.dv) | float64 | options))
    for p in layer.parameters():
        nn.init.normal_(p, std=0.4)
    layer.finish.__class__ = make
    return layer.eval()


def defined_by_subtraction(make):
    for plug in (None, OutputGate(s.e, s.h, head_dim=s.dv, **float64)):
        layer, x = paired(make, finish=plug), random(s.b, s.n, s.e)
        proj = layer.finish.lambda_proj
        factors = 1 / (1 + torch.exp(-(x @ proj.weight.T + proj.bias)))
        close(layer(x, is_causal=True), subtracted(layer, x, factors, plug))


def weighed_by_loops(q, k, v, options, bias):
    (b, h, n, d), g = q.shape, k.shape[1]
    mask, extra = seen_by(options, h)
    out = torch.zeros(b, h, n, v.shape[-1], **float64)
    for a in range(b):
        for i in range(h):
            for row in range(n):
                seen = [j for j in range(k.shape[2]) if mask[a, i, row, j]]
                shift = -math.log(max(len(seen), 1)) if bias is None else bias
                for j in seen:
                    dot = (q[a, i, row] @ k[a, i // (h // g), j]).item()
                    weight = 1 / (1 + math.exp(-(dot / d**0.5 + extra[a, i, row, j].item() + shift)))
                    out[a, i, row] += weight * v[a, i // (h // g), j].detach()
    return out


def defined_without_a_sum(make):
    for title, options in MASKS.items():
        for bias in (None, 0.0, -1.5):
            (q, k, v), options = heads(g=3), MASKS[title](s.h)
            close(make(bias=bias)(q, k, v, **options), weighed_by_loops(q, k, v, options, bias))


DEFINED = {
    "DifferentialAttention": (defined_in_pairs, DifferentialAttention, PAIRS),
    "SubtractHeads": (defined_by_subtraction, SubtractHeads, SUBTRACTIONS),
    "SigmoidAttention": (defined_without_a_sum, SigmoidAttention, SIGMOIDS),
}


@pytest.mark.parametrize("name", DEFINED)
def test_it_is_what_its_loop_computes(name):
    holds, kind, _ = DEFINED[name]
    holds(kind)


WRONG = {
    f"{name}: {which}": (holds, mutants[which]) for name, (holds, _, mutants) in DEFINED.items() for which in mutants
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_noticed(name):
    holds, mutant = WRONG[name]
    assert mutant.says.endswith(".") and mutant.says[0].isupper()
    with pytest.raises((AssertionError, ValueError)):  # a plug behind it may find another width
        holds(mutant.apply)


# --- cache, padding, groups: through the layer ----------------------------------------------------------------------


def with_pairs(**options):
    attend = pairs()
    return MultiHeadAttention(s.e, s.h, **(dict(num_kv_heads=2, head_dim=s.d, attend=attend) | float64 | options))


def with_sigmoid(**options):
    made = dict(num_kv_heads=s.g, head_dim=s.d, attend=SigmoidAttention()) | float64 | options
    return MultiHeadAttention(s.e, s.h, **made)


LAYERS = {
    "in pairs": with_pairs,
    "in pairs, turned": lambda: with_pairs(position=RoPE(s.d), value_dim=s.dv),
    "subtracted": lambda: paired(),
    "subtracted, turned": lambda: paired(position=RoPE(s.d), qk_norm=nn.RMSNorm, bias=False),
    "sigmoid": with_sigmoid,
    "sigmoid, in a window": lambda: with_sigmoid(attend=SigmoidAttention(window=3), position=RoPE(s.d)),
    "sigmoid, a number": lambda: with_sigmoid(attend=SigmoidAttention(bias=-1.0, scale=0.7)),
}
EVERY_LAYER = pytest.mark.parametrize("name", LAYERS)


def built(name):
    torch.manual_seed(3)
    layer = LAYERS[name]().eval()
    return layer, layer.layout


@EVERY_LAYER
@pytest.mark.parametrize("chunks", [(1, 1, 1, 1, 1, 1, 1), (4, 3), (2, 5)])
def test_chunks_through_a_cache_are_the_whole(name, chunks):
    layer, (_, g, d) = built(name)
    x = random(s.b, s.m, s.e)
    cache = KVCache(s.b, g, s.m, d, value_dim=layer.layout.value_dim, **float64)
    with torch.no_grad():
        parts = [layer(part, is_causal=True, cache=cache) for part in x.split(chunks, 1)]
        close(torch.cat(parts, 1), layer(x, is_causal=True))


@EVERY_LAYER
@pytest.mark.parametrize("left", [False, True])
def test_padding_changes_nothing(name, left):
    layer, _ = built(name)
    x = random(1, s.n, s.e)
    rows = torch.cat([random(1, 4, s.e) * 50, x] if left else [x, random(1, 4, s.e) * 50], 1)
    real = torch.ones(1, s.n + 4, dtype=torch.bool)
    real[:, slice(4) if left else slice(s.n, None)] = False
    wanted = layer(x, is_causal=True)
    layer(rows, key_mask=real, is_causal=True)
    cache = PaddedCache(1) if left else None  # counts the places of real tokens
    got = layer(rows, key_mask=real, is_causal=True, cache=cache)[real]
    close(got, wanted[0])


@EVERY_LAYER
def test_a_query_that_sees_nothing_gives_the_bias_alone_and_finite_gradients(name):
    layer, _ = built(name)
    x = random(s.b, s.n, s.e).requires_grad_()
    y = layer(x, mask=torch.zeros(s.n, dtype=torch.bool))
    bias = layer.out_proj.bias
    close(y, torch.zeros_like(y) if bias is None else bias.expand_as(y))
    y.square().sum().backward()
    close(x.grad, torch.zeros_like(x))
    assert all(p.grad is None or p.grad.isfinite().all() for p in layer.parameters())


@EVERY_LAYER
def test_gradients_are_those_of_differences(name):
    layer, _ = built(name)
    x = random(1, 3, s.e).requires_grad_()
    own = [p for n, p in layer.named_parameters() if "lambda" in n]
    assert torch.autograd.gradcheck(lambda x, *_: layer(x, is_causal=True), (x, *own), atol=1e-6)


@EVERY_LAYER
def test_it_is_copied_saved_and_loaded(name):
    layer, _ = built(name)
    x = random(s.b, s.n, s.e)
    wanted = layer(x, is_causal=True)
    close(copy.deepcopy(layer)(x, is_causal=True), wanted)
    other = LAYERS[name]().eval()
    other.load_state_dict(layer.state_dict())
    close(other(x, is_causal=True), wanted)


COMPILED = """
import torch
from mha_book.heads.layer import MultiHeadAttention
from mha_book.variants.differential import DifferentialAttention, DifferentialHeads, SigmoidAttention

x = torch.randn(2, 5, 48, dtype=torch.float64)
plugs = DifferentialAttention(6, 8, 1), SigmoidAttention(window=3)
for layer in (*(MultiHeadAttention(48, 6, attend=plug) for plug in plugs), DifferentialHeads(48, 6, num_kv_heads=3)):
    step = torch.compile(layer.double(), fullgraph=True, backend="eager")
    torch.testing.assert_close(step(x, is_causal=True), layer(x, is_causal=True), atol=1e-12, rtol=0)
"""


def test_they_are_compiled_as_one_graph():  # without what checks shapes here
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", COMPILED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@EVERY_LAYER
def test_on_meta_it_has_the_right_shape(name):
    layer, _ = built(name)
    assert layer.to("meta")(random(s.b, s.n, s.e, device="meta")).shape == (s.b, s.n, s.e)


@EVERY_LAYER
def test_a_context_is_asked(name):
    layer, _ = built(name)
    x, context = random(s.b, s.n, s.e), random(s.b, s.m, s.e)
    y = layer(x, context)
    assert y.shape == x.shape
    close(layer(x[:1], context[:1]), y[:1])
    assert not torch.allclose(layer(x), y)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("kind", ["pairs", "sigmoid"])
def test_low_precision_is_as_exact_as_the_plain_definition(kind, dtype):
    q, k, v = (t.detach() for t in heads())
    plug = pairs() if kind == "pairs" else SigmoidAttention()
    low = copy.deepcopy(plug).to(dtype)
    high = copy.deepcopy(low).double()
    exact = high(*(t.to(dtype).double() for t in (q, k, v)), is_causal=True)
    got = low(*(t.to(dtype) for t in (q, k, v)), is_causal=True)
    assert got.dtype == dtype
    plain = copy.deepcopy(low)
    if kind == "pairs":
        plain.attend = partial(attention, impl="math")
    assert_as_exact(got, exact, plain(*(t.to(dtype) for t in (q, k, v)), is_causal=True))
    assert (got.double() - exact).abs().max() < 16 * torch.finfo(dtype).eps * exact.abs().max()


@EVERY_LAYER
@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # of torch's norm of queries
def test_autocast_stays_near(name):
    layer, _ = built(name)
    layer, x = layer.float(), torch.randn(s.b, s.n, s.e)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x, is_causal=True)
    exact = layer(x, is_causal=True)
    assert y.dtype == torch.bfloat16 and (y - exact).abs().max() < 0.1 * exact.abs().max()


# --- pairs of halves ------------------------------------------------------------------------------------------------


def test_maps_are_subtracted_so_rows_sum_to_what_is_left():
    plug, (q, k, _) = pairs(), heads()
    wide = torch.ones(s.b, 2, s.m, 1, **float64)  # values of 1 give the sum of the weights
    one, two = plug._on_wide_values(q, k, wide, {}).chunk(2, dim=1)
    close(one - plug.factor() * two, (1 - plug.factor()).expand_as(one))


def test_lambda_begins_at_its_layers_number():
    for index, wanted in ((0, 0.2), (1, 0.8 - 0.6 * math.exp(-0.3)), (30, 0.8 - 0.6 * math.exp(-9))):
        plug = DifferentialAttention(4, 4096, index)
        assert plug.lambda_init == pytest.approx(wanted) and 0 <= plug.lambda_init <= 0.8
        assert 0.09 < plug.lambda_q1.std() < 0.11
        for p in plug.parameters():
            nn.init.zeros_(p)
        assert plug.factor().item() == pytest.approx(wanted)


def test_one_draw_of_dropout_serves_both_halves_of_a_value():
    plug, (q, k, _) = pairs(), heads()
    half = random(s.b, 1, s.m, s.dv)
    both = plug(q, k, torch.cat([half, half], 1), dropout_p=0.5)  # the two halves of a value are equal
    close(both[:, 0::2], both[:, 1::2])
    calls = []

    def watched(*args, **options):
        calls.append(options)
        return attention(*args, **options)

    plug.attend = watched
    plug(q, k, half.expand(-1, 2, -1, -1))
    assert len(calls) == 2


@pytest.mark.parametrize("impl", ["math", "sdpa", "flex"])
def test_every_kernel_gives_the_same(impl):
    plug, (q, k, v) = pairs(), heads(dv=s.d)
    wanted = plug(q, k, v, is_causal=True)
    plug.attend = partial(attention, impl=impl)
    with torch.no_grad():
        close(plug(q, k, v, is_causal=True), wanted, atol=1e-11)


def test_a_map_that_is_normed_has_no_weights_to_show():
    with refused(ValueError, "not linear"):
        built("in pairs")[0].attention_map(random(s.b, s.n, s.e))


# --- pairs in a group -----------------------------------------------------------------------------------------------


def test_the_map_of_a_pair_is_its_difference():
    layer, x = paired(), random(s.b, s.n, s.e)
    q, k, v = layer.qkv(x)
    maps, factors = attention_weights(q, k, is_causal=True), layer.finish.factors(x)
    found = layer.attention_map(x, is_causal=True)
    for i in range(s.h):
        close(found[:, i], maps[:, 2 * i] - factors[:, :, i, None] * maps[:, 2 * i + 1])
    close(found.sum(-1), 1 - factors.mT)
    assert (found < 0).any()
    out = (found @ v.repeat_interleave(s.h // s.g, 1)).transpose(1, 2).flatten(2)
    close(layer.out_proj(out), layer(x, is_causal=True))


def test_a_factor_of_zero_leaves_every_first_head():
    layer, x = paired(), random(s.b, s.n, s.e)
    nn.init.zeros_(layer.finish.lambda_proj.weight)
    nn.init.constant_(layer.finish.lambda_proj.bias, -math.inf)
    plain = MultiHeadAttention(s.e, s.h, num_kv_heads=s.g, head_dim=s.d, value_dim=s.dv, **float64)
    rows, queries = layer.in_proj.weight, 2 * s.h * s.d
    first = torch.cat([torch.arange(queries).view(s.h, 2, s.d)[:, 0].flatten(), torch.arange(queries, len(rows))])
    plain.in_proj.load_state_dict({name: p[first] for name, p in layer.in_proj.state_dict().items()})
    plain.out_proj.load_state_dict(layer.out_proj.state_dict())
    close(layer(x, is_causal=True), plain(x, is_causal=True))


PLAIN = {
    "as it comes": {},
    "grouped": dict(num_kv_heads=s.g, head_dim=s.d),
    "one group": dict(num_kv_heads=1, head_dim=s.d, bias=False),
    "other values": dict(num_kv_heads=s.g, head_dim=s.d, value_dim=s.dv, out_dim=13),
    "turned": dict(head_dim=s.d, position=RoPE(s.d), qk_norm=nn.RMSNorm),
    "dropout": dict(head_dim=s.d, dropout=0.3),
}


def plain_layer(name):
    layer = MultiHeadAttention(s.e if PLAIN[name] else 48, s.h, **PLAIN[name], **float64)
    for p in layer.parameters():
        nn.init.normal_(p, std=0.4)
    return layer.eval()


@pytest.mark.parametrize("name", PLAIN)
def test_a_plain_layer_in_pairs_computes_the_same_and_learns(name):
    layer = plain_layer(name)
    before, x = copy.deepcopy(layer.state_dict()), random(s.b, s.n, layer.in_proj.in_features)
    new = pair_heads(layer)
    close(new(x, is_causal=True), layer(x, is_causal=True))
    close(new.attention_map(x), layer.attention_map(x) / 2)
    assert all(torch.equal(t, before[key]) for key, t in layer.state_dict().items())
    new(x).square().sum().backward()
    for name, p in new.named_parameters():
        assert p.grad.abs().sum() > 0, name
    q = new.in_proj.weight.grad[: 2 * s.h * layer.layout.head_dim].unflatten(0, (s.h, 2, -1))
    close(q[:, 0], -2 * q[:, 1], atol=1e-9)


def test_a_context_of_another_width_comes_along():
    layer = MultiHeadAttention(s.e, s.h, head_dim=s.d, context_dim=11, **float64)
    x, context = random(s.b, s.n, s.e), random(s.b, s.m, 11)
    close(pair_heads(layer)(x, context), layer(x, context))


def test_head_surgery_is_refused_in_words():
    with refused(TypeError, "out_proj has", "cut otherwise"):
        paired().rows("o", 0)


@pytest.mark.parametrize("impl", ["math", "sdpa", "flex"])
def test_every_kernel_computes_pairs_in_a_group(impl):
    layer, x = paired(value_dim=s.d), random(s.b, s.n, s.e)
    wanted = layer(x, is_causal=True)
    layer.attend = partial(attention, impl=impl)
    with torch.no_grad():
        close(layer(x, is_causal=True), wanted, atol=1e-11)


# --- without a sum --------------------------------------------------------------------------------------------------


def test_later_keys_and_hidden_ones_count_for_nothing():
    q, k, v = heads(g=3, n=s.m)
    whole = SigmoidAttention()(q, k, v, is_causal=True)
    for n in range(1, s.m):
        close(SigmoidAttention()(q[:, :, :n], k[:, :, :n], v[:, :, :n], is_causal=True), whole[:, :, :n])


def test_a_logit_of_minus_infinity_is_hidden():
    (q, k, v), mask = heads(g=3), torch.rand(s.n, s.m) < 0.6
    bias = torch.where(mask, 0.0, -math.inf).double()
    close(SigmoidAttention()(q, k, v, bias=bias), SigmoidAttention()(q, k, v, mask=mask))


def test_the_map_shows_the_weights_whatever_they_sum_to():
    layer = with_sigmoid()
    maps = layer.attention_map(random(s.b, s.n, s.e))
    assert ((maps > 0) & (maps < 1)).all() and maps.sum(-1).std() > 1e-3
    nn.init.zeros_(layer.in_proj.weight)
    close(layer.attention_map(random(s.b, s.n, s.e)), torch.full((s.b, s.h, s.n, s.n), 1 / (s.n + 1), **float64))


def test_weights_are_dropped():
    torch.manual_seed(0)
    q, k, v = heads(g=3)
    drawn = torch.stack([SigmoidAttention()(q, k, v, dropout_p=0.4).detach() for _ in range(500)])
    wanted = SigmoidAttention()(q, k, v).detach()
    assert drawn.std(0).min() > 0 and (drawn.mean(0) - wanted).abs().max() < 6 * (drawn.std(0) / 500**0.5).max()


def test_a_rolling_cache_and_the_window_count_the_same_keys():
    layer, x = with_sigmoid(attend=SigmoidAttention(window=3)).eval(), random(s.b, s.m, s.e)
    cache = KVCache(s.b, s.g, s.m, s.d, window=3, **float64)
    with torch.no_grad():
        parts = [layer(part, is_causal=True, cache=cache) for part in x.split((2, 4, 1), 1)]
        close(torch.cat(parts, 1), layer(x, is_causal=True))


# --- what is refused ------------------------------------------------------------------------------------------------


def asked(plug, h=s.h, g=2):
    return plug(*heads(h, g))


class Hooked(MultiHeadAttention):
    def forward(self, x):
        return x


REFUSED = {
    "odd heads": (lambda: DifferentialAttention(5, 8, 0), ValueError, ("num_heads 5", "odd")),
    "no heads": (lambda: DifferentialAttention(0, 8, 0), ValueError, ("num_heads",)),
    "no width": (lambda: DifferentialAttention(4, 8.0, 0), TypeError, ("head_dim",)),
    "a layer before the first": (lambda: DifferentialAttention(4, 8, -1), ValueError, ("layer_index -1", "from 0")),
    "no layer": (lambda: DifferentialAttention(4, 8, 1.0), TypeError, ("layer_index", "1.0")),
    "eps": (lambda: DifferentialAttention(4, 8, 0, eps=0.0), ValueError, ("eps", "positive")),
    "no kernel": (lambda: DifferentialAttention(4, 8, 0, attend=3), TypeError, ("attend",)),
    "other heads": (lambda: asked(pairs(8)), ValueError, ("(2, 6, 5, 8)", "8 query heads")),
    "one group": (lambda: asked(pairs(), g=1), ValueError, ("even number", "num_kv_heads=2")),
    "three groups": (lambda: asked(pairs(), g=3), ValueError, ("even number",)),
    "another device": (lambda: asked(pairs(device="meta")), ValueError, ("device differs", "meta")),
    "groups in a pair": (lambda: DifferentialHeads(48, 6, num_kv_heads=4), ValueError, ("6 heads", "divide")),
    "groups, twice the heads": (lambda: DifferentialHeads(48, 6, num_kv_heads=12), ValueError, ("6 heads", "12")),
    "heads and width": (lambda: DifferentialHeads(50, 6), ValueError, ("embed_dim 50", "num_heads 6")),
    "no count": (lambda: DifferentialHeads(48, True), TypeError, ("num_heads",)),
    "not pairs": (
        lambda: SubtractHeads(20, 4)(torch.ones(1, 2, 12), torch.ones(1, 2, 20)),
        ValueError,
        ("12", "4 pairs"),
    ),
    "a finish that is none": (lambda: SubtractHeads(20, 4, finish=2), TypeError, ("finish",)),
    "a bias that is none": (lambda: SigmoidAttention(bias="log"), TypeError, ("bias", "log")),
    "an endless bias": (lambda: SigmoidAttention(bias=math.inf), ValueError, ("bias", "finite")),
    "no window": (lambda: SigmoidAttention(window=0), ValueError, ("window", "0")),
    "no scale": (lambda: SigmoidAttention(scale=True), TypeError, ("scale",)),
    "no layer of the book": (lambda: pair_heads(nn.Linear(3, 3)), TypeError, ("MultiHeadAttention", "Linear")),
    "own forward": (lambda: pair_heads(Hooked(48, 6)), TypeError, ("a forward of its own",)),
    "finish": (lambda: pair_heads(MultiHeadAttention(48, 6, finish=OutputGate(48, 6))), ValueError, ("finish",)),
    "wrapped": (
        lambda: pair_heads(torch.nn.utils.parametrizations.weight_norm(MultiHeadAttention(48, 6).in_proj)),
        TypeError,
        ("MultiHeadAttention",),
    ),
    "pairs of pairs": (lambda: pair_heads(DifferentialHeads(48, 6)), TypeError, ("out_proj has", "cut otherwise")),
}


@pytest.mark.usefixtures("own_messages")
@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused(name):
    call, error, words = REFUSED[name]
    with refused(error, *words):
        call()


@pytest.mark.usefixtures("own_messages")
def test_a_plug_that_counts_heads_is_refused_at_once():
    layer = MultiHeadAttention(48, 6, attend=HeadTemperature(6))
    with refused(ValueError, "HeadTemperature"):
        pair_heads(layer)
