"""The instruments of `mha_book.instruments.testing` and `mha_book.instruments.device` measure what they say."""

import contextlib
import os
from itertools import pairwise, permutations
from types import SimpleNamespace

import pytest
import torch

from mha_book.bench.measured import provenance
from mha_book.instruments import device as instruments
from mha_book.instruments.device import (
    Timing,
    band_width,
    benchmark,
    peak_bytes,
    pick_device,
    synchronize,
    timed_on,
    use_device,
)
from mha_book.instruments.roofline import measure_machine
from mha_book.instruments.testing import assert_as_exact
from mha_book.lab.stress import Training, sequences, train
from mha_book.models.encoder import load_minilm
from mha_book.models.language_model import load_smollm2
from support.refusals import refused

EXACT = torch.linspace(-1, 1, 50, dtype=torch.float64)


def off_by(error, dtype):
    "Numbers of which one is off by `error`."
    wrong = EXACT.clone()
    wrong[7] += error
    return wrong.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_rule_allows_twice_the_plain_error_and_no_more(dtype):
    eps = torch.finfo(dtype).eps
    plain = off_by(100 * eps, dtype)
    allowed = 2 * (plain.double() - EXACT).abs().max().item() + 4 * eps
    assert_as_exact(off_by(0.9 * allowed, dtype), EXACT, plain, 1.0)
    with pytest.raises(AssertionError, match=r"at \(7,\), allowed"):
        assert_as_exact(off_by(1.1 * allowed, dtype), EXACT, plain, 1.0)


def test_float64_is_held_to_1e_12():
    assert_as_exact(off_by(0.9e-12, torch.float64), EXACT, EXACT + 1, 1.0)
    with pytest.raises(AssertionError):
        assert_as_exact(off_by(1.1e-12, torch.float64), EXACT, EXACT + 1, 1.0)


@pytest.mark.parametrize("wrong", [EXACT[:49], EXACT.float() * torch.nan])
def test_other_shapes_and_nan_are_refused(wrong):
    with pytest.raises(AssertionError):
        assert_as_exact(wrong, EXACT, EXACT, 1.0)


@pytest.mark.parametrize("plain", [EXACT.float() / 0, EXACT.float()[:1]])
def test_a_reference_that_is_none_is_refused(plain):
    with pytest.raises(AssertionError):
        assert_as_exact(EXACT.float(), EXACT, plain, 1.0)


# Which device


def test_a_named_device_is_taken_and_the_environment_chooses_for_none(monkeypatch):
    monkeypatch.setenv("MHA_BOOK_DEVICE", "meta")
    assert pick_device() == torch.device("meta")
    assert pick_device("cpu") == pick_device(torch.device("cpu")) == torch.device("cpu")


@pytest.mark.parametrize("there, expected", [(True, "cuda"), (False, "cpu")])
def test_cuda_is_chosen_where_it_is(monkeypatch, there, expected):
    monkeypatch.delenv("MHA_BOOK_DEVICE", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    monkeypatch.setattr(torch, "empty", lambda *size, device: None)  # every device is there
    assert pick_device() == torch.device(expected)


@pytest.mark.parametrize("name", ["cuda:99", "abacus", "xpu"])
def test_a_device_that_is_not_there_is_refused_with_what_is(name, monkeypatch):
    with pytest.raises(ValueError, match=rf"device '{name}' is not there; there is cpu"):
        pick_device(name)
    monkeypatch.setenv("MHA_BOOK_DEVICE", name)
    with pytest.raises(ValueError, match="of \\$MHA_BOOK_DEVICE is not there"):
        pick_device()


@pytest.mark.usefixtures("own_messages")
@pytest.mark.parametrize("name", ["", 99])
def test_what_is_falsy_or_a_number_is_a_name_too(name, monkeypatch):
    monkeypatch.setenv("MHA_BOOK_DEVICE", "meta")
    with pytest.raises(ValueError, match=f"device {str(name)!r} is not there; there is cpu"):
        pick_device(name)


@pytest.mark.parametrize("variable", [None, ""])
def test_a_default_that_fails_does_not_blame_the_environment(monkeypatch, variable):
    monkeypatch.delenv("MHA_BOOK_DEVICE", raising=False)
    if variable is not None:
        monkeypatch.setenv("MHA_BOOK_DEVICE", variable)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "empty", lambda size, device: 1 / 0 if device.type == "cpu" else broken())

    def broken():
        raise RuntimeError("CUDA error: devices are busy")

    with pytest.raises(ValueError, match=r"'cuda', chosen because \$MHA_BOOK_DEVICE is not set, is not there"):
        pick_device()


