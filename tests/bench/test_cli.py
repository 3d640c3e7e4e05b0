"""`mha-book bench`: what it refuses, what it measures, what it writes; and that a false file is not read."""

import copy
import json
import math
import subprocess
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._inductor import cpp_builder
from torch._inductor.exc import InvalidCxxCompiler

from mha_book.bench import by_steps, cli, contests, keeping, measured, suites
from mha_book.bench import memory as what_fits
from mha_book.bench.cli import main
from mha_book.bench.measured import Row, Table, measurements, read_measurement, side_by_side, write_measurement
from mha_book.bench.memory import LOGITS
from mha_book.bench.suites import SUITES, Setting, no_compiler
from mha_book.instruments.device import peak_bytes
from mha_book.lab.nine_ways import NINE_WAYS

pytestmark = pytest.mark.usefixtures("own_messages")
SMALL = Setting(2, 16, 48, 6, torch.device("cpu"), torch.float32)


@pytest.fixture
def quick(monkeypatch):
    "Measurements that take no time: a machine that is made up, and blocks of one call."
    timed = contests.benchmark
    monkeypatch.setattr(
        cli, "measure_machine", lambda device, dtype: contests.Machine("this CPU", 1e11, 3e10, "made up")
    )
    monkeypatch.setattr(contests, "benchmark", lambda calls, **more: timed(calls, **more | dict(min_seconds=1e-6)))


def said(capsys, *line):
    "What `mha-book bench LINE` says when it refuses."
    with pytest.raises(SystemExit) as stop:
        main(["bench", *line])
    assert stop.value.code == 2
    shown = capsys.readouterr()
    assert shown.out == "", "something was measured before the refusal"
    return shown.err


# Refusals


@pytest.mark.parametrize(
    "line, reason",
    [
        ("fastest", "unknown suite 'fastest'; there are layers, ways, backends, compile, decode"),
        ("layers --rounds 14", "--rounds 14: quartiles of fewer than 15"),
        ("layers --seed -1", "--seed -1 must be 0 or more"),
        ("layers --quick --sizes 1,8,48,6", "not both"),
        ("layers --sizes 4,256,768", "needed are four integers"),
        ("layers --sizes 4,256,768,twelve", "needed are four integers"),
        ("layers --sizes 4,0,768,12", "at least 1"),
        ("layers --sizes 4,256,768,10", "10 heads do not divide a width of 768"),
        ("layers --sizes 1,8,48,6 64,262144,768,12", "need up to"),
        ("layers --device cuda:7", "device 'cuda:7' is not there"),
        ("layers --device meta", "no clock for it"),
        ("layers --dtype int8", "--dtype int8: needed is"),
        ("layers --dtype float8_e4m3fn", "needed is"),
        ("layers --dtype einsum", "--dtype einsum: needed is"),
        ("layers --json nowhere/at/all.json", "cannot be written"),
        ("layers --json .", "cannot be written"),
    ],
)
def test_refused_with_a_reason(capsys, line, reason):
    assert reason in said(capsys, *line.split(), *([] if "--device" in line else ["--device", "cpu"]))


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
@pytest.mark.parametrize("slower, refused", [(3.0, True), (0.5, False)])
def test_halves_on_a_cpu_are_refused_where_they_were_measured_slow(monkeypatch, slower, refused, name):
    timing = contests.benchmark({0: lambda: None, 1: lambda: None}, device="cpu", rounds=3, min_seconds=1e-6)[1]
    fake = type(timing)(slower, slower, slower, 1.0, 0)
    monkeypatch.setattr(what_fits, "benchmark", lambda calls, **more: {"float32": timing, name: fake})
    if refused:
        with pytest.raises(ValueError, match=f"{name}.*3.0 x as long as in float32 .just measured"):
            what_fits.chosen_dtype(name, torch.device("cpu"))
    else:
        assert what_fits.chosen_dtype(name, torch.device("cpu")) == getattr(torch, name)


