"""Rounding within half a scale, by exact fractions; bytes really saved; saturation, padding, gradients, refusals."""

import copy
import itertools
import math
import pickle
from fractions import Fraction

import pytest
import torch

from mha_book.plugs import quantize as module
from mha_book.plugs.quantize import (
    KV_FORMATS,
    Codes,
    HeadPrecision,
    check_format,
    dequantize,
    key_bits,
    pack,
    quantize,
    round_keys,
    round_values,
    runs,
    unpack,
    value_bits,
)
from support.refusals import refused

FLOATS = torch.float64, torch.float32, torch.bfloat16, torch.float16
INTEGERS = [name for name, form in KV_FORMATS.items() if form.dtype is None]
B, G, M, D, DV = 2, 3, 13, 8, 5


def heads(width=D, dtype=torch.float32, m=M, scale=1.0, offset=0.0):
    return (torch.randn(B, G, m, width, dtype=torch.float64) * scale + offset).to(dtype)


# --- the definition, one group at a time, in fractions ---------------------------------------------------------------


def exact(x) -> list[Fraction]:
    return [Fraction(number) for number in x.double().tolist()]


def too_far(x, codes, bits) -> list:
    """What is wrong with the codes of one group, in exact arithmetic: codes that are none, a span that does not hold
    the group, numbers further away than half a scale."""
    scale, zero = Fraction(codes.scale.item()), Fraction(codes.zero.item())
    digits = {torch.float64: 50}.get(x.dtype, 21)  # quantising divides in float64, or in float32
    allowed = scale / 2 * (1 + Fraction(1, 2**digits) * 2**bits)
    faults = [code for code in codes.codes.tolist() if not 0 <= code < 2**bits]
    faults += [number for number in exact(x) if not zero <= number <= zero + scale * (2**bits - 1)]
    pairs = zip(exact(x), codes.codes.tolist())
    return faults + [float(number) for number, code in pairs if abs(code * scale + zero - number) > allowed]


GROUPS = {
    "ordinary": lambda: torch.randn(24, dtype=torch.float64),
    "an offset": lambda: torch.randn(24, dtype=torch.float64) * 0.1 + 37.0,
    "a negative offset": lambda: torch.randn(24, dtype=torch.float64) * 0.1 - 37.0,
    "one loud number": lambda: torch.cat([torch.randn(23, dtype=torch.float64), torch.tensor([900.0]).double()]),
    "tiny": lambda: torch.randn(24, dtype=torch.float64) * 1e-4,
    "below what float16 has": lambda: torch.randn(24, dtype=torch.float64) * 1e-9,
    "huge": lambda: torch.rand(24, dtype=torch.float64) * 60000 - 30000,
    "a constant": lambda: torch.full((24,), 1.1, dtype=torch.float64),
    "a negative constant": lambda: torch.full((24,), -1.1, dtype=torch.float64),
    "a constant that float16 has": lambda: torch.full((24,), 0.75, dtype=torch.float64),
    "zeros": lambda: torch.zeros(24, dtype=torch.float64),
    "one number": lambda: torch.tensor([0.3], dtype=torch.float64),
    "powers of two": lambda: torch.tensor([1.0, 2, 4, 8, 16, 32, 64, 128], dtype=torch.float64),
}


@pytest.mark.parametrize("title, bits", list(itertools.product(GROUPS, range(1, 9))))
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_what_comes_back_is_within_half_a_scale(title, bits, dtype):
    x = GROUPS[title]().to(dtype)
    codes = quantize(x, bits, -1)
    assert codes.scale.dtype == codes.zero.dtype == torch.float16 and codes.codes.dtype == torch.uint8
    assert too_far(x, codes, bits) == []


