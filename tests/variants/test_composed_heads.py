"""Mixes made by tokens against loops over pairs of tokens, and convolved logits against loops over a kernel."""

import copy
import math
import subprocess
import sys

import pytest
import torch
from torch import nn

from mha_book.heads.layer import MultiHeadAttention
from mha_book.heads.single_head import causal_mask, plain_attention
from mha_book.instruments.testing import SIZES
from mha_book.instruments.tolerance import tolerance
from mha_book.kernels.backends import attention
from mha_book.plugs.cache import ContextCache, KVCache
from mha_book.plugs.rope import RoPE
from mha_book.variants.composed_heads import ComposedHeads, MultiTokenAttention
from support.mutants_composed import LAYERS, PLUGS
from support.refusals import refused

s = SIZES
float64 = dict(dtype=torch.float64)
LAYOUTS = {
    "plain": dict(head_dim=s.d),
    "grouped": dict(num_kv_heads=s.g, head_dim=s.d),
    "other values": dict(num_kv_heads=s.g, head_dim=s.d, value_dim=s.dv),
    "rope": dict(num_kv_heads=s.g, head_dim=s.d, position=RoPE(s.d)),
    "norms": dict(num_kv_heads=1, head_dim=s.d, qk_norm=nn.RMSNorm, bias=False),
    "context": dict(num_kv_heads=s.g, head_dim=s.d, context_dim=11, out_dim=13),
}


def build(kind=ComposedHeads, std=0.5, **options):
    options = dict(num_kv_heads=s.g, head_dim=s.d) | float64 | options
    layer = kind(s.e, s.h, **options)
    if std:
        for p in layer.parameters():
            nn.init.normal_(p, std=std)
    return layer


def tokens(b=s.b, n=s.m, e=s.e):
    return torch.randn(b, n, e, **float64)


def bits(*shape):
    return torch.rand(*shape) < 0.6


# --- composed heads: the definition, pair by pair ---


