"""Rivals of fewer heads against their definitions: the nearest maps of a rank, a layer that begins anew, FLOPs as they
are counted, and the roofline's times as a mean over all batches.
"""

import copy
import itertools
import math

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mha_book.heads.layer import MultiHeadAttention
from mha_book.heads.single_head import plain_attention
from mha_book.heads.weight_split import HeadLayout
from mha_book.instruments.roofline import PEAKS, Machine, layer_work
from mha_book.kernels.backends import attention
from mha_book.lab.ladder import attention_work, fewer_heads, forecast, narrow_heads
from mha_book.plugs.rope import RoPE
from mha_book.variants.mixture_of_heads import MixtureOfHeads, skip_heads
from mha_book.variants.prune_heads import prune_heads
from support.refusals import refused

KINDS = {
    "plain": dict(num_heads=4, head_dim=8),
    "grouped": dict(num_heads=6, num_kv_heads=3, head_dim=8),
    "values of another width": dict(num_heads=6, num_kv_heads=2, head_dim=8, value_dim=5),
    "no biases": dict(num_heads=4, head_dim=8, bias=False),
    "a context": dict(num_heads=4, head_dim=8, context_dim=13),
    "heads wider than tokens": dict(num_heads=2, head_dim=24),
}


def a_layer(embed_dim=20, **options):
    "In float64, with biases that are no zeros."
    torch.manual_seed(0)
    layer = MultiHeadAttention(embed_dim, dtype=torch.float64, **options).requires_grad_(False)
    for p in layer.parameters():
        if p.dim() == 1:
            nn.init.normal_(p)
    return layer


def tokens(layer):
    "Arguments of a call."
    x = torch.randn(2, 7, layer.in_proj.in_features, dtype=torch.float64)
    if layer.context_proj is None:
        return (x,)
    return x, torch.randn(2, 9, layer.context_proj.in_features, dtype=torch.float64)