def test_use_device_makes_it_the_default_and_hooks_nothing_on_a_cpu():
    def hooks():
        return len(torch.overrides._get_current_function_mode_stack())

    before = hooks()
    try:
        assert use_device("meta").type == torch.ones(2).device.type == "meta" and hooks() == before + 1
        assert use_device("cpu").type == torch.ones(2).device.type == "cpu" and hooks() == before
    finally:
        torch.set_default_device(None)


def test_synchronize_waits_where_there_is_something_to_wait_for(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.accelerator, "synchronize", waited.append)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name in "cpu", "meta", torch.device("cuda:1"):
        synchronize(name)
    assert waited == [torch.device("cuda:1")]


def test_what_is_printed_beside_a_timing(monkeypatch):
    assert timed_on("cpu") == f"CPU, one thread, torch {torch.__version__}"
    monkeypatch.setattr(torch, "empty", lambda *size, device: None)  # every device is there
    assert timed_on("mps") == f"mps, torch {torch.__version__}"


ABSENT = ["nonsense", "", "cpu:3", "mps", "cuda:99999999999999", 5, torch.device("xpu"), "cuda:99"]
ASKED = {
    "pick_device": pick_device,
    "use_device": use_device,
    "timed_on": timed_on,
    "benchmark": lambda device: benchmark({"a": never}, device=device),
    "peak_bytes": lambda device: peak_bytes(never, device),
    "measure_machine": lambda device: measure_machine(device),
    "train": lambda device: train("plain", 0.1, 0, device=device),
    "sequences": lambda device: next(sequences(Training(), 0, device)),
    "load_smollm2": load_smollm2,
    "load_minilm": load_minilm,
    "provenance": provenance,
}


def never():
    raise AssertionError("it was called")


@pytest.mark.usefixtures("own_messages")
@pytest.mark.parametrize("device", [*ABSENT, *["cuda", "cuda:0"] * (not torch.cuda.is_available())])
@pytest.mark.parametrize("name", ASKED)
def test_whoever_is_told_a_device_that_is_not_there_says_what_is(name, device):
    before = torch.get_default_device()
    with refused(ValueError, f"device {str(device)!r} is not there; there is cpu"):
        ASKED[name](device)
    assert torch.get_default_device() == before


@pytest.mark.usefixtures("own_messages")
@pytest.mark.parametrize("device", [5.0, True, ["cpu"], torch.float32])
@pytest.mark.parametrize("name", [*ASKED, "synchronize"])
def test_what_is_no_name_of_a_device_is_another_error(name, device):
    with refused(TypeError, "device must be a name such as 'cpu' or 'cuda:1'", type(device).__name__):
        ASKED.get(name, synchronize)(device)


@pytest.mark.parametrize("device", ["nonsense", "", "cuda:99", "mps"])
def test_waiting_for_a_device_that_is_not_there(device):
    with refused(ValueError, f"device {device!r} is not there; there is cpu"):
        synchronize(device)


def test_a_device_that_is_there_and_fails_tells_its_own_error(monkeypatch):
    def fails(device):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.accelerator, "synchronize", fails)
    monkeypatch.setattr(torch, "empty", lambda *size, device: None)  # every device is there
    with pytest.raises(RuntimeError, match="illegal memory access"):
        synchronize("cuda:0")


def test_a_device_without_a_clock_is_told_from_one_that_is_not_there():
    for call in (lambda: benchmark({"a": never}, device="meta"), lambda: measure_machine("meta")):
        with refused(ValueError, "the clocks of cpu and cuda, not of meta"):
            call()
    with refused(ValueError, "the memory of cpu and cuda, not of meta"):
        peak_bytes(never, "meta")


