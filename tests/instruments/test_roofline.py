"""FLOPs and bytes of every step, under every option, against torch's counter and tensors; machines and roofs."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from mha_book import HeadLayout, MultiHeadAttention, causal_mask
from mha_book.heads.single_head import plain_attention
from mha_book.instruments import roofline as module
from mha_book.instruments.device import Timing
from mha_book.instruments.roofline import PEAKS, Machine, Work, layer_work, measure_machine

settings.register_profile("book", max_examples=25, deadline=None, derandomize=True)
settings.load_profile("book")
MACHINE = Machine("test", 12.0, 4.0, "by hand")


def counted(call):
    "FLOPs by torch, and what the call returns."
    with FlopCounterMode(display=False) as counter:
        result = call()
    return counter.get_total_flops(), result


def steps(layout, embed_dim, b, n, m, dtype, fused):
    "Each step as a call of torch's own operations and its inputs, on the meta device."
    (h, g, d), dv = layout, layout.value_dim
    x, q, y = (torch.empty(b, n, e, dtype=dtype, device="meta") for e in (embed_dim, h * d, h * dv))
    k, v = (torch.empty(b, g, m, width, dtype=dtype, device="meta") for width in (d, dv))
    q = q.view(b, n, h, d).transpose(1, 2)
    scores = torch.empty(b, h, n, m, dtype=dtype, device="meta")
    proj_in = torch.empty(h * d + g * (d + dv), embed_dim, dtype=dtype, device="meta")
    proj_out = torch.empty(embed_dim, h * dv, dtype=dtype, device="meta")

    def shared(t):
        return t[:, :, None].expand(b, g, h // g, m, t.shape[-1]).flatten(1, 2)

    yield "in_proj", F.linear, (x, proj_in)
    if fused:
        yield "attention", lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True), (q, k, v)
    else:
        yield "scores", lambda q, k: q @ shared(k).mT, (q, k)
        yield "softmax", lambda t: t.softmax(-1), (scores,)
        yield "mix", lambda t, v: t @ shared(v), (scores, v)
    yield "out_proj", F.linear, (y, proj_out)


@st.composite
def layers(draw):
    "A layout and all sizes; heads may be grouped, and their width is its own."
    g, r, d, dv, e, b, n, past = (
        draw(st.integers(low, high)) for low, high in ((1, 4), (1, 4), (1, 9), (1, 9), (1, 30), (1, 4), (1, 9), (0, 9))
    )
    return HeadLayout(g * r, g, d, draw(st.sampled_from([None, dv]))), e, dict(batch=b, n=n, m=n + past)


@given(layers(), st.sampled_from([torch.float32, torch.bfloat16, torch.float64]), st.booleans())
def test_flops_are_torchs_and_bytes_are_the_tensors(layer, dtype, fused):
    layout, e, sizes = layer
    work = layer_work(layout, e, itemsize=dtype.itemsize, fused=fused, **sizes)
    expected = list(steps(layout, e, *sizes.values(), dtype, fused))
    assert list(work) == [name for name, _, _ in expected]  # in the order of the layer
    for name, call, inputs in expected:
        flops, result = counted(lambda: call(*inputs))
        moved = sum(t.nbytes for t in (*inputs, result))
        assert work[name] == Work(flops, moved), name


@given(layers())
def test_causal_fused_work_is_that_of_the_pairs_seen_and_moves_as_much(layer):
    layout, e, sizes = layer
    full, causal = (layer_work(layout, e, itemsize=2, is_causal=c, **sizes) for c in (False, True))
    pairs = causal_mask(sizes["n"], sizes["m"]).sum().item()
    widths = layout.head_dim + layout.value_dim
    assert causal["attention"].flops == 2 * sizes["batch"] * layout.num_heads * widths * pairs
    assert causal["attention"].bytes == full["attention"].bytes
    assert causal["in_proj"] == full["in_proj"] and causal["out_proj"] == full["out_proj"]


@given(layers())
def test_written_out_products_skip_nothing(layer):
    layout, e, sizes = layer
    assert layer_work(layout, e, itemsize=2, is_causal=True, fused=False, **sizes) == layer_work(
        layout, e, itemsize=2, fused=False, **sizes
    )


@given(layers())
def test_writing_out_adds_four_passes_over_the_scores_and_no_flops(layer):
    layout, e, sizes = layer
    fused, plain = (layer_work(layout, e, itemsize=2, fused=f, **sizes) for f in (True, False))
    written = plain["scores"] + plain["softmax"] + plain["mix"]
    scores = sizes["batch"] * layout.num_heads * sizes["n"] * sizes["m"]
    assert written.flops == fused["attention"].flops
    assert written.bytes == fused["attention"].bytes + 4 * 2 * scores


@given(layers(), st.booleans())
def test_the_layer_is_the_sum_of_its_steps(layer, fused):
    layout, e, sizes = layer
    h, g, d = layout
    b, n = sizes["batch"], sizes["n"]
    own = dict(num_kv_heads=g, head_dim=d, value_dim=layout.value_dim, bias=False)
    mha = MultiHeadAttention(e, h, **own, device="meta", attend=None if fused else plain_attention)
    work = layer_work(layout, e, batch=b, n=n, itemsize=4, fused=fused)
    flops, _ = counted(lambda: mha(torch.empty(b, n, e, device="meta")))
    assert flops == sum(step.flops for step in work.values())


def test_keys_are_as_many_as_tokens_unless_told():
    layout = HeadLayout(6, 3, 8)
    assert (
        layer_work(layout, 20, batch=2, n=5, itemsize=2)
        == layer_work(layout, 20, batch=2, n=5, m=5, itemsize=2)
        != layer_work(layout, 20, batch=2, n=5, m=7, itemsize=2)
    )


# Bad input

GOOD = dict(batch=2, n=5, m=7, itemsize=4)


@pytest.mark.usefixtures("own_messages")
@pytest.mark.parametrize(
    "name, value, error, message",
    [
        ("batch", 0, ValueError, "batch must be at least 1"),
        ("n", 2.0, TypeError, "n must be an int"),
        ("m", 4, ValueError, "m 4 is below n 5"),
        ("m", -1, ValueError, "m must be at least 1"),
        ("itemsize", True, TypeError, "itemsize must be an int"),
        ("embed_dim", "20", TypeError, "embed_dim must be an int"),
        ("is_causal", 2, TypeError, "is_causal must be True or False, got 2"),
        ("fused", None, TypeError, "fused must be True or False"),
    ],
)
def test_bad_counts_are_refused(name, value, error, message):
    options = {"embed_dim": 20, **GOOD, name: value}
    with pytest.raises(error, match=message):
        layer_work(HeadLayout(6, 3, 8), options.pop("embed_dim"), **options)


@pytest.mark.usefixtures("own_messages")
def test_a_layout_is_a_head_layout():
    with pytest.raises(TypeError, match=r"layout must be a HeadLayout, got \(6, 3, 8\)"):
        layer_work((6, 3, 8), 20, **GOOD)


@pytest.mark.usefixtures("own_messages")
def test_a_machine_without_speed_and_a_dtype_without_fractions_are_refused():
    for flops, bandwidth, name in (
        (0, 1, "flops"),
        (1, -1, "bandwidth"),
        (math.nan, 1, "flops"),
        (1, math.inf, "bandwidth"),
    ):
        with pytest.raises(ValueError, match=f"{name} of slow must be positive and finite"):
            Machine("slow", flops, bandwidth, "nowhere")
    for value in ("3", None, True):
        with pytest.raises(TypeError, match="flops of slow must be a number"):
            Machine("slow", value, 1, "nowhere")
    for dtype in (torch.int32, torch.float8_e4m3fn):
        with pytest.raises(TypeError, match="dtype must be float16"):
            measure_machine("cpu", dtype=dtype)
    with pytest.raises(ValueError, match="cpu and cuda"):
        measure_machine("meta")


# Work and machines


def test_work_adds_and_has_an_intensity():
    assert Work(6, 2) + Work(1, 3) == Work(7, 5)
    assert Work(6, 4).intensity == 1.5


@pytest.mark.usefixtures("own_messages")
def test_work_that_moves_nothing_has_no_intensity_and_none_is_below_zero():
    with pytest.raises(ZeroDivisionError):
        assert Work(0, 0).intensity
    for intensity in (-1.0, math.nan):
        with pytest.raises(ValueError, match="intensity must be at least 0"):
            MACHINE.attainable(intensity)


def test_the_roof_is_a_slope_and_then_a_ceiling():
    assert MACHINE.ridge == 3
    assert [MACHINE.attainable(x) for x in (0.0, 0.5, 3.0, 30.0)] == [0, 2, 12, 12]
    # one second of bytes and less of FLOPs, and the other way round
    assert MACHINE.seconds(Work(6, 4)) == 1 and MACHINE.seconds(Work(24, 4)) == 2


@given(st.integers(1, 10**6), st.integers(1, 10**6))
def test_the_bound_is_the_roof_turned_round(flops, size):
    work = Work(flops, size)
    assert math.isclose(MACHINE.attainable(work.intensity), flops / MACHINE.seconds(work))


def test_the_published_peaks_are_dense_and_have_a_source():
    assert {name: round(m.ridge) for name, m in PEAKS.items()} == {"A100": 153, "H100": 295, "H200": 206}
    assert PEAKS["H100"].flops == PEAKS["H200"].flops < 1e15  # the sheets' 1979e12 assumes sparsity
    for name, machine in PEAKS.items():
        assert machine.name == name and machine.source.startswith("https://www.nvidia.com/")


# Measuring


def test_this_machine_has_two_rates():
    machine = measure_machine("cpu")
    assert 1e8 < machine.flops < 1e14 and 1e8 < machine.bandwidth < 1e13
    assert "float32" in machine.source and torch.__version__ in machine.source


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rates_follow_from_the_times(monkeypatch, dtype):
    "With a clock of our own: products of 2 n³ operations, and a copy that reads and writes."
    sizes = []

    def clock(calls, *, device, rounds):
        (call,) = calls.values()
        result = call()
        assert result.dtype == dtype and result.device.type == device.type == "cpu"
        sizes.append(result.shape)
        seconds = 0.004 if len(sizes) == 1 else 0.05  # the smaller one is the faster
        return {name: Timing(1.0, 1.0, 1.0, seconds, 0) for name in calls}

    monkeypatch.setattr(module, "benchmark", clock)
    before = torch.get_rng_state()
    machine = measure_machine("cpu", dtype)
    assert torch.equal(torch.get_rng_state(), before)  # the caller's random numbers are none of its business
    assert [tuple(size) for size in sizes[:2]] == [(512, 512), (1024, 1024)] and len(sizes) == 3  # then the copy
    assert machine.flops == 2 * 512**3 / 0.004
    assert machine.bandwidth == 2 * 2**28 / 0.05
    assert sizes[2].numel() * dtype.itemsize == 2**28
