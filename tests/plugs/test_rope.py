"""Rotary positions against complex numbers in a loop, in every pairing, width and dtype; scalings; what is refused."""

import cmath
import copy
import math
import pickle
import subprocess
import sys
from dataclasses import FrozenInstanceError, replace
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mha_book import (
    MultiHeadAttention,
    RoPE,
    RoPELinearScaling,
    RoPELlama3Scaling,
    RoPENTKScaling,
    RoPEYaRNScaling,
    convert_weights,
    from_state_dict,
    rotate_by_tables,
)
from mha_book.heads.dialects import DIALECTS
from mha_book.instruments.testing import SIZES
from mha_book.plugs.cache import KVCache
from mha_book.plugs.rope import rope_frequencies, rotate_pairs
from support.padded_cache import PaddedCache
from support.refusals import refused

settings.register_profile("book", max_examples=25, deadline=None, derandomize=True)
settings.load_profile("book")
s = SIZES
close = partial(torch.testing.assert_close, atol=1e-12, rtol=0)
FREQUENCIES = [10_000.0 ** (-2 * i / s.d) for i in range(s.d // 2)]
PAIRINGS = pytest.mark.parametrize("pairing", ["half_split", "interleaved"])


def random(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype)


def pairs(width, pairing):
    half = width // 2
    return [(i, i + half) if pairing == "half_split" else (2 * i, 2 * i + 1) for i in range(half)]


def turned(x, places, frequencies, pairing, magnitude=1.0):
    "Each pair as a complex number, times magnitude · e^(i · place · frequency); places are b n."
    out = x.clone()
    for b, h, n in ((b, h, n) for b in range(x.shape[0]) for h in range(x.shape[1]) for n in range(x.shape[2])):
        for (first, second), frequency in zip(pairs(2 * len(frequencies), pairing), frequencies):
            z = complex(x[b, h, n, first], x[b, h, n, second]) * cmath.rect(magnitude, places[b][n] * frequency)
            out[b, h, n, first], out[b, h, n, second] = z.real, z.imag
    return out


# Turning


@PAIRINGS
@given(st.data())
def test_turning_is_multiplying_complex_numbers(pairing, data):
    width = 2 * data.draw(st.integers(1, 4))
    d, base = width + data.draw(st.integers(0, 3)), data.draw(st.floats(1.5, 1e6))
    n, m = data.draw(st.integers(0, 4)), data.draw(st.integers(0, 4))
    starts = data.draw(st.lists(st.integers(-9, 50), min_size=2, max_size=2))
    offset = torch.tensor(starts) if data.draw(st.booleans()) else starts[0]
    starts = starts if isinstance(offset, torch.Tensor) else [offset] * 2
    magnitude = data.draw(st.sampled_from([1.0, 1.3, 0.7]))
    rope = RoPE(d, base, rotary_dim=width, pairing=pairing, magnitude=magnitude)
    q, k = random(2, 3, n, d), random(2, 1, m, d)
    frequencies = [base ** (-2 * i / width) for i in range(width // 2)]
    # keys stand from the offset on, queries at their end
    for x, got, first in zip((q, k), rope(q, k, offset=offset), (m - n, 0)):
        places = [[start + first + i for i in range(x.shape[2])] for start in starts]
        torch.testing.assert_close(got, turned(x, places, frequencies, pairing, magnitude), atol=1e-11, rtol=0)


def test_a_wrong_turn_is_seen():
    rope, x = RoPE(s.d), random(s.b, s.h, s.n, s.d)
    right, places = rope(x, x, offset=0)[0], [range(s.n)] * s.b
    for wrong in (
        turned(x, places, [-f for f in FREQUENCIES], "half_split"),
        turned(x, places, FREQUENCIES, "interleaved"),
        turned(x, [range(1, s.n + 1)] * s.b, FREQUENCIES, "half_split"),
    ):
        assert not torch.allclose(right, wrong)


@PAIRINGS
@given(st.integers(-(10**4), 10**4), st.integers(-(10**4), 10**4))
def test_scores_depend_on_differences_only(pairing, first, second):
    rope, q, k = RoPE(s.d, pairing=pairing), random(1, 2, s.n, s.d), random(1, 1, s.n, s.d)
    one, two = (a @ b.mT for a, b in (rope(q, k, offset=o) for o in (first, second)))
    torch.testing.assert_close(one, two, atol=1e-10, rtol=0)


@PAIRINGS
@pytest.mark.parametrize("width", [2, 4, 6, 8])
def test_dialects_are_equal_after_permuting_rows(pairing, width):
    other = "interleaved" if pairing == "half_split" else "half_split"
    ours, theirs = (RoPE(s.d, rotary_dim=width, pairing=p) for p in (pairing, other))
    mine, yours = (replace(DIALECTS["stacked"], pairs=p, rotary_dim=width) for p in (pairing, other))
    layer = MultiHeadAttention(s.e, s.h, num_kv_heads=s.g, head_dim=s.d, position=ours, dtype=torch.float64)
    nn.init.normal_(layer.in_proj.bias)
    state = dict(layer.named_parameters())
    twin = copy.deepcopy(layer)
    twin.position = theirs
    x = random(s.b, s.n, s.e)
    assert width == 2 or not torch.allclose(twin(x), layer(x))
    twin.load_state_dict(twin.state_dict() | convert_weights(state, mine, yours, layer.layout))
    close(twin(x), layer(x))


def test_a_file_of_llama_cpp_answers_the_same():
    layer = MultiHeadAttention(
        s.e, s.h, num_kv_heads=s.g, head_dim=s.d, bias=False, position=RoPE(s.d, 1e5), dtype=torch.float64
    )
    x = random(s.b, s.n, s.e)
    file = {
        f"blk.3.{name}": t
        for name, t in convert_weights(dict(layer.named_parameters()), "stacked", "gguf", layer.layout).items()
    }
    # as its converter permutes: heads, two halves, half a head
    permuted = layer.in_proj.weight[: s.h * s.d].reshape(s.h, 2, s.d // 2, s.e).swapaxes(1, 2).reshape(-1, s.e)
    assert torch.equal(file["blk.3.attn_q.weight"], permuted)
    for dialect, same in (("gguf", True), ("separate", False)):
        copied = from_state_dict(file, layer.layout, dialect, prefix="blk.3.", position=RoPE(s.d, 1e5))
        assert torch.allclose(copied(x, is_causal=True), layer(x, is_causal=True), atol=1e-12, rtol=0) == same


# In a layer


@PAIRINGS
@pytest.mark.parametrize("options", [{}, dict(rotary_dim=4), dict(frequencies=RoPEYaRNScaling(4, 8), magnitude=1.1)])
def test_pieces_are_the_whole_with_padding_too(pairing, options):
    layer = MultiHeadAttention(
        s.e, s.h, num_kv_heads=s.g, head_dim=s.d, position=RoPE(s.d, pairing=pairing, **options), dtype=torch.float64
    )
    x, cache = random(2, s.m, s.e), PaddedCache(2)
    real = torch.arange(4) >= torch.tensor([[0], [2]])
    parts = [layer(x[:, :4], key_mask=real, is_causal=True, cache=cache)]
    parts += [layer(part, is_causal=True, cache=cache) for part in x[:, 4:].split([1, 2], dim=1)]
    for row, first in ((0, 0), (1, 2)):
        close(torch.cat(parts, dim=1)[row : row + 1, first:], layer(x[row : row + 1, first:], is_causal=True))
    close(layer(x[:, -2:], context=x, is_causal=True), layer(x, is_causal=True)[:, -2:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_angles_are_float32_at_least_whatever_is_cast(dtype):
    layer = MultiHeadAttention(64, 1, position=RoPE(64)).to(dtype)
    q = torch.ones(1, 1, 4096, 64, dtype=dtype)
    got, _ = layer.position(q, q, offset=0)
    assert got.dtype == torch.promote_types(dtype, torch.float32)
    exact, _ = RoPE(64)(q.double(), q.double(), offset=0)
    assert (got - exact).abs().max() < (1e-12 if dtype == torch.float64 else 4e-4)
    assert layer(torch.randn(1, 5, 64).to(dtype)).dtype == dtype
    assert [*layer.state_dict()] == [*MultiHeadAttention(64, 1).state_dict()]  # it holds no tensor


def test_gradients_are_turned_back():
    rope, q = RoPE(s.d, rotary_dim=4), random(s.b, s.h, s.n, s.d).requires_grad_()
    up = random(s.b, s.h, s.n, s.d)
    (grad,) = torch.autograd.grad(rope(q, q, offset=3)[0], q, up)
    places = [[-(3 + i) for i in range(s.n)]] * s.b
    close(grad, turned(up, places, rope_frequencies(4, 10000.0).tolist(), "half_split"))


@pytest.mark.usefixtures("own_messages")  # the checker of shapes does not compile
def test_it_runs_compiled_without_a_break():
    for rope in RoPE(s.d), RoPE(s.d, pairing="interleaved", rotary_dim=4):
        compiled = torch.compile(lambda q, k, o: rope(q, k, offset=o), fullgraph=True, backend="eager")  # noqa: B023
        q, k = torch.randn(s.b, s.h, s.n, s.d), torch.randn(s.b, s.g, s.m, s.d)
        for offset in 3, torch.tensor([1, -2]):
            for got, wanted in zip(compiled(q, k, offset), rope(q, k, offset=offset)):
                torch.testing.assert_close(got, wanted)


def test_it_is_a_value():
    rope = RoPE(s.d, rotary_dim=4, frequencies=RoPENTKScaling(4))
    for twin in copy.deepcopy(rope), pickle.loads(pickle.dumps(rope)), replace(rope):
        assert twin == rope and hash(twin) == hash(rope) and twin._turns == rope._turns
    assert replace(rope, base=7.0) != rope != replace(rope, frequencies=RoPENTKScaling(2))
    assert replace(RoPE(s.d), head_dim=2 * s.d) == RoPE(2 * s.d) and "_turns" not in repr(rope)
    with pytest.raises(FrozenInstanceError):
        rope.base = 3.0
    with torch.device("meta"):  # a model that is built without memory has its positions all the same
        assert RoPE(s.d) == RoPE(s.d) and RoPE(s.d)._turns == RoPE(s.d)._turns


def test_inputs_are_left_as_they_are():
    q, k = random(s.b, s.h, s.n, s.d), random(s.b, s.g, s.m, s.d)
    before, offset = (q.clone(), k.clone()), torch.tensor([3, -2])
    RoPE(s.d)(q, k, offset=offset)
    assert torch.equal(q, before[0]) and torch.equal(k, before[1]) and offset.tolist() == [3, -2]


def test_turn_pairs_takes_any_places():
    x, places = random(s.b, s.h, s.n, s.d), torch.tensor([5, 0, 7, -3, 2])
    angles = RoPE(s.d).angles(places, torch.float64)
    close(rotate_pairs(x, angles), turned(x, [places.tolist()] * s.b, FREQUENCIES, "half_split"))


# Scalings


FACTORS, LENGTHS = st.floats(1, 64), st.integers(16, 10**5)


@given(st.integers(2, 64), st.floats(2.0, 1e6), FACTORS, LENGTHS, st.booleans())
def test_scalings_by_hand(r, base, factor, trained_len, truncate):
    plain = [base ** (-i / r) for i in range(r)]
    yarn = RoPEYaRNScaling(factor, trained_len, truncate=truncate)
    ends = [2 * r * math.log(trained_len / (turns * 2 * math.pi)) / (2 * math.log(base)) for turns in (32, 1)]
    first, last = (math.floor(ends[0]), math.ceil(ends[1])) if truncate else ends
    first, last = max(first, 0), min(last, 2 * r - 1)
    last = last + 0.001 if first == last else last
    enlarged = base * factor ** (2 * r / (2 * r - 2))
    for i, frequency in enumerate(plain):
        kept = 1 - min(max((i - first) / (last - first), 0.0), 1.0)
        by_turns = min(max((trained_len * frequency / (2 * math.pi) - 1) / 3, 0.0), 1.0)
        for scaling, wanted in (
            (RoPELinearScaling(factor), frequency / factor),
            (RoPENTKScaling(factor), enlarged ** (-i / r)),
            (RoPELlama3Scaling(factor, trained_len), frequency * (by_turns + (1 - by_turns) / factor)),
            (yarn, frequency * (kept + (1 - kept) / factor)),
        ):
            assert scaling(2 * r, base)[i].item() == pytest.approx(wanted, rel=1e-9)
    assert yarn.magnitude == pytest.approx(1 + math.log(factor) / 10)


@pytest.mark.parametrize(
    "scaling", [RoPELinearScaling(1), RoPENTKScaling(1), RoPELlama3Scaling(1, 99), RoPEYaRNScaling(1, 99)]
)
def test_a_factor_of_one_is_none(scaling):
    for width, base in ((8, 10.0), (64, 1e4), (128, 5e5)):
        torch.testing.assert_close(scaling(width, base), rope_frequencies(width, base), rtol=1e-14, atol=0)
    assert scaling == pickle.loads(pickle.dumps(scaling)) and hash(scaling) == hash(copy.deepcopy(scaling))


# Bad input


@pytest.mark.usefixtures("own_messages")
class TestRefused:
    @pytest.mark.parametrize(
        "act, error, words",
        [
            (lambda: RoPE(7), ValueError, ["rotary_dim 7", "even", "head_dim 7"]),
            (lambda: RoPE(8, rotary_dim=3), ValueError, ["rotary_dim 3", "even"]),
            (lambda: RoPE(8, rotary_dim=10), ValueError, ["rotary_dim 10", "head_dim 8"]),
            (lambda: RoPE(8, rotary_dim=0), ValueError, ["rotary_dim", "0"]),
            (lambda: RoPE(8.0), TypeError, ["head_dim"]),
            (lambda: RoPE(8, pairing="neox"), ValueError, ["'neox'", "half_split", "interleaved"]),
            (lambda: RoPE(8, 0.0), ValueError, ["base 0.0"]),
            (lambda: RoPE(8, "big"), TypeError, ["base", "'big'"]),
            (lambda: RoPE(8, magnitude=-1.0), ValueError, ["magnitude -1.0"]),
            (lambda: RoPE(8, frequencies=4), TypeError, ["frequencies", "4"]),
            (
                lambda: RoPE(8, frequencies=lambda d, b: torch.ones(3)),
                ValueError,
                ["frequencies", "4 finite", "rotary_dim 8"],
            ),
            (lambda: RoPE(8, frequencies=lambda d, b: torch.full((4,), torch.nan)), ValueError, ["finite"]),
            (lambda: RoPELinearScaling(0.5), ValueError, ["factor 0.5", "at least 1"]),
            (lambda: RoPELinearScaling("8"), TypeError, ["factor", "'8'"]),
            (lambda: RoPENTKScaling(8)(2), ValueError, ["rotary_dim 2"]),
            (lambda: RoPEYaRNScaling(8, 0), ValueError, ["trained_len 0", "above 0"]),
            (
                lambda: RoPEYaRNScaling(8, 32, slow_turns=4.0, fast_turns=4.0),
                ValueError,
                ["slow_turns 4.0", "fast_turns 4.0"],
            ),
            (lambda: RoPELlama3Scaling(math.inf, 32), ValueError, ["factor inf", "finite"]),
        ],
    )
    def test_when_it_is_made(self, act, error, words):
        with refused(error, *words):
            act()

    @pytest.mark.parametrize(
        "q, k, offset, error, words",
        [
            ((2, 6, 5, 4), (2, 3, 5, 8), 0, ValueError, ["query", "(2, 6, 5, 4)", "head_dim=8"]),
            ((2, 6, 5, 8), (2, 3, 5, 6), 0, ValueError, ["key", "(2, 3, 5, 6)"]),
            ((6, 5, 8), (3, 5, 8), 0, ValueError, ["query", "(6, 5, 8)"]),
            ((2, 6, 5, 8), (2, 3, 5, 8), 1.5, TypeError, ["offset", "1.5"]),
            ((2, 6, 5, 8), (2, 3, 5, 8), True, TypeError, ["offset", "True"]),
            ((2, 6, 5, 8), (2, 3, 5, 8), torch.ones(2), TypeError, ["offset", "float32", "whole"]),
            ((2, 6, 5, 8), (2, 3, 5, 8), torch.ones(3, dtype=torch.int64), ValueError, ["offset", "(3,)", "(2,)"]),
            ((2, 6, 5, 8), (2, 3, 5, 8), torch.tensor(1), ValueError, ["offset", "()", "(2,)"]),
            ((2, 6, 5, 8), (2, 3, 5, 8), torch.ones(2, dtype=torch.int64, device="meta"), ValueError, ["meta", "cpu"]),
        ],
    )
    def test_when_it_is_called(self, q, k, offset, error, words):
        with refused(error, *words):
            RoPE(8)(torch.zeros(q), torch.zeros(k), offset=offset)


# Cosines and sines that are given


def tables(places, width=s.d, dtype=torch.float64):
    "A row for each place, a number for each pair."
    angles = torch.arange(places, dtype=torch.float64)[:, None] * rope_frequencies(width)
    return dict(cos=angles.cos().to(dtype), sin=angles.sin().to(dtype))


def doubled(given, pairing):
    "A number for each number that turns, as Transformers has it."
    twice = (lambda t: torch.cat([t, t], -1)) if pairing == "half_split" else (lambda t: t.repeat_interleave(2, -1))
    return {name: twice(t) for name, t in given.items()}


@PAIRINGS
@pytest.mark.parametrize("width", [2, 4, 8])
@pytest.mark.parametrize("each", ["pair", "number"])
@pytest.mark.parametrize("n", [s.n, s.m, 1])
def test_given_tables_turn_as_rope_does(pairing, width, each, n):
    given = tables(50, width)
    given = doubled(given, pairing) if each == "number" else given
    q, k = random(s.b, s.h, n, s.d), random(s.b, s.g, s.m, s.d)
    rope, by_tables = (
        RoPE(s.d, rotary_dim=width, pairing=pairing),
        partial(rotate_by_tables, **given, rotary_dim=width, pairing=pairing),
    )
    for offset in (0, 7, 43, torch.tensor([3, 40])):
        for got, wanted in zip(by_tables(q, k, offset=offset), rope(q, k, offset=offset)):
            close(got, wanted)


@PAIRINGS
def test_ids_say_where_each_token_stands(pairing):
    "In any order, the same for all rows or one a row; and rows that were looked up already."
    given, frequencies = tables(50), rope_frequencies(s.d).tolist()
    q, k = random(s.b, s.h, s.n, s.d), random(s.b, s.g, s.m, s.d)
    for ids in (torch.randint(50, (s.b, s.m)), torch.randint(50, (1, s.m), dtype=torch.int32)):
        places = ids.expand(s.b, -1)
        wanted = (
            turned(q, places[:, s.m - s.n :].tolist(), frequencies, pairing),
            turned(k, places.tolist(), frequencies, pairing),
        )
        rows = {name: table[ids] for name, table in given.items()}
        for call in (
            partial(rotate_by_tables, **given, position_ids=ids),
            partial(rotate_by_tables, **rows),
            partial(rotate_by_tables, **doubled(rows, pairing), offset=9),
        ):
            for got, want in zip(call(q, k, pairing=pairing), wanted):
                close(got, want)


@PAIRINGS
@pytest.mark.parametrize("width", [None, 4])
@pytest.mark.parametrize("with_ids", [True, False])
def test_given_tables_turn_as_onnx_does(pairing, width, with_ids):
    "torch's own reading of ONNX's RotaryEmbedding."
    given, x = tables(50, width or s.d), random(s.b, s.h, s.n, s.d)
    ids = torch.randint(50, (s.b, s.n))
    if not with_ids:
        given, ids = {name: table[ids] for name, table in given.items()}, None
    wanted = torch.onnx.ops.rotary_embedding(
        x, given["cos"], given["sin"], ids, interleaved=pairing == "interleaved", rotary_embedding_dim=width or 0
    )
    got, again = rotate_by_tables(x, x, **given, position_ids=ids, rotary_dim=width, pairing=pairing)
    close(got, wanted)
    assert torch.equal(got, again)


def test_given_tables_serve_a_layer_with_a_cache():
    layer = MultiHeadAttention(
        s.e, s.h, num_kv_heads=s.g, head_dim=s.d, position=partial(rotate_by_tables, **tables(50)), dtype=torch.float64
    )
    x, cache = random(s.b, s.m, s.e), KVCache(s.b, s.g, s.m, s.d, dtype=torch.float64)
    whole = layer(x, is_causal=True)
    close(torch.cat([layer(part, is_causal=True, cache=cache) for part in (x[:, :3], x[:, 3:4], x[:, 4:])], 1), whole)
    layer.position = RoPE(s.d)
    close(layer(x, is_causal=True), whole)
    close(layer(x[:, -2:], context=x, is_causal=True), whole[:, -2:])


def test_padding_before_place_0_has_row_0():
    q = random(s.b, s.h, s.n, s.d)
    got, _ = rotate_by_tables(q, q, **tables(9), offset=torch.tensor([-2, 0]))
    want, _ = rotate_by_tables(q, q, **tables(9), position_ids=torch.tensor([[0, 0, 0, 1, 2], [0, 1, 2, 3, 4]]))
    assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_given_tables_turn_in_float32_at_least(dtype):
    q = random(s.b, s.h, s.n, s.d).to(dtype)
    got, _ = rotate_by_tables(q, q, **tables(9, dtype=dtype))
    want = turned(q.double(), [range(s.n)] * s.b, FREQUENCIES, "half_split")
    assert got.dtype == torch.float32 and (got - want).abs().max() < 20 * torch.finfo(dtype).eps
    assert rotate_by_tables(q, q, **tables(9))[0].dtype == torch.float64  # as wide as the tables


@pytest.mark.usefixtures("own_messages")
def test_given_tables_compile_and_work_without_numbers():
    q, k, ids = torch.randn(s.b, s.h, s.n, s.d), torch.randn(s.b, s.g, s.m, s.d), torch.randint(9, (s.b, s.m))
    given = tables(9, dtype=torch.float32)
    for options in (dict(position_ids=ids), dict(offset=2), dict(offset=torch.tensor([2, 0]))):
        call = partial(rotate_by_tables, **given, **options)
        for got, want in zip(torch.compile(call, fullgraph=True, backend="eager")(q, k), call(q, k)):
            torch.testing.assert_close(got, want)
    there = rotate_by_tables(q.to("meta"), k.to("meta"), **{name: t.to("meta") for name, t in given.items()})
    assert [t.shape for t in there] == [q.shape, k.shape]


@pytest.mark.usefixtures("own_messages")
@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.int32])
def test_places_of_any_whole_kind_are_looked_up(dtype):
    q, k, ids = random(s.b, s.h, s.n, s.d), random(s.b, s.g, s.m, s.d), torch.randint(9, (s.b, s.m))
    want = rotate_by_tables(q, k, **tables(9), position_ids=ids)
    assert all(map(torch.equal, rotate_by_tables(q, k, **tables(9), position_ids=ids.to(dtype)), want))


@pytest.mark.usefixtures("own_messages")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.torch.jit.:DeprecationWarning")
@pytest.mark.parametrize("pairing", ["half_split", "interleaved"])
def test_given_tables_are_traced_and_exported_for_batches_of_any_size(pairing):
    class Turned(torch.nn.Module):
        def forward(self, q, k, ids):
            looked_up = rotate_by_tables(q, k, cos=cos, sin=sin, position_ids=ids, pairing=pairing)
            return *looked_up, *rotate_by_tables(q, k, cos=cos[ids], sin=sin[ids], pairing=pairing)

    cos, sin = tables(9, dtype=torch.float32).values()
    few, many = (
        (torch.randn(b, s.h, s.n, s.d), torch.randn(b, s.g, s.m, s.d), torch.randint(9, (b, s.m))) for b in (s.b, 5)
    )
    batch = torch.export.Dim("batch")
    exported = torch.export.export(Turned(), few, dynamic_shapes=({0: batch},) * 3).module()
    compiled = torch.compile(Turned(), fullgraph=True, dynamic=True, backend="eager")
    traced = torch.jit.trace(Turned(), few, check_trace=False)
    for call in exported, compiled, traced:
        for inputs in few, many:
            torch.testing.assert_close(call(*inputs), Turned()(*inputs))


@pytest.mark.usefixtures("own_messages")
@pytest.mark.parametrize("given", [
    lambda w, b: [1.0] * 4, lambda w, b: np.ones(4), lambda w, b: None, lambda w, b: torch.ones(4) > 0,
    lambda w, b: torch.ones(4).to_sparse(), lambda w, b: torch.ones(4, dtype=torch.complex64), "plain",
])  # fmt: skip
def test_frequencies_are_real_numbers(given):
    with refused(TypeError, "frequencies"):
        RoPE(8, frequencies=given)


def test_frequencies_on_meta_are_no_numbers():
    with refused(ValueError, "frequencies", "meta"):
        RoPE(8, frequencies=lambda w, b: torch.ones(4, device="meta"))


def test_scalings_of_which_no_frequencies_come_are_refused():
    for base in 1.0, 1, 0.5:
        with refused(ValueError, f"base {base} must be above 1"):
            RoPE(8, base, frequencies=RoPEYaRNScaling(4.0, 8))
    for factor in 1e200, 1e300:
        with refused(ValueError, f"factor {factor}"):
            RoPE(8, frequencies=RoPENTKScaling(factor))


@pytest.mark.parametrize("number", [2**70, 10**400])
def test_ints_beyond_those_of_torch_are_no_bases_and_no_factors(number):
    for name, call in {
        "base": lambda: RoPE(8, number), "magnitude": lambda: RoPE(8, magnitude=number),
        "base ": lambda: rope_frequencies(8, number), "factor": lambda: RoPELinearScaling(number),
        "factor ": lambda: RoPENTKScaling(number), "trained_len": lambda: RoPEYaRNScaling(2.0, number),
        "trained_len ": lambda: RoPELlama3Scaling(2.0, number),
    }.items():  # fmt: skip
        with refused(ValueError, f"{name.strip()} is an int of {number.bit_length()} bits"):
            call()


GIVEN = dict(q=torch.zeros(2, 6, 5, 8), k=torch.zeros(2, 3, 7, 8), cos=torch.ones(9, 4), sin=torch.ones(9, 4))


@pytest.mark.usefixtures("own_messages")
@pytest.mark.parametrize(
    "arguments, error, words",
    [
        (dict(q=torch.zeros(2, 6, 8, 8)), ValueError, ["(2, 6, 8, 8)", "(2, 3, 7, 8)", "no more queries"]),
        (dict(q=torch.zeros(6, 5, 8)), ValueError, ["(6, 5, 8)", "batch"]),
        (dict(k=torch.zeros(3, 3, 7, 8)), ValueError, ["batch", "2", "3"]),
        (dict(q=torch.zeros(2, 6, 5, 8).long()), TypeError, ["query", "int64"]),
        (dict(cos=torch.ones(9, 3)), ValueError, ["cos", "(9, 3)", "8", "half"]),
        (dict(cos=torch.ones(9)), ValueError, ["cos", "(9,)"]),
        (dict(sin=torch.ones(9, 8)), ValueError, ["cos and sin", "(9, 4)", "(9, 8)"]),
        (dict(sin=torch.ones(9, 4).double()), ValueError, ["float32", "float64"]),
        (dict(sin=torch.ones(9, 4, device="meta")), ValueError, ["meta", "cpu"]),
        (dict(cos=torch.ones(9, 4).long()), TypeError, ["cos", "int64"]),
        (dict(cos=[[1.0]]), TypeError, ["cos", "list"]),
        (dict(cos=torch.ones(2, 5, 4)), ValueError, ["cos", "(2, 5, 4)", "(2, 7)"]),
        (dict(position_ids=torch.zeros(2, 5).long()), ValueError, ["position_ids", "(2, 5)", "(2, 7)"]),
        (dict(position_ids=torch.zeros(7).long()), ValueError, ["position_ids", "(7,)"]),
        (dict(position_ids=torch.zeros(2, 7)), TypeError, ["position_ids", "float32", "whole"]),
        (dict(position_ids=[[0]]), TypeError, ["position_ids", "list"]),
        (dict(position_ids=torch.full((2, 7), 9)), ValueError, ["places 9 to 9", "0 to 8"]),
        (dict(position_ids=torch.full((2, 7), -1)), ValueError, ["places -1 to -1", "0 to 8"]),
        (
            dict(cos=torch.ones(2, 7, 4), sin=torch.ones(2, 7, 4), position_ids=torch.zeros(2, 7).long()),
            ValueError,
            ["position_ids", "rank 3"],
        ),
        (dict(offset=3), ValueError, ["offset 3", "7 keys", "0 to 8"]),
        (dict(offset=torch.tensor([0, 3])), ValueError, ["places", "0 to 8"]),
        (dict(rotary_dim=3), ValueError, ["rotary_dim 3", "even"]),
        (dict(rotary_dim=10), ValueError, ["rotary_dim 10", "head_dim 8"]),
        (dict(rotary_dim=4.0), TypeError, ["rotary_dim", "4.0"]),
        (dict(pairing="neox"), ValueError, ["'neox'", "half_split"]),
    ],
)
def test_tables_that_do_not_fit(arguments, error, words):
    with refused(error, *words):
        rotate_by_tables(**GIVEN | arguments)


# Sharded over devices

SHARDED = """
import sys, torch, torch.distributed as dist
from functools import partial
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh
from mha_book import RoPE, RoPEYaRNScaling, rotate_by_tables
rank, world, file = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
dist.init_process_group("gloo", store=dist.FileStore(file, world), rank=rank, world_size=world)
mesh = init_device_mesh("cpu", (world,))
torch.manual_seed(0)
q, k = torch.randn(2, 6, 5, 8), torch.randn(2, 2, 7, 8)
cos, sin = torch.rand(2, 20, 4)
plugs = [RoPE(8), RoPE(8, pairing="interleaved", rotary_dim=4),
         RoPE(8, frequencies=RoPEYaRNScaling(4, 8), magnitude=1.1),
         partial(rotate_by_tables, cos=cos, sin=sin),
         partial(rotate_by_tables, cos=cos, sin=sin, position_ids=torch.randint(20, (2, 7)))]
for plug in plugs:
    for placement in Shard(0), Shard(1), Replicate():
        for keys in k, k[:, :, :5]:
            ours = [distribute_tensor(t, mesh, [placement]).requires_grad_() for t in (q, keys)]
            plain = [t.clone().requires_grad_() for t in (q, keys)]
            for offset in 3, torch.tensor([1, 4]):
                if isinstance(plug, partial) and keys is not k:
                    options = {**plug.keywords}
                    if "position_ids" in options:
                        options["position_ids"] = options["position_ids"][:, :5]
                    call = partial(rotate_by_tables, **options)
                else:
                    call = plug
                got, want = call(*ours, offset=offset), call(*plain, offset=offset)
                for one, other in zip(got, want):
                    assert isinstance(one, DTensor) and one.placements == (placement,), one
                    torch.testing.assert_close(one.full_tensor(), other)
                sum(t.square().sum() for t in got).full_tensor().backward()
                sum(t.square().sum() for t in want).backward()
            for one, other in zip(ours, plain):
                torch.testing.assert_close(one.grad.full_tensor(), other.grad)
dist.destroy_process_group()
print("the same")
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch was built without torch.distributed")
@pytest.mark.parametrize("world", [1, 2])
def test_sharded_queries_and_keys_are_turned_where_they_are(world, tmp_path):
    "Batch or heads over devices: the numbers of the plain tensors, sharded as they were."
    command = [sys.executable, "-W", "ignore", "-c", SHARDED]
    running = [
        subprocess.Popen([*command, str(rank), str(world), str(tmp_path / "store")], stdout=-1, stderr=-1, text=True)
        for rank in range(world)
    ]
    for process in running:
        out, err = process.communicate(timeout=120)
        assert out == "the same\n", err[-2000:]


# Made within a compiled function; in a process of its own, for shape checking wraps functions

MADE = """
import torch, warnings
from functools import partial
warnings.filterwarnings("ignore")
from mha_book import *
from mha_book.plugs.rope import rope_frequencies
q, k = torch.randn(2, 6, 5, 8, dtype=torch.float64), torch.randn(2, 3, 7, 8, dtype=torch.float64)
same = partial(torch.testing.assert_close, atol=1e-12, rtol=0)
PLUGS = {
    "plain": lambda: RoPE(8), "interleaved": lambda: RoPE(8, 500, rotary_dim=4, pairing="interleaved", magnitude=1.5),
}
OTHERS = {    # not in one graph, and never with other numbers
    "scaled": lambda: RoPE(8, frequencies=RoPELinearScaling(2.0)),
    "by parts": lambda: RoPE(8, frequencies=RoPELlama3Scaling(4.0, 1.0, 2.0, 64)),
    "own": lambda: RoPE(8, frequencies=lambda width, base: 3 * rope_frequencies(width, base)),
}
for name, make in (PLUGS | OTHERS).items():
    for offset in 0, 3:
        torch._dynamo.reset()
        def turned(q, k):
            return make()(q, k, offset=offset)
        compiled = torch.compile(turned, fullgraph=name in PLUGS, backend="eager")
        for got, want in zip(compiled(q, k), make()(q, k, offset=offset)):
            same(got, want, msg=name)
# a constant of the graph is one of this call: another base is another graph, or none
compiled = torch.compile(lambda q, k, base: RoPE(8, base)(q, k)[0], backend="eager")
for base in 10000.0, 500.0, 77.0, 2000:
    same(compiled(q, k, base), RoPE(8, base)(q, k)[0], msg=str(base))
print("the same")
"""


def test_a_plug_made_in_a_compiled_function_turns_as_one_made_before():
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", MADE], capture_output=True, text=True)
    assert done.stdout == "the same\n", done.stderr[-2000:]