@pytest.mark.parametrize(
    "broken",
    [
        lambda c, x: c._replace(codes=((x - c.zero.double()) / c.scale.double()).floor().to(torch.uint8)),  # truncated
        lambda c, x: c._replace(codes=c.codes + 1),
        lambda c, x: c._replace(scale=(c.scale * 0.97).half()),  # rounded down: the largest is out of reach
        lambda c, x: c._replace(zero=(c.zero + 0.02 * c.scale).half()),  # rounded up: the least is
    ],
)
def test_codes_that_are_too_far_are_noticed(broken):
    x = GROUPS["ordinary"]()
    assert too_far(x, broken(quantize(x, 4, -1), x), 4)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_the_numbers_again_are_code_times_scale_plus_zero(dtype):
    x = heads(dtype=dtype)
    codes = quantize(x, 4, 2)
    for b, g, d in itertools.product(range(B), range(G), range(D)):
        scale, zero = (Fraction(t[b, g, 0, d].item()) for t in (codes.scale, codes.zero))
        found = dequantize(codes, dtype)[b, g, :, d]
        wanted = torch.tensor([float(code * scale + zero) for code in codes.codes[b, g, :, d].tolist()]).double()
        assert found.dtype == dtype
        eps = max(torch.finfo(dtype).eps, 2 * torch.finfo(torch.float32).eps) if dtype != torch.float64 else 1e-15
        assert (found.double() - wanted).abs().max() <= eps * (1 + wanted.abs().max())


@pytest.mark.parametrize("bits", range(1, 9))
def test_a_group_that_has_the_ends_and_the_steps_comes_back_exactly(bits):
    steps = torch.arange(2**bits, dtype=torch.float32) * 0.25 - 3.0
    codes = quantize(steps, bits, 0)
    assert torch.equal(codes.codes.long(), torch.arange(2**bits))
    assert torch.equal(dequantize(codes, torch.float32), steps)


@pytest.mark.parametrize("dim", [0, 1, 2, 3, -1, -2])
def test_groups_lie_along_the_axis_that_is_named(dim):
    x = heads()
    whole = quantize(x, 3, dim)
    for place in itertools.product(*(range(size) for size in whole.scale.shape)):
        index = list(place)
        index[dim] = slice(None)
        alone = quantize(x[tuple(index)], 3, 0)
        assert torch.equal(whole.codes[tuple(index)], alone.codes)
        assert torch.equal(whole.scale[place], alone.scale[0]) and torch.equal(whole.zero[place], alone.zero[0])


def test_truncation_costs_four_times_the_squared_error():
    "An error that is uniform on [0, s) has the mean square s² / 3; on [-s/2, s/2) it has s² / 12."
    x = torch.rand(64, 4096, dtype=torch.float64)
    codes = quantize(x, 6, -1)
    scale, zero = codes.scale.double(), codes.zero.double()
    rounded = dequantize(codes, torch.float64) - x
    truncated = ((x - zero) / scale).floor() * scale + zero - x
    step = scale.square().mean()
    assert rounded.square().mean() / step == pytest.approx(1 / 12, rel=0.02)
    assert truncated.square().mean() / step == pytest.approx(1 / 3, rel=0.02)


# --- what is not finite, what is padding -----------------------------------------------------------------------------


@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("bits", [1, 4, 8])
def test_a_group_with_a_number_that_is_not_finite_reads_nan_and_no_other(odd, bits):
    x = heads()
    wanted = dequantize(quantize(x, bits, -1), x.dtype)
    x[1, 2, 4, 3] = odd
    found = dequantize(quantize(x, bits, -1), x.dtype)
    assert found[1, 2, 4].isnan().all()
    found[1, 2, 4] = wanted[1, 2, 4]
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("group", [[-70000.0, 1.0], [70000.0, 70001.0], [-60000.0, 60000.0]])
def test_a_range_beyond_float16_reads_nan_instead_of_a_wrong_number(group):
    x = torch.tensor(group)
    assert dequantize(quantize(x, 1, 0), x.dtype).isnan().all()


def test_a_range_that_float16_just_has_is_kept():
    x = torch.tensor([-32752.0, 0.0, 32752.0])
    assert too_far(x, quantize(x, 1, 0), 1) == []


