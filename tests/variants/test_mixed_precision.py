"""Heads in mixed precision: the plug by its definition, the identity to the bit, runs without copies, padding, order
and basis of the heads, caches, policies as text, policies for a while, gradients; what is refused."""

import copy
import json
from functools import partial

import pytest
import torch
from torch import nn

from mha_book.heads.layer import MultiHeadAttention
from mha_book.heads.single_head import fused_attend, plain_attention
from mha_book.instruments.testing import SIZES
from mha_book.kernels.backends import attention
from mha_book.plugs.cache import KVCache
from mha_book.plugs.logits import HeadTemperature, OutputGate
from mha_book.plugs.positions import ALiBi
from mha_book.plugs.quantize import KV_FORMATS, HeadPrecision, dequantize, quantize
from mha_book.plugs.rope import RoPE
from mha_book.variants.mixed_precision import (
    MixedPrecision,
    RotatedPosition,
    fill_socket,
    hadamard,
    permute_heads,
    precisions_from_json,
    precisions_to_json,
    rotate_heads,
    sort_heads,
    use_precision,
)
from support.profiler import operations
from support.refusals import refused

s = SIZES
float64 = dict(dtype=torch.float64)
close = partial(torch.testing.assert_close, atol=1e-12, rtol=0)
POLICIES = {
    "integers": HeadPrecision(("int4", "int8", "int4"), ("int3", "int3", "int2"), group=2),
    "one run": HeadPrecision(("int5",) * 3, ("int6",) * 3, group=4),
    "floats": HeadPrecision(("float8_e5m2", "bfloat16", "float32"), ("float8_e4m3fn", "float16", "bfloat16"), group=2),
    "first exact": HeadPrecision(("int4", "bfloat16", "int2"), ("int3", "bfloat16", "float32"), group=2, exact_first=1),
    "mixed": HeadPrecision(("bfloat16", "bfloat16", "int4"), ("bfloat16", "bfloat16", "float32"), group=3),
}


def build(g=s.g, h=s.h, **options):
    layer = MultiHeadAttention(s.e, h, num_kv_heads=g, head_dim=s.d, **(float64 | options))
    for p in layer.parameters():
        nn.init.normal_(p, std=0.5)
    return layer


def with_policy(layer, precision):
    new = copy.deepcopy(layer)
    fill_socket(new, "attend", MixedPrecision(precision, new.attend))
    return new


def qkv(n=s.n, m=s.m, g=s.g, h=s.h, dtype=torch.float64, dv=s.d):
    return (
        torch.randn(s.b, h, n, s.d, dtype=dtype),
        torch.randn(s.b, g, m, s.d, dtype=dtype),
        torch.randn(s.b, g, m, dv, dtype=dtype),
    )


def tokens(n=s.n, **options):
    return torch.randn(s.b, n, s.e, **(float64 | options))


# --- the plug by its definition --------------------------------------------------------------------------------------


def of_ints(x, bits):
    "One group of numbers as `bits`-bit integers and back; chapter 18a proves what that is."
    return dequantize(quantize(x, bits, 0), x.dtype)


def by_hand(x, form, group, first, of_keys):
    "One row, one head: m d. Keys by channel and block, values by token."
    form, x = KV_FORMATS[form], x.clone()
    if form.dtype is not None:
        x[first:] = x[first:].to(form.dtype).to(x.dtype)
        return x
    if not of_keys:
        for t in range(first, len(x)):
            x[t] = of_ints(x[t], form.bits)
        return x
    for start in range(first, len(x) - group + 1, group):
        for channel in range(x.shape[1]):
            x[start : start + group, channel] = of_ints(x[start : start + group, channel], form.bits)
    return x


def definition(q, k, v, precision, **options):
    "A loop over rows and heads; each computes in float64 with its own rounded keys and values."
    out = []
    for head in range(q.shape[1]):
        kv = head // (q.shape[1] // k.shape[1])
        forms, rows = (precision.keys[kv], precision.values[kv]), []
        for r in range(len(q)):
            one_k, one_v = (
                by_hand(t[r, kv], form, precision.group, precision.exact_first, of_keys)
                for t, form, of_keys in ((k, forms[0], True), (v, forms[1], False))
            )
            own = {name: t[r : r + 1, head : head + 1] for name, t in options.items() if isinstance(t, torch.Tensor)}
            flags = {name: t for name, t in options.items() if not isinstance(t, torch.Tensor)}
            rows.append(plain_attention(q[r, head][None, None], one_k[None, None], one_v[None, None], **own, **flags))
        out.append(torch.cat(rows))
    return torch.cat(out, 1)