def test_float64_on_a_gpu_is_refused(monkeypatch):
    with pytest.raises(ValueError, match="do not take it on a GPU"):
        what_fits.chosen_dtype("float64", torch.device("cuda"))
    assert what_fits.chosen_dtype("float64", torch.device("cpu")) == torch.float64
    for real, dtype in ((True, torch.bfloat16), (False, torch.float16)):  # older GPUs imitate bfloat16
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: real or including_emulation)
        assert what_fits.chosen_dtype(None, torch.device("cuda")) == dtype


def test_without_a_compiler_the_suite_is_refused_and_the_rest_is_not(monkeypatch, capsys, quick):
    monkeypatch.setattr(cli, "no_compiler", lambda device: "there is none")
    assert "suite compile: there is none" in said(capsys, "compile")
    args = cli._parser().parse_args(["bench", "--quick", "--device", "cpu"])
    assert {suite for suite, _ in cli._plan(args)[2]} == set(SUITES) - {"compile", "flex"}
    assert "Nothing is compiled: there is none" in capsys.readouterr().err
    cli._plan(cli._parser().parse_args(["bench", "layers", "--quick", "--device", "cpu"]))
    assert capsys.readouterr().err == "", "nothing was to be compiled"


def test_no_compiler_is_found_out(monkeypatch):
    def find():
        raise InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", find)
    assert "needs a C++ compiler" in no_compiler(torch.device("cpu"))
    monkeypatch.undo()
    monkeypatch.setattr(suites, "compile_now", lambda *_: 1 / 0)
    assert no_compiler(torch.device("cpu")) == "torch.compile fails here: division by zero"


def test_free_memory_that_cannot_be_read_refuses_nothing(monkeypatch):
    vast = Setting(64, 262144, 768, 12, torch.device("cpu"), torch.float32)
    with pytest.raises(ValueError, match="GiB are free"):
        what_fits.check_memory(vast)
    monkeypatch.setattr(what_fits, "free_bytes", lambda device: None)
    what_fits.check_memory(vast)


def test_a_decoding_step_holds_no_logits(monkeypatch):
    at = Setting(1, 512, 48, 6, torch.device("cpu"), torch.float32)
    steps = next(suites.decode(at)).calls
    with torch.no_grad():
        assert all(peak_bytes(call, "cpu") < 6 * 512**2 * 4 for call in steps.values())
    monkeypatch.setattr(what_fits, "free_bytes", lambda device: 2**20)
    cli._plan(cli._parser().parse_args(["bench", "decode", "--device", "cpu"]))
    with pytest.raises(ValueError, match="GiB are free"):
        cli._plan(cli._parser().parse_args(["bench", "layers", "--device", "cpu"]))


def test_a_timed_step_can_be_taken_again():
    for contest in suites.decode(SMALL):
        for call in contest.calls.values():
            with torch.no_grad():
                assert torch.equal(call(), call())


def test_weights_need_memory_too(monkeypatch):
    wide = Setting(1, 2, 4096, 4, torch.device("cpu"), torch.float32)
    monkeypatch.setattr(what_fits, "free_bytes", lambda device: 4 * 4 * 4096**2)  # the layer's own
    with pytest.raises(ValueError, match="GiB are free"):
        what_fits.check_memory(wide)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_contestant_holds_more_logits_than_the_check_supposes(dtype):
    at = Setting(1, 256, 48, 6, torch.device("cpu"), dtype)
    peaks = {}
    for suite in ("layers", "ways", "backends"):
        for contest in SUITES[suite](at):
            for name, call in contest.calls.items():
                with torch.set_grad_enabled(contest.train):
                    peaks[suite, contest.mode, name] = peak_bytes(call, "cpu") / (6 * 256**2 * dtype.itemsize)
    worst = max(peaks, key=peaks.get)
    assert LOGITS / 2 < peaks[worst] <= LOGITS, worst


# A run, and what it writes


