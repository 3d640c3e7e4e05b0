"""A cache goes with one layer and one pass: a call that is run again, or another layer, is refused in words."""

import copy
import gc
import pickle
import subprocess
import sys
import threading
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from mha_book.heads import layer as layers
from mha_book.heads.layer import MultiHeadAttention, commit_once
from mha_book.kernels.backends import attention
from mha_book.models.language_model import LanguageModel, LanguageModelConfig
from mha_book.plugs import cache as caches
from mha_book.plugs.cache import KVCache
from mha_book.plugs.logits import SinkAttention
from mha_book.plugs.paged import BlockPool, PagedCache
from mha_book.plugs.positions import ALiBi
from support.caches import ROPE, close, float64, s
from support.padded_cache import PaddedCache
from support.refusals import refused

OURS = {
    "slab": lambda rows=s.b: KVCache(rows, s.g, 24, s.d, **float64),
    "slab that rolls": lambda rows=s.b: KVCache(rows, s.g, 24, s.d, window=4, keep_first=2, **float64),
    "blocks": lambda rows=s.b: PagedCache(BlockPool(30, 4, s.g, s.d, **float64), rows),
}
ALL = OURS | {"somebody's own": lambda rows=s.b: PaddedCache(rows)}


def text(n=6, rows=s.b, seed=3):
    torch.manual_seed(seed)
    return torch.randn(rows, n, s.e, **float64)


def another(seed=5, **options):
    "A layer with weights of its own."
    torch.manual_seed(seed)
    return MultiHeadAttention(s.e, s.h, num_kv_heads=s.g, head_dim=s.d, **float64, **options)


# --- calls that are run again ---------------------------------------------------------------------------------------

CHECKPOINTS = {
    "reentrant": partial(checkpoint, use_reentrant=True),
    "not reentrant": partial(checkpoint, use_reentrant=False),
    "shapes are not compared": partial(checkpoint, use_reentrant=False, determinism_check="none"),
    "without early stop": partial(checkpoint, use_reentrant=False, early_stop=False),
    "one in another": lambda call, x: checkpoint(
        lambda x: checkpoint(call, x, use_reentrant=False), x, use_reentrant=False
    ),
    "products are kept": partial(
        checkpoint,
        use_reentrant=False,
        context_fn=partial(create_selective_checkpoint_contexts, [torch.ops.aten.addmm.default]),
    ),
}


def check_replay(new, run):
    layer, cache, twin = another(position=ROPE()), new(), new()
    plain = copy.deepcopy(layer)
    with torch.no_grad():
        layer(text(3), is_causal=True, cache=cache)
        plain(text(3), is_causal=True, cache=twin)
    x = text().requires_grad_()
    y = run(lambda x: layer(x, is_causal=True, cache=cache), x)
    close(y, plain(x, is_causal=True, cache=twin))
    with refused(RuntimeError, "backward pass", "checkpoint", "without a cache"):
        y.square().sum().backward()
    assert cache.seen.tolist() == [9] * s.b
    with torch.no_grad():
        close(*(one(text(2), is_causal=True, cache=c) for one, c in ((layer, cache), (plain, twin))))


@pytest.mark.parametrize("new", OURS.values(), ids=OURS)
@pytest.mark.parametrize("run", CHECKPOINTS.values(), ids=CHECKPOINTS)
def test_a_call_that_is_run_again_is_refused_and_counted_once(new, run):
    check_replay(new, run)


def test_without_a_cache_checkpointing_is_what_it_was():
    layer, x = another(), text().requires_grad_()
    leaves = [x, *layer.parameters()]
    wanted = torch.autograd.grad(layer(x, is_causal=True).square().sum(), leaves)
    for run in CHECKPOINTS.values():
        for leaf in leaves:
            leaf.grad = None
        run(lambda x: layer(x, is_causal=True), x).square().sum().backward()
        for leaf, right in zip(leaves, wanted):
            close(leaf.grad, right)


