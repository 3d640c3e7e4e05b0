"""Formats, gaps and rounding, against every number that a format has, against arithmetic, and on odd inputs."""

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mha_book.instruments.floats import FORMATS, float_format, round_to, spacing, to_tf32

settings.register_profile("book", max_examples=25, deadline=None, derandomize=True)
settings.load_profile("book")
DTYPES = [form.dtype for form in FORMATS.values()] + [torch.float64]
SMALL = [dtype for dtype in DTYPES if dtype.itemsize < 4]  # few enough numbers to look at each
BITS = {1: torch.uint8, 2: torch.int16}


def all_numbers(dtype):
    "Every finite number from 0 up, in float64: their bits count up."
    bits = torch.arange(2 ** (8 * dtype.itemsize - 1)).to(BITS[dtype.itemsize])
    numbers = bits.view(dtype).double()
    return numbers[numbers.isfinite()]


# Formats


@pytest.mark.parametrize(
    "name, exponent, mantissa, smallest, normal, largest",
    [
        ("float32", 8, 23, 2.0**-149, 2.0**-126, (2 - 2.0**-23) * 2.0**127),
        ("bfloat16", 8, 7, 2.0**-133, 2.0**-126, (2 - 2.0**-7) * 2.0**127),
        ("float16", 5, 10, 2.0**-24, 2.0**-14, 65504.0),
        ("float8_e4m3fn", 4, 3, 2.0**-9, 2.0**-6, 448.0),
        ("float8_e5m2", 5, 2, 2.0**-16, 2.0**-14, 57344.0),
    ],
)
def test_formats_are_what_their_definitions_say(name, exponent, mantissa, smallest, normal, largest):
    form = FORMATS[name]
    assert form.dtype is getattr(torch, name)
    assert (form.exponent, form.mantissa) == (exponent, mantissa)
    assert (form.smallest, form.normal, form.largest) == (smallest, normal, largest)
    assert form == float_format(form.dtype)


def test_the_formats_are_five_and_float64_is_known_too():
    assert list(FORMATS) == ["float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2"]
    assert (float_format(torch.float64).exponent, float_format(torch.float64).mantissa) == (11, 52)


@pytest.mark.parametrize("dtype", SMALL)
def test_a_format_begins_and_ends_where_its_numbers_do(dtype):
    numbers, form = all_numbers(dtype), float_format(dtype)
    assert numbers[0] == 0 and numbers[1] == form.smallest and numbers[-1] == form.largest


# Gaps


@pytest.mark.parametrize("dtype", SMALL)
def test_the_gap_is_the_distance_to_the_next_number(dtype):
    numbers = all_numbers(dtype)
    gaps = spacing(numbers[:-1].to(dtype))
    assert gaps.dtype == dtype and torch.equal(gaps.double(), numbers.diff())


@given(st.integers(0, 2**63 - 1), st.sampled_from([torch.float32, torch.float64]), st.sampled_from([1, -1]))
def test_the_gap_is_torchs_nextafter(bits, dtype, sign):
    size = 8 * dtype.itemsize
    integers = torch.tensor([bits % 2 ** (size - 1)], dtype={32: torch.int32, 64: torch.int64}[size])
    x = sign * integers.view(dtype)
    beyond = torch.nextafter(x, x * math.inf if x != 0 else torch.full_like(x, math.inf))
    if beyond.isfinite():
        assert torch.equal(spacing(x), (beyond - x).abs())


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_last_number_has_the_gap_below_it_and_what_is_no_number_has_none(dtype):
    form = float_format(dtype)
    last = torch.tensor([form.largest, -form.largest], dtype=torch.float64).to(dtype)
    below = 2.0 ** (math.floor(math.log2(form.largest)) - form.mantissa)
    if dtype != torch.float64:  # the logarithm of its largest number is rounded to 1024
        assert spacing(last).double().tolist() == [below, below]
    none = torch.tensor([math.nan, math.inf, -math.inf], dtype=torch.float64).to(dtype)
    assert torch.equal(spacing(none).double().isnan(), ~none.double().isfinite())


@pytest.mark.parametrize("dtype", DTYPES)
def test_subnormals_are_equally_far_apart(dtype):
    form = float_format(dtype)
    x = torch.tensor([0.0, -0.0, form.smallest, -form.smallest, form.normal], dtype=torch.float64).to(dtype)
    assert spacing(x).double().tolist() == [form.smallest] * 5


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_shape_and_any_strides(dtype):
    x = torch.randn(3, 4, dtype=torch.float64).to(dtype)
    for view in (x.T, x[:, ::2], x[:0], x[1, 2], x[:1].expand(5, 4)):
        copy = view.contiguous()
        gaps, rounded = spacing(view), round_to(view, torch.float8_e5m2)
        assert gaps.shape == rounded.shape == view.shape
        assert torch.equal(gaps.double(), spacing(copy).double())
        assert torch.equal(rounded.double(), round_to(copy, torch.float8_e5m2).double())
        if dtype == torch.float32:
            assert torch.equal(to_tf32(view), to_tf32(copy))


