"""What runs elsewhere, on a push, a tag or a Monday, calls what the Makefile has, and pins what it uses."""

import re
from pathlib import Path

import pytest

yaml = pytest.importorskip("yaml")
ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
PINNED = re.compile(r"[\w-]+/[\w-]+@[0-9a-f]{40}")


def targets() -> set[str]:
    "The targets of the Makefile."
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf8"), re.M))


def steps(workflow: dict) -> list[dict]:
    "All steps of all jobs."
    return [step for job in workflow["jobs"].values() for step in job["steps"]]


def faults(workflow: dict) -> list[str]:
    "Actions that are not pinned to a commit, targets and test files that are not there, rights for everything."
    found = [step["uses"] for step in steps(workflow) if "uses" in step and not PINNED.fullmatch(step["uses"])]
    runs = [step["run"] for step in steps(workflow) if "run" in step]
    matrices = [job.get("strategy", {}).get("matrix", {}) for job in workflow["jobs"].values()]
    runs += [one["command"] for matrix in matrices for one in matrix.get("include", ()) if "command" in one]
    for command in runs:
        for words in re.findall(r"\bmake ([a-z-]+(?: [a-z-]+)*)", command):
            found += [f"make {word}" for word in words.split() if word not in targets()]
        found += [path for path in re.findall(r"tests/[\w/]+\.py", command) if not (ROOT / path).exists()]
    return found + (["permissions"] if workflow.get("permissions") != {} else [])


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_calls_what_is_there(path):
    assert faults(yaml.safe_load(path.read_text(encoding="utf8"))) == []


def test_faults_of_a_workflow_are_seen():
    job = {"steps": [{"uses": "actions/checkout@v6"}, {"run": "make nothing"}, {"run": "pytest tests/test_gone.py"}]}
    seen = faults({"jobs": {"a": job}})
    assert seen == ["actions/checkout@v6", "make nothing", "tests/test_gone.py", "permissions"]


def test_what_commits_and_updates_are_held_to_can_be_read():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf8"))["repos"][0]["hooks"]
    assert {hook["entry"].removeprefix("make ") for hook in hooks} <= targets() and len(hooks) == 3
    updates = yaml.safe_load((ROOT / ".github" / "dependabot.yml").read_text(encoding="utf8"))["updates"]
    assert {update["package-ecosystem"] for update in updates} == {"pip", "github-actions"}
    for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"):
        form = yaml.safe_load(path.read_text(encoding="utf8"))
        assert form["name"] and form["description"] and all("type" in part for part in form["body"])