@pytest.mark.parametrize("new", OURS.values(), ids=OURS)
def test_a_function_of_two_layers_and_a_look_are_refused_as_well(new):
    one, two, caches = another(5), another(6), [new(), new()]

    def both(x):
        with commit_once(*caches):
            return two(one(x, is_causal=True, cache=caches[0]), is_causal=True, cache=caches[1])

    def look(x):
        return one.attention_map(x, is_causal=True, cache=caches[0]).square()

    for call, n in ((both, 6), (look, 6)):
        y = checkpoint(call, text().requires_grad_(), use_reentrant=False)
        with refused(RuntimeError, "backward pass"):
            y.square().sum().backward()
        assert [cache.seen.tolist() for cache in caches] == [[n] * s.b] * 2


def test_a_language_model_in_a_checkpoint_is_refused():
    config = LanguageModelConfig(11, 16, 2, 4, 2, 4, 24, 64, 1e4, 1e-5)
    model, ids = LanguageModel(config), torch.arange(6).view(2, 3)
    cache = model.new_cache(2, 16)
    y = checkpoint(lambda ids: model(ids, cache=cache), ids, use_reentrant=False)
    with refused(RuntimeError, "backward pass"):
        y.sum().backward()
    assert [kept.seen.tolist() for kept in cache] == [[3, 3]] * 2


def test_another_threads_backward_pass_is_nobody_elses():
    layer, x, found = another(), text().requires_grad_(), []
    y = checkpoint(lambda x: layer(x, cache=OURS["slab"]()), x, use_reentrant=False)

    def backward():
        try:
            y.sum().backward()
        except RuntimeError as error:
            found.append(str(error))

    def beside(grad):
        "A step in a thread of its own, in the middle of our backward pass."
        thread = threading.Thread(target=lambda: found.append(layer(text(1), cache=OURS["slab"]()).shape))
        thread.start()
        thread.join()

    thread = threading.Thread(target=backward)
    thread.start()
    thread.join()
    assert len(found) == 1 and "backward pass" in found[0]
    z = layer(x).sum()
    z.register_hook(beside)
    z.backward()
    assert found[1] == (s.b, 1, s.e)


# --- two layers -----------------------------------------------------------------------------------------------------


def check_two_layers(new, made=another):
    one, two, cache = another(5), made(6), new()
    with torch.no_grad():
        for x in text().split((3, 1, 2), dim=1):
            before = cache.seen.tolist() if hasattr(cache.seen, "tolist") else cache.seen
            y = one(x, is_causal=True, cache=cache)
            for call in two, two.attention_map:
                with refused(ValueError, "another layer", "reset", "deepcopy"):
                    call(y, is_causal=True, cache=cache)
            assert cache.seen.tolist() == [b + x.shape[1] for b in before]
        close(one(text(1), is_causal=True, cache=cache), one(torch.cat([text(), text(1)], 1), is_causal=True)[:, -1:])


@pytest.mark.parametrize("name", [name for name in ALL if name != "slab that rolls"])
def test_the_second_layer_is_refused_and_the_first_goes_on(name):
    check_two_layers(ALL[name])


def copies_of(layer):
    "What is the same layer, or one that makes the same keys."
    state = layer.state_dict()
    loaded = another(9, position=ROPE())
    loaded.load_state_dict(state)
    moved = copy.deepcopy(layer).to("meta").to_empty(device="cpu")
    moved.load_state_dict(state)
    return {
        "itself": layer,
        "in train": copy.deepcopy(layer).train(),
        "a deep copy": copy.deepcopy(layer),
        "a shallow copy": copy.copy(layer),
        "pickled": pickle.loads(pickle.dumps(layer)),
        "loaded": loaded,
        "moved and back": moved,
        "called by its weights": lambda x, **options: torch.func.functional_call(layer, dict(state), (x,), options),
        "in a wrapper": nn.Sequential(layer)[0],
    }


@pytest.mark.parametrize("new", ALL.values(), ids=ALL)
@pytest.mark.parametrize("who", copies_of(another(position=ROPE())))
def test_copies_go_on_where_the_layer_stopped(who, new):
    layer, cache, twin = another(position=ROPE()).eval(), new(), new()
    copied = copies_of(layer)[who]
    with torch.no_grad():
        layer(text(5), is_causal=True, cache=cache)
        layer(text(5), is_causal=True, cache=twin)
        for n in 1, 2, 1:
            x = text(n, seed=n)
            close(copied(x, is_causal=True, cache=cache), layer(x, is_causal=True, cache=twin))


