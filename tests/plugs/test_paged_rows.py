"""Rows of a paged cache come and go, and no other row's numbers change; what nobody holds any more is free again."""

import copy
import gc
import itertools
import pickle
import subprocess
import sys
import threading

import pytest
import torch

from mha_book.heads.layer import commit_once
from mha_book.plugs.cache import KVCache
from mha_book.plugs.paged import BlockPool, PagedCache
from support.caches import POSITIONS, ROPE, build, close, float64, new, s
from support.mutants_caches import BLOCK_ROWS
from support.pools import assert_no_block_is_lost, pool_of
from support.refusals import refused

# --- a serving loop -------------------------------------------------------------------------------------------------


class Server:
    "Requests that begin, go on and end in one batch. Every output is compared with the request alone, without a cache."

    def __init__(self, layer, block_size=3, seed=0):
        self.layer, self.pool = layer, pool_of(40 + 1200 // block_size, block_size)
        self.running, self.texts, self.done = None, [], []
        self.random = torch.Generator().manual_seed(seed)

    def draw(self, low, high):
        return int(torch.randint(low, high + 1, (), generator=self.random))

    def more(self, tokens):
        return torch.randn(tokens, s.e, **float64, generator=self.random)

    def call(self, cache, texts, seen, counts):
        "So many tokens of each text, padded on either side; what comes out is that of the text alone."
        width = max(counts)
        x, real = torch.full((len(texts), width, s.e), 7.0, **float64), torch.zeros(len(texts), width).bool()
        for row, (text, begin, count) in enumerate(zip(texts, seen, counts)):
            lead = self.draw(0, width - count)
            x[row, lead : lead + count] = text[begin : begin + count]
            real[row, lead : lead + count] = True
        y = self.layer(x, is_causal=True, cache=cache, key_mask=None if real.all() else real)
        for row, (text, begin, count) in enumerate(zip(texts, seen, counts)):
            wanted = self.layer(text[None, : begin + count], is_causal=True)[0, begin:]
            close(y[row, real[row]], wanted)

    def begin(self):
        "Two requests of different length, in a cache of their own, which joins the others."
        texts = [self.more(self.draw(1, 7)) for _ in range(2)]
        cache = PagedCache(self.pool, 2)
        self.call(cache, texts, [0, 0], [len(text) for text in texts])
        self.join(cache, texts)

    def begin_like(self, row):
        "A request whose first tokens are those of a row."
        if (length := self.draw(0, len(self.texts[row]))) == 0:
            return
        cache = self.running.fork(torch.tensor([row]), length)
        text = torch.cat([self.texts[row][:length], self.more(self.draw(1, 4))])
        self.call(cache, [text], [length], [len(text) - length])
        self.join(cache, [text])

    def join(self, cache, texts):
        if self.running is None:
            self.running = cache
        else:
            self.running.join(cache)
            assert cache.seen.tolist() == [0] * len(texts) and cache.tables == [[]] * len(texts)
        self.texts += texts

    def step(self):
        "Tokens for some rows, one for most."
        counts = [max(0, self.draw(-1, 3)) for _ in self.texts] if self.draw(0, 2) == 0 else [1] * len(self.texts)
        counts[-1] = max(1, counts[-1])
        seen = [len(text) for text in self.texts]
        self.texts = [torch.cat([text, self.more(count)]) for text, count in zip(self.texts, counts)]
        self.call(self.running, self.texts, seen, counts)

    def guess(self):
        "Drafts, which are taken back, in each row as many as were wrong."
        texts, seen = self.texts, [len(text) for text in self.texts]
        self.texts = [torch.cat([text, self.more(4)]) for text in texts]
        self.call(self.running, self.texts, seen, [4] * len(texts))
        right = [self.draw(0, 4) for _ in texts]
        self.texts = [text[: n + r] for text, n, r in zip(self.texts, seen, right)]
        self.running.crop(torch.tensor([len(text) for text in self.texts]))

    def end(self):
        if len(self.texts) > 1:
            row = self.draw(0, len(self.texts) - 1)
            self.running.drop(torch.tensor([row]))
            del self.texts[row]

    def too_much(self):
        "A call that the pool has no room for is refused, and changes nothing."
        before = self.pool.free, self.pool.counts, self.running.tables, self.running.lengths
        x = torch.randn(len(self.texts), (len(self.pool.free) + 2) * self.pool.block_size, s.e, **float64)
        with refused(ValueError, "pool full"):
            self.layer(x, is_causal=True, cache=self.running)
        assert before == (self.pool.free, self.pool.counts, self.running.tables, self.running.lengths)

    def check(self):
        assert self.running.seen.tolist() == [len(text) for text in self.texts]
        assert_no_block_is_lost(self.pool, self.running)


@torch.no_grad()
def check_serving(position="RoPE", block_size=3, seed=0, steps=30):
    server = Server(build(POSITIONS[position]), block_size=block_size, seed=seed)
    server.begin()
    for _ in range(steps):
        acts = [server.begin, lambda: server.begin_like(server.draw(0, len(server.texts) - 1)), server.guess]
        [*acts, server.end, server.end, server.step, server.step, server.too_much][server.draw(0, 7)]()
        server.check()
    del server.running
    assert len(server.pool.free) == len(server.pool.counts)


@pytest.mark.parametrize("block_size", [1, 2, 3, 5, 64])
@pytest.mark.parametrize("position", ["no position", "RoPE"])
def test_rows_come_and_go_and_each_is_what_it_is_alone(position, block_size):
    for seed in range(2):
        check_serving(position, block_size, seed)


# --- each method ----------------------------------------------------------------------------------------------------


def filled(pool, lengths, seed=1):
    "A cache whose rows hold so many tokens, and what they are."
    cache, width = PagedCache(pool, len(lengths)), max(lengths)
    k = torch.randn(len(lengths), s.g, width, s.d, **float64, generator=torch.Generator().manual_seed(seed))
    real = torch.arange(width) < torch.tensor(lengths)[:, None]
    cache.append(k, -k, real)
    cache.commit()
    return cache, [row[:, :n] for row, n in zip(k, lengths)]


def contents(cache):
    "The tokens of every row, as the next call would see them."
    nothing = new(b=len(cache.seen), n=0)
    k, v, mask = cache.append(nothing, nothing)
    assert torch.equal(k, -v)
    return [row[:, k.shape[2] - n :] for row, n in zip(k, cache.seen.tolist())]


def assert_holds(cache, rows):
    assert cache.seen.tolist() == [row.shape[1] for row in rows]
    assert all(map(torch.equal, contents(cache), rows))


def grow(cache, n=1):
    "More tokens for all rows, and what they are."
    k = torch.randn(len(cache.seen), s.g, n, s.d, **float64)
    cache.append(k, -k)
    cache.commit()
    return k


def check_drop():
    for gone in [0], [1], [2], [2, 0]:
        pool = pool_of()
        cache, rows = filled(pool, [4, 7, 2])
        cache.drop(torch.tensor(gone))
        assert_holds(cache, [row for i, row in enumerate(rows) if i not in gone])
        assert_no_block_is_lost(pool, cache)


def check_fork():
    for length in None, 0, 2, 3, 5, 9, torch.tensor([6, 0, 4]):
        pool = pool_of()
        cache, rows = filled(pool, [4, 7, 2])
        free = len(pool.free)
        fork = cache.fork(torch.tensor([1, 0, 1]), length)
        assert len(pool.free) == free
        most = [99] * 3 if length is None else length.tolist() if isinstance(length, torch.Tensor) else [length] * 3
        wanted = [rows[row][:, :n] for row, n in zip([1, 0, 1], most)]
        assert_holds(fork, wanted)
        assert_holds(cache, rows)
        assert_no_block_is_lost(pool, cache, fork)
        for first, other in (fork, cache), (cache, fork), (cache, fork):  # each writes behind what they share
            held = contents(first), contents(other)
            more = grow(first, 2)
            assert_holds(first, [torch.cat(pair, 1) for pair in zip(held[0], more)])
            assert_holds(other, held[1])
            assert_no_block_is_lost(pool, cache, fork)


def check_who_writes_first():
    "The original, a fork of all its tokens, or one of fewer; after a crop, too, and where one of them is gone."
    for order in itertools.permutations(range(3)):
        for back in None, 4, 3, 1:
            pool = pool_of(block_size=4)
            cache, rows = filled(pool, [7, 6])
            caches = [cache, cache.fork(torch.tensor([0, 1])), cache.fork(torch.tensor([1, 0]), 5)]
            held = [rows, rows, [rows[1][:, :5], rows[0][:, :5]]]
            if back is not None:
                caches[order[0]].crop(back)
                held[order[0]] = [row[:, :back] for row in held[order[0]]]
            for i in order + order:
                with torch.no_grad():
                    held[i] = [torch.cat(pair, 1) for pair in zip(held[i], grow(caches[i]))]
                for one, wanted in zip(caches, held):
                    assert_holds(one, wanted)
                assert_no_block_is_lost(pool, *caches)
            del cache, caches[order[1]], held[order[1]], one
            for one, wanted in zip(caches, held):
                assert_holds(one, [torch.cat(pair, 1) for pair in zip(wanted, grow(one))])
            assert_no_block_is_lost(pool, *caches)


def check_join():
    pool = pool_of()
    (one, rows), (two, others) = filled(pool, [4, 2]), filled(pool, [3, 6, 1], seed=2)
    free = len(pool.free)
    one.join(two)
    assert len(pool.free) == free
    assert_holds(one, rows + others)
    assert two.seen.tolist() == [0, 0, 0]
    more = grow(two)  # and it can be used again
    assert_holds(two, list(more))
    assert_holds(one, rows + others)
    assert_no_block_is_lost(pool, one, two)


def check_what_was_appended_is_forgotten():
    for change in (
        lambda cache, other: cache.drop(torch.tensor([0])),
        lambda cache, other: cache.join(other),
        lambda cache, other: other.join(cache),
    ):
        pool = pool_of()
        (cache, _), (other, _) = filled(pool, [4, 2]), filled(pool, [3, 3])
        cache.append(new(n=2), new(n=2))
        change(cache, other)
        with refused(RuntimeError, "append comes first"):
            cache.commit()


def check_fork_between_append_and_commit():
    "A fork begins with what is committed; what comes then is the original's alone."
    for lengths in [4, 5], [3, 3], [2, 2]:
        pool = pool_of(block_size=4)
        cache, rows = filled(pool, lengths)
        k = torch.randn(s.b, s.g, 1, s.d, **float64)
        with torch.no_grad():
            cache.append(k, -k)
        fork = cache.fork(torch.tensor([0, 1]))
        cache.commit()
        assert_holds(fork, rows)
        assert_holds(cache, [torch.cat(pair, 1) for pair in zip(rows, k)])
        more = grow(fork)
        assert_holds(cache, [torch.cat(pair, 1) for pair in zip(rows, k)])
        assert_holds(fork, [torch.cat(pair, 1) for pair in zip(rows, more)])
        assert_no_block_is_lost(pool, cache, fork)


def end_of(how, pool):
    "A cache of two rows and six blocks that ends in this way."
    cache, _ = filled(pool, [8, 7])
    if how == "a cycle":
        cache.itself, cache = cache, None
        gc.collect()
    elif how == "an uncommitted append":
        cache.append(new(), new())
    elif how == "an exception":
        with pytest.raises(ZeroDivisionError), commit_once(cache):
            cache.append(new(), new())
            1 / 0  # noqa: B018
    elif how == "fork first":
        fork = cache.fork(torch.tensor([0]))
        grow(fork)
        del fork
    elif how == "original first":
        fork, cache = cache.fork(torch.tensor([0, 1, 1])), None
        grow(fork)
    elif how == "joined":
        other, _ = filled(pool, [2])
        other.join(cache)
    elif how == "reordered":
        cache.reorder(torch.tensor([1, 1, 0]))
        grow(cache)
    elif how == "a copy":
        copy.copy(cache).drop(torch.tensor([0]))
    elif how == "a deep copy":
        copy.deepcopy(cache).drop(torch.tensor([0]))
    elif how == "in a thread":
        thread = threading.Thread(target=lambda held=[cache]: held.pop())
        del cache
        thread.start()
        thread.join()


ENDS = ["let go", "a cycle", "an uncommitted append", "an exception", "fork first", "original first", "joined"]
ENDS += ["reordered", "a copy", "a deep copy", "in a thread"]


def check_ends(ends=ENDS):
    for how in ends:
        pool = pool_of(20)
        held, rows = filled(pool, [5], seed=3)
        for _ in range(4):  # more than the pool holds at a time
            end_of(how, pool)
        assert len(pool.free) == 20 - 2, how
        assert_no_block_is_lost(pool, held)
        assert_holds(held, rows)


def check_copies():
    "A copy comes with its memory, has what it had, and goes on by itself; of the blocks of others it knows nothing."
    for copied in copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache)):
        pool = pool_of()
        (cache, rows), (other, others) = filled(pool, [4, 7]), filled(pool, [9])
        fork = cache.fork(torch.tensor([1]), 5)
        twin = copied(cache)
        assert twin.pool is not pool
        assert_no_block_is_lost(twin.pool, twin)
        grow(twin, 2)
        assert_holds(cache, rows)
        assert_holds(fork, [rows[1][:, :5]])
        three, two = copied([other, fork])
        assert three.pool is two.pool
        assert_no_block_is_lost(two.pool, two, three)
        assert_holds(three, others)
        assert_holds(two, [rows[1][:, :5]])
        del twin, two
        assert_no_block_is_lost(three.pool, three)
        assert_no_block_is_lost(pool, cache, other, fork)
        assert copied(pool).counts == [0] * len(pool.counts)


