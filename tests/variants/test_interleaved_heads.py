"""Interleaved heads against their loop, with every option and call of a layer; equal pseudo-heads that stay equal."""

import copy
import functools
import itertools
import math
import subprocess
import sys
from functools import partial

import pytest
import torch
from torch import nn

from mha_book.heads.layer import MultiHeadAttention
from mha_book.heads.single_head import plain_attention
from mha_book.instruments.testing import SIZES
from mha_book.kernels.backends import attention
from mha_book.kernels.merging import attention_with_lse, merge_attention
from mha_book.plugs.cache import KVCache
from mha_book.plugs.logits import SinkAttention
from mha_book.plugs.rope import RoPE
from mha_book.variants.interleaved_heads import InterleavedHeads
from support.mutants_interleaved import WRONG
from support.refusals import refused

s = SIZES
float64 = dict(dtype=torch.float64)
close = partial(torch.testing.assert_close, atol=1e-12, rtol=1e-12)


def heads(n=s.n, m=s.m, **like):
    shapes = (s.b, s.h, n, s.d), (s.b, s.g, m, s.d), (s.b, s.g, m, s.dv)
    return [torch.randn(shape, **(float64 | like)) for shape in shapes]


def plug(parts=4, g=s.g, kind=InterleavedHeads, spread=1.0, **options):
    made = kind(s.h, parts, num_kv_heads=g, spread=spread, **(float64 | options))
    if spread:
        nn.init.normal_(made.collapse)
    return made


def build(attend, **options):
    options = dict(num_kv_heads=s.g, head_dim=s.d, value_dim=s.dv) | options
    return MultiHeadAttention(s.e, s.h, attend=attend, **(float64 | options))


def tokens(n=s.n, b=s.b):
    return torch.randn(b, n, s.e, **float64)


# --- the loop --------------------------------------------------------------------------------------------------------


def seen(n, m, mask, is_causal, window):
    "Which tokens a token may look at, b h n m, pair by pair."
    left, right = (window - 1, 0) if isinstance(window, int) else window or (None, None)
    grid = torch.ones(s.b, s.h, n, m, dtype=torch.bool) if mask is None else mask.expand(s.b, s.h, n, m).clone()
    for t, j in itertools.product(range(n), range(m)):
        gap = j - (m - n + t)
        hidden = gap > 0 and is_causal or left is not None and gap < -left or right is not None and gap > right
        grid[:, :, t, j] &= not hidden
    return grid


