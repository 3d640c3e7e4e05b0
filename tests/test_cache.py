"""The cache changes nothing: however texts are cut, padded and interrupted, each row's outputs are those of the row
alone."""
from functools import partial
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mha_book.backends import attention
from mha_book.cache import KVCache
from mha_book.logits import SinkAttention
from mha_book.testing import SIZES
from mha_book.weight_split import MultiHeadAttention

settings.register_profile("book", max_examples=25, deadline=None, derandomize=True)
settings.load_profile("book")
s = SIZES
float64 = dict(dtype=torch.float64)
close = partial(torch.testing.assert_close, atol=1e-12, rtol=0)


# --- position schemes, and what `attend` may be: one line each ------------------------------------------------------

def rotate(q, k, *, offset):
    "Rotary positions, halves paired; the offset may differ by row."
    start = torch.as_tensor(offset).reshape(-1, 1, 1)
    angles = (start + torch.arange(q.shape[2])[:, None]).double() * 0.3 ** torch.arange(s.d // 2)
    turn = torch.polar(torch.ones_like(angles), angles)[:, None]

    def turned(t):
        a, b = t.chunk(2, dim=-1)
        z = torch.complex(a, b) * turn
        return torch.cat([z.real, z.imag], dim=-1)
    return turned(q), turned(k)


def with_distances(q, k, v, *, mask, bias, is_causal, dropout_p):
    "A bias of the distance between slots, as ALiBi's: aligned at the end, it needs no offset."
    n, m = q.shape[2], k.shape[2]
    distance = (torch.arange(n)[:, None] + m - n - torch.arange(m)).double()
    slopes = 0.5 ** torch.arange(1, q.shape[1] + 1).double()
    return attention(q, k, v, mask=mask, bias=-slopes[:, None, None] * distance, is_causal=is_causal)


def sinks():
    plug = SinkAttention(s.h, **float64)
    nn.init.normal_(plug.sinks)
    return plug


POSITIONS = {"no position": None, "rotary": rotate}
ATTENDS = {
    "fused": lambda: None,
    "math": lambda: partial(attention, impl="math"),
    "window": lambda: partial(attention, window=3),
    "softcap": lambda: partial(attention, softcap=1.5),
    "sinks": sinks,
    "distances": lambda: with_distances,
}
ROLLING = {"keeps all": {}, "rolls": dict(window=3), "rolls, first 2 stay": dict(window=2, keep_first=2),
           "window 1": dict(window=1, keep_first=1)}


def build(position=None, attend=None, g=s.g, **options):
    torch.manual_seed(1)
    layer = MultiHeadAttention(s.e, s.h, num_kv_heads=g, head_dim=s.d, position=position, attend=attend, **float64,
                               **options).requires_grad_(False)
    for name, p in layer.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(p)
    return layer


def cache_for(rows, max_len, g=s.g, **options):
    cache = KVCache(rows, g, max_len, s.d, **float64, **options)
    for buffer in cache.k, cache.v:    # memory that nobody wrote
        buffer.fill_(float("nan"))
    return cache


# --- texts, cut and padded ------------------------------------------------------------------------------------------

class Piece(NamedTuple):
    "One call: of each row, padding before its new tokens, and how many there are; the rest is padding after them."
    width: int
    rows: tuple    # of (lead, count)


@st.composite
def pieces(draw, rows=s.b, padded=True, most=4):
    width = draw(st.integers(1, most))
    if not padded:
        return Piece(width, ((0, width),) * rows)
    counts = [draw(st.integers(0, width)) for _ in range(rows)]
    return Piece(width, tuple((draw(st.integers(0, width - count)), count) for count in counts))


def texts(draw_pieces):
    return st.lists(draw_pieces, min_size=1, max_size=7)


def slack(options, wanted):
    "Slots: few enough that the memory's end is reached, and chunks do not fit in place."
    return options["window"] + options.get("keep_first", 0) + wanted if options else 40


def tokens(cut):
    "A text for each row, as long as its pieces say."
    torch.manual_seed(2)
    return [torch.randn(sum(p.rows[r][1] for p in cut), s.e, **float64) for r in range(len(cut[0].rows))]


def decode(layer, cache, rows, cut):
    "Each row's outputs for its real tokens, piece by piece. Padding is loud."
    done, out = [0] * len(rows), [[] for _ in rows]
    for piece in cut:
        x, real = torch.full((len(rows), piece.width, s.e), 7.0, **float64), torch.zeros(len(rows), piece.width).bool()
        for r, (lead, count) in enumerate(piece.rows):
            x[r, lead:lead + count] = rows[r][done[r]:done[r] + count]
            real[r, lead:lead + count] = True
            done[r] += count
        every = real.all() and piece.width % 2    # sometimes it is said that all are real, sometimes not
        y = layer(x, is_causal=True, cache=cache, key_padding_mask=None if every else real)
        for r, (lead, count) in enumerate(piece.rows):
            out[r].append(y[r, lead:lead + count])
    return [torch.cat(parts) for parts in out]


def rolling_mask(n, window=None, keep_first=0):
    "The closed form: place p sees place j where j < keep_first or p - j < window."
    p, j = torch.arange(n)[:, None], torch.arange(n)
    return (j < keep_first) | (p - j < (window or n))


def alone(layer, row, **rolling):
    "The whole row at once, without a cache."
    return layer(row[None], is_causal=True, mask=rolling_mask(len(row), **rolling))[0]


def assert_same(layer, cut, cache, **rolling):
    rows = tokens(cut)
    for got, row in zip(decode(layer, cache, rows, cut), rows):
        close(got, alone(layer, row, **rolling))
    assert cache.seen.tolist() == [len(row) for row in rows]


GRID = [(position, attend, rolling) for position in POSITIONS for attend in ATTENDS for rolling in ROLLING
        # a window of its own, or a bias by slots, takes first tokens that stay for as near, or as far, as they stand
        if not (attend in ("window", "distances") and "keep_first" in ROLLING[rolling])]


@pytest.mark.parametrize("position, attend, rolling", GRID)
@given(data=st.data())
def test_any_cut_gives_what_each_row_gives_alone(position, attend, rolling, data):
    rolling = ROLLING[rolling]
    cut = data.draw(texts(pieces(padded=data.draw(st.booleans()))))
    layer = build(POSITIONS[position], ATTENDS[attend]())
    cache = cache_for(s.b, slack(rolling, data.draw(st.integers(0, 4))), **rolling)
    with torch.set_grad_enabled(data.draw(st.booleans())):
        assert_same(layer, cut, cache, **rolling)


ONE_BY_ONE = [Piece(1, ((0, 1),) * s.b)] * 9
CUTS = {"one by one": ONE_BY_ONE, "at once": [Piece(9, ((0, 9),) * s.b)],
        "uneven": [Piece(w, ((0, w),) * s.b) for w in (4, 1, 3, 1)],
        "left padding": [Piece(4, ((0, 4), (3, 1)))] + ONE_BY_ONE[:5],
        "right padding": [Piece(4, ((0, 4), (0, 1)))] + ONE_BY_ONE[:5],
        "padding in the middle": [Piece(2, ((0, 2), (0, 2))), Piece(3, ((2, 1), (0, 2))), Piece(3, ((1, 1), (3, 0)))]}


@pytest.mark.parametrize("g", [1, s.g, s.h])
@pytest.mark.parametrize("rolling", ROLLING)
@pytest.mark.parametrize("cut", CUTS)
@torch.no_grad()
def test_named_cuts_with_heads_in_groups(cut, rolling, g):
    cache = cache_for(s.b, slack(ROLLING[rolling], 1), g=g, **ROLLING[rolling])
    assert_same(build(rotate, g=g, qk_norm=nn.RMSNorm), CUTS[cut], cache, **ROLLING[rolling])
