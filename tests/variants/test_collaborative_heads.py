"""Heads that share their matrices against loops over heads and channels; decompositions against dense matrices."""

import copy
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mha_book.heads.head_counts import separate_projections
from mha_book.heads.layer import MultiHeadAttention
from mha_book.heads.single_head import fused_attend, plain_attention
from mha_book.instruments.testing import SIZES
from mha_book.kernels.backends import attention
from mha_book.plugs.cache import ContextCache, KVCache
from mha_book.plugs.logits import OutputGate, SinkAttention
from mha_book.plugs.rope import RoPE
from mha_book.variants.collaborative_heads import CollaborativeHeads, collaborate
from support.refusals import refused

s = SIZES
float64 = dict(dtype=torch.float64)
SHAPES = {
    "plain": dict(value_dim=s.d),
    "values shared": dict(value_dim=s.dv, num_kv_heads=s.g),
    "no biases": dict(value_dim=s.d, bias=False, scale=0.3),
    "another context": dict(value_dim=s.dv, context_dim=11, out_dim=13),
    "fewer channels than heads": dict(value_dim=s.d, key_dim=4),
    "no multiple": dict(value_dim=s.d, key_dim=15, num_kv_heads=2),
}


def shared(key_dim=12, drawn=True, **options):
    layer = CollaborativeHeads(s.e, s.h, **(dict(key_dim=key_dim, value_dim=s.d) | float64 | options))
    for p in layer.parameters() if drawn else ():
        nn.init.normal_(p, std=0.5)
    return layer


def trained(**options):
    layer = MultiHeadAttention(s.e, s.h, **(dict(head_dim=s.d) | float64 | options))
    for p in layer.parameters():
        nn.init.normal_(p, std=0.3)
    return layer


def tokens(n=s.n, width=s.e):
    return torch.randn(s.b, n, width, **float64)


def inputs(layer, m=s.m):
    width = layer.v_proj.in_features
    return (tokens(),) if width == s.e else (tokens(), tokens(m, width))


def forward_by_hand(layer, x, context=None, sees=None, bias=None):
    "One head, one query and one key at a time, channel by channel."
    y = x if context is None else context
    h, g, dv = layer.num_heads, layer.num_kv_heads, layer.value_dim
    out = layer.out_proj.bias.expand(len(x), x.shape[1], -1).clone() if layer.out_proj.bias is not None else 0
    q, k, v = x @ layer.q_proj.weight.T, y @ layer.k_proj.weight.T, layer.v_proj(y)
    for i in range(h):
        logits = torch.zeros(len(x), x.shape[1], y.shape[1], **float64)
        for c in range(layer.key_dim):
            logits += layer.mixing[i, c] * q[:, :, None, c] * k[:, None, :, c]
        if layer.content_proj is not None:
            logits += (y @ layer.content_proj.weight[i])[:, None]
        logits = logits * layer.scale + (0 if bias is None else bias)
        weights = logits.exp() * (1 if sees is None else sees)
        weights = weights / weights.sum(-1, keepdim=True).clamp(min=1e-300)
        j = i // (h // g)
        head = weights @ v[..., j * dv : (j + 1) * dv]
        out = out + head @ layer.out_proj.weight[:, i * dv : (i + 1) * dv].T
    return out


@pytest.mark.parametrize("name", SHAPES)
def test_the_layer_is_the_loop_over_heads_and_channels(name):
    layer = shared(**SHAPES[name])
    given = inputs(layer)
    m = given[-1].shape[1]
    mask, bias = torch.rand(s.n, m) < 0.6, torch.randn(s.n, m, **float64)
    mask[2] = False
    real = torch.arange(m) < torch.tensor([m, m - 2])[:, None]
    causal = torch.ones(s.n, m, dtype=torch.bool).tril(m - s.n)
    for call, sees, added in (
        ({}, None, None),
        (dict(mask=mask), mask, None),
        (dict(key_mask=real), real[:, None], None),
        (dict(is_causal=True, bias=bias), causal, bias),
        (dict(is_causal=True, mask=mask, key_mask=real, bias=bias), causal & mask & real[:, None], bias),
    ):
        wanted = forward_by_hand(layer, *given, sees=sees, bias=added)
        for attend in fused_attend, plain_attention, partial(attention, impl="math"):
            layer.attend = attend
            torch.testing.assert_close(layer(*given, **call), wanted, atol=1e-12, rtol=1e-12)