@pytest.mark.parametrize("low, high, width", [(0.75, 1.125, 0.25), (0.875, 1.5, 0.5), (1.25, 1.5, 0.5)])
def test_the_band_is_as_wide_as_its_farther_quartile(low, high, width):
    assert band_width(low, high) == width


# Time. No test asserts how long something takes: the clock is a made-up one.


class FakeClock:
    "CPU seconds that only pass when a call says so, and seconds on the wall, `waiting` times as many."

    def __init__(self, monkeypatch, waiting=1):
        self.now = 0.0
        monkeypatch.setattr(
            instruments, "time", SimpleNamespace(process_time=lambda: self.now, perf_counter=lambda: self.now * waiting)
        )
        monkeypatch.setattr(instruments, "peak_bytes", lambda call, device: 7)

    def call(self, *seconds):
        "A call that takes these seconds, one after the other; the last one for ever."
        left = list(seconds)

        def run():
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return run


WARM_UP = 5  # three to warm up, two to see how long a block must be


def test_medians_and_quartiles_are_of_the_pairs(monkeypatch):
    clock = FakeClock(monkeypatch)
    ratios = [1.0, 8.0, 3.0, 2.0, 4.0]  # round by round; median 3
    machine = [1.0, 5.0, 2.0, 3.0, 4.0]  # its speed in each round
    base = clock.call(*[1.0] * WARM_UP, *[t for speed in machine for t in (speed, speed)], 1.0)
    other = clock.call(*[1.0] * WARM_UP, *[r * t for r, t in zip(ratios, machine, strict=True)], 1.0)
    timings = benchmark({"base": base, "other": other}, rounds=5)
    assert timings["other"] == Timing(3.0, 1.5, 6.0, 6.0, 7)
    assert timings["base"] == Timing(1.0, 1.0, 1.0, 3.0, 7)
    assert str(timings["other"]) == "3.00 (1.50 to 6.00)"


def test_a_ratio_of_medians_would_say_something_else(monkeypatch):
    clock = FakeClock(monkeypatch)
    base = clock.call(*[1.0] * WARM_UP, 1, 1, 9, 9, 5, 5, 1.0)
    other = clock.call(*[1.0] * WARM_UP, 2, 9, 5, 1.0)  # pairs 2, 1, 1; medians 5 and 5
    found = benchmark({"base": base, "other": other}, rounds=3)["other"]
    assert found.ratio == 1.0 and found.high == 2.0


def test_the_band_is_the_base_against_its_other_turn(monkeypatch):
    clock = FakeClock(monkeypatch)
    # the base's earlier turn of a round takes 1, its later one 2; which of them is divided by which, is drawn
    alone = clock.call(*[1.0] * WARM_UP, *[1.0, 2.0] * 21, 1.0)
    band = benchmark({"base": alone}, rounds=21)["base"]
    assert (band.low, band.high) == (0.5, 2.0)


def test_the_bases_seconds_are_those_that_all_others_are_divided_by(monkeypatch):
    clock = FakeClock(monkeypatch)
    base = clock.call(*[1.0] * WARM_UP, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 1.0)
    timings = benchmark({"base": base, "other": clock.call(8.0)}, rounds=3)
    assert timings["other"].seconds / timings["other"].ratio == timings["base"].seconds


@pytest.mark.parametrize("turns", range(2, 8))
def test_over_a_cycle_of_rounds_everyone_follows_everyone_else_equally_often(turns):
    orders = list(instruments._orders(turns, 3 * 2 * turns))
    assert all(sorted(order) == list(range(turns)) for order in orders)
    pairs = [pair for order in orders for pair in pairwise(order)]
    assert {pairs.count(pair) for pair in permutations(range(turns), 2)} == {6}


def test_the_first_calls_do_not_count(monkeypatch):
    clock = FakeClock(monkeypatch)
    timing = benchmark({"slow at first": clock.call(1000.0, 100.0, 10.0, 1.0)}, rounds=3)
    assert timing["slow at first"].seconds == 1.0


