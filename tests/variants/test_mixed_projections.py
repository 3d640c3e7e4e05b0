"""Mixed projections against heads that are mixed one by one; folds against what they fold; and what is refused."""

import copy
import io
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from mha_book.heads.dialects import from_state_dict
from mha_book.heads.head_counts import pad_heads, separate_projections
from mha_book.heads.layer import MultiHeadAttention
from mha_book.heads.weight_split import HeadLayout
from mha_book.instruments.testing import SIZES
from mha_book.plugs.cache import ContextCache, KVCache
from mha_book.plugs.logits import OutputGate, SinkAttention
from mha_book.plugs.rope import RoPE
from mha_book.variants import mixed_projections
from mha_book.variants.aligning import mean_kv_heads
from mha_book.variants.mixed_projections import (
    MixedHeads,
    fold_mixing,
    knock_heads_,
    mix_kv_heads_,
    mix_output_heads,
    mixing_matrices,
)
from mha_book.variants.prune_heads import prune_heads
from support.mutants_mixed import FOLDS, MIXINGS, OUTPUTS
from support.refusals import refused

s, dv, c = SIZES, 10, 11
float64 = dict(dtype=torch.float64)
exact = dict(atol=1e-12, rtol=0)
LAYOUTS = {
    "plain": {},
    "no biases": dict(bias=False),
    "grouped": dict(num_kv_heads=s.g),
    "one key": dict(num_kv_heads=1),
    "value_dim": dict(num_kv_heads=s.g, value_dim=dv),
    "context": dict(num_kv_heads=s.g, value_dim=dv, context_dim=c),
    "RoPE": dict(num_kv_heads=s.g, position=RoPE(s.d)),
    "norms": dict(num_kv_heads=s.g, qk_norm=nn.RMSNorm, position=RoPE(s.d)),
    "plugs": dict(num_kv_heads=s.g, value_dim=dv, out_dim=13),
    "apart": dict(num_kv_heads=s.g, value_dim=dv),
    "context apart": dict(num_kv_heads=s.g, context_dim=c),
    "one head": dict(num_kv_heads=1),
}


def build(name="grouped", **more):
    heads = 1 if name == "one head" else s.h
    options = dict(head_dim=s.d) | LAYOUTS[name] | float64 | more
    if name == "plugs":
        options |= dict(attend=SinkAttention(s.h, **float64), finish=OutputGate(s.e, s.h, head_dim=dv, **float64))
    layer = MultiHeadAttention(s.e, heads, **options)
    for p in layer.parameters():
        nn.init.normal_(p, std=0.4)
    return separate_projections(layer) if "apart" in name else layer


def inputs(layer, n=s.n):
    x = torch.randn(s.b, n, s.e, **float64)
    return (x,) if layer.context_proj is None else (x, torch.randn(s.b, s.m, c, **float64))


def stir(layer):
    for matrix in mixing_matrices(layer).values():
        nn.init.normal_(matrix, std=0.6)
    return layer


def mixed(name="grouped", **more):
    return stir(mix_kv_heads_(knock_heads_(build(name, **more))))


# --- the definition: each head's numbers, one by one ---


def mixed_by_hand(plain, matrices, *given):
    "Queries, keys and values of a plain layer without norm and position, mixed head by head."
    made = {}
    for part, heads in zip("qkv", plain.qkv(*given)):
        if (shared := matrices.get(f"{part} channels")) is not None:
            heads = torch.stack([heads[:, i] @ shared.T for i in range(heads.shape[1])], 1)
        if (across := matrices.get(f"{part} heads")) is not None:
            g = heads.shape[1]
            heads = torch.stack([sum(across[i, j] * heads[:, j] for j in range(g)) for i in range(g)], 1)
        made[part] = heads
    return made.values()