def by_loop(made, q, k, v, mask=None, bias=None, is_causal=False):
    "Interleaved heads: one row, head, token and pseudo-query at a time."
    n, m, parts, r = q.shape[2], k.shape[2], made.mix_k.shape[1], s.h // k.shape[1]
    grid = seen(n, m, mask, is_causal, made.window)
    bias = torch.zeros(1, **float64) if bias is None else bias
    bias = bias.expand(s.b, s.h, n, m)
    found = torch.zeros(s.b, s.h, made.mix_q.shape[1], n, v.shape[3], **float64)

    @functools.cache
    def mixed(name, row, i, u, j):
        mix, of = dict(q=(made.mix_q, q), k=(made.mix_k, k), v=(made.mix_v, v))[name]
        return sum(mix[i, u, a] * of[row, a, j] for a in range(len(mix)))

    for row, i, p, t in itertools.product(*map(range, found.shape[:4])):
        pairs = [(j, u) for j in range(m) if grid[row, i, t, j] for u in range(parts)]
        if not pairs:
            continue
        query, keys = mixed("q", row, i, p, t), [mixed("k", row, i // r, u, j) for j, u in pairs]
        logits = torch.stack([query @ key for key in keys]) / s.d**0.5
        weights = (logits + torch.stack([bias[row, i, t, j] for j, _ in pairs])).softmax(0)
        found[row, i, p, t] = sum(w * mixed("v", row, i // r, u, j) for w, (j, u) in zip(weights, pairs))
    if made.collapse.dim() == 2:
        return torch.einsum("ip,bipnd->bind", made.collapse, found)
    return torch.einsum("oip,bipnd->bond", made.collapse, found)


OPTIONS = {
    "plain": dict(),
    "causal": dict(is_causal=True),
    "mask": dict(mask=torch.rand(s.b, 1, s.n, s.m) < 0.5),
    "padding": dict(mask=(torch.arange(s.m) > 2).expand(s.b, 1, 1, s.m), is_causal=True),
    "mask of heads": dict(mask=torch.rand(s.h, s.n, s.m) < 0.5),
    "a column": dict(mask=torch.rand(s.n, 1) < 0.5),
    "bias": dict(bias=torch.randn(s.h, s.n, s.m, **float64), is_causal=True),
    "bias of keys": dict(bias=torch.randn(s.m, **float64)),
}
SHAPES = {
    "three": dict(parts=3),
    "one query": dict(num_pseudo_queries=1),
    "more queries": dict(parts=2, num_pseudo_queries=3, across_heads=True),
    "one": dict(parts=1),
    "window": dict(parts=2, window=3),
    "one, window": dict(parts=1, window=(2, 1)),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("options", OPTIONS)
@torch.no_grad()
def test_the_plug_is_the_loop(options, shape):
    made, (q, k, v) = plug(**SHAPES[shape]), heads()
    close(made(q, k, v, **OPTIONS[options]), by_loop(made, q, k, v, **OPTIONS[options]))


@pytest.mark.parametrize("name", WRONG)
@torch.no_grad()
def test_what_is_wrong_is_not_the_loop(name):
    told = OPTIONS["bias"] | OPTIONS["mask"]
    made, (q, k, v) = plug(2, kind=WRONG[name].apply), heads()
    assert (made(q, k, v, **told) - by_loop(made, q, k, v, **told)).abs().max() > 1e-2


@pytest.mark.parametrize("impl", ["math", "sdpa"])
def test_every_kernel_gives_the_same(impl):
    made, (q, k, v) = plug(), heads()
    for options in OPTIONS.values():
        want = made(q, k, v, **options)
        made.attend = partial(attention, impl=impl)
        close(made(q, k, v, **options), want)
        made.attend = plain_attention
        close(made(q, k, v, **options), want)
        made.attend = attention


@pytest.mark.parametrize("across", [False, True])
def test_gradients(across):
    made = InterleavedHeads(2, 3, num_kv_heads=1, num_pseudo_queries=2, across_heads=across, spread=1.0, **float64)
    made.attend = plain_attention
    names = [name for name, _ in made.named_parameters()]
    q, k, v = torch.randn(1, 2, 2, 3, **float64), torch.randn(1, 1, 3, 3, **float64), torch.randn(1, 1, 3, 2, **float64)

    def call(q, k, v, *own):
        return torch.func.functional_call(made, dict(zip(names, own)), (q, k, v), dict(is_causal=True))

    inputs = [t.detach().requires_grad_() for t in (q, k, v, *made.parameters())]
    assert torch.autograd.gradcheck(call, inputs) and torch.autograd.gradgradcheck(call, inputs)


# --- the start -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_without_a_spread_it_starts_as_plain_attention(shape, options):
    made, (q, k, v) = plug(**SHAPES[shape], spread=0.0), heads()
    want = attention(q, k, v, window=made.window, **OPTIONS[options])
    close(made(q, k, v, **OPTIONS[options]), want)
    if shape == "one":
        assert torch.equal(made(q, k, v, **OPTIONS[options]), want)


def test_a_spread_starts_near_plain_attention():
    q, k, v = heads(dtype=torch.float32)
    want = attention(q, k, v)
    far = [
        ((InterleavedHeads(s.h, 4, num_kv_heads=s.g, spread=x)(q, k, v) - want).norm() / want.norm()).item()
        for x in (0.0, 0.02, 0.2)
    ]
    assert far[0] < 1e-6 < 1e-3 < far[1] < 0.15 < far[2]


def trained(spread, steps, optimiser=torch.optim.Adam):
    "A layer with three pseudo-heads after some steps on a task that one head cannot do."
    torch.manual_seed(3)
    layer = build(plug(3, spread=0.0), bias=False)
    layer.attend.spread = spread
    layer.attend.reset_parameters()
    opt, x = optimiser(layer.parameters(), lr=0.01), tokens(b=4)
    for _ in range(steps):
        opt.zero_grad()
        (layer(x) - x.roll(1, 1) - x.roll(2, 1)).square().mean().backward()
        opt.step()
    return layer.attend


@pytest.mark.parametrize("optimiser", [torch.optim.Adam, partial(torch.optim.SGD, momentum=0.9)])
def test_equal_pseudo_heads_stay_equal(optimiser):
    for spread, is_equal in ((0.0, True), (0.1, False)):
        made, start = trained(spread, 12, optimiser), trained(spread, 0)
        for name in ("mix_q", "mix_k", "mix_v"):
            mix = getattr(made, name)
            assert (mix - getattr(start, name)).abs().max() > 1e-3
            assert ((mix - mix[:, :1]).abs().max() < 1e-9) == is_equal
        assert ((made.collapse - made.collapse[:, :1]).abs().max() < 1e-9) == is_equal


def test_a_sink_counts_against_all_copies():
    q, k, v = heads()
    inner = SinkAttention(s.h * 4, **float64)
    made = plug(4, spread=0.0, attend=inner)
    sinks = torch.randn(s.h, **float64)
    with torch.no_grad():
        inner.sinks.copy_((sinks + math.log(4)).repeat_interleave(4))
    close(made(q, k, v), attention(q, k, v, sinks=sinks))


# --- in a layer ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_no_token_sees_a_later_one(shape):
    made, (q, k, v) = plug(**SHAPES[shape]), heads(s.m)
    y = made(q, k, v, is_causal=True)
    for t in range(s.m - 1):
        k[:, :, t + 1 :] += 1.0
        v[:, :, t + 1 :] *= -3.0
        z = made(q, k, v, is_causal=True)
        close(z[:, :, : t + 1], y[:, :, : t + 1])
        assert not torch.allclose(z[:, :, t + 1 :], y[:, :, t + 1 :])
        y = z


@torch.no_grad()
@pytest.mark.parametrize("shape", SHAPES)
def test_pieces_with_a_cache_are_the_whole(shape):
    layer, x = build(plug(**SHAPES[shape]), position=RoPE(s.d)), tokens(s.m)
    whole = layer(x, is_causal=True)
    for sizes in ([4, 1, 2], [1] * s.m):
        cache = KVCache(s.b, s.g, s.m, s.d, value_dim=s.dv, **float64)
        parts = [layer(part, is_causal=True, cache=cache) for part in x.split(sizes, 1)]
        close(torch.cat(parts, 1), whole)
        assert cache.k.shape[1:3] == (s.g, s.m)  # the heads' own keys, whatever P is


@torch.no_grad()
def test_a_rolling_cache_and_a_window_of_tokens():
    layer, x = build(plug(window=3)), tokens(s.m)
    cache = KVCache(s.b, s.g, 5, s.d, value_dim=s.dv, window=3, **float64)
    parts = [layer(part, is_causal=True, cache=cache) for part in x.split(1, 1)]
    close(torch.cat(parts, 1), layer(x, is_causal=True))
    with refused(ValueError, "windows differ"):
        layer(x[:, :1], is_causal=True, cache=KVCache(s.b, s.g, 5, s.d, value_dim=s.dv, window=4, **float64))


@torch.no_grad()
def test_padding_on_either_side_changes_nothing():
    layer, x = build(plug(), position=RoPE(s.d)), tokens(s.m)
    y = layer(x, is_causal=True)
    junk = 50 * tokens(3)
    for pieces, where in (([junk, x], slice(3, None)), ([x, junk], slice(s.m))):
        real = torch.zeros(s.b, s.m + 3, dtype=torch.bool)
        real[:, where] = True
        close(layer(torch.cat(pieces, 1), key_mask=real, is_causal=True)[:, where], y)


def test_who_sees_nothing_gives_nothing_and_learns_nothing():
    made, qkv = plug(), [t.requires_grad_() for t in heads()]
    mask = torch.rand(s.b, 1, s.n, s.m) < 0.5
    mask[:, :, 2] = False
    y = made(*qkv, mask=mask)
    assert (y[:, :, 2] == 0).all()
    grads = torch.autograd.grad(y.square().sum(), [*qkv, *made.parameters()])
    assert all(g.isfinite().all() for g in grads) and (grads[0][:, :, 2] == 0).all()


@torch.no_grad()
def test_cross_attention():
    layer, x, context = build(plug(), context_dim=11), tokens(), torch.randn(s.b, s.m, 11, **float64)
    q, k, v = layer.qkv(x, context)
    want = by_loop(layer.attend, q, k, v).transpose(1, 2).flatten(2)
    close(layer(x, context), layer.out_proj(want))


@torch.no_grad()
def test_a_map_is_there_only_where_values_stay_with_their_heads():
    x = tokens()
    layer = build(plug(spread=0.0))
    weights = layer.attention_map(x, is_causal=True)
    plain = build(attention)
    plain.load_state_dict(layer.state_dict(), strict=False)
    close(weights, plain.attention_map(x, is_causal=True))
    nn.init.normal_(layer.attend.mix_v)
    with refused(ValueError, "attention_map"):
        layer.attention_map(x, is_causal=True)


@torch.no_grad()
def test_rope_commutes_with_a_mix_of_heads():
    made, rope, (q, k, _) = plug(), RoPE(s.d), heads(s.m)
    turned_q, turned_k = rope(q, k, offset=3)
    many = made.keys(k).unflatten(2, (s.m, 4)).transpose(2, 3).flatten(1, 2)  # b (g r) m d
    late_q, late_k = rope(made.queries(q), many, offset=3)
    close(made.queries(turned_q), late_q)
    close(made.keys(turned_k).unflatten(2, (s.m, 4)).transpose(2, 3).flatten(1, 2), late_k)


@torch.no_grad()
def test_plain_causal_kernels_merged_are_the_plug():
    made, (q, k, v) = plug(), heads(s.m)
    keys, values = (t.unflatten(2, (s.m, 4)).unbind(3) for t in (made.keys(k), made.values(v)))
    for told in (dict(is_causal=True), dict(is_causal=True, bias=torch.randn(s.m, s.m, **float64))):
        parts = [attention_with_lse(made.queries(q), *kv, **told) for kv in zip(keys, values)]
        close(made.collapsed(merge_attention(*zip(*parts))[0]), made(q, k, v, **told))


# --- dtypes, compilers, copies ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_halves_and_autocast(dtype):
    made, qkv = plug(spread=0.3), heads(s.m)
    want, span = made(*qkv, is_causal=True), 8 * torch.finfo(dtype).eps * 20
    low = made.to(torch.float32)(*(t.to(dtype) for t in qkv), is_causal=True)
    assert low.dtype == dtype and (low.double() - want).abs().max() < span
    with torch.autocast("cpu", dtype):
        cast = made(*(t.float() for t in qkv), is_causal=True)
    assert cast.dtype == dtype and (cast.double() - want).abs().max() < span


COMPILED = """
import torch
from mha_book.variants.interleaved_heads import InterleavedHeads
for options in dict(across_heads=True), dict(num_pseudo_queries=1, window=3):
    torch._dynamo.reset()
    made = InterleavedHeads(6, **(dict(num_pseudo=4) | options), num_kv_heads=3)
    call = torch.compile(made, fullgraph=True, dynamic=True, backend="eager")
    for n, m in ((5, 7), (4, 9)):
        qkv = torch.randn(2, 6, n, 8), torch.randn(2, 3, m, 8), torch.randn(2, 3, m, 9)
        told = dict(is_causal=True, mask=torch.rand(n, m) < 0.6, bias=torch.randn(6, n, m))
        torch.testing.assert_close(call(*qkv, **told), made(*qkv, **told))
print("the same")
"""  # in a process of its own, for shape checking wraps functions


def test_it_runs_compiled_without_a_break():
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", COMPILED], capture_output=True, text=True)
    assert done.stdout == "the same\n", done.stderr[-2000:]


def test_copies_states_and_meta():
    made, qkv = plug(), heads()
    again = plug()
    again.load_state_dict(made.state_dict())
    for other in (copy.deepcopy(made), again):
        assert torch.equal(other(*qkv), made(*qkv))
    assert set(made.state_dict()) == {"mix_q", "mix_k", "mix_v", "collapse"}
    empty = plug(device="meta")
    assert empty(*(t.to("meta") for t in qkv), is_causal=True).shape == (s.b, s.h, s.n, s.dv)


def test_dropout_drops():
    made, (q, k, _) = plug(spread=0.0), heads()
    y = made(q, k, torch.ones(s.b, s.g, s.m, s.dv, **float64), dropout_p=0.5)
    assert not torch.allclose(y, torch.ones_like(y))


@pytest.mark.usefixtures("own_messages")
def test_bad_input_is_refused():
    with refused(TypeError, "num_heads", "4.0"):
        InterleavedHeads(4.0, 2)
    for name in ("num_kv_heads", "num_pseudo_queries"):
        with refused(ValueError, name, "at least 1"):
            InterleavedHeads(4, 2, **{name: 0})
    with refused(ValueError, "num_pseudo", "at least 1"):
        InterleavedHeads(4, 0)
    with refused(ValueError, "6 query heads", "4 key-value heads", "num_kv_heads"):
        InterleavedHeads(6, 2, num_kv_heads=4)
    with refused(ValueError, "spread -0.1", "negative"):
        InterleavedHeads(4, 2, spread=-0.1)
    with refused(TypeError, "spread", "'a'"):
        InterleavedHeads(4, 2, spread="a")
    with refused(TypeError, "across_heads", "1"):
        InterleavedHeads(4, 2, across_heads=1)
    with refused(TypeError, "attend must be callable"):
        InterleavedHeads(4, 2, attend=None)
    with refused(TypeError, "window 1.5"):
        InterleavedHeads(4, 2, window=1.5)
    with refused(ValueError, "window=3", "InterleavedHeads(window=)"):
        InterleavedHeads(4, 2, attend=partial(attention, window=3))
    q, k, v = heads()
    with refused(ValueError, "6 query heads and 3 key-value heads", "6 and 6", "num_kv_heads="):
        InterleavedHeads(s.h, 2, **float64)(q, k, v)
    with refused(ValueError, "device differs", "meta"):
        plug(device="meta")(q, k, v)
    with refused(ValueError, "mask of shape (4,)", "(7,)"):
        plug()(q, k, v, mask=torch.ones(4, dtype=torch.bool))
