"""Caches with a fault, by name: what the properties of `tests/plugs` have to notice.

Each is one method swapped for another that is made of the right one.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from mha_book.plugs import cache as module
from mha_book.plugs.cache import Call, KVCache, Slots, take_slots
from mha_book.plugs.paged import BlockPool, PagedCache, Rows, Run, Tables, flat


@dataclass(frozen=True)
class Mutant:
    "A class, or a module, whose function `name` is exchanged: `make` gets the right one and returns the wrong one."

    owner: object
    name: str
    make: Callable

    def plant(self, monkeypatch):
        right = getattr(self.owner, self.name)
        wrong = self.make(right)
        assert wrong is not right
        monkeypatch.setattr(self.owner, self.name, wrong)


def after(change):
    "The right method, and then `change(self)`."

    def make(right):
        def wrong(self, *args, **options):
            answer = right(self, *args, **options)
            change(self)
            return answer

        return wrong

    return make


def keeps_pending(right):
    "What was appended stays, to be committed."

    def wrong(self, *args):
        pending = getattr(self, "_pending", None)
        right(self, *args)
        self._pending = pending

    return wrong


# --- the slab -------------------------------------------------------------------------------------------------------


def keeps(most):
    def change(cache):
        cache.most = cache.most if cache.window is None else most(cache.window, cache.keep_first)

    return after(change)


def with_call(change):
    "Another call in place of `self`, or of the argument."
    return lambda right: lambda self, *args: right(change(self), *args)


def visible(change):
    "Call.visible with another window or other first tokens."
    return lambda right: (
        lambda self, m, held, window=None, keep_first=0: right(self, m, held, *change(window, keep_first))
    )


def rolls_and_nothing_else(right):
    def wrong(self, call, m):
        rolls = self.window is not None and m > self.keep_first + self.window
        return right(self, call, m) if rolls else None

    return wrong


def forgets_ragged(right):
    def wrong(self):
        call = self._pending and self._pending[0]
        right(self)
        self.ragged = call.ragged

    return wrong


def counts_one(right):
    def wrong(self):
        seen = self.seen
        right(self)
        self.seen = seen + 1

    return wrong


def counts_early(cache):
    cache.seen = cache.seen + cache._pending[0].added


def commits_at_once(cache):
    cache.commit()
    cache._pending = Call(0, 0, 0, 0), 0, None


def drops_first(right):
    def wrong(self, k, v, *args):
        if self.window is not None:
            too_many = self.slots.length + k.shape[2] - self.most - 1
            self.slots.start += min(max(0, too_many), self.slots.length)
        return right(self, k, v, *args)

    return wrong


def reorders_without_lengths(right):
    def wrong(self, rows):
        seen = self.seen
        right(self, rows)
        self.seen = seen[:1].expand(len(rows))

    return wrong


def never_full(right):
    def wrong(self, call):
        try:
            return right(self, call)
        except ValueError:
            return self.max_len

    return wrong


def writes_too_far(right):
    def wrong(self, *new):
        n, at = new[0].shape[2], self.end
        for buffer, t in zip((self.k, self.v), new):
            buffer.narrow(2, min(at + 1, buffer.shape[2] - n), n).copy_(t)
        return self.filled(n)

    return wrong


def front_without_end(right):
    def wrong(self, n, *args):
        end = self.end + n
        right(self, n, *args)
        self.end = end

    return wrong


def keeps_the_last_only(right):
    return lambda self, m, held, longest, most, keep_first: right(self, m, held, longest, most, 0)


def aligned_left(right):
    def wrong(self, m, held, longest, most, keep_first):
        slots = right(self, m, held, longest, most, keep_first)
        kept = (held + self.added).clamp(max=most)
        place = torch.arange(slots.shape[1]) + (slots.shape[1] - kept)[:, None]
        return slots.gather(1, place.clamp(max=slots.shape[1] - 1))

    return wrong


def crops_by_what_goes(right):
    return lambda self, length: right(self, (self.seen - length).clamp(min=0))


def crops_uncounted(right):
    def wrong(self, length):
        seen = self.seen
        right(self, length)
        self.seen = seen

    return wrong


def crops_the_first(right):
    def wrong(self, length):
        self.start = max(self.start, self.end - length)

    return wrong


SLAB = {
    "keeps one too few": Mutant(KVCache, "__init__", keeps(lambda window, few: few + max(window - 2, 0))),
    "keeps one too many": Mutant(KVCache, "__init__", keeps(lambda window, few: few + window)),
    "window one too wide": Mutant(Call, "visible", visible(lambda w, few: (w and w + 1, few))),
    "window one too narrow": Mutant(Call, "visible", visible(lambda w, few: (w and max(w - 1, 1), few))),
    "no mask for chunks that roll": Mutant(
        KVCache,
        "_visible",
        lambda right: lambda self, call, m: call.visible(m, self.held) if self.ragged or call.ragged else None,
    ),
    "a mask for padding only": Mutant(Call, "visible", visible(lambda w, few: (None, few))),
    "no mask for ragged rows": Mutant(KVCache, "_visible", rolls_and_nothing_else),
    "rows forgotten after the call": Mutant(KVCache, "commit", forgets_ragged),
    "first tokens not carried": Mutant(Slots, "carry", lambda right: lambda self, *args: None),
    "first tokens of ragged rows by slot": Mutant(
        Slots, "carry", lambda right: lambda self, start, few, lost: right(self, start, few, None)
    ),
    "first tokens hidden": Mutant(Call, "visible", visible(lambda w, few: (w, 0))),
    "shifts by the padding behind": Mutant(Call, "arrange", with_call(lambda call: call._replace(lead=call.trail))),
    "does not shift": Mutant(Call, "arrange", lambda right: lambda self, old, new: torch.cat([old, new], dim=2)),
    "padding stays on the right": Mutant(Call, "kept", with_call(lambda call: call._replace(trail=0))),
    "mask forgets the padding behind": Mutant(Call, "visible", with_call(lambda call: call._replace(trail=0))),
    "padding counts as tokens": Mutant(
        Call, "of", lambda right: lambda n, mask: (c := right(n, mask))._replace(added=n + 0 * c.lead)
    ),
    "seen not counted": Mutant(KVCache, "commit", counts_one),
    "counted before the call succeeds": Mutant(KVCache, "append", after(counts_early)),
    "committed at once": Mutant(KVCache, "append", after(commits_at_once)),
    "drops before it shows": Mutant(KVCache, "append", drops_first),
    "reorder forgets lengths": Mutant(KVCache, "reorder", reorders_without_lengths),
    "reorder keeps what was appended": Mutant(KVCache, "reorder", keeps_pending),
    "reset keeps what was appended": Mutant(KVCache, "reset", keeps_pending),
    "values where keys belong": Mutant(
        Slots, "put", lambda right: lambda self, laid_out, slots: right(self, laid_out[::-1], slots)
    ),
    "does not know that it is full": Mutant(KVCache, "_longest", never_full),
    "written one slot too far": Mutant(Slots, "write", writes_too_far),
    "moved to the front without its end": Mutant(Slots, "advance", front_without_end),
    "last instead of first tokens": Mutant(Call, "kept", keeps_the_last_only),
    "rows aligned at the left": Mutant(Call, "kept", aligned_left),
    "crop does not ask what is gone": Mutant(module, "check_return", lambda right: lambda *args: None),
    "crop takes what goes for what stays": Mutant(KVCache, "crop", crops_by_what_goes),
    "crop keeps what was appended": Mutant(KVCache, "crop", keeps_pending),
    "crop is not counted": Mutant(KVCache, "crop", crops_uncounted),
    "crop takes the first tokens": Mutant(Slots, "keep", crops_the_first),
    "crop moves no row": Mutant(
        Slots, "crop", lambda right: lambda self, held, kept: self.keep(self.length - int((held - kept).min()))
    ),
    "crop forgets that rows differ": Mutant(KVCache, "crop", after(lambda cache: setattr(cache, "ragged", False))),
}


# --- rows that come and go ------------------------------------------------------------------------------------------


def joins_at_the_left(right):
    def wrong(self, other):
        mine, length = self.length, max(self.length, other.length)
        right(self, other)
        rows = len(self.k) - len(other.k)
        for t in self.k, self.v:
            t[:rows, :, :length] = t[:rows, :, :length].roll(mine - length, dims=2)

    return wrong


def joins_without(change):
    "KVCache.join, and `change(cache, rows before)`."

    def make(right):
        def wrong(self, other):
            before = len(self.seen)
            right(self, other)
            change(self, before)

        return wrong

    return make


def takes_first_lengths(cache, rows):
    cache.seen = cache.seen[:1].expand(len(cache.seen))


def forgets_that_rows_differ(cache, rows):
    cache.ragged = False


def forks_in_the_same_memory(right):
    def wrong(self, rows, length=None):
        forked = right(self, rows, length)
        if len(rows) == len(self.k) and rows.tolist() == list(range(len(rows))):
            forked.slots.k, forked.slots.v = self.slots.k, self.slots.v
            forked.slots.start, forked.slots.end = self.slots.start, self.slots.end
        return forked

    return wrong


def keeps_the_other(right):
    def wrong(self, other):
        seen = other.seen
        right(self, other)
        other.seen = seen

    return wrong


SLAB_ROWS = {
    "joined at the left": Mutant(Slots, "join", joins_at_the_left),
    "joined with the lengths of the first": Mutant(KVCache, "join", joins_without(takes_first_lengths)),
    "joined rows are as long": Mutant(KVCache, "join", joins_without(forgets_that_rows_differ)),
    "the other is not emptied": Mutant(KVCache, "join", keeps_the_other),
    "forks in the same memory": Mutant(KVCache, "fork", forks_in_the_same_memory),
    "a fork of all tokens": Mutant(KVCache, "fork", lambda right: lambda self, rows, length=None: right(self, rows)),
    "drops what is to stay": Mutant(
        module,
        "kept_rows",
        lambda right: lambda rows, count: rows if right(rows, count) else None,
    ),
    "drops in another order": Mutant(module, "kept_rows", lambda right: lambda rows, count: right(rows, count)[::-1]),
    "keeps the slots of a row that is gone": Mutant(
        Slots, "align", lambda right: lambda self, held: bool((held < self.length).any())
    ),
    "joins whatever it is": Mutant(module, "check_join", lambda right: lambda cache, other: None),
    "joins the rows of two layers": Mutant(module, "join_writers", lambda right: lambda cache, other: ()),
}


# --- blocks ---------------------------------------------------------------------------------------------------------


def copied(change):
    "BlockPool.own, and `change` where it made a copy."

    def make(right):
        def wrong(self, block):
            copy = right(self, block)
            if copy != block:
                change(self, block, copy)
            return copy

        return wrong

    return make


def without_values(pool, block, copy):
    pool.v[:, copy] = 0


def counted_twice(pool, block, copy):
    pool.more[block] += 1


def reorders(early=False, late=True, share=True, first=False):
    "Tables.reorder with its steps changed."

    def make(right):
        def wrong(self, rows):
            old, lengths, pool = self.tables, self.lengths, self.pool
            if early:
                pool.release(flat(old))
            new = [old[rows[0] if first else row] for row in rows]
            if share:
                pool.share(flat(new))
            if late and not early:
                pool.release(flat(old))
            self.set(new, [lengths[row] for row in rows])

        return wrong

    return make


def same_lengths(right):
    def wrong(self, rows):
        longest = max(self.lengths)
        right(self, rows)
        self.set(self.tables, [longest] * len(rows))

    return wrong


def a_block_too_few(right):
    def wrong(self, call, longest):
        before = self.table.shape[1], self.pool.left
        right(self, call, longest)
        if self.pool.left < before[1] and not self.shared:
            self.pool.left += 1

    return wrong


def a_block_too_many(right):
    def wrong(self, call, longest):
        right(self, call, longest)
        if longest and longest % self.pool.block_size == 0 and self.pool.left:
            self.pool.take(1)

    return wrong


def from_one(right):
    def wrong(self, place):
        slots, size = right(self, place), self.pool.block_size
        return slots // size * size + (slots + 1) % size

    return wrong


def a_block_on(right):
    def wrong(tables):
        run = right(tables)
        return run and run._replace(first=run.first + (len(tables) > 1))

    return wrong


def keeps_its_run(right):
    return lambda self, most: right(self, most) or self.run


def rows_left(right):
    def wrong(self, length, added=0):
        shown = right(self, length, added)
        if not self.ragged:
            return shown
        shift = (length - added - self.seen)[:, None] + torch.arange(length)
        return [take_slots(t, shift.clamp(0, max(length - 1, 0))) for t in shown]

    return wrong


def keeps_padding(right):
    def wrong(self):
        if self._pending is not None and self._pending[2] is not None and self._pending[2][2] is not None:
            call, longest, (k, v, mask) = self._pending
            first = torch.arange(mask.shape[1]) < call.added[:, None]
            self._pending = call, longest, (k, v, first)
        right(self)

    return wrong


def without(name, value):
    "The right method with an attribute of the tables set to something else first."

    def make(right):
        def wrong(self, *args):
            setattr(self, name, value)
            return right(self, *args)

        return wrong

    return make


def a_copy_for_each(right):
    def wrong(self, call, longest):
        shared = self.shared
        self.shared = False
        new = right(self, call, longest)
        self.shared = shared
        return new + sum(self.pool.more[block] > 0 for _, block in self.writers(call)) * shared

    return wrong


def looks_once(right):
    def wrong(self):
        self.blocks.check_room = lambda *args: None
        try:
            right(self)
        finally:
            del self.blocks.check_room

    return wrong


def gives_nothing_back(self):
    self.blocks.set([[]] * len(self.seen), [0] * len(self.seen))
    self._pending = None


def crops_lengths_only(self, lengths):
    self.set(self.tables, lengths)


def crops_a_block_too_many(self, lengths):
    kept = [table[: length // self.pool.block_size] for table, length in zip(self.tables, lengths)]
    self.pool.release(flat(old[len(few) :] for old, few in zip(self.tables, kept)))
    self.set([few + [0] * (-(-n // self.pool.block_size) - len(few)) for few, n in zip(kept, lengths)], lengths)


def crops_shared_blocks(self, lengths):
    few = [table[: -(-length // self.pool.block_size)] for table, length in zip(self.tables, lengths)]
    for block in set(flat(old[len(kept) :] for old, kept in zip(self.tables, few))):
        self.pool.more[block] = 0
        self.pool.release([block])
    self.set(few, lengths)


def instead(wrong):
    return lambda right: wrong


BLOCKS = {
    "writes into shared blocks": Mutant(BlockPool, "own", instead(lambda self, block: block)),
    "copies keys only": Mutant(BlockPool, "own", copied(without_values)),
    "the copied block keeps its count": Mutant(BlockPool, "own", copied(counted_twice)),
    "given back before it is shared": Mutant(Tables, "reorder", reorders(early=True)),
    "never given back": Mutant(Tables, "reorder", reorders(late=False)),
    "a fork that is not counted": Mutant(Tables, "reorder", reorders(share=False)),
    "one table for all forks": Mutant(Tables, "reorder", reorders(first=True)),
    "lengths stay behind": Mutant(Tables, "reorder", same_lengths),
    "a block too few": Mutant(Rows, "extend", a_block_too_few),
    "a block too many": Mutant(Rows, "extend", a_block_too_many),
    "places within the block from 1": Mutant(Tables, "slots_of", from_one),
    "in line, whoever has the blocks": Mutant(BlockPool, "line_up", instead(lambda self, blocks: True)),
    "in line, and the rows elsewhere": Mutant(Run, "of", a_block_on),
    "in line, and never looks again": Mutant(Rows, "follow", keeps_its_run),
    "rows aligned at the left": Mutant(Rows, "read", rows_left),
    "padding is kept": Mutant(PagedCache, "commit", keeps_padding),
    "committed at once": Mutant(PagedCache, "append", after(lambda cache: cache.commit())),
    "does not know that it is full": Mutant(Rows, "check_room", instead(lambda self, call, longest: None)),
    "forgets the copies": Mutant(Rows, "needed", without("shared", False)),
    "counts a copy for each": Mutant(Rows, "needed", a_copy_for_each),
    "does not look again": Mutant(PagedCache, "commit", looks_once),
    "takes a shared block for its own": Mutant(Tables, "lay_out", without("shared", False)),
    "appended and forgotten by nobody": Mutant(PagedCache, "reorder", keeps_pending),
    "reset gives nothing back": Mutant(PagedCache, "reset", instead(gives_nothing_back)),
    "crop gives nothing back": Mutant(Tables, "crop", instead(crops_lengths_only)),
    "crop gives a block too many back": Mutant(Tables, "crop", instead(crops_a_block_too_many)),
    "crop frees what others read": Mutant(Tables, "crop", instead(crops_shared_blocks)),
    "crop takes what goes for what stays": Mutant(PagedCache, "crop", crops_by_what_goes),
    "crop keeps what was appended": Mutant(PagedCache, "crop", keeps_pending),
}


# --- rows that come and go ------------------------------------------------------------------------------------------


def forks(share=True, whole=False):
    "Tables.fork with its steps changed."

    def make(right):
        def wrong(self, rows, lengths):
            old, size = self.tables, self.pool.block_size
            lengths = [self.lengths[row] for row in rows] if whole else lengths
            new = [old[row][: -(-length // size)] for row, length in zip(rows, lengths)]
            if share:
                self.pool.share(flat(new))
            return Rows(self.pool, new, lengths)

        return wrong

    return make


def joins_and_shares(self, other):
    self.set(self.tables + other.tables, self.lengths + other.lengths)


def joins_in_front(right):
    def wrong(self, other):
        mine, theirs = len(self.seen), len(other.seen)
        right(self, other)
        order = [*range(mine, mine + theirs), *range(mine)]
        self.set([self.tables[row] for row in order], [self.lengths[row] for row in order])

    return wrong


def drops_as_many_from_the_front(right):
    return lambda self, rows: right(self, torch.arange(len(rows)))


def claims_once(right):
    return lambda self, blocks: right(self, sorted(set(blocks)))


BLOCK_ROWS = {
    "what died is not noted": Mutant(Tables, "__del__", instead(lambda self: None)),
    "what died is given back twice": Mutant(
        Tables,
        "__del__",
        instead(lambda self: self.pool.returned.extend([(self.table, self.seen)] * 2)),
    ),
    "the pool does not ask who died": Mutant(BlockPool, "collect", instead(lambda self: None)),
    "copies claim nothing": Mutant(BlockPool, "claim", instead(lambda self, blocks: None)),
    "copies keep what others had": Mutant(BlockPool, "__getstate__", instead(lambda self: self.__dict__)),
    "a fork that is not counted": Mutant(Tables, "fork", forks(share=False)),
    "a fork of all tokens": Mutant(Tables, "fork", forks(whole=True)),
    "joined and kept": Mutant(Tables, "join", instead(joins_and_shares)),
    "joined in front": Mutant(Tables, "join", joins_in_front),
    "join keeps what was appended": Mutant(PagedCache, "join", keeps_pending),
    "drop takes the first rows": Mutant(PagedCache, "drop", drops_as_many_from_the_front),
    "drop keeps what was appended": Mutant(PagedCache, "drop", keeps_pending),
    "read ahead of what is written": Mutant(
        Rows, "read", lambda right: lambda self, length, added=0: right(self, length, 0)
    ),
}
