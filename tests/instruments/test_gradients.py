"""Gradients through every option of the layer, and the instruments that look at them."""

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

from mha_book import MultiHeadAttention, fused_attend, pad_heads
from mha_book.heads.single_head import plain_attention
from mha_book.heads.weight_split import StackedProjections
from mha_book.instruments.gradients import _is_view, backward_graph, gradient_report
from mha_book.instruments.testing import SIZES as s
from mha_book.instruments.testing import reference_attention, saved_tensors
from support.refusals import refused

settings.register_profile("book", max_examples=25, deadline=None, derandomize=True)
settings.load_profile("book")


# Every option at once, against a loop over slices


def stretch(q, k, *, offset):
    "A position plug: the later a token, the longer."
    return tuple(t * (1 + 0.1 * torch.arange(t.shape[2], dtype=t.dtype))[:, None] for t in (q, k))


CONTEXTS = {"none": None, "of the tokens' width": "same", "of its own width": 6}


@st.composite
def layers(draw, context):
    "A layer in float64, of any sizes, with or without each of its options. Grouped by at most 2, at most 2 groups."
    num_kv_heads, group_size = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    layer = MultiHeadAttention(
        embed_dim=draw(st.integers(1, 5)),
        num_heads=num_kv_heads * group_size,
        num_kv_heads=num_kv_heads,
        head_dim=draw(st.integers(1, 3)),
        out_dim=draw(st.sampled_from([None, 4])),
        bias=draw(st.booleans()),
        qk_norm=draw(st.sampled_from([None, nn.RMSNorm])),
        position=draw(st.sampled_from([None, stretch])),
        attend=draw(st.sampled_from([None, plain_attention])),
        context_dim=context if isinstance(context, int) else None,
        dtype=torch.float64,
    )
    for p in layer.parameters():
        nn.init.normal_(p, std=0.7)  # biases of 0 and scales of 1 would hide mistakes
    return layer


@st.composite
def calls(draw):
    """A layer, its tokens, its context or None, and options of the call: each of mask, bias, key_mask and is_causal is
    there or is not, whatever the others are.
    """
    torch.manual_seed(draw(st.integers(0, 1000)))
    context = CONTEXTS[draw(st.sampled_from([*CONTEXTS]))]
    layer = draw(layers(context))
    b, n, m = (draw(st.integers(1, most)) for most in (2, 3, 4))
    e, h = layer.in_proj.in_features, layer.layout.num_heads
    x = torch.randn(b, n, e, dtype=torch.float64)
    if context is None:
        answers, m = None, n
    else:
        answers = torch.randn(b, m, e if context == "same" else context, dtype=torch.float64)
    options = {
        "mask": torch.rand(b, 1, n, m) < 0.7,
        "bias": torch.randn(h, n, m, dtype=torch.float64),
        "key_mask": torch.arange(m) < torch.randint(1, m + 1, (b, 1)),
        "is_causal": True,
    }
    return layer, x, answers, {name: value for name, value in options.items() if draw(st.booleans())}


def normed(t, norm):
    "RMSNorm by its formula."
    return t / (t.square().mean(-1, keepdim=True) + torch.finfo(t.dtype).eps).sqrt() * norm.weight


def loop(layer, x, context, *, mask=None, key_mask=None, **options):
    "The layer as a loop over heads, each a slice of the weights; none of the package's splitting or merging."
    h, g, d = layer.layout
    source, kv = (x, layer.in_proj) if context is None else (context, layer.context_proj or layer.in_proj)
    above = h * d if kv is layer.in_proj else 0

    def head(proj, tokens, first):
        rows = slice(first, first + d)
        return tokens @ proj.weight[rows].T + (0 if proj.bias is None else proj.bias[rows])

    q = torch.stack([head(layer.in_proj, x, i * d) for i in range(h)], 1)
    k, v = (torch.stack([head(kv, source, above + (part * g + j) * d) for j in range(g)], 1) for part in (0, 1))
    if layer.q_norm is not None:
        q, k = normed(q, layer.q_norm), normed(k, layer.k_norm)
    if layer.position is not None:
        q, k = (torch.stack([t[:, :, i] * (1 + 0.1 * i) for i in range(t.shape[2])], 2) for t in (q, k))
    seen = torch.ones(len(x), 1, x.shape[1], source.shape[1], dtype=torch.bool)
    seen = seen if mask is None else seen & mask
    seen = seen if key_mask is None else seen & key_mask[:, None, None]
    z = reference_attention(q, k, v, mask=seen, **options)
    y = sum(z[:, i] @ layer.out_proj.weight[:, i * d : (i + 1) * d].T for i in range(h))
    return y if layer.out_proj.bias is None else y + layer.out_proj.bias


def gradients(y, upstream, leaves):
    "A gradient for each leaf; 0 where no path leads."
    found = torch.autograd.grad(y, leaves, upstream, allow_unused=True)
    return [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(found, leaves)]


def assert_close(a, b):
    torch.testing.assert_close(a, b, atol=1e-12 * max(1.0, b.abs().max().item()), rtol=0)


def leaves_of(layer, *tensors):
    return [*layer.parameters(), *(t.requires_grad_() for t in tensors if t is not None)]


@settings(max_examples=60)
@given(calls())
def test_gradients_of_the_layer_are_those_of_the_loop(call):
    layer, x, context, options = call
    bias = options.get("bias")
    leaves = leaves_of(layer, x, context, bias)
    y, exact = layer(x, context, **options), loop(layer, x, context, **options)
    assert_close(y, exact)
    upstream = torch.randn_like(y)
    for got, expected in zip(gradients(y, upstream, leaves), gradients(exact, upstream, leaves)):
        assert_close(got, expected)