def test_a_run_is_printed_written_and_read_back(tmp_path, capsys, quick):
    file = tmp_path / "mine.json"
    assert (
        main(["bench", "layers", "ways", "--sizes", "2,16,48,6", "--device", "cpu", "--seed", "3", "--json", str(file)])
        == 0
    )
    shown, data = capsys.readouterr().out, read_measurement(file)
    no_mask = ("forward, no mask", "forward, no mask, gradients on")
    assert [(t.suite, t.mode) for t in data.tables] == [
        (suite, mode)
        for suite, more in (("layers", no_mask), ("ways", ()))
        for mode in ("forward", "forward and backward", *more)
    ]
    assert (data.device["kind"], data.dtype, data.threads, data.seed, data.rounds) == ("cpu", "float32", 1, 3, 15)
    assert data.versions["torch"] == torch.__version__ and data.versions["mha_book"]
    assert data.command.startswith("mha-book bench layers ways ") and data.command.endswith("--json mine.json")
    for table in data.tables:
        assert table.rows[0].ratio is not None and len({row.name for row in table.rows}) == len(table.rows)
        for row in table.rows:
            assert row.name in shown and (row.note in shown)
            if row.ratio is not None:
                assert row.share == pytest.approx(table_flops(table) / row.seconds / 1e11)
    assert "A/A band" in shown and list(tmp_path.iterdir()) == [file], "nothing is left beside the file"


