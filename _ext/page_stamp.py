"""The stamp under every executed page: where, when and how long it ran. Imported by the page's own kernel."""

import html
import platform
import subprocess
import time
from datetime import UTC, datetime
from pathlib import Path

_started = 0.0


def start() -> None:
    "Start the page's clock."
    global _started
    _started = time.perf_counter()


def cpu_name() -> str:
    "The processor's model name, or its architecture where the system does not tell."
    if platform.system() == "Darwin":
        return subprocess.check_output(["sysctl", "-n", "machdep.cpu.brand_string"], text=True).strip()
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf8").splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def device_name() -> str:
    "The GPU that the page had, or else the CPU."
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {cpu_name()}"


def values() -> dict[str, str]:
    "What the stamp says, by name."
    import torch

    seconds = time.perf_counter() - _started
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": device_name(),
        "threads": str(torch.get_num_threads()),
        "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%MZ"),
        "seconds": f"{seconds:.1f}",
    }


def markup(stamp: dict[str, str]) -> str:
    "The stamp as HTML: a sentence for the reader, the values as data attributes for programs."
    stamp = {key: html.escape(value) for key, value in stamp.items()}
    data = " ".join(f'data-{key}="{value}"' for key, value in stamp.items())
    threads = "1 thread" if stamp["threads"] == "1" else f"{stamp['threads']} threads"
    return (
        f'<div class="stamp" {data}>This page ran in {stamp["seconds"]} s on {stamp["date"]}: '
        f"{stamp['device']}, {threads}, torch {stamp['torch']}, Python {stamp['python']}.</div>"
    )


def show() -> None:
    "Print the stamp at the foot of the page."
    from IPython.display import HTML, display

    display(HTML(markup(values())))


def proved() -> None:
    "Leave a mark that a proof ran to its end: the page's line over it says so only where the mark is."
    from IPython.display import HTML, display

    display(HTML('<span class="proof-ran"></span>'))
