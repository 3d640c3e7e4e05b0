"""How the commands end: broken off in whatever way, they keep what was measured, say one line, and leave a code."""

import contextlib
import errno
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from mha_book.bench import ablations, by_steps, cli, contests, ending, files, subjects, trials
from mha_book.bench.ablations import read_ablations
from mha_book.bench.cli import main
from mha_book.bench.measured import read_measurement
from mha_book.bench.suites import SUITES, Contest
from mha_book.bench.trials import read_trials
from mha_book.instruments.device import Timing
from mha_book.lab.stress import Run
from mha_book.models.language_model import LanguageModel, LanguageModelConfig
from support.refusals import refused

pytestmark = pytest.mark.usefixtures("own_messages")
ROOT = Path(__file__).resolve().parents[2]
LINES = {
    "bench": "bench layers --sizes 1,2,6,3 --device cpu --json {}/m.json",
    "stress": "stress plain --rates 0.1 0.2 0.4 --seeds 1 --json {}/stress-mine.json",
    "heads": "heads --passages 3 --json {}/heads-mine.json",
}


@pytest.fixture(autouse=True)
def at_a_terminal():
    "Signals do what they do at a terminal: a shell starts what it puts into the background deaf to Ctrl-C."
    before = {number: signal.getsignal(number) for number in ending.ENDING}
    for number in before:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    yield
    for number, old in before.items():
        signal.signal(number, old)


@pytest.fixture
def steps(monkeypatch):
    "What the commands measure, in three steps that take no time; one that is named in `fails` does that instead."
    fails = {}

    def step(number):
        fails.get(number, lambda: None)()
        return number

    def suite(at):
        for number in range(3):
            step(number)
            yield Contest(f"contest {number}", {"a": lambda: None}, (), 1)

    def train(name, rate, seed, training, device):
        step([0.1, 0.2, 0.4].index(rate))
        return Run(name, rate, seed, [3.0] * 20, [2.0] * 20)

    def losses(model, skipped, rows):
        for number, _ in enumerate(rows):
            step(number)
            yield 2.0, torch.full((2, 6), 2.5)

    monkeypatch.setattr(cli, "measure_machine", lambda *_: contests.Machine("this CPU", 1e11, 3e10, "made up"))
    monkeypatch.setattr(contests, "benchmark", lambda calls, **more: {"a": Timing(1.0, 0.9, 1.1, 1e-3, 64)})
    monkeypatch.setitem(SUITES, "layers", suite)
    monkeypatch.setattr(trials, "train", train)
    sizes = dict(vocab_size=11, embed_dim=12, num_layers=2, num_heads=6, num_kv_heads=3, head_dim=2)
    config = LanguageModelConfig(**sizes, hidden_dim=7, max_len=9, rope_base=100.0, eps=1e-5)
    monkeypatch.setattr(subjects, "package_file", lambda *file: None)
    monkeypatch.setattr(cli, "load_smollm2", lambda device: (LanguageModel(config), None))
    monkeypatch.setattr(ablations, "texts", lambda *_: {"words": (0, [torch.zeros(1, 5, dtype=torch.long)] * 3)})
    monkeypatch.setattr(ablations, "_without_each_head", losses)
    return fails


def kept(file):
    "How many steps a file holds; 0 where there is none."
    if not file.exists():
        return 0
    if file.name.startswith("stress"):
        return len(read_trials(file).runs)
    if file.name.startswith("heads"):
        return read_ablations(file).tokens["words"] // 4  # four tokens a text
    return len(read_measurement(file).tables)


def raises(error):
    def fail():
        raise error

    return fail


def sends(*numbers):
    def fail():
        for number in numbers:
            signal.raise_signal(number)

    return fail