def as_plain(layer):
    "The plain layer of the same matrices, where each head has as many channels."
    width = layer.key_dim // layer.num_heads
    plain = MultiHeadAttention(
        s.e, s.h, head_dim=width, value_dim=layer.value_dim, num_kv_heads=layer.num_kv_heads, bias=False, **float64
    )
    with torch.no_grad():
        parts = layer.q_proj.weight, layer.k_proj.weight, layer.v_proj.weight
        plain.in_proj.weight.copy_(torch.cat(parts))
        plain.out_proj.weight.copy_(layer.out_proj.weight)
    return plain


def test_it_starts_as_plain_heads_with_their_own_channels():
    for key_dim in (s.h, 18, 48):
        layer, x = shared(key_dim, drawn=False), tokens()
        torch.testing.assert_close(layer(x), as_plain(layer)(x), atol=1e-12, rtol=0)
        assert layer.scale == (s.h / key_dim) ** 0.5 and layer.mixing.sum(1).eq(key_dim // s.h).all()
    assert CollaborativeHeads(s.e + 4, s.h).key_dim == s.e + 4
    assert shared(20, drawn=False).mixing.sum(0).eq(1).all()  # a channel has one head, where there are as many
    assert set(shared(20, drawn=False).mixing.sum(1).tolist()) == {3, 4}
    assert shared(4, drawn=False).mixing.sum(1).eq(1).all()  # a head has one channel, where there are fewer


def test_it_starts_as_the_layer_starts():
    torch.manual_seed(0)
    layer = CollaborativeHeads(240, 6, 144, num_kv_heads=3, value_dim=24)
    bound = (6 / (240 + 2 * 144 + 72)) ** 0.5
    for proj in layer.q_proj, layer.k_proj, layer.v_proj:
        assert 0.98 * bound < proj.weight.abs().max() <= bound
    assert not any(p.any() for p in (layer.content_proj.weight, layer.v_proj.bias, layer.out_proj.bias))


# --- a trained layer ---

LAYOUTS = {
    "plain": {},
    "grouped": dict(num_kv_heads=s.g, value_dim=s.dv),
    "no biases": dict(bias=False),
    "context": dict(context_dim=11, num_kv_heads=2),
    "outputs": dict(out_dim=13, head_dim=7),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_at_the_width_of_all_heads_nothing_is_lost(name):
    layer = trained(**LAYOUTS[name])
    context = tokens(s.m, 11) if name == "context" else None
    given = (tokens(), context)
    full = s.h * layer.layout.head_dim
    real = torch.arange(s.m if context is not None else s.n) < torch.tensor([5, 3])[:, None]
    for call in ({}, dict(is_causal=True), dict(key_mask=real)):
        ours, theirs = collaborate(layer, full), layer
        torch.testing.assert_close(ours(*given, **call), theirs(*given, **call), atol=1e-12, rtol=0)
        torch.testing.assert_close(
            ours.attention_map(*given, **call), theirs.attention_map(*given, **call), atol=1e-12, rtol=0
        )
    for i in range(s.h):
        for part, proj in (("q", ours.q_proj), ("k", ours.k_proj)):
            own, rows = layer.rows(part, i if part == "q" else i // (s.h // layer.layout.num_kv_heads))
            mine = proj.weight[i * layer.layout.head_dim : (i + 1) * layer.layout.head_dim]
            assert torch.equal(mine, own.weight[rows])
    assert ours.content_proj is None if name == "no biases" else ours.content_proj.weight.any()


def test_plugs_dropout_mode_and_parts_that_stand_apart_come_along():
    gate = OutputGate(s.e, s.h, head_dim=s.d, **float64)
    layer = trained(dropout=0.3, finish=gate, attend=partial(attention, window=2)).eval()
    new, x = collaborate(separate_projections(layer), s.h * s.d), tokens()
    torch.testing.assert_close(new(x), layer(x), atol=1e-12, rtol=0)
    assert not new.training and new.dropout == 0.3 and new.finish is not gate and new.train()(x).ne(layer(x)).any()


def dense(layer):
    "All W_q[i]ᵀ W_k[i], as one array."
    at = {part: [layer.rows(part, i)[0].weight[layer.rows(part, i)[1]] for i in range(s.h)] for part in "qk"}
    return np.stack([(q.T @ k).detach().numpy() for q, k in zip(at["q"], at["k"])])


def as_dense(new):
    q, m, k = (t.detach().numpy() for t in (new.q_proj.weight, new.mixing, new.k_proj.weight))
    return np.stack([q.T @ np.diag(row) @ k for row in m])


def lost(layer, new):
    return float(((dense(layer) - as_dense(new)) ** 2).sum() / (dense(layer) ** 2).sum())


@pytest.mark.parametrize("key_dim", [3, 17, 30, 47])
def test_no_step_makes_it_worse_and_the_start_is_what_heads_keep_alone(key_dim):
    layer = trained()
    sizes = np.sort(np.linalg.svd(dense(layer), compute_uv=False)[:, : s.d].ravel())[::-1]
    alone = (sizes[key_dim:] ** 2).sum() / (sizes**2).sum()
    errors = [lost(layer, collaborate(layer, key_dim, steps=steps)) for steps in (0, 1, 2, 5, 20)]
    assert abs(errors[0] - alone) < 1e-12
    assert all(a > b for a, b in zip(errors, errors[1:]))
    mixing = collaborate(layer, key_dim, steps=0).mixing
    assert ((mixing == 0) | (mixing == 1)).all() and (mixing.sum(0) == 1).all()


@pytest.mark.parametrize("start", ["heads", "random"])
def test_heads_that_share_their_channels_are_found_out(start):
    "A plain layer whose heads weigh the same four channels needs four."
    layer = trained(head_dim=4, bias=False)
    q, k, mixing = torch.randn(4, s.e, **float64), torch.randn(4, s.e, **float64), torch.randn(s.h, 4, **float64)
    with torch.no_grad():
        for i in range(s.h):
            for part, rows in (("q", mixing[i][:, None] * q), ("k", k)):
                proj, at = layer.rows(part, i)
                proj.weight[at] = rows
    new = collaborate(layer, 4, steps=400, start=start)
    assert lost(layer, new) < 1e-8 < lost(layer, collaborate(layer, 3, start=start))
    x = tokens()
    torch.testing.assert_close(new(x), layer(x), atol=1e-3, rtol=0)


def test_random_starts_differ_by_seed_only():
    layer = trained()
    one, again, other = (collaborate(layer, 9, steps=2, start="random", seed=seed).mixing for seed in (1, 1, 2))
    assert torch.equal(one, again) and not torch.equal(one, other)


def logits_of(layer, x):
    "Of every pair of tokens, x one a row; per query, but for what is equal for all keys."
    if isinstance(layer, MultiHeadAttention):
        q, k, _ = layer.qkv(x[None])
        logits = q @ k.mT * layer.layout.head_dim**-0.5
    else:
        q, k, _ = layer.qkv(x[None])
        logits = q @ k.mT / q.shape[-1] ** 0.5
    return (logits - logits.mean(-1, keepdim=True))[0]


def lopsided(count=300):
    "Tokens that lie about a mean, and mostly in a few directions."
    spread = torch.linspace(2.0, 0.1, s.e, **float64)
    turned = torch.linalg.qr(torch.randn(s.e, s.e, **float64)).Q
    return (torch.randn(count, s.e, **float64) * spread) @ turned + torch.randn(s.e, **float64)


def test_with_tokens_the_error_is_that_of_their_logits():
    layer, seen = trained(), lopsided()

    def off(new):
        with torch.no_grad():
            return float((logits_of(new, seen) - logits_of(layer, seen)).square().sum())

    for key_dim in 6, 20:
        errors = [off(collaborate(layer, key_dim, tokens=seen, steps=steps)) for steps in (0, 1, 5, 20)]
        assert all(a > b for a, b in zip(errors, errors[1:]))
        assert errors[0] < off(collaborate(layer, key_dim, steps=20)) and errors[-1] < 0.9 * errors[0]
    # what it minimises: the channels that are dropped, of the matrices between tokens of one spread
    apart = (seen - seen.mean(0)).numpy()
    between = np.stack([apart @ m @ apart.T for m in dense(layer)])
    sizes = np.sort(np.linalg.svd(between, compute_uv=False)[:, : s.d].ravel())[::-1]
    promised = (sizes[20:] ** 2).sum() / s.d
    assert abs(off(collaborate(layer, 20, tokens=seen, steps=0)) / promised - 1) < 1e-9


def test_the_mean_tokens_logits_stay_exact():
    layer, seen = trained(), lopsided()
    new, mean = collaborate(layer, 6, tokens=seen, steps=3), seen.mean(0, keepdim=True)
    both = torch.cat([mean, torch.randn(s.n, s.e, **float64)])
    a, b = logits_of(layer, both)[:, 0], logits_of(new, both)[:, 0]
    torch.testing.assert_close(a - a.mean(-1, keepdim=True), b - b.mean(-1, keepdim=True), atol=1e-10, rtol=0)
    plain = collaborate(layer, 6, steps=3)
    assert not torch.allclose(a, logits_of(plain, both)[:, 0], atol=1e-2)
    unbiased = collaborate(trained(bias=False), 6, tokens=seen, steps=1)
    assert unbiased.content_proj is not None and not unbiased.out_proj.bias.any()


def test_tokens_of_a_context_are_its_own():
    layer = trained(context_dim=11)
    seen = dict(tokens=lopsided(), context_tokens=torch.randn(40, 11, **float64))
    assert collaborate(layer, 48, **seen)(tokens(), tokens(s.m, 11)).shape == (s.b, s.n, s.e)
    for missing in (dict(tokens=seen["tokens"]), dict(context_tokens=seen["context_tokens"])):
        with refused(ValueError, "context_tokens", "both or neither"):
            collaborate(layer, 9, **missing)
    with refused(ValueError, "context_tokens", "no other takes them"):
        collaborate(trained(), 9, tokens=lopsided(), context_tokens=lopsided())
    with refused(ValueError, "context_tokens has shape (300, 20)", "11"):
        collaborate(layer, 9, tokens=lopsided(), context_tokens=lopsided())


def test_few_tokens_and_tokens_all_alike_still_give_numbers():
    layer = trained()
    for seen in (torch.randn(2, s.e, **float64), torch.ones(5, s.e, **float64), torch.zeros(5, s.e, **float64)):
        new = collaborate(layer, 9, tokens=seen, steps=3)
        assert all(p.isfinite().all() for p in new.parameters())
    dead = trained()
    nn.init.zeros_(dead.in_proj.weight)
    assert all(p.isfinite().all() for p in collaborate(dead, 9, steps=3).parameters())


# --- cache, padding, plugs ---


@pytest.mark.parametrize("name", [name for name in SHAPES if name != "another context"])
def test_chunks_through_a_cache_are_the_whole(name):
    layer, x = shared(**SHAPES[name]), tokens(s.m)
    cache = layer.new_cache(s.b, s.m)
    parts = [layer(part, is_causal=True, cache=cache) for part in x.split([3, 1, 1, 2], 1)]
    torch.testing.assert_close(torch.cat(parts, 1), layer(x, is_causal=True), atol=1e-12, rtol=0)
    channels = layer.key_dim + (0 if layer.content_proj is None else s.h)
    assert cache.k.shape == (s.b, 1, s.m, channels) and cache.v.shape[-1] == layer.num_kv_heads * layer.value_dim
    assert cache.nbytes == 8 * s.b * s.m * (channels + layer.num_kv_heads * layer.value_dim)


def test_left_padded_rows_and_a_rolling_cache():
    layer, x = shared(), tokens(s.m)
    real = torch.arange(s.m) >= torch.tensor([0, 3])[:, None]
    cache, rows = layer.new_cache(s.b, s.m), []
    for part, known in zip(x.split([4, 3], 1), real.split([4, 3], 1)):
        rows.append(layer(part, is_causal=True, cache=cache, key_mask=known))
    whole = layer(x, is_causal=True, key_mask=real)
    torch.testing.assert_close(torch.cat(rows, 1)[real], whole[real], atol=1e-12, rtol=0)
    alone = layer(x[1:, 3:], is_causal=True)
    torch.testing.assert_close(whole[1:, 3:], alone, atol=1e-12, rtol=0)
    rolling = layer.new_cache(s.b, s.m, window=3)
    rows = [layer(part, is_causal=True, cache=rolling) for part in x.split(1, 1)]
    near = copy.copy(layer)
    near.attend = partial(attention, window=3)
    torch.testing.assert_close(torch.cat(rows, 1), near(x, is_causal=True), atol=1e-12, rtol=0)


def test_a_cache_goes_on_with_a_copy_and_with_no_other_layer():
    layer, x = shared(), tokens()
    cache = layer.new_cache(s.b, 2 * s.n)
    layer(x, is_causal=True, cache=cache)
    with refused(ValueError, "keys that another layer made"):
        shared()(x, is_causal=True, cache=cache)
    other = copy.deepcopy(layer)
    nn.init.normal_(other.content_proj.weight)
    with refused(ValueError, "keys that another layer made"):
        other(x, is_causal=True, cache=cache)
    copy.deepcopy(layer)(x, is_causal=True, cache=cache)
    assert cache.seen.tolist() == [2 * s.n] * s.b
    with refused(ValueError, "heads differs"):
        layer(x, is_causal=True, cache=KVCache(s.b, s.h, s.n, 12, **float64))


def test_a_context_is_projected_once():
    layer = shared(**SHAPES["another context"])
    x, context, cache = *inputs(layer), ContextCache()
    first = layer(x, context, cache=cache)
    torch.testing.assert_close(first, layer(x, context), atol=1e-12, rtol=0)
    torch.testing.assert_close(layer(x, cache=cache), first, atol=1e-12, rtol=0)


def test_values_of_another_input():
    layer, x, value = shared(), tokens(), tokens()
    with_value = layer(x, value=value)
    wanted = project(layer, layer.attention_map(x) @ heads_of(layer, value))
    torch.testing.assert_close(with_value, wanted, atol=1e-12, rtol=0)
    with refused(ValueError, "value has shape"):
        layer(x, value=value[:, 1:])


def heads_of(layer, value):
    return layer.v_proj(value).unflatten(-1, (s.h, -1)).transpose(1, 2)


def project(layer, heads):
    return layer.out_proj(heads.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("attend", [fused_attend, plain_attention], ids=["fused", "plain"])
def test_gradients(attend):
    layer = shared(7, value_dim=3, num_kv_heads=s.g)
    layer.attend = attend
    x = tokens().requires_grad_()
    names = [name for name, _ in layer.named_parameters()]
    real = torch.arange(s.n) < torch.tensor([s.n, 3])[:, None]

    def call(x, *parameters):
        return torch.func.functional_call(
            layer, dict(zip(names, parameters)), (x,), dict(is_causal=True, key_mask=real)
        )

    assert torch.autograd.gradcheck(call, (x, *layer.parameters()), fast_mode=True)


def test_a_plug_gets_the_scale_in_the_queries():
    layer, x = shared(scale=0.7), tokens()
    sinks = SinkAttention(s.h, **float64)
    nn.init.normal_(sinks.sinks)
    layer.attend = sinks
    q, k, v = layer.qkv(x)
    q0 = (layer.q_proj(x)[:, None] * layer.mixing[:, None]) @ layer.k_proj(x)[:, None].mT
    logits = 0.7 * (q0 + layer.content_proj(x).mT[:, :, None])
    odds = torch.cat([logits, sinks.sinks[:, None, None].expand(s.b, s.h, s.n, 1)], -1).softmax(-1)[..., :-1]
    torch.testing.assert_close(layer(x), project(layer, odds @ v), atol=1e-12, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_and_autocast(dtype):
    wanted = (layer := shared())(x := tokens())
    eps = torch.finfo(dtype).eps
    half = copy.deepcopy(layer).to(dtype)(x.to(dtype))
    assert half.dtype == dtype and (half - wanted).abs().max() < 60 * eps * wanted.abs().max()
    single = copy.deepcopy(layer).float()
    with torch.autocast("cpu", dtype=dtype):
        cast = single(x.float())
        cache = single.new_cache(s.b, s.n)
        with refused(TypeError, "dtype differs"):
            single(x.float(), cache=cache)
    assert cast.dtype == dtype and (cast - wanted).abs().max() < 60 * eps * wanted.abs().max()


def test_meta_compile_state_and_copies(own_messages):
    with torch.device("meta"):
        empty = CollaborativeHeads(s.e, s.h, 12, value_dim=s.d)
        assert empty(torch.empty(s.b, s.n, s.e)).shape == (s.b, s.n, s.e)
    layer, x = shared(), tokens()
    other = shared()
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x)) and torch.equal(copy.deepcopy(layer)(x), layer(x))
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, is_causal=True), layer(x, is_causal=True), atol=1e-12, rtol=0)
    assert "key_dim=12" in repr(layer)


# --- what it costs ---


def test_parameters_and_flops_are_counted():
    for key_dim in 12, 30:
        layer = shared(key_dim, attend=plain_attention)
        wide, rest = key_dim + s.h, s.e * s.h * s.d
        count = sum(p.numel() for p in layer.parameters())
        assert count == 2 * s.e * key_dim + s.h * key_dim + s.h * s.e + 2 * rest + s.h * s.d + s.e
        with FlopCounterMode(display=False) as counter:
            layer(torch.randn(1, s.m, s.e, **float64))
        logits = 2 * s.m * s.m * s.h * (wide + s.d)
        assert counter.get_total_flops() == 2 * s.m * (2 * s.e * key_dim + s.e * s.h + 2 * rest) + logits


# --- bad input ---


def test_sizes_that_do_not_fit_are_refused(own_messages):
    for error, words, options in (
        (ValueError, ("key_dim", "at least 1"), dict(key_dim=0)),
        (TypeError, ("key_dim", "2.0"), dict(key_dim=2.0)),
        (TypeError, ("value_dim", "True"), dict(value_dim=True)),
        (ValueError, ("num_heads 6", "num_kv_heads 4"), dict(num_kv_heads=4)),
        (ValueError, ("scale", "nan"), dict(scale=float("nan"))),
        (TypeError, ("attend", "callable"), dict(attend=3)),
        (TypeError, ("bias", "True or False"), dict(bias=1)),
        (ValueError, ("dropout", "1.5"), dict(dropout=1.5)),
        (ValueError, ("device", "'nowhere'"), dict(device="nowhere")),
    ):
        with refused(error, *words):
            shared(drawn=False, **options)
    with refused(ValueError, "20 is not divisible by num_heads 6"):
        CollaborativeHeads(s.e, s.h)


def test_tokens_that_do_not_fit_are_refused(own_messages):
    layer, far = shared(), shared(**SHAPES["another context"])
    for error, words, call in (
        (ValueError, ("x has shape", "20"), lambda: layer(tokens(width=19))),
        (ValueError, ("context of width 11", "context="), lambda: far(tokens())),
        (ValueError, ("batch differs", "context"), lambda: layer(tokens(), tokens()[:1])),
        (TypeError, ("dtype differs", "float32"), lambda: layer(tokens().float())),
        (TypeError, ("key_mask",), lambda: layer(tokens(), key_padding_mask=torch.ones(s.b, s.n))),
        (ValueError, ("mask of shape",), lambda: layer(tokens(), mask=torch.ones(3, 4, dtype=torch.bool))),
    ):
        with refused(error, *words):
            call()


class Other(MultiHeadAttention):
    def qkv(self, *args, **kwargs):
        return super().qkv(*args, **kwargs)


def test_what_cannot_be_shared_is_refused_and_left_alone(own_messages):
    layer = trained()
    before = copy.deepcopy(layer.state_dict())
    hooked = trained()
    hooked.in_proj.register_forward_hook(lambda *args: None)
    for error, words, one, options in (
        (TypeError, ("MultiHeadAttention", "Linear"), nn.Linear(3, 3), {}),
        (ValueError, ("position", "W_q[i]ᵀ W_k[i]"), trained(position=RoPE(s.d)), {}),
        (ValueError, ("qk_norm",), trained(qk_norm=nn.RMSNorm), {}),
        (ValueError, ("SinkAttention", "fused_attend"), trained(attend=SinkAttention(s.h, **float64)), {}),
        (ValueError, ("attend",), trained(attend=partial(attention, softcap=3.0)), {}),
        (ValueError, ("attend",), trained(attend=partial(attention, scale=3.0)), {}),
        (TypeError, ("qkv of its own",), Other(s.e, s.h, head_dim=s.d), {}),
        (TypeError, ("in_proj", "hooks"), hooked, {}),
        (ValueError, ("meta",), MultiHeadAttention(s.e, s.h, head_dim=4, device="meta"), {}),
        (ValueError, ("key_dim 49", "48"), layer, dict(key_dim=49)),
        (TypeError, ("key_dim",), layer, dict(key_dim=8.0)),
        (ValueError, ("steps", "-1"), layer, dict(steps=-1)),
        (TypeError, ("seed", "'a'"), layer, dict(seed="a")),
        (ValueError, ("start", "'best'"), layer, dict(start="best")),
        (ValueError, ("tokens has shape (2, 5, 20)", "x[key_mask]"), layer, dict(tokens=tokens())),
        (ValueError, ("tokens has shape (1, 20)",), layer, dict(tokens=torch.ones(1, s.e))),
        (TypeError, ("tokens", "int64"), layer, dict(tokens=torch.ones(4, s.e, dtype=torch.long))),
    ):
        with refused(error, *words):
            collaborate(one, **(dict(key_dim=9) | options))
    assert all(torch.equal(a, b) for a, b in zip(before.values(), layer.state_dict().values()))
