"""The stress test: what is trained, what counts as failing, what `mha-book stress` refuses, writes and reads back."""

import copy
import json
import math
import re
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import pytest
import torch

from mha_book.bench import cli, measured, trials
from mha_book.bench.cli import main
from mha_book.bench.measured import Measurement, measurements, read_file, write_file
from mha_book.bench.trials import Trials, read_trials, run_trials, show_trials
from mha_book.heads.layer import MultiHeadAttention
from mha_book.kernels.backends import attention
from mha_book.kernels.merging import attention_with_lse
from mha_book.lab import stress
from mha_book.lab.stress import (
    TREATMENTS,
    CopyModel,
    Run,
    Training,
    Watched,
    learned,
    repeat_loss,
    rungs,
    sequences,
    train,
    verdict,
)
from mha_book.plugs.logits import largest_logits, qk_clip_

pytestmark = pytest.mark.usefixtures("own_messages")
ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
TINY = Training(vocab=7, tokens=10, width=12, heads=3, blocks=2, batch=2, steps=20, warm_up=5, record=5)
POINTS = TINY.steps // TINY.record


# What is trained


@pytest.mark.parametrize(
    "field, value, words",
    [
        ("heads", 5, "training.width 12 is not a multiple of heads 5"),
        ("tokens", 11, "training.tokens 11 is not a multiple of two 2"),
        ("record", 3, "training.steps 20 is not a multiple of record 3"),
        ("record", 20, "training.steps 20 must be more than warm_up 5 and record 20"),
        ("warm_up", 20, "training.steps 20 must be more than warm_up 20"),
        ("vocab", 1, "training.vocab 1 is not between 2 and infinity"),
        ("batch", 0, "training.batch 0"),
        ("weight_decay", -0.1, "training.weight_decay -0.1"),
        ("max_norm", math.nan, "training.max_norm nan"),
        ("max_norm", math.inf, "training.max_norm inf"),
    ],
)
def test_a_training_that_cannot_be_is_refused(field, value, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        replace(TINY, **{field: value})


def test_the_rate_goes_up_and_down():
    shares = [TINY.rate_at(step) for step in range(TINY.steps)]
    assert shares[:5] == [0.2, 0.4, 0.6, 0.8, 1.0] and max(shares) == 1
    assert shares[5:] == sorted(shares[5:], reverse=True) and 0 < shares[-1] < 0.05
    assert replace(TINY, warm_up=0).rate_at(0) == 1


def test_sequences_repeat_themselves_and_each_other_only_for_the_same_seed():
    batches, again, other = (sequences(TINY, seed) for seed in (3, 3, 4))
    x, y = next(batches), next(batches)
    assert x.shape == (2, 10) and torch.equal(x[:, :5], x[:, 5:]) and x.max() < 7
    assert torch.equal(x, next(again)) and not torch.equal(x, y) and not torch.equal(x, next(other))


def test_the_loss_is_that_of_the_second_half():
    tokens = next(sequences(TINY, 0))
    assert repeat_loss(torch.zeros(2, 9, 7), tokens).item() == pytest.approx(TINY.guessing)
    known = torch.nn.functional.one_hot(tokens[:, 1:], 7) * 100.0
    assert repeat_loss(known, tokens) == 0
    known[:, :4] = 0  # the first half cannot be known, and does not count
    assert repeat_loss(known, tokens) == 0
    known[:, 4] = 0  # the first token of the second half can
    assert repeat_loss(known, tokens).item() == pytest.approx(TINY.guessing / 5)


@pytest.mark.parametrize("name", TREATMENTS)
def test_no_model_sees_the_token_that_it_is_to_guess(name):
    model, tokens = CopyModel(TINY, TREATMENTS[name].layer), next(sequences(TINY, 0))
    other = tokens.clone()
    other[:, 6] = (other[:, 6] + 1) % 7
    scores, changed = model(tokens), model(other)
    torch.testing.assert_close(scores[:, :6], changed[:, :6])
    assert not torch.allclose(scores[:, 6], changed[:, 6])


def test_a_watched_plug_gives_what_the_plug_gives_and_tells_the_logits():
    q, k, v = (torch.randn(2, 3, 5, 4) for _ in range(3))
    for plug, options in ((Watched(), {}), (Watched(scale=0.7), dict(scale=0.7))):
        assert torch.equal(plug(q, k, v, is_causal=True), stress.attention(q, k, v, is_causal=True))
        sizes = [(q[:, i] @ k[:, i].mT * options.get("scale", 0.5)).tril().abs().max() for i in range(3)]
        torch.testing.assert_close(plug.largest(), torch.stack(sizes))
        lse = attention_with_lse(q, k, v, is_causal=True, **options)[1]
        torch.testing.assert_close(plug.penalty(), lse.square().mean())


def test_what_is_watched_are_the_layers_own_logits():
    model = CopyModel(TINY, TREATMENTS["qk-norm"].layer)
    tokens, seen = next(sequences(TINY, 0)), []
    for layer in model.layers:
        layer.register_forward_hook(lambda layer, args, _: seen.append(largest_logits(layer, *args, is_causal=True)))
    model(tokens)
    assert len(model.watched()) == len(seen) == 2
    for plug, sizes in zip(model.watched(), seen, strict=True):
        torch.testing.assert_close(plug.largest(), sizes)


def after_one_step(name, **changes):
    "A model after a step of a hundredth, and what it was before."
    treatment = replace(TREATMENTS[name], **changes)
    torch.manual_seed(0)
    model = CopyModel(TINY, treatment.layer)
    with torch.no_grad():
        for layer in model.layers:
            layer.in_proj.weight.mul_(4)
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    tokens = next(sequences(TINY, 0))
    loss = stress._step(model, tokens, optimizer, treatment, TINY)
    model(tokens[:, :-1])
    return model, before, loss


def test_each_treatment_does_what_it_says():
    models = {name: after_one_step(name)[0] for name in TREATMENTS}
    sizes = {name: max(plug.largest().max() for plug in model.watched()) for name, model in models.items()}
    assert sizes["scale"] < 0.6 * sizes["plain"]  # d is 4, its root 2
    assert sizes["qk-norm"] <= 2 * 1.01**2 * 1.001  # |q| = |k| = 2, weights near 1
    assert models["softcap"].layers[0].attend.attend.keywords == {"softcap": 50.0}
    for name, there in (("sinks", True), ("off-by-one", False)):
        sinks = models[name].layers[0].attend.attend.sinks
        assert sinks.requires_grad == there and bool(sinks.any()) == there
    assert models["temperature"].layers[0].attend.log_temperature.any()
    assert models["gate"].layers[0].finish.gate_proj.weight.grad.any()


def test_the_clip_holds_after_the_step_and_only_above_its_threshold():
    free = after_one_step("qk-clip")[0]  # nothing is above 100
    plain = after_one_step("plain")[0]
    assert all(torch.equal(a, b) for a, b in zip(free.parameters(), plain.parameters(), strict=True))
    held = after_one_step("qk-clip", threshold=2.0)[0]
    for plug, other in zip(held.watched(), plain.watched(), strict=True):
        assert plug.largest().max() < 2.5 < other.largest().max()  # the step itself moves it a little


def test_the_penalty_moves_the_weights_and_is_not_counted_as_loss():
    plain, _, loss = after_one_step("plain")
    held, _, same = after_one_step("z-loss", penalty=10.0)
    assert loss == same and not torch.equal(plain.layers[0].in_proj.weight, held.layers[0].in_proj.weight)
    lse = [[plug.penalty().item() for plug in model.watched()] for model in (plain, held)]
    assert sum(lse[1]) < sum(lse[0])


@pytest.mark.parametrize("name", TREATMENTS)
def test_a_run_comes_back_and_touches_no_seed(name):
    before = torch.random.get_rng_state()
    run = train(name, 0.02, 2, TINY)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert (run.treatment, run.rate, run.seed, len(run.losses), len(run.largest)) == (name, 0.02, 2, POINTS, POINTS)
    assert min(len(set(run.losses)), len(set(run.largest))) > 1 and min(run.largest) > 0
    assert run == train(name, 0.02, 2, TINY) != train(name, 0.02, 3, TINY)


def test_all_treatments_begin_with_the_weights_of_the_plain_one():
    plain = stress._model(TREATMENTS["plain"], 3, TINY).state_dict()
    for name, treatment in TREATMENTS.items():
        state = stress._model(treatment, 3, TINY).state_dict()
        assert plain.keys() <= state.keys(), name
        assert all(torch.equal(state[key], value) for key, value in plain.items()), name


def test_the_task_is_not_drawn_from_the_stream_of_the_weights():
    batch = next(sequences(TINY, 3))
    first = batch[:, : batch.shape[1] // 2]
    stream = torch.Generator().manual_seed(3)
    assert not torch.equal(first, torch.randint(TINY.vocab, first.shape, generator=stream))
    assert not torch.equal(batch, next(sequences(TINY, 4)))


def train_by_hand(treatment, rate, seed, training, penalty):
    """What `train` is, written out: AdamW, a warm-up of five steps and a cosine to 0 over the others, gradients clipped
    as one vector. Returns the loss of every step, and every fifth step the largest logit of all heads.
    """
    model, batches = stress._model(treatment, seed, training), sequences(training, seed)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1.0, betas=(0.9, 0.95), eps=1e-8, weight_decay=training.weight_decay, fused=True
    )
    losses, largest = [], []
    for step in range(20):
        share = (step + 1) / 5 if step < 5 else (1 + math.cos(math.pi * (step - 5) / 15)) / 2
        optimizer.param_groups[0]["lr"] = rate * share
        tokens = next(batches)
        scores = model(tokens[:, :-1])[:, 4:]  # of ten tokens, what is said about the last five
        loss = torch.nn.functional.cross_entropy(scores.reshape(-1, 7), tokens[:, 5:].reshape(-1))
        losses.append(loss.item())
        squares = [plug.logits().logsumexp(-1).square().mean() for plug in model.watched()]
        optimizer.zero_grad()
        (loss + penalty * sum(squares) if penalty else loss).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), training.max_norm)
        optimizer.step()
        clip_by_hand(model, treatment.threshold)
        if step % 5 == 4:
            largest.append(max(plug.largest().max().item() for plug in model.watched()))
    return losses, largest