OPTIONS = {
    "plain": {},
    "causal": dict(is_causal=True),
    "mask of each head": dict(mask=torch.rand(s.b, s.h, s.n, s.m) < 0.8),
    "bias of each head": dict(bias=torch.randn(s.b, s.h, s.n, s.m, **float64)),
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", [name for name in POLICIES if name != "mixed"])
def test_each_head_is_rounded_as_its_policy_says(name, options):
    options = dict(OPTIONS[options])
    if "mask" in options:
        options["mask"] = options["mask"].clone()
        options["mask"][:, 0, 0] = True  # every key is seen by somebody
    q, k, v = qkv(dv=16)
    got = MixedPrecision(POLICIES[name])(q, k, v, **options)
    close(got, definition(q, k, v, POLICIES[name], **options))
    assert (got - plain_attention(q, k, v, **options)).abs().max() > 1e-3  # and it is rounded


class NextHeads(MixedPrecision):
    "The wrong way: each run gets the queries of the run's own number, groups forgotten."

    def forward(self, q, k, v, **options):
        return super().forward(q.roll(1, 1), k, v, **options).roll(-1, 1)


def test_queries_of_other_heads_are_noticed():
    q, k, v = qkv()
    precision = POLICIES["integers"]
    assert not torch.allclose(NextHeads(precision)(q, k, v), definition(q, k, v, precision), atol=1e-3)


def test_a_half_is_really_computed_in():
    q, k, v = qkv(dtype=torch.float32)
    dtypes = []

    def seen(q, k, v, **options):
        dtypes.append(q.dtype)
        return fused_attend(q, k, v, **options)

    plug = MixedPrecision(HeadPrecision(("bfloat16", "float16", "int4"), ("bfloat16", "float16", "bfloat16")), seen)
    got = plug(q, k, v, is_causal=True)
    assert dtypes == [torch.bfloat16, torch.float16, torch.float32]
    for run, dtype in enumerate(dtypes[:2]):
        heads, kv = slice(2 * run, 2 * run + 2), slice(run, run + 1)
        own = fused_attend(q[:, heads].to(dtype), k[:, kv].to(dtype), v[:, kv].to(dtype), is_causal=True)
        assert torch.equal(got[:, heads], own.float()) and got.dtype == torch.float32


def test_a_table_can_say_which_run_is_real():
    keys, values = (
        ("bfloat16", "float16", "float32", "int8", "bfloat16"),
        ("bfloat16", "float16", "float32", "int8", "int4"),
    )
    plug = MixedPrecision(HeadPrecision(keys, values))

    def kinds(plug, dtype=torch.float32):
        return [run.kind for run in plug.runs(dtype)]

    assert kinds(plug) == ["real", "real", "real", "simulated", "simulated"]
    assert kinds(plug, torch.float64) == ["real", "real", "simulated", "simulated", "simulated"]
    assert kinds(plug, torch.bfloat16) == kinds(plug)
    first = MixedPrecision(HeadPrecision(keys, values, exact_first=1))  # a kernel has one dtype
    assert kinds(first) == ["simulated", "simulated", "real", "simulated", "simulated"]
    assert kinds(first, torch.bfloat16) == ["real", "simulated", "real", "simulated", "simulated"]
    assert [run.heads for run in plug.runs()] == [slice(i, i + 1) for i in range(5)]
    assert [run[:3] for run in MixedPrecision(POLICIES["mixed"]).runs()] == [
        (slice(0, 2), "bfloat16", "bfloat16"),
        (slice(2, 3), "int4", "float32"),
    ]
    assert "0:2 bfloat16/bfloat16, 2:3 int4/float32" in repr(MixedPrecision(POLICIES["mixed"]))


def test_what_float16_cannot_hold_is_the_largest_that_it_can():
    q, k, v = qkv(dtype=torch.float32)
    k[:, :, 2, 3] = 1e30
    out = MixedPrecision(HeadPrecision.uniform(3, "float16"))(q, k, v)
    saturated = k.clamp(-65504, 65504)
    assert out.isfinite().all()
    assert torch.equal(out, fused_attend(q.half(), saturated.half(), v.half()).float())
    assert fused_attend(q.half(), k.half(), v.half()).isnan().any()  # the plain cast


# --- the identity ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("first", [0, 2])
@pytest.mark.parametrize("options", ["plain", "causal", "mask of each head", "bias of each head"])
def test_float32_everywhere_is_the_layer_to_the_bit(dtype, first, options):
    options = {name: t.float() if name == "bias" else t for name, t in OPTIONS[options].items()}
    plug = MixedPrecision(HeadPrecision.uniform(s.g, "float32", exact_first=first))
    inputs = [t.requires_grad_() for t in qkv(dtype=dtype)]
    own, exact = plug(*inputs, **options), fused_attend(*inputs, **options)
    assert torch.equal(own, exact) and own.dtype == dtype
    weights = torch.randn_like(own)
    got, wanted = (torch.autograd.grad((out * weights).sum(), inputs) for out in (own, exact))
    assert all(map(torch.equal, got, wanted))


def test_the_identity_is_noticed_where_it_is_none():
    inputs = qkv(dtype=torch.float32)
    assert not torch.equal(MixedPrecision(HeadPrecision.uniform(s.g, "bfloat16"))(*inputs), fused_attend(*inputs))


def test_gradients_of_what_rounds_nothing():
    plug = MixedPrecision(HeadPrecision(("int4", "int3", "int4"), ("int4", "int3", "int2"), exact_first=s.m))
    inputs = [t.requires_grad_() for t in qkv()]
    assert torch.equal(plug(*inputs), MixedPrecision(plug.precision, fused_attend)(*inputs))
    close(plug(*inputs), fused_attend(*inputs))
    assert torch.autograd.gradcheck(plug, inputs)
    assert torch.autograd.gradgradcheck(MixedPrecision(plug.precision, plain_attention), inputs)


# --- runs: one call each, and no copies ------------------------------------------------------------------------------

COPIES = ("aten::copy_", "aten::clone", "aten::contiguous", "aten::_to_copy")


def copies(call):
    return sum(name in COPIES for name in operations(call))


def calls(call):
    return sum(name == "aten::scaled_dot_product_attention" for name in operations(call))


@torch.no_grad()
def test_each_run_is_one_call_on_slices():
    "Nothing to round: two runs, two calls, and the one tensor more is the output, side by side."
    q, k, v = qkv(dtype=torch.bfloat16, n=64, m=64)
    plug = MixedPrecision(HeadPrecision(("bfloat16", "bfloat16", "float32"), ("bfloat16", "bfloat16", "float32")))
    assert [run.kind for run in plug.runs(torch.bfloat16)] == ["real", "real"]
    assert calls(lambda: plug(q, k, v)) == 2 and calls(lambda: fused_attend(q, k, v)) == 1
    alone = copies(lambda: [fused_attend(q[:, :4], k[:, :2], v[:, :2]), fused_attend(q[:, 4:], k[:, 2:], v[:, 2:])])
    assert copies(lambda: plug(q, k, v)) == alone
    assert operations(lambda: plug(q, k, v)).count("aten::cat") == 1
    listed = MixedPrecision(plug.precision, lambda q, k, v, **options: fused_attend(q.clone(), k, v))
    assert copies(lambda: listed(q, k, v)) > alone  # a copy would be counted


@torch.no_grad()
def test_a_run_reads_the_layer_s_own_memory_and_the_merge_copies_nothing():
    layer = build(dtype=torch.bfloat16)
    seen = []

    def look(q, k, v, **options):
        seen.extend((q, k, v))
        return fused_attend(q, k, v, **options)

    layer.attend = MixedPrecision(HeadPrecision(("float32", "bfloat16", "bfloat16"), ("bfloat16",) * 3), look)
    layer(tokens(dtype=torch.bfloat16))
    starts = {t.untyped_storage().data_ptr() for t in seen}
    assert len(seen) == 6 and len(starts) == 1  # all are stripes of what in_proj gave
    q, k, v = qkv(dtype=torch.float32)
    out = layer.attend(q.bfloat16(), k.bfloat16(), v.bfloat16())
    assert out.transpose(1, 2).flatten(2).data_ptr() == out.data_ptr()


@torch.no_grad()
def test_casts_are_as_many_as_runs_that_are_real():
    "float32 in, bfloat16 inside: q, k, v in and the output back, once for each real run."
    q, k, v = qkv(dtype=torch.float32)
    names = operations(lambda: MixedPrecision(POLICIES["mixed"])(q, k, v))
    plain = operations(
        lambda: MixedPrecision(HeadPrecision(("float32",) * 2 + ("int4",), ("float32",) * 3, group=3))(q, k, v)
    )
    assert names.count("aten::_to_copy") - plain.count("aten::_to_copy") == 4


def test_options_go_to_every_run():
    told = []

    def attend(q, k, v, **options):
        told.append(options)
        return v[:, :1].expand(-1, q.shape[1], -1, -1)[:, :, : q.shape[2]]

    q, k, v = qkv()
    mask, bias = torch.ones(s.h, 1, s.m).bool(), torch.randn(1, s.h, s.n, s.m)
    mask[0, 0, 0] = False
    MixedPrecision(POLICIES["integers"], attend)(q, k, v, mask=mask, bias=bias, is_causal=True, dropout_p=0.25)
    assert len(told) == 3 and all(options["is_causal"] and options["dropout_p"] == 0.25 for options in told)
    for run, options in enumerate(told):
        heads = slice(2 * run, 2 * run + 2)
        assert torch.equal(options["mask"], mask[heads]) and torch.equal(options["bias"], bias[:, heads])
    told.clear()
    MixedPrecision(POLICIES["integers"], attend)(q, k, v, mask=mask[1, 0], bias=bias[:, :1])
    assert all(options["mask"].shape == (s.m,) and options["bias"].shape[1] == 1 for options in told)


# --- padding ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("more", [None, "causal as a mask", "of each head"])
def test_padding_has_no_say_to_the_bit(name, more):
    real = torch.tensor([[True] * 4 + [False] * 3, [False] * 2 + [True] * 5])
    mask = real[:, None, None]
    if more == "causal as a mask":
        mask = mask & torch.ones(s.n, s.m).bool().tril(s.m - s.n)
    if more == "of each head":
        mask = mask & (torch.rand(1, s.h, s.n, 1) < 0.8)
    q, k, v = qkv(dtype=torch.float32)
    plug, outs = MixedPrecision(POLICIES[name]), []
    for filler in (0.0, 7.0, -1e4):
        outs.append(plug(q, *(t.masked_fill(~real[:, None, :, None], filler) for t in (k, v)), mask=mask))
    assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])


