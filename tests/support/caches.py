"""What tests of caches share: layers, texts that are cut and padded, the reference without a cache, and bad calls."""

import copy
from functools import partial
from typing import NamedTuple

import torch
from hypothesis import strategies as st
from torch import nn

from mha_book.heads.layer import MultiHeadAttention
from mha_book.instruments.testing import SIZES
from mha_book.kernels.backends import attention
from mha_book.plugs.cache import KVCache
from mha_book.plugs.logits import SinkAttention
from mha_book.plugs.positions import ALiBi, RelativeBias
from mha_book.plugs.rope import RoPE
from mha_book.plugs.rope_scaling import RoPENTKScaling, RoPEYaRNScaling
from mha_book.variants.grouped import folded_attend

s = SIZES
float64 = dict(dtype=torch.float64)
close = partial(torch.testing.assert_close, atol=1e-12, rtol=0)


def sinks():
    plug = SinkAttention(s.h, **float64)
    nn.init.normal_(plug.sinks)
    return plug


def buckets():
    plug = RelativeBias(s.h, num_buckets=6, max_distance=5, bidirectional=False, **float64)
    nn.init.normal_(plug.weight)
    return plug


ROPE = partial(RoPE, s.d, 30.0)


POSITIONS = {
    "no position": None,
    "RoPE": ROPE(),
    "RoPE, neighbours": ROPE(pairing="interleaved"),
    "RoPE in part": ROPE(rotary_dim=4),
    "RoPE, NTK-aware": ROPE(frequencies=RoPENTKScaling(4)),
    "RoPE, YaRN": ROPE(frequencies=RoPEYaRNScaling(4, 8, fast_turns=4), magnitude=1.1),
}


ATTENDS = {
    "fused": lambda: None,
    "math": lambda: partial(attention, impl="math"),
    "window": lambda: partial(attention, window=3),
    "softcap": lambda: partial(attention, softcap=1.5),
    "sinks": sinks,
    "folded": lambda: folded_attend,
    "ALiBi": lambda: ALiBi(s.h),
    "T5's buckets": buckets,
}


ROLLING = {
    "keeps all": {},
    "rolls": dict(window=3),
    "rolls, first 2 stay": dict(window=2, keep_first=2),
    "window 1": dict(window=1, keep_first=1),
}


def build(position=None, attend=None, g=s.g, **options):
    torch.manual_seed(1)
    layer = MultiHeadAttention(
        s.e, s.h, num_kv_heads=g, head_dim=s.d, position=position, attend=attend, **float64, **options
    ).requires_grad_(False)
    for name, p in layer.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(p)
    return layer


def cache_for(rows, max_len, g=s.g, kind=KVCache, **options):
    cache = kind(rows, g, max_len, s.d, **float64, **options)
    for buffer in cache.k, cache.v:  # memory that nobody wrote
        buffer.fill_(float("nan"))
    return cache


class Piece(NamedTuple):
    "One call: of each row, padding before its new tokens, and how many there are; the rest is padding after them."

    width: int
    rows: tuple  # of (lead, count)


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
            x[r, lead : lead + count] = rows[r][done[r] : done[r] + count]
            real[r, lead : lead + count] = True
            done[r] += count
        every = real.all() and piece.width % 2  # sometimes it is said that all are real, sometimes not
        y = layer(x, is_causal=True, cache=cache, key_mask=None if every else real)
        for r, (lead, count) in enumerate(piece.rows):
            out[r].append(y[r, lead : lead + count])
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


ONE_BY_ONE = [Piece(1, ((0, 1),) * s.b)] * 9


CUTS = {
    "one by one": ONE_BY_ONE,
    "at once": [Piece(9, ((0, 9),) * s.b)],
    "uneven": [Piece(w, ((0, w),) * s.b) for w in (4, 1, 3, 1)],
    "left padding": [Piece(4, ((0, 4), (3, 1)))] + ONE_BY_ONE[:5],
    "right padding": [Piece(4, ((0, 4), (0, 1)))] + ONE_BY_ONE[:5],
    "padding in the middle": [Piece(2, ((0, 2), (0, 2))), Piece(3, ((2, 1), (0, 2))), Piece(3, ((1, 1), (3, 0)))],
}