def clip_by_hand(model, threshold):
    "Shrink the rows of every head whose largest logit is above the threshold; None is no threshold."
    for layer, plug in zip(model.layers, model.watched(), strict=True):
        if threshold is not None:
            sizes = plug.largest()
            assert torch.equal(
                qk_clip_(layer, sizes, threshold), torch.where(sizes > threshold, threshold / sizes, 1.0)
            )


@pytest.mark.parametrize(
    "name, threshold, penalty",
    [("plain", None, 0), ("scale", None, 0), ("softcap", None, 0), ("qk-clip", 0.5, 0), ("z-loss", None, 1e-4)],
)
def test_a_training_is_adamw_with_warm_up_cosine_and_a_clipped_gradient(monkeypatch, name, threshold, penalty):
    treatment = replace(TREATMENTS[name], threshold=threshold)  # so low that the clip has something to do
    tight = replace(TINY, max_norm=0.3, weight_decay=0.2)
    losses, largest = train_by_hand(treatment, 0.1, 4, tight, penalty)
    monkeypatch.setitem(TREATMENTS, name, treatment)
    run = train(name, 0.1, 4, tight)
    means = [sum(losses[i : i + 5]) / 5 for i in range(0, 20, 5)]  # a record is the mean of five steps
    assert run.losses == pytest.approx(means, rel=5e-3) and run.largest == pytest.approx(largest, rel=5e-3)


