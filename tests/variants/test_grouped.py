"""Grouped heads: copies exact, means by hand, folds under every option, turns that change nothing; what is refused."""

import copy
import itertools
import math
from functools import partial

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import nn
from torch.nn.utils import parametrize

import mha_book
from mha_book.heads.layer import MultiHeadAttention
from mha_book.instruments.testing import SIZES, reference_attention
from mha_book.kernels.backends import attention
from mha_book.plugs.logits import HeadTemperature, OutputGate, SinkAttention
from mha_book.variants import aligning, grouped
from mha_book.variants.aligning import align_kv_heads, mean_kv_heads, rotate_kv_heads
from mha_book.variants.grouped import folded_attend, repeat_kv_heads
from support.mutants import FOLDS as WRONG_FOLDS
from support.mutants import REPEATS, TURNS
from support.refusals import refused

s = SIZES
float64 = dict(dtype=torch.float64)
close = partial(torch.testing.assert_close, atol=1e-11, rtol=1e-11)


def build(g=s.g, h=s.h, **options):
    layer = MultiHeadAttention(s.e, h, num_kv_heads=g, head_dim=s.d, **(float64 | options))
    for p in layer.parameters():
        nn.init.normal_(p, std=0.5)
    return layer


def tokens(n=s.n, width=s.e, **options):
    return torch.randn(s.b, n, width, **(float64 | options))


def turns(count, width=s.d, **options):
    return torch.linalg.qr(torch.randn(count, width, width, **(float64 | options)))[0]


def scaled(q, k, *, offset):
    "A position plug that treats channels unlike."
    places = torch.arange(q.shape[2], dtype=q.dtype)[:, None] + 1
    return q * places**0.1, k * places**-0.1


KINDS = {
    "plain": (dict(), dict(is_causal=True)),
    "no biases": (dict(bias=False), dict(mask=torch.rand(s.h, s.n, s.n) < 0.7)),
    "out_dim": (dict(out_dim=13), dict(bias=torch.randn(s.n, **float64))),
    "context": (dict(), dict(context=tokens(s.m))),
    "context_dim": (dict(context_dim=11), dict(context=tokens(s.m, 11), is_causal=True)),
    "qk_norm": (dict(qk_norm=nn.RMSNorm), dict(is_causal=True)),
    "position": (dict(position=scaled), dict()),
    "window": (dict(attend=partial(attention, window=3, softcap=2.0)), dict()),
    "sinks": (dict(attend=SinkAttention(s.h, **float64)), dict(is_causal=True)),
    "temperatures": (dict(attend=HeadTemperature(s.h, **float64)), dict()),
    "gate": (dict(finish=OutputGate(s.e, s.h, head_dim=s.d, **float64)), dict(is_causal=True)),
    "folded": (dict(attend=folded_attend), dict(key_mask=torch.arange(s.n) < torch.tensor([[5], [3]]))),
}


# --- copies and means ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("g, wide", [(1, 6), (1, 3), (2, 6), (3, 6), (3, 3)])
def test_copies_compute_the_same_and_are_taken_back_to_the_bit(name, g, wide):
    options, call = KINDS[name]
    layer, x = build(g, **options), tokens()
    before = copy.deepcopy(layer.state_dict())
    new = repeat_kv_heads(layer, wide)
    assert tuple(new.layout) == (s.h, wide, s.d) and type(new) is type(layer)
    close(new(x, **call), layer(x, **call))
    close(new.attention_map(x, **call), layer.attention_map(x, **call))
    back = mean_kv_heads(new, g)
    assert back.state_dict().keys() == before.keys()
    for key, value in before.items():
        assert torch.equal(layer.state_dict()[key], value)  # the old layer is left as it is
        assert torch.equal(back.state_dict()[key], value)
    fresh = type(layer)(s.e, s.h, num_kv_heads=wide, head_dim=s.d, **(float64 | options))
    fresh.load_state_dict(new.state_dict())  # the shapes and counts are those of such a layer


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("r", [2, 3, 5, 7, 11])
def test_equal_heads_lose_no_bit_whatever_their_number(dtype, r):
    layer = MultiHeadAttention(s.e, r, num_kv_heads=1, head_dim=s.d, dtype=dtype)
    nn.init.normal_(layer.in_proj.weight)
    back = mean_kv_heads(repeat_kv_heads(layer, r), 1)
    assert all(map(torch.equal, back.parameters(), layer.parameters()))
    summed = sum(layer.in_proj.weight for _ in range(r)) / r
    if r == 11 and dtype != torch.float64:  # a plain mean would
        assert not torch.equal(summed, layer.in_proj.weight)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [dict(), dict(context_dim=11), dict(bias=False)])