@pytest.mark.parametrize("new", ALL.values(), ids=ALL)
def test_copies_that_are_stacked_are_refused(new):
    "As torch's own encoder makes its layers: the second one looks like the same layer, until the first one is back."
    one, cache = another(), new()
    two = copy.deepcopy(one)
    with torch.no_grad(), refused(ValueError, "another layer"):
        for x in text().split(1, dim=1):
            two(one(x, is_causal=True, cache=cache), is_causal=True, cache=cache)
    trained = copy.deepcopy(one)
    nn.init.normal_(trained.in_proj.bias)
    cache = new()
    one(text(), cache=cache)
    with refused(ValueError, "another layer"):
        trained(text(), cache=cache)


@torch.no_grad()
@pytest.mark.parametrize("new", ALL.values(), ids=ALL)
def test_a_layer_in_the_place_of_one_that_is_gone_goes_on(new):
    model, cache = nn.ModuleDict({"attention": another(5)}), new()
    model["attention"](text(3), is_causal=True, cache=cache)
    model["attention"] = another(6)
    gc.collect()
    assert model["attention"](text(2), is_causal=True, cache=cache).shape == (s.b, 2, s.e)
    assert cache.seen.tolist() == [5] * s.b


@torch.no_grad()
@pytest.mark.parametrize("new", OURS.values(), ids=OURS)
@pytest.mark.parametrize(
    "free",
    [
        lambda cache: cache.reset() or cache,
        lambda cache: cache.crop(0) or cache,
        copy.deepcopy,
        lambda cache: pickle.loads(pickle.dumps(cache)),
    ],
    ids=["reset", "crop to nothing", "deep copy", "pickle"],
)
def test_an_empty_cache_and_a_copy_are_anybodys(free, new):
    one, two, cache = another(5), another(6), new()
    one(text(3), is_causal=True, cache=cache)
    one.attention_map(text(2), is_causal=True, cache=cache)
    freed = free(cache)
    assert two(text(2), is_causal=True, cache=freed).shape == (s.b, 2, s.e)
    with refused(ValueError, "another layer"):
        one(text(1), is_causal=True, cache=freed)


@torch.no_grad()
@pytest.mark.parametrize("new", OURS.values(), ids=OURS)
def test_rows_that_are_chosen_still_go_with_their_layer(new):
    one, two, cache = another(5), another(6), new()
    one(text(3), is_causal=True, cache=cache)
    cache.reorder(torch.tensor([1, 0, 1]))
    with refused(ValueError, "another layer"):
        two(text(2, rows=3), is_causal=True, cache=cache)
    assert one(text(2, rows=3), is_causal=True, cache=cache).shape == (3, 2, s.e)


@torch.no_grad()
@pytest.mark.parametrize("new", ALL.values(), ids=ALL)
def test_a_call_that_failed_binds_nothing(new):
    one, cache = another(5), new()
    copied, other = copy.deepcopy(one), another(6, attend=lambda *a, **o: 1 / 0)
    for layer in other, another(7):
        if layer is other:
            with pytest.raises(ZeroDivisionError):
                layer(text(), cache=cache)
    one(text(3), is_causal=True, cache=cache)
    copied.attend = lambda *a, **o: 1 / 0
    with pytest.raises(ZeroDivisionError):
        copied(text(2), cache=cache)
    with pytest.raises(ZeroDivisionError), commit_once(cache):
        copy.deepcopy(one)(text(2), cache=cache)
        raise ZeroDivisionError
    one(text(2), is_causal=True, cache=cache)
    assert cache.seen.tolist() == [5] * s.b


@torch.no_grad()
@pytest.mark.parametrize("name", ["slab", "slab that rolls"])
@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
def test_a_copy_that_is_made_in_a_step_is_in_no_step(name, copied):
    layer, cache = another(), OURS[name]()
    layer(text(2), is_causal=True, cache=cache)
    with commit_once(cache):
        before = copied(cache)
        y = layer(text(3), is_causal=True, cache=cache)
        after = copied(cache)
    for taken in before, after:
        close(layer(text(3), is_causal=True, cache=taken), y)
    assert before.seen.tolist() == after.seen.tolist() == [5] * s.b == cache.seen.tolist()


