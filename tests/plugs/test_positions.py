"""Places in tokens and in scores: loops, integers and the authors' recipes written another way; and what is refused."""

import copy
import math
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mha_book import (
    ALiBi,
    LearnedPositions,
    MultiHeadAttention,
    RelativeBias,
    RoPE,
    RoPELinearScaling,
    RoPEYaRNScaling,
    rotate_by_tables,
    sinusoidal_positions,
)
from mha_book.instruments.testing import SIZES
from mha_book.kernels.backends import attention
from mha_book.plugs.positions import alibi_slopes, distances, relative_buckets
from support.refusals import refused

settings.register_profile("book", max_examples=25, deadline=None, derandomize=True)
settings.load_profile("book")
s = SIZES
close = partial(torch.testing.assert_close, atol=1e-12, rtol=0)


def random(*shape):
    return torch.randn(*shape, dtype=torch.float64)


# Waves


@given(st.lists(st.integers(-(10**6), 10**6), min_size=1, max_size=5), st.integers(1, 9), st.floats(1.5, 1e6))
def test_waves_are_sines_and_cosines_in_turn(places, pairs, base):
    got = sinusoidal_positions(torch.tensor(places), 2 * pairs, base, dtype=torch.float64)
    for n, place in enumerate(places):
        for i in range(pairs):
            angle = place * base ** (-2 * i / (2 * pairs))
            assert abs(got[n, 2 * i] - math.sin(angle)) < 1e-9 and abs(got[n, 2 * i + 1] - math.cos(angle)) < 1e-9


def test_waves_have_the_shape_of_the_places_and_are_float32():
    got = sinusoidal_positions(torch.arange(24).view(2, 3, 4), 6)
    assert got.shape == (2, 3, 4, 6) and got.dtype == torch.float32
    assert torch.equal(got[1, 2, 3], sinusoidal_positions(torch.tensor([23]), 6)[0])


def test_half_precision_rounds_the_waves_and_not_the_places():
    places = torch.arange(5000)
    got = sinusoidal_positions(places, 6, dtype=torch.bfloat16)
    assert torch.equal(got, sinusoidal_positions(places, 6).bfloat16())


# A table


@given(st.integers(1, 12), st.lists(st.integers(-8, 8), min_size=1, max_size=4))
def test_a_table_is_looked_up_by_place(n, offsets):
    table, x = LearnedPositions(9, 4, dtype=torch.float64), random(len(offsets), n, 4)
    offset = torch.tensor(offsets)
    if max(offsets) + n > 9:
        with pytest.raises(ValueError, match=f"place {max(offsets) + n - 1}.* table has 9 places, 0 to 8"):
            table(x, offset=offset)
        return
    got = table(x, offset=offset)
    for row, first in enumerate(offsets):
        for i in range(n):
            close(got[row, i], x[row, i] + table.weight[max(first + i, 0)])  # padding: the row of place 0
        if len(set(offsets)) == 1:
            assert torch.equal(got, table(x, offset=first))


def test_a_table_learns_the_rows_that_were_used():
    table = LearnedPositions(7, 4)
    table(torch.zeros(2, 3, 4), offset=2).sum().backward()
    assert (table.weight.grad.abs().sum(1) > 0).tolist() == [False, False, True, True, True, False, False]


# Distances, buckets and slopes


@pytest.mark.parametrize("n, m", [(5, 7), (7, 5), (1, 9), (6, 6), (0, 3), (3, 0)])
def test_queries_stand_at_the_end_of_the_keys(n, m):
    assert distances(n, m).tolist() == [[j - (m - n + i) for j in range(m)] for i in range(n)]


