"""Each input by itself through its level's model, against what one call gives for all; the loss against draws."""

import copy
import io
import math
from functools import partial
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mha_book.heads.layer import MultiHeadAttention
from mha_book.heads.single_head import plain_attention
from mha_book.instruments.roofline import layer_work
from mha_book.instruments.testing import SIZES
from mha_book.models.encoder import Encoder, EncoderConfig, mean_pool
from mha_book.models.language_model import LanguageModel, LanguageModelConfig
from mha_book.variants.head_budget import AdaptiveHeads, HeadBudget, budget_loss
from mha_book.variants.mixed_precision import plugged
from support.mutants_budget import GROUPINGS
from support.refusals import refused

s = SIZES
float64 = dict(dtype=torch.float64)
close = partial(torch.testing.assert_close, rtol=1e-12, atol=1e-12)
CONFIG = EncoderConfig(50, 24, s.h, 3, 40, 30, 2, 1e-5)
FIRST, LAST = "layers.0.attention", "layers.2.attention"
LEVELS = [{}, {FIRST: [0, 2], LAST: [3]}, {"layers.1.attention": range(4), LAST: (5,)}]
COUNTS = [18, 15, 13]
B = 11


def encoder(attend=None):
    model = Encoder(CONFIG, attend).to(torch.float64).eval()
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    return model


def first_states(model, ids, mask):
    "What is known before any layer has run."
    x = model.norm(model.word(ids) + model.position.weight[: ids.shape[1]] + model.segment.weight[0])
    length = mask.sum(-1, keepdim=True).to(x.dtype)
    return torch.cat([mean_pool(x, mask), length], -1)


def batch(b=B, n=9):
    lengths = torch.randint(1, n + 1, (b, 1))
    lengths[0] = n
    return torch.randint(CONFIG.vocab_size, (b, n)), torch.arange(n) < lengths


def adaptive(levels=LEVELS, model=None, **options):
    controller = HeadBudget(CONFIG.embed_dim + 1, len(levels), **float64)
    for p in controller.parameters():
        nn.init.normal_(p, std=0.5)
    return AdaptiveHeads(model or encoder(), levels, controller, first_states, **options)


def real(states, mask):
    "States of real tokens; those of padding are nobody's business."
    return [x * mask[..., None] for x in states]


# One call for all, or each input by itself


@pytest.mark.parametrize("told", [False, True])
def test_each_input_gets_what_its_levels_model_gives_it_alone(told):
    model, (ids, mask) = adaptive(), batch()
    levels = torch.arange(B).mul(7) % 3 if told else None
    found = model(ids, mask, levels=levels)
    if told:
        assert torch.equal(found.levels, levels)
    assert 1 < len(found.levels.unique())
    for i, level in enumerate(found.levels.tolist()):
        n = int(mask[i].sum())
        alone = model.models[level](ids[i : i + 1, :n], mask[i : i + 1, :n])
        for x, y in zip(found.output, alone, strict=True):
            close(x[i, :n], y[0])
        assert found.num_heads[i] == COUNTS[level]


