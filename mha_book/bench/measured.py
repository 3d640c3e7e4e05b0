"""Measurements on file: what a file holds, how it is read, written and shown; every file says where it comes from.

A number without its origin is a rumour. A file says on what machine it was made, with which versions, when and by
which command, and a file that does not say so is refused.
"""

import json
import math
import os
import platform
import re
import subprocess
import types
from collections.abc import Callable
from dataclasses import dataclass, fields
from datetime import UTC, datetime, timedelta
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from reprlib import repr as shorter
from typing import Any, get_args, get_origin, get_type_hints

import torch

from ..instruments.device import band_width, pick_device
from ..models.encoder import read_json
from .files import write_text

# What a file holds


@dataclass(frozen=True)
class Row:
    "One contestant of a table; where it was not measured, `note` says why, else what there is to say of it."

    name: str
    ratio: float | None  # its time over the base's, median of the rounds
    low: float | None  # lower quartile
    high: float | None  # upper quartile
    seconds: float | None  # median time of one call
    peak_bytes: int | None  # the most that one call holds
    share: float | None  # of the machine's measured rate of matrix products
    compile_seconds: float | None  # until the first compiled call had returned
    note: str

    def __post_init__(self):
        timing = self.ratio, self.low, self.high, self.seconds, self.peak_bytes
        if self.ratio is None and not self.note:
            raise ValueError(f"row {self.name!r} has neither a ratio nor a note why not")
        if self.ratio is None and set(timing) != {None}:
            raise ValueError(f"row {self.name!r} has no ratio, but other numbers")
        if self.ratio is not None and (
            None in timing or not 0 < self.low <= self.ratio <= self.high or not self.seconds > 0
        ):
            raise ValueError(
                f"row {self.name!r}: ratio {self.ratio}, quartiles {self.low} "
                f"to {self.high}, {self.seconds} s are not a timing"
            )
        for field in ("peak_bytes", "share", "compile_seconds"):
            if (getattr(self, field) or 0) < 0:
                raise ValueError(f"row {self.name!r}: {field} {getattr(self, field)} is below 0")


@dataclass(frozen=True)
class Table:
    "Contestants that were timed in turns, at one size; the first row is the base."

    suite: str  # "layers", "ways", "backends", "compile"
    mode: str  # what was timed, such as "forward"
    size: list[int]  # batch, tokens, width, heads
    rows: list[Row]

    def __post_init__(self):
        if len(self.size) != 4 or min(self.size) < 1:
            raise ValueError(f"size {self.size} is not batch, tokens, width, heads")
        if not self.rows or self.rows[0].ratio is None:
            raise ValueError(f"table {self.suite!r}, {self.mode!r} has no measured base")
        names = [row.name for row in self.rows]
        if len(set(names)) < len(names):
            raise ValueError(f"table {self.suite!r}, {self.mode!r} has a row twice: {names}")
        if not 0.5 < self.rows[0].ratio < 2:
            raise ValueError(f"row {names[0]!r} is the base, but {self.rows[0].ratio} is no ratio of a thing to itself")

    @property
    def band(self) -> float:
        "How far the base strays from itself: the larger distance of its quartiles from 1."
        return band_width(self.rows[0].low, self.rows[0].high)

    def is_noise(self, row: Row) -> bool:
        "Whether `row` is as far from the base as the base is from itself, or nearer."
        return row.ratio is not None and abs(row.ratio - 1) <= self.band


