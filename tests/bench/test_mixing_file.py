"""The command that lets heads talk: what it trains, how it goes on, and what a file must not say."""

import copy
import json
from dataclasses import asdict
from functools import cache
from pathlib import Path

import pytest
import torch

from mha_book.bench import by_steps, mixing, mixing_tasks
from mha_book.bench.cli import main
from mha_book.bench.measured import write_file
from mha_book.bench.mixing import Mixing, as_mixing, contestants, read_mixing, run_mixing, show_mixing
from mha_book.bench.mixing_kinds import CONTROLS, KINDS, PLACED, PLAIN, TWICE
from mha_book.bench.mixing_sizes import RATES
from mha_book.bench.mixing_tasks import (
    HEADS,
    TASKS,
    Shifter,
    Speaker,
    count,
    drawn_by_name,
    learn_letters,
    learn_shifts,
    matched_speaker,
    texts,
)
from mha_book.instruments.device import Timing
from support.refusals import refused

pytestmark = pytest.mark.usefixtures("own_messages")
ROOT = Path(__file__).resolve().parents[2]
SIZES = dict(shift_steps=2, letter_steps=2, seeds=2, rounds=3)
CPU = torch.device("cpu")
FEW = PLAIN, PLACED, "knocking heads", "talking heads"


@pytest.fixture(autouse=True)
def short_inputs(monkeypatch):
    "A few kinds; each call is made once, on small inputs: what its time is, is no matter here."
    monkeypatch.setattr(mixing_tasks, "WINDOWS", 5)
    monkeypatch.setattr(mixing, "INPUTS", [(2, 5, 8, 2)])

    def once(calls, **more):
        for call in calls.values():
            call()
        return {name: Timing(1.0, 0.9, 1.1, 1e-3, 64) for name in calls}

    monkeypatch.setattr(mixing, "benchmark", once)


@pytest.fixture
def few_kinds(monkeypatch):
    for name in KINDS.keys() - {*FEW}:
        monkeypatch.delitem(KINDS, name)
    monkeypatch.delitem(CONTROLS, "pairs, added")


@cache
def straight_run():
    found, stop = run_mixing(SIZES, 0, CPU, None, lambda done, of: None)
    if stop is not None:
        raise stop
    return found


@pytest.fixture
def straight(short_inputs, few_kinds, own_messages):
    "What a run without a break finds."
    return copy.deepcopy(straight_run())


def without_times(found):
    "What is the same in every run."
    gone = "date", "load", "seconds", "tables"
    runs = [{key: value for key, value in run.items() if key != "seconds"} for run in found["runs"]]
    places = [(table["mode"], table["size"]) for table in found["tables"]]
    return {key: value for key, value in found.items() if key not in gone} | dict(runs=runs, tables=places)


# The models


@pytest.mark.parametrize("kind", KINDS | CONTROLS)
def test_every_kind_gives_every_task_what_it_asks(kind):
    x = torch.randn(3, 24, 4)
    assert Shifter(kind, HEADS)(x).shape == (3, 24, 64)
    ids = torch.randint(texts()[1], (2, 9))
    assert Speaker(kind, 12)(ids).shape == (2, 9, texts()[1])


@pytest.mark.parametrize("kind", KINDS | CONTROLS)
def test_no_model_of_letters_sees_the_letters_that_come(kind):
    torch.manual_seed(0)
    model = Speaker(kind, 12).double().eval()
    ids = torch.randint(texts()[1], (2, 9))
    changed = ids.clone()
    changed[:, 6] = (ids[:, 6] + 1) % texts()[1]
    before, after = model(ids), model(changed)
    assert torch.allclose(before[:, :6], after[:, :6], atol=1e-12)
    assert not torch.allclose(before[:, 6:], after[:, 6:], atol=1e-12)


@pytest.mark.parametrize("kind", KINDS | CONTROLS)
def test_no_model_has_more_parameters_than_the_plain_one(kind):
    plain, model = (count(matched_speaker(one)[0]) for one in (PLAIN, kind))
    assert plain - 3 * 64 * 2 < model <= plain, "within a channel of the gated maps"


