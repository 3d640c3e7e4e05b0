"""The command that does without heads: what it measures, how it goes on, and what a file must not say."""

import copy
import json
from dataclasses import asdict
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mha_book.bench import by_steps, ladder_times, subjects
from mha_book.bench.cli import main
from mha_book.bench.ladder import Ladder, as_ladder, read_ladder, run_ladder, show_ladder
from mha_book.bench.ladder_plan import encoder_rungs, language_rungs, late_rungs
from mha_book.bench.ladder_sizes import SIZES as ALLOWED
from mha_book.bench.measured import write_file
from mha_book.bench.rungs import EncoderRungs, distance, learn_gates, make_mixture
from mha_book.bench.rungs_by_input import ALL, controller, set_by_length
from mha_book.bench.rungs_language import LanguageRungs
from mha_book.bench.similar_lines import pooled, squared_distances
from mha_book.bench.subjects import checked_sizes
from mha_book.instruments.device import Timing
from mha_book.lab.one_wrong_line import token_nll
from mha_book.models.encoder import Encoder, EncoderConfig
from mha_book.models.language_model import LanguageModel, LanguageModelConfig
from mha_book.variants.head_importance import scaled_heads
from support.refusals import refused

pytestmark = pytest.mark.usefixtures("own_messages")
ROOT = Path(__file__).resolve().parents[2]
SIZES = dict(lines=8, calibration_lines=2, batch=4, steps=3, gate_steps=3, control_batches=2)
SIZES |= dict(texts=3, tokens=64, calibration_texts=2, calibration_tokens=64, mixed_batches=1, rounds=3)


class Words:
    "A tokenizer whose tokens are words, by their first letters, framed and padded."

    def encode_batch(self, texts):
        rows = [[1, *(3 + (ord(word[0]) + len(word)) % 28 for word in text.split()), 2] for text in texts]
        longest = max(map(len, rows))
        return [
            SimpleNamespace(
                ids=row + [0] * (longest - len(row)), attention_mask=[1] * len(row) + [0] * (longest - len(row))
            )
            for row in rows
        ]


def small_encoder(steps=3):
    torch.manual_seed(0)
    sizes = dict(vocab_size=31, embed_dim=24, num_heads=4, num_layers=2, hidden_dim=16, max_len=128, num_segments=1)
    model = Encoder(EncoderConfig(**sizes, eps=1e-5)).eval()
    with torch.no_grad():
        for layer in model.layers:  # such that heads are worth something
            layer.attention.out_proj.weight.mul_(3)
    return EncoderRungs(model, Words(), SIZES | dict(steps=steps), 0)


def small_language():
    torch.manual_seed(1)
    sizes = dict(vocab_size=31, embed_dim=16, num_layers=5, num_heads=4, num_kv_heads=2, head_dim=4)
    model = LanguageModel(LanguageModelConfig(**sizes, hidden_dim=7, max_len=64, rope_base=100.0, eps=1e-5)).eval()
    return LanguageRungs(model, torch.randint(31, (3, 64)), torch.randint(31, (2, 64)), SIZES, 0)


def small_subjects():
    return [small_encoder(), small_language()]


@pytest.fixture(autouse=True)
def short_inputs(monkeypatch):
    "Each call is made once, on small inputs: what its time is, is no matter here."
    monkeypatch.setattr(ladder_times, "INPUTS", [(2, 5), (3, 40)])
    monkeypatch.setattr(ladder_times, "SPOKEN", (1, 8))

    def once(calls, **more):
        for call in calls.values():
            call()
        return {name: Timing(1.0, 0.9, 1.1, 1e-3, 64) for name in calls}

    monkeypatch.setattr(ladder_times, "benchmark", once)


@cache
def straight_run():
    found, stop = run_ladder(small_subjects(), SIZES, 0, None, lambda done, of: None)
    if stop is not None:
        raise stop
    return found


@pytest.fixture
def straight(short_inputs, own_messages):
    "What a run without a break finds."
    return copy.deepcopy(straight_run())


def without_times(found):
    "What is the same in every run; the order of rungs and tables is that of the plan."
    gone = "date", "load", "seconds", "tables"
    rungs = [{key: value for key, value in rung.items() if key != "seconds"} for rung in found["rungs"]]
    places = [(table["suite"], table["mode"], table["size"]) for table in found["tables"]]
    return {key: value for key, value in found.items() if key not in gone} | dict(rungs=rungs, tables=places)


# What is measured


