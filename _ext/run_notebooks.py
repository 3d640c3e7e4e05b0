"""Run the book's notebooks once, two at a time, into the cache that the book is built from.

    python _ext/run_notebooks.py [NAME ...]      # all of them, or those whose file name starts with a NAME

A run is a test and a page at once: a cell that raises fails it. A notebook with the directive `#| timing` in a cell
measures something, and runs alone after the others.
"""

from __future__ import annotations

import os
import re
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import nbformat
from jupyter_cache import get_cache
from jupyter_cache.base import CacheBundleIn
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from nbdev_bridge import CACHE, ROOT, TIMEOUT, prepare_kernels, read_nb, split_directives

WORKERS = 2
BUDGET = 60  # seconds that a page may take: more earns a remark, and TIMEOUT ends it
COLOURS = re.compile(r"\x1b\[[0-9;]*m")


def notebooks(names: list[str]) -> list[Path]:
    "The notebooks whose file names start with one of `names`; all of them if none is given."
    found = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
    return [p for p in found if not names or p.name.startswith(tuple(names))]


def read(path: Path):
    "The notebook at `path`, as the book sees it."
    return read_nb(path.read_text(encoding="utf8"))


def is_timing(path: Path) -> bool:
    "Whether a cell says `#| timing`."
    cells = nbformat.read(path, as_version=4).cells
    return any("timing" in split_directives(cell.source)[0] for cell in cells if cell.cell_type == "code")


def execute(path: Path):
    "Run one notebook. Returns it with its outputs, the seconds it took, and what went wrong, if anything."
    nb, begin, error, at = read(path), time.perf_counter(), "", 0

    def seconds_left(cell):
        return max(1, TIMEOUT - (time.perf_counter() - begin))

    def note_cell(cell, cell_index):
        nonlocal at
        at = cell_index  # from 0, but the stamp's first cell is not in the file: so from 1 there

    client = NotebookClient(
        nb,
        timeout_func=seconds_left,
        on_cell_execute=note_cell,
        record_timing=False,
        resources={"metadata": {"path": str(path.parent)}},
        extra_arguments=["--IPKernelApp.log_level=40"],
    )  # errors only
    try:
        client.execute()
    except (CellExecutionError, CellTimeoutError, DeadKernelError) as problem:
        error = f"{path.name}, cell {at}:\n{COLOURS.sub('', str(problem))}"
    return nb, time.perf_counter() - begin, error


def keep(cache, path: Path, nb, seconds: float) -> None:
    "Put an executed notebook into the cache."
    bundle = CacheBundleIn(nb, str(path), data={"execution_seconds": seconds})
    cache.cache_notebook_bundle(bundle, check_validity=False, overwrite=True)


def is_cached(cache, path: Path) -> bool:
    "Whether the cache holds a run of this very notebook in these very surroundings."
    try:
        return bool(cache.match_cache_notebook(read(path)))
    except KeyError:
        return False


def prune(cache) -> None:
    "Drop the runs that no notebook matches any more."
    current = {cache.match_cache_notebook(read(path)).pk for path in notebooks([]) if is_cached(cache, path)}
    for record in cache.list_cache_records():
        if record.pk not in current:
            cache.remove_cache(record.pk)


def run_all(cache, todo: list[Path]) -> list[str]:
    "Run the notebooks, those that time something alone at the end. Returns what went wrong."
    alone = [path for path in todo if is_timing(path)]
    together = [path for path in todo if path not in alone]
    errors, done = [], 0
    for workers, batch in ((WORKERS, together), (1, alone)):
        with ProcessPoolExecutor(workers) as pool:
            runs = {pool.submit(execute, path): path for path in batch}
            try:
                for run in as_completed(runs):
                    done += 1
                    errors += report(cache, f"[{done}/{len(todo)}]", runs[run], *run.result())
            except BaseException:  # what has not begun, does not begin
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    return errors


def report(cache, count: str, path: Path, nb, seconds: float, error: str) -> list[str]:
    "Keep a run if it went well, and print a line on it."
    if not error:
        keep(cache, path, nb, seconds)
    remark = "" if seconds <= BUDGET else f", more than the {BUDGET} s that a page may take"
    print(f"{count} {path.name}: {'FAILED after' if error else 'ran in'} {seconds:.1f} s{remark}", flush=True)
    return [error] if error else []


def main(names: list[str]) -> int:
    "Run what the cache lacks. Returns the exit status."
    prepare_kernels()
    CACHE.parent.mkdir(exist_ok=True)
    cache, found = get_cache(str(CACHE)), notebooks(names)
    todo = [path for path in found if not is_cached(cache, path)]
    print(f"{len(found)} notebooks, {len(found) - len(todo)} of them unchanged since their last run", flush=True)
    errors = run_all(cache, todo)
    prune(cache)
    for error in errors:
        print(f"\n{'-' * 80}\n{error}", file=sys.stderr)
    return 1 if errors else 0


def main_to_the_end(names: list[str]) -> int:
    "`main`, but for Ctrl-C and a reader who has left, such as `head`: one line and no traceback."
    try:
        return main(names)
    except KeyboardInterrupt:
        code, why = 130, "stopped by Ctrl-C"
    except BrokenPipeError:
        code, why = 141, "stopped, for nobody reads the output any more"
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter's own last flush
    print(f"{why}; the notebooks that ran are kept", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main_to_the_end(sys.argv[1:]))