def test_a_look_with_gradients_can_be_copied():
    layer, cache = another(), OURS["slab"]()
    layer.attention_map(text(), cache=cache)
    assert copy.deepcopy(cache).seen.tolist() == [0] * s.b


def test_on_meta_the_second_layer_is_refused_as_well():
    with torch.device("meta"):
        one, two, cache, x = another(5), another(6), OURS["slab"](), torch.zeros(s.b, 3, s.e, **float64)
        two = MultiHeadAttention(s.e, s.h, num_kv_heads=s.g, head_dim=s.d, bias=False, **float64)
        one(x, cache=cache)
        assert one(x, cache=cache).shape == (s.b, 3, s.e)
        with refused(ValueError, "another layer"):
            two(x, cache=cache)


def test_a_cache_holds_no_layer():
    cache, layer = OURS["slab"](), another()
    layer(text(), cache=cache)
    gone = layers.ref(layer)
    del layer
    gc.collect()
    assert gone() is None


COMPILED = """
import torch
from mha_book import KVCache, MultiHeadAttention, RoPE
from mha_book.models.language_model import LanguageModel, LanguageModelConfig

torch.manual_seed(0)
torch.set_grad_enabled(False)
made = []


def count(graph, inputs):
    made.append(graph)
    return graph.forward


def check(step, whole, x, cache, most):
    made.clear()
    parts = [step(token, cache) for token in x.split(1, dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole(x), atol=1e-12, rtol=0)
    assert len(made) <= most, len(made)


layer = MultiHeadAttention(16, 2, position=RoPE(8), dtype=torch.float64).eval()
compiled = torch.compile(layer, backend=count, fullgraph=True)
whole = lambda x: layer(x, is_causal=True)
step = lambda x, cache: compiled(x, is_causal=True, cache=cache)
x, kind = torch.randn(2, 9, 16, dtype=torch.float64), dict(dtype=torch.float64)
check(step, whole, x, KVCache(2, 2, 16, 8, **kind), 2)
check(step, whole, x, KVCache(2, 2, 16, 8, window=12, **kind), 2)
cache = KVCache(2, 2, 16, 8, **kind)
layer(x[:, :4], is_causal=True, cache=cache)    # copies and compiled steps take turns
parts = [step(x[:, 4:5], cache), layer(x[:, 5:6], is_causal=True, cache=cache), step(x[:, 6:], cache)]
torch.testing.assert_close(torch.cat(parts, dim=1), whole(x)[:, 4:], atol=1e-12, rtol=0)

model = LanguageModel(LanguageModelConfig(11, 16, 3, 4, 2, 4, 24, 64, 1e4, 1e-5)).double().eval()
both = torch.compile(model, backend=count, fullgraph=True)
check(lambda x, cache: both(x, cache=cache), model, torch.arange(16).view(2, 8) % 11, model.new_cache(2, 16), 3)
"""


def test_compiled_steps_go_on_and_are_not_made_again():
    "In a process of its own: here every function checks the shapes that it is given, and that is not compiled."
    done = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# --- one step -------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("new", ALL.values(), ids=ALL)
def test_a_second_call_in_one_step_is_refused(new):
    one, two, cache = another(5), another(6), new()
    one(text(2), is_causal=True, cache=cache)
    for layer in one, two, copy.deepcopy(one):
        for call in layer, layer.attention_map:
            with refused(RuntimeError, "one step", "commit_once"), commit_once(cache):
                call(one(text(), is_causal=True, cache=cache), is_causal=True, cache=cache)
    assert cache.seen.tolist() == [2] * s.b
    with commit_once(cache):
        one.attention_map(text(1), is_causal=True, cache=cache)  # a look before it is none
        one(text(1), is_causal=True, cache=cache)
    assert cache.seen.tolist() == [3] * s.b


@pytest.mark.parametrize("new", ALL.values(), ids=ALL)
def test_one_cache_for_all_layers_is_refused_by_name(new):
    cache, other = new(), new()
    with refused(ValueError, "caches [0, 2]", "one and the same", "of its own"), commit_once(cache, other, cache):
        raise AssertionError("the block has begun")
    assert not getattr(cache, "in_hand", False)