def test_what_each_layer_computes():
    "Every treatment's layer, beside the definition with the option that it promises."
    x = torch.randn(2, 9, 12)
    promised = {
        "scale": dict(scale=1 / 4),
        "softcap": dict(softcap=50.0),
        "sinks": dict(sinks=torch.zeros(3)),
        "off-by-one": dict(sinks=torch.zeros(3)),
    }
    for name in ("plain", "temperature", "qk-clip", "z-loss", *promised):
        layer = TREATMENTS[name].layer(12, 3)
        with torch.no_grad():
            layer.in_proj.weight.mul_(20)
        bare = MultiHeadAttention(12, 3, attend=partial(attention, impl="math", **promised.get(name, {})))
        bare.load_state_dict(layer.state_dict(), strict=False)
        torch.testing.assert_close(layer(x, is_causal=True), bare(x, is_causal=True), atol=1e-5, rtol=1e-4)
        scale = promised.get(name, {}).get("scale")
        plug = next(part for part in layer.modules() if isinstance(part, Watched))
        torch.testing.assert_close(plug.largest(), largest_logits(layer, x, is_causal=True, scale=scale))


def test_the_first_record_is_the_mean_of_the_first_steps():
    losses = []
    model_seed = train("plain", 1e-30, 5, TINY)  # so small a rate that nothing changes
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(5)
        model, batches = CopyModel(TINY, TREATMENTS["plain"].layer), sequences(TINY, 5)
        for _ in range(TINY.record):
            tokens = next(batches)
            losses.append(repeat_loss(model(tokens[:, :-1]), tokens).item())
        largest = max(plug.largest().max().item() for plug in model.watched())
    assert model_seed.losses[0] == pytest.approx(sum(losses) / 5, rel=5e-3)
    assert model_seed.largest[0] == pytest.approx(largest, rel=5e-3)