def bucket(distance, num_buckets, max_distance, bidirectional):
    "By whole numbers: the last bucket that begins at `distance` or before."
    sided = num_buckets // 2 if bidirectional else num_buckets
    near, side = sided // 2, sided if bidirectional and distance > 0 else 0
    far = abs(distance) if bidirectional else max(-distance, 0)
    steps = sided - near
    reached = [k for k in range(steps) if far**steps * near**k >= max_distance**k * near**steps]
    return side + (far if far < near else near + max(reached))


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("num_buckets, max_distance", [(32, 128), (8, 6), (16, 32), (20, 100), (64, 1000), (5, 9)])
def test_buckets_begin_where_whole_numbers_say(num_buckets, max_distance, bidirectional):
    all_of_them = torch.arange(-1200, 1200)
    got = relative_buckets(all_of_them, num_buckets, max_distance, bidirectional).tolist()
    assert got == [bucket(d, num_buckets, max_distance, bidirectional) for d in all_of_them.tolist()]
    sided = num_buckets // 2 if bidirectional else num_buckets
    if max_distance < 2 * num_buckets:
        return  # where steps are shorter than a token, a bucket may stay empty
    # and no key ahead is 0 away
    assert set(got) == set(range(sided * (2 if bidirectional else 1))) - ({sided} if bidirectional else set())


@pytest.mark.parametrize("num_heads", range(1, 41))
def test_slopes_are_the_authors(num_heads):
    def recipe(n):  # as the paper's code has it, by recursion
        if math.log2(n).is_integer():
            start = 2 ** (-(2 ** -(math.log2(n) - 3)))
            return [start * start**i for i in range(n)]
        power = 2 ** math.floor(math.log2(n))
        return recipe(power) + recipe(2 * power)[0::2][: n - power]

    assert alibi_slopes(num_heads) == pytest.approx(recipe(num_heads), rel=1e-12)
    assert len(set(alibi_slopes(num_heads))) == num_heads


# The plugs


def t5(bidirectional=True, **more):
    plug = RelativeBias(s.h, num_buckets=8, max_distance=6, bidirectional=bidirectional, dtype=torch.float64, **more)
    nn.init.normal_(plug.weight)
    return plug, lambda i, d: plug.weight[bucket(d, 8, 6, bidirectional), i]


def alibi(**more):
    return ALiBi(s.h, **more), lambda i, d: -alibi_slopes(s.h)[i] * abs(d)


PLUGS = pytest.mark.parametrize("build", [t5, partial(t5, False), alibi], ids=["T5", "T5 decoder", "ALiBi"])


@PLUGS
@pytest.mark.parametrize("n, m", [(s.n, s.m), (1, s.m), (s.m, s.n)])
@pytest.mark.parametrize(
    "options",
    [
        lambda n, m: {},
        lambda n, m: dict(is_causal=True),
        lambda n, m: dict(mask=torch.rand(s.b, 1, n, m) < 0.7),
        lambda n, m: dict(bias=random(s.h, 1, m)),
        lambda n, m: dict(bias=random(m), is_causal=True),
    ],
)
def test_a_plug_adds_its_number_for_each_distance(build, n, m, options):
    plug, number = build()
    q, k, v = random(s.b, s.h, n, s.d), random(s.b, s.g, m, s.d), random(s.b, s.g, m, s.dv)
    options = options(n, m)
    own = torch.stack(
        [
            torch.stack(
                [
                    torch.stack([torch.as_tensor(number(i, j - (m - n + a)), dtype=torch.float64) for j in range(m)])
                    for a in range(n)
                ]
            )
            for i in range(s.h)
        ]
    )
    wanted = attention(q, k, v, **options | dict(bias=own + options.get("bias", 0)), impl="math")
    close(plug(q, k, v, **options), wanted)
    if n == m:
        close(plug.bias(n, n).double(), own.detach())


@PLUGS
def test_what_is_inside_gets_everything(build):
    seen = {}

    def inner(q, k, v, **options):
        seen.update(options)
        return attention(q, k, v, **options)

    plug, _ = build(attend=inner)
    q, mask = random(s.b, s.h, s.n, s.d), torch.ones(s.n, dtype=torch.bool)
    plug(q, q, q, mask=mask, is_causal=True, dropout_p=0.25)
    assert seen["mask"] is mask and seen["is_causal"] and seen["dropout_p"] == 0.25
    assert seen["bias"].shape == (s.h, s.n, s.n)


