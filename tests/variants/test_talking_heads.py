"""Talking heads against a loop, through a kernel, in the layer; what they refuse."""

import copy
import itertools
import math
import pickle
import subprocess
import sys
from functools import partial

import pytest
import torch
from torch import nn

from mha_book.heads.layer import MultiHeadAttention
from mha_book.heads.single_head import fused_attend, plain_attention
from mha_book.instruments.testing import SIZES, assert_as_exact
from mha_book.kernels.backends import attention, attention_logits, attention_weights
from mha_book.plugs.cache import KVCache
from mha_book.plugs.logits import HeadTemperature, SinkAttention
from mha_book.plugs.rope import RoPE
from mha_book.variants.talking_heads import TalkingHeads, mix_heads, talk_through_kernel
from support.refusals import refused

s = SIZES
float64 = dict(dtype=torch.float64)
close = partial(torch.testing.assert_close, atol=1e-12, rtol=1e-12)
GROUPS = [s.h, s.g, 1]
WHICH = {"both": (True, True), "logits": (True, False), "weights": (False, True)}
mixed = pytest.mark.parametrize("which", WHICH.values(), ids=WHICH)
grouped = pytest.mark.parametrize("g", GROUPS)
OPTIONS = {
    "nothing": dict(),
    "causal": dict(is_causal=True),
    "mask": dict(mask=torch.rand(s.b, 1, s.n, s.m) < 0.6),
    "a mask for each head": dict(mask=torch.rand(s.h, s.n, s.m) < 0.6, is_causal=True),
    "bias": dict(bias=torch.randn(s.h, s.n, s.m, **float64)),
    "all": dict(mask=torch.rand(s.n, s.m) < 0.6, bias=torch.randn(s.b, 1, 1, s.m, **float64), is_causal=True),
}
BOUND = {
    "nothing": {},
    "window": dict(window=3),
    "softcap": dict(softcap=0.7),
    "both": dict(window=(2, 1), softcap=2.0),
}
optional = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def heads(g=s.g, n=s.n, m=s.m, dv=s.dv):
    return torch.randn(s.b, s.h, n, s.d, **float64), *(torch.randn(s.b, g, m, w, **float64) for w in (s.d, dv))


def mixings(which=(True, True)):
    return [torch.randn(s.h, s.h, **float64) if mixes else None for mixes in which]


def plug(which=(True, True), **options):
    "Talking heads that do talk."
    made = TalkingHeads(s.h, logits=which[0], weights=which[1], **(float64 | options))
    for mixing in made.parameters(recurse=False):
        nn.init.normal_(mixing)
    return made


def layer_of(attend, g=s.g, **options):
    return MultiHeadAttention(s.e, s.h, num_kv_heads=g, head_dim=s.d, attend=attend, **float64, **options)


def tokens(n=s.n):
    return torch.randn(s.b, n, s.e, **float64)


def visible(t, u, lengths, mask, is_causal, window):
    place, sides = lengths[1] - lengths[0] + t, (window - 1, 0) if isinstance(window, int) else window or (None, None)
    seen = bool(mask[t, u]) and not (is_causal and u > place)
    seen = seen and (sides[0] is None or place - u <= sides[0])
    return seen and (sides[1] is None or u - place <= sides[1])