def test_every_rung_that_is_planned_is_climbed(straight):
    file, (encoder, language) = as_ladder(straight), small_subjects()
    assert file.complete and {*file.importance} == {
        "language",
        "encoder",
        "encoder, short",
        "encoder, middle",
        "encoder, long",
    }
    climbed = {(rung.model, rung.name) for rung in file.rungs}
    plan = [*encoder_rungs(encoder, straight), *late_rungs(encoder, straight)]
    assert {("encoder", name) for name in plan} <= climbed
    assert {("language", name) for name in language_rungs(language, straight)} <= climbed
    extra = {name for model, name in climbed if model == "encoder"} - {*plan}
    assert len(extra) == 3 + 1 + 4  # controllers, hindsight, and each set for all
    assert {(table.suite, table.mode) for table in file.tables} == {
        ("encoder", "attention layers"),
        ("encoder", "whole model"),
        ("encoder", "mixed set"),
        ("language", "attention layers"),
    }
    assert "pruned by importance" in show_ladder(file)


def test_heads_and_flops_are_those_of_the_shapes(straight):
    file = as_ladder(straight)
    on = small_encoder()

    def flops(h, d, n):
        return 2 * n * 24 * 3 * h * d + 4 * n * n * h * d + 2 * n * h * d * 24

    def mean(heads, d=6):
        return sum(flops(h, d, n) for h in heads for n in on.lengths) / len(on.lengths)

    whole = file.rung("encoder", "all heads")
    assert whole.flops == pytest.approx(mean([4, 4]), rel=1e-5) and whole.scores == pytest.approx([1.0] * 8)
    for name in "pruned by importance", "pruned at random 0", "pruned by learned gates":
        rung = file.rung("encoder", name)
        heads = [*map(len, rung.kept[0])]
        assert sum(heads) == rung.active == 6 and min(heads) >= 1
        assert rung.flops == pytest.approx(mean(heads), rel=1e-5) and file.share(rung) == rung.flops / whole.flops
        assert rung.steps == 3 and rung.rate > 0 and len(rung.course) == 3
    assert file.rung("encoder", "narrow heads").flops == pytest.approx(mean([4, 4], 4), rel=1e-5)
    assert file.rung("encoder", "fewer heads from the start").flops == pytest.approx(mean([3, 3]), rel=1e-5)
    routed = [flops(4, 6, n) - (4 * n * 24 * 6 + 4 * n * n * 6) + 2 * n * 24 * 3 for n in on.lengths]
    mixture = file.rung("encoder", "mixture of heads")
    assert mixture.active == 6 and mixture.flops == pytest.approx(2 * sum(routed) / len(routed), rel=1e-5)


def test_what_is_cut_is_what_is_masked(straight):
    file, on = as_ladder(straight), small_encoder()
    for name in "2 least important off", "4 random 1 off", "2 off, as many in each layer":
        rung = file.rung("encoder", name)
        scales = [torch.tensor([float(i in row) for i in range(4)]) for row in rung.kept[0]]
        with scaled_heads(on.model, on.named(scales)):
            vectors = on.vectors(on.model)
        torch.testing.assert_close(
            squared_distances(vectors, on.exact), torch.tensor(rung.distances), rtol=1e-3, atol=1e-6
        )
    rung = file.rung("encoder", "2 least important at their means")
    scales = [torch.tensor([float(i in row) for i in range(4)]) for row in rung.kept[0]]
    with scaled_heads(on.model, on.named(scales), on.means):
        vectors = on.vectors(on.model)
    assert squared_distances(vectors, on.exact).tolist() == pytest.approx(rung.distances, rel=1e-3, abs=1e-6)


def test_the_least_important_heads_go_first(straight):
    file = as_ladder(straight)
    worth = {(layer, i): w for layer, row in enumerate(file.importance["encoder"]) for i, w in enumerate(row)}
    before = {*worth}
    for off in 1, 2, 4:
        kept = file.rung("encoder", f"{off} least important off").kept[0]
        stay = {(layer, i) for layer, row in enumerate(kept) for i in row}
        assert stay < before and len(stay) == 8 - off and all(kept)
        before = stay
    assert max(worth, key=worth.get) in before
    kept = file.rung("encoder", "as many in each layer").kept[0]
    for layer, row in enumerate(kept):
        assert len(row) == 3 and min(range(4), key=lambda i: worth[layer, i]) not in row


# Tuning