@pytest.mark.parametrize("content", [0.0, 1e6, -1e6, math.nan, math.inf])
@pytest.mark.parametrize("bits", [2, 5, 8])
def test_padding_has_no_say(content, bits):
    k, real = heads(), torch.ones(B, M, dtype=torch.bool)
    real[0, :5], real[1, 9:] = False, False
    where = real[:, None, :, None]
    wanted = quantize(k, bits, 2, where)
    found = quantize(k.masked_fill(~where, content), bits, 2, where)
    assert torch.equal(found.scale, wanted.scale) and torch.equal(found.zero, wanted.zero)
    kept = where.expand_as(k)
    assert torch.equal(found.codes[kept], wanted.codes[kept])
    assert found.codes.max().item() < 2**bits  # codes of padding, too: they are packed beside others
    row = quantize(k[:1, :, 5:], bits, 2)  # the same tokens with no padding at all
    assert torch.equal(row.scale, wanted.scale[:1]) and torch.equal(row.codes, wanted.codes[:1, :, 5:])
    rounded = [round_keys(t, f"int{bits}", M, real) for t in (k, k.masked_fill(~where, content))]
    assert torch.equal(rounded[0][kept], rounded[1][kept])


@pytest.mark.parametrize("content", [0.0, 7.0, math.nan, math.inf, -math.inf])
def test_a_block_of_padding_only_is_finite(content):
    x = torch.full((3, 4), content)
    codes = quantize(x, 4, 0, torch.zeros(3, 1, dtype=torch.bool))
    assert dequantize(codes, x.dtype).isfinite().all()
    k = heads(m=12)
    k[:, :, :4] = content
    real = torch.ones(B, 12, dtype=torch.bool)
    real[:, :4] = False
    assert round_keys(k, "int4", 4, real).isfinite().all()


# --- packed ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", range(1, 9))
def test_packed_codes_come_back_and_are_smaller(bits):
    codes = torch.randint(0, 2**bits, (2, 3, 24), dtype=torch.uint8)
    codes[0, 0] = 2**bits - 1
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8 and packed.untyped_storage().nbytes() == codes.numel() * bits // 8
    assert torch.equal(unpack(packed, bits), codes)
    turned = codes.mT.contiguous().mT  # not contiguous
    assert torch.equal(pack(turned, bits), packed)


@pytest.mark.parametrize("bits", range(1, 9))
def test_every_byte_counts(bits):
    "All codes of two neighbours: no two of them are packed alike."
    every = torch.cartesian_prod(*[torch.arange(2 ** min(bits, 5), dtype=torch.uint8)] * 2)
    codes = torch.zeros(len(every), 8, dtype=torch.uint8)
    codes[:, 2:4] = every << (bits - min(bits, 5))
    assert len(pack(codes, bits).unique(dim=0)) == len(every)


@pytest.mark.parametrize("bits, fewest", [(1, 8), (2, 4), (3, 8), (4, 2), (5, 8), (6, 4), (7, 8), (8, 1)])
def test_the_fewest_codes_that_fill_bytes(bits, fewest):
    codes = torch.randint(0, 2**bits, (fewest,), dtype=torch.uint8)
    assert torch.equal(unpack(pack(codes, bits), bits), codes)
    if fewest > 1:
        with refused(ValueError, str((fewest - 1,)), str(fewest), f"{bits} bits"):
            pack(codes[:-1], bits)


def test_no_codes_are_packed_to_no_bytes():
    empty = torch.zeros(2, 0, 8, dtype=torch.uint8)
    assert pack(empty, 3).shape == (2, 0, 3) and unpack(pack(empty, 3), 3).shape == (2, 0, 8)


# --- keys and values -------------------------------------------------------------------------------------------------


def keys_by_loops(k, bits, group):
    "A block at a time, a channel at a time, in float64."
    out = k.double().clone()
    for b, g, d in itertools.product(range(k.shape[0]), range(k.shape[1]), range(k.shape[3])):
        for start in range(0, k.shape[2] - group + 1, group):
            block = k[b, g, start : start + group, d]
            out[b, g, start : start + group, d] = dequantize(quantize(block, bits, 0), torch.float64)
    return out