def test_a_kind_is_no_other_and_folds_where_it_says_so():
    sizes, x = dict(embed_dim=12, num_heads=4, head_dim=3, out_dim=12), torch.randn(2, 5, 12)
    for kind in KINDS.values():
        layer = kind.make(sizes, 0).eval()
        with torch.no_grad():
            for p in layer.parameters():
                p.add_(torch.randn_like(p) * 0.1)
            served = kind.served(layer).eval()
            assert torch.allclose(served(x), layer(x), atol=1e-5)
        extra = count(served) - count(KINDS[PLAIN].make(sizes, 0))
        assert extra == 0 if kind.folds and kind is not KINDS[TWICE] else extra > 0 or kind.place == "nowhere"
        assert KINDS[kind.base].base == kind.base


def test_pairs_with_a_factor_for_all_tokens_are_a_plain_layer_of_twice_the_heads():
    sizes, x = dict(embed_dim=12, num_heads=4, head_dim=3, out_dim=12), torch.randn(2, 5, 12)
    for kind, sign in zip(CONTROLS.values(), (-1, 1)):
        layer, plain = kind.make(sizes, 0), KINDS[TWICE].make(sizes, 0)
        torch.nn.init.normal_(layer.finish.logits)
        plain.in_proj.load_state_dict(layer.in_proj.state_dict())
        first = layer.out_proj.weight.detach().unflatten(1, (4, 3))
        second = sign * torch.sigmoid(layer.finish.logits.detach())[:, None] * first
        plain.out_proj.weight.data.copy_(torch.stack([first, second], 2).flatten(1))
        assert torch.allclose(layer(x), plain(x), atol=1e-6)


@pytest.mark.parametrize("kind", ["talking heads", "knocking heads"])
def test_models_of_one_seed_begin_with_the_same_numbers(kind):
    plain, other = Shifter(PLAIN, HEADS), Shifter(kind, HEADS)
    for model in plain, other:
        drawn_by_name(model, 7, lambda name, p: 0.5)
    mine = {name.replace("parametrizations.weight.original", "weight"): p for name, p in other.named_parameters()}
    for name, p in plain.named_parameters():
        assert torch.equal(p, mine[name]), name
    drawn_by_name(other, 8, lambda name, p: 0.5)
    assert not torch.equal(plain.attention.out_proj.weight, other.attention.out_proj.weight)


@pytest.mark.parametrize("learn", TASKS.values())
def test_a_training_is_the_same_again_and_lowers_the_loss(learn):
    one, again = (learn(PLAIN, HEADS, 0.01, 3, 12, CPU) for _ in range(2))
    assert one == again and one["course"][-1] < one["course"][0]
    assert learn(PLAIN, HEADS, 0.01, 4, 12, CPU)["loss"] != one["loss"]


def test_what_is_learned_is_on_file():
    found = learn_letters("talking heads", HEADS, 0.05, 0, 3, CPU)
    assert len(found["mixing"]) == 4 and len(found["alike"]) == 2
    assert any(row[0] not in (0, 1) for rows in found["mixing"].values() for row in rows)
    assert learn_shifts("talking heads", 2, 0.05, 0, 2, CPU)["mixing"] == {}


# The run


def test_every_training_that_is_planned_is_made(straight):
    file = as_mixing(straight)
    assert file.complete
    for task in TASKS:
        for kind, heads in contestants(task):
            assert [run.rate for run in file.tried(task, kind, heads)] == RATES[task]
            runs = file.trained(task, kind, heads)
            assert [run.seed for run in runs] == [0, 1]
            best = min(file.tried(task, kind, heads), key=lambda run: run.chosen_on).rate
            assert {run.rate for run in runs} == {best} == {file.rate(task, kind, heads)}
    assert {table.mode for table in file.tables} == {"a call", "a step of training"}
    assert file.table("a call", 5).rows[0].name == PLAIN and file.table("a call", 7) is None
    assert "talking heads" in show_mixing(file)
    assert file.rate("shifts", PLAIN, 3) is None


def raises_at(step):
    def tell(done, of):
        if done == step:
            raise KeyboardInterrupt

    return tell


def save(file):
    return lambda found: write_file(Mixing, file, found | dict(command="mha-book mixing"))


@pytest.mark.parametrize("step", [1, 20, 40])
def test_what_is_taken_up_again_gives_the_file_of_a_straight_run(straight, tmp_path, step):
    file = tmp_path / "mixing.json"
    found, stop = run_mixing(SIZES, 0, CPU, None, raises_at(step), save(file))
    assert isinstance(stop, KeyboardInterrupt) and not found["complete"]
    before = read_mixing(file)
    whole, stop = run_mixing(SIZES, 0, CPU, before, lambda done, of: None)
    assert stop is None and without_times(whole) == without_times(straight) and whole["seconds"] >= before.seconds