def test_a_short_call_is_repeated_until_the_clock_can_see_it(monkeypatch):
    clock, counted = FakeClock(monkeypatch), []
    inner = clock.call(0.25)
    timing = benchmark({"short": lambda: (counted.append(1), inner())[1]}, rounds=3, min_seconds=1.0)
    assert timing["short"].seconds == 0.25 and len(counted) == WARM_UP + 3 * 2 * 4


@pytest.mark.parametrize("waiting, often", [(1, 8), (20, 8), (80, 2), (10_000, 1)])
def test_what_mostly_waits_is_not_repeated_for_hours(monkeypatch, waiting, often):
    clock, counted = FakeClock(monkeypatch, waiting), []
    inner = clock.call(0.125)
    benchmark({"waits": lambda: (counted.append(1), inner())[1]}, rounds=3, min_seconds=1.0)
    assert len(counted) == WARM_UP + 3 * 2 * often


def test_one_slow_moment_does_not_shorten_the_blocks(monkeypatch):
    clock, counted, wall = FakeClock(monkeypatch), [], iter([0.0, 1e6, 1e6, 1e6 + 0.25])  # another program ran first
    inner = clock.call(0.25)
    instruments.time.perf_counter = lambda: next(wall)
    benchmark({"short": lambda: (counted.append(1), inner())[1]}, rounds=3, min_seconds=1.0)
    assert len(counted) == WARM_UP + 3 * 2 * 4


@pytest.mark.parametrize("base, other", [(0.0, 1.0), (1.0, 0.0)])
def test_a_clock_that_stands_still_is_refused(monkeypatch, base, other):
    clock = FakeClock(monkeypatch)
    calls = {"base": clock.call(base), "other": clock.call(other)}
    with pytest.raises(RuntimeError, match="ticks too slowly for this; give benchmark a larger min_seconds"):
        benchmark(calls, rounds=3, min_seconds=1e-6)


def order_of_calls(rounds):
    "Who ran when, between warm-up and the count of bytes."
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    benchmark(calls, rounds=rounds, min_seconds=1e-9)
    return "".join(order[3 * WARM_UP : -3])


def test_all_take_turns_in_every_round():
    turns = order_of_calls(60)
    rounds = [turns[i : i + 4] for i in range(0, 240, 4)]
    assert all("".join(sorted(one)) == "aabc" for one in rounds)
    for pair in ("aa", "ab", "ba", "ac", "ca", "bc", "cb"):  # nobody always follows the same neighbour
        assert 5 < sum(pair in one for one in rounds) < 50


def test_progress_is_told():
    told = []
    benchmark({"a": lambda: None}, rounds=3, min_seconds=1e-6, progress=lambda *news: told.append(news))
    assert told == [(1, 3), (2, 3), (3, 3)]


def test_one_thread_meanwhile_and_the_old_number_after():
    torch.set_num_threads(2)
    seen = set()
    benchmark({"a": lambda: seen.add(torch.get_num_threads())}, rounds=3, min_seconds=1e-6)
    assert seen == {1} and torch.get_num_threads() == 2


def test_threads_are_restored_when_a_call_fails():
    torch.set_num_threads(2)
    with pytest.raises(ZeroDivisionError):
        benchmark({"a": lambda: 1 / 0})
    assert torch.get_num_threads() == 2


@pytest.mark.usefixtures("own_messages")
@pytest.mark.parametrize(
    "calls, options, error, words",
    [
        ({}, {}, ValueError, "at least one entry"),
        ([print], {}, ValueError, "dict of name: function"),
        ({"a": 3}, {}, TypeError, r"calls\['a'\] must be a function without arguments, got int"),
        ({"a": print}, {"rounds": 2}, ValueError, "at least 3, for quartiles; got 2"),
        ({"a": print}, {"rounds": 5.0}, ValueError, "at least 3"),
        ({"a": print}, {"rounds": True}, ValueError, "at least 3"),
        ({"a": print}, {"rounds": "15"}, ValueError, "at least 3"),
        ({"a": print}, {"min_seconds": "1"}, ValueError, "above 0"),
        ({"a": print}, {"min_seconds": True}, ValueError, "above 0"),
        ({"a": print}, {"progress": 3}, TypeError, "progress must be a function of two numbers, got 3"),
        ({"a": print}, {"min_seconds": 0.0}, ValueError, "above 0"),
        ({"a": print}, {"min_seconds": float("nan")}, ValueError, "above 0"),
        ({"a": print}, {"min_seconds": float("inf")}, ValueError, "above 0 and finite"),
        ({"a": print}, {"device": "meta"}, ValueError, "the clocks of cpu and cuda, not of meta"),
    ],
)
def test_what_cannot_be_measured_is_refused(calls, options, error, words):
    with pytest.raises(error, match=words):
        benchmark(calls, **options)