@torch.no_grad()
def test_a_model_that_is_given_one_cache_for_all_layers_refuses(own_messages):
    model = LanguageModel(LanguageModelConfig(11, 16, 3, 4, 2, 4, 24, 64, 1e4, 1e-5))
    ids, cache = torch.arange(6).view(2, 3), model.new_cache(2, 16)
    with refused(ValueError, "caches [0, 1, 2]", "one and the same"):
        model(ids, cache=cache[:1] * 3)
    with refused(ValueError, "caches [0, 2]"):
        model(ids, cache=[cache[0], cache[1], cache[0]])
    for what in cache[0], iter(cache), {0: cache[0]}:
        with refused(TypeError, "one for each layer", type(what).__name__, "new_cache"):
            model(ids, cache=what)
    model(ids, cache=cache)
    with refused(ValueError, "another layer"):
        model(ids, cache=cache[::-1])
    assert [kept.seen.tolist() for kept in cache] == [[3, 3]] * 3


@pytest.mark.parametrize("what", [[], (), {}, "cache", 3, True, torch.zeros(2), [OURS["slab"]()]], ids=repr)
def test_what_is_no_cache_is_refused_by_its_kind(own_messages, what):
    layer = another()
    for call in layer, layer.attention_map:
        with refused(TypeError, "append, commit, crop and seen", type(what).__name__, "one for each layer"):
            call(text(), cache=what)
    with refused(TypeError, type(what).__name__), commit_once(OURS["slab"](), what):
        pass


# --- rows and windows -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("position", [None, ROPE()], ids=["no position", "RoPE"])
@pytest.mark.parametrize("new", ALL.values(), ids=ALL)
def test_rows_that_differ_are_the_caches_error(own_messages, new, position):
    layer, cache = another(position=position), new()
    layer(text(2), is_causal=True, cache=cache)
    for rows in 1, 3:
        for call in layer, layer.attention_map:
            for key_mask in None, torch.ones(rows, 4).bool():
                with refused(ValueError, "batch differs", "cache 2", f"x {rows}"):
                    call(text(4, rows=rows), is_causal=True, cache=cache, key_mask=key_mask)
    assert cache.seen.tolist() == [2] * s.b


WINDOWS = {
    "partial": lambda w: partial(attention, window=w),
    "sides": lambda w: partial(attention, window=(w - 1, 0)),
    "left only": lambda w: partial(attention, window=(w - 1, None)),
    "in a plug": lambda w: ALiBi(s.h, attend=partial(attention, window=w)),
    "in a plug in a plug": lambda w: SinkAttention(s.h, attend=partial(attention, window=w, softcap=2.0), **float64),
}


class Windowed(nn.Module):
    "A plug that says its window."

    def __init__(self, window):
        super().__init__()
        self.window = window

    def forward(self, q, k, v, **options):
        return attention(q, k, v, window=self.window, **options)


WINDOWS["an attribute"] = Windowed


@torch.no_grad()
@pytest.mark.parametrize("make", WINDOWS.values(), ids=WINDOWS)
def test_another_window_in_attend_is_refused_where_both_are_known(own_messages, make):
    for w in 3, 5:
        layer, cache = another(attend=make(w)), KVCache(s.b, s.g, 24, s.d, window=4, **float64)
        for call in layer, layer.attention_map:
            with refused(ValueError, "windows differ", "4 keys", f"attend's {w}", "leave the window out"):
                call(text(), is_causal=True, cache=cache)
        assert cache.seen.tolist() == [0] * s.b
    layer = another(attend=make(4))
    for options in dict(window=4), {}:
        cache = KVCache(s.b, s.g, 24, s.d, **options, **float64)
        parts = [layer(x, is_causal=True, cache=cache) for x in text(9).split((4, 1, 3, 1), dim=1)]
        close(torch.cat(parts, dim=1), layer(text(9), is_causal=True))
    with refused(ValueError, "windows differ", "first 2", "keep_first"):
        layer(text(), is_causal=True, cache=KVCache(s.b, s.g, 24, s.d, window=4, keep_first=2, **float64))