@dataclass(frozen=True)
class Origin:
    "Where the numbers of a file come from."

    schema: int
    command: str
    date: str  # UTC, ISO 8601
    device: dict[str, str | float | None]  # kind, name, driver, a clock
    dtype: str
    threads: int
    seed: int
    versions: dict[str, str]
    commit: str | None  # of the clone, "+" behind it where the package differs
    load: float | None  # how many processes were busy before it began
    cores: int

    def __post_init__(self):
        if self.schema != SCHEMA:
            raise ValueError(f"schema {self.schema}; this version reads schema {SCHEMA}")
        if datetime.fromisoformat(self.date).utcoffset() != timedelta(0):
            raise ValueError(f"date {self.date} is not in UTC")
        self._check_names("device", "kind", "name")
        self._check_names("versions", "python", "torch", "mha_book")
        self._check_least(threads=1, cores=1, seed=0, load=0)
        for field, value, form in (
            ("device.kind", self.device["kind"], "cpu|cuda"),
            ("command", self.command, ".+"),
            ("dtype", self.dtype, "bfloat16|float(16|32|64)"),
            ("commit", str(self.commit), r"None|[0-9a-f]{40}\+?"),
        ):
            if not re.fullmatch(form, str(value)):
                raise ValueError(f"{field} {value!r} does not look like {form}")

    def _check_names(self, field: str, *names: str) -> None:
        "ValueError where a dict does not say what it has to."
        for name in names:
            if not getattr(self, field).get(name):
                raise ValueError(f"{field} does not say {name!r}")

    def _check_least(self, **least: float) -> None:
        "ValueError where a number is too small; what is not known, is not."
        for name, low in least.items():
            if (getattr(self, name) or 0) < low:
                raise ValueError(f"{name} {getattr(self, name)} is below {low}")

    @property
    def head(self) -> str:
        "One line that says where the numbers come from."
        kind = "CPU, one thread: " if self.device["kind"] == "cpu" else ""
        return f"{kind}{self.device['name']}, {self.dtype}, torch {self.versions['torch']}, {self.date[:10]}"


@dataclass(frozen=True)
class Measurement(Origin):
    "A file of measurements: its origin, and its tables."

    rounds: int
    machine: dict[str, float]  # measured FLOP/s and bytes/s
    tables: list[Table]

    def __post_init__(self):
        super().__post_init__()
        self._check_names("machine", "flops", "bandwidth")
        self._check_least(rounds=3)
        for name, value in self.machine.items():
            if value < 0:
                raise ValueError(f"{name} {value} is below 0")
        places = [(table.suite, table.mode, *table.size) for table in self.tables]
        if not places or len(set(places)) < len(places):
            raise ValueError(f"{places}: needed is at least one table, none of them twice")

    def find(self, suite: str, mode: str, size: list[int]) -> Table | None:
        "The table of that suite, mode and size, if it was measured."
        wanted = suite, mode, list(size)
        return next((t for t in self.tables if (t.suite, t.mode, t.size) == wanted), None)

    @property
    def head(self) -> str:
        "One line that says where the numbers come from."
        return super().head + ("; BUSY MACHINE" if is_busy(self.load, self.cores) else "")


# Reading


SCHEMA = 1  # of the files; counted up when a field changes its meaning


def is_busy(
    load: float | None,  # how many processes were busy; None = unknown
    cores: int,  # that there are for them
) -> bool:
    "Whether no core was free for a measurement, as far as is known."
    return load is not None and load > max(cores - 1, 0.5)


def _build(kind: Any, data: Any, where: str) -> Any:
    "`data` from JSON as what `kind` says; ValueError names the place of a misfit."
    if isinstance(kind, type) and hasattr(kind, "__dataclass_fields__"):
        return _build_fields(kind, data, where)
    if get_origin(kind) is list and isinstance(data, list):
        return [_build(get_args(kind)[0], item, f"{where}[{i}]") for i, item in enumerate(data)]
    if get_origin(kind) is dict and isinstance(data, dict):
        for key in data:
            _check_plain(key, f"a name of {where}")
        return {key: _build(get_args(kind)[1], item, f"{where}.{key}") for key, item in data.items()}
    options = get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    _check_plain(data, where)
    if type(data) in options:
        return data
    if type(data) is int and float in options:
        return float(data)
    raise ValueError(f"{where} is {shorter(data)}, not {getattr(kind, '__name__', kind)}")


def _check_plain(data: Any, where: str) -> None:
    "ValueError for a number that no field can have, and for a text that a screen would obey."
    if isinstance(data, float) and not math.isfinite(data):
        raise ValueError(f"{where} is {data}, not finite")
    if isinstance(data, int) and not -(2**63) <= data < 2**63:
        raise ValueError(f"{where} is {shorter(data)}, beyond 64 bits")
    if isinstance(data, str) and not data.isprintable():
        raise ValueError(f"{where} holds what cannot be printed: {shorter(data)}")