@PLUGS
def test_moving_the_text_changes_nothing_and_order_does(build):
    plug, _ = build()
    layer = MultiHeadAttention(s.e, s.h, num_kv_heads=s.g, head_dim=s.d, attend=plug, dtype=torch.float64)
    x = random(s.b, s.m, s.e)
    padded = torch.cat([random(s.b, 3, s.e), x], dim=1)
    real = (torch.arange(s.m + 3) >= 3).expand(s.b, -1)
    for is_causal in (False, True):
        close(layer(padded, key_mask=real, is_causal=is_causal)[:, 3:], layer(x, is_causal=is_causal))
    assert not torch.allclose(layer(x.flip(1)).flip(1), layer(x)) or not isinstance(plug, RelativeBias)
    mixed = torch.cat([x[:, :-1].flip(1), x[:, -1:]], dim=1)
    assert not torch.allclose(layer(mixed, is_causal=True)[:, -1], layer(x, is_causal=True)[:, -1])
    weights = layer.attention_map(x, is_causal=True)
    close(weights.sum(-1), torch.ones_like(weights[..., 0]))


def test_a_table_of_biases_learns_the_distances_that_were_seen():
    plug, _ = t5()
    q = random(s.b, s.h, 3, s.d)
    plug(q, q, q).square().sum().backward()
    seen = {bucket(d, 8, 6, True) for d in range(-2, 3)}
    assert {i for i, row in enumerate(plug.weight.grad) if row.any()} == seen


def test_a_new_table_is_no_bias():
    plug, q = RelativeBias(s.h), torch.randn(s.b, s.h, s.n, s.d)
    torch.testing.assert_close(plug(q, q, q), attention(q, q, q))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_no_cast_rounds_a_slope_and_the_bias_is_float32_at_least(dtype):
    seen = []

    def inner(q, k, v, *, bias, **options):
        seen.append(bias)
        return v

    layer = MultiHeadAttention(s.e, s.h, head_dim=s.d, attend=ALiBi(s.h, attend=inner)).to(dtype)
    layer(torch.randn(s.b, s.n, s.e, dtype=dtype))
    assert seen[0].dtype == torch.promote_types(dtype, torch.float32)
    exact = -torch.tensor(alibi_slopes(s.h), dtype=torch.float64)[:, None, None] * distances(s.n, s.n).abs()
    close(seen[0].double(), exact)  # slopes of six heads are powers of two


def test_plugs_can_be_copied_and_saved():
    for plug in (t5()[0], ALiBi(s.h)):
        twin, q = copy.deepcopy(plug), random(s.b, s.h, s.n, s.d)
        assert torch.equal(twin(q, q, q), plug(q, q, q))
    assert list(ALiBi(s.h).state_dict()) == [] and list(RelativeBias(s.h).state_dict()) == ["weight"]


@pytest.mark.usefixtures("own_messages")
class TestRefused:
    @pytest.mark.parametrize(
        "act, error, words",
        [
            (lambda: sinusoidal_positions(torch.arange(3), 7), ValueError, ["embed_dim 7", "odd"]),
            (lambda: sinusoidal_positions(torch.arange(3), 8.0), TypeError, ["embed_dim", "8.0"]),
            (lambda: LearnedPositions(0, 4), ValueError, ["max_len", "0"]),
            (lambda: LearnedPositions(4, 2.5), TypeError, ["embed_dim", "2.5"]),
            (
                lambda: LearnedPositions(7, 4)(torch.zeros(2, 5, 4), offset=3),
                ValueError,
                ["5 tokens", "place 7", "0 to 6"],
            ),
            (
                lambda: LearnedPositions(7, 4)(torch.zeros(2, 5, 4), offset=torch.tensor([0, 9])),
                ValueError,
                ["place 13", "0 to 6"],
            ),
            (lambda: RelativeBias(0), ValueError, ["num_heads", "0"]),
            (lambda: RelativeBias(6, num_buckets=3), ValueError, ["num_buckets 3", "4"]),
            (lambda: RelativeBias(6, num_buckets=1, bidirectional=False), ValueError, ["num_buckets 1", "2"]),
            (lambda: RelativeBias(6, max_distance=8), ValueError, ["max_distance 8", "more than 8"]),
            (lambda: RelativeBias(6)(*[torch.zeros(1, 4, 3, 2)] * 3), ValueError, ["4 query heads", "6"]),
            (lambda: ALiBi(6)(*[torch.zeros(1, 4, 3, 2)] * 3), ValueError, ["4 query heads", "6"]),
            (lambda: ALiBi(6.0), TypeError, ["num_heads", "6.0"]),
            (lambda: alibi_slopes(0), ValueError, ["num_heads"]),
        ],
    )
    def test_with_numbers(self, act, error, words):
        with refused(error, *words):
            act()