def said_by_hand(part, token, rank):
    "What one token says: for logits, then for weights, the matrix that it adds to the fixed one."
    hidden = torch.nn.functional.gelu(part.hidden.weight @ token).chunk(2)
    gates = torch.tanh(part.gates @ token).chunk(2)
    found = []
    for k in range(2):
        rows = (hidden[k] @ part.factors[k]).view(2 * rank, s.h)
        read, write = rows[:rank], rows[rank:]
        read = read / (read.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        found.append(write.T @ read + torch.diag(gates[k]))
    return found


def compose_by_hand(layer, x, context=None, mask=None, bias=None, scale=None):
    "One pair of tokens at a time, with its own h × h matrix."
    q, k, v = layer.qkv(x, context)
    keys, rank, group = x if context is None else context, layer.attend.rank, s.h // layer.layout.num_kv_heads
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scale = s.d**-0.5 if scale is None else scale
    logits = q @ k.mT * scale
    mixes = torch.zeros(2, *logits.shape[:1], *logits.shape[2:], s.h, s.h, **float64)
    for row in range(len(x)):
        for t in range(x.shape[1]):
            for at in range(keys.shape[1]):
                own = said_by_hand(layer.of_queries, x[row, t], rank)
                if layer.of_keys is not None:
                    own = [a + b for a, b in zip(own, said_by_hand(layer.of_keys, keys[row, at], rank))]
                for stage, fixed in enumerate((layer.attend.logit_mixing, layer.attend.weight_mixing)):
                    mixes[stage, row, t, at] = fixed + own[stage]
    logits = torch.einsum("bnmij,bjnm->binm", mixes[0], logits)
    logits = logits if bias is None else logits + bias
    weights = torch.zeros_like(logits)
    seen = torch.ones_like(logits, dtype=torch.bool) if mask is None else mask.expand_as(logits)
    for place in seen.any(-1).nonzero().tolist():
        row, i, t = place
        weights[row, i, t, seen[row, i, t]] = logits[row, i, t, seen[row, i, t]].softmax(0)
    weights = torch.einsum("bnmij,bjnm->binm", mixes[1], weights)
    heads = (weights @ v).transpose(1, 2).flatten(2)
    return heads @ layer.out_proj.weight.T + (0 if layer.out_proj.bias is None else layer.out_proj.bias), weights


def close(a, b, atol=1e-10):
    torch.testing.assert_close(a, b, atol=atol, rtol=1e-10)


@pytest.mark.parametrize("from_keys", [True, False])
@pytest.mark.parametrize("name", LAYOUTS)
@torch.no_grad()
def test_the_layer_is_its_definition(name, from_keys):
    torch.manual_seed(0)
    layer = build(std=0.3, rank=3, hidden_dim=4, from_keys=from_keys, **LAYOUTS[name])
    context = tokens(n=4, e=11) if name == "context" else None
    x, m = tokens(n=3), 3 if context is None else 4
    y, weights = compose_by_hand(layer, x, context)
    close(layer(x, context), y)
    close(layer.attention_map(x, context), weights)
    mask, bias = bits(s.h, 3, m), torch.randn(s.h, 3, m, **float64)
    mask[2, 1] = False
    close(layer(x, context, mask=mask, bias=bias), compose_by_hand(layer, x, context, mask, bias)[0])


@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_a_wrong_layer_is_noticed(name):
    torch.manual_seed(0)
    layer = build(LAYERS[name].apply, std=0.3)
    x = tokens(n=3)
    assert (layer(x) - compose_by_hand(layer, x)[0]).abs().max() > 1e-3


@pytest.mark.parametrize("name", LAYOUTS)
def test_it_begins_as_plain_attention_bit_for_bit(name):
    layer = build(std=0, **LAYOUTS[name])
    plain = build(MultiHeadAttention, std=0, attend=plain_attention, **LAYOUTS[name])
    plain.load_state_dict({key: t for key, t in layer.state_dict().items() if key in plain.state_dict()})
    x, context = tokens(), tokens(n=s.n, e=11) if name == "context" else None
    for call in (
        dict(),
        dict(is_causal=context is None),
        dict(mask=bits(s.b, 1, 1, s.n if context is not None else s.m)),
    ):
        assert torch.equal(layer(x, context, **call), plain(x, context, **call))


def test_what_has_a_gradient_at_the_start_and_after_a_step():
    layer, x = build(std=0), tokens()
    for step in range(2):
        layer.zero_grad()
        layer(x).square().sum().backward()
        for part in layer.of_queries, layer.of_keys:
            read, write = part.factors.grad.chunk(2, -1)
            assert write.any() and part.gates.grad.any()
            assert bool(read.any()) == bool(part.hidden.weight.grad.any()) == (step == 1)
        assert layer.attend.logit_mixing.grad.any() and layer.attend.weight_mixing.grad.any()
        with torch.no_grad():
            for p in layer.parameters():
                p -= 1e-3 * p.grad


def test_both_factors_at_zero_would_never_move():
    layer, x = build(std=0), tokens()
    for part in layer.of_queries, layer.of_keys:
        nn.init.zeros_(part.factors)
    layer(x).square().sum().backward()
    assert not any(part.factors.grad.any() for part in (layer.of_queries, layer.of_keys))


@pytest.mark.parametrize("from_keys", [True, False])
@pytest.mark.parametrize("name", ["grouped", "other values", "rope"])
@torch.no_grad()
def test_with_a_cache_chunks_are_the_whole(name, from_keys):
    layer = build(from_keys=from_keys, **LAYOUTS[name])
    assert layer.key_dim == (s.d + 2 * 5 * 2 if from_keys else s.d)
    x = tokens()
    for mask in (None, torch.arange(s.m) >= torch.tensor([[2], [0]])):
        cache = KVCache(s.b, s.g, s.m, layer.key_dim, value_dim=layer.layout.value_dim, **float64)
        whole = layer(x, is_causal=True, key_mask=mask)
        if mask is not None and name == "rope":  # places count real tokens with a cache only
            whole[0, 2:] = layer(x[:1, 2:], is_causal=True)[0]
        found = []
        for part in torch.arange(s.m).split([3, 1, 3]):
            own = None if mask is None else mask[:, part]
            found.append(layer(x[:, part], is_causal=True, key_mask=own, cache=cache))
        real = torch.ones(s.b, s.m, dtype=torch.bool) if mask is None else mask
        close(torch.cat(found, 1)[real], whole[real])


@torch.no_grad()
def test_a_context_is_kept_with_what_its_tokens_say():
    layer, x, context = build(**LAYOUTS["context"]), tokens(n=3), tokens(n=s.n, e=11)
    kept = ContextCache()
    close(layer(x, context, cache=kept), layer(x, context))
    close(layer(x[:, :1], cache=kept), layer(x[:, :1], context))


def test_a_cache_of_plain_keys_is_refused():
    layer = build()
    with refused(ValueError, "width differs", str(layer.key_dim)):
        layer(tokens(), cache=KVCache(s.b, s.g, s.m, s.d, **float64))


@pytest.mark.parametrize("from_keys", [True, False])
def test_nothing_later_and_nothing_hidden_reaches_a_query(from_keys):
    layer, x = build(from_keys=from_keys), tokens().requires_grad_()
    for t in range(s.m):
        grad = torch.autograd.grad(layer(x, is_causal=True)[:, t].sum(), x)[0]
        assert not grad[:, t + 1 :].any() and grad[:, : t + 1].abs().amax(-1).all()
    real = torch.tensor([1, 1, 0, 1, 0, 1, 1]) > 0
    grad = torch.autograd.grad(layer(x, key_mask=real.expand(s.b, -1))[:, real].sum(), x)[0]
    assert not grad[:, ~real].any()


def test_a_query_that_sees_nothing_is_zero():
    layer, x = build(bias=False), tokens().requires_grad_()
    mask = torch.ones(s.m, s.m, dtype=torch.bool)
    mask[3] = False
    y = layer(x, mask=mask)[:, 3]
    assert not y.any() and not torch.autograd.grad(y.sum(), x)[0].any()


@torch.no_grad()
def test_window_and_scale_are_attentions():
    layer, x = build(std=0, window=3, scale=0.7), tokens()
    plain = build(MultiHeadAttention, std=0, attend=lambda q, k, v, **o: attention(q, k, v, window=3, scale=0.7, **o))
    plain.load_state_dict({key: t for key, t in layer.state_dict().items() if key in plain.state_dict()})
    close(layer(x), plain(x))


def test_gradients_are_right():
    torch.manual_seed(0)
    layer = ComposedHeads(6, 2, num_kv_heads=1, head_dim=3, rank=1, hidden_dim=2, **float64)
    for p in layer.parameters():
        nn.init.normal_(p, std=0.5)
    names, values = zip(*layer.named_parameters())

    def call(x, *values):
        return torch.func.functional_call(layer, dict(zip(names, values)), (x,), dict(is_causal=True))

    x = torch.randn(1, 3, 6, requires_grad=True, **float64)
    assert torch.autograd.gradcheck(call, (x, *(v.detach().requires_grad_() for v in values)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_in_halves_it_is_as_near_as_plain_attention(dtype):
    torch.manual_seed(0)
    layer, x = build(std=0.2), tokens()
    exact = layer(x, is_causal=True)
    low = copy.deepcopy(layer).to(dtype)(x.to(dtype), is_causal=True)
    rounded = layer.to(dtype).double()(x.to(dtype).double(), is_causal=True)
    assert low.dtype == dtype
    assert (low - rounded).abs().max() <= 0.05 * exact.abs().max()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.isfinite(layer.float()(x.float(), is_causal=True)).all()


def test_dropout_drops_mixed_weights_and_only_in_training():
    layer, x = build(dropout=0.5), tokens()
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_copies_states_and_meta():
    layer, x = build(), tokens()
    again = copy.deepcopy(layer)
    assert torch.equal(again(x), layer(x)) and again.attend is not layer.attend
    other = build(std=0)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))
    away = build(std=0, device="meta")
    assert away(x.to("meta"), is_causal=True).shape == layer(x).shape
    assert ComposedHeads(s.e, 2)(torch.zeros(0, 5, s.e)).shape == (0, 5, s.e)


COMPILED = """
import torch
from mha_book.variants.composed_heads import ComposedHeads, MultiTokenAttention

def compiled(module):
    return torch.compile(module, fullgraph=True, backend="eager")

layer, x = ComposedHeads(20, 6, num_kv_heads=3, head_dim=8), torch.randn(2, 7, 20)
torch.testing.assert_close(compiled(layer)(x, is_causal=True), layer(x, is_causal=True))
plug, mask = MultiTokenAttention(6, queries=3, keys=3), torch.rand(7, 7) < 0.5
q, k, v = (torch.randn(2, h, 7, 8) for h in (6, 3, 3))
for options in (dict(is_causal=True), dict(mask=mask)):
    torch.testing.assert_close(compiled(plug)(q, k, v, **options), plug(q, k, v, **options))
"""


def test_one_graph_holds_them():
    "In a process of its own, since the check of shapes in tests is nothing that a compiler could trace."
    done = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.usefixtures("own_messages")
def test_bad_arguments_of_the_layer():
    for options, error, words in (
        (dict(rank=0), ValueError, ["rank"]),
        (dict(rank=1.5), TypeError, ["rank"]),
        (dict(hidden_dim=0), ValueError, ["hidden_dim"]),
        (dict(from_keys=1), TypeError, ["from_keys"]),
        (dict(window=0), ValueError, ["window"]),
        (dict(attend=attention), ValueError, ["attend", "MultiHeadAttention"]),
    ):
        with refused(error, *words):
            build(**options)


# --- multi-token attention ---


def convolve_by_hand(plug, logits, mask=None):
    "One logit at a time; a term counts where both its own query and this one may look."
    h, rows, keys = plug.kernel.shape
    b, _, n, m = logits.shape
    seen = torch.ones_like(logits, dtype=torch.bool) if mask is None else mask.expand_as(logits)
    mixed = torch.zeros_like(logits)
    for row in range(b):
        for i in range(h):
            for t in range(n):
                for at in range(m):
                    for a in range(rows):
                        for c in range(-(keys // 2), keys // 2 + 1):
                            if t - a >= 0 and 0 <= at + c < m:
                                if seen[row, i, t - a, at + c] and seen[row, i, t, at + c]:
                                    term = plug.kernel[i, a, c + keys // 2] * logits[row, i, t - a, at + c]
                                    mixed[row, i, t, at] += term
    return mixed


def attend_by_hand(plug, q, k, v, mask=None, bias=None):
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    logits = convolve_by_hand(plug, q @ k.mT * q.shape[-1] ** -0.5, mask)
    logits = logits if bias is None else logits + bias
    logits = logits if mask is None else logits.masked_fill(~mask, -math.inf)
    weights, size = logits.softmax(-1).nan_to_num(0.0), plug.weight_mixing.shape[1]
    mixed = torch.zeros_like(weights)
    for i in range(q.shape[1]):
        for j in range(q.shape[1]):
            if i // size == j // size:
                mixed[:, i] += plug.weight_mixing[i // size, i % size, j % size] * weights[:, j]
    return mixed @ v


def multi(kind=MultiTokenAttention, std=0.6, **options):
    plug = kind(s.h, **(dict(queries=3, keys=5, group=2) | float64 | options))
    if std:
        for p in plug.parameters():
            nn.init.normal_(p, std=std)
    return plug


def heads(n=s.m, m=s.m, **options):
    like = float64 | options
    return [torch.randn(s.b, c, t, w, **like) for c, t, w in ((s.h, n, s.d), (s.g, m, s.d), (s.g, m, s.dv))]


def masks():
    torch.manual_seed(1)
    documents = torch.tensor([0, 0, 0, 1, 1, 2, 2])
    return {
        "none": None,
        "causal": causal_mask(s.m, s.m),
        "keys": (torch.arange(s.m) < s.n).view(1, 1, 1, s.m),
        "documents": documents[:, None] == documents,
        "random": bits(s.b, s.h, s.m, s.m),
    }


@pytest.mark.parametrize("name", masks())
@pytest.mark.parametrize("kernel", [dict(), dict(queries=1, keys=3, group=3), dict(queries=2, keys=1, group=1)])
@torch.no_grad()
def test_the_plug_is_its_definition(name, kernel):
    torch.manual_seed(0)
    plug, (q, k, v), mask = multi(**kernel), heads(), masks()[name]
    bias = torch.randn(s.h, 1, s.m, **float64)
    close(plug(q, k, v, mask=mask, bias=bias), attend_by_hand(plug, q, k, v, mask, bias))


@torch.no_grad()
def test_causal_calls_windows_and_cross_attention():
    torch.manual_seed(0)
    plug, (q, k, v), causal = multi(), heads(), causal_mask(s.m, s.m)
    close(plug(q, k, v, is_causal=True), attend_by_hand(plug, q, k, v, causal))
    real = (torch.arange(s.m) < s.n).view(1, 1, 1, s.m)
    close(plug(q, k, v, is_causal=True, mask=real), attend_by_hand(plug, q, k, v, causal & real))
    narrow = multi(window=3)
    close(narrow(q, k, v), attend_by_hand(narrow, q, k, v, causal & ~causal.tril(-3)))
    q = heads(n=4)[0]
    close(plug(q, k, v), attend_by_hand(plug, q, k, v))


WRONG_ON = {"no zeros": "causal", "own rows only": "documents", "rows backwards": "none", "a true convolution": "none"}


@pytest.mark.parametrize("name", PLUGS)
@torch.no_grad()
def test_a_wrong_plug_is_noticed(name):
    torch.manual_seed(0)
    plug, (q, k, v), mask = multi(PLUGS[name].apply), heads(), masks()[WRONG_ON[name]]
    assert (plug(q, k, v, mask=mask) - attend_by_hand(plug, q, k, v, mask)).abs().max() > 1e-3


def leaks(plug, mask):
    "Pairs of a query and a hidden key whose numbers reach it all the same, over all heads."
    q, k, v = (t.requires_grad_() for t in heads())
    found = 0
    for t in range(s.m):
        grads = torch.autograd.grad(plug(q, k, v, mask=mask)[:, :, t].sum(), [k, v])
        reached = sum(g.abs().amax((0, 1, 3)) for g in grads) > 0
        found += int((reached & ~mask[t]).sum())
    return found


def test_what_a_mask_hides_stays_hidden_and_papers_zeros_are_not_enough():
    torch.manual_seed(0)
    tried = {name: mask for name, mask in masks().items() if name in ("causal", "documents")}
    tried["random"] = bits(s.m, s.m)
    assert not any(leaks(multi(), mask) for mask in tried.values())
    assert leaks(multi(PLUGS["no zeros"].apply), tried["causal"]) > 0
    assert leaks(multi(PLUGS["own rows only"].apply), tried["causal"]) == 0
    assert leaks(multi(PLUGS["own rows only"].apply), tried["documents"]) > 0


@torch.no_grad()
def test_documents_in_one_row_are_documents_apart():
    torch.manual_seed(0)
    plug, (q, k, v) = multi(), heads()
    inside = causal_mask(s.m, s.m) & masks()["documents"]
    apart = [plug(q[:, :, part], k[:, :, part], v[:, :, part], is_causal=True)
             for part in (slice(0, 3), slice(3, 5), slice(5, 7))]  # fmt: skip
    close(plug(q, k, v, mask=inside), torch.cat(apart, 2))
    wrong = multi(PLUGS["own rows only"].apply)
    wrong.load_state_dict(plug.state_dict())
    assert (wrong(q, k, v, mask=inside) - torch.cat(apart, 2)).abs().max() > 1e-3


@torch.no_grad()
def test_padding_on_the_left_needs_its_queries_hidden_unless_causal():
    torch.manual_seed(0)
    layer = build(MultiHeadAttention, attend=multi())
    real = (torch.arange(s.m) >= 2).expand(s.b, -1)
    x = tokens()
    other = torch.where(real[..., None], x, tokens())

    def apart(**call):
        return (layer(x, key_mask=real, **call) - layer(other, key_mask=real, **call))[:, 2:].abs().max()

    assert apart(is_causal=True) == 0
    assert apart() > 1e-3
    assert apart(mask=real[:, None, :, None]) == 0


def test_it_begins_as_plain_attention_bit_for_bit_too():
    plug, (q, k, v) = multi(std=0), heads()
    for options in (dict(), dict(is_causal=True), dict(mask=masks()["random"])):
        assert torch.equal(plug(q, k, v, **options), plain_attention(q, k, v, **options))


@torch.no_grad()
def test_with_a_cache_one_query_row_is_whole_and_more_are_refused():
    torch.manual_seed(0)
    for mask in (None, torch.arange(s.m) >= torch.tensor([[2], [0]])):
        layer, x = build(MultiHeadAttention, attend=multi(queries=1)), tokens()
        cache = KVCache(s.b, s.g, s.m, s.d, **float64)
        found = [
            layer(x[:, part], is_causal=True, key_mask=None if mask is None else mask[:, part], cache=cache)
            for part in torch.arange(s.m).split([3, 1, 3])
        ]
        whole = layer(x, is_causal=True, key_mask=mask)
        real = torch.ones(s.b, s.m, dtype=torch.bool) if mask is None else mask
        close(torch.cat(found, 1)[real], whole[real])
    layer = build(MultiHeadAttention, attend=multi(queries=2))
    cache = KVCache(s.b, s.g, s.m, s.d, **float64)
    layer(x[:, :3], is_causal=True, cache=cache)
    with refused(ValueError, "1 query", "4 keys", "queries=1"):
        layer(x[:, 3:4], is_causal=True, cache=cache)
    assert cache.seen.tolist() == [3, 3]
    apart = layer(x[:, 3:4], cache=cache) - layer(x[:, :4], is_causal=True)[:, 3:]
    assert apart.abs().max() > 1e-3  # which nobody notices


def test_a_map_explains_the_plug():
    layer, x = build(MultiHeadAttention, attend=multi(), bias=False), tokens()
    _, _, v = layer.qkv(x)
    y = layer.attention_map(x, is_causal=True) @ v.repeat_interleave(2, 1)
    close(y.transpose(1, 2).flatten(2) @ layer.out_proj.weight.T, layer(x, is_causal=True))


def test_gradients_of_the_plug_are_right():
    torch.manual_seed(0)
    plug = MultiTokenAttention(2, queries=2, keys=3, group=2, **float64)
    values = [p.detach() + 0.3 * torch.randn_like(p) for p in plug.parameters()]
    names = [name for name, _ in plug.named_parameters()]
    q, k, v = (torch.randn(1, c, 4, w, **float64) for c, w in ((2, 3), (1, 3), (1, 2)))
    mask = torch.tensor([[1, 1, 0, 1], [0, 1, 1, 1], [0, 0, 0, 0], [1, 1, 1, 1]]) > 0

    for options in (dict(is_causal=True), dict(mask=mask)):

        def call(q, k, v, *values):
            return torch.func.functional_call(plug, dict(zip(names, values)), (q, k, v), options)

        assert torch.autograd.gradcheck(call, [t.detach().requires_grad_() for t in (q, k, v, *values)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@torch.no_grad()
def test_rounding_is_that_of_plain_attention(dtype):
    torch.manual_seed(0)
    plug = multi(std=0)
    low, (q, k, v) = multi(std=0, dtype=dtype), (t.to(dtype) for t in heads())
    exact = plug(q.double(), k.double(), v.double(), is_causal=True)
    plain = (plain_attention(q, k, v, is_causal=True) - exact).abs().max()
    allowed = tolerance(float(plain), dtype, float(exact.abs().max()))
    assert (low(q, k, v, is_causal=True) - exact).abs().max() <= allowed


@pytest.mark.usefixtures("own_messages")
@torch.no_grad()
def test_it_runs_where_others_run():
    plug, (q, k, v) = multi(), heads()
    y = plug(q, k, v, is_causal=True)
    assert torch.equal(copy.deepcopy(plug)(q, k, v, is_causal=True), y)
    away = multi(std=0, device="meta")
    assert away(*(t.to("meta") for t in (q, k, v)), is_causal=True).shape == y.shape
    for n, m in ((0, 0), (0, 3), (3, 0)):
        assert plug(*heads(n, m)).shape == (s.b, s.h, n, s.dv)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        own = multi(dtype=torch.float32)
        assert torch.isfinite(own(*(t.float() for t in (q, k, v)), is_causal=True)).all()


@pytest.mark.usefixtures("own_messages")
def test_bad_arguments_of_the_plug():
    for options, error, words in (
        (dict(queries=0), ValueError, ["queries"]),
        (dict(keys=4), ValueError, ["keys 4", "keys=3 or 5"]),
        (dict(keys=3.0), TypeError, ["keys"]),
        (dict(group=4), ValueError, ["6", "4", "divide"]),
        (dict(window=-1), ValueError, ["window"]),
    ):
        with refused(error, *words):
            multi(**options)
    with refused(ValueError, "6 query heads", "4 kernels"):
        MultiTokenAttention(4, **float64)(*heads())
    with refused(ValueError, "device differs", "meta"):
        multi(std=0, device="meta")(*heads())
