"""A token's heads against loops over tokens and heads; what is skipped against what is counted."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mha_book.heads.layer import MultiHeadAttention
from mha_book.heads.single_head import plain_attention
from mha_book.instruments.testing import SIZES
from mha_book.instruments.tolerance import tolerance
from mha_book.plugs.cache import ContextCache, KVCache
from mha_book.plugs.logits import OutputGate, SinkAttention
from mha_book.plugs.rope import RoPE
from mha_book.variants.mixture_of_heads import MixtureOfHeads, Routes, balance_loss, recorded_routes, skip_heads
from support.mutants_mixture import ROUTERS, SKIPS
from support.refusals import refused

s = SIZES
float64 = dict(dtype=torch.float64)
COUNTS = [(1, 0), (4, 0), (s.h, 0), (3, 1), (4, 3), (s.h, 2)]  # active, shared


def mixture(active, shared=0, kind=MixtureOfHeads, **options):
    plug = kind(s.e, s.h, active, num_shared=shared, **float64, **options)
    for p in plug.router.parameters():
        nn.init.normal_(p, std=0.7)
    return plug


def build(plug, **options):
    layer = MultiHeadAttention(s.e, s.h, finish=plug, **(dict(num_kv_heads=s.g, head_dim=s.d) | float64 | options))
    for name, p in layer.named_parameters():
        if not name.startswith("finish"):
            nn.init.normal_(p, std=0.4)
    return layer


def tokens(b=s.b, n=s.n):
    return torch.randn(b, n, s.e, **float64)


# --- the definition, token by token and head by head ---


def route_by_hand(plug, x):
    "Weights of one token, as a list."
    shared, k = plug.num_shared, plug.num_active - plug.num_shared
    logits = [
        sum(w * number for w, number in zip(row, x.tolist())) + bias
        for row, bias in zip(plug.router.weight.tolist(), plug.router.bias.tolist())
    ]
    best = sorted(range(len(logits)), key=lambda i: (-logits[i], i))[:k]
    odds = {i: math.exp(logits[i] - max(logits)) for i in best}
    routed = [k * odds[i] / sum(odds.values()) if i in odds else 0.0 for i in range(len(logits))]
    return [1.0] * shared + routed


def forward_by_hand(layer, x, key_mask=None):
    "One token and one head at a time, with the heads' columns of the output matrix."
    q, k, v = layer.qkv(x)
    group = s.h // layer.layout.num_kv_heads
    y = torch.zeros(*x.shape[:2], s.e, **float64)
    for row in range(len(x)):
        for at in range(x.shape[1]):
            y[row, at] = layer.out_proj.bias
            for i, weight in enumerate(route_by_hand(layer.finish, x[row, at])):
                seen = slice(None) if key_mask is None else key_mask[row]
                own_k, own_v = k[row, i // group][seen], v[row, i // group][seen]
                mixed = (own_k @ q[row, i, at] / s.d**0.5).softmax(0) @ own_v
                y[row, at] += layer.out_proj.weight[:, i * s.d : (i + 1) * s.d] @ mixed * weight
    return y


def agrees(plug, x):
    "Whether a plug routes as the definition does."
    wanted = torch.tensor([[route_by_hand(plug, token) for token in row] for row in x], **float64)
    return torch.allclose(plug.route(x).weights, wanted, atol=1e-12, rtol=0)


@pytest.mark.parametrize("active, shared", COUNTS)
def test_the_plug_is_the_loop_over_tokens_and_heads(active, shared):
    layer, x = build(mixture(active, shared)), tokens()
    key_mask = torch.tensor([[True] * s.n, [True, False, True] + [False] * (s.n - 3)])
    assert agrees(layer.finish, x)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), forward_by_hand(layer, x), atol=1e-12, rtol=0)
        wanted = forward_by_hand(layer, x, key_mask)
        torch.testing.assert_close(layer(x, key_mask=key_mask), wanted, atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", ROUTERS)
def test_another_router_is_noticed(name):
    x, plug = tokens(), mixture(4, 2, kind=ROUTERS[name].apply)
    ties = mixture(4, 2, kind=ROUTERS[name].apply)
    for p in ties.router.parameters():
        nn.init.zeros_(p)
    assert not (agrees(plug, x) and agrees(ties, x))


@pytest.mark.parametrize("active, shared", COUNTS)
def test_what_a_choice_is(active, shared):
    weights, chosen, scores = mixture(active, shared).route(tokens())
    assert (chosen.sum(-1) == active).all() and (weights > 0).equal(chosen) and chosen[..., :shared].all()
    assert (weights[..., :shared] == 1).all() and (scores[..., :shared] == 0).all()
    torch.testing.assert_close(weights.sum(-1), torch.full((s.b, s.n), float(active), **float64))
    torch.testing.assert_close(scores.sum(-1), torch.ones(s.b, s.n, **float64))
    routed = weights[..., shared:]
    for token, p in zip(routed.flatten(0, 1), scores[..., shared:].flatten(0, 1)):
        assert p[token > 0].min() > (p[token == 0].max() if active < s.h else 0)
        torch.testing.assert_close(token[token > 0] / token.max(), p[token > 0] / p.max())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shared", [0, 1, 5])
def test_all_heads_at_equal_logits_are_the_plain_layer_bit_for_bit(dtype, shared):
    plug = MixtureOfHeads(s.e, s.h, s.h, num_shared=shared, dtype=dtype)
    nn.init.zeros_(plug.router.weight)
    nn.init.constant_(plug.router.bias, 0.3)
    layer = MultiHeadAttention(s.e, s.h, finish=plug, head_dim=s.d, dtype=dtype)
    plain = MultiHeadAttention(s.e, s.h, head_dim=s.d, dtype=dtype)
    plain.load_state_dict({k: v for k, v in layer.state_dict().items() if not k.startswith("finish")})
    x = tokens().to(dtype)
    assert torch.equal(layer(x), plain(x)) and layer(x).dtype == dtype


def test_the_bias_alone_takes_the_same_heads_for_every_token():
    plug = mixture(3)
    with torch.no_grad():
        plug.router.weight.zero_()
        plug.router.bias.copy_(torch.tensor([0.0, 2.0, 1.0, 3.0, -1.0, 0.5]))
    assert plug.route(tokens()).chosen.all(0).all(0).nonzero().flatten().tolist() == [1, 2, 3]


def test_equal_logits_are_taken_from_the_left():
    plug = mixture(4, 1)
    for p in plug.router.parameters():
        nn.init.zeros_(p)
    weights, chosen, _ = plug.route(tokens())
    assert (chosen == torch.tensor([True] * 4 + [False] * (s.h - 4))).all() and (weights[chosen] == 1).all()
    many = MixtureOfHeads(s.e, 300, 100)  # so many that a sort may shuffle equals
    nn.init.zeros_(many.router.weight)
    assert many.route(tokens().float()).chosen[..., :100].all()


# --- neither influence nor gradient ---


def test_a_head_that_is_not_chosen_has_neither_influence_nor_gradient():
    layer, x = build(mixture(4)), tokens()
    chosen = layer.finish.route(x).chosen
    heads = torch.randn(s.b, s.n, s.h * s.d, **float64, requires_grad=True)
    layer.finish(heads, x).square().sum().backward()
    assert (heads.grad.unflatten(-1, (s.h, -1)).abs().sum(-1) > 0).equal(chosen)
    with torch.no_grad():
        broken = heads.unflatten(-1, (s.h, -1)).masked_fill(~chosen[..., None], float("nan")).flatten(-2)
        assert torch.equal(layer.finish(broken, x), layer.finish(heads, x))


def test_nothing_of_a_broken_head_comes_into_gradients():
    plug, x = mixture(3), tokens()
    heads = torch.randn(s.b, s.n, s.h, s.d, **float64)
    wanted = torch.autograd.grad(plug(heads.flatten(-2), x).sum(), [*plug.router.parameters()])
    broken = heads.masked_fill(~plug.route(x).chosen[..., None], math.inf).flatten(-2)
    assert all(map(torch.equal, torch.autograd.grad(plug(broken, x).sum(), [*plug.router.parameters()]), wanted))


def test_a_head_that_nobody_takes_gets_no_gradient_at_all():
    plug = mixture(3)
    with torch.no_grad():
        plug.router.bias[4] = -1e4
    layer = build(plug, num_kv_heads=s.h)
    layer(tokens()).square().sum().backward()
    for part in "qkvo":
        proj, rows = layer.rows(part, 4)
        grad = proj.weight.grad[:, rows] if part == "o" else proj.weight.grad[rows]
        assert not grad.any()
    assert plug.router.weight.grad[0].any() and not plug.router.weight.grad[4].any()


def test_one_routed_head_has_weight_one_and_teaches_the_router_nothing():
    layer, x = build(mixture(3, 2)), tokens()
    weights, chosen, _ = layer.finish.route(x)
    assert (weights[chosen] == 1).all()
    layer(x).square().sum().backward()
    assert layer.in_proj.weight.grad.any() and not layer.finish.router.weight.grad.any()
    balance_loss(layer.finish.route(x)).backward()
    assert layer.finish.router.weight.grad.any()


# --- whose numbers decide ---


def alone_and_together(layer, x):
    "How far outputs of rows are, computed one by one and as a batch."
    return (torch.cat([layer(row[None]) for row in x]) - layer(x)).abs().max().item()


def test_a_token_chooses_alone_in_a_batch_under_padding_and_with_a_cache():
    layer, x = build(mixture(3, 1), position=RoPE(s.d)), tokens(3)
    assert alone_and_together(layer, x) < 1e-12
    longer = torch.cat([x, 1e3 * torch.randn(3, 4, s.e, **float64)], 1)
    key_mask = torch.arange(s.n + 4).expand(3, -1) < s.n
    torch.testing.assert_close(layer(longer, key_mask=key_mask)[:, : s.n], layer(x), atol=1e-12, rtol=0)
    cache = KVCache(3, s.g, s.n, s.d, **float64)
    steps = [layer(x[:, at : at + 1], is_causal=True, cache=cache) for at in range(s.n)]
    torch.testing.assert_close(torch.cat(steps, 1), layer(x, is_causal=True), atol=1e-12, rtol=0)


def test_heads_that_choose_tokens_make_a_row_depend_on_its_neighbours():
    layer, x = build(mixture(3, kind=ROUTERS["heads choose"].apply)), tokens(3)
    assert alone_and_together(layer, x) > 0.1


def test_a_mixture_behind_a_copy_and_a_state_dict():
    plug = mixture(4, 2)
    again = MixtureOfHeads(s.e, s.h, 4, num_shared=2, **float64)
    again.load_state_dict(plug.state_dict())
    x = tokens()
    for other in (again, copy.deepcopy(plug)):
        assert torch.equal(other.route(x).weights, plug.route(x).weights)
    assert "num_active=4" in repr(plug)


def test_another_plug_comes_next():
    gate = OutputGate(s.e, s.h, head_dim=s.d, **float64)
    plug, heads, x = mixture(4, finish=gate), torch.randn(s.b, s.n, s.h * s.d, **float64), tokens()
    weights = plug.route(x).weights.repeat_interleave(s.d, -1)
    torch.testing.assert_close(plug(heads, x), gate(heads * weights, x))


def test_float16_and_autocast_choose_in_float32():
    plug = MixtureOfHeads(s.e, s.h, 3, dtype=torch.bfloat16)
    heads, x = torch.randn(s.b, s.n, s.h * s.d).bfloat16(), tokens().bfloat16()
    routes = plug.route(x)
    assert routes.weights.dtype == routes.scores.dtype == torch.float32 and plug(heads, x).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert MixtureOfHeads(s.e, s.h, 3).route(tokens().float()).scores.dtype == torch.float32


# --- the balance loss ---


def balance_by_hand(routes, real, shared):
    "Loops over heads and tokens."
    b, n, h = routes.scores.shape
    places = [(row, at) for row in range(b) for at in range(n) if real[row, at]]
    total, taken = 0.0, 0.0
    for i in range(shared, h):
        f = sum(bool(routes.chosen[row, at, i]) for row, at in places) / len(places)
        total += f * sum(routes.scores[row, at, i].item() for row, at in places) / len(places)
        taken += f
    return (h - shared) / taken * total


@pytest.mark.parametrize("active, shared", COUNTS)
def test_the_balance_loss_is_its_sum(active, shared):
    routes = mixture(active, shared).route(tokens(3))
    real = torch.rand(3, s.n) < 0.6
    real[:, 0] = True
    assert balance_loss(routes).item() == pytest.approx(balance_by_hand(routes, torch.ones(3, s.n), shared))
    assert balance_loss(routes, real).item() == pytest.approx(balance_by_hand(routes, real, shared))
    if active == s.h:
        assert balance_loss(routes).item() == pytest.approx(1)


def test_even_use_is_one_and_static_use_is_the_ratio():
    plug = mixture(3, 2)
    with torch.no_grad():
        plug.router.weight.zero_()
        plug.router.bias.copy_(torch.tensor([60.0, 0, 0, 0]))
    x = torch.eye(s.e, **float64)[:4].expand(s.b, -1, -1)
    assert balance_loss(plug.route(x)).item() == pytest.approx(4)  # R/k
    with torch.no_grad():
        plug.router.bias.zero_()
        plug.router.weight[:, :4] = 60 * torch.eye(4, **float64)  # token i takes head i
    assert balance_loss(plug.route(x)).item() == pytest.approx(1)


def test_it_can_be_below_one():
    scores = torch.tensor([[[0.51, 0.49], [0.51, 0.49], [0.0, 1.0]]])
    chosen = torch.tensor([[[True, False], [True, False], [False, True]]])
    assert balance_loss(Routes(chosen.float(), chosen, scores)).item() == pytest.approx(2 * (0.34 * 2 + 0.66) / 3)
    assert 2 * (0.34 * 2 + 0.66) / 3 < 0.9


def test_its_gradient_pulls_to_heads_that_are_used_less():
    plug = mixture(1)
    with torch.no_grad():
        plug.router.weight.zero_()
        plug.router.bias.copy_(torch.arange(s.h, 0, -1).double())
    balance_loss(plug.route(tokens())).backward()
    assert plug.router.bias.grad[0] > 0 and (plug.router.bias.grad[1:] < 0).all()


def test_padding_has_no_say_even_where_it_is_no_number():
    plug, x = mixture(3), tokens()
    real = torch.arange(s.n).expand(s.b, -1) < 3
    wanted = balance_loss(plug.route(x[:, :3]))
    x[:, 3:] = math.nan
    torch.testing.assert_close(balance_loss(plug.route(x), real), wanted)
    assert balance_loss(plug.route(x), torch.zeros_like(real)) == 0


def test_routes_are_recorded_and_nothing_stays():
    model = nn.ModuleDict({"a": build(mixture(3)), "b": build(mixture(4, 1)), "c": build(None)})
    x, before = tokens(), {k: v.clone() for k, v in model.state_dict().items()}
    with recorded_routes(model) as found:
        model["a"](x)
        y = model["b"](model["b"](x))
    assert {name: len(routes) for name, routes in found.items()} == {"a.finish": 1, "b.finish": 2}
    for ours, theirs in zip(found["a.finish"][0], model["a"].finish.route(x)):
        assert torch.equal(ours, theirs)
    sum(balance_loss(routes) for own in found.values() for routes in own).backward()
    assert model["a"].finish.router.weight.grad.any() and y.requires_grad
    assert all(not m._forward_pre_hooks for m in model.modules())
    model["a"](x)
    assert len(found["a.finish"]) == 1 and all(map(torch.equal, model.state_dict().values(), before.values()))
    with pytest.raises(ZeroDivisionError), recorded_routes(model["a"]) as found:
        raise ZeroDivisionError
    assert not model["a"].finish._forward_pre_hooks


# --- what is skipped ---

LAYERS = {
    "plain": dict(num_kv_heads=s.h),
    "grouped": dict(),
    "rope": dict(position=RoPE(s.d)),
    "norm": dict(qk_norm=lambda d: nn.RMSNorm(d, **float64)),
    "value_dim": dict(value_dim=5),
    "no bias": dict(bias=False, out_dim=7),
    "definition": dict(attend=plain_attention),
}
CALLS = {
    "all": lambda n: dict(),
    "causal": lambda n: dict(is_causal=True),
    "padding": lambda n: dict(key_mask=torch.arange(n).expand(3, -1) < torch.tensor([[n], [2], [0]])),
    "masks": lambda n: dict(mask=torch.rand(3, s.h, n, n) < 0.6, is_causal=True),
    "one mask": lambda n: dict(mask=torch.rand(n, n) < 0.6),
}


def gradients(layer, y):
    return [*torch.autograd.grad(y.square().sum(), [*layer.parameters()], allow_unused=True)]


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", LAYERS)
def test_skipping_gives_the_same_outputs_and_gradients(name, call):
    for active, shared in ((3, 0), (4, 2)):
        layer, x = build(mixture(active, shared), **LAYERS[name]), tokens(3, s.m)
        options = CALLS[call](s.m)
        y = layer(x, **options)
        got = skip_heads(layer, x, **options)
        torch.testing.assert_close(got, y, atol=1e-12, rtol=0)
        torch.testing.assert_close(gradients(layer, got), gradients(layer, y), atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("name", SKIPS)
def test_another_way_to_skip_is_noticed(name):
    layer, x = build(mixture(3)), tokens(3, s.m)
    far = []
    for call in CALLS.values():
        options = call(s.m)
        far.append((SKIPS[name].apply(layer, x, **options) - layer(x, **options)).abs().max().item())
    assert max(far) > 1e-3


@pytest.mark.parametrize("name", ["plain", "grouped", "rope"])
def test_skipping_with_a_cache(name):
    layer, x = build(mixture(3, 1), **LAYERS[name]), tokens(3, s.m)
    caches = [KVCache(3, layer.layout.num_kv_heads, s.m, s.d, **float64) for _ in range(2)]
    for at in (slice(0, 4), slice(4, 5), slice(5, s.m)):
        real = torch.ones(3, len(range(s.m)[at]), dtype=torch.bool)
        real[1, 0] = at.start > 0
        options = dict(is_causal=True, key_mask=real)
        wanted, got = (
            layer(x[:, at], **options, cache=caches[0]),
            skip_heads(layer, x[:, at], **options, cache=caches[1]),
        )
        torch.testing.assert_close(got, wanted, atol=1e-12, rtol=0)
    assert caches[0].seen.tolist() == caches[1].seen.tolist()
    other = build(mixture(3, 1), **LAYERS[name])
    with refused(ValueError, "another layer"):
        skip_heads(other, x[:, :1], cache=caches[1])


def test_a_failed_call_leaves_the_cache_as_it_was():
    layer, cache = build(mixture(3)), KVCache(s.b, s.g, 4 * s.n, s.d, **float64)
    skip_heads(layer, tokens(), is_causal=True, cache=cache)
    with refused(ValueError, "mask"):
        skip_heads(layer, tokens(), mask=torch.ones(3, 3, dtype=torch.bool), cache=cache)
    assert cache.seen.tolist() == [s.n] * s.b


def work(layer, x, chosen, skipped):
    "Multiplications and additions of a layer in closed form, its router included."
    (h, g, d), dv, out = layer.layout, layer.layout.value_dim, layer.out_proj.out_features
    b, n, _ = x.shape
    tokens_of_heads = int(chosen.sum()) if skipped else b * n * h
    queries = b * int(chosen.sum(1).amax(0).sum()) if skipped else b * n * h
    each = s.e * d + dv * out
    always = b * n * s.e * (g * (d + dv) + layer.finish.router.out_features)
    return 2 * (tokens_of_heads * each + queries * n * (d + dv) + always)


@pytest.mark.parametrize("b", [1, 3])
@pytest.mark.parametrize("active, shared", COUNTS)
def test_what_is_counted_is_the_closed_form(active, shared, b):
    layer, x = build(mixture(active, shared), attend=plain_attention, value_dim=5), tokens(b, s.m)
    chosen = layer.finish.route(x).chosen
    counts = {}
    for name, call in dict(dense=layer, skipped=lambda x: skip_heads(layer, x)).items():
        with FlopCounterMode(display=False) as counter:
            call(x)
        counts[name] = counter.get_total_flops()
        assert counts[name] == work(layer, x, chosen, name == "skipped")
    if b == 1:  # every head's queries are those that chose it
        saved = 2 * s.m * (s.e * s.d + 5 * s.e + s.m * (s.d + 5)) * (s.h - active)
        assert counts["dense"] - counts["skipped"] == saved


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_skipping_in_fewer_bits_and_under_autocast(dtype):
    plug = MixtureOfHeads(s.e, s.h, 3, dtype=dtype)
    layer = MultiHeadAttention(s.e, s.h, head_dim=s.d, finish=plug, dtype=dtype)
    x = tokens().to(dtype)
    exact = copy.deepcopy(layer).double()
    wanted = exact(x.double())
    assert exact.finish.route(x.double()).chosen.equal(layer.finish.route(x).chosen)
    far, plain = ((y - wanted).abs().max().item() for y in (skip_heads(layer, x), layer(x)))
    assert far <= tolerance(plain, dtype, wanted.abs().max().item())
    if dtype == torch.float32:
        with torch.autocast("cpu", torch.bfloat16):
            got, wanted = skip_heads(layer, x), layer(x)
        assert got.dtype == wanted.dtype
        torch.testing.assert_close(got, wanted, atol=2e-2, rtol=2e-2)


def test_no_tokens():
    layer = build(mixture(3))
    for shape in ((0, s.n), (s.b, 0)):
        x = torch.randn(*shape, s.e, **float64)
        assert skip_heads(layer, x).shape == layer(x).shape == x.shape
        assert balance_loss(layer.finish.route(x)) == 0


# --- bad input ---


@pytest.mark.usefixtures("own_messages")
def test_counts_that_do_not_fit_are_refused():
    for wrong, error in (((0, 6, 3), ValueError), ((16, 6, 0), ValueError), ((16, 6.0, 3), TypeError)):
        with refused(error, "at least 1" if error is ValueError else "must be an int"):
            MixtureOfHeads(*wrong)
    for active, shared in ((7, 0), (3, 3), (2, 4), (3, -1)):
        with refused(ValueError, f"num_shared {shared}", f"num_active {active}", "prune_heads"):
            MixtureOfHeads(s.e, 6, active, num_shared=shared)
    with refused(TypeError, "num_shared must be an int", "True"):
        MixtureOfHeads(s.e, 6, 3, num_shared=True)
    with refused(TypeError, "finish must be callable"):
        MixtureOfHeads(s.e, 6, 3, finish=1)


@pytest.mark.usefixtures("own_messages")
def test_what_does_not_fit_is_refused():
    plug = mixture(3)
    with refused(ValueError, "47 wide", "6 heads"):
        plug(torch.randn(s.b, s.n, 47, **float64), tokens())
    with refused(TypeError, "x must be a torch.Tensor"):
        plug.route([1.0])
    with refused(TypeError, "heads has dtype torch.int64"):
        plug(torch.ones(s.b, s.n, 48, dtype=torch.int64), tokens())
    with refused(TypeError, "routes must be Routes", "tuple"):
        balance_loss(tuple(plug.route(tokens())))
    with refused(ValueError, "key_mask has shape"):
        balance_loss(plug.route(tokens()), torch.ones(s.b, s.n + 1, dtype=torch.bool))
    with refused(TypeError, "model must be an nn.Module"), recorded_routes(plug.route):
        pass


def hooked(layer):
    layer.register_forward_hook(lambda *_: None)
    return layer


UNPROVEN = {
    "no mixture": (lambda: build(None), TypeError, "finish is NoneType"),
    "a subclass": (lambda: build(mixture(3, kind=ROUTERS["not scaled"].apply)), TypeError, "_Unscaled"),
    "another plug next": (
        lambda: build(mixture(3, finish=lambda heads, x: heads)),
        ValueError,
        "behind MixtureOfHeads",
    ),
    "attend": (lambda: build(mixture(3), attend=SinkAttention(s.h, **float64)), ValueError, "attend is a plug"),
    "dropout": (lambda: build(mixture(3), dropout=0.1), ValueError, "dropout 0.1"),
    "hooks": (lambda: hooked(build(mixture(3))), TypeError, "forward hooks"),
    "a context": (lambda: build(mixture(3), context_dim=9), ValueError, "of a context"),
    "other heads": (lambda: build(MixtureOfHeads(s.e, 4, 3, **float64)), ValueError, "4 heads, and the layer 6"),
    "no layer": (lambda: nn.Linear(3, 3), TypeError, "layer must be"),
}


@pytest.mark.parametrize("name", UNPROVEN)
@pytest.mark.usefixtures("own_messages")
def test_a_layer_that_cannot_be_computed_head_by_head_is_refused(name):
    make, error, words = UNPROVEN[name]
    with refused(error, words):
        skip_heads(make(), tokens())


@pytest.mark.usefixtures("own_messages")
def test_the_rest_of_a_call_is_checked_as_the_layer_does():
    layer = build(mixture(3))
    with refused(TypeError, "is_causal"):
        skip_heads(layer, tokens(), is_causal=1)
    with refused(ValueError, "key_mask has shape"):
        skip_heads(layer, tokens(), key_mask=torch.ones(s.b, s.n + 2, dtype=torch.bool))
    with refused(ValueError, "mask"):
        skip_heads(layer, tokens(), mask=torch.ones(3, 3, dtype=torch.bool))
    with refused(ValueError, "x has shape"):
        skip_heads(layer, torch.randn(s.n, s.e, **float64))
    with refused(ValueError, "of a context"):
        skip_heads(layer, tokens(), cache=ContextCache())
    handle = layer.in_proj.register_forward_hook(lambda *_: None)
    with refused(TypeError, "in_proj has forward hooks"):
        skip_heads(layer, tokens())
    handle.remove()
