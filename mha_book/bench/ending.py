"""How a command ends: broken off by Ctrl-C, by the system or by a reader who has left, it keeps what was measured, says
so in one line, and leaves an exit code instead of a traceback.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

# What ends a command


class Interrupted(KeyboardInterrupt):
    "The signal of that number, raised where the program was."

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


STOPS = KeyboardInterrupt, OSError, RuntimeError, ValueError, MemoryError  # after each, what is there is kept


def exit_code(
    stop: BaseException | None,  # what ended the command; None = it came to its end
) -> int:
    "0; 130 after Ctrl-C and 128 + its number after another signal, 141 where nobody reads on, 1 after a failure."
    if stop is None:
        return 0
    if isinstance(stop, KeyboardInterrupt):
        return 128 + getattr(stop, "number", signal.SIGINT)
    return 141 if isinstance(stop, BrokenPipeError) else 1


def reason(stop: BaseException) -> str:
    "What ended a command, in a few words."
    code = exit_code(stop)
    if code > 1:
        names = {130: "stopped by Ctrl-C", 141: "stopped, for nobody reads the output any more"}
        return names.get(code) or f"stopped by {signal.Signals(code - 128).name}"
    return f"stopped by {type(stop).__name__}: {' '.join(str(stop).split())[:300]}".rstrip(": ")


# Signals


ENDING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


@contextmanager
def _handled(handler: Callable) -> Iterator[None]:
    "Signals that end a program go to `handler`, but for those that it was started to ignore. In the main thread only."
    main = threading.current_thread() is threading.main_thread()
    before = {number: signal.getsignal(number) for number in ENDING if main}
    before = {number: old for number, old in before.items() if old not in (signal.SIG_IGN, None)}
    try:
        for number in before:
            signal.signal(number, handler)
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def _interrupt(number: int, frame: object) -> None:
    "Raise the first signal; those that follow find the command on its way out already."
    for other in ENDING:
        if signal.getsignal(other) is _interrupt:
            signal.signal(other, signal.SIG_IGN)
    raise Interrupted(number)


@contextmanager
def undisturbed() -> Iterator[None]:
    "A signal that comes meanwhile is raised at the end of the block: what is being written, is written."
    came = []
    with _handled(lambda number, frame: came.append(number)):
        yield
    for number in came[:1]:
        signal.raise_signal(number)


# The screen


def warn(text: str, end: str = "\n") -> None:
    "Tell the person at the screen, if there is one."
    try:
        if sys.stderr is not None:
            print(text, end=end, file=sys.stderr, flush=True)
    except (OSError, ValueError):  # it was closed
        give_up(sys.stderr)


def is_watched() -> bool:
    "Whether somebody sees what `warn` says at once."
    return sys.stderr is not None and not getattr(sys.stderr, "closed", False) and sys.stderr.isatty()


def say(text: str, end: str = "\n", flush: bool = False) -> None:
    "Print a result. Raises OSError where it cannot be delivered; whoever catches that calls `give_up`."
    if not getattr(sys.stdout, "closed", False):
        print(text + end, end="", flush=flush)  # at once: who has read the first line may leave


def give_up(stream: object) -> None:
    "Where what was printed cannot be delivered, send it and what is still to come to nobody: there is a last flush."
    try:
        if stream is not None:
            stream.flush()
    except (OSError, ValueError):
        with suppress(OSError, ValueError):  # no file stands behind it
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)


# A command


def to_the_end(command: Callable[[], int]) -> int:  # an exit code
    "Carry out a command. What breaks it off is told in one line, after what was measured is kept."
    with _handled(_interrupt):
        try:
            try:
                return command()
            finally:  # --help and --version, too, are to be read by somebody
                say("", end="", flush=True)
        except (KeyboardInterrupt, OSError) as stop:
            give_up(sys.stdout)
            warn("\n" * is_watched() + f"mha-book: {reason(stop)}")
            return exit_code(stop)
