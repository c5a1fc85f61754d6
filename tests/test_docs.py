"""The documentation is true: its commands run, its Python prints what it says, its flags exist, its site builds.

A page is read from top to bottom, in a folder that holds a small trained run (`runs/tales`) and stories (`stories.txt`,
`held-out.txt`). Its fences:

- `sh`: every line is run. Lines that call gemlet run here, made small by the flags of `SMALL`, which are put behind
  those of the page; `make TARGET` only has to be a target; anything else goes to the shell.
- `python`: run, one block after another in the same namespace. A `text` fence right behind is what it prints.
- `toml`: a configuration that is accepted.
- `<!-- needs: X -->` before a fence: run only where X is there: `the network` (never in tests), `a GPU`, or the name of
  a package or a program. The calls of gemlet in it are parsed all the same.
"""

import importlib.metadata
import re
import shlex
import shutil
import subprocess
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import pytest
import torch

from gemlet import cli, tales
from gemlet.config import RunConfig, preset
from gemlet.train import train

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted(path for path in (ROOT / "docs").rglob("*.md") if "site" not in path.parts)]
NAMES = [path.relative_to(ROOT).as_posix() for path in PAGES]

RUN = {
    "train": {
        "max-steps": 4,
        "warmup-steps": 1,
        "sequence-length": 32,
        "batch-size": 2,
        "micro-batch-size": 2,
        "eval-every": 2,
        "eval-tokens": 256,
        "save-every": 2,
        "sample-every": 0,
        "compile": "off",
    },
    "model": {
        "vocab-size": 300,
        "hidden-size": 48,
        "intermediate-size": 64,
        "head-dim": 16,
        "max-position-embeddings": 512,
    },
    "data": {"max-documents": 200},
}
SMALL = {
    "train": [f"--{group}.{name}={value}" for group, values in RUN.items() for name, value in values.items()],
    "eval": ["--max-documents=8"],
    "generate": ["--max-new-tokens=8"],
    "verify": ["--max-documents=2"],
}
SMALL["quickstart"] = SMALL["train"]


@dataclass(frozen=True)
class Block:
    """A fence: where it starts, what it is, what stands in it."""

    line: int
    language: str
    code: str
    needs: str | None
    prints: str | None

    @property
    def commands(self) -> list[str]:
        """The lines of a `sh` fence, continued ones joined."""
        return [line for line in self.code.replace("\\\n", " ").splitlines() if line and not line.startswith("#")]


FENCE = re.compile(
    r"(?:^<!-- needs: (?P<needs>.+) -->\n)?^```(?P<language>.*)\n(?P<code>(?:.*\n)*?)```$"
    r"(?:\n\n```text\n(?P<prints>(?:.*\n)*?)```$)?",
    re.MULTILINE,
)


def blocks(page: str) -> list[Block]:
    """The fences of a page; one of text right behind another is what that prints."""
    return [Block(page.count("\n", 0, f.start("code")), **f.groupdict()) for f in FENCE.finditer(page)]


def absent(needs: str | None) -> bool:
    """Whether something that a fence needs is not here."""
    if needs is None or needs == "a GPU":
        return needs is not None and not torch.cuda.is_available()
    if needs == "the network" or shutil.which(needs):
        return needs == "the network"
    return not any(True for found in importlib.metadata.distributions() if found.name == needs)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as a reader has it after the quick start, only that the run is a very short one."""
    folder = tmp_path_factory.mktemp("docs")
    stories = list(islice(tales.stories(seed=2), 240))
    for name, part in (("stories.txt", stories[:200]), ("held-out.txt", stories[200:])):
        (folder / name).write_text("\n<|endoftext|>\n".join(part), encoding="utf-8")
    small = {group: {key.replace("-", "_"): value for key, value in values.items()} for group, values in RUN.items()}
    base = preset("tales").model_dump()
    config = RunConfig.model_validate({group: base[group] | small[group] for group in base})
    train(config, folder / "runs" / "tales", quiet=True)
    return folder


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_what_a_page_says_to_run_runs(
    page: Path, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    namespace: dict[str, object] = {}
    for block in blocks(page.read_text(encoding="utf-8")):
        where = f"{page.name}:{block.line}"
        if block.language == "toml":
            RunConfig.from_toml(block.code, where)
        elif block.language == "sh":
            for command in block.commands:
                (parse if absent(block.needs) else run)(command)
        elif block.language == "python" and not absent(block.needs):
            capsys.readouterr()
            exec(compile(block.code, where, "exec"), namespace)
            if block.prints is not None:
                assert capsys.readouterr().out == block.prints, where


def run(command: str) -> None:
    """Run a command, small."""
    words = shlex.split(command)
    if words[0] == "make":
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        assert re.search(rf"^{words[1]}:", makefile, re.MULTILINE), f"{command}: no such target"
    elif words[0] == "gemlet":
        assert cli.main([*words[1:], *SMALL.get(words[1], [])]) == 0, command
    else:
        subprocess.run(command, shell=True, check=True, capture_output=True)


def parse(command: str) -> None:
    """See that a command which cannot be run here is at least one that gemlet knows."""
    words = shlex.split(command)
    if words[0] == "gemlet":
        verb = cli._verb(words[1:])
        cli._parse(" ".join(verb), words[1 + len(verb) :])


def test_every_fence_is_of_a_known_kind():
    known = {"sh", "python", "text", "toml", "json", "mermaid", "{include} ../benchmarks/RESULTS.md"}
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        found = blocks(text)
        assert {block.language for block in found} <= known, page.name
        read = len(found) + sum(block.prints is not None for block in found)
        assert text.count("```") == 2 * read, f"{page.name}: a fence that is not read"