def check_definition(name):
    plain = build(name, position=None, qk_norm=None)
    for change in (knock_heads_, mix_kv_heads_, lambda layer: knock_heads_(mix_kv_heads_(layer, "v"), "kv")):
        layer = stir(change(copy.deepcopy(plain)))
        given = inputs(layer)
        by_hand = mixed_by_hand(plain, mixing_matrices(layer), *given)
        for ours, theirs in zip(layer.qkv(*given), by_hand):
            torch.testing.assert_close(ours, theirs, **exact)


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_head_is_mixed_as_the_formula_says(name):
    check_definition(name)


def check_start(name, dtype=torch.float64):
    plain = build(name).to(dtype)
    given = [t.to(dtype) for t in inputs(plain)]
    y = plain(*given)
    layer = mix_kv_heads_(knock_heads_(plain))
    assert layer is plain and torch.equal(layer(*given), y)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", LAYOUTS)
def test_at_the_start_no_bit_is_changed(name, dtype):
    check_start(name, dtype)


def check_autocast():
    "Under autocast the mixed weight is that of the fold, not one mixed in bfloat16."
    layer = mixed().float()
    x, folded = torch.randn(s.b, s.n, s.e), fold_mixing(layer)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), folded(x)) and torch.equal(layer.in_proj.weight, folded.in_proj.weight)


def test_autocast_mixes_in_float32():
    check_autocast()


@pytest.mark.parametrize("name", MIXINGS)
def test_wrong_mixings_are_noticed(name, monkeypatch):
    monkeypatch.setattr(mixed_projections, "MixedHeads", MIXINGS[name].apply)
    with pytest.raises(AssertionError):
        check_definition("value_dim")
        check_start("value_dim")
        check_autocast()


def test_gradients_are_those_of_numbers():
    layer = MultiHeadAttention(5, 4, num_kv_heads=2, head_dim=2, value_dim=3, **float64)
    layer = stir(mix_kv_heads_(knock_heads_(layer)))
    own, x = [*layer.in_proj.parameters()], torch.randn(1, 3, 5, **float64)
    assert torch.autograd.gradcheck(lambda *_: layer(x), own)
    assert len(own) == 7 and len({*map(id, own)}) == 7  # weight, bias, and five matrices


# --- folded ---


def check_fold(fold, name="value_dim"):
    layer = mixed(name)
    layer.out_proj.requires_grad_(False)
    given = inputs(layer)
    y, state = layer(*given), {key: value.clone() for key, value in layer.state_dict().items()}
    plain = fold(layer)
    torch.testing.assert_close(plain(*given), y, **exact)
    assert [p.requires_grad for p in plain.out_proj.parameters()] == [False] * 2
    assert not {p.data_ptr() for p in plain.parameters()} & {p.data_ptr() for p in layer.parameters()}
    assert torch.equal(layer(*given), y) and state.keys() == layer.state_dict().keys()
    assert all(torch.equal(value, layer.state_dict()[key]) for key, value in state.items())
    return layer, plain


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "no biases"])
def test_folded_is_what_was_mixed_and_plain(name):
    layer, plain = check_fold(fold_mixing, name)
    assert not mixing_matrices(plain) and mixing_matrices(layer)
    assert plain.state_dict().keys() == build(name).state_dict().keys()
    fresh = copy.deepcopy(plain)
    for p in fresh.in_proj.parameters():  # it starts as a plain one
        nn.init.constant_(p, 9.0)
    fresh.reset_parameters() if not name.endswith("apart") else fresh.in_proj.q_proj.reset_parameters()
    assert all(
        p.abs().max() < 2 for name, p in fresh.in_proj.named_parameters() if "k_" not in name and "v_" not in name
    )


@pytest.mark.parametrize("name", FOLDS)
def test_wrong_folds_are_noticed(name):
    with pytest.raises((AssertionError, AttributeError)):
        check_fold(FOLDS[name].apply)


