"""Run notebooks from top to bottom on a simulated GPU, which `pick_device` picks: see simulated_gpu.py.

python tests/devices/on_simulated_gpu.py [NAME ...]      # all of them, or those whose file name starts with a NAME
"""

import os
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

DEVICES = Path(__file__).resolve().parent
sys.path.insert(0, str(DEVICES.parents[1] / "_ext"))
from nbdev_bridge import TIMEOUT, prepare_kernels  # noqa: E402
from run_notebooks import COLOURS, notebooks, read  # noqa: E402

BEFORE = "__import__('simulated_gpu').for_good()"
AFTER = "assert __import__('torch').empty(1, device='cuda').is_cuda    # the GPU was there until the end"


def run(nb, folder: Path) -> str:
    "Run a notebook; what went wrong, if anything."
    prepare_kernels()
    os.environ["PYTHONPATH"] += os.pathsep + str(DEVICES)
    os.environ.pop("MHA_BOOK_DEVICE", None)
    nb.cells = [nbformat.v4.new_code_cell(BEFORE), *nb.cells, nbformat.v4.new_code_cell(AFTER)]
    try:
        NotebookClient(
            nb,
            timeout=TIMEOUT,
            resources={"metadata": {"path": str(folder)}},
            extra_arguments=["--IPKernelApp.log_level=40"],
        ).execute()
    except (CellExecutionError, CellTimeoutError, DeadKernelError) as problem:
        return COLOURS.sub("", str(problem))
    return ""


def main(names: list[str]) -> int:
    "Run them one after the other. Returns the exit status."
    failed = False
    for path in notebooks(names):
        begin = time.perf_counter()
        error = run(read(path), path.parent)
        print(
            f"{path.name}: {'FAILED after' if error else 'ran in'} {time.perf_counter() - begin:.1f} s\n{error}",
            end="",
            flush=True,
        )
        failed = failed or bool(error)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