def test_padding_that_has_a_say_is_noticed():
    "The plug without the mask: the scales of its keys span the padding too."
    real = torch.tensor([[False] * 2 + [True] * 5] * 2)
    q, k, v = qkv(dtype=torch.float32)

    def blind(k):
        plug = MixedPrecision(POLICIES["one run"], lambda q, k, v, **_: fused_attend(q, k, v, mask=real[:, None, None]))
        return plug(q, k, v)

    assert not torch.equal(blind(k), blind(k.masked_fill(~real[:, None, :, None], 7.0)))


# --- another order ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [[2, 0, 1], [1, 0, 2]])
@pytest.mark.parametrize("name", POLICIES)
def test_permuted_heads_permute_the_policy(name, order):
    layer, x = build(), tokens(9)
    both = with_policy(layer, POLICIES[name])
    alone = with_policy(permute_heads(layer, order), POLICIES[name].permuted(order))
    close(alone(x, is_causal=True), both(x, is_causal=True))
    goes_with = permute_heads(both, order)
    assert goes_with.attend.precision == POLICIES[name].permuted(order)
    close(goes_with(x, is_causal=True), both(x, is_causal=True))
    if name == "integers":  # the policy left behind is noticed
        wrong = with_policy(permute_heads(layer, order), POLICIES[name])
        assert (wrong(x) - both(x)).abs().max() > 1e-3