def loop(q, k, v, P, W, *, mask=None, bias=None, is_causal=False, window=None, softcap=None, scale=None):
    "Talking heads, one number after the other."
    q, k, P, W = (t if t is None else t.detach() for t in (q, k, P, W))
    (b, h, n, d), (g, m) = q.shape, k.shape[1:3]
    mask = (torch.tensor(True) if mask is None else mask).expand(b, h, n, m)
    bias = (torch.zeros(()) if bias is None else bias).expand(b, h, n, m)
    P, W = (torch.eye(h, **float64) if mixing is None else mixing for mixing in (P, W))
    scale = d**-0.5 if scale is None else scale
    out = torch.zeros(b, h, n, v.shape[3], **float64)
    for a, t in itertools.product(range(b), range(n)):
        logit = [[q[a, j, t] @ k[a, j // (h // g), u] * scale for u in range(m)] for j in range(h)]
        weight = []
        for i in range(h):
            own = {}
            for u in range(m):
                value = sum(P[i, j] * logit[j][u] for j in range(h))
                value = value if softcap is None else softcap * torch.tanh(value / softcap)
                if visible(t, u, (n, m), mask[a, i], is_causal, window):
                    own[u] = math.exp(value + bias[a, i, t, u])
            total = sum(own.values())
            weight.append([own.get(u, 0.0) / (total or 1.0) for u in range(m)])
        for i, u in itertools.product(range(h), range(m)):
            out[a, i, t] += sum(W[i, j] * weight[j][u] for j in range(h)) * v[a, i // (h // g), u]
    return out


def filled(plug, P, W):
    with torch.no_grad():
        for mixing, value in ((plug.logit_mixing, P), (plug.weight_mixing, W)):
            if value is not None:
                mixing.copy_(value)
    return plug


# --- the definition --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bound", BOUND.values(), ids=BOUND)
@optional
def test_talking_heads_are_the_loops(options, bound):
    (q, k, v), (P, W) = heads(), mixings()
    close(filled(plug(**bound), P, W)(q, k, v, **options), loop(q, k, v, P, W, **options, **bound))


@grouped
@mixed
def test_one_mixture_alone_and_shared_keys_are_the_loops(which, g):
    (q, k, v), (P, W) = heads(g), mixings(which)
    wanted = loop(q, k, v, P, W, is_causal=True, scale=-0.3)
    close(filled(plug(which, scale=-0.3), P, W)(q, k, v, is_causal=True), wanted)
    close(talk_through_kernel(q, k, v, P, W, is_causal=True, scale=-0.3), wanted)


def test_a_mixture_that_is_turned_round_is_another():
    (q, k, v), (P, W) = heads(), mixings()
    for wrong in (P.mT, W), (P, W.mT), (W, P):
        assert not torch.allclose(loop(q, k, v, *wrong), filled(plug(), P, W)(q, k, v), atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@grouped
@mixed
def test_at_the_start_they_are_plain_attention_bit_for_bit(which, g, dtype):
    q, k, v = (t.to(dtype) for t in heads(g))
    made = TalkingHeads(s.h, logits=which[0], weights=which[1], dtype=dtype)
    for options in OPTIONS.values():
        options = {name: t.to(dtype) if name == "bias" else t for name, t in options.items()}
        assert torch.equal(made(q, k, v, **options), attention(q, k, v, **options, impl="math"))


@pytest.mark.parametrize("options", [dict(), dict(window=3, softcap=2.0, scale=0.7)])
def test_bound_options_at_the_start_are_those_of_attention(options):
    q, k, v = heads()
    assert torch.equal(TalkingHeads(s.h, **options)(q, k, v), attention(q, k, v, **options, impl="math"))


# --- through a kernel ------------------------------------------------------------------------------------------------


def gradients(call, *inputs):
    inputs = [None if t is None else t.detach().requires_grad_() for t in inputs]
    out = call(*inputs)
    wanted = [t for t in inputs if t is not None]
    return out, *torch.autograd.grad((out * torch.linspace(0, 1, out.numel()).view_as(out)).sum(), wanted)


def defined(bound, which, scale):
    made = plug(which, scale=scale, **bound)

    def call(q, k, v, P, W, **options):
        given = {name: t for name, t in (("logit_mixing", P), ("weight_mixing", W)) if t is not None}
        return torch.func.functional_call(made, given, (q, k, v), options)

    return call


@pytest.mark.parametrize("bound", BOUND.values(), ids=BOUND)
@grouped
@mixed
@optional
def test_a_kernel_gives_the_same_and_the_same_gradients(options, which, g, bound):
    inputs = *heads(g), *mixings(which)
    for scale in None, 0.4:
        kernel = partial(talk_through_kernel, attend=partial(attention, **bound), scale=scale)
        got = gradients(partial(kernel, **options), *inputs)
        wanted = gradients(partial(defined(bound, which, scale), **options), *inputs)
        for ours, theirs in zip(got, wanted, strict=True):
            close(ours, theirs)


@pytest.mark.parametrize("attend", [fused_attend, plain_attention, HeadTemperature(s.h, **float64)])
def test_any_plug_is_a_kernel(attend):
    (q, k, v), (P, W) = heads(), mixings()
    wanted = filled(plug(), P, W)(q, k, v, is_causal=True)
    close(talk_through_kernel(q, k, v, P, W, attend=attend, is_causal=True), wanted)
    close(filled(plug(attend=attend), P, W)(q, k, v, is_causal=True), wanted)


def test_sinks_stand_beside_mixed_logits():
    (q, k, v), (P, W) = heads(), mixings()
    sinks = SinkAttention(s.h, **float64)
    nn.init.normal_(sinks.sinks)
    logits = torch.einsum("ij,bjnm->binm", P, attention_logits(q, k))
    weights = torch.cat([logits, sinks.sinks[:, None, None].expand(*logits.shape[:3], 1)], -1).softmax(-1)[..., :-1]
    wanted = torch.einsum("ij,bjnm->binm", W, weights) @ v.repeat_interleave(s.h // s.g, 1)
    close(talk_through_kernel(q, k, v, P, W, attend=sinks), wanted)


def test_dropout_comes_between_softmax_and_mixture_in_both():
    (q, k, v), (P, W) = heads(), mixings()
    made = filled(plug(), P, W)
    torch.manual_seed(3)
    got = made(q, k, v, dropout_p=0.5)
    torch.manual_seed(3)
    weights = nn.functional.dropout(attention_weights(0 * q, k, bias=mix_heads(attention_logits(q, k), P)), 0.5)
    close(got, mix_heads(weights, W) @ v.repeat_interleave(s.h // s.g, 1))
    torch.manual_seed(3)
    kernel = partial(attention, impl="math")
    close(talk_through_kernel(q, k, v, P, W, attend=kernel, dropout_p=0.5), got)
    assert not torch.allclose(got, made(q, k, v))


def test_gradients_are_those_of_differences():
    q, k, v = (t[:1, :, :2, :2].requires_grad_() for t in heads(n=2, m=3))
    P, W = (mixing.requires_grad_() for mixing in mixings())
    made = defined({}, (True, True), None)
    for call in made, partial(talk_through_kernel, attend=plain_attention):
        assert torch.autograd.gradcheck(partial(call, is_causal=True), (q, k, v, P, W))


# --- what is hidden --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attend", [None, attention])
def test_who_sees_nothing_gives_nothing(attend):
    q, k, v = (t.requires_grad_() for t in heads())
    made, mask = plug(attend=attend), torch.ones(s.n, s.m, dtype=torch.bool)
    mask[2] = False
    out = made(q, k, v, mask=mask)
    assert (out[:, :, 2] == 0).all() and (out[:, :, 3] != 0).all()
    out[:, :, 2].sum().backward()
    assert all((t.grad == 0).all() for t in (q, k, v, *made.parameters()))


@pytest.mark.parametrize("attend", [None, attention])
def test_what_a_hidden_key_holds_does_not_matter(attend):
    q, k, v = heads()
    made, mask = plug(attend=attend), torch.ones(s.m, dtype=torch.bool)
    mask[1] = False
    wanted = made(q, k, v, mask=mask)
    k[:, :, 1], v[:, :, 1] = 1e30, -1e30
    close(made(q, k, v, mask=mask), wanted)


def test_the_future_is_hidden_and_the_past_is_not():
    layer, x = layer_of(plug()), tokens()
    y, changed = layer(x, is_causal=True), x.clone()
    changed[:, 3] += 1
    moved = (layer(changed, is_causal=True) - y).abs().amax((0, 2))
    assert (moved[:3] < 1e-12).all() and (moved[3:] > 1e-3).all()


# --- in the layer ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attend", [None, attention])
@grouped
def test_chunks_through_a_cache_are_the_whole(g, attend):
    layer, x = layer_of(plug(attend=attend), g, position=RoPE(s.d)), tokens(9)
    whole, cache = layer(x, is_causal=True), KVCache(s.b, g, 9, s.d, **float64)
    parts = [layer(part, is_causal=True, cache=cache) for part in x.split([4, 1, 3, 1], 1)]
    close(torch.cat(parts, 1), whole)


def test_padding_before_or_behind_changes_nothing():
    layer, x = layer_of(plug()), tokens(4)
    whole = layer(x, is_causal=True)
    for left in 0, 2:
        padded = torch.randn(s.b, 6, s.e, **float64)
        padded[:, left : left + 4] = x
        real = torch.zeros(s.b, 6, dtype=torch.bool)
        real[:, left : left + 4] = True
        close(layer(padded, is_causal=True, key_mask=real)[:, left : left + 4], whole)


def test_left_padded_rows_go_on_from_a_cache():
    layer, x = layer_of(plug(), position=RoPE(s.d)), tokens(6)
    real = torch.ones(s.b, 6, dtype=torch.bool)
    real[1, :2] = False
    cache = KVCache(s.b, s.g, 8, s.d, **float64)
    first = layer(x, is_causal=True, key_mask=real, cache=cache)
    then = layer(last := tokens(1), is_causal=True, cache=cache)
    alone = layer(torch.cat([x, last], 1)[1:, 2:], is_causal=True)
    close(torch.cat([first, then], 1)[1:, 2:], alone)


def test_a_rolling_cache_knows_the_window():
    cache = KVCache(s.b, s.g, 20, s.d, window=4, **float64)
    with refused(ValueError, "windows differ"):
        layer_of(plug(window=5))(tokens(), is_causal=True, cache=cache)
    layer, x = layer_of(plug(window=4)), tokens(9)
    parts = [layer(part, is_causal=True, cache=cache) for part in x.split(1, 1)]
    close(torch.cat(parts, 1), layer(x, is_causal=True))


@pytest.mark.parametrize("attend", [None, attention])
def test_a_context_and_values_of_another_width(attend):
    layer = layer_of(plug(attend=attend), value_dim=s.dv, context_dim=11)
    x, context = tokens(), torch.randn(s.b, s.m, 11, **float64)
    made, (q, k, v) = layer.attend, layer.qkv(x, context)
    wanted = loop(q, k, v, made.logit_mixing, made.weight_mixing)
    close(layer(x, context), layer.out_proj(wanted.transpose(1, 2).flatten(2)))


@pytest.mark.parametrize("attend", [None, attention])
@mixed
def test_the_attention_map_is_the_mixture_of_weights(which, attend):
    layer, x = layer_of(plug(which, attend=attend)), tokens()
    (q, k, _), made = layer.qkv(x), layer.attend
    logits = attention_logits(q, k)
    logits = logits if made.logit_mixing is None else mix_heads(logits, made.logit_mixing)
    weights = attention_weights(0 * q, k, bias=logits, is_causal=True)
    weights = weights if made.weight_mixing is None else mix_heads(weights, made.weight_mixing)
    close(layer.attention_map(x, is_causal=True), weights)


def test_weights_of_talking_heads_may_be_negative():
    weights = layer_of(plug()).attention_map(tokens(), is_causal=True)
    assert (weights < -0.1).any() and not torch.allclose(weights.sum(-1), torch.ones((), **float64))


def test_states_copies_and_files_keep_the_mixtures():
    layer, other, x = layer_of(plug()), layer_of(plug()), tokens()
    other.load_state_dict(layer.state_dict())
    assert {"attend.logit_mixing", "attend.weight_mixing"} <= layer.state_dict().keys()
    for same in other, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)):
        assert torch.equal(same(x), layer(x))
    assert [*TalkingHeads(s.h, logits=False).state_dict()] == ["weight_mixing"]


def test_on_meta_there_are_shapes():
    made = TalkingHeads(s.h, device="meta", dtype=torch.float16)
    assert {(p.device.type, p.dtype) for p in made.parameters()} == {("meta", torch.float16)}
    q, k, v = (t.to("meta", torch.float16) for t in heads())
    for call in made, partial(talk_through_kernel, logit_mixing=made.logit_mixing, weight_mixing=made.weight_mixing):
        out = call(q, k, v, is_causal=True)
        assert (out.shape, out.device.type, out.dtype) == ((s.b, s.h, s.n, s.dv), "meta", torch.float16)


RECORDED = """
import torch
from mha_book import MultiHeadAttention, TalkingHeads, attention

for attend in None, attention:
    layer = MultiHeadAttention(24, 6, num_kv_heads=3, attend=TalkingHeads(6, attend=attend)).double()
    layer.requires_grad_(False)
    torch.nn.init.normal_(layer.attend.logit_mixing)
    inputs, causal = [torch.randn(2, n, 24).double() for n in (5, 9)], lambda x: layer(x, is_causal=True)
    compiled = torch.compile(layer, fullgraph=True, backend="eager", dynamic=True)
    traced = torch.jit.trace(causal, inputs[0], check_trace=False)
    for x in inputs:
        torch.testing.assert_close(compiled(x, is_causal=True), causal(x), atol=1e-12, rtol=0)
        torch.testing.assert_close(traced(x), causal(x), atol=1e-12, rtol=0)
"""


def test_compiled_whole_and_traced_they_serve_other_lengths():
    "In a process of its own: here every function checks the shapes that it is given, and that is not compiled."
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", RECORDED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# --- few digits ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attend", [None, attention])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_few_digits_lose_no_more_than_the_plain_formula(dtype, attend):
    (q, k, v), (P, W) = heads(m=40, n=30), (torch.eye(s.h, **float64) + 0.2 * mixing for mixing in mixings())
    exact = filled(plug(), P, W)(q, k, v)
    q, k, v, P, W = (t.to(dtype) for t in (q, k, v, P, W))
    repeated = [t.repeat_interleave(s.h // s.g, 1) for t in (k, v)]
    logits = torch.einsum("ij,bjnm->binm", P, q * s.d**-0.5 @ repeated[0].mT)
    plain = torch.einsum("ij,bjnm->binm", W, logits.softmax(-1)) @ repeated[1]
    for kept in dtype, torch.float32:  # a plug left in float32 serves a model in bfloat16
        got = filled(plug(attend=attend, dtype=kept), P, W)(q, k, v)
        assert got.dtype == dtype
        assert_as_exact(got, exact, plain)


@pytest.mark.parametrize("attend", [None, attention])
def test_autocast_narrows_products_and_not_mixtures(attend):
    layer = MultiHeadAttention(s.e, s.h, head_dim=s.d, attend=TalkingHeads(s.h, attend=attend))
    plain = MultiHeadAttention(s.e, s.h, head_dim=s.d, attend=plain_attention)
    plain.load_state_dict({name: t for name, t in layer.state_dict().items() if "mixing" not in name})
    x = torch.randn(s.b, s.n, s.e)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, wanted = layer(x, is_causal=True), plain(x, is_causal=True)
        each = torch.full((1, 1, 1, 1), 1.0009765625)
        assert torch.equal(mix_heads(each, torch.ones(1, 1)), each)
    assert got.dtype == wanted.dtype == torch.bfloat16
    exact = plain.double()(x.double(), is_causal=True)
    assert_as_exact(got, exact, wanted)


def test_logits_of_halves_are_mixed_in_float32():
    q, k = (torch.full((1, 2, n, 1), 200.0, dtype=torch.float16) for n in (1, 2))
    v = torch.ones(1, 2, 2, 1, dtype=torch.float16)
    made = filled(TalkingHeads(2), torch.tensor([[2.0, 0.0], [0.0, 2.0]]), None)
    assert torch.equal(made(q, k, v), torch.ones(1, 2, 1, 1, dtype=torch.float16))


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("own_messages")
@pytest.mark.parametrize("options, error, words", [
    (dict(num_heads=4.0), TypeError, ("num_heads", "4.0")),
    (dict(num_heads=0), ValueError, ("num_heads", "at least 1")),
    (dict(logits=1), TypeError, ("logits", "True or False")),
    (dict(weights=None), TypeError, ("weights", "True or False")),
    (dict(logits=False, weights=False), ValueError, ("mix nothing", "attend=attention")),
    (dict(scale="a"), TypeError, ("scale", "'a'")),
    (dict(softcap=0.0), ValueError, ("softcap", "positive")),
    (dict(window=0), ValueError, ("window 0",)),
    (dict(window=2.5), TypeError, ("window 2.5",)),
    (dict(attend=3), TypeError, ("attend", "callable")),
    (dict(attend=attention, window=3), ValueError, ("window=3", "partial(attention")),
    (dict(attend=attention, softcap=3.0), ValueError, ("softcap=3.0", "partial(attention")),
    (dict(attend=partial(attention, scale=0.3)), ValueError, ("scale=0.3", "beside attend=")),
])  # fmt: skip
def test_options_that_do_not_fit_are_refused(options, error, words):
    with refused(error, *words):
        TalkingHeads(**(dict(num_heads=s.h) | options))


@pytest.mark.usefixtures("own_messages")
def test_inputs_that_do_not_fit_are_refused():
    (q, k, v), (P, W) = heads(), mixings()
    for made in TalkingHeads(5, **float64), TalkingHeads(5, attend=attention, **float64):
        with refused(ValueError, "logit_mixing", "(5, 5)", "6 query heads", "num_heads=6"):
            made(q, k, v)
    with refused(ValueError, "weight_mixing", "(6, 5)"):
        talk_through_kernel(q, k, v, P, W[:, :5])
    with refused(TypeError, "logit_mixing", "torch.int64"):
        talk_through_kernel(q, k, v, P.long(), W)
    with refused(ValueError, "device differs", "weight_mixing meta"):
        talk_through_kernel(q, k, v, P, W.to("meta"))
    with refused(ValueError, "scale=0.3", "beside attend="):
        talk_through_kernel(q, k, v, P, W, attend=partial(attention, scale=0.3))
    for call in plug(), partial(talk_through_kernel, logit_mixing=P, weight_mixing=W):
        with refused(ValueError, "width differs"):
            call(q, v, v)
        with refused(ValueError, "mask of shape (3, 3)"):
            call(q, k, v, mask=torch.ones(3, 3, dtype=torch.bool))
        with refused(TypeError, "bias", "float"):
            call(q, k, v, bias=torch.ones(s.n, s.m, dtype=torch.int64))
        with refused(ValueError, "dropout"):
            call(q, k, v, dropout_p=1.5)


@pytest.mark.usefixtures("own_messages")
def test_mixtures_of_what_is_not_there_are_refused():
    each = torch.randn(s.b, s.h, s.n, s.m)
    assert mix_heads(each, torch.ones(2, s.h)).shape == (s.b, 2, s.n, s.m)
    with refused(ValueError, "mixing of shape (6, 2)", "(2, 6, 5, 7)"):
        mix_heads(each, torch.ones(s.h, 2))
    with refused(ValueError, "each of shape (6, 5, 7)"):
        mix_heads(each[0], torch.ones(s.h, s.h))
    with refused(TypeError, "mixing", "torch.bool"):
        mix_heads(each, torch.ones(s.h, s.h).bool())
