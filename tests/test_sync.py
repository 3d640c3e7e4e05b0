"""The package is what the notebooks export, the wheel is what settings.ini says, and the notebooks are clean."""

import ast
import email
import filecmp
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import warnings
import zipfile
from configparser import ConfigParser
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "nbs").rglob("*.ipynb"))
EXPORT = "from nbdev.doclinks import nbdev_export; nbdev_export.__wrapped__()"


# The package equals a fresh export


def files(folder: Path) -> set[str]:
    "Relative paths of all files, compiled ones apart."
    found = (p for p in folder.rglob("*") if p.is_file() and "__pycache__" not in p.parts)
    return {p.relative_to(folder).as_posix() for p in found}


def drift(fresh: Path, package: Path) -> dict[str, list[str]]:
    "How a package differs from a fresh export; empty if it does not."
    want, have = files(fresh), files(package)
    _, changed, unreadable = filecmp.cmpfiles(fresh, package, sorted(want & have), shallow=False)
    found = {"missing": sorted(want - have), "orphaned": sorted(have - want), "changed": changed + unreadable}
    return {kind: names for kind, names in found.items() if names}


@pytest.fixture(scope="module")
def fresh_export(tmp_path_factory) -> Path:
    "The package as the notebooks export it now."
    place = tmp_path_factory.mktemp("export")
    shutil.copytree(ROOT / "nbs", place / "nbs", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    shutil.copy(ROOT / "settings.ini", place)
    environment = {key: value for key, value in os.environ.items() if key != "IN_TEST"}
    subprocess.run([sys.executable, "-c", EXPORT], cwd=place, env=environment, check=True)
    return place / "mha_book"


def test_package_is_the_export(fresh_export):
    assert drift(fresh_export, ROOT / "mha_book") == {}, "mha_book/ is out of date: make export"


def test_drift_is_seen(fresh_export, tmp_path):
    package = tmp_path / "mha_book"
    shutil.copytree(fresh_export, package)
    (package / "heads" / "orphan.py").touch()
    (package / "heads" / "single_head.py").unlink()
    with (package / "__init__.py").open("a") as file:
        file.write("# by hand\n")
    assert drift(fresh_export, package) == {
        "missing": ["heads/single_head.py"],
        "orphaned": ["heads/orphan.py"],
        "changed": ["__init__.py"],
    }


def escapes(source: str) -> list[str]:
    "Texts whose backslashes mean something else than meant: a docstring's `\\times` begins with a tab."
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tree = ast.parse(source)
    texts = (node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str))
    return [str(warning.message) for warning in caught] + [text for text in texts if re.search(r"[\a\b\f\t\v]", text)]


@pytest.mark.parametrize("path", sorted((ROOT / "mha_book").rglob("*.py")), ids=lambda path: path.stem)
def test_no_stray_escapes(path):
    assert escapes(path.read_text(encoding="utf8")) == []


def test_stray_escapes_are_seen():
    assert escapes("'a \\nline'") == []
    assert len(escapes("'n \\times n'")) == len(escapes("'\\sqrt d'")) == 1


# The wheel says what settings.ini says


def settings() -> dict[str, str]:
    parser = ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini", encoding="utf8")
    return dict(parser["DEFAULT"])


def build_wheel(source: Path, target: Path) -> Path:
    "Build a project's wheel with the tools that are installed, from a copy, so that nothing is left behind."
    copy = target / "source"
    shutil.copytree(source, copy, ignore=shutil.ignore_patterns(".*", "_build", "build", "dist", "*.egg-info", "nbs"))
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", target / "dist", copy],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    return next((target / "dist").glob("*.whl"))


def metadata(wheel: Path):
    "The METADATA file of a wheel."
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return email.message_from_bytes(archive.read(name))


def requirements(meta) -> dict[str, set[str]]:
    "What a wheel requires, by extra; the plain requirements under ''."
    found: dict[str, set[str]] = {"": set(), **{extra: set() for extra in meta.get_all("Provides-Extra", [])}}
    for line in meta.get_all("Requires-Dist", []):
        extra = re.search(r"extra == ['\"](\w+)['\"]", line)
        found[extra[1] if extra else ""].add(plain(line))
    return found