KINDS = {
    "no biases": dict(bias=False),
    "RoPE, qk_norm": dict(position=RoPE(s.d), qk_norm=nn.RMSNorm),
    "values of their own width": dict(value_dim=16, out_dim=13),
    "window": dict(attend=partial(attention, window=3)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_an_order_changes_nothing_else(kind):
    layer, x = build(**KINDS[kind]), tokens()
    before = copy.deepcopy(layer.state_dict())
    new = permute_heads(layer, [2, 0, 1])
    close(new(x), layer(x))
    for place, head in enumerate([2, 0, 1]):
        (proj, there), (old, here) = new.rows("k", place), layer.rows("k", head)
        assert torch.equal(proj.weight[there], old.weight[here])
    close(permute_heads(new, [1, 2, 0])(x), layer(x))
    assert all(torch.equal(t, before[name]) for name, t in layer.state_dict().items() if isinstance(t, torch.Tensor))


def test_plugs_that_know_their_heads_are_refused():
    temperatures = HeadTemperature(s.h, **float64)
    nn.init.normal_(temperatures.log_temperature)
    for plug in (dict(attend=ALiBi(s.h)), dict(attend=temperatures)):
        with refused(ValueError, "attend=", "something else", "take it off"):
            permute_heads(build(**plug), [2, 0, 1])
    gate = OutputGate(s.e, s.h, head_dim=s.d, **float64)
    with refused(ValueError, "finish=OutputGate"):
        permute_heads(build(finish=gate), [1, 0, 2])
    with refused(ValueError, "ALiBi"):  # also inside a policy
        permute_heads(with_policy(build(attend=ALiBi(s.h)), POLICIES["one run"]), [1, 0, 2])


def test_sorted_heads_are_one_run_a_pair():
    precision = HeadPrecision(("int4", "int8", "int4", "int8", "int4", "int4"), ("int4",) * 5 + ("int3",), group=2)
    layer, x = build(g=6, h=6), tokens(9)
    new, own = sort_heads(layer, precision)
    assert own.keys == ("int4",) * 3 + ("int8",) * 2 + ("int4",) and own.group == 2
    assert len(MixedPrecision(own).runs()) == 3 and len(MixedPrecision(precision).runs()) == 6
    close(with_policy(new, own)(x), with_policy(layer, precision)(x))
    plugged, _ = sort_heads(with_policy(layer, precision), precision)
    assert plugged.attend.precision == own


# --- another basis ---------------------------------------------------------------------------------------------------


def turn(d, *batch):
    return torch.linalg.qr(torch.randn(*batch, d, d, **float64))[0]


@pytest.mark.parametrize("d", [1, 2, 8, 64])
def test_hadamard_is_orthogonal_and_all_of_one_size(d):
    matrix = hadamard(d, **float64)
    close(matrix @ matrix, torch.eye(d, **float64), atol=1e-13)
    close(matrix.abs(), torch.full((d, d), d**-0.5, **float64))
    assert hadamard(d).dtype == torch.float32
    spike = torch.zeros(d, **float64)
    spike[0] = 1.0
    close((matrix @ spike).abs().max(), torch.tensor(d**-0.5, **float64))


@pytest.mark.parametrize("kind", ["no biases", "values of their own width", "window"])
@pytest.mark.parametrize("parts", ["keys", "values", "both"])
@pytest.mark.parametrize("each", [False, True])
def test_a_basis_folds_into_the_weights(kind, parts, each):
    layer, x = build(**KINDS[kind]), tokens()
    h, g, d = layer.layout
    keys = turn(d, g) if each else hadamard(d, **float64)
    values = turn(layer.layout.value_dim, g) if each else hadamard(layer.layout.value_dim, **float64)
    new = rotate_heads(layer, keys if parts != "values" else None, values if parts != "keys" else None)
    close(new(x, is_causal=True), layer(x, is_causal=True))
    k, of_k = layer.qkv(x)[1], new.qkv(x)[1]
    close(of_k, k if parts == "values" else k @ (keys if each else keys.expand(g, d, d)).mT)
    assert new.state_dict().keys() == layer.state_dict().keys()


def test_a_rotated_layer_rounds_in_the_new_basis():
    layer, x, precision = build(), tokens(8), POLICIES["integers"]
    matrix = hadamard(s.d, **float64)
    rotated = rotate_heads(with_policy(layer, precision), matrix, matrix)
    assert rotated.attend.precision == precision
    close(rotated(x), with_policy(rotate_heads(layer, matrix, matrix), precision)(x))
    assert (rotated(x) - with_policy(layer, precision)(x)).abs().max() > 1e-3


def test_positions_and_norms_refuse_the_keys_and_not_the_values():
    matrix = hadamard(s.d, **float64)
    for options, word in ((dict(position=RoPE(s.d)), "position"), (dict(qk_norm=nn.RMSNorm), "qk_norm")):
        layer, x = build(**options), tokens()
        with refused(ValueError, word, "RotatedPosition"):
            rotate_heads(layer, keys=matrix)
        close(rotate_heads(layer, values=matrix)(x), layer(x))
        new = copy.deepcopy(layer)
        fill_socket(new, "position", RotatedPosition(new.position, matrix))
        close(new(x), layer(x))
        q, k, _ = new.qkv(x)
        close(k, layer.qkv(x)[1] @ matrix.mT)


@pytest.mark.parametrize("cut", [[9], [1] * 9, [4, 1, 3, 1]])
def test_a_turn_behind_rope_goes_with_a_cache(cut):
    layer, x = build(position=RotatedPosition(RoPE(s.d), turn(s.d))).requires_grad_(False), tokens(9)
    cache = KVCache(s.b, s.g, 16, s.d, **float64)
    done = torch.cat([layer(piece, is_causal=True, cache=cache) for piece in x.split(cut, 1)], 1)
    close(done, layer(x, is_causal=True))
    fill_socket(layer, "position", RoPE(s.d))
    close(done, layer(x, is_causal=True))


def test_a_turn_before_rope_is_another_function():
    layer, x, matrix = build(position=RoPE(s.d)), tokens(), hadamard(s.d, **float64)

    def before(q, k, *, offset):
        return RoPE(s.d)(q @ matrix.mT, k @ matrix.mT, offset=offset)

    new = copy.deepcopy(layer)
    fill_socket(new, "position", before)
    assert (new(x) - layer(x)).abs().max() > 1e-2


def test_a_turn_is_not_rounded_with_its_layer():
    layer = build(position=RotatedPosition(None, turn(s.d)))
    assert layer.to(torch.bfloat16).position.rotation.dtype == torch.float64
    assert layer(tokens(dtype=torch.bfloat16)).dtype == torch.bfloat16 and "rotation" not in str(layer.state_dict())
    assert torch.equal(copy.deepcopy(layer).position.rotation, layer.position.rotation)


# --- caches ----------------------------------------------------------------------------------------------------------

CACHED = {
    "integers": HeadPrecision(("int4", "int8", "int4"), ("int3", "int3", "int2"), group=3),
    "first exact": HeadPrecision(("int4", "int2", "int2"), ("int3", "bfloat16", "float32"), group=3, exact_first=2),
    "real": HeadPrecision.uniform(3, "bfloat16"),
}


def in_pieces(layer, x, cut):
    cache = KVCache(s.b, s.g, 24, s.d, **float64)
    return torch.cat([layer(piece, is_causal=True, cache=cache) for piece in x.split(cut, 1)], 1)


@pytest.mark.parametrize("name", CACHED)
@pytest.mark.parametrize("blocks", [[1, 3], [2, 2], [1, 1, 1, 1], [4]])
def test_cuts_between_blocks_change_nothing(name, blocks):
    first = CACHED[name].exact_first
    layer = with_policy(build(position=RoPE(s.d)), CACHED[name]).requires_grad_(False)
    cut = [3 * count for count in blocks]
    cut[0] += first
    x = tokens(sum(cut))
    whole = layer(x, is_causal=True)
    close(in_pieces(layer, x, cut), whole)


@pytest.mark.parametrize("cut", [[1] * 12, [4, 1, 3, 4], [7, 5], [2, 10]])
def test_other_cuts_stay_within_the_bound_of_the_rounding(cut):
    """A logit differs by at most |q|_1 · (largest key error) / sqrt(d) =: t on either side of the exact one, so the
    weights by at most e^2t - 1, and the outputs by that times the largest value, plus the rounding of the values."""
    layer = build(position=RoPE(s.d)).requires_grad_(False)
    x, precision = tokens(12), HeadPrecision.uniform(3, "int6", group=3)
    q, k, v = layer.qkv(x)
    plug = MixedPrecision(precision)
    halves = {"k": k.unflatten(2, (-1, 3)), "v": v}
    t = max_error(halves["k"], 3, 6) * q.abs().sum(-1).max() / s.d**0.5
    bound = 2 * ((2 * t).exp() - 1) * (v.abs().max() + max_error(v, -1, 6)) + 2 * max_error(v, -1, 6)
    cache = KVCache(s.b, s.g, 24, s.d, **float64)
    outs = []
    for new_q, new_k, new_v in zip(q.split(cut, 2), k.split(cut, 2), v.split(cut, 2)):
        all_k, all_v, mask = cache.append(new_k, new_v)
        cache.commit()
        outs.append(plug(new_q, all_k, all_v, mask=mask, is_causal=True))
    far = (torch.cat(outs, 2) - plug(q, k, v, is_causal=True)).abs().max()
    assert 0 < far <= bound


def max_error(x, dim, bits):
    "Half a scale, of float16, rounded up."
    return ((x.amax(dim) - x.amin(dim)) / (2**bits - 1)).max() * 0.5 * (1 + 2**-8)


# --- policies as text ------------------------------------------------------------------------------------------------


def model_of():
    return nn.ModuleDict({"one": build(), "two": nn.Sequential(nn.Linear(3, 3), build(g=2))})


def policies():
    return {"one": POLICIES["first exact"], "two.1": HeadPrecision(("int4", "int8"), ("float32", "int2"))}


def test_policies_are_text_and_come_back():
    text = precisions_to_json(policies())
    assert precisions_from_json(text, model_of()) == policies()
    assert json.loads(text)["version"] == 1
    assert precisions_from_json(precisions_to_json({}), model_of()) == {}
    layer = build()
    assert precisions_from_json(precisions_to_json({"": POLICIES["mixed"]}), layer) == {"": POLICIES["mixed"]}


def changed(**fields):
    data = json.loads(precisions_to_json(policies()))
    data["layers"]["one"] |= fields
    return json.dumps(data)


def top(**fields):
    return json.dumps(json.loads(precisions_to_json(policies())) | fields)


ONE = '{"keys": ["int4"], "values": ["int4"], "group": 4, "exact_first": 0}'
BAD_TEXTS = {
    "no JSON": ("policy", ("Expecting value",)),
    "a list": ("[]", ("object with version, layers",)),
    "a number too many": (top(more=1), ("more",)),
    "no version": ('{"layers": {}}', ("version",)),
    "a later version": (top(version=2), ("version 2", "1")),
    "a version that is true": (top(version=True), ("True",)),
    "layers that are a list": (top(layers=[]), ("layers must be an object",)),
    "another name": (precisions_to_json({"three": POLICIES["mixed"]}), ("'three'", "'one'", "2")),
    "no attention": (precisions_to_json({"two.0": POLICIES["mixed"]}), ("'two.0'",)),
    "other heads": (precisions_to_json({"two.1": POLICIES["mixed"]}), ("'two.1'", "3", "2")),
    "unknown format": (changed(keys=["int4", "int9", "int4"]), ("'one'", "'int9'")),
    "a format that is a number": (changed(keys=[4, 4, 4]), ("'one'", "4")),
    "a format that is a list": (changed(keys=[["int4"]] * 3), ("'one'",)),
    "keys that are a string": (changed(keys="int"), ("'one'", "list")),
    "uneven": (changed(keys=["int4"]), ("'one'", "heads differ")),
    "a group that is a float": (changed(group=4.0), ("'one'", "group", "4.0")),
    "a group that is true": (changed(group=True), ("'one'", "group")),
    "no group": (changed(group=0), ("'one'", "group")),
    "less than none": (changed(exact_first=-1), ("'one'", "exact_first")),
    "a field too many": (changed(bits=4), ("'one'", "bits")),
    "a layer that is null": (top(layers={"one": None}), ("'one'", "None")),
    "a name twice": (f'{{"version": 1, "layers": {{"one": {ONE}, "one": {ONE}}}}}', ("'one' twice",)),
    "a field twice": ('{"version": 1, "version": 1, "layers": {}}', ("'version' twice",)),
    "too deep": ("[" * 100_000, ("too deep",)),
}


@pytest.mark.parametrize("name", BAD_TEXTS)
def test_a_text_that_says_something_else_is_refused(name, own_messages):
    text, words = BAD_TEXTS[name]
    with refused(ValueError, *words):
        precisions_from_json(text, model_of())


def test_what_is_no_text_or_no_policy_is_refused(own_messages):
    with refused(TypeError, "text must be a str", "bytes"):
        precisions_from_json(b"{}", model_of())
    with refused(TypeError, "dict", "HeadPrecision"):
        precisions_to_json(POLICIES["mixed"])
    with refused(TypeError, "'one'", "HeadPrecision", "str"):
        precisions_to_json({"one": "int4"})
    with refused(TypeError, "name", "1"):
        precisions_to_json({1: POLICIES["mixed"]})


# --- policies for a while --------------------------------------------------------------------------------------------


def test_a_model_is_under_a_policy_for_a_while():
    model, x = model_of(), tokens()
    own = HeadTemperature(s.h, **float64)
    fill_socket(model["one"], "attend", own)  # a module does not give way to a function, nor the other way round
    before = [model["one"](x), model["two"][1](x)]
    keys = [*model.state_dict()]
    with use_precision(model, policies()):
        plugs = model["one"].attend, model["two"][1].attend
        assert [plug.precision for plug in plugs] == [*policies().values()]
        assert plugs[0].attend is own and plugs[1].attend is fused_attend
    after = [model["one"](x), model["two"][1](x)]
    assert all(map(torch.equal, before, after)) and [*model.state_dict()] == keys
    assert model["one"].attend is own and model["two"][1].attend is fused_attend


def test_after_an_error_the_plugs_are_back(own_messages):
    model = model_of()
    with pytest.raises(KeyError), use_precision(model, policies()):
        raise KeyError
    assert model["one"].attend is fused_attend and model["two"][1].attend is fused_attend
    for wrong, error in (
        ({"two.1": POLICIES["mixed"]}, ValueError),
        ({"three": POLICIES["mixed"]}, ValueError),
        ({"one": "int4"}, TypeError),
        (POLICIES["mixed"], TypeError),
    ):
        with pytest.raises(error), use_precision(model, policies() | wrong if isinstance(wrong, dict) else wrong):
            raise AssertionError("never here")
        assert model["one"].attend is fused_attend


def test_a_policy_within_a_policy_stands_alone():
    layer, x = build(), tokens()
    with use_precision(layer, {"": POLICIES["integers"]}):
        outer = layer.attend
        with use_precision(layer, {"": POLICIES["one run"]}):
            inner = layer(x)
        assert layer.attend is outer
    assert torch.equal(inner, with_policy(layer, POLICIES["one run"])(x)) and layer.attend is fused_attend


# --- gradients and transforms ----------------------------------------------------------------------------------------


def test_gradients_pass_as_if_nothing_were_rounded():
    "The gradient is that of the kernel at the rounded keys and values."
    inputs = [t.requires_grad_() for t in qkv()]
    seen = []

    def look(q, k, v, **options):
        seen.append([t.detach().requires_grad_() for t in (q, k, v)])
        return fused_attend(q, k, v, **options)

    weights = torch.randn(s.b, s.h, s.n, s.d, **float64)
    (MixedPrecision(POLICIES["one run"], look)(*inputs) * weights).sum().backward()
    (fused_attend(*seen[0]) * weights).sum().backward()
    for t, at in zip(inputs, seen[0]):
        close(t.grad, at.grad)


@pytest.mark.parametrize("name", POLICIES)
def test_a_layer_under_a_policy_learns(name):
    torch.manual_seed(0)
    layer = with_policy(build(dtype=torch.float32), POLICIES[name])
    x, target = tokens(8, dtype=torch.float32), tokens(8, dtype=torch.float32)
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = (layer(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # the kernel under vmap
@pytest.mark.parametrize("name", POLICIES)
def test_transforms(name, own_messages):
    torch.compiler.reset()  # all policies are one class, and a class is not compiled again without end
    layer = with_policy(build(dtype=torch.float32), POLICIES[name]).requires_grad_(False)
    x = tokens(8, dtype=torch.float32)
    exact = layer(x)
    same = partial(torch.testing.assert_close, atol=1e-4, rtol=1e-4)
    same(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), exact)
    anywhere = torch.compile(layer, fullgraph=True, dynamic=True, backend="eager")
    for n in 8, 9, 11:
        longer = tokens(n, dtype=torch.float32)
        same(anywhere(longer), layer(longer))
    same(torch.export.export(layer, (x,)).module()(x), exact)
    same(torch.vmap(lambda row: layer(row[None])[0])(x), exact)
    assert layer.to("meta")(x.to("meta")).shape == exact.shape


def test_a_second_derivative_has_its_way_out():
    inputs = [t.requires_grad_() for t in qkv()]
    policy = POLICIES["one run"]
    first = torch.autograd.grad(MixedPrecision(policy)(*inputs).square().sum(), inputs, create_graph=True)
    with refused(RuntimeError, "plain_attention"):
        first[0].square().sum().backward()
    first = torch.autograd.grad(
        MixedPrecision(policy, plain_attention)(*inputs).square().sum(), inputs, create_graph=True
    )
    first[0].square().sum().backward()
    assert inputs[1].grad.isfinite().all()


def test_maps_of_what_rounds_only_keys():
    layer, x = build(), tokens(8)
    keys_only = with_policy(layer, HeadPrecision(("int4",) * 3, ("float32",) * 3, group=4))
    assert keys_only.to(torch.float32).attention_map(x.float()).shape == (s.b, s.h, 8, 8)
    with refused(ValueError, "not linear"):
        with_policy(layer, POLICIES["one run"]).attention_map(x)


# --- what is refused -------------------------------------------------------------------------------------------------

BAD = {
    "no policy": (lambda: MixedPrecision("int4"), TypeError, ("precision", "HeadPrecision", "str")),
    "no plug": (lambda: MixedPrecision(POLICIES["mixed"], 4), TypeError, ("attend", "4")),
    "heads": (lambda: MixedPrecision(POLICIES["mixed"])(*qkv(g=2)), ValueError, ("2 key-value heads", "3")),
    "shapes": (lambda: MixedPrecision(POLICIES["mixed"])(*qkv()[:2], qkv(m=9)[2]), ValueError, ("length differs",)),
    "mask": (lambda: MixedPrecision(POLICIES["mixed"])(*qkv(), mask=torch.ones(5).bool()), ValueError, ("mask",)),
    "plug that counts heads": (
        lambda: MixedPrecision(POLICIES["integers"], ALiBi(s.h))(*qkv()),
        ValueError,
        ("slopes",),
    ),
    "order, too few": (lambda: permute_heads(build(), [0, 1]), ValueError, ("[0, 1]", "3")),
    "order, twice": (lambda: permute_heads(build(), [0, 1, 1]), ValueError, ("[0, 1, 1]",)),
    "order, a tensor": (lambda: permute_heads(build(), torch.arange(3)), TypeError, ("order", "list of ints")),
    "order, bools": (lambda: permute_heads(build(), [False, True, 2]), TypeError, ("list of ints",)),
    "order, empty": (lambda: permute_heads(build(), []), TypeError, ("list of ints",)),
    "no layer": (lambda: permute_heads(nn.Linear(3, 3), [0]), TypeError, ("MultiHeadAttention", "Linear")),
    "sort, heads": (lambda: sort_heads(build(), HeadPrecision.uniform(2, "int4")), ValueError, ("2", "3")),
    "sort, no policy": (lambda: sort_heads(build(), "int4"), TypeError, ("HeadPrecision",)),
    "hadamard, 6": (lambda: hadamard(6), ValueError, ("6", "power of two")),
    "hadamard, 8.0": (lambda: hadamard(8.0), TypeError, ("d", "8.0")),
    "hadamard, none": (lambda: hadamard(0), ValueError, ("d", "0")),
    "no rotation": (lambda: rotate_heads(build(), keys=torch.ones(s.d, s.d, **float64)), ValueError, ("orthogonal",)),
    "width": (lambda: rotate_heads(build(), values=hadamard(16, **float64)), ValueError, ("(3, 16, 16)", "(3, 8, 8)")),
    "no matrix": (lambda: rotate_heads(build(), keys=3), TypeError, ("keys", "tensor")),
    "turn, no rotation": (lambda: RotatedPosition(None, torch.ones(3, 3)), ValueError, ("orthogonal",)),
    "turn, no square": (lambda: RotatedPosition(None, torch.ones(3, 2)), ValueError, ("(3, 2)",)),
    "turn, no tensor": (lambda: RotatedPosition(None, 3), TypeError, ("rotation",)),
    "turn, position": (lambda: RotatedPosition(3, torch.eye(3)), TypeError, ("position",)),
    "turn, width": (lambda: RotatedPosition(None, torch.eye(3))(*qkv()[:2]), ValueError, ("8", "3")),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused(name, own_messages):
    call, error, words = BAD[name]
    with refused(error, *words):
        call()