def test_a_folded_layer_is_accepted_where_a_mixed_one_is_refused():
    layer = mixed("grouped")
    plain, x = fold_mixing(layer), torch.randn(s.b, s.n, s.e, **float64)
    for change in (
        lambda layer: prune_heads(layer, [0, 1]),
        lambda layer: pad_heads(layer, 8),
        lambda layer: mean_kv_heads(layer, 1),
        separate_projections,
        lambda layer: layer.rows("k", 1),
        lambda layer: mix_output_heads(layer, torch.eye(s.h, **float64)),
    ):
        with refused(TypeError, "in_proj", "parametrization", "take off"):
            change(layer)
        change(plain)
    loaded = from_state_dict(plain.state_dict(), plain.layout)
    torch.testing.assert_close(loaded(x), layer(x), **exact)
    knocked_twice = stir(knock_heads_(plain))
    torch.testing.assert_close(fold_mixing(knocked_twice)(x), knocked_twice(x), **exact)


def test_a_plain_layer_is_copied():
    layer = build()
    new = fold_mixing(layer)
    assert new is not layer and type(new.in_proj) is nn.Linear and torch.equal(new.in_proj.weight, layer.in_proj.weight)


def test_hooks_and_modes_stay_through_a_fold():
    layer, seen = mixed().eval(), []
    layer.in_proj.register_forward_hook(lambda *_: seen.append(1))
    plain = fold_mixing(layer)
    plain(torch.randn(s.b, s.n, s.e, **float64))
    assert seen == [1] and not plain.in_proj.training and not layer.in_proj.parametrizations.weight[0].training


# --- the rest of the layer goes on: caches, padding, copies, files, compilers ---


def test_chunks_with_a_cache_are_the_whole_and_padding_is_inert():
    layer, x = mixed("RoPE"), torch.randn(s.b, s.m, s.e, **float64)
    whole, cache = layer(x, is_causal=True), KVCache(s.b, s.g, s.m, s.d, **float64)
    parts = [layer(part, is_causal=True, cache=cache) for part in x.split([3, 1, s.m - 4], 1)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, **exact)
    real = torch.arange(s.m) < s.m - 2
    padded = layer(x, key_mask=real.expand(s.b, -1))[:, : s.m - 2]
    torch.testing.assert_close(padded, layer(x[:, : s.m - 2]), **exact)
    left = torch.cat([torch.full((s.b, 2, s.e), 7.0, **float64), x], 1)
    cache, is_real = KVCache(s.b, s.g, s.m + 2, s.d, **float64), torch.ones(s.b, s.m + 2, dtype=torch.bool)
    is_real[:, :2] = False
    shifted = layer(left, is_causal=True, key_mask=is_real, cache=cache)[:, 2:]
    torch.testing.assert_close(shifted, whole, **exact)


def test_a_cache_goes_over_to_the_folded_layer():
    layer, x = mixed("grouped"), torch.randn(s.b, s.m, s.e, **float64)
    plain, cache = fold_mixing(layer), KVCache(s.b, s.g, s.m, s.d, **float64)
    layer(x[:, :4], is_causal=True, cache=cache)
    rest = plain(x[:, 4:], is_causal=True, cache=copy.deepcopy(cache))
    torch.testing.assert_close(rest, layer(x, is_causal=True)[:, 4:], **exact)
    layer = mixed("context")
    x, context = inputs(layer)
    cache = ContextCache()
    layer(x, context, cache=cache)
    torch.testing.assert_close(layer(x, cache=cache), layer(x, context), **exact)


def test_attention_map_and_value_are_those_of_the_fold():
    layer = mixed("value_dim")
    x, value = torch.randn(2, s.b, s.n, s.e, **float64)
    plain = fold_mixing(layer)
    torch.testing.assert_close(layer.attention_map(x), plain.attention_map(x), **exact)
    torch.testing.assert_close(layer(x, value=value), plain(x, value=value), **exact)


def test_copies_are_independent_and_state_dicts_load():
    layer = mixed("context")
    new, given = copy.deepcopy(layer), inputs(layer)
    y = layer(*given)
    stir(new)
    assert torch.equal(layer(*given), y) and not torch.equal(new(*given), y)
    shared = new.context_proj.parametrizations
    assert shared.weight[0] is shared.bias[0]
    new.load_state_dict(layer.state_dict())
    assert torch.equal(new(*given), y)
    stream = io.BytesIO()
    torch.save(layer.state_dict(), stream)
    stream.seek(0)
    stir(new).load_state_dict(torch.load(stream))
    assert torch.equal(new(*given), y)
    with refused(RuntimeError, "state_dict"):
        pickle.dumps(layer)
    pickle.dumps(fold_mixing(layer))