def test_a_plug_without_a_window_is_not_asked_for_one():
    for attend in None, attention, partial(attention, softcap=1.0), partial(attention, window=(None, 0)), ALiBi(s.h):
        layer, cache = another(attend=attend), KVCache(s.b, s.g, 24, s.d, window=4, **float64)
        assert layer(text(), is_causal=True, cache=cache).shape == (s.b, 6, s.e)


# --- planted faults -------------------------------------------------------------------------------------------------

FAULTS = {
    "does not notice a backward pass": (
        (caches, "in_backward", lambda: False),
        lambda: check_replay(OURS["slab"], CHECKPOINTS["reentrant"]),
    ),
    "does not ask who wrote": (
        (layers, "_check_turn", lambda *args: None),
        lambda: check_two_layers(OURS["slab"]),
    ),
    "takes all layers for copies": (
        (layers, "_same_keys", lambda *args: True),
        lambda: check_two_layers(OURS["blocks"]),
    ),
    "takes no layer for a copy": (
        (layers, "_same_keys", lambda *args: False),
        lambda: test_copies_go_on_where_the_layer_stopped("a deep copy", OURS["slab"]),
    ),
    "knows no window": (
        (layers, "_known_left", lambda attend: None),
        lambda: test_another_window_in_attend_is_refused_where_both_are_known(None, WINDOWS["partial"]),
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_rule_that_is_left_out_is_noticed(own_messages, monkeypatch, name):
    (owner, what, wrong), check = FAULTS[name]
    check()
    monkeypatch.setattr(owner, what, wrong)
    with pytest.raises(BaseException):  # noqa: B017 pytest's own failure is no Exception
        check()


def test_where_one_cache_of_several_fails_none_keeps_anything_though_one_rolls():
    "A cache that rolls cannot go back: it commits after those whose memory may be full."
    pool = BlockPool(5, 2, s.g, s.d, **float64)
    rolling = KVCache(1, s.g, 8, s.d, window=3, **float64)
    mixed = [rolling, PagedCache(pool, 1), PagedCache(pool, 1)]
    stack = [MultiHeadAttention(s.e, s.h, num_kv_heads=s.g, head_dim=s.d, **float64) for _ in mixed]

    def step(x):
        with torch.no_grad(), commit_once(*mixed):
            for layer, cache in zip(stack, mixed):
                x = layer(x, is_causal=True, cache=cache)

    step(text(4, 1))
    with refused(ValueError, "pool full"):
        step(text(1, 1))
    assert [cache.seen.tolist() for cache in mixed] == [[4], [4], [4]]


def test_rows_join_those_of_a_layer_that_lives_only():
    "A dead writer hides no living one; and rows without tokens are nobody's."
    x, others = text(3), [MultiHeadAttention(s.e, s.h, num_kv_heads=s.g, head_dim=s.d, **float64) for _ in range(2)]
    gone = copy.deepcopy(others[0])
    cache, more, empty = OURS["slab"](), OURS["slab"](1), OURS["slab"]()
    gone(x, is_causal=True, cache=cache)
    del gone
    gc.collect()
    others[0](x[:1], is_causal=True, cache=more)
    cache.join(more)
    with refused(ValueError, "another layer"):
        others[1](text(1, s.b + 1), is_causal=True, cache=cache)
    others[1](x, is_causal=True, cache=empty)
    empty.reset()
    empty.join(cache)
    assert empty.seen.tolist() == [0] * s.b + [3] * (s.b + 1)


REQUESTS = """
import torch
from torch._dynamo.testing import CompileCounter
from mha_book.models.language_model import LanguageModel, LanguageModelConfig

config = LanguageModelConfig(50, 16, 2, 4, 2, 4, 32, 128, 1e4, 1e-5)
model, made, ids = LanguageModel(config).eval(), CompileCounter(), torch.randint(0, 50, (2, 8))
step, graphs = torch.compile(model, backend=made), []
with torch.no_grad():
    for request in range(4):
        cache = model.new_cache(2, 64)
        step(ids[:, :4], cache=cache)
        for i in range(4, 8):
            step(ids[:, i:i + 1], cache=cache)
        graphs.append(made.frame_count)
assert graphs[0] <= 4 and graphs[1:] == [graphs[1]] * 3, graphs
"""


def test_the_caches_of_a_new_request_need_no_new_graph():
    subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", REQUESTS], check=True)