def plain(requirement: str) -> str:
    "Name and versions of a requirement, without its marker."
    parsed = Requirement(requirement)
    return f"{parsed.name}{parsed.specifier}"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    return build_wheel(ROOT, tmp_path_factory.mktemp("wheel"))


def test_wheel_metadata_is_settings(wheel):
    meta, want = metadata(wheel), settings()
    assert meta["Name"] == want["lib_name"]
    assert meta["Version"] == want["version"]
    assert meta["Summary"] == want["description"]
    assert meta["Requires-Python"] == ">=" + want["min_python"]
    assert (meta["License-Expression"], want["license"]) == ("Apache-2.0", "apache2")
    extras = {key.removesuffix("_requirements"): text for key, text in want.items() if key.endswith("_requirements")}
    expected = {
        extra: {plain(line) for line in text.split("\n") if line.strip()}
        for extra, text in {"": want["requirements"], **extras}.items()
    }
    assert requirements(meta) == expected


def commands(wheel: Path) -> dict[str, str]:
    "The commands that a wheel brings, and the functions behind them."
    parser = ConfigParser(delimiters=["="])
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/entry_points.txt"))
        parser.read_string(archive.read(name).decode())
    return dict(parser["console_scripts"]) if "console_scripts" in parser else {}


def test_wheel_brings_the_commands(wheel):
    wanted = dict(line.split("=") for line in settings()["console_scripts"].split("\n") if line.strip())
    assert commands(wheel) == wanted and wanted
    for target in wanted.values():
        module, _, function = target.partition(":")
        assert callable(getattr(importlib.import_module(module), function))


def test_wheel_holds_the_package_alone(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert names == {f"mha_book/{name}" for name in files(ROOT / "mha_book")}


# The installed wheel needs only what it requires


def import_alone(place: Path) -> subprocess.CompletedProcess:
    "Import the package that lies in `place`, in a Python that has only what settings.ini requires."
    names = [Requirement(line).name for line in settings()["requirements"].split("\n") if line.strip()]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.run(
        [sys.executable, ROOT / "tests" / "support" / "import_alone.py", place, *names],
        cwd=place,
        env=environment,
        capture_output=True,
        text=True,
    )


def test_installed_wheel_needs_only_its_requirements(wheel, tmp_path):
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", tmp_path, wheel],
        check=True,
        stderr=subprocess.DEVNULL,
    )
    done = import_alone(tmp_path)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).is_relative_to(tmp_path)


@pytest.mark.parametrize("name", ["matplotlib", "nbdev", "beartype", "hypothesis", "safetensors"])
def test_missing_requirement_is_seen(tmp_path, name):
    (tmp_path / "mha_book").mkdir()
    (tmp_path / "mha_book" / "__init__.py").write_text(f"import numpy\nimport {name}\n")
    done = import_alone(tmp_path)
    assert done.returncode != 0 and f"{name} is not required by the package" in done.stderr


# The notebooks hold sources only


def impurities(notebook: dict) -> list[str]:
    "What in a notebook is not its source: outputs, run counts, metadata that a tool left, cells without an id."
    found = [] if notebook["nbformat_minor"] >= 5 else ["nbformat below 4.5: no cell ids"]
    if extra := set(notebook["metadata"]) - {"kernelspec"}:
        found.append(f"notebook metadata {sorted(extra)}")
    if notebook["metadata"].get("kernelspec", {}).get("name") != "python3":
        found.append("kernel is not python3")
    for number, cell in enumerate(notebook["cells"], 1):
        if extra := set(cell["metadata"]) - {"tags"}:
            found.append(f"cell {number}: metadata {sorted(extra)}")
        if cell.get("outputs") or cell.get("execution_count") is not None:
            found.append(f"cell {number}: outputs")
    ids = [cell.get("id") for cell in notebook["cells"]]
    if None in ids or len(set(ids)) < len(ids):
        found.append("cell ids missing or used twice")
    return found


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_clean(path):
    assert impurities(json.loads(path.read_text(encoding="utf8"))) == [], "clean it: make clean-notebooks"


def test_impurities_are_seen():
    cell = {"cell_type": "code", "id": "a", "metadata": {"scrolled": True}, "outputs": [{}], "execution_count": 3}
    notebook = {"nbformat": 4, "nbformat_minor": 4, "metadata": {"widgets": {}}, "cells": [cell, cell]}
    assert len(impurities(notebook)) == 8