def test_all_are_tuned_alike_and_the_whole_model_stays():
    on = small_encoder(steps=30)
    before = {name: p.clone() for name, p in on.model.named_parameters()}
    model = on.cut([[0, 1, 2], [1, 2, 3]])
    loss = sum(distance(model, *batch) for batch in on.batches)
    course = on.tune(model, 2e-3)
    with torch.no_grad():
        assert sum(distance(model, *batch) for batch in on.batches) < 0.9 * loss
    assert len(course) == 10 and course[-1] < course[0]
    assert all(torch.equal(p, before[name]) for name, p in on.model.named_parameters())
    assert model.word.weight.equal(on.model.word.weight) and not model.layers[0].up.weight.equal(
        on.model.layers[0].up.weight
    )
    assert not any(p.requires_grad for p in model.parameters())
    ids, key_mask, goal = on.batches[0]
    torch.testing.assert_close(goal, on.model(ids, key_mask)[-1])


def test_the_loss_is_that_of_vectors_and_of_real_tokens():
    on = small_encoder()
    model = on.cut([[0, 1], [1, 2, 3]])
    ids, key_mask, goal = max(on.batches, key=lambda batch: (~batch[1]).sum())
    assert not key_mask.all()
    rows = [(state[real], aim[real]) for state, aim, real in zip(model(ids, key_mask)[-1], goal, key_mask)]
    unit = [[x.mean(0) / x.mean(0).norm() for x in pair] for pair in rows]
    vectors = sum(((a - b) ** 2).sum() for a, b in unit) / len(unit)
    states = sum(((a - b) ** 2).sum() for a, b in rows) / sum((b**2).sum() for _, b in rows)
    assert distance(model, ids, key_mask, goal).item() == pytest.approx((vectors + states).item(), rel=1e-4)
    assert distance(on.model, ids, key_mask, goal).item() == pytest.approx(0, abs=1e-9)
    torch.testing.assert_close(pooled(on.model, ids, key_mask), torch.stack([b for _, b in unit]))


def test_longer_is_the_same_heads_four_times_as_long(straight):
    file = as_ladder(straight)
    for name in "pruned by importance", "pruned by learned gates":
        rung, longer = file.rung("encoder", name), file.rung("encoder", f"{name}, tuned longer")
        assert longer.kept == rung.kept and longer.steps == 4 * rung.steps and longer.rate == rung.rate


def test_the_learning_rate_rises_and_falls(monkeypatch):
    on, seen = small_encoder(steps=20), []

    class Adam(torch.optim.Adam):
        def step(self):
            seen.append([group["lr"] for group in self.param_groups])

    monkeypatch.setattr(torch.optim, "Adam", Adam)
    on.tune(make_mixture(on, [[4.0, 3.0, 2.0, 1.0]] * 2), 1e-3)
    blocks, routers = zip(*seen, strict=True)
    assert blocks == pytest.approx([1e-3 * min(1, (s + 1) / 10) * (1 - s / 20) for s in range(20)])
    assert routers == pytest.approx([10 * rate for rate in blocks])


def test_a_frozen_router_stays_as_it_was_drawn():
    on = small_encoder()
    for frozen in True, False:
        model = make_mixture(on, [[4.0, 3.0, 2.0, 1.0]] * 2, frozen)
        plug = model.layers[1].attention.finish
        before = plug.router.weight.clone()
        on.tune(model, 1e-3)
        assert plug.router.weight.equal(before) == frozen


def test_a_mixture_begins_as_the_layer_with_the_best_heads_shared():
    on = small_encoder()
    worth = [[1.0, 9.0, 2.0, 3.0], [5.0, 1.0, 2.0, 8.0]]
    model, again = make_mixture(on, worth), make_mixture(on, worth)
    for layer, twin in zip(model.layers, again.layers):
        assert (layer.attention.finish.num_active, layer.attention.finish.num_shared) == (3, 1)
        assert layer.attention.finish.router.weight.equal(twin.attention.finish.router.weight)
    for i, best in enumerate((1, 3)):
        q, theirs = (m.layers[i].attention.in_proj.weight[:24].unflatten(0, (4, 6)) for m in (model, on.model))
        assert q[0].equal(theirs[best])


def test_gates_close_those_heads_that_matter_least():
    on = small_encoder(steps=8)
    with torch.no_grad():  # two heads that give next to nothing
        for layer, head in ((0, 2), (1, 0)):
            on.model.layers[layer].attention.out_proj.weight[:, 6 * head : 6 * head + 6].mul_(1e-3)
    on.sizes = on.sizes | dict(gate_steps=60)
    odds = learn_gates(on)
    assert {*on.gone(on.best(odds, 6))["layers.0.attention"], 10} == {2, 10}
    assert on.gone(on.best(odds, 6))["layers.1.attention"] == [0]