def _build_fields(kind: type, data: Any, where: str) -> Any:
    "A dataclass from a dict that has its fields, all of them and no other."
    if not isinstance(data, dict):
        raise ValueError(f"{where} is {shorter(data)}, not {kind.__name__}")
    names = {field.name for field in fields(kind)}
    if missing := names - set(data):
        raise ValueError(f"{where} lacks {', '.join(sorted(missing))}")
    if unknown := set(data) - names:
        _check_plain(min(unknown), f"a name of {where}")
        raise ValueError(f"{where} has unknown {shorter(min(unknown))[1:-1]}")
    hints = get_type_hints(kind)
    return kind(**{name: _build(hints[name], data[name], f"{where}.{name}") for name in names})


def read_file(
    kind: type,  # what it should hold: `Measurement`, or another `Origin`
    path: Path | str,
) -> Any:  # a `kind`
    """What a file holds. Raises as `mha_book.models.encoder.read_json` does, and ValueError
    that names file and fault where a name, a type or a number is not as it should be.
    """
    data = read_json(path)
    try:
        if data.get("schema") not in (None, SCHEMA):
            raise ValueError(f"schema {shorter(data['schema'])}; this version reads schema {SCHEMA}")
        return _build(kind, data, "file")
    except ValueError as error:
        raise ValueError(f"{Path(path).name}: {error}") from error


def read_measurement(path: Path | str) -> Measurement:  # a file of `mha-book bench`
    "The measurement in a file. Raises as `read_file` does."
    return read_file(Measurement, path)


# Writing


def write_file(
    kind: type,  # what it is to hold: `Measurement`, or another `Origin`
    path: Path | str,  # the file; written as a whole, or not at all
    data: dict[str, Any],  # as JSON: the fields of `kind`
) -> None:
    "Write a file. What a reader would refuse raises ValueError here, as does what `write_text` refuses."
    _build(kind, data, "file")
    text = json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    # a list of numbers on one line; a text holds no line break, so it cannot look like one
    text = re.sub(r"\[\n([^][{}\"]*)\]", lambda m: f"[{' '.join(m[1].split())}]", text)
    write_text(path, text)


def write_measurement(path: Path | str, measured: dict[str, Any]) -> None:
    "Write a measurement: its fields, as JSON. Raises as `write_file` does."
    write_file(Measurement, path, measured)


# Where numbers come from


def provenance(
    device: torch.device | str,  # what is measured
) -> dict[str, Any]:
    """Date, device, versions, commit and load: all of a `Measurement` that no argument says.
    Raises ValueError for a device that is not there.
    """
    device = pick_device(device)
    return {
        "schema": SCHEMA,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": _describe(device),
        "versions": _versions(),
        "commit": _commit(Path(find_spec("mha_book").origin).resolve().parents[1]),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "cores": _cores(),
    }


def _run(*command: str) -> str | None:
    "What a command prints; None where it is not there or fails."
    here = {name: value for name, value in os.environ.items() if name[:4] != "GIT_"}
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True, env=here).stdout
    except (OSError, subprocess.SubprocessError):
        return None


def _cores() -> int:
    "How many cores this process may use."
    allowed = getattr(os, "sched_getaffinity", None)  # not on every system
    return len(allowed(0)) if allowed else os.cpu_count() or 1


def _describe(device: torch.device) -> dict[str, str | float | None]:
    "A device's kind, name, driver and clock, as far as they can be read."
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        query = "--query-gpu=driver_version,clocks.max.sm", "--format=csv,noheader,nounits"
        asked = _run("nvidia-smi", *query, "-i", f"GPU-{found.uuid}") or ""
        driver, _, clock = asked.strip().partition(", ")
        return {"kind": "cuda", "name": found.name, "driver": driver or None, "clock_max_mhz": _number(clock)}
    lines = Path("/proc/cpuinfo")
    text = lines.read_text(encoding="utf8") if lines.exists() else ""
    said = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in text.splitlines())}
    name = said.get("model name") or platform.processor() or platform.machine()
    clock = _number(said.get("cpu MHz", ""))
    return {"kind": device.type, "name": name or "unknown", "driver": None, "clock_now_mhz": clock}


def _number(text: str) -> float | None:
    "A number that a machine has written, if it is one."
    return float(text) if re.fullmatch(r"\d+(\.\d+)?", text.strip()) else None


