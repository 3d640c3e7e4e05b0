"""The command that compares rules of bits: what it measures, how it goes on, and what a file must not say."""

import copy
import json
from dataclasses import asdict
from functools import cache
from pathlib import Path

import pytest
import torch

from mha_book.bench import by_steps, precision, subjects
from mha_book.bench.cli import main
from mha_book.bench.measured import write_file
from mha_book.bench.precision import BEST, RULES, as_precision, planned, read_precision, run_precision, show_precision
from mha_book.bench.subjects import EncoderSubject, LanguageSubject, checked_sizes, passages
from mha_book.lab.frontier import Storage
from mha_book.lab.one_wrong_line import token_nll
from mha_book.models.encoder import Encoder, EncoderConfig
from mha_book.models.language_model import LanguageModel, LanguageModelConfig
from mha_book.plugs.quantize import HeadPrecision
from mha_book.variants.sensitivity import head_sensitivity
from support.refusals import refused

pytestmark = pytest.mark.usefixtures("own_messages")
ROOT = Path(__file__).resolve().parents[2]
SIZES = dict(sequences=3, calibration_sequences=1, texts=3, tokens=64, calibration_tokens=64)


def texts(rows, tokens):
    return torch.randint(11, (rows, tokens))


def small_encoder():
    sizes = dict(vocab_size=11, embed_dim=32, num_heads=4, num_layers=2, hidden_dim=16, max_len=64, num_segments=1)
    return EncoderSubject(Encoder(EncoderConfig(**sizes, eps=1e-5)).eval(), texts(3, 64), texts(1, 64))


def small_language(tokens=65):
    sizes = dict(vocab_size=11, embed_dim=16, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8)
    config = LanguageModelConfig(**sizes, hidden_dim=7, max_len=130, rope_base=100.0, eps=1e-5)
    subject = LanguageSubject(LanguageModel(config).eval(), texts(3, tokens), texts(1, 65))
    subject.budgets, subject.main = (8.75, 9.0), 9.0  # heads of width 8: scales are 2.25 bits of a number
    return subject


def small_subjects():
    "Two models of random weights; heads of width 8 make scales dear."
    torch.manual_seed(0)
    encoder = small_encoder()
    encoder.budgets, encoder.main = (7.25, 8.25), 8.25
    return [encoder, small_language()]


def without_times(found):
    return {key: value for key, value in found.items() if key not in ("date", "load", "seconds")}


@cache
def straight_run():
    found, stop = run_precision(small_subjects(), SIZES, 0, None, lambda done, of: None)
    assert stop is None
    return found


@pytest.fixture
def straight(own_messages):
    "What a run without a break finds."
    return copy.deepcopy(straight_run())


# What is measured


def test_every_rule_that_is_planned_is_tried_within_its_budget(straight):
    file = as_precision(straight)
    assert file.complete and len(file.effects) == 2 + 2 * 2
    wanted = [key for subject in small_subjects() for key in planned(subject)]
    assert [(p.model, p.rule, p.budget, p.exact_first, p.way) for p in file.points] == wanted
    assert {rule for _, rule, *_ in wanted} == {"exact", *RULES}
    for point in file.points:
        assert point.rule == "exact" or point.budget - 1 < point.bits <= point.budget + 1e-4, point
        assert len(point.scores) == 3


def test_the_effects_are_those_of_the_whole_model(straight):
    file = as_precision(straight)
    for subject in small_subjects():
        for first in subject.firsts:
            whole = head_sensitivity(
                subject.model,
                [(subject.calibration,)],
                subject.formats,
                exact_first=first,
                outputs=(lambda model, ids: model.states(ids)) if subject.name == "language" else None,
            )
            found = file.sensitivity(subject.name, first)
            assert found.head_dims == whole.head_dims and found.formats == whole.formats
            for name, effects in whole.effects.items():
                torch.testing.assert_close(found.effects[name], effects, rtol=1e-3, atol=1e-12)