def rows_in_order(layer, order):
    """Which rows each projection takes, so that its groups of heads stand in this order, with all their query heads:
    by the name of the projection, numbers of rows (of `out_proj` columns).
    """
    h, g, d = layer.layout
    query_heads = [group * (h // g) + i for group in order for i in range(h // g)]

    def rows(heads, above=0):
        return [above + head * d + row for head in heads for row in range(d)]

    q, k, v = rows(query_heads), rows(order), rows(order, above=g * d)
    if layer.context_proj is None:
        return {"in_proj": q + [h * d + row for row in k + v], "out_proj": q}, query_heads
    return {"in_proj": q, "context_proj": k + v, "out_proj": q}, query_heads


@given(calls(), st.randoms())
def test_permuting_heads_permutes_gradients(call, random):
    layer, x, context, options = call
    order = list(range(layer.layout.num_kv_heads))
    random.shuffle(order)
    rows, query_heads = rows_in_order(layer, order)

    def moved(name, t):
        "A parameter, or its gradient, in the new order; norms and the output's bias have no heads."
        projection = name.split(".")[0]
        if name == "out_proj.weight":
            return t[:, rows["out_proj"]]
        return t[rows[projection]] if projection in ("in_proj", "context_proj") else t

    other = copy.deepcopy(layer)
    with torch.no_grad():
        for name, p in layer.named_parameters():
            other.get_parameter(name).copy_(moved(name, p))
    other_options = dict(options)
    if "bias" in options:  # it has a matrix for each head
        other_options["bias"] = options["bias"][query_heads]
    y, same = layer(x, context, **options), other(x, context, **other_options)
    upstream = torch.randn_like(y)
    before = gradients(y, upstream, [*layer.parameters()])
    after = gradients(same, upstream, [*other.parameters()])
    for (name, _), gradient, of_other in zip(layer.named_parameters(), before, after, strict=True):
        assert_close(of_other, moved(name, gradient))


@given(calls(), st.integers(1, 2))
def test_a_padded_heads_gradient_is_exactly_zero(call, more):
    layer, x, context, options = call
    h, g, _ = layer.layout
    wide = pad_heads(layer, h + more * (h // g))
    if "bias" in options:
        options["bias"] = torch.randn(wide.layout.num_heads, *options["bias"].shape[1:], dtype=torch.float64)
    upstream = torch.randn(*x.shape[:2], wide.out_proj.out_features, dtype=torch.float64)
    report = gradient_report(wide, lambda: (wide(x, context, **options) * upstream).sum())
    for row in report.heads:
        if row.head >= (h if row.part in "qo" else g):
            assert row.norm == 0 and row.reason.startswith("inert: its rows of v and columns of out_proj")


# The report: how much


def sample(**options):
    return MultiHeadAttention(s.e, s.h, head_dim=s.d, **options)


def tokens(n=s.n, e=s.e):
    return torch.randn(s.b, n, e)


@pytest.mark.parametrize(
    "options, m",
    [({}, None), ({"num_kv_heads": s.g, "bias": False}, None), ({"num_kv_heads": s.g, "context_dim": 11}, s.m)],
)
def test_each_row_is_the_norm_of_its_slice(options, m):
    layer, x = sample(**options).double(), tokens().double()
    context = None if m is None else tokens(m, 11).double()
    loss = layer(x, context).square().mean()
    report = gradient_report(layer, loss)
    loss.backward()
    h, g, d = layer.layout
    kv, above = (layer.context_proj, 0) if m else (layer.in_proj, h * d)
    first = {"q": (layer.in_proj, 0), "k": (kv, above), "v": (kv, above + g * d)}
    assert [(row.part, row.head) for row in report.heads] == [
        (part, i) for part, count in zip("qkvo", (h, g, g, h)) for i in range(count)
    ]
    for row in report.heads:
        if row.part == "o":
            own = layer.out_proj.weight.grad[:, row.head * d : (row.head + 1) * d]
        else:
            proj, start = first[row.part]
            rows = slice(start + row.head * d, start + (row.head + 1) * d)
            own = torch.cat([p.grad[rows].flatten() for p in proj.parameters()])
        assert row.norm == pytest.approx(own.norm().item(), rel=1e-12) and row.reason is None
    for row, (name, p) in zip(report.parameters, layer.named_parameters(), strict=True):
        assert row.name == name and row.norm == pytest.approx(p.grad.norm().item(), rel=1e-12)
    assert report.silent == report.not_finite == ()


def test_two_layers_are_told_apart_and_other_modules_are_reported_too():
    net = nn.Sequential(nn.Linear(s.e, s.e), sample(), nn.BatchNorm1d(s.n), sample())
    report = gradient_report(net, lambda: net(tokens()).square().mean())
    assert {row.name for row in report.heads} == {"1", "3"} and len(report.heads) == 2 * 4 * s.h
    assert [row.name for row in report.parameters] == [name for name, _ in net.named_parameters()]
    text = str(report)
    assert all(f"\n{name}\n" in f"\n{text}" for name in "13") and "2.weight" in text


def test_sparse_and_complex_gradients_are_measured():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(7, 3, sparse=True)
            self.turn = nn.Parameter(torch.randn(3, dtype=torch.cfloat))

    odd = Odd()
    report = gradient_report(odd, lambda: (odd.table(torch.tensor([1, 1, 4])) * odd.turn).abs().sum())
    (odd.table(torch.tensor([1, 1, 4])) * odd.turn).abs().sum().backward()
    for row, p in zip(report.parameters, odd.parameters()):
        assert row.norm == pytest.approx(p.grad.to_dense().norm().item(), rel=1e-6)


def test_an_infinite_gradient_is_not_finite_either():
    module = nn.ParameterList([torch.tensor([0.0, 1.0, 4.0])])
    report = gradient_report(module, lambda: module[0].sqrt().sum())
    assert [row.reason for row in report.not_finite] == ["not finite: 1 of 3"]


def test_a_gradient_that_is_not_finite_is_named_and_counted():
    def poisoned(q, k, v, **options):
        return torch.cat([fused_attend(q, k, v)[:, :-1], (q[:, -1:] - q[:, -1:]).sqrt()], dim=1)  # 0 · inf

    layer, x = sample(attend=poisoned), tokens()
    report = gradient_report(layer, lambda: layer(x).sum())
    rows = s.d * s.e + s.d
    assert [(row.part, row.head) for row in report.not_finite[:-2]] == [("q", s.h - 1)]
    assert report.not_finite[0].reason == f"not finite: {rows} of {rows}"
    assert [row.name for row in report.not_finite[-2:]] == ["in_proj.weight", "in_proj.bias"]
    assert report.not_finite[-2].reason == f"not finite: {s.d * s.e} of {3 * s.h * s.d * s.e}"
    # k and v of that head got nothing, and o did: its output is 0
    assert {(row.part, row.head) for row in report.silent} == {(part, s.h - 1) for part in "kvo"}


# The report: why nothing came


def reasons(layer, loss):
    "For each silent part of a head, as in v1, the reason."
    return {f"{row.part}{row.head}": row.reason for row in gradient_report(layer, loss).silent if row.part}


def parts(*names, heads=range(s.h)):
    return {f"{part}{i}" for name in names for part in name for i in heads}


def plugged(change, head=1):
    "A layer whose head 1 has its output changed."

    def attend(q, k, v, **options):
        z = plain_attention(q, k, v, **options)
        return torch.cat([z[:, :head], change(z[:, head])[:, None], z[:, head + 1 :]], dim=1)

    return sample(attend=attend)


def in_place(write):
    "A layer into whose merged heads a hook writes."

    def hook(proj, args):
        write(args[0].unflatten(-1, (s.h, s.d))[:, :, 1])

    layer = sample(attend=plain_attention)
    layer.out_proj.register_forward_pre_hook(hook)
    return layer


def under_no_grad(z):
    with torch.no_grad():
        return z * 1


CUTS = {
    "detached at": [
        lambda z: z.detach(),
        lambda z: z.data,
        lambda z: z.clone().detach_(),
        under_no_grad,
        lambda z: torch.as_tensor(z).detach().mul(2),
        lambda z: torch.tensor(z.detach()),
        lambda z: torch.view_as_complex(z.unflatten(-1, (-1, 2))).detach().real.repeat(1, 1, 2),
    ],
    "overwritten at": [
        lambda z: z.zero_(),
        lambda z: z.fill_(0.0),
        lambda z: z.copy_(torch.zeros(s.d)),
        lambda z: z.__setitem__(..., 0.0),
        lambda z: z.__setitem__((slice(None), 0), 3.0),
    ],
}


# torch's advice on `torch.tensor(z)`, one of the cuts: people write it all the same
@pytest.mark.filterwarnings("ignore:To copy construct from a tensor:UserWarning")
@pytest.mark.parametrize("cut", CUTS["detached at"])
def test_a_detached_path_is_named_with_its_line(cut):
    layer, x = plugged(cut), tokens()
    found = reasons(layer, lambda: layer(x).square().mean())
    assert found.keys() == parts("qkv", heads=[1])
    line = under_no_grad.__code__.co_firstlineno + 2 if cut is under_no_grad else cut.__code__.co_firstlineno
    name = "under_no_grad" if cut is under_no_grad else "<lambda>"
    assert all(why.startswith(f"detached at {name}, line {line} of test_gradients.py: ") for why in found.values())


@pytest.mark.parametrize("write", CUTS["overwritten at"][:-1])
def test_an_overwritten_path_is_named_with_its_line(write):
    layer, x = in_place(write), tokens()
    found = reasons(layer, lambda: layer(x).square().mean())
    assert found.keys() == parts("qkvo", heads=[1])
    where = f"overwritten at <lambda>, line {write.__code__.co_firstlineno} of test_gradients.py: "
    assert all(why.startswith(where) for why in found.values())


def test_a_write_that_leaves_a_path_is_none():
    layer, x = in_place(CUTS["overwritten at"][-1]), tokens()  # one token of five is overwritten
    assert reasons(layer, lambda: layer(x).square().mean()) == {}


def test_a_write_through_another_view_of_the_memory_is_found():
    layer, x = sample(attend=plain_attention), tokens()

    def write(proj, args):
        flat = args[0].view(-1)
        flat.view(s.b, s.n, s.h, s.d)[..., 1, :] = torch.zeros(s.d)

    layer.out_proj.register_forward_pre_hook(write)
    found = reasons(layer, lambda: layer(x).sum())
    assert found.keys() == parts("qkvo", heads=[1])
    assert all("overwritten at write" in why for why in found.values())


def test_numbers_that_come_by_a_write_are_followed():
    def attend(q, k, v, **options):
        z = plain_attention(q, k, v, **options)
        out = torch.empty_like(z)
        for i in range(s.h):
            out[:, i] = z[:, i].detach() if i == 1 else z[:, i]
        return out

    layer, x = sample(attend=attend), tokens()
    found = reasons(layer, lambda: layer(x).square().mean())
    assert found.keys() == parts("qkv", heads=[1]) and all("z[:, i].detach()" in why for why in found.values())


def test_a_frozen_head_says_so():
    layer = sample()
    layer.in_proj.requires_grad_(False)
    report = gradient_report(layer, layer(tokens()).sum())
    assert {row.reason for row in report.silent} == {"frozen: requires_grad is False"}
    assert {row.name for row in report.silent if row.part is None} == {"in_proj.weight", "in_proj.bias"}
    assert all(row.norm is None for row in report.silent)
    layer.in_proj.bias.requires_grad_(True)  # half of a head's rows are trained: they are measured
    layer.out_proj.requires_grad_(False)
    found = reasons(layer, layer(tokens()).square().sum())
    assert found.keys() == parts("o")
    hidden = torch.zeros(s.n, s.n, dtype=torch.bool)
    found = reasons(layer, lambda: layer(tokens(), mask=hidden).sum())
    assert found["q0"].startswith("masked everywhere") and found["o0"].startswith("frozen")


def test_a_loss_without_a_graph_says_so():
    layer, x = sample(), tokens()
    with torch.no_grad():
        loss = layer(x).sum()
    why = "no grad_fn: the loss has no graph"
    hint = "; pass the loss as a function, and the report looks where"
    assert set(reasons(layer, loss).values()) == {why + hint}
    assert set(reasons(layer, lambda: torch.zeros(())).values()) == {why}
    found = reasons(layer, lambda: under_no_grad(layer(x)).sum())  # and where, if there is a place
    assert all("detached at under_no_grad" in reason for reason in found.values())


def test_what_the_loss_does_not_use_says_so():
    layer, x = sample(), tokens().requires_grad_()
    assert set(reasons(layer, lambda: x.sum()).values()) == {"not used by this loss"}
    found = gradient_report(nn.ModuleList([layer, sample()]), lambda: layer(x).square().mean())
    assert {row.name.split(".")[0] for row in found.silent} == {"1"}


def test_a_path_that_carries_zero_says_so():
    layer, x = plugged(torch.round), tokens()
    found = reasons(layer, lambda: layer(x).square().mean())
    assert found.keys() >= parts("qkv", heads=[1]) and found["v1"] == "zero on every path"
    assert reasons(layer, layer(x).square().mean())["v1"].startswith("zero on every path; pass the loss as a function")


def hiding(kind):
    "Four ways to hide every key from head 1, or from all heads."
    grid = torch.ones(s.h, s.n, s.n, dtype=torch.bool)
    grid[1] = False
    one = {"mask": {"mask": grid}, "bias": {"bias": torch.zeros(s.h, s.n, s.n).masked_fill(~grid, -torch.inf)}}
    key_by_key = torch.arange(s.n) > 0
    every = {
        "padding": {"key_mask": torch.zeros(s.b, s.n, dtype=torch.bool)},
        "together": {"mask": key_by_key, "key_mask": ~key_by_key.expand(s.b, -1)},
        "causal": {"is_causal": True, "mask": torch.ones(s.n, s.n, dtype=torch.bool).triu(1)},
    }
    return (one[kind], [1]) if kind in one else (every[kind], range(s.h))


@pytest.mark.parametrize("kind", ["mask", "bias", "padding", "together", "causal"])
def test_a_head_that_is_masked_everywhere_says_so(kind):
    options, heads = hiding(kind)
    layer, x = sample(), tokens()
    found = reasons(layer, lambda: layer(x, **options).square().mean())
    assert found.keys() == parts("qkvo", heads=heads)
    assert {why.split(":")[0] for why in found.values()} == {"masked everywhere"}
    # in one of two calls it sees something: then it is not silent, or silent for another reason
    assert reasons(layer, lambda: (layer(x, **options) + layer(x)).square().mean()) == {}
    found = reasons(layer, lambda: (layer(x, **options) + layer(x).detach()).square().mean())
    assert all(found[f"{part}{i}"].startswith("detached at") for part in "qkvo" for i in heads)


def test_shared_keys_are_silent_only_if_all_their_queries_are():
    layer, x = sample(num_kv_heads=s.g), tokens()
    grid = torch.ones(s.h, s.n, s.n, dtype=torch.bool)
    grid[1:4] = False  # of groups 0 1, 2 3 and 4 5
    found = reasons(layer, lambda: layer(x, mask=grid).square().mean())
    assert found.keys() == parts("qo", heads=[1, 2, 3]) | parts("kv", heads=[1])
    assert {why.split(":")[0] for why in found.values()} == {"masked everywhere"}


def test_a_closed_gate_says_so():
    layer, x = plugged(lambda z: z * 0.0), tokens()
    found = reasons(layer, lambda: layer(x, bias=-torch.ones(s.n, s.n)).square().mean())  # hides nothing
    assert found.keys() == parts("qkvo", heads=[1])
    assert {why.split(":")[0] for why in found.values()} == {"gate closed"}


@pytest.mark.parametrize("what, silent", [(["v"], "qko"), (["o"], "qkv"), (["v", "o"], "qkvo")])
def test_a_head_of_zeros_says_of_what(what, silent):
    layer, x = sample(), tokens()
    with torch.no_grad():
        if "v" in what:
            layer.in_proj.weight[layer.layout.rows("v", 1)] = 0
        if "o" in what:
            layer.out_proj.weight[:, s.d : 2 * s.d] = 0
    found = reasons(layer, lambda: layer(x).square().mean())
    names = {"v": "rows of v", "o": "columns of out_proj"}
    assert found.keys() == parts(silent, heads=[1])
    assert set(found.values()) == {f"inert: its {' and '.join(names[part] for part in what)} are 0"}


def test_a_parameter_of_silent_heads_has_their_reason():
    layer, x = sample(), tokens()
    hidden = torch.zeros(s.n, s.n, dtype=torch.bool)
    report = gradient_report(layer, lambda: (layer(x, mask=hidden) - 1).square().mean())
    silent = {row.name: row.reason.split(":")[0] for row in report.silent if row.part is None}
    assert silent == {name: "masked everywhere" for name in ("in_proj.weight", "in_proj.bias", "out_proj.weight")}


def test_a_call_that_takes_only_a_shape_is_no_cut():
    layer, x = plugged(lambda z: z.round() + torch.zeros_like(z) + z.new_ones(1)), tokens()
    assert reasons(layer, lambda: layer(x).square().mean())["v1"] == "zero on every path"


# A detach that only writes a log, or that cuts another way than the head's own, must not be named as the reason. In
# each of these a head is silent for another reason, a closed gate or a rounding, and a detach stands near by.


def test_a_detached_number_for_a_log_is_not_blamed_for_a_closed_gate():
    every_second_head_closed = torch.tensor([1.0, 0.0]).repeat(s.h // 2).view(-1, 1, 1)
    log = []

    def attend(q, k, v, **options):
        log.append(q.detach().norm().item())
        return plain_attention(q, k, v, **options) * every_second_head_closed

    layer, x = sample(attend=attend), tokens()
    found = reasons(layer, lambda: layer(x).square().mean())
    assert log and found.keys() == parts("qkvo", heads=range(1, s.h, 2))
    assert {why.split(":")[0] for why in found.values()} == {"gate closed"}


def test_a_detached_number_that_the_loss_uses_is_not_blamed_for_a_closed_gate():
    every_second_head_closed = torch.tensor([1.0, 0.0]).repeat(s.h // 2).view(-1, 1, 1)

    def attend(q, k, v, **options):
        shift = (q * k * v).mean().detach()  # comes to the loss beside the head's own way
        return plain_attention(q, k, v + shift, **options) * every_second_head_closed

    layer, x = sample(attend=attend), tokens()
    found = reasons(layer, lambda: layer(x).square().mean())
    assert {why.split(":")[0] for why in found.values()} == {"gate closed"}


def test_a_log_of_the_loss_is_not_blamed_for_a_rounding():
    layer, x, log = plugged(torch.round), tokens(), []

    def logged():
        loss = layer(x).square().mean()
        log.append(layer.in_proj.weight.detach().norm() + loss.detach())
        return loss

    assert reasons(layer, logged)["v1"] == "zero on every path" and log


def test_a_cut_of_another_head_is_not_blamed_for_a_rounding():
    def attend(q, k, v, **options):
        z = plain_attention(q, k, v, **options)
        shift = z[:, :1].detach().mean()  # of head 0, while head 1 is rounded
        return torch.cat([z[:, :1] + shift, z[:, 1:2].round(), z[:, 2:]], dim=1)

    layer, x = sample(attend=attend), tokens()
    assert reasons(layer, lambda: layer(x).square().mean())["v1"] == "zero on every path"


def test_of_two_cuts_the_last_is_named():
    def stable(q, k, v, **options):
        logits = q @ k.mT
        powers = (logits - logits.amax(-1, keepdim=True).detach()).exp()  # cuts one of two ways
        z = powers / powers.sum(-1, keepdim=True) @ v
        return torch.cat([z[:, :1], under_no_grad(z[:, 1:2]), z[:, 2:]], dim=1)

    layer, x = sample(attend=stable), tokens()
    found = reasons(layer, lambda: layer(x).square().mean())
    assert found.keys() == parts("qkv", heads=[1])
    assert all("detached at under_no_grad" in why for why in found.values())
    # and of two in a row the one that was on the head's way: nothing could come through the other
    layer.attend = plugged(lambda z: under_no_grad(z.detach())).attend
    assert all("detached at <lambda>" in why for why in reasons(layer, lambda: layer(x).sum()).values())


def test_only_torch_itself_is_passed_over_on_the_way_to_the_line():
    folder = Path(torch.__file__).parent
    for file, named in ((folder / "nowhere.py", "<lambda>"), (f"{folder}vision/rope.py", "turn")):
        space = {}
        exec(compile("def turn(z):\n    return z.detach()", file, "exec"), space)
        layer, x = plugged(lambda z: space["turn"](z)), tokens()
        found = reasons(layer, lambda: layer(x).sum())
        assert all(why.startswith(f"detached at {named}, line ") for why in found.values())


class Kernel(torch.autograd.Function):
    "A kernel of somebody's own, of which torch sees nothing but what comes out."

    @staticmethod
    def forward(ctx, q, k, v):
        ctx.save_for_backward(q, k, v)
        return torch.from_numpy(plain_attention(q, k, v).numpy())

    @staticmethod
    def backward(ctx, upstream):
        with torch.enable_grad():
            leaves = [t.detach().requires_grad_() for t in ctx.saved_tensors]
            return torch.autograd.grad(plain_attention(*leaves), leaves, upstream)


def test_a_cut_before_a_custom_function_is_found():
    layer, x = sample(attend=lambda q, k, v, **options: Kernel.apply(q, k.detach(), v)), tokens()
    found = reasons(layer, lambda: layer(x).square().mean())
    assert found.keys() == parts("k") and all("k.detach()" in why for why in found.values())


def test_checkpointing_that_cuts_is_found_and_the_other_kind_cuts_nothing():
    net, x = nn.Sequential(sample(), nn.Linear(s.e, 2)), tokens()

    def loss(reentrant):
        return net[1](checkpoint(net[0], x, use_reentrant=reentrant)).square().mean()

    with pytest.warns(UserWarning, match="None of the inputs"):
        report = gradient_report(net, lambda: loss(True))
    assert len(report.silent) == 4 * s.h + 4
    assert all("detached at loss" in row.reason for row in report.silent)
    assert gradient_report(net, lambda: loss(False)).silent == ()
    x.requires_grad_()  # now the way back leads through it, and torch.autograd.grad would find nothing there
    with pytest.raises(ValueError, match="use_reentrant=False"):
        gradient_report(net, lambda: loss(True))


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
def test_views_without_a_way_back_are_cuts_or_do_no_harm(guard):
    def logged(q, k, v, **options):
        with guard():
            v[:, 1].norm(), q[:, 2].mul(2.0)
        return plain_attention(q, k, v, **options)

    def kept(q, k, v, **options):
        with guard():
            old = v[:, 1:2] * 0.9
        return plain_attention(q, k, torch.cat([v[:, :1], old.clone(), v[:, 2:]], dim=1), **options)

    x = tokens()
    for attend, silent in ((logged, set()), (kept, {("v", 1)})):
        layer = sample(attend=attend)
        report = gradient_report(layer, lambda layer=layer: layer(x).square().sum())
        assert {(row.part, row.head) for row in report.silent} == silent
        assert all("v[:, 1:2]" in row.reason for row in report.silent)


def test_a_layer_with_another_forward_is_reported_too():
    class Plain(StackedProjections):
        def forward(self, tokens, *, sharpness):
            q, k, v = self.in_proj(tokens).unflatten(-1, (-1, s.d)).transpose(1, 2).split(s.h, dim=1)
            z = plain_attention(q * sharpness, k, v) * torch.tensor([1.0, 0.0]).repeat(s.h // 2).view(-1, 1, 1)
            return self.out_proj(z.transpose(1, 2).flatten(2))

    layer, x = Plain(s.e, sample().layout, s.e, True, None), tokens()
    found = reasons(layer, lambda: layer(x, sharpness=2.0).sum())
    assert found.keys() == parts("qkvo", heads=[1, 3, 5])
    assert {why.split(":")[0] for why in found.values()} == {"gate closed"}


def test_the_printed_report_has_a_line_per_head_and_every_reason_once():
    layer, x = plugged(lambda z: z.detach()), tokens()
    lines = str(gradient_report(layer, lambda: layer(x).square().mean())).split("\n")
    assert lines[:2] == ["the layer", "  head        q        k        v        o"]
    assert [line.split()[0] for line in lines[2 : 2 + s.h]] == [str(i) for i in range(s.h)]
    assert lines[3].split()[1:4] == ["0", "0", "0"] and lines[3].split()[4] != "0"
    assert lines[-1] == "  q1 k1 v1" and lines[-2].startswith("detached at <lambda>")
    grouped = str(gradient_report(sample(num_kv_heads=1), torch.zeros(()))).split("\n")
    assert grouped[2].split() == ["0", "-", "-", "-", "-"] and grouped[3].split() == ["1", "-", "-"]


# The report: what it leaves behind, and what it refuses


class Restless(nn.Module):
    "Changes two buffers in every pass, one in place and one by a new tensor, and uses the random state."

    def __init__(self):
        super().__init__()
        self.layer = sample(dropout=0.5)
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(s.e))

    def forward(self, x):
        self.count += 1
        self.mean = self.mean * 0.9 + x.mean((0, 1))
        return self.layer(x)


def footprint(net):
    hooks = [len(m._forward_pre_hooks) + len(m._forward_hooks) + len(m._backward_hooks) for m in net.modules()]
    state = [t.clone() for t in (torch.get_rng_state(), *net.parameters(), *net.buffers())]
    return hooks, [p.grad for p in net.parameters()], [m.training for m in net.modules()], state


@pytest.mark.parametrize("fails", [False, True])
def test_the_report_leaves_everything_as_it_was(fails):
    net, x = Restless(), tokens()
    net.layer.eval()
    net.layer.train()
    before, mean = footprint(net), net.mean

    def loss():
        y = net(x)
        if fails:
            raise RuntimeError("the batch was empty")
        return y.square().mean()

    if fails:
        with pytest.raises(RuntimeError, match="the batch was empty"):
            gradient_report(net, loss)
    else:
        gradient_report(net, loss)
    after = footprint(net)
    assert before[:3] == after[:3] and all(map(torch.equal, before[3], after[3])) and net.mean is mean
    assert torch.overrides._get_current_function_mode() is None or "Cuts" not in str(
        torch.overrides._get_current_function_mode()
    )


def test_watching_changes_no_number():
    net, x = Restless(), tokens()
    losses = []

    def loss():
        losses.append(net(x).square().mean() + net(x).detach().mean())
        return losses[-1]

    state = torch.get_rng_state()
    gradient_report(net, loss)
    torch.set_rng_state(state)
    assert torch.equal(loss(), losses[0])


def test_the_graph_of_a_loss_that_was_given_is_kept():
    layer = sample()
    loss = layer(tokens()).square().mean()
    gradient_report(layer, loss)
    loss.backward()
    assert layer.in_proj.weight.grad is not None


@pytest.mark.parametrize(
    "module, loss, error, words",
    [
        (nn.ReLU(), torch.zeros(()), ValueError, "ReLU has no parameters"),
        (nn.Linear(2, 2), torch.zeros(3), ValueError, "shape (3,); gradients start from a scalar: take .sum()"),
        (nn.Linear(2, 2), lambda: torch.zeros(3, 1), ValueError, "shape (3, 1)"),
        (nn.Linear(2, 2), 0.5, TypeError, "got float"),
        (nn.Linear(2, 2), lambda: None, TypeError, "loss must be, or return, a tensor; got NoneType"),
    ],
)
def test_what_is_no_loss_is_refused(own_messages, module, loss, error, words):
    with pytest.raises(error) as raised:
        gradient_report(module, loss)
    assert words in str(raised.value)


# What is kept, and the way back


def test_memory_counts_once_and_known_memory_not_at_all():
    x, w = torch.randn(4, 5), torch.randn(5, 5, requires_grad=True)
    found = saved_tensors(lambda: (x @ w).sin(), [x, w])  # sin keeps the product
    assert [(t.function, t.shape, t.bytes) for t in found if t.bytes] == [("sin", (4, 5), 80)]
    assert sum(t.bytes for t in saved_tensors(lambda: (x @ w).sin())) == 80 + x.nbytes
    y = torch.randn(4, 6, requires_grad=True)
    found = saved_tensors(lambda: (y * 2).split(3, dim=1)[0].sin())  # a view keeps the whole
    assert [t.bytes for t in found] == [96] and found[0].shape == (4, 3) and found[0].dtype == torch.float32

    def twice():
        z = y * 2
        return z.sin() + z.cos()

    assert [(t.function, t.bytes) for t in saved_tensors(twice)] == [("sin", 96), ("cos", 0)]
    with torch.no_grad():
        assert saved_tensors(twice) == []


def test_freed_graphs_do_not_share_memory():
    x = torch.randn(100, requires_grad=True)

    def call():
        for _ in range(20):
            (x * 2).sin()  # dropped at once: its memory could be used again

    assert sum(t.bytes for t in saved_tensors(call)) == 20 * 400


def test_what_a_custom_function_keeps_is_named():
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x * 2

    x = torch.randn(3, requires_grad=True)
    assert [t.function for t in saved_tensors(lambda: Double.apply(x.exp()))] == ["exp", "autograd.Function"]


OPERATIONS = {
    "view": lambda x: x.view(6, 4),
    "transpose": lambda x: x.transpose(0, 1),
    "t": lambda x: x[0].t(),
    "select": lambda x: x[0],
    "slice": lambda x: x[:, 1:],
    "expand": lambda x: x[:, :, :1].expand(2, 3, 9),
    "split": lambda x: x.split([1, 2], dim=1)[1],
    "unbind": lambda x: x.unbind(0)[1],
    "permute": lambda x: x.permute(2, 0, 1),
    "unsqueeze": lambda x: x[None],
    "diagonal": lambda x: x.diagonal(),
    "alias": lambda x: torch.ops.aten._reshape_alias(x, [6, 4], [4, 1]),
    "clone": lambda x: x.clone(),
    "mul": lambda x: x * 2,
    "add": lambda x: x + 1,
    "softmax": lambda x: x.softmax(-1),
    "gelu": F.gelu,
    "cat": lambda x: torch.cat([x, x]),
    "index": lambda x: x[torch.tensor([1, 0])],
    "matmul": lambda x: x @ x.mT,
    "sum": lambda x: x.sum(),
    "masked_fill": lambda x: x.masked_fill(x > 0, 0.0),
    "half": lambda x: x.half(),
    "contiguous": lambda x: x.mT.contiguous(),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_step_is_a_view_where_memory_is_shared(name):
    x = torch.randn(2, 3, 4, requires_grad=True).clone()
    y = OPERATIONS[name](x)
    shared = y.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
    assert _is_view(y.grad_fn.name()) == shared


def test_the_graph_is_the_chain_of_grad_fns():
    w, x = torch.randn(3, 3, requires_grad=True), torch.randn(2, 3)
    y = x @ w
    nodes = backward_graph(y * y.sin(), {"w": w})  # y is met twice, and listed once
    assert [(node.name, node.next) for node in nodes] == [
        ("MulBackward0", (1, 2)),
        ("MmBackward0", (3,)),
        ("SinBackward0", (1,)),
        ("w", ()),
    ]
    assert backward_graph(y)[-1].name == "torch::autograd::AccumulateGrad"


@pytest.mark.parametrize("tensor", [torch.zeros(3), torch.zeros(3, requires_grad=True)])
def test_a_tensor_without_a_way_back_is_refused(tensor):
    with pytest.raises(ValueError, match="no grad_fn"):
        backward_graph(tensor)


# What users' models bring along


def test_a_gate_behind_the_layer_says_so():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.gate = sample(), nn.Parameter(torch.zeros(()))

        def forward(self, x):
            return x + self.gate.tanh() * self.layer(x)

    block, x = Block(), tokens()
    report = gradient_report(block, lambda: block(x).square().sum())
    assert len(report.silent) == 4 * s.h + 4  # the gate itself learns
    reasons = {row.reason.split(":")[0] for row in report.silent if row.name != "layer.out_proj.bias"}
    assert reasons == {"gate closed behind the layer"}


def test_a_loss_that_lost_its_graph_says_so_and_where():
    layer, x = sample(), tokens()
    report = gradient_report(layer, lambda: layer(x).detach().sum())
    assert all(row.reason.startswith("no grad_fn: the loss has no graph; detached at") for row in report.silent)


def test_buffers_come_back_and_a_pending_backward_pass_stays_valid():
    class Late(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.table = nn.BatchNorm1d(4), None
            self.register_buffer("late", None)

        def forward(self, x):
            self.late = torch.arange(3.0)
            return self.norm(x)

    module, x = Late(), torch.randn(6, 4)
    mean, loss = module.norm.running_mean.clone(), module.norm(x).square().sum()
    before = module.norm.running_mean.clone()
    gradient_report(module, lambda: module(x).square().sum())
    assert module.late is None and not torch.equal(mean, before)
    assert torch.equal(module.norm.running_mean, before)
    loss.backward()  # raises where the restoring counts as a write


# torch's kernel for CPUs has no rule for vmap, which then goes through it row by row
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.parametrize(
    "run",
    [
        lambda layer, x: torch.vmap(lambda one: layer(one[None])[0])(x),
        lambda layer, x: torch.compile(layer, backend="eager")(x),
    ],
    ids=["vmap", "compile"],
)
def test_transformed_calls_are_measured(run):
    layer, x = sample(), tokens()
    plain = gradient_report(layer, lambda: layer(x).square().sum())
    found = gradient_report(layer, lambda: run(layer, x).square().sum())
    assert [row.norm for row in found.heads] == pytest.approx([row.norm for row in plain.heads], rel=1e-4)


def test_heads_of_computed_weights_are_left_out_and_their_parameters_are_not():
    layer, x = sample(), tokens()
    nn.utils.parametrizations.weight_norm(layer.in_proj)
    report = gradient_report(layer, lambda: layer(x).square().sum())
    assert report.heads == () and report.silent == ()
    assert sum("original" in row.name for row in report.parameters) == 2


def test_a_graph_that_was_gone_through_already_does_no_harm():
    layer, x = sample(), tokens()

    def penalty():  # create_graph=True was forgotten
        leaf = x.clone().requires_grad_()
        return torch.autograd.grad(layer(leaf).sum(), leaf)[0].square().sum()

    assert all(row.reason.startswith("no grad_fn") for row in gradient_report(layer, penalty).silent)


# What the page says that the report does not see


def test_a_harmless_detach_beside_a_rounding_is_suspected():
    def rounded(q, k, v, **options):
        k = k / (1 + k.detach().abs().amax())
        return plain_attention(q, torch.round(8 * k), v, **options)

    layer, x = sample(attend=rounded), tokens()
    found = reasons(layer, lambda: layer(x).square().sum())
    assert found.keys() == parts("k") and all("k.detach()" in why for why in found.values())


@pytest.mark.parametrize("write", [lambda z: z.mul_(0), lambda z: z.masked_fill_(torch.tensor(True), 0.0)])
def test_a_head_multiplied_by_0_in_place_is_a_closed_gate(write):
    layer, x = in_place(write), tokens()
    found = reasons(layer, lambda: layer(x).square().sum())
    assert found.keys() == parts("qkvo", heads=[1])
    assert {why.split(":")[0] for why in found.values()} == {"gate closed"}


def test_an_input_of_0_is_a_closed_gate():
    layer = sample()
    found = reasons(layer, lambda: layer(torch.zeros(s.b, s.n, s.e)).sum())
    assert found.keys() == parts("qko")  # the values' bias learns
    assert {why.split(":")[0] for why in found.values()} == {"gate closed"}


def test_what_was_detached_before_names_no_line():
    x = tokens()
    old = torch.randn(s.b, 1, s.n, s.d)

    def recalled(q, k, v, **options):
        return plain_attention(q, k, torch.cat([v[:, :1], old, v[:, 2:]], dim=1), **options)

    layer = sample(attend=recalled)
    found = reasons(layer, lambda: layer(x).square().sum())
    assert found == {"v1": "zero on every path"}


def test_a_report_follows_values_of_an_input_and_a_width_of_their_own():
    layer = MultiHeadAttention(s.e, s.h, num_kv_heads=s.g, head_dim=s.d, value_dim=5, dtype=torch.float64)
    x, context, value = (torch.randn(s.b, n, s.e, dtype=torch.float64) for n in (s.n, s.m, s.m))
    report = gradient_report(layer, lambda: layer(x, context, value=value).square().sum())
    layer(x, context, value=value).square().sum().backward()
    assert not report.silent and len(report.heads) == 2 * s.h + 2 * s.g
    for row in report.heads:
        proj, at = layer.rows(row.part, row.head)
        own = [proj.weight.grad[:, at]] if row.part == "o" else [proj.weight.grad[at], proj.bias.grad[at]]
        wanted = torch.cat([t.flatten() for t in own]).norm().item()
        assert abs(row.norm - wanted) < 1e-9 * wanted
    mask = torch.ones(s.h, s.n, s.m, dtype=torch.bool)
    mask[1] = False
    found = {
        (row.part, row.head): row.reason
        for row in gradient_report(layer, lambda: layer(x, context, value=value, mask=mask).square().sum()).heads
        if row.reason
    }
    assert found.keys() == {("q", 1), ("o", 1)} and all("masked everywhere" in reason for reason in found.values())


class Shared(nn.Parameter):
    "What stands for a DTensor: the numbers of one device, and a way to gather all."

    def full_tensor(self):
        return self


@pytest.mark.usefixtures("own_messages")
def test_what_is_no_module_or_sharded_is_refused_before_the_loss():
    layer, asked = MultiHeadAttention(s.e, s.h, head_dim=s.d), []
    layer.out_proj.weight = Shared(layer.out_proj.weight.detach())
    for wrong, word in ((None, "NoneType"), (MultiHeadAttention, "type"), (layer, "out_proj.weight is sharded")):
        with refused(TypeError, word):
            gradient_report(wrong, lambda: asked.append(1))
    assert not asked