def test_all_levels_full_are_the_model_bit_for_bit():
    model, (ids, mask) = encoder(), batch()
    ways = adaptive([{}, {FIRST: ()}, {}], model)
    assert ways.models[0] is ways.models[1] is model and ways.extra_bytes == 0
    found = ways(ids, mask, levels=torch.zeros(B, dtype=torch.long))
    assert all(torch.equal(x, y) for x, y in zip(found.output, model(ids, mask)))
    assert found.num_heads.tolist() == [18] * B
    grouped = ways(ids, mask, levels=torch.arange(B) % 3)
    for x, y in zip(grouped.output, model(ids, mask)):
        close(x, y)


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("padding", [0, 6])
def test_neither_batch_nor_padding_changes_a_choice(parts, padding):
    model, (ids, mask) = adaptive(), batch()
    wanted = model(ids, mask)
    order = torch.randperm(B)
    wide = nn.functional.pad(ids, (0, padding), value=7), nn.functional.pad(mask, (0, padding))
    for rows in order.chunk(B // parts):
        found = model(*(t[rows] for t in wide))
        assert torch.equal(found.levels, wanted.levels[rows])
        assert torch.equal(found.num_heads, wanted.num_heads[rows])
        close(
            found.output[-1][:, : ids.shape[1]] * mask[rows, :, None],
            wanted.output[-1][rows] * mask[rows, :, None],
        )


def test_heads_that_are_off_are_not_computed():
    model, (ids, mask) = adaptive(model=encoder(plain_attention)), batch()  # torch counts no fused kernel on a CPU
    levels, e, n, hidden = torch.arange(B) % 3, CONFIG.embed_dim, ids.shape[1], CONFIG.hidden_dim
    with FlopCounterMode(display=False) as counter:
        model(ids, mask, levels=levels)
    wanted = 0
    for level in range(3):
        rows = int((levels == level).sum())
        for layer in model.models[level].layers:
            steps = layer_work(layer.attention.layout, e, batch=rows, n=n, itemsize=8)
            wanted += sum(step.flops for step in steps.values()) + 4 * rows * n * e * hidden
    assert counter.get_total_flops() == wanted


def heads_run(model, *inputs, **options):
    "How many heads pass through all layers for each input, counted where they pass."
    seen = []

    def finish(heads, x):
        seen.append(heads.shape[0] * heads.shape[-1] // (CONFIG.embed_dim // s.h))
        return heads

    layers = {m: dict(finish=finish) for m in model.modules() if isinstance(m, MultiHeadAttention)}
    with plugged(layers):
        found = model(*inputs, **options)
    return sum(seen), found


@pytest.mark.parametrize("levels", [None, [0] * B, [2] * B, [0, 1, 2, 2, 1, 0, 1, 1, 2, 0, 0]])
def test_the_number_reported_is_the_number_that_ran(levels):
    model, (ids, mask) = adaptive(), batch()
    ran, found = heads_run(model, ids, mask, levels=None if levels is None else torch.tensor(levels))
    assert ran == found.num_heads.sum()


@pytest.mark.parametrize("levels, calls", [([1] * 4, 1), ([1, 0, 1, 1], 2), ([2, 1, 0, 1], 3)])
def test_there_is_one_call_for_each_level_that_somebody_has(levels, calls):
    sizes = []

    def outputs(model, ids, mask):
        sizes.append(len(ids))
        return model(ids, mask)[-1]

    model, (ids, mask) = adaptive(outputs=outputs), batch(4)
    model(ids, mask, levels=torch.tensor(levels))
    assert len(sizes) == calls and sum(sizes) == 4


class Pair(NamedTuple):
    "What some model gives."

    states: Tensor
    rest: list


@pytest.mark.parametrize(
    "outputs",
    [
        lambda model, ids, mask: model(ids, mask)[-1],
        lambda model, ids, mask: tuple(model(ids, mask)),
        lambda model, ids, mask: Pair(model(ids, mask)[0], [ids, (mask, model(ids, mask)[-1])]),
    ],
    ids=["tensor", "tuple", "nested"],
)
def test_outputs_keep_their_form(outputs):
    model, (ids, mask) = adaptive(outputs=outputs), batch()
    levels = torch.arange(B) % 3
    found = model(ids, mask, levels=levels).output
    flat, spec = torch.utils._pytree.tree_flatten(found)
    for i in range(B):
        alone = outputs(model.models[levels[i]], ids[i : i + 1], mask[i : i + 1])
        parts, wanted = torch.utils._pytree.tree_flatten(alone)
        assert spec == wanted
        for x, y in zip(flat, parts, strict=True):
            close(x[i], y[0])


def test_what_is_none_stays_none():
    model, (ids, _) = adaptive(), batch()
    model.features = lambda model, ids, mask: first_states(model, ids, ids >= 0)
    levels = torch.arange(B) % 3
    close(model(ids, None, levels=levels).output, model(ids, ids >= 0, levels=levels).output)


@pytest.mark.parametrize("name", GROUPINGS)
def test_a_grouping_that_is_wrong_is_noticed(name):
    "The tests above, on models that put rows elsewhere, or report another number."
    model = adaptive()
    broken = GROUPINGS[name](model)
    ids, mask = batch()
    levels = torch.tensor([2, 0, 1, 1, 2, 0, 0, 1, 2, 2, 0])
    found = broken(ids, mask, levels=levels)
    wanted = model(ids, mask, levels=levels)
    same = torch.equal(found.num_heads, wanted.num_heads) and torch.equal(found.levels, wanted.levels)
    assert not (same and torch.allclose(found.output[-1], wanted.output[-1], rtol=1e-9))


# What is shared


def test_all_but_pruned_layers_is_the_models_own():
    model = encoder()
    model.register_buffer("table", torch.ones(3, **float64))
    ways, own = adaptive(LEVELS, model), dict(model.named_parameters())
    for heads, copied in zip(LEVELS, ways.models):
        for name, p in copied.named_parameters():
            assert (p is own[name]) != name.startswith(tuple(f"{part}." for part in heads)), name
        assert copied.table is model.table
    e, d = CONFIG.embed_dim, CONFIG.embed_dim // s.h

    def size(h):
        return 8 * (4 * h * d * e + 3 * h * d + e)

    assert ways.extra_bytes == size(4) + size(5) + size(2) + size(5)


def test_weights_of_levels_are_those_of_the_time_of_making():
    model, (ids, mask) = encoder(), batch()
    ways = adaptive(LEVELS, model)
    levels = torch.ones(B, dtype=torch.long)
    before = ways(ids, mask, levels=levels).output[-1]
    with torch.no_grad():
        model.layers[0].attention.in_proj.weight.mul_(2)
    assert torch.equal(before, ways(ids, mask, levels=levels).output[-1])
    with torch.no_grad():
        model.layers[0].up.weight.mul_(2)  # shared
    assert not torch.equal(before, ways(ids, mask, levels=levels).output[-1])


def test_a_layer_that_stands_twice_is_pruned_in_both_places():
    model = encoder()
    model.layers[2].attention = model.layers[0].attention
    model.layers[1].attention = model.layers[0].attention
    ways = adaptive([{}, {LAST: [1]}], model)
    assert ways.counts.tolist() == [6, 5]  # one layer, counted once
    assert ways.models[1].layers[0].attention.layout.num_heads == 5
    assert ways.models[1].layers[0].attention is ways.models[1].layers[1].attention


@pytest.mark.parametrize("move", [lambda m: m.to(torch.float32), copy.deepcopy, lambda m: m.train().eval()])
def test_what_is_shared_stays_shared(move):
    model = move(adaptive())
    shared = [each.layers[0].up.weight for each in (model.model, *model.models)]
    assert all(p is shared[0] for p in shared)
    assert model.extra_bytes == adaptive().extra_bytes * shared[0].element_size() // 8


def test_a_state_dict_comes_back():
    model, (ids, mask) = adaptive(), batch()
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = adaptive()
    other.load_state_dict(torch.load(file))
    levels = torch.arange(B) % 3
    assert torch.equal(model.choose(ids, mask), other.choose(ids, mask))
    close(model(ids, mask, levels=levels).output, other(ids, mask, levels=levels).output)


# Gradients


def test_gradients_are_those_of_each_input_by_itself():
    model, (ids, mask) = adaptive(outputs=lambda m, *batch: m(*batch)[-1]), batch()
    levels = torch.arange(B) % 3
    weight = model.models[1].layers[0].attention.in_proj.weight, model.model.layers[1].up.weight
    coefficients = torch.randn(B, ids.shape[1], CONFIG.embed_dim, **float64)
    found = torch.autograd.grad((model(ids, mask, levels=levels).output * coefficients).sum(), weight)
    wanted = [torch.zeros_like(p) for p in weight]
    for i in range(B):
        y = model.models[levels[i]](ids[i : i + 1], mask[i : i + 1])[-1]
        grads = torch.autograd.grad((y[0] * coefficients[i]).sum(), weight, allow_unused=True)
        wanted = [w if g is None else w + g for w, g in zip(wanted, grads)]
    for x, y in zip(found, wanted):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-10)


def test_a_choice_has_no_gradient():
    model, inputs = adaptive(), batch()
    model(*inputs).output[-1].sum().backward()
    assert all(p.grad is None for p in model.controller.parameters())


# The controller


def test_scores_are_the_formula_row_by_row():
    controller, x = HeadBudget(s.n, 4, hidden_dim=s.m, **float64), torch.randn(B, s.n, **float64) * 3 + 1
    controller.fit(x)
    for row, scores in zip(x, controller(x)):
        z = [(row[j] - x[:, j].mean()) / x[:, j].std(correction=0) for j in range(s.n)]
        hidden = [sum(w * v for w, v in zip(ws, z)) + b for ws, b in zip(controller.up.weight, controller.up.bias)]
        hidden = torch.stack([v * 0.5 * (1 + torch.erf(v / math.sqrt(2))) for v in hidden])
        close(scores, controller.down.weight @ hidden + controller.down.bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_feature_that_never_changes_divides_by_one(dtype):
    x = torch.randn(B, 3, dtype=dtype)
    x[:, 1] = 0.1  # whose mean is not it, in floating point
    controller = HeadBudget(3, 2, dtype=dtype).fit(x)
    assert controller.std[1] == 1 and controller.std[0] != 1
    assert controller(x).isfinite().all()


def test_fit_is_remembered_and_forward_changes_nothing():
    x = torch.randn(B, 3)
    controller = HeadBudget(3, 2).fit(x)
    other = HeadBudget(3, 2)
    other.load_state_dict(controller.state_dict())
    before = copy.deepcopy(controller.state_dict())
    assert torch.equal(other.train()(x), controller.eval()(x))
    assert all(torch.equal(t, before[name]) for name, t in other.state_dict().items())


# The loss


def test_the_loss_is_the_mean_of_draws():
    torch.manual_seed(0)
    logits, errors = torch.randn(s.n, 4, **float64), torch.rand(s.n, 4, **float64)
    for costs in (torch.rand(4, **float64), torch.rand(s.n, 4, **float64)):
        each = errors + 0.7 * costs
        draws = torch.distributions.Categorical(logits=logits).sample((200_000,))
        drawn = each.expand(200_000, -1, -1).gather(-1, draws[..., None]).mean()
        assert abs(drawn - budget_loss(logits, errors, costs, 0.7)) < 3e-3


def test_its_gradient_is_p_times_the_distance_from_the_mean():
    logits = torch.randn(s.n, 4, requires_grad=True, **float64)
    errors, costs = torch.rand(s.n, 4, **float64), torch.rand(s.n, 4, **float64)
    (found,) = torch.autograd.grad(budget_loss(logits, errors, costs, 0.3), logits)
    p, each = logits.softmax(-1).detach(), errors + 0.3 * costs
    close(found, p * (each - (p * each).sum(-1, keepdim=True)) / s.n)


@pytest.mark.parametrize("price", [0.0, 0.05, 3.0])
def test_nothing_is_below_the_cheapest_level_of_each_input(price):
    errors, costs = torch.rand(s.n, 4, **float64), torch.rand(4, **float64)
    least = (errors + price * costs).min(-1)
    bound = least.values.mean()
    for _ in range(50):
        assert budget_loss(torch.randn(s.n, 4, **float64) * 5, errors, costs, price) >= bound
    sure = nn.functional.one_hot(least.indices, 4).double() * 100
    close(budget_loss(sure, errors, costs, price), bound)


def test_it_is_learned():
    "Inputs of two sorts, each with a level that is good for it: found, and left when it is too dear."
    torch.manual_seed(0)
    x = torch.randn(200, 3)
    errors = torch.stack([(x[:, 0] > 0).float(), (x[:, 0] <= 0).float(), torch.zeros(200)], 1)
    for price, wanted in ((0.1, x[:, 0] > 0), (0.0, None)):
        controller = HeadBudget(3, 3, hidden_dim=16).fit(x)
        optimizer = torch.optim.Adam(controller.parameters(), lr=0.02)
        for _ in range(150):
            optimizer.zero_grad()
            budget_loss(controller(x), errors, torch.tensor([1.0, 1.0, 5.0]), price).backward()
            optimizer.step()
        chosen = controller(x).argmax(-1)
        right = chosen == wanted.long() if wanted is not None else errors.gather(1, chosen[:, None])[:, 0] == 0
        assert right.float().mean() > 0.95


# With caches


def language_model():
    sizes = dict(vocab_size=41, embed_dim=24, num_layers=2, num_heads=6, num_kv_heads=3, head_dim=8, hidden_dim=40)
    model = LanguageModel(LanguageModelConfig(**sizes, max_len=30, rope_base=1e4, eps=1e-5))
    return model.to(torch.float64).eval()


def test_a_choice_made_for_the_prompt_is_kept_while_decoding():
    levels = [{}, {FIRST: [0, 1]}, {FIRST: [0, 2, 4], "layers.1.attention": [2, 3]}]
    controller = HeadBudget(1, 3, **float64)
    ways = AdaptiveHeads(language_model(), levels, controller, lambda model, ids: ids.double().mean(1, keepdim=True))
    ids = torch.randint(41, (s.m, 12))
    chosen = torch.tensor([1, 0, 2, 2, 0, 1, 2])
    whole = ways(ids, levels=chosen)
    counts = torch.bincount(chosen, minlength=3).tolist()
    caches = [each.new_cache(count, 12) for each, count in zip(ways.models, counts)]
    steps = [ways(part, levels=chosen, caches=caches) for part in ids.split([7, 1, 1, 3], dim=1)]
    close(torch.cat([step.output for step in steps], 1), whole.output)
    assert all(torch.equal(step.num_heads, whole.num_heads) for step in steps)
    assert [one[0].k.shape[1] for one in caches] == [3, 2, 3]  # kept keys: level 1 is rid of a group
    with refused(ValueError, "levels=", "choose"):
        ways(ids, caches=caches)
    with refused(ValueError, "2 caches for 3 levels"):
        ways(ids, levels=chosen, caches=caches[:2])


def test_levels_without_inputs_need_no_cache():
    ways = AdaptiveHeads(language_model(), [{}, {FIRST: [0, 1]}], HeadBudget(1, 2), lambda model, ids: ids[:, :1] * 1.0)
    chosen, ids = torch.ones(3, dtype=torch.long), torch.randint(41, (3, 4))
    caches = [None, ways.models[1].new_cache(3, 4)]
    close(ways(ids, levels=chosen, caches=caches).output, ways(ids, levels=chosen).output)


# What is refused


@pytest.mark.usefixtures("own_messages")
@pytest.mark.parametrize(
    "error, words, change",
    [
        (TypeError, ["model must be a module", "str"], dict(model="encoder")),
        (ValueError, ["Linear holds no MultiHeadAttention"], dict(model=nn.Linear(2, 3))),
        (TypeError, ["levels must be a list of dicts"], dict(levels={})),
        (TypeError, ["levels must be a list of dicts"], dict(levels=[[0, 1]])),
        (ValueError, ["levels are empty"], dict(levels=[])),
        (ValueError, ["levels[1]", "layers.7.attention"], dict(levels=[{}, {"layers.7.attention": [0]}])),
        (IndexError, ["levels[0]", "head 6"], dict(levels=[{FIRST: [6]}])),
        (ValueError, ["levels[0]", "all 6 heads"], dict(levels=[{FIRST: range(6)}])),
        (TypeError, ["controller must be a module"], dict(controller=lambda x: x)),
        (TypeError, ["features must be callable"], dict(features=None)),
        (TypeError, ["outputs must be callable"], dict(outputs=3)),
    ],
)
def test_what_makes_no_adaptive_model_is_refused(error, words, change):
    given = dict(model=encoder(), levels=LEVELS, controller=HeadBudget(3, 3), features=first_states) | change
    with refused(error, *words):
        AdaptiveHeads(**given)


@pytest.mark.usefixtures("own_messages")
@pytest.mark.parametrize(
    "error, words, inputs",
    [
        (ValueError, ["empty"], lambda ids, mask: (ids[:0], mask[:0])),
        (ValueError, ["shapes [(11, 9), (4, 9)]", "first axis"], lambda ids, mask: (ids, mask[:4])),
        (ValueError, ["shapes []"], lambda ids, mask: ()),
        (ValueError, ["shapes [None, None]"], lambda ids, mask: (None, None)),
        (ValueError, ["shapes [(), (11, 9)]"], lambda ids, mask: (ids[0, 0], mask)),
        (TypeError, ["batch[0]", "list"], lambda ids, mask: (ids.tolist(), mask)),
    ],
)
def test_what_is_no_batch_is_refused(error, words, inputs):
    with refused(error, *words):
        adaptive()(*inputs(*batch()))


@pytest.mark.usefixtures("own_messages")
@pytest.mark.parametrize(
    "error, words, levels",
    [
        (ValueError, ["shape (3,)", "(11,)"], torch.zeros(3, dtype=torch.long)),
        (ValueError, ["float32"], torch.zeros(B)),
        (ValueError, ["from 0 to 3", "there are 3"], torch.tensor([0] * 10 + [3])),
        (ValueError, ["from -1 to 0"], torch.tensor([0] * 10 + [-1])),
        (TypeError, ["levels must be a torch.Tensor", "list"], [0] * B),
    ],
)
def test_levels_that_do_not_fit_are_refused(error, words, levels):
    with refused(error, *words):
        adaptive()(*batch(), levels=levels)


def test_a_controller_that_does_not_answer_is_refused():
    model, inputs = adaptive(), batch()
    model.controller = HeadBudget(25, 2, **float64)
    with refused(ValueError, "(11, 2)", "3 levels"):
        model(*inputs)
    model.controller = HeadBudget(25, 3, **float64)
    nn.init.constant_(model.controller.down.bias, math.nan)
    with refused(ValueError, "NaN"):
        model(*inputs)


@pytest.mark.usefixtures("own_messages")
@pytest.mark.parametrize(
    "error, words, outputs",
    [
        (TypeError, ["dict", "outputs="], lambda model, ids, mask: {"x": ids}),
        (ValueError, ["level 0", "first axis"], lambda model, ids, mask: model(ids, mask)[0].sum()),
        (ValueError, ["level 0 gives shape (9,"], lambda model, ids, mask: model(ids, mask)[0].mT.mT[0]),
        (ValueError, ["pool them, or pad them"], lambda model, ids, mask: ids[:, : len(ids)]),
        (ValueError, ["built differently"], lambda model, ids, mask: [ids] * len(ids)),
    ],
)
def test_outputs_that_cannot_stand_together_are_refused(error, words, outputs):
    model, inputs = adaptive(outputs=outputs), batch()
    with refused(error, *words):
        model(*inputs, levels=torch.tensor([0] * 6 + [1] * 3 + [2] * 2))


@pytest.mark.usefixtures("own_messages")
@pytest.mark.parametrize(
    "error, words, call",
    [
        (ValueError, ["num_levels", "0"], lambda: HeadBudget(3, 0)),
        (TypeError, ["num_features", "2.0"], lambda: HeadBudget(2.0, 3)),
        (TypeError, ["hidden_dim", "True"], lambda: HeadBudget(2, 3, hidden_dim=True)),
        (ValueError, ["(2, 4)", "3"], lambda: HeadBudget(3, 2)(torch.zeros(2, 4))),
        (ValueError, ["(3,)", "3"], lambda: HeadBudget(3, 2)(torch.zeros(3))),
        (TypeError, ["features", "list"], lambda: HeadBudget(3, 2)([0.0] * 3)),
        (ValueError, ["1 inputs", "at least two"], lambda: HeadBudget(3, 2).fit(torch.zeros(1, 3))),
        (ValueError, ["finite"], lambda: HeadBudget(3, 2).fit(torch.full((2, 3), math.nan))),
        (
            ValueError,
            ["(3, 2)", "(3, 4)"],
            lambda: budget_loss(torch.zeros(3, 2), torch.zeros(3, 4), torch.zeros(2), 1),
        ),
        (ValueError, ["(3,)", "(levels,)"], lambda: budget_loss(*torch.zeros(2, 3, 2), torch.zeros(3), 1.0)),
        (ValueError, ["price -1", "reward"], lambda: budget_loss(*torch.zeros(3, 3, 2), -1)),
        (TypeError, ["price", "'1'"], lambda: budget_loss(*torch.zeros(3, 3, 2), "1")),
        (TypeError, ["costs", "list"], lambda: budget_loss(*torch.zeros(2, 3, 2), [1, 2], 1)),
    ],
)
def test_what_makes_no_controller_or_loss_is_refused(error, words, call):
    with refused(error, *words):
        call()


def test_fit_that_fails_changes_nothing():
    controller = HeadBudget(2, 2).fit(torch.randn(9, 2))
    before = controller.mean.clone(), controller.std.clone()
    with refused(ValueError, "finite"):
        controller.fit(torch.tensor([[1.0, 2], [3, math.inf]]))
    assert torch.equal(before[0], controller.mean) and torch.equal(before[1], controller.std)