def test_what_is_exact_costs_nothing_by_any_way():
    encoder, language = small_subjects()
    for subject, ways in ((encoder, ["rounded"]), (language, ["rounded", "cache"])):
        wide = {
            name: HeadPrecision.uniform(at.num_kv_heads, "float32", exact_first=first)
            for name, at in subject.layouts.items()
            for first in [subject.firsts[-1]]
        }
        exact = torch.zeros(3) if subject is encoder else subject.scores(None, "rounded")
        for way in ways:
            torch.testing.assert_close(subject.scores(Storage(wide), way), exact, rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(exact, token_nll(language.model, language.tests).mean(1))


def test_what_is_rounded_costs_something_by_any_way():
    language = small_language(129)
    few = {name: HeadPrecision.uniform(2, "int2") for name in language.layouts}
    exact = language.scores(None, "rounded")
    for way in "rounded", "cache":
        assert (language.scores(Storage(few), way) - exact).abs().min() > 1e-6


def test_an_encoders_error_is_relative_to_each_sequence():
    encoder = small_subjects()[0]
    storage = RULES["uniform"](precision.Known(as_precision(begun([encoder])), "encoder", 8.25, 0))
    y = encoder.model(encoder.tests)[-1]
    with subjects.stored_as(encoder.model, storage):
        other = encoder.model(encoder.tests)[-1]
    each = [((a - b).norm() / a.norm()).item() ** 2 for a, b in zip(y, other)]
    assert encoder.scores(storage, "rounded").tolist() == pytest.approx(each, rel=1e-4)


def begun(of):
    "A file in which nothing is measured yet."
    found, _ = run_precision(of, SIZES, 0, None, raises_at(0))
    return found


def test_losses_and_intervals_are_computed_from_the_scores(straight):
    file = as_precision(straight)
    uniform, best = (file.point("encoder", rule, 8.25) for rule in ("uniform", BEST))
    value, low, high = file.loss(uniform)
    assert value == pytest.approx((sum(uniform.scores) / 3) ** 0.5) and low <= value <= high
    assert file.loss(best, uniform)[0] == pytest.approx((sum(best.scores) / sum(uniform.scores)) ** 0.5)
    assert file.loss(uniform, uniform) == pytest.approx((1, 1, 1))
    spoken, exact = file.point("language", "uniform", 9.0), file.point("language", "exact")
    gains = [a - b for a, b in zip(spoken.scores, exact.scores)]
    assert file.loss(spoken)[0] == pytest.approx(torch.tensor(gains).double().mean().exp().item())
    assert file.point("language", "uniform", 1.0) is None


# Broken off, and taken up again


def raises_at(step, error=KeyboardInterrupt):
    def tell(done, of):
        if done == step:
            raise error

    return tell


@pytest.mark.parametrize("step", [1, 2, 3, 20, 60])
def test_what_is_taken_up_again_gives_the_file_of_a_straight_run(straight, tmp_path, step):
    file, written = tmp_path / "precision.json", []

    def keep(found):
        written.append(copy.deepcopy(found))
        precision_write(file, found)

    found, stop = run_precision(small_subjects(), SIZES, 0, None, raises_at(step), keep)
    assert isinstance(stop, KeyboardInterrupt) and not found["complete"] and len(written) == step
    assert without_times(written[-1]) == without_times(found)
    again = small_subjects()
    for subject in again:  # what is in the file is not measured again
        monitor(subject)
    before = read_precision(file)
    whole, stop = run_precision(again, SIZES, 0, before, lambda done, of: None)
    assert stop is None and without_times(whole) == without_times(straight)
    assert whole["seconds"] >= before.seconds
    assert sum(subject.asked for subject in again) == len(straight["points"]) - len(found["points"])


def monitor(subject):
    "Counts how often scores are asked for."
    subject.asked, scores = 0, subject.scores

    def counted(storage, way):
        subject.asked += 1
        return scores(storage, way)

    subject.scores = counted


def precision_write(file, found):
    write_file(precision.Precision, file, found | dict(command="mha-book precision"))


def test_a_finished_file_is_not_measured_again(straight):
    again = small_subjects()
    for subject in again:
        subject.scores = subject.traits = subject.effects = None
    found, stop = run_precision(again, SIZES, 0, as_precision(straight), lambda done, of: None)
    assert stop is None and without_times(found) == without_times(straight) and found["complete"]


@pytest.mark.parametrize("change, words", [(dict(seed=1), "another seed"), (dict(texts=4), "another sizes")])
def test_a_file_of_other_settings_is_refused(straight, change, words):
    sizes = SIZES | {key: value for key, value in change.items() if key != "seed"}
    with refused(ValueError, words, "take it up as it was begun, or give another name"):
        run_precision(small_subjects(), sizes, change.get("seed", 0), as_precision(straight), raises_at(0))


def test_a_file_of_other_models_is_refused(straight):
    with refused(ValueError, "another layouts"):
        run_precision(small_subjects()[:1], SIZES, 0, as_precision(straight), raises_at(0))


# The file


BAD = {
    "the same was measured twice": lambda d: d["points"].append(d["points"][0]),
    "has no layer": lambda d: d["effects"][0].update(layer="layers.9"),
    "2 parts, 4 heads and 8 formats": lambda d: d["effects"][0]["effects"][0].pop(),
    "below 0": lambda d: d["effects"][0]["effects"][0][0].__setitem__(0, -1.0),
    "2 scores, another 3": lambda d: d["points"][5]["scores"].pop(),
    "a score below 0, no bits, or no model": lambda d: d["points"][0].update(bits=0.0),
    "models differ": lambda d: d["formats"].pop("language"),
    "lacks complete": lambda d: d.pop("complete"),
}


@pytest.mark.parametrize("fault", BAD)
def test_a_file_that_cannot_be_is_refused(straight, tmp_path, fault):
    data = copy.deepcopy(straight) | dict(command="made up")
    file = tmp_path / "precision.json"
    file.write_text(json.dumps(data))
    assert asdict(read_precision(file)) == asdict(as_precision(straight)) | dict(command="made up")
    BAD[fault](data)
    file.write_text(json.dumps(data))
    with refused(ValueError, "precision.json: ", fault):
        read_precision(file)


def test_what_is_missing_is_said(straight):
    data = as_precision(straight)
    with refused(ValueError, "language, exact_first 3: not measured yet in layers.0.attention, layers.1.attention"):
        data.sensitivity("language", 3)


# The command


@pytest.fixture
def command(monkeypatch, tmp_path):
    "The command on the small models."
    made = dict(zip(("encoder", "language"), small_subjects()))
    monkeypatch.setattr(subjects, "package_file", lambda *file: None)
    for name, subject in made.items():
        monkeypatch.setitem(by_steps.SUBJECTS, name, lambda sizes, device, subject=subject: subject)
    return f"precision --texts 3 --sequences 3 --json {tmp_path}/precision-mine.json".split(), tmp_path


def test_the_command_keeps_what_it_has_at_ctrl_c_and_goes_on(command, capsys, monkeypatch):
    line, folder = command
    monkeypatch.setattr(by_steps, "_progress", lambda: raises_at(4))
    assert main(line) == 130
    assert "stopped by Ctrl-C; what was measured is in" in capsys.readouterr().err
    half = read_precision(folder / "precision-mine.json")
    assert not half.complete and len(half.points) == 1 and "--calibration-tokens 256" in half.command
    monkeypatch.undo()
    line, folder = command
    for name, subject in zip(("encoder", "language"), small_subjects()):
        monkeypatch.setitem(by_steps.SUBJECTS, name, lambda sizes, device, subject=subject: subject)
    monkeypatch.setattr(subjects, "package_file", lambda *file: None)
    assert main(line) == 0
    whole = read_precision(folder / "precision-mine.json")
    assert whole.complete and whole.points[0] == half.points[0]
    assert BEST in capsys.readouterr().out
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
        ("precision parrot", "unknown model 'parrot'; there are encoder, language"),
        ("precision --tokens 100", "--tokens 100 must be 64 to 1024, a multiple of 64"),
        ("precision --sequences 0", "--sequences 0 must be 1 to 512"),
        ("precision --json {}/heads-mine.json", "those of precision with precision"),
        ("bench --json {}/precision.json", "those of precision with precision"),
        ("precision --json {}/precision-text.json", "precision-text.json: "),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_measured(command, capsys, words, fault):
    _, folder = command
    (folder / "precision-text.json").write_text("{}")
    with pytest.raises(SystemExit) as stop:
        main(words.format(folder).split())
    assert stop.value.code == 2 and fault in " ".join(capsys.readouterr().err.split())


def test_sizes_are_given_back():
    assert checked_sizes(SIZES) == SIZES


# Texts


class Letters:
    "A tokenizer of letters."

    def encode(self, text, add_special_tokens):
        assert not add_special_tokens
        self.ids = [ord(letter) for letter in text]
        return self


def test_passages_come_one_after_the_other_and_tests_in_turn_from_each_play():
    lear = passages(Letters(), "lear", 3, 50)
    assert lear.shape == (3, 50) and not torch.equal(lear[0], lear[1])
    found = subjects.tests(Letters(), 17, 50)
    assert found.shape == (17, 50)
    assert found[0].equal(passages(Letters(), "macbeth", 2, 50)[0])
    assert found[16].equal(passages(Letters(), "macbeth", 2, 50)[1])
    assert len({tuple(row) for row in found.tolist()}) == 17
    assert subjects.tests(Letters(), 2, 50).equal(found[:2])


def test_the_books_file_is_complete_and_within_its_budgets():
    found = read_precision(ROOT / "nbs" / "measured" / "precision.json")
    assert found.complete and "+" not in found.commit
    for point in found.points:
        assert point.bits <= point.budget
        assert len(point.scores) == found.sizes["sequences" if point.model == "encoder" else "texts"]
    for model, budget in (("encoder", 7.75), ("language", 4.5)):
        assert precision.main_budget(found, model) == budget
        best = precision.allocate_precision(found.sensitivity(model), budget)
        bits = Storage(best).bits(found.heads(model))
        assert bits == pytest.approx(found.point(model, BEST, budget).bits, abs=1e-4)
    assert "mixed, by effect" in show_precision(found)