def failing(layer, cache):
    "Calls that raise, each in another place."
    token, tall = torch.randn(s.b, 1, s.e, **float64), torch.randn(s.b, 40, s.e, **float64)
    wide = copy.copy(layer)
    wide.__dict__ = layer.__dict__ | {"attend": lambda q, k, v, **options: v[..., :2]}
    fails = {
        "attend": lambda: wide(token, cache=cache),
        "mask": lambda: layer(token, mask=torch.ones(2, 3).bool(), cache=cache),
        "bias": lambda: layer(token, bias=torch.ones(99), cache=cache),
        "holes": lambda: layer(
            torch.randn(s.b, 3, s.e, **float64), cache=cache, key_mask=torch.tensor([[True, False, True]] * s.b)
        ),
        "no rows": lambda: cache.reorder(torch.tensor([], dtype=torch.int64)),
        "rows that are not there": lambda: cache.reorder(torch.tensor([0, s.b])),
    }
    return fails | ({} if getattr(cache, "window", None) else {"full": lambda: layer(tall, cache=cache)})


def new(b=s.b, g=s.g, n=1, d=s.d, dtype=torch.float64, device=None):
    return torch.zeros(b, g, n, d, dtype=dtype, device=device)


REFUSED = {
    "rows": (lambda c: c.append(new(b=3), new(b=3)), ValueError, ("batch", "2", "3")),
    "heads": (lambda c: c.append(new(g=6), new(g=6)), ValueError, ("heads", "3", "6")),
    "width": (lambda c: c.append(new(d=9), new()), ValueError, ("width", "8", "9", "k ")),
    "value width": (lambda c: c.append(new(), new(d=9)), ValueError, ("width", "v ")),
    "lengths": (lambda c: c.append(new(n=2), new()), ValueError, ("one value for every key",)),
    "rank": (lambda c: c.append(new()[0], new()[0]), ValueError, ("batch, heads, tokens, width",)),
    "dtype": (lambda c: c.append(new(dtype=torch.float32), new()), TypeError, ("float64", "float32", "dtype=")),
    "value dtype": (lambda c: c.append(new(), new(dtype=torch.half)), TypeError, ("float16", "v ")),
    "device": (lambda c: c.append(new(device="meta"), new(device="meta")), ValueError, ("cpu", "meta", "no numbers")),
    "key_mask, dtype": (lambda c: c.append(new(), new(), torch.ones(s.b, 1)), TypeError, ("key_mask", "bool")),
    "key_mask, shape": (
        lambda c: c.append(new(), new(), torch.ones(s.b, 2).bool()),
        ValueError,
        ("key_mask", "(2, 1)"),
    ),
    "holes": (
        lambda c: c.append(new(n=3), new(n=3), torch.tensor([[True] * 3, [True, False, True]])),
        ValueError,
        ("row 1", "padding"),
    ),
    "full": (
        lambda c: (c.append(new(n=8), new(n=8)), c.commit(), c.append(new(), new())),
        ValueError,
        ("cache full: 8 of 8 used", "1 more", "max_len"),
    ),
    "too long at once": (lambda c: c.append(new(n=9), new(n=9)), ValueError, ("0 of 8 used", "9 more")),
    "too long in one row": (
        lambda c: (
            c.append(new(n=5), new(n=5), torch.tensor([[True] * 5, [False] * 4 + [True]])),
            c.commit(),
            c.append(new(n=4), new(n=4), torch.tensor([[True] * 4] * 2)),
        ),
        ValueError,
        ("5 of 8 used", "4 more"),
    ),
    "commit alone": (lambda c: c.commit(), RuntimeError, ("append",)),
    "rows as a list": (lambda c: c.reorder([0]), TypeError, ("rows", "int64")),
    "rows as floats": (lambda c: c.reorder(torch.ones(2)), TypeError, ("rows", "int64")),
    "no rows": (lambda c: c.reorder(torch.zeros(0).long()), ValueError, ("at least one row",)),
    "row numbers": (lambda c: c.reorder(torch.tensor([0, 2])), IndexError, ("0 to 1",)),
    "below 0": (lambda c: c.reorder(torch.tensor([0, -1])), IndexError, ("0 to 1",)),
    "a length below 0": (lambda c: c.crop(-1), ValueError, ("length", "0 or more")),
    "a row's length below 0": (lambda c: c.crop(torch.tensor([1, -1])), ValueError, ("length [1, -1]",)),
    "a length that is a bool": (lambda c: c.crop(True), TypeError, ("length", "bool")),
    "a length with a point": (lambda c: c.crop(2.0), TypeError, ("length", "2.0")),
    "lengths with a point": (lambda c: c.crop(torch.ones(s.b)), TypeError, ("length", "int64", "float32")),
    "lengths of other rows": (lambda c: c.crop(torch.ones(3).long()), ValueError, ("length", "(3,)", "(2,)")),
    "one length in a tensor": (lambda c: c.crop(torch.tensor(2)), ValueError, ("length", "()", "(2,)")),
    "lengths elsewhere": (lambda c: c.crop(torch.ones(s.b, device="meta").long()), ValueError, ("device", "meta")),
    "max_len 0": (lambda c: KVCache(1, 1, 0, 1), ValueError, ("max_len",)),
    "float": (lambda c: KVCache(1, 1, 8.0, 1), TypeError, ("max_len",)),
    "window 0": (lambda c: KVCache(1, 1, 8, 1, window=0), ValueError, ("window",)),
    "first without a window": (lambda c: KVCache(1, 1, 8, 1, keep_first=2), ValueError, ("keep_first", "window")),
    "first below 0": (lambda c: KVCache(1, 1, 8, 1, window=2, keep_first=-1), ValueError, ("keep_first",)),
    "first that is a bool": (
        lambda c: KVCache(1, 1, 8, 1, window=2, keep_first=False),
        TypeError,
        ("keep_first", "bool"),
    ),
    "no room to roll": (lambda c: KVCache(1, 1, 5, 1, window=4, keep_first=2), ValueError, ("max_len 5", "6")),
}