# By input


def test_the_rule_goes_by_length(straight):
    file = as_ladder(straight)
    assert [set_by_length(n) for n in (1, 8, 9, 32, 33, 500)] == [0, 0, 1, 1, 2, 2]
    rung = file.rung("encoder", "sets by length")
    assert rung.given == [set_by_length(n) for n in file.lengths["encoder"]] and {*rung.given} == {0, 1, 2}
    assert [sum(map(len, kept)) for kept in rung.kept] == [6, 6, 6, 8] and rung.active == 6
    each = [file.rung("encoder", f"tuned for sets, {name} for all") for name in ("short", "middle", "long", "all")]
    assert rung.distances == [each[given].distances[i] for i, given in enumerate(rung.given)]
    best = file.rung("encoder", "the best set in hindsight")
    assert best.distances == [min(one.distances[i] for one in each[:ALL]) for i in range(len(best.distances))]
    by_set = [[n for n, given in zip(file.lengths["encoder"], rung.given) if given == i] for i in range(3)]
    by_hand = sum(
        sum(144 * len(row) * 3 * n * 2 + 24 * n * n * len(row) + 288 * n * len(row) for row in rung.kept[i])
        for i, own in enumerate(by_set)
        for n in own
    )
    assert rung.flops == pytest.approx(by_hand / len(rung.given), rel=1e-5)


def test_a_controller_gives_what_costs_least():
    torch.manual_seed(0)
    seen = torch.randn(64, 3)
    hard = seen[:, 0] > 0
    errors = torch.stack([torch.where(hard, 0.5, 0.05), torch.full((64,), 0.02)], 1)
    costs = torch.tensor([0.5, 1.0])
    fair, cheap, dear = (controller(seen, errors, costs, price, 0)(seen).argmax(1) for price in (0.2, 0.0, 9.0))
    assert (fair == hard.long()).float().mean() > 0.95 and (cheap == 1).all() and (dear == 0).all()


# The language model


def test_whole_groups_go_and_one_of_each_layer_stays(straight):
    file, on = as_ladder(straight), small_language()
    for off, flops in ((2, 0.9), (4, 0.8), (6, 0.7)):
        rung = file.rung("language", f"{off} off in whole groups")
        assert sum(map(len, rung.kept[0])) == 20 - off == rung.active
        assert all(row and (0 in row) == (1 in row) and (2 in row) == (3 in row) for row in rung.kept[0])
        assert file.share(rung) == pytest.approx(flops, rel=1e-5)
    sums = [[row[0] + row[1], row[2] + row[3]] for row in file.importance["language"]]
    least = min(range(5), key=lambda i: min(sums[i]))
    assert len(file.rung("language", "2 off in whole groups").kept[0][least]) == 2
    assert file.share(file.rung("language", "4 least important off")) == 1
    losses = token_nll(on.model, on.texts).mean(1).tolist()
    assert file.rung("language", "all heads").scores == pytest.approx(losses, rel=1e-5)


def test_heads_that_are_off_give_nothing_or_their_mean(straight):
    file, on = as_ladder(straight), small_language()
    for name, means in (("4 least important off", None), ("4 least important at their means", on.means)):
        rung = file.rung("language", name)
        scales = [torch.tensor([float(i in row) for i in range(4)]) for row in rung.kept[0]]
        with scaled_heads(on.model, on.named(scales), means):
            losses = token_nll(on.model, on.texts).mean(1)
        assert losses.tolist() == pytest.approx(rung.scores, rel=1e-4)


# Times


def test_what_is_timed_computes_what_its_rung_says(straight):
    on = small_encoder()
    models = ladder_times.remade(on, straight)
    x = torch.randn(3, 7, 24)
    dense, skipped = (
        models[f"mixture, {way}"].layers[0].attention(x) for way in ("all heads computed", "heads skipped")
    )
    torch.testing.assert_close(skipped, dense, rtol=1e-4, atol=1e-5)
    heads = [layer.attention.layout.num_heads for layer in models["pruned by importance"].layers]
    assert heads == [*map(len, straight["rungs"][1]["kept"][0])]
    assert "sets by length" in ladder_times.for_tokens(models, 14) and len(models) == 12