@pytest.mark.parametrize("name", ["plain", "qk-clip", "z-loss"])
def test_a_run_that_is_no_longer_finite_ends_and_has_diverged(name):
    run = train(name, 1e30, 0, TINY)
    assert len(run.losses) == len(run.largest) < POINTS and run.outcome(TINY) == "diverged"
    assert all(map(math.isfinite, run.losses + run.largest))


def test_an_unknown_treatment_is_named():
    with pytest.raises(ValueError, match="unknown treatment 'magic'; there are plain, scale"):
        train("magic", 0.1, 0, TINY)


# What counts as failing


def made_up(losses, name="plain", rate=0.1, seed=0):
    return Run(name, rate, seed, [loss * TINY.guessing for loss in losses], [1.0] * len(losses))


@pytest.mark.parametrize(
    "losses, outcome",
    [
        ([1.0, 0.5, 0.09, 0.09], "learned"),
        ([1.0, 0.02, 0.9, 0.05, 0.05], "learned"),  # it may rise in between
        ([1.0, 0.5, 0.15, 0.07], "stuck"),  # the mean of the last two
        ([1.0, 1.0, 1.0, 1.0], "stuck"),
        ([1.0, 0.5, 0.5, 0.6], "stuck"),
        ([1.0, 0.5, 0.5, 0.8], "diverged"),
        ([1.0, 0.2, 0.2, 1.0], "diverged"),
        ([1.0, 1.0, 1.4, 1.4, 1.0, 1.0], "diverged"),  # up, and back to guessing
        ([1.0, 0.05, 0.01], "diverged"),  # not finite after that
        ([], "diverged"),
    ],
)
def test_outcomes(losses, outcome):
    assert made_up(losses).outcome(replace(TINY, steps=5 * max(len(losses), 4))) == outcome


def ladder(**good):
    "Five runs at each of six rates: as many of them learn as is said."
    yes, no = [0.0] * POINTS, [1.0] * POINTS
    return [
        made_up(yes if seed < int(count) else no, name.replace("_", "-"), rate, seed)
        for name, counts in good.items()
        for rate, count in zip((1, 2, 3, 4, 5, 6), counts, strict=True)
        for seed in range(5)
    ]


def test_rungs_are_counted_seed_by_seed():
    runs = ladder(plain="554200", qk_norm="555555", gate="000000")
    assert learned(runs, TINY, "plain", 3) == (4, 5) and learned(runs, TINY, "plain", 7) == (0, 0)
    assert rungs(runs, TINY, "plain") == {0: 4, 1: 4, 2: 3, 3: 3, 4: 2}
    assert set(rungs(runs, TINY, "qk-norm").values()) == {6} and set(rungs(runs, TINY, "gate").values()) == {0}
    assert rungs(runs, TINY, "scale") == {}


@pytest.mark.parametrize(
    "gain, words",
    [
        (0.0, "no difference"),
        (0.74, "no difference"),
        (-0.74, "no difference"),
        (0.76, "helped a little"),
        (-1.0, "hurt a little"),
        (1.74, "helped a little"),
        (1.76, "helped"),
        (4.0, "helped"),
        (-2.0, "hurt"),
    ],
)
def test_what_is_less_than_a_rung_is_no_difference(gain, words):
    assert verdict(gain) == words


# The command


def said(capsys, *line):
    "What `mha-book stress LINE` says when it refuses."
    with pytest.raises(SystemExit) as stop:
        main(["stress", *line])
    assert stop.value.code == 2
    shown = capsys.readouterr()
    assert shown.out == "", "something was trained before the refusal"
    return shown.err