# What may be called a place


def some_table(dtype=torch.float32):
    return LearnedPositions(s.m, s.e, dtype=dtype)


PLACED = {  # whatever knows places, called with an offset for two rows of four tokens
    "LearnedPositions": lambda offset: some_table()(torch.randn(2, 4, s.e), offset=offset),
    "RoPE": lambda offset: RoPE(s.d)(*torch.randn(2, 2, s.h, 4, s.d), offset=offset),
    "RoPE, scaled": lambda offset: RoPE(s.d, frequencies=RoPELinearScaling(2))(
        *torch.randn(2, 2, s.h, 4, s.d), offset=offset
    ),
    "tables": lambda offset: rotate_by_tables(
        *torch.randn(2, 2, s.h, 4, s.d), cos=torch.ones(9, 4), sin=torch.ones(9, 4), offset=offset
    ),
    "qkv": lambda offset: MultiHeadAttention(s.e, s.h, head_dim=s.d).qkv(torch.randn(2, 4, s.e), offset=offset),
    "qkv of a layer with RoPE": lambda offset: MultiHeadAttention(s.e, s.h, head_dim=s.d, position=RoPE(s.d)).qkv(
        torch.randn(2, 4, s.e), offset=offset
    ),
}
NO_PLACES = {
    "a float": (1.5, TypeError, ["1.5"]),
    "a float that is whole": (2.0, TypeError, ["2.0"]),
    "a truth value": (True, TypeError, ["True"]),
    "None": (None, TypeError, ["None"]),
    "a str": ("2", TypeError, ["'2'"]),
    "a list": ([1, 2], TypeError, ["[1, 2]"]),
    "numpy's int": (np.int64(2), TypeError, ["int64"]),
    "numpy's array": (np.array([0, 1]), TypeError, ["array"]),
    "no axes": (torch.tensor(2), ValueError, ["()", "(2,)"]),
    "one for two": (torch.tensor([2]), ValueError, ["(1,)", "(2,)"]),
    "three for two": (torch.tensor([0, 1, 2]), ValueError, ["(3,)", "(2,)"]),
    "two axes": (torch.tensor([[0], [1]]), ValueError, ["(2, 1)", "(2,)"]),
    "a tensor of floats": (torch.tensor([0.0, 1.0]), TypeError, ["float32", "whole"]),
    "a tensor of truth values": (torch.tensor([True, False]), TypeError, ["bool", "whole"]),
    "complex": (torch.tensor([1j, 2]), TypeError, ["complex64"]),
    "another device": (torch.zeros(2, dtype=torch.int64, device="meta"), ValueError, ["meta", "cpu"]),
    "beyond int64": (2**70, ValueError, [str(2**70)]),
}


@pytest.mark.usefixtures("own_messages")
@pytest.mark.parametrize("call", PLACED)
@pytest.mark.parametrize("kind", NO_PLACES)
def test_what_is_no_place_is_refused_by_all_that_know_places(call, kind):
    offset, error, words = NO_PLACES[kind]
    if call == "qkv" and isinstance(offset, int) and not isinstance(offset, bool):
        return  # an int, however large: without a position nothing is placed
    with refused(error, "offset", *words):
        PLACED[call](offset)


@pytest.mark.parametrize("call", PLACED)
@pytest.mark.parametrize("offset", [0, 2, -3, torch.tensor([0, 2]), torch.tensor([2, -3], dtype=torch.int32)])
def test_what_is_a_place_is_taken_by_all_that_know_places(call, offset):
    PLACED[call](offset)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("of_the_table", [torch.bfloat16, torch.float32, torch.float64])