@pytest.mark.parametrize("form, group, dtype", list(itertools.product(INTEGERS, [1, 3, 5, 13, 64], FLOATS)))
def test_keys_take_a_scale_for_each_channel_of_a_block(form, group, dtype):
    k = heads(dtype=dtype, offset=0.7)
    found = round_keys(k, form, group)
    assert found.dtype == dtype and found.shape == k.shape
    wanted = keys_by_loops(k, KV_FORMATS[form].bits, group).to(dtype)
    assert (found.double() - wanted.double()).abs().max() <= torch.finfo(dtype).eps * wanted.double().abs().max()
    rest = M - M % group
    assert torch.equal(found[:, :, rest:], k[:, :, rest:])  # what fills no block stays


@pytest.mark.parametrize("form, dtype", list(itertools.product(INTEGERS, FLOATS)))
def test_values_take_a_scale_for_each_token(form, dtype):
    v = heads(DV, dtype, offset=-0.7)
    found = round_values(v, form)
    assert found.dtype == dtype
    for b, g, m in itertools.product(range(B), range(G), range(M)):
        assert torch.equal(found[b, g, m], dequantize(quantize(v[b, g, m], KV_FORMATS[form].bits, 0), dtype))


def test_one_loud_channel_spoils_a_scale_for_each_token_only():
    k = heads(64, m=64)
    k[..., 5] *= 20
    quiet = [c for c in range(64) if c != 5]
    lost = {
        name: (rounded - k)[..., quiet].norm() / k[..., quiet].norm()
        for name, rounded in {"channel": round_keys(k, "int4", 64), "token": round_values(k, "int4")}.items()
    }
    assert lost["channel"] < 0.12 and lost["token"] > 4 * lost["channel"]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("form", [name for name, form in KV_FORMATS.items() if form.dtype is not None])
def test_a_float_format_is_torchs_cast_within_its_range(form, dtype):
    x, other = heads(dtype=dtype), KV_FORMATS[form].dtype
    for found in round_keys(x, form), round_values(x, form):
        assert torch.equal(found, x.to(other).to(dtype))
    holds = torch.finfo(other).bits >= torch.finfo(dtype).bits and {other, dtype} != {torch.float16, torch.bfloat16}
    assert KV_FORMATS[form].holds(dtype) == holds
    assert (round_values(x, form) is x) == holds  # bit for bit, no copy


@pytest.mark.parametrize(
    "form, number, most",
    [
        ("float16", 70000.0, 65504.0),
        ("float8_e4m3fn", 500.0, 448.0),
        ("float8_e5m2", 1e6, 57344.0),
        ("bfloat16", 3.4e38, torch.finfo(torch.bfloat16).max),
        ("float8_e4m3fn", math.inf, 448.0),
    ],
)
@pytest.mark.parametrize("trained", [False, True])
def test_floats_saturate(form, number, most, trained):
    x = torch.full((1, 1, 2, 3), number)
    x[..., 1] *= -1
    x[..., 2] = 0.5
    cast = x.to(KV_FORMATS[form].dtype).float()
    assert not cast[..., :2].isfinite().any() or form in ("float8_e4m3fn", "bfloat16")
    found = round_values(x.requires_grad_(trained), form).detach()
    assert found[0, 0, 0].tolist() == [most, -most, 0.5]


def test_float16_stays_finite_through_bfloat16():
    "65504 is 65536 in bfloat16, which float16 has not."
    x = torch.full((1, 1, 1, 2), 65504.0).half()
    assert x.bfloat16().half().isinf().all()
    assert torch.equal(round_values(x, "bfloat16"), x)


def test_what_is_no_number_stays_none_in_every_format():
    x = torch.full((1, 1, 4, 3), math.nan)
    for form in KV_FORMATS:
        assert round_values(x, form).isnan().all() and round_keys(x, form, 2).isnan().all()