def test_the_gap_takes_no_part_in_a_gradient():
    assert not spacing(torch.ones(3, requires_grad=True)).requires_grad


# Rounding


def nearest(x, dtype):
    "The nearest of all numbers of `dtype`, ties to the one whose place among them is even."
    numbers = all_numbers(dtype)
    above = torch.searchsorted(numbers, x.abs()).clamp(1, len(numbers) - 1)
    low, high = numbers[above - 1], numbers[above]
    distance = (x.abs() - low) - (high - x.abs())
    up = (distance > 0) | (distance == 0) & (above % 2 == 0)
    return torch.where(up, high, low).copysign(x)


def probes(dtype):
    "float32 from beyond both ends of a format's range: all its numbers, all middles, and others."
    numbers = all_numbers(dtype)
    middles = (numbers[1:] + numbers[:-1]) / 2
    other = torch.exp(torch.empty(3000, dtype=torch.float64).uniform_(math.log(numbers[1] / 8), math.log(numbers[-1])))
    x = torch.cat([numbers, middles, other])
    x = torch.cat([x, -x]).float()
    return x[x.double().abs() <= numbers[-1]]


@pytest.mark.parametrize("dtype", SMALL)
def test_rounding_gives_the_nearest_number(dtype):
    x = probes(dtype)
    rounded = round_to(x, dtype)
    assert rounded.dtype == torch.float32
    assert torch.equal(rounded.double(), nearest(x.double(), dtype))
    assert torch.equal(rounded.signbit(), x.signbit())  # -0 too


@pytest.mark.parametrize("dtype", SMALL)
def test_the_nearest_number_is_neither_cut_off_nor_rounded_up(dtype):
    x, numbers = probes(dtype).double(), all_numbers(dtype)
    place = torch.searchsorted(numbers, x.abs(), right=True)
    assert not torch.equal(numbers[place - 1].copysign(x), nearest(x, dtype))
    assert not torch.equal(numbers[place.clamp(max=len(numbers) - 1)].copysign(x), nearest(x, dtype))


@pytest.mark.parametrize("dtype", SMALL)
@pytest.mark.parametrize("source", DTYPES)
def test_rounding_is_the_cast_and_twice_is_once(source, dtype):
    x = (torch.randn(200, dtype=torch.float64) * 4).to(source)
    once = round_to(x, dtype)
    assert once.dtype == source
    assert torch.equal(once.double(), x.to(dtype).to(source).double())
    if float_format(source).mantissa >= float_format(dtype).mantissa and source.itemsize > 1:
        assert torch.equal(round_to(once, dtype).double(), once.double())


def test_a_wider_format_changes_nothing():
    x = torch.randn(50, dtype=torch.bfloat16)
    assert torch.equal(round_to(x, torch.float32), x) and torch.equal(round_to(x, torch.float64), x)


def test_float64_is_rounded_twice_on_its_way_to_few_bits():
    x = torch.tensor(1 + 2.0**-8 + 2.0**-40, dtype=torch.float64)  # nearer to 1 + 2**-7 than to 1
    assert round_to(x, torch.bfloat16) == 1


def test_what_lies_beyond_the_end():
    far = torch.tensor([1e39, -1e39], dtype=torch.float64)
    for name in ("float32", "bfloat16", "float16", "float8_e5m2"):
        assert round_to(far, FORMATS[name].dtype).tolist() == [math.inf, -math.inf]
    assert round_to(far, torch.float8_e4m3fn).tolist() == [448.0, -448.0]
    many = torch.full((100,), 600.0)  # as many as a vector instruction takes
    assert round_to(many, torch.float8_e4m3fn).unique().tolist() == [448.0]
    assert round_to(torch.tensor(math.nan), torch.float8_e4m3fn).isnan()


@pytest.mark.parametrize("dtype", SMALL)
def test_the_gradient_comes_back_rounded(dtype):
    x, upstream = torch.randn(30, requires_grad=True), torch.randn(30)
    (grad,) = torch.autograd.grad(round_to(x, dtype), x, upstream)
    assert torch.equal(grad, round_to(upstream, dtype))


# TF32