def test_tokens_keep_their_dtype(dtype, of_the_table):
    "The sum is taken in the wider dtype and rounded once."
    table, x = some_table(of_the_table), torch.randn(s.b, s.n, s.e).to(dtype)
    got = table(x, offset=1)
    assert got.dtype == dtype
    assert (
        torch.equal(got, (x.double() + table.weight[1 : s.n + 1].double()).to(dtype))
        or (got.double() - x.double() - table.weight[1 : s.n + 1].double()).abs().max() < 8 * torch.finfo(dtype).eps
    )


@pytest.mark.usefixtures("own_messages")
@pytest.mark.parametrize(
    "act, error, words",
    [
        (lambda: some_table()(torch.zeros(2, 4, 8)), ValueError, ["(2, 4, 8)", "20"]),
        (lambda: some_table()(torch.zeros(4, s.e)), ValueError, ["(4, 20)", "batch"]),
        (lambda: some_table()(torch.zeros(1, 2, 4, s.e)), ValueError, ["(1, 2, 4, 20)", "batch"]),
        (lambda: some_table()(torch.zeros(2, 4, s.e, dtype=torch.int64)), TypeError, ["int64", "embeddings"]),
        (lambda: some_table()(torch.zeros(2, 4, s.e, dtype=torch.complex64)), TypeError, ["complex64"]),
        (lambda: some_table()(np.zeros((2, 4, s.e))), TypeError, ["x", "numpy", "from_numpy"]),
        (lambda: some_table()(None), TypeError, ["x", "NoneType"]),
        (lambda: some_table()(torch.zeros(2, 4, s.e, device="meta")), ValueError, ["meta", "cpu"]),
        (lambda: sinusoidal_positions(torch.ones(3), 8), TypeError, ["places", "float32"]),
        (lambda: sinusoidal_positions(torch.ones(3) > 0, 8), TypeError, ["places", "bool"]),
        (lambda: sinusoidal_positions(np.arange(3), 8), TypeError, ["places", "from_numpy"]),
        (lambda: sinusoidal_positions(3, 8), TypeError, ["places", "int"]),
        (lambda: sinusoidal_positions(torch.arange(3), 8, 0), ValueError, ["base 0"]),
        (lambda: sinusoidal_positions(torch.arange(3), 8, "big"), TypeError, ["base", "'big'"]),
        (lambda: sinusoidal_positions(torch.arange(3), 8, dtype=torch.int64), TypeError, ["dtype", "int64"]),
        (lambda: relative_buckets(torch.ones(3)), TypeError, ["distances", "float32"]),
        (lambda: relative_buckets(np.arange(3)), TypeError, ["distances", "from_numpy"]),
        (lambda: relative_buckets(torch.arange(3), 32.0), TypeError, ["num_buckets", "32.0"]),
        (lambda: relative_buckets(torch.arange(3), 32, True), TypeError, ["max_distance", "True"]),
        (lambda: RelativeBias(6, bidirectional="no"), TypeError, ["bidirectional", "'no'"]),
        (lambda: RelativeBias(6, bidirectional=1), TypeError, ["bidirectional", "1"]),
        (lambda: RelativeBias(6, max_distance=128.0), TypeError, ["max_distance", "128.0"]),
        (lambda: RoPE(8)(*torch.zeros(2, 2, 6, 5, 8, dtype=torch.int64)), TypeError, ["query", "int64"]),
        (lambda: RoPE(8)(torch.zeros(2, 6, 5, 8), torch.zeros(3, 6, 5, 8)), ValueError, ["batch", "2", "3"]),
        (lambda: RoPE(8)(*np.zeros((2, 2, 6, 5, 8), "f")), TypeError, ["query", "numpy", "from_numpy"]),
        (lambda: RoPE(8).angles(torch.ones(3)), TypeError, ["places", "float32"]),
        (lambda: ALiBi(6)(*torch.zeros(3, 2, 6, 5, 8), bias=np.zeros((5, 5))), TypeError, ["bias", "from_numpy"]),
        (lambda: ALiBi(6)(*torch.zeros(3, 2, 6, 5, 8), bias=3), TypeError, ["bias", "int"]),
        (lambda: RelativeBias(6)(*torch.zeros(3, 2, 6, 5, 8), bias=torch.zeros(5, 5) > 0), TypeError, ["bias", "bool"]),
        (lambda: RelativeBias(6)(*torch.zeros(3, 2, 6, 5, 8), bias=torch.zeros(5, 6)), ValueError, ["bias", "(5, 6)"]),
        (lambda: RoPEYaRNScaling(8, 32, truncate="no"), TypeError, ["truncate", "'no'"]),
        (lambda: RoPELinearScaling(8)(8.0), TypeError, ["rotary_dim", "8.0"]),
    ],
)
def test_what_positions_are_not_made_of(act, error, words):
    with refused(error, *words):
        act()