# --- gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", KV_FORMATS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_gradients_pass_straight_through_and_the_value_is_the_rounded_one(form, dtype):
    for act in round_values, lambda x, form: round_keys(x, form, 4):
        x = heads(dtype=dtype).requires_grad_()
        out, weight = act(x, form), heads(dtype=dtype)
        with torch.no_grad():
            assert torch.equal(out, act(x, form))
        (out * weight).sum().backward()
        assert torch.equal(x.grad, weight)


@pytest.mark.filterwarnings("ignore:.torch.jit.:DeprecationWarning", "ignore:.torch.jit.:FutureWarning")
@pytest.mark.parametrize("form", ["int4", "float8_e4m3fn"])
def test_forward_derivatives_and_those_of_infinities(form):
    x, tangent = heads(), heads()
    assert torch.equal(torch.func.jvp(lambda x: round_values(x, form), (x,), (tangent,))[1], tangent)
    x = torch.tensor([[[[math.inf, 1.0]]]], requires_grad=True)
    round_values(x, "float16").sum().backward()
    assert x.grad.isfinite().all() and x.grad[..., 1] == 1


@pytest.mark.parametrize("form", ["int3", "float8_e5m2"])
def test_under_vmap(form):
    many = torch.stack([heads(), heads()])
    for act in lambda x: round_values(x, form), lambda x: round_keys(x, form, 4):
        assert torch.equal(torch.vmap(act)(many), torch.stack([act(x) for x in many]))


# --- the policy ------------------------------------------------------------------------------------------------------


def counted_bits(policy, m, d, dv):
    "Bits a number of tensors that are really made: packed codes, scales and zero points; or floats."
    stored, numbers = 0, 0
    for formats, width, dim in (policy.keys, d, 2), (policy.values, dv, 3):
        for form in map(KV_FORMATS.get, formats):
            x = torch.randn(1, 1, m, width)
            numbers += x.numel()
            if form.dtype is not None:
                stored += x.to(form.dtype).nbytes
                continue
            groups = x.unflatten(2, (-1, policy.group)) if dim == 2 else x
            codes = quantize(groups, form.bits, 3 if dim == 2 else -1)
            stored += pack(codes.codes, form.bits).nbytes + codes.scale.nbytes + codes.zero.nbytes
    return 8 * stored / numbers


@pytest.mark.parametrize(
    "keys, values, group",
    [
        (["int4"], ["int4"], 64),
        (["int2", "int8", "float16"], ["int3", "float8_e4m3fn", "int5"], 16),
        (["int7", "int6"], ["bfloat16", "float32"], 32),
    ],
)
def test_the_bits_are_those_of_tensors_really_made(keys, values, group):
    policy = HeadPrecision(keys, values, group)
    for d, dv in (16, 24), (64, 64):
        assert policy.bits(d, dv) == pytest.approx(counted_bits(policy, 4 * group, d, dv), rel=1e-12)
    assert policy.bits(64) == policy.bits(64, 64)


def test_four_bits_are_four_and_a_half():
    assert key_bits("int4", 64) == value_bits("int4", 64) == HeadPrecision.uniform(3, "int4").bits(64) == 4.5
    assert value_bits("int4", 32) == key_bits("int4", 32) == 5 and key_bits("float16", 64) == 16


def test_a_policy_keeps_its_words_and_permutes():
    policy = HeadPrecision(["int2", torch.float16, "int4"], ("int8", "float32", torch.bfloat16), 32, 1)
    assert policy.keys == ("int2", "float16", "int4") and policy.values == ("int8", "float32", "bfloat16")
    order = [2, 0, 1]
    turned = policy.permuted(order)
    assert turned.keys == ("int4", "int2", "float16") and turned.values == ("bfloat16", "int8", "float32")
    assert (turned.group, turned.exact_first) == (32, 1)
    assert turned.permuted([order.index(i) for i in range(3)]) == policy
    assert turned.bits(16, 8) == pytest.approx(policy.bits(16, 8))
    assert len({policy, turned, copy.copy(policy)}) == 2 and pickle.loads(pickle.dumps(policy)) == policy
    assert HeadPrecision.uniform(2, "int4", "int2", group=8, exact_first=4) == HeadPrecision(
        ["int4"] * 2, ["int2"] * 2, 8, 4
    )