def test_a_result_on_another_device_than_the_clock_is_refused():
    there = torch.ones(2, device="meta")
    words = "'far' gives a tensor on meta, but the clock of cpu was to time it; there is no clock for that device"
    for result in there, (1, there), [there, 1]:
        with pytest.raises(ValueError, match=words):
            benchmark({"far": lambda result=result: result}, rounds=3)


class OnSecondGPU(torch.Tensor):
    "A result that says it lies on the second GPU."

    device = torch.device("cuda:1")


def test_a_result_on_another_gpu_than_the_clock_is_refused(monkeypatch):
    FakeCuda(monkeypatch)
    there = torch.ones(2).as_subclass(OnSecondGPU)
    for clock in "cpu", "cuda", "cuda:0":
        with pytest.raises(ValueError, match=r"but the clock of .* say benchmark\(..., device='cuda:1'\)"):
            benchmark({"far": lambda: there}, device=clock, rounds=3, min_seconds=1e-6)


def test_a_result_on_the_clocks_own_gpu_is_timed(monkeypatch):
    cuda, there = FakeCuda(monkeypatch), torch.ones(2).as_subclass(OnSecondGPU)
    step = cuda.call(1.0)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    for clock in "cuda:1", "cuda":  # by its number, or as the current one
        found = benchmark({"here": lambda: (step(), there)}, device=clock, rounds=3, min_seconds=1.0)
        assert found["here"].seconds == 1.0


class FakeCuda:
    "Events and memory counters of a GPU that works off what is recorded when it is waited for."

    def __init__(self, monkeypatch):
        self.log, self.entered, self.seconds, fake = [], [], 0.0, self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                fake.log.append("mark")
                self.at = fake.seconds
                self.waited = False
                fake.pending.append(self)

            def elapsed_time(self, other):
                assert self.waited and other.waited, "asked before the device was waited for"
                return (other.at - self.at) * 1000

        def wait(device):
            self.log.append("wait")
            for event in self.pending:
                event.waited = True
            self.pending.clear()

        self.pending = []
        monkeypatch.setattr(instruments, "pick_device", torch.device)
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "device", self.enter)
        monkeypatch.setattr(instruments, "synchronize", wait)
        monkeypatch.setattr(instruments, "peak_bytes", lambda call, device: 7)

    @contextlib.contextmanager
    def enter(self, device):
        "In place of `torch.cuda.device`."
        self.entered.append(device)
        yield

    def call(self, seconds):
        "A launch: the device takes these seconds, the program none."

        def run():
            self.seconds += seconds

        return run


def test_cuda_is_timed_by_its_own_clock_and_waited_for_after_each_block(monkeypatch):
    torch.set_num_threads(2)
    cuda, seen = FakeCuda(monkeypatch), set()
    base, half = cuda.call(2.0), cuda.call(1.0)
    calls = {"base": lambda: (base(), seen.add(torch.get_num_threads())), "half": half}
    timings = benchmark(calls, device="cuda", rounds=4, min_seconds=6.0)  # blocks of 3 and of 6
    assert timings == {"base": Timing(1.0, 1.0, 1.0, 2.0, 7), "half": Timing(0.5, 0.5, 0.5, 1.0, 7)}
    assert "".join(word[0] for word in cuda.log).endswith("mmw" * 3 * 4)  # three blocks a round
    assert cuda.entered == [torch.device("cuda:0")]
    assert seen == {2}  # and no thread taken away


# Bytes


@pytest.mark.usefixtures("own_messages")
def test_what_cannot_be_called_has_no_bytes():
    with refused(TypeError, "call must be a function without arguments, got Tensor; write lambda: ..."):
        peak_bytes(torch.ones(3), "cpu")


