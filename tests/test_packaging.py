"""What is written about the package in several places agrees. `make wheel-test` tries the wheel itself."""

import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_dependency_is_pinned_to_a_version_that_it_allows():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    pins = {canonicalize_name(name): version for name, version in pins.items()}
    extras = [requirement for extra in PROJECT["optional-dependencies"].values() for requirement in extra]
    wanted = [Requirement(r) for r in [*PROJECT["dependencies"], *extras] if not r.startswith("gemlet[")]
    unfit = [str(r) for r in wanted if not r.specifier.contains(pins.get(canonicalize_name(r.name), "0"))]
    assert unfit == []


def test_the_readme_is_short_and_names_files_that_there_are():
    assert len(README.splitlines()) <= 160
    named = set(re.findall(r"(\w+\.py)\b", README))
    assert {"model.py", "train.py", "native.py"} <= named <= {path.name for path in (ROOT / "gemlet").glob("*.py")}


def test_every_link_of_the_readme_leads_somewhere():
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert [link for link in links if "://" not in link and not (ROOT / link).exists()] == []