def tf32_by_arithmetic(x):
    "Ten bits behind the leading one, ties to even; subnormals as far as they reach."
    mantissa, exponent = torch.frexp(x.double())
    exponent = exponent.clamp(min=-125)
    unit = 2.0 ** (exponent.double() - 11)
    return (x.double() / unit).round() * unit


@example([0x7F800001, 0x7FFFFFFF, 0xFF800001, 0xFFFFFFFF, 0x7F800000, 0xFF800000, 0x7FC00000])  # NaN of all kinds
@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=50))
def test_tf32_is_ten_bits_of_any_float32(bits):
    x = torch.tensor(bits, dtype=torch.int64).to(torch.int32).view(torch.float32)
    before, got = x.clone(), to_tf32(x)
    finite = x.isfinite()
    assert torch.equal(got[finite].double().float(), tf32_by_arithmetic(x[finite]).float())
    assert torch.equal(got[~finite].view(torch.int32), x[~finite].view(torch.int32))  # NaN and inf as they were
    assert (got[finite].view(torch.int32) & 0x1FFF == 0).all()
    assert torch.equal(x.view(torch.int32), before.view(torch.int32))


@pytest.mark.parametrize(
    "x, expected",
    [
        (1 + 2.0**-10, 1 + 2.0**-10),
        (1 + 2.0**-11, 1.0),
        (1 + 3 * 2.0**-11, 1 + 2.0**-9),
        (1 + 2.0**-11 + 2.0**-23, 1 + 2.0**-10),
        (-1 - 2.0**-11, -1.0),
        (-0.0, -0.0),
        (0.0, 0.0),
        (2 - 2.0**-23, 2.0),
        (3.4028234663852886e38, math.inf),
        (-3.4028234663852886e38, -math.inf),
        (2.0**-149, 0.0),
        (2.0**-136, 2.0**-136),
        (math.inf, math.inf),
    ],
)
def test_tf32_number_by_number(x, expected):
    got = to_tf32(torch.tensor(x)).item()
    assert got == expected and math.copysign(1, got) == math.copysign(1, expected)


def test_tf32_lies_between_bfloat16_and_float16():
    x = torch.randn(500)
    assert torch.equal(to_tf32(x), round_to(x, torch.float16).where(x.abs() > 2**-14, to_tf32(x)))
    assert torch.equal(to_tf32(round_to(x, torch.bfloat16)), round_to(x, torch.bfloat16))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch.func's own call of it
def test_the_gradient_passes_tf32_under_all_transforms():
    x, upstream = torch.randn(7, requires_grad=True), torch.randn(7)
    assert torch.equal(torch.autograd.grad(to_tf32(x), x, upstream)[0], upstream)
    y = x.detach()
    assert torch.equal(torch.func.grad(lambda t: to_tf32(t).square().sum())(y), 2 * to_tf32(y))
    assert torch.equal(torch.func.vmap(to_tf32)(y), to_tf32(y))
    assert torch.equal(torch.func.hessian(lambda t: to_tf32(t).square().sum())(y), 2 * torch.eye(7))


# Bad input

BAD_X = [
    (torch.arange(3), "torch.int64"),
    (torch.ones(2, dtype=torch.bool), "torch.bool"),
    (torch.ones(2, dtype=torch.complex64), "torch.complex64"),
    (1.5, "float"),
    ([1.0], "list"),
    (torch.ones(2).to(torch.float8_e5m2fnuz), "float8_e5m2fnuz"),
]


@pytest.mark.usefixtures("own_messages")
@pytest.mark.parametrize("call", [spacing, to_tf32, lambda x: round_to(x, torch.bfloat16)])
@pytest.mark.parametrize("x, message", BAD_X)
def test_what_is_no_float_is_refused(call, x, message):
    with pytest.raises(TypeError, match=message):
        call(x)


@pytest.mark.usefixtures("own_messages")
@pytest.mark.parametrize(
    "dtype", ["bfloat16", None, torch.int8, torch.complex64, torch.float8_e8m0fnu, float, torch.float4_e2m1fn_x2]
)
def test_what_is_no_format_is_refused(dtype):
    with pytest.raises(TypeError, match="must be one of torch.float64"):
        round_to(torch.ones(2), dtype)
    with pytest.raises(TypeError, match="must be one of torch.float64"):
        float_format(dtype)


@pytest.mark.usefixtures("own_messages")
@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype != torch.float32])
def test_only_float32_is_read_as_tf32(dtype):
    with pytest.raises(TypeError, match=r"convert with .to\(torch.float32\)"):
        to_tf32(torch.ones(2).to(dtype))