def test_a_plain_layer_refuses_a_mixed_one_s_weights_and_the_other_way_round():
    layer, plain = mixed(), build()
    before = plain.in_proj.weight.clone()
    with refused(RuntimeError, "Missing", "in_proj.weight", "in_proj.parametrizations.weight.0.q_mixing"):
        plain.load_state_dict(layer.state_dict())
    assert torch.equal(plain.in_proj.weight, before)
    with refused(RuntimeError, "in_proj.parametrizations.weight.original"):
        layer.load_state_dict(plain.state_dict())
    with pytest.raises((KeyError, ValueError, TypeError), match="in_proj"):
        from_state_dict(layer.state_dict(), layer.layout)


COMPILED = """
import torch
from mha_book import MultiHeadAttention
from mha_book.variants.mixed_projections import knock_heads_, mix_kv_heads_, mixing_matrices

x, context = torch.randn(2, 9, 16, dtype=torch.float64), torch.randn(2, 5, 12, dtype=torch.float64)
layer = MultiHeadAttention(16, 2, context_dim=12, dtype=torch.float64)
layer = mix_kv_heads_(knock_heads_(layer))
for matrix in mixing_matrices(layer).values():
    torch.nn.init.normal_(matrix)
compiled = torch.compile(layer, fullgraph=True, backend="eager")
torch.testing.assert_close(compiled(x, context), layer(x, context), atol=1e-12, rtol=0)
"""


def test_it_compiles_in_one_graph():
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", COMPILED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_meta_device_and_module_wide_moves():
    with torch.device("meta"):
        layer = mix_kv_heads_(knock_heads_(build()))
        assert fold_mixing(layer)(torch.randn(s.b, s.n, s.e, **float64)).is_meta
    assert all(p.is_meta for p in layer.parameters())
    layer = mixed().float()
    assert {p.dtype for p in layer.parameters()} == {torch.float32}
    with parametrize.cached():
        assert layer.in_proj.weight is layer.in_proj.weight


def test_a_projection_is_reset_with_its_mixing():
    torch.manual_seed(1)
    plain = build("value_dim")
    plain.reset_parameters()
    for layer in (mixed("value_dim"), copy.deepcopy(mixed("value_dim"))):
        with refused(TypeError, "in_proj", "take off"):
            layer.reset_parameters()
        layer.in_proj.reset_parameters()
        assert all(torch.equal(m, torch.eye(len(m), **float64)) for m in mixing_matrices(layer).values())
        weight = layer.in_proj.weight
        assert torch.equal(layer.in_proj.bias, torch.zeros_like(layer.in_proj.bias))
        torch.testing.assert_close(weight.std(), plain.in_proj.weight.std(), rtol=0.2, atol=0)


def test_frozen_rows_stay_frozen_and_the_matrices_learn():
    layer = build()
    layer.in_proj.requires_grad_(False)
    knock_heads_(layer)
    layer(torch.randn(s.b, s.n, s.e, **float64)).square().sum().backward()
    assert layer.in_proj.parametrizations.weight.original.grad is None
    assert all(m.grad.abs().max() > 0 for m in mixing_matrices(layer).values())
    assert [p.requires_grad for p in fold_mixing(layer).in_proj.parameters()] == [False] * 2


def test_an_optimizer_keeps_what_it_trained():
    layer = build()
    trained = layer.in_proj.weight
    knock_heads_(layer)
    assert layer.in_proj.parametrizations.weight.original is trained
    assert {*mixing_matrices(layer)} == {f"{part} channels" for part in "qkv"}
    assert {id(p) for p in mixing_matrices(layer).values()} <= {id(p) for p in layer.parameters()}


