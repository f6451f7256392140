"""requirements.txt, pyproject.toml and environment.yml say the same; what is imported is pinned; the rest is gone."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
# What a distribution is called when it is imported, where the names differ.
IMPORTED_AS = {
    "hydra-core": "hydra", "pillow": "PIL", "mmcv-lite": "mmcv", "mmsegmentation": "mmseg", "cityscapesscripts": "cityscapesscripts",
    "hydra-submitit-launcher": "hydra_plugins", "hydra-joblib-launcher": "hydra_plugins", "pytest-xdist": "xdist",
    "setuptools": "pkg_resources",
}  # fmt: skip
# Imported by an upstream that does not say so, or only run as a command.
FOR_OTHERS = {
    "yacs", "tabulate", "termcolor", "cloudpickle", "scipy", "tensorboard", "fvcore", "mmcv", "ftfy", "regex", "hydra_plugins",
    "pkg_resources", "xdist", "ruff", "mypy",
}  # fmt: skip


def pins() -> dict[str, str]:
    found = re.findall(r"^([A-Za-z0-9_.-]+)==(\S+)", (ROOT / "requirements.txt").read_text(), re.M)
    return {name.lower(): version for name, version in found}


def imports() -> set[str]:
    names: set[str] = set()
    for folder in ("budgeted", "tasks", "benchmarks", "hydra_plugins", "tests", "."):
        for path in (ROOT / folder).glob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Import):
                    names |= {a.name.split(".")[0] for a in node.names}
                elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                    names.add(node.module.split(".")[0])
    text = "".join(p.read_text() for p in (ROOT / "tasks").glob("*.py"))
    return (
        names
        | set(re.findall(r'upstream\(\s*"([a-z0-9_]+)', text))
        | set(re.findall(r'import_module\("([a-z0-9_]+)', text))
    )


def test_every_line_of_requirements_is_an_exact_pin():
    for line in (ROOT / "requirements.txt").read_text().splitlines():
        line = line.partition("#")[0].strip()
        assert not line or re.fullmatch(r"[A-Za-z0-9_.-]+==\S+", line), line


def test_pyproject_asks_for_nothing_that_is_not_pinned():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = project["dependencies"] + [d for extra in project["optional-dependencies"].values() for d in extra]
    names = {re.match(r"[A-Za-z0-9_.-]+", d)[0].lower() for d in asked}  # type: ignore[index]
    optional = {"ray", "hydra-ray-launcher", "wandb", "mlflow"}
    assert names - optional <= set(pins())
    assert set(pins()) - names <= {"filelock"} | set(), "pinned, but no extra of pyproject.toml asks for it"


def test_conda_installs_the_same_pins():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert {"pip": ["-r requirements.txt"]} in environment["dependencies"]
    assert "python=3.11" in environment["dependencies"]


def test_what_is_imported_is_pinned_and_the_other_way_round():
    own = {"budgeted", "tasks", "benchmarks", "hydra_plugins", "run", "tests", "conftest", "slurm", "detectron2"}
    available = {IMPORTED_AS.get(name, name.replace("-", "_")) for name in pins()}
    indirect = {"omegaconf", "yaml", "submitit", "joblib", "matplotlib", "wandb", "mlflow", "ray", "psutil"}
    assert imports() - own - set(sys.stdlib_module_names) - available - indirect == set()
    assert available - imports() - FOR_OTHERS == set(), "pinned, but nothing imports it"