def test_memory_that_was_there_before_does_not_count():
    x = torch.ones(1000, 256)
    old = [x.neg(), x.neg()]
    assert peak_bytes(lambda: (old.clear(), x.neg())) == x.nbytes  # freeing what is old makes no room


def test_the_worst_moment_counts_and_not_the_last():
    x = torch.ones(1000, 256)
    assert peak_bytes(lambda: x.neg().exp().sum()) >= 2 * x.nbytes

    def small_then_large():
        small = [x.neg(), x.neg()]
        small.clear()
        return x.new_ones(4000, 256)

    assert peak_bytes(small_then_large) == 4 * x.nbytes
    assert peak_bytes(lambda: (x.neg(), x.exp())) == 2 * x.nbytes


def test_cuda_is_asked_for_its_peak_beyond_what_was_there(monkeypatch):
    asked = []
    monkeypatch.setattr(instruments, "pick_device", torch.device)
    monkeypatch.setattr(instruments, "synchronize", lambda device: asked.append("wait"))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: asked.append("reset"))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 1000)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 1512)
    assert peak_bytes(lambda: asked.append("call"), "cuda") == 512
    assert asked == ["call", "wait", "reset", "call", "wait"]


def open_files():
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="no list of open files")
def test_stderr_and_the_open_files_are_as_before_even_when_the_call_fails():
    x = torch.ones(1000, 256)
    peak_bytes(x.neg)
    before, files = os.fstat(2), open_files()
    for call, outcome in (x.neg, contextlib.nullcontext()), (lambda: 1 / 0, pytest.raises(ZeroDivisionError)):
        with outcome:
            peak_bytes(call)
        assert os.path.samestat(os.fstat(2), before) and open_files() == files
    assert peak_bytes(x.neg) == x.nbytes  # and no profiler is left running


def test_stderr_is_silenced_for_the_profiler_and_not_for_the_call(capfd):
    peak_bytes(lambda: os.write(2, b"the call"))
    with instruments._quiet_stderr():
        os.write(2, b"the profiler")
    assert capfd.readouterr().err == "the call"


def test_without_a_stderr_the_bytes_are_read_too(monkeypatch):
    def closed(number):
        raise OSError("Bad file descriptor")

    monkeypatch.setattr(os, "dup", closed)
    x = torch.ones(1000, 256)
    assert peak_bytes(x.neg) == x.nbytes


def test_a_profiler_that_runs_already_is_left_alone():
    x = torch.ones(3)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        with pytest.raises(RuntimeError, match="one is running already"):
            peak_bytes(lambda: None)
        x.neg()
    assert "aten::neg" in {event.name for event in profile.events()}


def test_what_is_made_and_freed_in_one_nanosecond_does_not_stay(monkeypatch):
    def block(size, device="cpu"):
        return SimpleNamespace(
            tag=torch._C._profiler._EventType.Allocation,
            start_time_ns=5,
            children=[],
            extra_fields=SimpleNamespace(ptr=1, alloc_size=size, device=torch.device(device)),
        )

    class Profiler:
        "In place of torch's, with these events."

        def start(self):
            pass

        def stop(self):
            pass

        profiler = SimpleNamespace(
            kineto_results=SimpleNamespace(
                experimental_event_tree=lambda: [
                    block(-16),
                    block(8),
                    block(-8),
                    block(4),
                    block(-4),
                    block(99, "meta"),
                ]
            )
        )  # first one of something old

    monkeypatch.setattr(torch.profiler, "profile", lambda **options: Profiler())
    assert peak_bytes(lambda: None) == 8


def test_other_devices_have_no_bytes_to_read():
    with pytest.raises(ValueError, match="cpu and cuda, not of meta"):
        peak_bytes(lambda: None, "meta")


def test_the_benchmark_tells_the_bytes():
    x = torch.ones(1000, 256)
    found = benchmark({"one": lambda: x.neg(), "two": lambda: (x.neg(), x.exp())}, rounds=3, min_seconds=1e-6)
    assert [timing.peak_bytes for timing in found.values()] == [x.nbytes, 2 * x.nbytes]