def cut_back(piece, places, length):
    "A piece as it is for a cache that sees only places below `length` of each row; what is behind them is padding."
    rows = []
    for (lead, count), place, most in zip(piece.rows, places, length):
        rows.append((lead, min(count, max(0, most - place))))
    return Piece(piece.width, tuple(rows))


def assert_cropped(layer, first, then, length, cache, twin):
    "After `first`, a crop and `then`, both caches say the same: `twin` has never seen what was taken back."
    rows, places, b = tokens(first + then), [0] * s.b, range(s.b)
    decode(layer, cache, rows, first)
    seen = cache.seen.tolist()
    most = [length] * s.b if isinstance(length, int) else length
    kept = [min(a, m) for a, m in zip(seen, most)]
    cache.append(*torch.randn(2, s.b, s.g, 1, s.d, **float64))  # pending, and forgotten
    cache.crop(length if isinstance(length, int) else torch.tensor(length))
    try:
        cache.commit()
    except RuntimeError:
        pass
    else:
        raise AssertionError("what was appended before the crop is still there")
    assert cache.seen.tolist() == kept
    short = []
    for piece in first:
        short.append(cut_back(piece, places, kept))
        places = [places[r] + piece.rows[r][1] for r in b]
    decode(layer, twin, [row[:n] for row, n in zip(rows, kept)], short)
    rest = [row[n:] for row, n in zip(rows, seen)]
    for got, wanted in zip(*(decode(layer, c, rest, then) for c in (cache, twin))):
        close(got, wanted)
    assert cache.seen.tolist() == twin.seen.tolist()