CHECKS = [
    check_drop,
    check_fork,
    check_who_writes_first,
    check_join,
    check_what_was_appended_is_forgotten,
    check_fork_between_append_and_commit,
    check_ends,
    check_copies,
    check_serving,
]


@pytest.mark.parametrize("check", CHECKS[:-1])
def test_rows(check):
    check()


@pytest.mark.parametrize("name", BLOCK_ROWS)
def test_a_cache_with_a_fault_is_noticed(own_messages, monkeypatch, name):
    BLOCK_ROWS[name].plant(monkeypatch)
    with pytest.raises(BaseException) as noticed:
        for check in CHECKS:
            check()
    assert not isinstance(noticed.value, (NameError, SyntaxError)), noticed.value


def test_a_shallow_copy_shares_blocks_and_is_a_cache_of_its_own():
    pool = pool_of()
    cache, rows = filled(pool, [4, 7])
    free, twin = len(pool.free), copy.copy(cache)
    assert len(pool.free) == free and twin.pool is pool
    grow(twin)
    assert_holds(cache, rows)
    assert_no_block_is_lost(pool, cache, twin)
    with refused(TypeError, "one memory", "copy.deepcopy"):
        copy.copy(pool)


def test_what_append_has_shown_to_a_graph_outlives_the_cache_and_its_blocks():
    pool = pool_of(3)
    cache, rows = filled(pool, [7])
    cache.reorder(torch.tensor([0]))
    shown = cache.append(new(b=1), new(b=1))[0]
    del cache
    filled(pool, [9], seed=5)
    assert torch.equal(shown[0, :, :7], rows[0])