@pytest.mark.parametrize("command", LINES)
@pytest.mark.parametrize(
    "fail, code, words",
    [
        (sends(signal.SIGINT), 130, "stopped by Ctrl-C"),
        (sends(signal.SIGINT, signal.SIGINT, signal.SIGTERM), 130, "stopped by Ctrl-C"),
        (sends(signal.SIGTERM), 143, "stopped by SIGTERM"),
        (sends(signal.SIGHUP), 129, "stopped by SIGHUP"),
        (raises(KeyboardInterrupt()), 130, "stopped by Ctrl-C"),
        (raises(BrokenPipeError(errno.EPIPE, "Broken pipe")), 141, "stopped, for nobody reads the output any more"),
        (raises(OSError(errno.ENOSPC, "No space")), 1, "stopped by OSError: [Errno 28] No space"),
    ],
)
@pytest.mark.parametrize("after", [0, 1, 2])
def test_whatever_breaks_it_off_what_was_measured_is_kept(steps, tmp_path, capsys, command, fail, code, words, after):
    (file,) = [Path(word) for word in LINES[command].format(tmp_path).split() if word.endswith(".json")]
    file.write_text("old")
    steps[after] = fail
    assert main(LINES[command].format(tmp_path).split()) == code
    assert [*tmp_path.iterdir()] == [file]
    said = capsys.readouterr().err.splitlines()
    outcome = f"what was measured is in {file}" if after else "nothing was measured, and nothing is written"
    assert [line for line in said if "WARNING" not in line] == [f"{words}; {outcome}"]
    assert kept(file) == after if after else file.read_text() == "old"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler, "signals do what they did before"


@pytest.mark.parametrize("command", LINES)
def test_a_whole_run_is_kept_and_said(steps, tmp_path, capsys, command):
    line = LINES[command].format(tmp_path).split()
    assert main(line) == 0 and kept(Path(line[-1])) == 3
    assert f"written: {line[-1]}" in capsys.readouterr().out
    assert main(line[:-2]) == 0 and "not written: no --json" in capsys.readouterr().out


@pytest.mark.parametrize("command", LINES)
@pytest.mark.parametrize("sent", [True, False])
def test_ctrl_c_while_the_file_is_written(steps, tmp_path, capsys, monkeypatch, command, sent):
    "A signal waits until the file is written. An interruption from elsewhere leaves the old file."
    line = LINES[command].format(tmp_path).split()
    file, replace = Path(line[-1]), os.replace
    file.write_text("old")

    def interrupted(*paths):
        sends(signal.SIGINT)() if sent else raises(KeyboardInterrupt())()
        replace(*paths)

    monkeypatch.setattr(files.os, "replace", interrupted)
    assert main(line) == 130 and [*tmp_path.iterdir()] == [file]
    assert kept(file) == 3 if sent else file.read_text() == "old"
    words = f"what was measured is in {file}" if sent else "what was measured is not in a file"
    assert f"stopped by Ctrl-C; {words}\n" in capsys.readouterr().err


@pytest.mark.parametrize("command", LINES)
def test_a_file_that_cannot_be_written_any_more_is_told_and_the_results_are_shown(steps, tmp_path, capsys, command):
    folder = tmp_path / "folder"
    folder.mkdir()
    steps[2] = folder.rmdir
    assert main(LINES[command].format(folder).split()) == 1
    shown = capsys.readouterr()
    assert "there is no folder 'folder'" in shown.err and "what was measured is not in a file" in shown.err
    assert len(shown.out) > 80 and "written" not in shown.out


# A reader who has left


@contextlib.contextmanager
def nobody_reads(monkeypatch, name):
    "Standard output or error as a pipe whose reader is gone."
    end, start = os.pipe()
    os.close(end)
    with contextlib.suppress(BrokenPipeError), open(start, "w") as stream:
        monkeypatch.setattr(sys, name, stream)
        yield
        monkeypatch.undo()


@pytest.mark.parametrize("command", LINES)
@pytest.mark.parametrize("at_once", [False, True])
def test_output_into_a_pipe_that_is_closed(steps, tmp_path, capfd, monkeypatch, command, at_once):
    line = LINES[command].format(tmp_path).split()
    with monkeypatch.context() as patch, nobody_reads(patch, "stdout"):
        sys.stdout.reconfigure(write_through=at_once)  # as with PYTHONUNBUFFERED
        assert main(line) == 141
    assert kept(Path(line[-1])) == (1 if command == "bench" else 3)  # the others print in the end
    said = [line for line in capfd.readouterr().err.splitlines() if "WARNING" not in line]
    assert said == [f"stopped, for nobody reads the output any more; what was measured is in {line[-1]}"]


@pytest.mark.parametrize("command", LINES)
def test_nobody_who_is_told_is_no_reason_to_stop(steps, tmp_path, monkeypatch, command):
    line = LINES[command].format(tmp_path).split()
    with monkeypatch.context() as patch, nobody_reads(patch, "stderr"):
        assert main(line) == 0
    for name in ("stdout", "stderr"):
        for stream in (None, open(os.devnull, "w")):
            if stream is not None:
                stream.close()  # as `>&-` leaves it, or a program that closed it
            with monkeypatch.context() as patch:
                patch.setattr(sys, name, stream)
                assert main(line) == 0
    assert kept(Path(line[-1])) == 3