@pytest.mark.parametrize(
    "line, reason",
    [
        ("magic", "unknown treatment 'magic'; there are plain, scale"),
        ("--rates 0", "--rates [0.0]: learning rates are above 0"),
        ("--rates 0.1 nan", "learning rates are above 0"),
        ("--rates nan", "learning rates are above 0"),
        ("--rates 0.1 inf", "learning rates are above 0"),
        ("--rates fast", "invalid float value: 'fast'"),
        ("--seeds 0", "--seeds 0 from 0 on: at least one"),
        ("--seeds 2.5", "invalid int value"),
        ("--seed 2147483647 --seeds 2", "below 2**31"),
        ("--rates 0.1 nan 0.2", "learning rates are above 0"),
        ("--seed -1", "--seed -1 must be 0 or more"),
        ("--steps 50", "training.steps 50 must be more than warm_up 50"),
        ("--steps 205", "training.steps 205 is not a multiple of record 10"),
        ("--device cuda:7", "device 'cuda:7' is not there"),
        ("--device meta", "use cpu or cuda"),
        ("--json nowhere/stress.json", "cannot be written"),
        ("--json .", "cannot be written"),
        ("--json yours.json", "begin with stress"),
    ],
)
def test_refused_with_a_reason(capsys, line, reason):
    assert reason in said(capsys, *line.split())


def test_the_benchmark_leaves_the_stress_tests_names_alone(capsys, tmp_path):
    with pytest.raises(SystemExit):
        main(["bench", "layers", "--quick", "--device", "cpu", "--json", str(tmp_path / "stress-yours.json")])
    assert "begin with stress" in capsys.readouterr().err


@pytest.fixture
def fast(monkeypatch):
    "Trainings that take no time: at rates above 0.2 the plain layer fails."
    calls = []

    def quick(name, rate, seed, training, device):
        calls.append((name, rate, seed))
        loss = 3.4 if name == "plain" and rate > 0.2 else 0.01
        points = training.steps // training.record
        return Run(name, rate, seed, [3.4] + [loss] * (points - 1), [2.0] * points)

    monkeypatch.setattr(trials, "train", quick)
    return calls


LINE = ["stress", "plain", "qk-norm", "--rates", "0.3", "0.1", "--seeds", "2", "--seed", "3"]


def test_a_test_is_run_seed_by_seed_shown_and_read_back(tmp_path, capsys, fast):
    file = tmp_path / "stress.json"
    assert main([*LINE, "--json", str(file)]) == 0
    assert fast == [(name, rate, seed) for seed in (3, 4) for rate in (0.1, 0.3) for name in ("plain", "qk-norm")]
    shown, data = capsys.readouterr(), read_trials(file)
    assert [row.split() for row in shown.out.splitlines()[:3]] == [
        ["learned,", "of", "those", "run", "0.1", "0.3"],
        ["plain", "2/2", "0/2"],
        ["qk-norm", "2/2", "2/2"],
    ]
    assert shown.err == "" and list(tmp_path.iterdir()) == [file], "nothing is left beside the file"
    assert data.complete and data.threads == 1 and data.dtype == "float32" and (data.seed, data.seeds) == (3, 2)
    assert data.command == "mha-book " + " ".join(LINE[:3]) + (
        " --device cpu --seeds 2 --seed 3 --steps 200 --rates 0.3 0.1 --json stress.json"
    )
    assert data.training == Training() and data.treatments["plain"] == "nothing is held"
    assert str(tmp_path) not in file.read_text()
    args = cli._parser().parse_args([*data.command.split()[1:-1], str(file)])
    assert args.plan(args)[:3] == (["plain", "qk-norm"], [0.1, 0.3], Training())


def test_all_is_planned_unless_told():
    args = cli._parser().parse_args(["stress"])
    names, rates, training, device = args.plan(args)
    assert names == list(TREATMENTS) and len(rates) == 10 and training == Training() and device.type == "cpu"
    steps = [b / a for a, b in zip(rates, rates[1:])]
    assert all(1.35 < step < 1.47 for step in steps)  # a factor of √2, near enough