def test_a_finished_file_is_not_measured_again(straight):
    found, stop = run_mixing(SIZES, 0, CPU, as_mixing(straight), raises_at(1))
    assert stop is None and found["complete"] and without_times(found) == without_times(straight)


@pytest.mark.parametrize("change, words", [(dict(seed=1), "another seed"), (dict(shift_steps=4), "another sizes")])
def test_a_file_of_other_settings_is_refused(straight, change, words):
    sizes = SIZES | {key: value for key, value in change.items() if key != "seed"}
    with refused(ValueError, words, "take it up as it was begun, or give another name"):
        run_mixing(sizes, change.get("seed", 0), CPU, as_mixing(straight), raises_at(0))


# The file


BAD = {
    "the same was measured twice": lambda d: d["runs"].append(d["runs"][0]),
    "there is no task 'parrots'": lambda d: d["runs"][0].update(task="parrots"),
    "no kind 'parrot'": lambda d: d["runs"][0].update(kind="parrot"),
    "rate 0.5 or seed": lambda d: d["runs"][0].update(rate=0.5),
    "or seed 9 is none": lambda d: d["runs"][0].update(seed=9),
    "heads 0": lambda d: d["runs"][0].update(heads=0),
    "a loss below 0": lambda d: d["runs"][0].update(loss=-1.0),
    "a resemblance beyond 1": lambda d: d["runs"][0].update(alike=[1.5]),
    "is no square matrix": lambda d: d["runs"][0].update(mixing={"m": [[1.0, 0.0]]}),
    "are not rising rates": lambda d: d["rates"].update(shifts=[0.03, 0.01]),
    "lacks complete": lambda d: d.pop("complete"),
}


@pytest.mark.parametrize("fault", BAD)
def test_a_file_that_cannot_be_is_refused(straight, tmp_path, fault):
    data = straight | dict(command="made up")
    file = tmp_path / "mixing.json"
    file.write_text(json.dumps(data))
    assert asdict(read_mixing(file)) == asdict(as_mixing(straight)) | dict(command="made up")
    BAD[fault](data)
    file.write_text(json.dumps(data))
    with refused(ValueError, "mixing.json: ", fault):
        read_mixing(file)


# The command


@pytest.fixture
def command(few_kinds, tmp_path):
    sizes = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in SIZES.items())
    return f"mixing {sizes} --json {tmp_path}/mixing-mine.json".split(), tmp_path


def test_the_command_keeps_what_it_has_at_ctrl_c_and_goes_on(command, capsys, monkeypatch):
    line, folder = command
    progress = by_steps._progress
    monkeypatch.setattr(by_steps, "_progress", lambda: raises_at(6))
    assert main(line) == 130
    assert "stopped by Ctrl-C; what was measured is in" in capsys.readouterr().err
    half = read_mixing(folder / "mixing-mine.json")
    assert not half.complete and len(half.runs) == 6 and "--shift-steps 2" in half.command
    assert all(half.command.count(f"--{name.replace('_', '-')} ") == 1 for name in (*SIZES, "seed", "device"))
    monkeypatch.setattr(by_steps, "_progress", progress)
    assert main(line) == 0
    whole = read_mixing(folder / "mixing-mine.json")
    assert whole.complete and whole.runs[:6] == half.runs and "talking heads" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words, fault",
    [
        ("mixing --seeds 0", "--seeds 0 must be 1 to 50"),
        ("mixing --rounds 4", "--rounds 4 must be 3 to 99, a multiple of 3"),
        ("mixing --json {}/heads-mine.json", "of mixing with mixing"),
        ("bench --json {}/mixing.json", "of mixing with mixing"),
        ("mixing --json {}/mixing-text.json", "mixing-text.json: "),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_measured(command, capsys, words, fault):
    _, folder = command
    (folder / "mixing-text.json").write_text("{}")
    with pytest.raises(SystemExit) as stop:
        main(words.format(folder).split())
    assert stop.value.code == 2 and fault in " ".join(capsys.readouterr().err.split())


def test_the_books_file_is_complete():
    found = read_mixing(ROOT / "nbs" / "measured" / "mixing.json")
    assert found.complete and "+" not in found.commit
    for task in TASKS:
        for kind, heads in contestants(task):
            runs = found.trained(task, kind, heads)
            assert [run.seed for run in runs] == [*range(5)] and all(len(run.course) == 10 for run in runs)
    assert len(found.tables) == 4 and "talking heads" in show_mixing(found)