def serve(layer, new, seed, events=40, **rolling):
    """A running batch: requests join, share their first tokens, have drafts taken back, and end; each row's outputs are
    those of the row alone. `new(rows)` makes a cache for so many rows.
    """
    generator = torch.Generator().manual_seed(seed)
    draw = lambda low, high: int(torch.randint(low, high + 1, (1,), generator=generator))  # noqa: E731
    fresh = lambda n: torch.randn(n, s.e, generator=generator, **float64)  # noqa: E731

    def step(cache, rows, most):
        "New tokens of each row, some of them none, with padding on either side."
        width = draw(1, most)
        counts = [draw(0, width) for _ in rows] if draw(0, 1) else [width] * len(rows)
        leads = [draw(0, width - count) for count in counts]
        x, real = torch.full((len(rows), width, s.e), 7.0, **float64), torch.zeros(len(rows), width).bool()
        for r, (lead, count) in enumerate(zip(leads, counts)):
            rows[r] = torch.cat([rows[r], fresh(count)])
            x[r, lead : lead + count], real[r, lead : lead + count] = rows[r][len(rows[r]) - count :], True
        y = layer(x, is_causal=True, cache=cache, key_mask=None if real.all() else real)
        for r, row in enumerate(rows):
            close(y[r, real[r]], alone(layer, row, **rolling)[len(row) - counts[r] :])
        assert cache.seen.tolist() == [len(row) for row in rows]

    batch, rows = new(2), [fresh(0), fresh(0)]
    for _ in range(events):
        event = draw(0, 4) if len(rows) > 1 else draw(0, 3)
        if event == 0 and len(rows) < 5:  # a request joins, with a prompt or without
            other, others = new(draw(1, 2)), []
            others = [fresh(0)] * len(other.seen)
            if draw(0, 2):
                step(other, others, 4)
            batch.join(other)
            rows += others
            assert other.seen.tolist() == [0] * len(others)
        elif event == 1 and len(rows) < 5:  # one shares its first tokens with another
            first, length = draw(0, len(rows) - 1), draw(0, 6)
            before = batch.seen.tolist()
            try:
                other = batch.fork(torch.tensor([first]), length if draw(0, 1) else torch.tensor([length]))
            except ValueError as error:
                assert rolling and "cannot go back" in str(error)
                continue
            assert batch.seen.tolist() == before
            others = [rows[first][:length]]
            step(other, others, 3)
            batch.join(other)
            rows += others
        elif event == 2:  # drafts are taken back
            lengths = [max(0, len(row) - draw(0, 2)) for row in rows]
            try:
                batch.crop(torch.tensor(lengths))
            except ValueError as error:
                assert rolling and "cannot go back" in str(error)
                continue
            rows = [row[:length] for row, length in zip(rows, lengths)]
        elif event == 4:  # some end
            ended = [r for r in range(len(rows)) if draw(0, 1)][: len(rows) - 1] or [draw(0, len(rows) - 1)]
            batch.drop(torch.tensor(ended))
            rows = [row for r, row in enumerate(rows) if r not in ended]
        step(batch, rows, 3)
        if max(map(len, rows)) > 24:
            batch.reset()
            rows = [fresh(0) for _ in rows]


def scattered(layer, buffers, x, indices):
    """Attention over static buffers that are written at given places, as ONNX's TensorScatter does: token i of row r
    goes to place indices[r] + i, and its query sees the places up to its own. Row by row, by hand.
    """
    out, (h, g, d) = [], layer.layout
    for r, row in enumerate(x):
        start, n = indices[r], len(row)
        q, k, v = layer.qkv(row[None], offset=torch.tensor([start]))
        buffers[0][r, :, start : start + n], buffers[1][r, :, start : start + n] = k[0], v[0]
        heads = []
        for i in range(n):
            seen = start + i + 1
            for head in range(h):
                keys, values = (t[r, head * g // h, :seen] for t in buffers)
                weights = (keys @ q[0, head, i] / d**0.5).softmax(0)
                heads.append(weights @ values)
        out.append(layer.out_proj(torch.stack(heads).view(n, h * d)))
    return torch.stack(out)