@pytest.mark.usefixtures("own_messages")
def test_a_table_compiles_whole_with_a_place_for_each_row():
    table, x = some_table(), torch.randn(s.b, s.n, s.e)
    whole = torch.compile(lambda x, offset: table(x, offset=offset), fullgraph=True, backend="eager")
    for offset in (1, torch.tensor([2, -1])):
        assert torch.equal(whole(x, offset), table(x, offset=offset))


def test_a_table_maps_over_offsets():
    table, x = some_table(), torch.randn(3, s.b, s.n, s.e)
    offset = torch.tensor([[0, 1], [2, -1], [1, 1]])
    got = torch.func.vmap(lambda x, o: table(x, offset=o))(x, offset)
    assert torch.equal(got, torch.stack([table(a, offset=o) for a, o in zip(x, offset)]))


# Made on meta


MADE = {
    "LearnedPositions": lambda **like: LearnedPositions(400, 32, **like),
    "RelativeBias": lambda **like: RelativeBias(s.h, **like),
    "ALiBi": lambda device=None: ALiBi(s.h),
    "layer": lambda **like: MultiHeadAttention(
        s.e, s.h, head_dim=s.d, position=RoPE(s.d), attend=RelativeBias(s.h, **like), **like
    ),
}


@pytest.mark.parametrize("name", MADE)
def test_what_was_made_on_meta_starts_as_the_constructor_has_it(name):
    "After `to_empty`, each module resets its own parameters and no other's; what is no parameter is still right."
    torch.manual_seed(0)
    built, made = MADE[name](), MADE[name](device="meta")
    assert not [*made.buffers()]  # nothing that `to_empty` would lose
    made.to_empty(device="cpu")
    for p in made.parameters():
        p.data.fill_(torch.nan)
    for part in made.modules():
        own = {id(p) for p in part.parameters(recurse=False)}
        others = [p.clone() for p in made.parameters() if id(p) not in own]
        if own and type(part).__module__.startswith("mha_book.plugs"):
            part.reset_parameters()
            after = [p for p in made.parameters() if id(p) not in own]
            assert all(torch.equal(a, b) or a.isnan().all() and b.isnan().all() for a, b in zip(others, after))
            assert not any(p.isnan().any() for p in part.parameters(recurse=False))
    if name == "LearnedPositions":
        assert made.weight.std().item() == pytest.approx(0.02, rel=0.05)
        assert built.weight.std().item() == pytest.approx(0.02, rel=0.05)
    if name == "RelativeBias":
        assert not made.weight.any()
    if name == "layer":
        assert not made.attend.weight.any() and made.position == built.position
    if name == "ALiBi":
        assert made.slopes == built.slopes


@pytest.mark.usefixtures("own_messages")
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_distances_of_any_whole_kind_fall_into_the_same_buckets(dtype, bidirectional):
    far = torch.arange(torch.iinfo(dtype).min if dtype == torch.int8 else 0, 128)
    want = relative_buckets(far, bidirectional=bidirectional)
    assert torch.equal(relative_buckets(far.to(dtype), bidirectional=bidirectional), want)


def test_a_table_on_meta_and_tokens_that_are_not_have_nothing_to_move():
    for table, tokens in ("meta", "cpu"), ("cpu", "meta"):
        with refused(ValueError, f"x {tokens}, table {table}", "on meta there are no numbers to move"):
            LearnedPositions(9, 8, device=table)(torch.zeros(2, 5, 8, device=tokens))