def test_heads_beside_each_other_that_are_alike():
    found = runs(["a", "a", "b", "a"])
    assert found == [(slice(0, 2), "a"), (slice(2, 3), "b"), (slice(3, 4), "a")]
    assert runs([]) == [] and runs(("x",) * 5) == [(slice(0, 5), "x")]


def test_a_format_by_name_or_by_dtype():
    for name, form in KV_FORMATS.items():
        assert check_format("keys", name) is form
        assert form.dtype is None or check_format("keys", form.dtype) is form
    assert [KV_FORMATS[name].bits for name in ("int2", "float8_e5m2", "bfloat16")] == [2, 8, 16]


# --- bad input -------------------------------------------------------------------------------------------------------

X = torch.randn(2, 3, 4, 8)
C = torch.zeros(2, 8, dtype=torch.uint8)
REFUSED = {
    "bits 0": (lambda: quantize(X, 0, -1), ValueError, "bits", "0"),
    "bits 9": (lambda: quantize(X, 9, -1), ValueError, "bits", "9", "1 to 8"),
    "bits 4.0": (lambda: quantize(X, 4.0, -1), TypeError, "bits", "4.0"),
    "bits True": (lambda: pack(C, True), TypeError, "bits", "True"),
    "no axis": (lambda: quantize(X, 4, 4), ValueError, "dim 4", "(2, 3, 4, 8)"),
    "an axis of nothing": (lambda: quantize(X[:, :, :0], 4, 2), ValueError, "dim 2", "(2, 3, 0, 8)"),
    "two axes": (lambda: quantize(X, 4, (2, 3)), ValueError, "dim (2, 3)"),
    "integers": (lambda: quantize(X.long(), 4, -1), TypeError, "torch.int64", "floating point"),
    "a list": (lambda: quantize([1.0], 4, -1), TypeError, "list"),
    "real in numbers": (lambda: quantize(X, 4, -1, torch.ones(8)), TypeError, "real", "float32"),
    "real of another shape": (
        lambda: quantize(X, 4, -1, torch.ones(5) > 0),
        ValueError,
        "real",
        "(5,)",
        "(2, 3, 4, 8)",
    ),
    "real of more axes": (lambda: quantize(X, 4, -1, torch.ones(2, 1, 1, 1, 1) > 0), ValueError, "real"),
    "codes in floats": (lambda: pack(C.float(), 4), TypeError, "codes", "uint8", "float32"),
    "codes of 7": (lambda: pack(C[:, :7], 3), ValueError, "(2, 7)", "3 bits", "8"),
    "bits 9 of codes": (lambda: pack(C, 9), ValueError, "bits", "9"),
    "bits 0 of codes": (lambda: unpack(C, 0), ValueError, "bits", "0"),
    "bytes of other codes": (lambda: unpack(C, 3), ValueError, "packed", "(2, 8)", "3"),
    "a number": (lambda: pack(torch.tensor(1, dtype=torch.uint8), 8), ValueError, "()"),
    "keys of three axes": (lambda: round_keys(X[0], "int4"), ValueError, "k", "(3, 4, 8)", "b g m d"),
    "values of integers": (lambda: round_values(X.int(), "int4"), TypeError, "v", "int32"),
    "no block": (lambda: round_keys(X, "int4", 0), ValueError, "group", "0"),
    "half a block": (lambda: round_keys(X, "int4", 2.5), TypeError, "group", "2.5"),
    "another mask": (lambda: round_keys(X, "int4", 2, torch.ones(2, 5) > 0), ValueError, "(2, 5)", "(2, 4)"),
    "a mask of heads": (lambda: round_keys(X, "int4", 2, torch.ones(2, 1, 4) > 0), ValueError, "(2, 1, 4)"),
    "no format": (lambda: round_keys(X, "int9"), ValueError, "int9", "int8", "bfloat16"),
    "a dtype that is none": (lambda: round_values(X, torch.int16), ValueError, "int16"),
    "one word for all": (lambda: HeadPrecision("int4", "int4"), TypeError, "keys", "list", "'int4'"),
    "no heads": (lambda: HeadPrecision([], []), TypeError, "keys", "[]"),
    "a head that is no format": (lambda: HeadPrecision(["int4", 4], ["int4"] * 2), ValueError, "keys 4", "int2"),
    "heads that differ": (lambda: HeadPrecision(["int4"] * 2, ["int4"]), ValueError, "keys 2", "values 1"),
    "a group of 0": (lambda: HeadPrecision(["int4"], ["int4"], 0), ValueError, "group", "0"),
    "first tokens -1": (lambda: HeadPrecision(["int4"], ["int4"], 64, -1), ValueError, "exact_first", "-1"),
    "first tokens 1.0": (lambda: HeadPrecision(["int4"], ["int4"], 64, 1.0), ValueError, "exact_first", "1.0"),
    "half a head": (lambda: HeadPrecision.uniform(1.5, "int4"), TypeError, "num_kv_heads", "1.5"),
    "an empty word": (lambda: HeadPrecision.uniform(2, "int4", ""), ValueError, "values ''"),
    "no order": (lambda: HeadPrecision.uniform(3, "int4").permuted([0, 0, 1]), ValueError, "[0, 0, 1]", "3"),
    "keys of no width": (lambda: HeadPrecision.uniform(3, "int4").bits(0), ValueError, "head_dim", "0"),
    "values of no width": (lambda: HeadPrecision.uniform(3, "int4").bits(8, 0), ValueError, "value_dim", "0"),
    "bits of no block": (lambda: key_bits("int4", 0), ValueError, "group", "0"),
}