def test_a_cache_outlives_every_other_name_of_its_pool():
    cache, rows = filled(pool_of(), [4, 7])
    gc.collect()
    more = grow(cache, 5)
    assert_holds(cache, [torch.cat(pair, 1) for pair in zip(rows, more)])


def test_a_row_without_tokens_sees_nothing_of_others():
    "What lies in the memory of others is not even read: a NaN there would come through a mask."
    pool = pool_of()
    broken = PagedCache(pool, 1)
    broken.append(new(b=1, n=6) / 0, new(b=1, n=6) / 0)
    broken.commit()
    cache, _ = filled(pool, [4])
    cache.join(PagedCache(pool, 1))
    with torch.no_grad():
        y = build(ROPE())(torch.randn(2, 1, s.e, **float64), is_causal=True, cache=cache)
    assert y.isfinite().all()


AT_EXIT = """
import torch
from mha_book import BlockPool, PagedCache
pool = BlockPool(8, 4, 2, 8)
cache = PagedCache(pool, 2)
cache.append(*torch.zeros(2, 2, 2, 5, 8))
cache.commit()
cache.itself, pool.cache, fork = cache, cache, cache.fork(torch.tensor([1]))
"""


def test_the_interpreter_ends_in_silence():
    done = subprocess.run([sys.executable, "-c", AT_EXIT], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr


COMPILED = """
import torch
from torch._dynamo.testing import CompileCounter
from mha_book import BlockPool, MultiHeadAttention, PagedCache, RoPE
from mha_book.models.language_model import LanguageModel, LanguageModelConfig

torch.manual_seed(0)
torch.set_grad_enabled(False)
layer = MultiHeadAttention(48, 6, num_kv_heads=3, position=RoPE(8)).double()
x = torch.randn(2, 40, 48, dtype=torch.float64)
kind = dict(dtype=torch.float64)
model = LanguageModel(LanguageModelConfig(11, 16, 2, 4, 2, 4, 24, 64, 1e4, 1e-5)).double().eval()
ids = torch.arange(80).view(2, 40) % 11


def begun(start):
    cache = PagedCache(BlockPool(40, 4, 3, 8, **kind), 2)
    layer(x[:, :start], is_causal=True, cache=cache)
    return cache

def check(step, whole, text, cache, start=0):
    torch._dynamo.reset()
    made = CompileCounter()
    run, counts = torch.compile(step, backend=made, fullgraph=True), []
    for i in range(start, 26):
        got = run(text[:, i:i + 1], cache)
        torch.testing.assert_close(got[:, 0], whole[:, i], atol=1e-12, rtol=0)
        counts.append(made.frame_count)
    assert counts[-1] == counts[14 - start] <= 7, counts

step, whole = lambda t, cache: layer(t, is_causal=True, cache=cache), layer(x, is_causal=True)
check(step, whole, x, begun(7), 7)
pool = BlockPool(80, 4, 2, 4, **kind)
check(lambda t, cache: model(t, cache=cache), model(ids), ids, [PagedCache(pool, 2) for _ in range(2)])
"""


def test_a_compiled_step_is_not_compiled_again_for_each_token():
    "In a process of its own: here every function checks the shapes that it is given, and that is not compiled."
    done = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# --- what does not fit ----------------------------------------------------------------------------------------------


def of(*rows):
    return torch.tensor(rows)


REFUSED = {
    "drop: a list": (lambda c, o: c.drop([0]), TypeError, ("rows", "int64")),
    "drop: floats": (lambda c, o: c.drop(of(0.0)), TypeError, ("rows", "int64")),
    "drop: truth values": (lambda c, o: c.drop(of(True, False)), TypeError, ("rows", "int64")),
    "drop: an array": (lambda c, o: c.drop(of(0).numpy()), TypeError, ("rows", "int64")),
    "drop: nobody": (lambda c, o: c.drop(of().long()), ValueError, ("at least one row",)),
    "drop: not there": (lambda c, o: c.drop(of(2)), IndexError, ("0 to 1",)),
    "drop: below 0": (lambda c, o: c.drop(of(-1)), IndexError, ("0 to 1",)),
    "drop: twice": (lambda c, o: c.drop(of(1, 1)), ValueError, ("[1, 1]", "twice")),
    "drop: all": (lambda c, o: c.drop(of(1, 0)), ValueError, ("[1, 0]", "reset()")),
    "drop: elsewhere": (lambda c, o: c.drop(of(1).to("meta")), ValueError, ("device", "meta")),
    "fork: a number": (lambda c, o: c.fork(1), TypeError, ("rows", "int64")),
    "fork: nobody": (lambda c, o: c.fork(of().long()), ValueError, ("at least one row",)),
    "fork: not there": (lambda c, o: c.fork(of(0, 2)), IndexError, ("0 to 1",)),
    "fork: below 0": (lambda c, o: c.fork(of(0), -1), ValueError, ("length", "0 or more")),
    "fork: a point": (lambda c, o: c.fork(of(0), 2.0), TypeError, ("length", "2.0")),
    "fork: a bool": (lambda c, o: c.fork(of(0), True), TypeError, ("length", "bool")),
    "fork: an array": (lambda c, o: c.fork(of(0), of(2).numpy()), TypeError, ("length",)),
    "fork: lengths of others": (lambda c, o: c.fork(of(0), of(1, 2)), ValueError, ("length", "(2,)", "(1,)")),
    "join: nothing": (lambda c, o: c.join(None), TypeError, ("PagedCache", "NoneType")),
    "join: a slab": (lambda c, o: c.join(KVCache(2, s.g, 9, s.d)), TypeError, ("PagedCache", "KVCache")),
    "join: itself": (lambda c, o: c.join(c), ValueError, ("itself",)),
    "join: another pool": (lambda c, o: c.join(o), ValueError, ("pool",)),
    "join: a deep copy": (lambda c, o: c.join(copy.deepcopy(c)), ValueError, ("pool",)),
    "reorder: an array": (lambda c, o: c.reorder(of(0).numpy()), TypeError, ("rows", "int64")),
    "crop: an array": (lambda c, o: c.crop(of(1, 1).numpy()), TypeError, ("length",)),
    "crop: None": (lambda c, o: c.crop(None), TypeError, ("length", "NoneType")),
    "append: full": (lambda c, o: c.append(new(n=99), new(n=99)), ValueError, ("pool full", "54 of 60")),
    "append: other rows": (lambda c, o: c.append(new(b=3), new(b=3)), ValueError, ("batch", "2", "3")),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused_and_changes_nothing(own_messages, name):
    (call, error, words), pool = REFUSED[name], pool_of()
    (cache, rows), (other, _) = filled(pool, [8, 7]), filled(pool_of(), [3])
    with refused(error, *words):
        call(cache, other)
    assert_no_block_is_lost(pool, cache)
    assert_holds(cache, rows)


@torch.no_grad()
def test_rows_of_another_layer_are_refused():
    "One pool may serve all layers of a model; a row has one layer, and its forks have the same."
    pool, (one, other) = pool_of(), (build(ROPE()), build(ROPE()))
    other.in_proj.weight.add_(1)
    caches, x = [PagedCache(pool, 1) for _ in range(2)], torch.randn(1, 4, s.e, **float64)
    for layer, cache in zip((one, other), caches):
        layer(x, is_causal=True, cache=cache)
    before = [cache.tables for cache in caches]
    with refused(ValueError, "another layer's"):
        caches[0].join(caches[1])
    fork = caches[0].fork(torch.tensor([0]), 2)
    with refused(ValueError, "another layer"):
        other(x, is_causal=True, cache=fork)
    assert [cache.tables for cache in caches] == before
    assert_no_block_is_lost(pool, *caches, fork)
    one(x, is_causal=True, cache=fork)
    caches[0].join(fork)
    assert caches[0].seen.tolist() == [4, 6]


@pytest.mark.parametrize("pool", [None, 8, KVCache(1, 1, 4, 1), BlockPool])
def test_a_pool_is_a_pool(own_messages, pool):
    with refused(TypeError, "pool", "BlockPool"):
        PagedCache(pool, 2)


def test_caches_that_only_hold_each_other_are_found_before_the_pool_is_full():
    class Request:
        def __init__(self, pool):
            self.cache, self.done = PagedCache(pool, 1), self.end

        def end(self):
            pass

    layer, pool = build(), BlockPool(4, 4, s.g, s.d, **float64)
    gc.collect()
    gc.disable()
    try:
        with torch.no_grad():
            for _ in range(3):
                layer(torch.randn(1, 8, s.e, **float64), is_causal=True, cache=Request(pool).cache)
    finally:
        gc.enable()