# --- mixed outputs ---


def check_outputs(mix, name="value_dim"):
    layer, mixing = build(name, **({} if name == "plugs" else dict(finish=None))), torch.randn(s.h, s.h, **float64)
    given, found = inputs(layer), []
    taken = layer.out_proj.register_forward_pre_hook(lambda _, args: found.append(args[0]))
    layer(*given)
    taken.remove()
    heads = found[0].unflatten(-1, (s.h, -1))
    by_hand = torch.stack([sum(mixing[i, j] * heads[..., j, :] for j in range(s.h)) for i in range(s.h)], -2)
    torch.testing.assert_close(mix(layer, mixing)(*given), layer.out_proj(by_hand.flatten(-2)), **exact)
    assert torch.equal(mix(layer, torch.eye(s.h, **float64))(*given), layer(*given))


@pytest.mark.parametrize("name", ["plain", "value_dim", "context", "RoPE", "plugs"])
def test_mixed_outputs_are_another_output_projection(name):
    check_outputs(mix_output_heads, name)


@pytest.mark.parametrize("name", OUTPUTS)
def test_wrongly_mixed_outputs_are_noticed(name):
    with pytest.raises(AssertionError):
        check_outputs(OUTPUTS[name].apply)


# --- what is refused, with nothing changed ---


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def adapted(layer):
    layer.in_proj = nn.Sequential(layer.in_proj)
    return layer


def doubled(layer):
    parametrize.register_parametrization(layer.in_proj, "weight", Doubled())
    return layer


@pytest.mark.usefixtures("own_messages")
@pytest.mark.parametrize("mix", [knock_heads_, mix_kv_heads_])
def test_what_cannot_be_mixed_is_refused(mix):
    for wrong in (None, ["k"], b"kv"):
        with refused(TypeError, "parts", "string"):
            mix(build(), wrong)
    for wrong in ("", "o", "kk", "q" if mix is mix_kv_heads_ else "kx"):
        with refused(ValueError, "parts", repr(wrong)):
            mix(build(), wrong)
    with refused(TypeError, "MultiHeadAttention", "from_torch"):
        mix(nn.MultiheadAttention(48, 6))
    for make in (adapted, doubled):
        layer = make(build())
        with refused(TypeError, "in_proj", "take off"):
            mix(layer)
    layer = build("context")
    adapted_context = copy.deepcopy(layer)
    adapted_context.context_proj = nn.Sequential(adapted_context.context_proj)
    with refused(TypeError, "context_proj"):
        mix(adapted_context)
    assert type(adapted_context.in_proj) is nn.Linear  # nothing has changed
    with refused(ValueError, "already", "fold_mixing"):
        mix(mix(layer), "k")


@pytest.mark.usefixtures("own_messages")
def test_folds_and_mixings_refuse_in_words():
    with refused(TypeError, "in_proj", "another parametrization"):
        fold_mixing(doubled(build()))
    with refused(TypeError, "in_proj", "another parametrization"):
        fold_mixing(doubled(mixed()))
    layer = mixed()
    layer.forward = lambda x: x
    with refused(TypeError, "forward of its own"):
        fold_mixing(layer)
    layout = HeadLayout(s.h, s.g, s.d)
    with refused(ValueError, "across", "'rows'"):
        MixedHeads(layout, "q", "rows")
    with refused(ValueError, "parts", "'q'"):
        MixedHeads(layout, "q", "heads", stacked="kv")
    with refused(ValueError, "5 rows"):
        MixedHeads(layout, "q", "heads", stacked="q")(torch.randn(5, s.e))
    for wrong, error, word in (
        ([[1.0]], TypeError, "mixing"),
        (torch.eye(s.h, dtype=torch.int64), TypeError, "floating point"),
        (torch.eye(s.h + 1), ValueError, f"{(s.h, s.h)}"),
        (torch.eye(s.h, device="meta"), ValueError, "device"),
    ):
        with refused(error, word):
            mix_output_heads(build(), wrong)