def logit_maps(layer):
    "Of each key head, what makes the logits of its query heads, one above the other, with the queries' bias."
    maps = []
    h, g, d = layer.layout
    for j in range(g):
        proj, at = layer.rows("k", j)
        keys, each = proj.weight[at], []
        for i in range(j * h // g, (j + 1) * h // g):
            proj, at = layer.rows("q", i)
            bias = proj.weight.new_zeros(d) if proj.bias is None else proj.bias[at]
            each.append(torch.cat([proj.weight[at], bias[:, None]], 1).mT @ keys / math.sqrt(d))
        maps.append(torch.cat(each))
    return maps


def output_maps(layer):
    "Of each value head, what makes the outputs of its query heads."
    maps = []
    h, g, _ = layer.layout
    for j in range(g):
        proj, at = layer.rows("v", j)
        values, each = proj.weight[at], []
        for i in range(j * h // g, (j + 1) * h // g):
            proj, at = layer.rows("o", i)
            each.append(proj.weight[:, at] @ values)
        maps.append(torch.cat(each))
    return maps


# Fewer channels


@pytest.mark.parametrize("kind", KINDS)
def test_at_all_channels_it_is_the_layer(kind):
    layer = a_layer(**KINDS[kind])
    args, kept = tokens(layer), copy.deepcopy(layer.state_dict())
    new = narrow_heads(layer, layer.layout.head_dim, layer.layout.value_dim)
    torch.testing.assert_close(new(*args), layer(*args), atol=1e-12, rtol=1e-12)
    mask = torch.ones(7, args[-1].shape[1]).tril().bool()
    torch.testing.assert_close(new(*args, mask=mask), layer(*args, mask=mask), atol=1e-12, rtol=1e-12)
    for name, value in layer.state_dict().items():
        assert value.equal(kept[name])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head_dim, value_dim", [(5, None), (3, 4), (1, 1)])
def test_products_are_the_nearest_of_their_rank(kind, head_dim, value_dim):
    layer = a_layer(**KINDS[kind])
    new = narrow_heads(layer, head_dim, value_dim)
    h, g, _ = layer.layout
    assert new.layout == HeadLayout(h, g, head_dim, value_dim or head_dim)
    for maps, rank in (logit_maps, head_dim), (output_maps, value_dim or head_dim):
        for whole, found in zip(maps(layer), maps(new)):
            rest = torch.linalg.svdvals(whole)[rank:]
            assert torch.linalg.matrix_rank(found) <= rank
            torch.testing.assert_close((whole - found).square().sum(), rest.square().sum(), atol=1e-10, rtol=1e-10)


def test_either_side_has_the_roots_of_the_singular_values():
    layer = a_layer(**KINDS["plain"])
    new = narrow_heads(layer, 5)
    for i in range(4):
        (proj, q), (_, k) = new.rows("q", i), new.rows("k", i)
        left, right = torch.cat([proj.weight[q], proj.bias[q, None]], 1), proj.weight[k]
        torch.testing.assert_close(left @ left.mT, right @ right.mT, atol=1e-10, rtol=1e-10)
        values = torch.linalg.svdvals(logit_maps(layer)[i])[:5]
        torch.testing.assert_close((right @ right.mT).diagonal() / math.sqrt(5), values, atol=1e-10, rtol=1e-10)


def test_biases_are_kept_at_any_number_of_channels():
    for kind in "plain", "grouped", "values of another width":
        layer = a_layer(**KINDS[kind])
        new, nothing = narrow_heads(layer, 2), torch.zeros(2, 7, 20, dtype=torch.float64)
        torch.testing.assert_close(new(nothing), layer(nothing), atol=1e-12, rtol=1e-12)
        assert layer(nothing).abs().min() > 1e-3


def test_fewer_channels_are_worse_one_by_one():
    layer = a_layer(**KINDS["plain"])
    (x,) = tokens(layer)
    errors = [(narrow_heads(layer, d)(x) - layer(x)).norm().item() for d in range(1, 9)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-12 < 0.01 < errors[-2]


def test_what_narrow_heads_refuses():
    layer = a_layer(**KINDS["plain"])
    with refused(ValueError, "9", "at most the layer's, 8"):
        narrow_heads(layer, 9)
    with refused(ValueError, "head_dim", "at least 1"):
        narrow_heads(layer, 0)
    with refused(TypeError, "head_dim", "2.5"):
        narrow_heads(layer, 2.5)
    with refused(ValueError, "position", "without"):
        narrow_heads(a_layer(num_heads=4, head_dim=8, position=RoPE(8)), 4)
    with refused(ValueError, "finish", "attend"):
        narrow_heads(a_layer(num_heads=4, head_dim=8, attend=attention, finish=lambda heads, x: heads), 4)
    with refused(ValueError, "q_norm"):
        narrow_heads(a_layer(num_heads=4, head_dim=8, qk_norm=nn.RMSNorm), 4)
    with refused(TypeError, "MultiHeadAttention", "Linear"):
        narrow_heads(nn.Linear(3, 4), 4)
    layer.out_proj.register_forward_hook(lambda *_: None)
    with refused(TypeError, "out_proj", "hooks"):
        narrow_heads(layer, 4)


# Fewer heads from the start


@pytest.mark.parametrize("kind", ["plain", "grouped", "a context", "no biases"])
def test_a_fresh_layer_is_drawn_as_any_new_one(kind):
    options = KINDS[kind]
    layer, r = a_layer(**options), options["num_heads"] // options.get("num_kv_heads", options["num_heads"])
    state = torch.get_rng_state()
    new, again, other = (fewer_heads(layer, 2, seed) for seed in (3, 3, 4))
    assert torch.get_rng_state().equal(state)
    assert new.layout == HeadLayout(2, 2 // r, 8) and len(layer.in_proj.weight) > len(new.in_proj.weight)
    wanted = MultiHeadAttention(20, dtype=torch.float64, **options | dict(num_heads=2, num_kv_heads=2 // r))
    torch.manual_seed(3)
    wanted.reset_parameters()
    for name, p in wanted.named_parameters():
        assert new.get_parameter(name).equal(p) and again.get_parameter(name).equal(p)
    assert not new.in_proj.weight.equal(other.in_proj.weight)


def test_what_fewer_heads_refuses():
    layer = a_layer(**KINDS["grouped"])
    for heads in 8, 3:
        with refused(ValueError, f"num_heads {heads}", "at most 6", "group size 2"):
            fewer_heads(layer, heads)
    with refused(TypeError, "num_heads", "True"):
        fewer_heads(layer, True)
    with refused(TypeError, "MultiHeadAttention"):
        fewer_heads(nn.Linear(3, 4), 2)


# FLOPs


def test_work_is_what_the_counter_counts():
    layers = [a_layer(24, num_heads=6, num_kv_heads=g, head_dim=8, attend=plain_attention) for g in (6, 3)]
    layers[0] = prune_heads(layers[0], [1, 4])
    model, lengths = nn.Sequential(*layers), [5, 9, 5, 11]
    total = 0
    for n in lengths:
        with FlopCounterMode(display=False) as counter:
            model(torch.randn(1, n, 24, dtype=torch.float64))
        total += counter.get_total_flops()
    assert attention_work(model, lengths) == total
    assert attention_work(model, iter(lengths)) == sum(attention_work(model, [n]) for n in lengths)


def test_causal_work_leaves_out_what_lies_after_the_query():
    model, n = nn.Sequential(a_layer(24, num_heads=6, head_dim=8)), 11
    hidden = 6 * n * (n - 1) // 2
    assert attention_work(model, [n]) - attention_work(model, [n], is_causal=True) == 2 * hidden * (8 + 8)


def test_a_mixture_pays_for_what_tokens_take_for_all_keys_and_for_its_router():
    plain = a_layer(24, num_heads=6, head_dim=8)
    model, n = nn.Sequential(copy.deepcopy(plain)), 7
    model[0].finish = MixtureOfHeads(24, 6, 4, num_shared=1, dtype=torch.float64)
    a_token = 0
    for _ in range(4):  # heads that it takes: query, logits, mix, output
        a_token += 2 * 24 * 8 + 2 * n * 8 + 2 * n * 8 + 2 * 8 * 24
    a_token += 6 * 2 * (2 * 24 * 8)  # a key and a value in each head
    a_token += 2 * 24 * model[0].finish.router.out_features
    assert attention_work(model, [n]) == n * a_token
    assert attention_work(nn.Sequential(plain), [n]) > n * a_token
    model[0].attend = plain_attention
    with FlopCounterMode(display=False) as counter:
        skip_heads(model[0], torch.randn(1, n, 24, dtype=torch.float64))
    assert counter.get_total_flops() == attention_work(model, [n])


def test_what_attention_work_refuses():
    with refused(ValueError, "Linear", "no MultiHeadAttention"):
        attention_work(nn.Linear(3, 4), [5])
    with refused(ValueError, "length", "at least 1"):
        attention_work(a_layer(**KINDS["plain"]), [5, 0])
    with refused(ValueError, "context"):
        attention_work(a_layer(**KINDS["a context"]), [5])


# Time by the roofline


SLOW = Machine("slow", 1e9, 1e7, "nowhere")


def layers_seconds(layouts, batch, machine):
    return sum(machine.seconds(w) for at in layouts for w in layer_work(at, 24, batch=batch, n=7, itemsize=2).values())


@pytest.mark.parametrize("machine", [SLOW, *PEAKS.values()], ids=lambda machine: machine.name)
def test_groups_are_averaged_over_all_batches_that_there_can_be(machine):
    levels, shares = [[HeadLayout(h, h, 8)] * 2 for h in (6, 3, 1)], [0.5, 0.3, 0.2]
    (found,) = forecast(levels[0], levels[1], levels, shares, 24, n=7, batches=[4], machine=machine)
    mean = 0.0
    for given in itertools.product(range(3), repeat=4):
        chance = math.prod(shares[i] for i in given)
        mean += chance * sum(layers_seconds(levels[i], given.count(i), machine) for i in {*given})
    assert found.batch == 4 and math.isclose(found.grouped, mean, rel_tol=1e-9)
    assert math.isclose(found.full, layers_seconds(levels[0], 4, machine), rel_tol=1e-12)
    assert math.isclose(found.pruned, layers_seconds(levels[1], 4, machine), rel_tol=1e-12)


def test_one_level_for_all_is_no_group():
    full, few = [HeadLayout(6, 6, 8)], [HeadLayout(3, 3, 8)]
    for one in forecast(full, few, [full, few], [0.0, 1.0], 24, n=7, batches=[1, 2, 64], machine=SLOW):
        assert math.isclose(one.grouped, one.pruned, rel_tol=1e-12)


def test_in_decoding_one_token_looks_at_many_keys():
    at = [HeadLayout(6, 3, 8)]
    (one,) = forecast(at, at, [at], [1.0], 24, n=1, m=500, batches=[9], machine=SLOW)
    work = layer_work(at[0], 24, batch=9, n=1, m=500, itemsize=2)
    assert math.isclose(one.full, sum(map(SLOW.seconds, work.values())), rel_tol=1e-12)


def test_small_batches_lose_by_groups_and_large_ones_win():
    levels = [[HeadLayout(h, h, 64)] for h in (8, 4)]
    options = dict(n=64, machine=PEAKS["H200"])
    few, many = forecast(levels[0], levels[1], levels, [0.5, 0.5], 1024, batches=[2, 512], **options)
    assert few.grouped > few.pruned and few.grouped / few.full > 1
    assert many.grouped / many.full < 0.8


def test_what_forecast_refuses():
    at = [HeadLayout(6, 6, 8)]
    for shares in [0.5], [0.7, 0.7], [-0.5, 1.5]:
        with refused(ValueError, "shares", "2, one a level"):
            forecast(at, at, [at, at], shares, 24, n=7, batches=[4], machine=SLOW)
    with refused(ValueError, "batch", "at least 1"):
        forecast(at, at, [at, at], [0.5, 0.5], 24, n=7, batches=[0], machine=SLOW)