STUB = """
import sys
from mha_book.bench import cli, contests
from mha_book.instruments.device import Timing
from mha_book.bench.suites import SUITES, Contest
contests.benchmark = lambda calls, **more: {"a": Timing(1.0, 0.9, 1.1, 1e-3, 64)}
cli.measure_machine = lambda *_: contests.Machine("this CPU", 1e11, 3e10, "made up")
SUITES["layers"] = lambda at: (Contest(f"contest {i}", {"a": lambda: None}, (), 1) for i in range(3))
sys.exit(cli.main())
"""


def test_as_a_program_it_leaves_no_traceback_and_no_message_of_the_interpreter(tmp_path):
    "`mha-book bench | head -1` and `mha-book --help | true`: the last words of the interpreter are a flush, too."
    line = LINES["bench"].format(tmp_path).split()
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": ""}
    runs = {}
    for name, words in dict(buffered=line, plain=[*line[:-1], f"{tmp_path}/n.json"], help=["--help"]).items():
        end, start = os.pipe()
        os.close(end)
        command = [sys.executable, *["-u"] * (name == "plain"), "-c", STUB, *words]
        runs[name] = subprocess.Popen(command, stdout=start, stderr=subprocess.PIPE, text=True, env=env)
        os.close(start)
    for run in runs.values():
        said = [line for line in run.communicate(timeout=120)[1].splitlines() if "WARNING" not in line]
        assert run.returncode == 141 and len(said) == 1 and "nobody reads" in said[0], said
    assert kept(tmp_path / "m.json") == kept(tmp_path / "n.json") == 1


# The parts


def test_ctrl_c_before_anything_runs_is_one_line_too(monkeypatch, capsys):
    monkeypatch.setattr(by_steps, "pick_device", lambda name: sends(signal.SIGINT)())
    assert main(["bench", "--quick"]) == 130
    assert capsys.readouterr().err == "mha-book: stopped by Ctrl-C\n"


def test_a_signal_that_the_program_was_started_to_ignore_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        assert ending.to_the_end(lambda: sends(signal.SIGHUP)() or 7) == 7
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_in_another_thread_signals_are_left_alone():
    codes = []

    def command():
        with ending.undisturbed():
            codes.append(signal.getsignal(signal.SIGTERM))
        return 3

    thread = threading.Thread(target=lambda: codes.append(ending.to_the_end(command)))
    thread.start()
    thread.join()
    assert codes == [signal.SIG_DFL, 3]


def test_a_signal_waits_for_the_end_of_the_block():
    done = []
    with pytest.raises(ending.Interrupted) as stop, ending._handled(ending._interrupt):
        with ending.undisturbed():
            sends(signal.SIGTERM, signal.SIGINT)()
            done.append("written")
        done.append("not reached")
    assert done == ["written"] and ending.exit_code(stop.value) == 143


@pytest.mark.parametrize("name", ["m.json/", ".", "", "-", "a\nb.json", "x" * 201])
def test_what_is_no_name_of_a_file_is_refused_before_anything_is_measured(steps, tmp_path, capsys, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    Path("m.json").mkdir()
    steps[0] = raises(AssertionError("measured"))
    with pytest.raises(SystemExit) as stop:
        main(["bench", "layers", "--json", name])
    assert stop.value.code == 2 and "--json" in capsys.readouterr().err


@pytest.mark.parametrize("command", LINES)
def test_where_nothing_can_be_written_nothing_is_measured(steps, tmp_path, capsys, command):
    line = LINES[command].format(tmp_path).split()
    os.mkfifo(line[-1])
    steps[0] = raises(AssertionError("measured"))
    with pytest.raises(SystemExit):
        main(line)
    assert f"--json {line[-1]} cannot be written: it is a pipe" in " ".join(capsys.readouterr().err.split())


def test_half_of_the_texts_say_how_many_tokens_they_are(steps, tmp_path):
    steps[1] = raises(KeyboardInterrupt())
    line = LINES["heads"].format(tmp_path).split()
    main(line)
    found = read_ablations(line[-1])
    assert found.tokens == {"words": 4} and found.base == {"words": 2.0}
    with refused(KeyError):
        found.losses["again"]