@pytest.mark.parametrize("g, few", [(6, 3), (6, 2), (6, 1), (3, 1), (2, 2)])
def test_the_mean_is_that_of_a_loop_over_rows(g, few, options, dtype):
    layer = build(g, dtype=dtype, **options)
    new = mean_kv_heads(layer, few)
    old_proj, new_proj = (one.in_proj if one.context_proj is None else one.context_proj for one in (layer, new))
    skip = 0 if options.get("context_dim") else s.h * s.d  # query rows in front
    for name in ("weight", "bias"):
        old, got = (getattr(p, name) for p in (old_proj, new_proj))
        if old is None:
            assert got is None
            continue
        assert got.dtype == dtype and torch.equal(got[:skip], old[:skip])
        for part, j, row in itertools.product(range(2), range(few), range(s.d)):
            rows = [old[skip + (part * g + i) * s.d + row].double() for i in range(j * g // few, (j + 1) * g // few)]
            mean = sum(rows) / len(rows)
            wide = torch.promote_types(dtype, torch.float32)  # rounded once, from there
            allowed = 4 * torch.finfo(wide).eps * max(row.abs().max() for row in rows)
            if dtype != wide:
                allowed = allowed + torch.finfo(dtype).eps / 2 * mean.abs()
            assert ((got[skip + (part * few + j) * s.d + row].double() - mean).abs() <= allowed).all()
    for name, p in layer.named_parameters():
        if "out_proj" in name or (name.startswith("in_proj") and options.get("context_dim")):
            assert torch.equal(p, new.get_parameter(name))


def test_what_was_frozen_stays_frozen_and_modes_and_hooks_are_kept():
    layer = build().eval()
    layer.in_proj.weight.requires_grad_(False)
    for new in (
        repeat_kv_heads(layer, 6),
        mean_kv_heads(layer, 1),
        align_kv_heads(layer, 1),
        rotate_kv_heads(layer, turns(s.g)),
    ):
        assert not new.training and not new.in_proj.weight.requires_grad and new.in_proj.bias.requires_grad
        assert all(p.grad is None and p.is_leaf for p in new.parameters())
        assert new.in_proj.out_features == len(new.in_proj.weight) == len(new.in_proj.bias)
        assert new.in_proj.weight.data_ptr() != layer.in_proj.weight.data_ptr()


def test_a_shared_row_learns_the_sum_of_its_copies():
    layer, x = build(2), tokens()
    wide = repeat_kv_heads(layer, 6)
    for one in (layer, wide):
        one(x, is_causal=True).square().sum().backward()
    for name in ("weight", "bias"):
        shared, copies = (getattr(one.in_proj, name).grad[s.h * s.d :] for one in (layer, wide))
        close(shared, copies.unflatten(0, (2, 2, 3, s.d)).sum(2).flatten(0, 2), atol=1e-9)
    close(layer.out_proj.weight.grad, wide.out_proj.weight.grad, atol=1e-9)


# --- folds -----------------------------------------------------------------------------------------------------------

FOLDS = [
    dict(),
    dict(is_causal=True),
    dict(scale=-0.3),
    dict(mask=torch.rand(s.m) < 0.6),
    dict(mask=torch.rand(s.b, 1, 1, s.m) < 0.6, bias=torch.randn(s.m, **float64)),
    dict(mask=torch.rand(s.n, s.m) < 0.6),
    dict(mask=torch.rand(s.h, 1, s.m) < 0.6, is_causal=True),
    dict(bias=torch.randn(s.h, 1, 1, **float64), is_causal=True),
    dict(bias=torch.randn(1, 1, s.n, 1, **float64)),
    dict(mask=torch.zeros(s.b, 1, 1, s.m, dtype=torch.bool)),
    dict(mask=torch.tensor(True)),
]


@pytest.mark.parametrize("options", FOLDS, ids=range(len(FOLDS)))
@pytest.mark.parametrize("g", [1, 2, 3, 6])
@pytest.mark.parametrize("n, dv", [(1, s.d), (s.n, s.d), (s.n, s.dv)])
def test_folded_is_the_loop_and_its_gradients(g, n, dv, options):
    options = {
        name: t[..., :n, :] if isinstance(t, torch.Tensor) and t.dim() > 1 and t.shape[-2] == s.n else t
        for name, t in options.items()
    }
    inputs = [
        torch.randn(s.b, heads, length, width, **float64).requires_grad_()
        for heads, length, width in ((s.h, n, s.d), (g, s.m, s.d), (g, s.m, dv))
    ]
    out, exact = folded_attend(*inputs, **options), reference_attention(*inputs, **options)
    close(out, exact)
    upstream = torch.randn_like(out)
    got = torch.autograd.grad(out, inputs, upstream)
    if not exact.requires_grad:  # nobody sees anything
        assert all((t == 0).all() for t in got)
        return
    for mine, true in zip(got, torch.autograd.grad(exact, inputs, upstream)):
        close(mine, true)


@pytest.mark.parametrize(
    "options, folds",
    [
        (dict(), True),
        (dict(mask=torch.rand(s.b, 1, 1, s.m) < 0.6), True),
        (dict(bias=torch.randn(s.m)), True),
        (dict(is_causal=True), False),
        (dict(mask=torch.rand(s.n, s.m) < 0.6), False),
        (dict(bias=torch.randn(s.h, 1, 1)), False),
    ],
)
def test_it_folds_where_it_says_so_and_then_asks_no_kernel_for_groups(monkeypatch, options, folds):
    asked, plain = [], grouped.fused_attend

    def spy(q, k, v, **told):
        asked.append((q.shape, k.shape))
        return plain(q, k, v, **told)

    monkeypatch.setattr(grouped, "fused_attend", spy)
    q, k, v = torch.randn(s.b, s.h, s.n, s.d), *torch.randn(2, s.b, s.g, s.m, s.d)
    torch.testing.assert_close(folded_attend(q, k, v, **options), attention(q, k, v, **options))
    folded = torch.Size([s.b, s.g, s.n * s.h // s.g, s.d])
    assert asked == [(folded if folds else q.shape, k.shape)]
    folded_attend(q[:, :, :1], k, v, is_causal=True)  # one query at the end sees all keys
    assert asked[-1][0] == (s.b, s.g, s.h // s.g, s.d)


def test_folded_dropout_is_dropout():
    q, k, v = torch.zeros(1, 4, 1, 8), torch.zeros(1, 2, 1000, 8), torch.ones(1, 2, 1000, 8)
    torch.manual_seed(0)
    out = torch.stack([folded_attend(q, k, v, dropout_p=0.5) for _ in range(50)])
    assert abs(out.mean() - 1) < 6 * out.std() / math.sqrt(out[..., 0].numel()) and out.std() > 0


def test_an_empty_batch_and_bad_heads(own_messages):
    assert folded_attend(torch.randn(0, 4, 3, 8), *torch.randn(2, 0, 2, 5, 8)).shape == (0, 4, 3, 8)
    with refused(ValueError, "6 query heads", "4 key-value heads"):
        folded_attend(torch.randn(1, 6, 3, 8), *torch.randn(2, 1, 4, 5, 8))
    with refused(TypeError, "True = may look"):
        folded_attend(torch.randn(1, 6, 3, 8), *torch.randn(2, 1, 3, 5, 8), mask=torch.ones(5))


# --- turns -----------------------------------------------------------------------------------------------------------

FREE = [name for name in KINDS if name not in ("qk_norm", "position", "gate")]


@pytest.mark.parametrize("name", FREE)
@pytest.mark.parametrize("g", [1, 3, 6])
@pytest.mark.parametrize("parts", ["k", "v", "kv"])
def test_turned_heads_compute_the_same(name, g, parts):
    options, call = KINDS[name]
    layer, x = build(g, **options), tokens()
    state = copy.deepcopy(layer.state_dict())
    new = rotate_kv_heads(layer, turns(g) if "k" in parts else None, turns(g) if "v" in parts else None)
    close(new(x, **call), layer(x, **call), atol=1e-10)
    assert all(torch.equal(value, layer.state_dict()[key]) for key, value in state.items())
    proj, skip = (new.context_proj, 0) if layer.context_proj is not None else (new.in_proj, s.h * s.d)
    old = layer.in_proj if layer.context_proj is None else layer.context_proj
    keys, values = (slice(skip, skip + g * s.d), slice(skip + g * s.d, None))
    assert torch.equal(proj.weight[keys], old.weight[keys]) == ("k" not in parts)
    assert torch.equal(proj.weight[values], old.weight[values]) == ("v" not in parts)
    assert torch.equal(new.out_proj.weight, layer.out_proj.weight) == ("v" not in parts)


@pytest.mark.parametrize("name", FREE)
@pytest.mark.parametrize("g, few", [(6, 3), (6, 1), (3, 1), (3, 3)])
@pytest.mark.parametrize("given", [False, True])
def test_aligned_heads_compute_the_same_and_have_a_nearer_mean(name, g, few, given):
    options, call = KINDS[name]
    layer, x = build(g, **options), tokens()
    proj, _ = layer.rows("k", 0)
    sample = torch.randn(3, 40, proj.in_features, **float64) if given else None
    new = align_kv_heads(layer, few, sample)
    close(new(x, **call), layer(x, **call), atol=1e-10)

    def spread(one):
        groups = [part.unflatten(0, (few, g // few)) for part in aligning._what_heads_say(one, sample)]
        return [(part - part.mean(1, keepdim=True)).square().sum().item() for part in groups]

    for before, after in zip(spread(layer), spread(new)):
        assert after < 0.95 * before if few < g else after < 1e-20


@settings(deadline=None, max_examples=30)
@given(
    g=st.sampled_from([2, 3, 4, 6]),
    r=st.integers(1, 3),
    d=st.integers(1, 9),
    seed=st.integers(0, 2**31),
    bias=st.booleans(),
    context=st.booleans(),
    part=st.sampled_from(["k", "v", "kv"]),
)
def test_heads_that_were_only_turned_are_found_again(g, r, d, seed, bias, context, part):
    torch.manual_seed(seed)
    width = 11 if context else None
    layer = MultiHeadAttention(s.e, g * r, num_kv_heads=1, head_dim=d, bias=bias, context_dim=width, **float64)
    for p in layer.parameters():
        nn.init.normal_(p)
    x, c = tokens(), tokens(s.m, 11) if context else None
    copies = repeat_kv_heads(layer, g)
    hidden = rotate_kv_heads(copies, *(turns(g, d) if name in part else None for name in "kv"))
    found = mean_kv_heads(align_kv_heads(hidden, 1, parts=part), 1)
    close(found(x, c), layer(x, c), atol=1e-8, rtol=1e-8)


def test_the_first_rotation_is_the_nearest_of_many():
    torch.manual_seed(0)
    target, head = torch.randn(2, 4, 30, **float64)
    best = aligning._nearest_rotations((target @ head.T)[None])[0]
    close(best @ best.T, torch.eye(4, **float64))
    distance = (best @ head - target).norm()
    assert all((other @ head - target).norm() >= distance for other in turns(500, 4))
    for angle in (-0.05, 0.05):  # and no small turn improves it
        small = torch.eye(4, **float64)
        small[0, 0] = small[1, 1] = math.cos(angle)
        small[0, 1], small[1, 0] = -math.sin(angle), math.sin(angle)
        assert (small @ best @ head - target).norm() > distance


def test_more_rounds_bring_heads_no_further_apart():
    heads = torch.randn(5, 6, 20, **float64)

    def spread(rounds):
        turned = aligning._towards_mean(heads, rounds) @ heads
        return (turned - turned.mean(0)).square().sum().item()

    found = [spread(rounds) for rounds in (0, 1, 2, 5, 10, 30)]
    assert all(later <= sooner + 1e-9 for sooner, later in zip(found, found[1:]))
    assert found[-2] < 0.99 * found[0] and found[-2] < 1.02 * found[-1]
    close(aligning._towards_mean(heads), aligning._towards_mean(heads, 10))


@pytest.mark.parametrize("options", [dict(), dict(context_dim=11), dict(bias=False)])
def test_heads_are_compared_by_what_they_say(options):
    layer = build(3, **options)
    context = tokens(s.m, 11) if options.get("context_dim") else None
    x = tokens(s.m) if context is None else context
    _, k, v = layer.qkv(x if context is None else tokens(), context)
    k, v = (t.transpose(0, 1).flatten(1, 2).mT for t in (k, v))  # g d (b m)
    keys, values = aligning._what_heads_say(layer, x)
    close(keys, k - k.mean(2, keepdim=True))
    close(values, v)
    keys, values = aligning._what_heads_say(layer, None)  # the rows, and a value's bias as one more column
    proj, start = layer.rows("k", 0)[0], layer.rows("k", 0)[1].start
    rows = proj.weight[start:].unflatten(0, (2, 3, s.d))
    assert torch.equal(keys, rows[0])
    bias = () if proj.bias is None else (proj.bias[start:].view(2, 3, s.d, 1)[1],)
    assert torch.equal(values, torch.cat([rows[1], *bias], dim=2))


def test_keys_are_compared_without_their_mean_and_padding_is_the_callers_affair():
    layer, x = build(6), tokens(50)
    moved = copy.deepcopy(layer)
    with torch.no_grad():  # a constant in the keys: no softmax sees it, and no alignment
        moved.in_proj.bias[s.h * s.d : 2 * s.h * s.d] += 100 * torch.randn(s.h * s.d, **float64)
    for one, other in zip(aligning._what_heads_say(layer, x), aligning._what_heads_say(moved, x)):
        close(one, other, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_is_turned_in_float32_and_kept(dtype):
    exact = build(6)
    layer, x = copy.deepcopy(exact).to(dtype), tokens().to(dtype)
    eps = torch.finfo(dtype).eps
    turned = rotate_kv_heads(layer, turns(6, dtype=torch.float32), turns(6))
    for new in (align_kv_heads(layer, 2), align_kv_heads(layer, 2, x), turned):
        assert {p.dtype for p in new.parameters()} == {dtype}
        assert (new(x) - layer(x)).abs().max() < 60 * eps * layer(x).abs().max()


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "act, error, words",
    [
        (lambda: mean_kv_heads(build(6), 4), ValueError, ("6 key-value heads", "into 4", "must divide")),
        (lambda: mean_kv_heads(build(3), 6), ValueError, ("3 key-value heads", "into 6")),
        (lambda: mean_kv_heads(build(6), 2.0), TypeError, ("num_kv_heads", "2.0")),
        (lambda: mean_kv_heads(build(6), True), TypeError, ("num_kv_heads", "True")),
        (lambda: mean_kv_heads(build(6), 0), ValueError, ("num_kv_heads", "0")),
        (lambda: repeat_kv_heads(build(3), 4), ValueError, ("num_kv_heads 4", "3 key-value heads", "6 query heads")),
        (lambda: repeat_kv_heads(build(2), 4), ValueError, ("num_kv_heads 4", "divide its 6 query heads")),
        (lambda: repeat_kv_heads(build(3), 12), ValueError, ("num_kv_heads 12",)),
        (lambda: repeat_kv_heads(build(3), -6), ValueError, ("num_kv_heads",)),
        (lambda: align_kv_heads(build(6), 4), ValueError, ("6 key-value heads", "into 4")),
        (lambda: align_kv_heads(build(6), 3, parts="q"), ValueError, ('"k", "v" or "kv"', "'q'")),
        (lambda: align_kv_heads(build(6), 3, parts=""), ValueError, ("parts",)),
        (lambda: align_kv_heads(build(6), 3, tokens(width=7)), ValueError, ("x has shape", "width 20")),
        (lambda: align_kv_heads(build(6), 3, tokens(0)), ValueError, ("x has shape", "at least one")),
        (lambda: align_kv_heads(build(6), 3, torch.randn(s.e)), ValueError, ("x has shape",)),
        (lambda: align_kv_heads(build(6, context_dim=11), 3, tokens()), ValueError, ("width 11",)),
        (lambda: align_kv_heads(build(6), 3, tokens(device="meta")), ValueError, ("device differs", "x.to('cpu')")),
        (lambda: align_kv_heads(build(6, qk_norm=nn.RMSNorm), 3), ValueError, ("qk_norm", "values can")),
        (lambda: align_kv_heads(build(6, position=scaled), 3), ValueError, ("position", "values can")),
        (lambda: align_kv_heads(build(6, finish=torch.mul), 3), ValueError, ("finish", "keys can")),
        (lambda: rotate_kv_heads(build(), turns(6)), ValueError, ("keys of shape (6, 8, 8)", "(3, 8, 8)")),
        (lambda: rotate_kv_heads(build(), None, turns(3, 9)), ValueError, ("values of shape (3, 9, 9)",)),
        (lambda: rotate_kv_heads(build(), 2 * turns(3)), ValueError, ("keys must be orthogonal",)),
        (lambda: rotate_kv_heads(build(), None, turns(3) * math.nan), ValueError, ("values must be orthogonal",)),
        (
            lambda: rotate_kv_heads(build(), torch.eye(8, dtype=torch.long).expand(3, 8, 8)),
            TypeError,
            ("keys", "int64"),
        ),
        (lambda: rotate_kv_heads(build(), [1.0]), TypeError, ("keys", "[1.0]")),
        (lambda: rotate_kv_heads(build(), turns(3, device="cpu").to("meta")), ValueError, ("on meta", "on cpu")),
    ],
)
def test_what_is_refused_says_what_would_be_right(own_messages, act, error, words):
    with refused(error, *words):
        act()


def test_refused_parts_can_be_left_out():
    for options in (dict(qk_norm=nn.RMSNorm), dict(position=scaled)):
        layer, x = build(6, **options), tokens()
        close(align_kv_heads(layer, 2, parts="v")(x), layer(x), atol=1e-10)
    layer, x = build(6, finish=OutputGate(s.e, s.h, head_dim=s.d, **float64)), tokens()
    close(align_kv_heads(layer, 2, parts="k")(x), layer(x), atol=1e-10)


@pytest.mark.parametrize("name", ["in_proj", "context_proj", "out_proj"])
@pytest.mark.parametrize(
    "act",
    [
        lambda layer: mean_kv_heads(layer, 1),
        lambda layer: repeat_kv_heads(layer, 6),
        lambda layer: align_kv_heads(layer, 1),
        lambda layer: rotate_kv_heads(layer, turns(3)),
    ],
)
def test_rows_that_are_computed_are_not_exchanged(act, name):
    layer = build(context_dim=11)
    parametrize.register_parametrization(getattr(layer, name), "weight", nn.Identity())
    state = copy.deepcopy(layer.state_dict())
    with refused(TypeError, name, "take off"):
        act(layer)
    assert all(torch.equal(value, layer.state_dict()[key]) for key, value in state.items())
    wrapped = build(context_dim=11)
    setattr(wrapped, name, nn.Sequential(getattr(wrapped, name)))
    with refused(TypeError, name, "Sequential"):
        act(wrapped)


def test_a_layer_without_gradients_or_in_inference_can_be_changed():
    with torch.inference_mode():
        layer = build()
        assert mean_kv_heads(layer, 1).layout.num_kv_heads == 1


# --- the checks notice -----------------------------------------------------------------------------------------------


def wrong_repeat(layer, num_kv_heads, mutant=REPEATS["tiled heads"]):
    copies = num_kv_heads // layer.layout.num_kv_heads
    return grouped.with_kv_heads(layer, num_kv_heads, lambda heads: mutant.apply(heads, copies))


def test_tiled_heads_are_noticed_but_not_where_there_is_one():
    for g, notices in ((1, False), (2, True), (3, True), (6, False)):
        layer, x = build(g), tokens()
        differs = not torch.allclose(wrong_repeat(layer, 6)(x), layer(x), atol=1e-6)
        assert differs == notices, g
        assert torch.equal(mean_kv_heads(repeat_kv_heads(layer, 6), g).in_proj.weight, layer.in_proj.weight)


@pytest.mark.parametrize("name", TURNS)
def test_a_turn_that_forgets_something_is_noticed(name):
    layer, x = build(), tokens()
    new = TURNS[name].apply(layer, rotate_kv_heads(layer, turns(s.g), turns(s.g)))
    assert not torch.allclose(new(x), layer(x), atol=1e-3)


def test_a_fold_that_mixes_heads_and_queries_is_noticed():
    q, k, v = torch.randn(s.b, s.h, s.n, s.d), *torch.randn(2, s.b, s.g, s.m, s.d)
    wrong = WRONG_FOLDS["fold by i mod g"].apply(q, k, v)
    assert wrong.shape == q.shape and not torch.allclose(wrong, folded_attend(q, k, v), atol=1e-3)


def test_public_names():
    for name in ("folded_attend", "repeat_kv_heads"):
        assert getattr(mha_book, name) is getattr(grouped, name)
    for name in ("align_kv_heads", "mean_kv_heads", "rotate_kv_heads"):
        assert getattr(mha_book, name) is getattr(aligning, name)