@pytest.mark.parametrize(
    "error, code, word",
    [
        (KeyboardInterrupt(), 130, "KeyboardInterrupt; what was trained"),
        (RuntimeError("no room"), 1, "by RuntimeError no room; what"),
    ],
)
def test_what_was_trained_before_it_stopped_is_kept(tmp_path, monkeypatch, capsys, fast, error, code, word):
    quick, threads = trials.train, torch.get_num_threads()

    def fails(*args):
        if len(fast) == 5:
            raise error
        return quick(*args)

    monkeypatch.setattr(trials, "train", fails)
    file = tmp_path / "stress.json"
    assert main([*LINE, "--json", str(file)]) == code
    data = read_trials(file)
    assert not data.complete and len(data.runs) == 5 and torch.get_num_threads() == threads
    shown = capsys.readouterr()
    assert word in shown.err and "-" in shown.out or "1/1" in shown.out


def test_nothing_trained_is_nothing_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(trials, "train", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    assert main([*LINE, "--json", str(tmp_path / "stress.json")]) == 130
    assert list(tmp_path.iterdir()) == [] and "written" not in capsys.readouterr().out


def test_the_screen_is_told_how_far_it_is(monkeypatch, capsys, fast):
    class Screen:
        text = ""

        def isatty(self):
            return True

        def flush(self):
            pass

        def write(self, text):
            self.text += text

    screen = Screen()
    monkeypatch.setattr("sys.stderr", screen)
    main(LINE)
    assert "3 of 8 done, about 0 min left" in screen.text and screen.text.endswith("\r\033[K")


def test_a_real_run_through_the_command(tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "Training", type("Small", (), dict(steps=20, __new__=lambda cls, steps: TINY)))
    file = tmp_path / "stress.json"
    assert main(["stress", "plain", "qk-clip", "--rates", "0.01", "--seeds", "1", "--json", str(file)]) == 0
    data = read_trials(file)
    assert data.runs == [train(name, 0.01, 0, TINY) for name in ("plain", "qk-clip")] and data.seconds > 0


# Files


def sample():
    "Trainings without fault, as they stand in a file."
    found, _ = run_trials(["plain", "qk-norm"], [0.1, 0.3], range(2), TINY, CPU, lambda *_: None)
    return found | dict(command="mha-book stress")


@pytest.fixture(scope="module")
def good():
    return sample()


def put(data, place, value):
    for key in place[:-1]:
        data = data[key]
    data[place[-1]] = value


@pytest.mark.parametrize(
    "place, value, fault",
    [
        (["schema"], 2, "schema 2; this version reads schema 1"),
        (["surprise"], 1, "file has unknown surprise"),
        (["date"], "2026-11-24T02:15:15", "is not in UTC"),
        (["device", "kind"], "abacus", "device.kind 'abacus'"),
        (["versions", "torch"], None, "file.versions.torch is None"),
        (["commit"], "/home/me", "commit '/home/me'"),
        (["command"], "", "command ''"),
        (["load"], -1.0, "load -1.0 is below 0"),
        (["seconds"], -1.0, "seconds -1.0 is below 0"),
        (["seconds"], math.nan, "file.seconds is nan, not finite"),
        (["seeds"], 0, "seeds 0 is below 1"),
        (["seeds"], 2.0, "file.seeds is 2.0, not int"),
        (["complete"], False, "complete is False, but there are 8 runs of 8"),
        (["complete"], 1, "file.complete is 1, not bool"),
        (["rates"], [0.3, 0.1], "do not ascend"),
        (["rates"], [0.1, 0.1, 0.3], "do not ascend"),
        (["rates"], [-0.1, 0.1], "do not ascend from above 0"),
        (["rates"], [], "at least one treatment, one rate and one run"),
        (["rates"], [0.1], "runs[2] ('plain', 0.3, 0) was not to be run"),
        (["runs"], [], "at least one treatment"),
        (["treatments"], {}, "at least one treatment"),
        (["treatments"], {"plain": "a"}, "runs[1] ('qk-norm', 0.1, 0) was not to be run"),
        (["treatments", "plain"], "a\x1b[31m", "cannot be printed"),
        (["runs", 0, "seed"], 2, "runs[0] ('plain', 0.1, 2) was not to be run"),
        (["runs", 0, "rate"], 0.3, "runs holds one of them twice"),
        (["runs", 0, "rate"], "0.1", "runs[0].rate is '0.1'"),
        (["runs", 0, "losses", 1], math.inf, "runs[0].losses[1] is inf, not finite"),
        (["runs", 0, "losses", 1], None, "runs[0].losses[1] is None"),
        (["runs", 0, "losses", 1], -1.0, "runs[0].losses holds a number below 0"),
        (["runs", 0, "largest", 1], -1.0, "runs[0].largest holds a number below 0"),
        (["runs", 0, "losses"], [1.0], "runs[0] has 1 losses and 4 largest logits, of 4"),
        (["runs", 0, "losses"], [1.0] * 5, "runs[0] has 5 losses"),
        (["training", "width"], 13, "training.width 13 is not a multiple of heads 3"),
        (["training", "steps"], 40.0, "training.steps is 40.0, not int"),
        (["training", "lr"], 1, "file.training has unknown lr"),
    ],
)
def test_a_tampered_file_is_refused_by_name(tmp_path, good, place, value, fault):
    data = copy.deepcopy(good)
    put(data, place, value)
    file = tmp_path / "stress.json"
    file.write_text(json.dumps(data))
    with pytest.raises(ValueError) as error:
        read_trials(file)
    assert str(error.value).startswith("stress.json: ") and fault in str(error.value)


def test_a_field_that_is_missing_is_named(tmp_path, good):
    for name in good:
        data = {key: value for key, value in good.items() if key != name}
        (tmp_path / "stress.json").write_text(json.dumps(data))
        with pytest.raises(ValueError, match=f"file lacks {name}"):
            read_trials(tmp_path / "stress.json")


def test_runs_that_are_missing_make_a_file_incomplete(tmp_path, good):
    data = copy.deepcopy(good)
    del data["runs"][-1]
    with pytest.raises(ValueError, match="complete is True, but there are 7 runs of 8"):
        write_file(Trials, tmp_path / "stress.json", data)
    assert list(tmp_path.iterdir()) == []
    write_file(Trials, tmp_path / "stress.json", data | dict(complete=False))
    assert len(read_trials(tmp_path / "stress.json").runs) == 7


def test_what_is_written_is_read_and_short(tmp_path, good):
    file = tmp_path / "stress.json"
    write_file(Trials, file, good)
    again = read_trials(file)
    assert asdict(again) == good and json.loads(file.read_text()) == good
    assert re.search(r'"losses": \[[\d.]+, [\d.]+, [\d.]+, [\d.]+\],\n', file.read_text()), "one line a list"


def test_brackets_in_a_text_stay_as_they_are(tmp_path, good):
    data = good | dict(command="mha-book stress [ 1,  2 ] [\\n3 ]")
    write_file(Trials, tmp_path / "stress.json", data)
    assert read_trials(tmp_path / "stress.json").command == data["command"]


def test_the_two_kinds_of_file_are_told_apart(tmp_path, good):
    write_file(Trials, tmp_path / "stress-yours.json", good)
    assert measurements(tmp_path) == {}
    with pytest.raises(ValueError, match="lacks machine, rounds, tables|file lacks"):
        read_file(Measurement, tmp_path / "stress-yours.json")
    write_file(Trials, tmp_path / "other.json", good)
    with pytest.raises(ValueError, match="other.json: file lacks"):
        measurements(tmp_path)


def test_a_table_says_where_nothing_was_run():
    runs = [run for run in ladder(plain="555000", qk_norm="555500") if (run.treatment, run.rate) != ("plain", 2)]
    assert [row.split() for row in show_trials(runs, TINY).splitlines()[1:]] == [
        ["plain", "5/5", "-", "5/5", "0/5", "0/5", "0/5"],
        ["qk-norm", "5/5", "5/5", "5/5", "5/5", "0/5", "0/5"],
    ]


def test_the_books_own_file_is_whole_small_and_of_these_treatments():
    file = ROOT / "nbs" / "measured" / "stress.json"
    data = read_trials(file)
    assert data.complete and data.seeds >= 5 and data.threads == 1 and file.stat().st_size < 400_000
    assert data.training == Training() and data.rates == cli.RATES
    assert not re.search(r"/(home|root|tmp)", file.read_text())
    assert data.treatments == {name: one.what for name, one in TREATMENTS.items()}
    assert measured.measurements(file.parent).keys() == {"cpu"} | {
        p.stem for p in file.parent.glob("*.json") if not p.stem.startswith(measured.OTHERS)
    }