def _versions() -> dict[str, str]:
    "What computes: Python, the system, torch and what stands on it."
    found = {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "system": f"{platform.system()} {platform.machine()}",
        "float32_products": torch.backends.cuda.matmul.fp32_precision,
    }  # or "tf32"
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    for package in ("numpy", "mha-book", "transformers"):
        try:
            found[package.replace("-", "_")] = version(package)
        except PackageNotFoundError:
            if package == "mha-book":  # run from a clone that is not installed
                found["mha_book"] = "not installed"
    return found


def _commit(clone: Path) -> str | None:
    "The commit of a clone of the book, `+` behind it where the package differs from it."
    if not ((clone / ".git").exists() and (clone / "settings.ini").exists()):
        return None
    git = "git", "-C", str(clone)
    name = _run(*git, "rev-parse", "HEAD")
    changed = _run(*git, "status", "--porcelain", "--", "mha_book")
    return name.strip() + "+" * (changed != "") if name else None


# Side by side


OTHERS = "stress", "heads", "precision", "ladder", "mixing"  # what files of other commands begin with


def measurements(
    folder: Path | str = "measured",  # where the files are; a page runs in nbs/
) -> dict[str, Measurement]:  # by the file's name; the reader's own, "yours", last
    """All measurements of a folder; files of other commands begin with a word of `OTHERS`.
    Raises FileNotFoundError where there is no such folder, ValueError as `read_measurement`
    does.
    """
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"no folder {str(folder)!r} here, in {Path.cwd().name!r}")
    files = Path(folder).glob("*.json")
    files = sorted(files, key=lambda path: (path.stem == "yours", path.stem))
    return {p.stem: read_measurement(p) for p in files if not p.stem.startswith(OTHERS)}


def ratio_and_spread(table: Table, row: Row) -> str:
    "`1.07 (1.05 to 1.09)`; `=` in front where that is no difference."
    if row.ratio is None:
        return row.note
    sign = "= " if table.is_noise(row) and row is not table.rows[0] else ""
    return f"{sign}{row.ratio:.2f} ({row.low:.2f} to {row.high:.2f})"


def memory(table: Table, row: Row) -> str:
    "The most bytes that one call holds."
    if row.peak_bytes is None:
        return row.note
    unit, size = ("MiB", 2**20) if row.peak_bytes >= 2**20 else ("KiB", 2**10)
    return f"{row.peak_bytes / size:,.1f} {unit}"


def share_of_peak(table: Table, row: Row) -> str:
    "How much of the machine's measured rate of matrix products was reached."
    return row.note if row.share is None else f"{row.share:.0%}"


def side_by_side(
    columns: dict[str, Measurement],  # as `measurements` gives them
    suite: str,
    mode: str,  # which table
    size: list[int],  # batch, tokens, width, heads
    cell: Callable[[Table, Row], str] = ratio_and_spread,  # what stands in a cell
) -> str:
    """One table, a column for each measurement that has it: the book's, then the reader's
    own. Where none has it, the command that makes it.
    """
    found = {name: m.find(suite, mode, size) for name, m in columns.items()}
    found = {name: table for name, table in found.items() if table}
    sizes = ",".join(map(str, size))
    if not found:
        return (
            f"{suite}, {mode}: not measured yet. In a clone, with a NAME of your own:\n"
            f"  mha-book bench {suite} --sizes {sizes} --json nbs/measured/NAME.json"
        )
    heads = [f"{name}: {columns[name].head}" for name in found]
    names = list(dict.fromkeys(row.name for table in found.values() for row in table.rows))
    cells = {name: {row.name: cell(table, row) for row in table.rows} for name, table in found.items()}
    width = {name: max(len(name), *map(len, column.values())) for name, column in cells.items()}
    first = max(map(len, names))
    titles = "   ".join([" " * first, *(f"{name:{width[name]}}" for name in found)])
    lines = [f"{suite}, {mode}; batch, tokens, width, heads: {sizes}", *heads, "", titles.rstrip()]
    for row in names:
        shown = [f"{column.get(row, '-'):{width[name]}}" for name, column in cells.items()]
        lines.append("   ".join([f"{row:{first}}", *shown]).rstrip())
    return "\n".join(lines)