def table_flops(table):
    "What the layer needs: projections, and attention, causal but for one contest; backward twice."
    b, n, e, h = table.size
    pairs = n * n if "no mask" in table.mode else n * (n + 1) // 2
    forward = 8 * b * n * e**2 + 4 * b * h * pairs * (e // h)
    return forward * (3 if "backward" in table.mode else 1)


def test_the_seed_fixes_the_weights_whatever_was_drawn_before(monkeypatch, quick):
    weights, make = [], Setting.layer_and_tokens

    def remember(at, train):
        layer, x = make(at, train)
        weights.append(layer.in_proj.weight.detach().clone())
        return layer, x

    monkeypatch.setattr(Setting, "layer_and_tokens", remember)
    for seed in ("3", "3", "4"):
        torch.randn(len(weights) + 1)
        main(["bench", "ways", "--sizes", "1,8,48,6", "--device", "cpu", "--seed", seed])
    assert torch.equal(weights[0], weights[2]) and not torch.equal(weights[0], weights[4])


@pytest.mark.parametrize(
    "error, code, word",
    [(KeyboardInterrupt(), 130, "stopped"), (RuntimeError("no room\nleft"), 1, "RuntimeError: no room left")],
)
def test_what_was_measured_before_a_failure_is_kept(tmp_path, monkeypatch, capsys, quick, error, code, word):
    def fails(at):
        yield next(suites.ways(at))
        raise error

    monkeypatch.setitem(SUITES, "ways", fails)
    file = tmp_path / "m.json"
    line = ["bench", "ways", "layers", "--sizes", "1,8,48,6", "--device", "cpu", "--json", str(file)]
    assert main(line) == code
    rest = [] if code == 130 else ["layers"] * 4
    assert [table.suite for table in read_measurement(file).tables] == ["ways", *rest]
    assert word in capsys.readouterr().err


def test_all_is_measured_on_the_threads_that_it_was_compiled_for(monkeypatch, quick):
    threads = []

    def look(at):
        threads.append(torch.get_num_threads())
        return iter(())

    monkeypatch.setitem(SUITES, "compile", look)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        main(["bench", "compile", "--sizes", "1,8,48,6", "--device", "cpu"])
        assert threads == [1] and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_the_command_in_the_file_makes_the_same_plan():
    line = "bench ways layers --device cpu --dtype float64 --rounds 20 --seed 3 --sizes 1,8,48,6 2,8,48,6 --json "
    args = cli._parser().parse_args([*line.split(), "x/m.json"])
    assert keeping._command(args) == f"mha-book {line}m.json"
    quick_look = cli._parser().parse_args(["bench", "--quick", "--json", "m.json"])
    assert keeping._command(quick_look) == "mha-book bench --rounds 15 --seed 0 --quick --json m.json"


def test_a_table_on_screen():
    rows = [
        Row("base", 1.0, 0.98, 1.01, 0.002, 3 * 2**20, 0.5, None, ""),
        Row("within the band from above", 1.02, 1.01, 1.03, 0.00204, 3 * 2**10, 0.49, None, ""),
        Row("outside it", 0.97, 0.96, 0.98, 0.00194, 3 * 2**20, 0.51, 2.25, ""),
        Row("none", *[None] * 7, "why not"),
    ]
    assert contests.show(Table("ways", "forward", [2, 5, 48, 6], rows)).split("\n")[3:] == [
        "  base                        1.00 (0.98 to 1.01)        2.000      3.0 MiB          50%  <- A/A band",
        "  within the band from above  = 1.02 (1.01 to 1.03)      2.040      3.0 KiB          49%",
        "  outside it                  0.97 (0.96 to 0.98)        1.940      3.0 MiB          51%  compiled in 2.2 s",
        "  none                        why not",
    ]


def test_the_file_tells_no_path_and_no_user(tmp_path, monkeypatch, quick):
    monkeypatch.setenv("USER", "somebody")
    folder = tmp_path / "private"
    folder.mkdir()
    main(["bench", "layers", "--sizes", "1,8,48,6", "--device", "cpu", "--json", str(folder / "m.json")])
    text = (folder / "m.json").read_text()
    assert not any(secret in text for secret in ("private", "somebody", str(Path.home()), str(tmp_path)))


def test_a_busy_machine_is_named_on_screen_and_in_the_file(tmp_path, monkeypatch, capsys, quick):
    monkeypatch.setattr(measured.os, "getloadavg", lambda: (99.0, 0, 0))
    main(["bench", "layers", "--sizes", "1,8,48,6", "--device", "cpu", "--json", str(tmp_path / "m.json")])
    assert "WARNING: this machine is busy (load 99.0" in capsys.readouterr().err
    assert "BUSY" in read_measurement(tmp_path / "m.json").head
    monkeypatch.setattr(measured.os, "getloadavg", lambda: (0.0, 0, 0))
    main(["bench", "layers", "--sizes", "1,8,48,6", "--device", "cpu", "--json", str(tmp_path / "m.json")])
    assert "WARNING" not in capsys.readouterr().err and "BUSY" not in read_measurement(tmp_path / "m.json").head


def test_every_suite_offers_its_contests_and_says_who_is_absent():
    for name in ("layers", "ways", "backends", "decode"):
        for contest in SUITES[name](SMALL):
            with torch.set_grad_enabled(contest.train):
                results = [call() for call in contest.calls.values()]
            assert len(results) > 1 and not set(contest.calls) & set(contest.absent)
            assert all(contest.absent.values())
            if results[0] is not None:
                for y in results[1:]:
                    torch.testing.assert_close(y, results[0], atol=1e-5, rtol=1e-4)
    train = list(suites.ways(SMALL))[1]
    assert train.absent == {"FlexAttention": "no backward on a CPU"}


def test_each_backend_runs_and_runs_backward(monkeypatch):
    ran, run = [], suites.attention
    monkeypatch.setattr(
        suites, "attention", lambda *args, impl, **more: ran.append(impl) or run(*args, impl=impl, **more)
    )
    for contest in suites.backends(SMALL):
        for impl, call in contest.calls.items():
            ran.clear()
            for t in contest.inputs:
                t.grad = None
            with torch.set_grad_enabled(contest.train):
                call()
            assert ran == [impl]
            assert all((t.grad is not None) == contest.train for t in contest.inputs), (contest.mode, impl)


def test_flops_are_those_of_the_pairs_that_are_left():
    flops = {contest.mode: contest.flops for contest in suites.backends(SMALL)}
    b, n, e, h = SMALL.size
    for mode, window in (("forward, causal", n), ("forward, causal, window 4", 4)):
        pairs = sum(0 <= i - j < window for i in range(n) for j in range(n))
        assert flops[mode] == 4 * b * h * pairs * (e // h)
    assert flops["forward and backward, causal, window 4"] == 3 * flops["forward, causal, window 4"]


def test_the_fast_path_is_in_eval_and_the_others_are_not():
    calls = next(suites.layers(SMALL)).calls
    inside = {name: dict(zip(call.__code__.co_freevars, call.__closure__)) for name, call in calls.items()}
    assert not inside["nn.MultiheadAttention, fast path"]["fast"].cell_contents.training
    assert inside["nn.MultiheadAttention, no weights"]["torchs"].cell_contents.training


@pytest.mark.parametrize("size, there", [((1, 8, 64, 4), True), ((4, 256, 768, 12), False)])
def test_without_a_mask_small_layers_only(size, there):
    modes = [contest.mode for contest in suites.layers(Setting(*size, torch.device("cpu"), torch.float32))]
    assert ("forward, no mask" in modes) == there


def test_a_gpu_takes_the_large_size_once(monkeypatch):
    monkeypatch.setattr(by_steps, "pick_device", lambda name: torch.device(name))
    monkeypatch.setattr(what_fits, "free_bytes", lambda device: None)
    monkeypatch.setattr(cli, "no_compiler", lambda device: "")
    for device, suites_with_it in (("cpu", ["layers"]), ("cuda", list(SUITES))):
        plan = cli._plan(cli._parser().parse_args(["bench", "--device", device]))[2]
        assert [suite for suite, at in plan if at.size == cli.LARGE] == suites_with_it


def test_compiled_contestants_compute_the_same_and_took_time(monkeypatch):
    monkeypatch.setattr(suites, "NINE_WAYS", {name: NINE_WAYS[name] for name in ("split", "SDPA, causal flag")})
    if reason := no_compiler(torch.device("cpu")):
        pytest.skip(reason)
    layer, nine = suites.compile_suite(SMALL)
    for contest, names in (layer, ["compiled", "compiled and frozen"]), (nine, ["split", "SDPA, causal flag"]):
        with torch.no_grad():
            eager, *others = (call() for call in contest.calls.values())
        assert list(contest.compile_seconds) == names
        assert all(seconds > 0.01 for seconds in contest.compile_seconds.values())
        for y in others:
            torch.testing.assert_close(y, eager, atol=1e-5, rtol=1e-4)


# Files


def sample():
    "A measurement without fault, as it stands in a file."
    rows = [
        Row("base", 1.0, 0.98, 1.03, 2e-3, 4096, 0.5, None, ""),
        Row("slow", 1.5, 1.4, 1.6, 3e-3, 8192, 0.3, 2.5, ""),
        Row("twin", 0.98, 0.97, 1.0, 2e-3, 4096, 0.5, None, ""),
        Row("none", *[None] * 7, "no backward on a CPU"),
    ]
    table = asdict(Table("ways", "forward", [2, 5, 48, 6], rows))
    return measured.provenance(torch.device("cpu")) | dict(
        command="mha-book bench ways",
        dtype="float32",
        threads=1,
        seed=0,
        rounds=15,
        machine=dict(flops=1e11, bandwidth=3e10),
        tables=[table],
    )


TABLE = sample()["tables"][0]


def put(data, place, value):
    for key in place[:-1]:
        data = data[key]
    data[place[-1]] = value


@pytest.mark.parametrize(
    "place, value, fault",
    [
        (["schema"], 2, "schema 2; this version reads schema 1"),
        (["schema"], "1", "schema '1'; this version"),
        (["surprise"], 1, "file has unknown surprise"),
        (["rounds"], 15.5, "file.rounds is 15.5, not int"),
        (["seed"], True, "file.seed is True, not int"),
        (["date"], "yesterday", "yesterday"),
        (["date"], "2026-11-24T02:15:15", "is not in UTC"),
        (["device", "kind"], "abacus", "device.kind 'abacus'"),
        (["dtype"], "", "dtype ''"),
        (["commit"], "/home/me", "commit '/home/me'"),
        (["tables", 0, "rows", 1, "name"], "a\x1b[31m", "cannot be printed"),
        (["tables", 0, "rows", 3, "seconds"], 1.0, "has no ratio, but other numbers"),
        (["device"], [], "file.device is"),
        (["device", "name"], None, "device does not say 'name'"),
        (["versions", "torch"], 2.13, "file.versions.torch is 2.13, not str"),
        (["machine", "flops"], math.nan, "machine.flops is nan, not finite"),
        (["machine", "flops"], math.inf, "machine.flops is inf, not finite"),
        (["machine", "flops"], -1.0, "flops -1.0 is below 0"),
        (["command"], "", "command ''"),
        (["rounds"], 0, "rounds 0 is below 3"),
        (["cores"], 0, "cores 0 is below 1"),
        (["threads"], 0, "threads 0 is below 1"),
        (["seed"], -1, "seed -1 is below 0"),
        (["load"], -1.0, "load -1.0 is below 0"),
        (["machine", "bandwidth"], 0, "machine does not say 'bandwidth'"),
        (["tables"], {}, "file.tables is {}"),
        (["tables"], [], "at least one table"),
        (["tables"], [TABLE, TABLE], "none of them twice"),
        (["tables", 0, "rows", 2, "name"], "slow", "has a row twice"),
        (["tables", 0, "rows", 0], dict(TABLE["rows"][0], ratio=3.0, high=3.0), "no ratio of a thing to itself"),
        (["tables", 0, "rows", 1, "peak_bytes"], -5, "peak_bytes -5 is below 0"),
        (["tables", 0, "rows", 1, "share"], -1.0, "share -1.0 is below 0"),
        (["tables", 0, "rows", 1, "compile_seconds"], -1.0, "compile_seconds -1.0 is below 0"),
        (["tables", 0, "size"], [2, 5, 48], "not batch, tokens, width, heads"),
        (["tables", 0, "size", 1], 0, "not batch, tokens, width, heads"),
        (["tables", 0, "rows"], [], "has no measured base"),
        (["tables", 0, "rows", 0, "ratio"], None, "neither a ratio nor a note"),
        (["tables", 0, "rows", 1, "ratio"], "1.5", "rows[1].ratio is '1.5'"),
        (["tables", 0, "rows", 1, "ratio"], -1.5, "are not a timing"),
        (["tables", 0, "rows", 1, "high"], 1.45, "are not a timing"),
        (["tables", 0, "rows", 1, "low"], None, "are not a timing"),
        (["tables", 0, "rows", 1, "seconds"], 0.0, "are not a timing"),
        (["tables", 0, "rows", 1, "peak_bytes"], 1.5, "peak_bytes is 1.5"),
        (["tables", 0, "rows", 3, "note"], "", "neither a ratio nor a note"),
    ],
)
def test_a_tampered_file_is_refused_by_name(tmp_path, place, value, fault):
    data = copy.deepcopy(sample())
    put(data, place, value)
    file = tmp_path / "book.json"
    file.write_text(json.dumps(data))
    with pytest.raises(ValueError) as error:
        read_measurement(file)
    assert str(error.value).startswith("book.json: ") and fault in str(error.value)


def test_a_commit_is_named_with_a_plus_where_the_package_differs(tmp_path, monkeypatch):
    def git(*words):
        subprocess.run(
            ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b", *words],
            check=True,
            capture_output=True,
        )

    monkeypatch.setenv("GIT_DIR", "/nowhere")
    assert measured._commit(tmp_path) is None
    monkeypatch.delenv("GIT_DIR")
    (tmp_path / "mha_book").mkdir()
    for name in ("settings.ini", "mha_book/a.py"):
        (tmp_path / name).write_text("a")
    git("init")
    git("add", ".")
    git("commit", "-m", "a")
    monkeypatch.setenv("GIT_DIR", "/nowhere")  # as inside a hook
    clean = measured._commit(tmp_path)
    assert len(clean) == 40
    (tmp_path / "yours.json").write_text("a")
    assert measured._commit(tmp_path) == clean
    (tmp_path / "mha_book" / "b.py").write_text("a")
    assert measured._commit(tmp_path) == clean + "+"
    run = measured._run
    monkeypatch.setattr(measured, "_run", lambda *words: None if "status" in words else run(*words))
    assert measured._commit(tmp_path) == clean + "+", "a state that is not known is not clean"


def test_a_gpu_is_described(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(name="Fast GPU", uuid="ab"))
    answers = ("580.1, 1980\n", "580.1", 1980.0), ("580.1, [N/A]", "580.1", None), (None, None, None)
    for answer, driver, clock in answers:
        asked = []
        monkeypatch.setattr(measured, "_run", lambda *words: asked.append(words) or answer)
        assert measured._describe(torch.device("cuda")) == {
            "kind": "cuda",
            "name": "Fast GPU",
            "driver": driver,
            "clock_max_mhz": clock,
        }
        assert asked[0][-2:] == ("-i", "GPU-ab")


@pytest.mark.parametrize("text, number", [("2596.100", 2596.1), (" 1980 ", 1980.0), ("Unknown", None), ("", None)])
def test_clocks_that_are_no_numbers(text, number):
    assert measured._number(text) == number


@pytest.mark.parametrize(
    "load, cores, busy", [(None, 2, False), (1.0, 2, False), (1.2, 2, True), (0.3, 1, False), (0.8, 1, True)]
)
def test_busy_is_no_free_core(load, cores, busy):
    assert measured.is_busy(load, cores) == busy


def test_a_number_beyond_all_floats_is_refused(tmp_path):
    text = json.dumps(sample()).replace("0.002", "1e999", 1)
    (tmp_path / "book.json").write_text(text)
    with pytest.raises(ValueError, match="seconds is inf, not finite"):
        read_measurement(tmp_path / "book.json")


@pytest.mark.parametrize("name", sorted(sample()))
def test_a_field_that_is_missing_is_named(tmp_path, name):
    data = sample()
    del data[name]
    (tmp_path / "book.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match=f"file lacks {name}"):
        read_measurement(tmp_path / "book.json")


@pytest.mark.parametrize("text", ["", "{", "[]", '"a"', "null", "[" * 100_000])
def test_what_is_no_measurement_is_refused(tmp_path, text):
    (tmp_path / "book.json").write_text(text)
    with pytest.raises(ValueError, match="book.json: "):
        read_measurement(tmp_path / "book.json")


def test_a_false_measurement_is_not_written_and_the_old_file_stays(tmp_path):
    file = tmp_path / "m.json"
    write_measurement(file, sample())
    before, wrong = file.read_text(), sample()
    wrong["tables"][0]["rows"][1]["ratio"] = math.nan
    with pytest.raises(ValueError):
        write_measurement(file, wrong)
    assert file.read_text() == before and list(tmp_path.iterdir()) == [file]


def test_the_readers_column_stands_beside_the_books(tmp_path):
    write_measurement(tmp_path / "cpu.json", sample())
    yours = sample()
    yours["device"] |= dict(kind="cuda", name="Fast GPU")
    yours["tables"][0]["rows"] = yours["tables"][0]["rows"][:2]
    write_measurement(tmp_path / "yours.json", yours)
    write_measurement(tmp_path / "zebra.json", sample() | dict(tables=[TABLE | dict(mode="backward")]))
    found = measurements(tmp_path)
    assert list(found) == ["cpu", "zebra", "yours"]
    shown = side_by_side(found, "ways", "forward", [2, 5, 48, 6]).split("\n")
    heads, columns, *rows = shown[1:3], shown[4], *shown[5:]
    assert heads[0].startswith("cpu: CPU, one thread: ") and heads[1].startswith("yours: Fast GPU, float32, torch ")
    assert columns.split() == ["cpu", "yours"]
    assert [row.split("  ")[0] for row in rows] == ["base", "slow", "twin", "none"]
    assert rows[1].count("1.50 (1.40 to 1.60)") == 2
    assert "= 0.98 (0.97 to 1.00)" in rows[2] and rows[2].endswith("-") and "no backward on a CPU" in rows[3]
    assert "mha-book bench ways --sizes 1,2,3,4 " not in shown
    assert "mha-book bench ways --sizes 1,2,3,3 " in side_by_side(found, "ways", "forward", [1, 2, 3, 3])
    with pytest.raises(FileNotFoundError, match="no folder.*none"):
        measurements(tmp_path / "none")


def test_the_books_own_measurements_can_be_read():
    folder = Path(__file__).resolve().parents[2] / "nbs" / "measured"
    for name, found in measurements(folder).items():
        assert found.rounds >= 15 and (found.threads == 1 or found.device["kind"] != "cpu"), name