@pytest.mark.usefixtures("own_messages")
@pytest.mark.parametrize("title", REFUSED)
def test_bad_input_is_refused_in_words(title):
    act, error, *words = REFUSED[title]
    with refused(error, *words):
        act()


def test_numbers_never_change_where_they_stand():
    k, v, codes = heads(), heads(DV), torch.randint(0, 8, (3, 8), dtype=torch.uint8)
    before = [t.clone() for t in (k, v, codes)]
    round_keys(k, "int2", 4), round_values(v, "float8_e5m2"), pack(codes, 3)
    assert all(torch.equal(a, b) for a, b in zip((k, v, codes), before))


# --- wrong versions, and the checks above that see them --------------------------------------------------------------


def truncated(x, bits, dim, real=None):
    right = quantize(x, bits, dim, real)
    steps = (x - right.zero.to(x.dtype)) / right.scale.to(x.dtype)
    return Codes(steps.nan_to_num(0.0).clamp(0, 2**bits - 1).to(torch.uint8), right.scale, right.zero)


def nearest_scale(x, bits, dim, real=None):
    "A scale that is rounded to the nearest float16, down as often as up: the largest falls out of reach."
    low, high = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
    scale, zero = ((high - low) / (2**bits - 1)).half(), low.half()
    steps = ((x - zero.to(x.dtype)) / scale.to(x.dtype)).nan_to_num(0.0).round().clamp(0, 2**bits - 1)
    return Codes(steps.to(torch.uint8), scale, zero)


@pytest.mark.parametrize("wrong", [truncated, nearest_scale])
def test_wrong_ways_to_quantise_are_noticed(wrong, monkeypatch):
    x = torch.cat([torch.randn(40), torch.randn(40) + 3.0])
    right = quantize(x, 8, -1)
    assert too_far(x, right, 8) == [] and too_far(x, wrong(x, 8, -1), 8)
    monkeypatch.setattr(module, "quantize", wrong)
    k = heads()
    assert not torch.equal(round_keys(k, "int5", M), keys_by_loops(k, 5, M).float())


@pytest.mark.usefixtures("own_messages")
@pytest.mark.parametrize("form", ["int3", "float8_e5m2"])
def test_one_graph_holds_it(form):
    k = heads()
    for act in lambda x: round_values(x, form), lambda x: round_keys(x, form, 4):
        assert torch.equal(torch.compile(act, fullgraph=True, backend="eager")(k), act(k))