def test_grouped_texts_get_the_vectors_of_their_sets(straight):
    on = small_encoder()
    rung = as_ladder(straight).rung("encoder", "sets by length")
    levels = [on.gone(kept) for kept in rung.kept]
    texts = on.texts[:12]
    ids, key_mask = (
        torch.tensor(rows) for rows in zip(*((r.ids, r.attention_mask) for r in Words().encode_batch(texts)))
    )
    given = torch.tensor(rung.given[:12])
    for controlled in False, True:
        (found,) = ladder_times.grouped_call(on, levels, [(ids, key_mask.bool())], [given], controlled)()
        for i, one in enumerate(given.tolist()):
            alone = pooled(on.cut(rung.kept[one]), ids[i : i + 1], key_mask[i : i + 1].bool())[0]
            torch.testing.assert_close(found[i], alone, rtol=1e-4, atol=1e-5)


# What follows from a file


def test_scores_and_intervals_are_computed_from_the_file(straight):
    file = as_ladder(straight)
    rung, base = (file.rung("encoder", name) for name in ("pruned by importance", "pruned at random 0"))
    value, low, high = file.score(rung)
    assert value == pytest.approx(sum(rung.scores) / 8) and low <= value <= high
    assert file.score(rung, base)[0] == pytest.approx((sum(rung.scores) - sum(base.scores)) / 8)
    assert file.error(rung)[0] == pytest.approx(sum(rung.distances) / 48)
    assert file.error(rung, base)[0] == pytest.approx(sum(rung.distances) / sum(base.distances))
    assert file.error(rung, rung) == pytest.approx((1, 1, 1))
    spoken, whole = (file.rung("language", name) for name in ("4 least important off", "all heads"))
    gains = torch.tensor(spoken.scores).double() - torch.tensor(whole.scores).double()
    assert file.score(spoken)[0] == pytest.approx(gains.mean().exp().item())
    assert file.rung("language", "no such") is None and file.table("language", "no such") is None
    assert file.table("encoder", "whole model", 40).size[:2] == [3, 40] and file.heads("language") == 20


# Broken off, and taken up again


def raises_at(step, error=KeyboardInterrupt):
    def tell(done, of):
        if done == step:
            raise error

    return tell


def save(file):
    return lambda found: write_file(Ladder, file, found | dict(command="mha-book ladder"))


@pytest.mark.parametrize("step", [1, 6, 12, 50])
def test_what_is_taken_up_again_gives_the_file_of_a_straight_run(straight, tmp_path, step):
    file = tmp_path / "ladder.json"
    found, stop = run_ladder(small_subjects(), SIZES, 0, None, raises_at(step), save(file))
    assert isinstance(stop, KeyboardInterrupt) and not found["complete"]
    before = read_ladder(file)
    whole, stop = run_ladder(small_subjects(), SIZES, 0, before, lambda done, of: None)
    assert stop is None and without_times(whole) == without_times(straight) and whole["seconds"] >= before.seconds
    assert whole["rungs"][: len(before.rungs)] == [asdict(rung) for rung in before.rungs]


def test_a_finished_file_is_not_measured_again(straight):
    found, stop = run_ladder(small_subjects(), SIZES, 0, as_ladder(straight), raises_at(1))
    assert stop is None and found["complete"] and without_times(found) == without_times(straight)


@pytest.mark.parametrize("change, words", [(dict(seed=1), "another seed"), (dict(steps=4), "another sizes")])
def test_a_file_of_other_settings_is_refused(straight, change, words):
    sizes = SIZES | {key: value for key, value in change.items() if key != "seed"}
    with refused(ValueError, words, "take it up as it was begun, or give another name"):
        run_ladder(small_subjects(), sizes, change.get("seed", 0), as_ladder(straight), raises_at(0))


def test_a_file_of_other_models_is_refused(straight):
    with refused(ValueError, "another layouts"):
        run_ladder(small_subjects()[:1], SIZES, 0, as_ladder(straight), raises_at(0))


# The file


BAD = {
    "the same was measured twice": lambda d: d["rungs"].append(d["rungs"][0]),
    "a layer or a head that there is not": lambda d: d["rungs"][1]["kept"][0][0].append(4),
    "there is no model": lambda d: d["rungs"][0].update(model="parrot"),
    "not one of its sets for each text": lambda d: d["rungs"][0].update(given=[0]),
    "active 9.0": lambda d: d["rungs"][0].update(active=9.0),
    "has 7 scores and 48 distances": lambda d: d["rungs"][0]["scores"].pop(),
    "a number that is too small": lambda d: d["rungs"][0]["distances"].__setitem__(0, -1.0),
    "is not that of a model's heads": lambda d: d["importance"]["encoder"][0].pop(),
    "holds a number below 0": lambda d: d["importance"]["language"][0].__setitem__(0, -1.0),
    "models differ": lambda d: d["lengths"].pop("language"),
    "are not those of texts": lambda d: d["lengths"]["language"].__setitem__(0, 0),
    "47 kinds of 48 texts": lambda d: d["kinds"].pop(),
    "is not h, g, d, dv": lambda d: d["layouts"]["encoder"].__setitem__(0, [4, 3, 6, 6]),
    "lacks complete": lambda d: d.pop("complete"),
}


@pytest.mark.parametrize("fault", BAD)
def test_a_file_that_cannot_be_is_refused(straight, tmp_path, fault):
    data = straight | dict(command="made up")
    file = tmp_path / "ladder.json"
    file.write_text(json.dumps(data))
    assert asdict(read_ladder(file)) == asdict(as_ladder(straight)) | dict(command="made up")
    BAD[fault](data)
    file.write_text(json.dumps(data))
    with refused(ValueError, "ladder.json: ", fault):
        read_ladder(file)


# The command


@pytest.fixture
def command(monkeypatch, tmp_path):
    "The command on the small models."
    monkeypatch.setattr(subjects, "package_file", lambda *file: None)
    for name, made in (("encoder", small_encoder), ("language", small_language)):
        monkeypatch.setitem(by_steps.LADDERS, name, lambda sizes, seed, device, made=made: made())
    sizes = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in SIZES.items())
    return f"ladder {sizes} --json {tmp_path}/ladder-mine.json".split(), tmp_path


def test_the_command_keeps_what_it_has_at_ctrl_c_and_goes_on(command, capsys, monkeypatch):
    line, folder = command
    progress = by_steps._progress
    monkeypatch.setattr(by_steps, "_progress", lambda: raises_at(6))
    assert main(line) == 130
    assert "stopped by Ctrl-C; what was measured is in" in capsys.readouterr().err
    half = read_ladder(folder / "ladder-mine.json")
    assert not half.complete and len(half.rungs) == 2 and "--gate-steps 3" in half.command
    assert all(half.command.count(f"--{name.replace('_', '-')} ") == 1 for name in (*SIZES, "seed", "device"))
    monkeypatch.setattr(by_steps, "_progress", progress)
    assert main(line) == 0
    whole = read_ladder(folder / "ladder-mine.json")
    assert whole.complete and whole.rungs[:2] == half.rungs and "mixture of heads" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main([*line, "--seed", "3"])
    assert "another seed" in capsys.readouterr().err


def test_nothing_measured_is_nothing_written(command, capsys, monkeypatch):
    line, folder = command
    monkeypatch.setattr(by_steps, "_progress", lambda: raises_at(0))
    assert main(line) == 130 and "nothing is written" in capsys.readouterr().err
    assert [*folder.iterdir()] == []


@pytest.mark.parametrize(
    "words, fault",
    [
        ("ladder parrot", "unknown model 'parrot'; there are encoder, language"),
        ("ladder --lines 12", "--lines 12 must be 8 to 512, a multiple of 8"),
        ("ladder --steps 0", "--steps 0 must be 1 to 300"),
        ("ladder --json {}/heads-mine.json", "of the ladder with ladder"),
        ("bench --json {}/ladder.json", "of the ladder with ladder"),
        ("ladder --json {}/ladder-text.json", "ladder-text.json: "),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_measured(command, capsys, words, fault):
    _, folder = command
    (folder / "ladder-text.json").write_text("{}")
    with pytest.raises(SystemExit) as stop:
        main(words.format(folder).split())
    assert stop.value.code == 2 and fault in " ".join(capsys.readouterr().err.split())


def test_sizes_are_given_back():
    assert checked_sizes(SIZES, ALLOWED) == SIZES


def test_the_books_file_is_complete():
    found = read_ladder(ROOT / "nbs" / "measured" / "ladder.json")
    assert found.complete and "+" not in found.commit
    for rung in found.rungs:
        steps = found.sizes["steps"] * (4 if rung.name.endswith("tuned longer") else 1)
        assert (rung.steps, len(rung.course)) in ((0, 0), (steps, 10)) and bool(rung.steps) == bool(rung.rate)
    assert found.rung("encoder", "pruned by importance").active == 50
    assert "pruned by importance" in show_ladder(found)
