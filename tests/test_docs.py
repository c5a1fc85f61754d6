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
import sys
from dataclasses import dataclass
from html.parser import HTMLParser
from itertools import islice
from pathlib import Path

import pytest
import torch

from gemlet import cli, tales
from gemlet.config import RunConfig, preset
from gemlet.train import train
from gemlet.verbs import VERBS

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
SMALL["quickstart"] = SMALL["plan"] = SMALL["train"]


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
    if needs is None or needs == "the network":
        return needs is not None
    if needs == "a GPU":
        return not torch.cuda.is_available()
    try:
        importlib.metadata.distribution(needs)
    except importlib.metadata.PackageNotFoundError:
        return shutil.which(needs) is None
    return False


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


FLAG = re.compile(r"(?<!\S)--[a-z][\w.-]*")


def test_every_flag_that_a_page_names_exists(capsys: pytest.CaptureFixture[str]):
    known = {"--help", "--debug", "--version"}.union(*(shown(verb, capsys) for verb in VERBS))
    for page in PAGES:
        prose = FENCE.sub("", page.read_text(encoding="utf-8"))
        named = {flag for code in re.findall(r"`([^`]+)`", prose) for flag in FLAG.findall(code)}
        assert named - known == set(), page.name


def shown(verb: str, capsys: pytest.CaptureFixture[str]) -> set[str]:
    """The flags that `gemlet VERB --help` lists."""
    capsys.readouterr()
    assert cli.main([*verb.split(), "--help"]) == 0
    rows = re.findall(r"^\W (--.*)", capsys.readouterr().out, re.MULTILINE)
    return {flag for row in rows for flag in FLAG.findall(row)}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as `make docs` does: a warning is an error."""
    pytest.importorskip("sphinx", reason="the extra docs is not installed")
    folder = tmp_path_factory.mktemp("site")
    options = ["-W", "--keep-going", "-q", "-c", ROOT / "docs" / "site", "-d", folder / "doctrees"]
    built = [sys.executable, "-m", "sphinx", *options, ROOT / "docs", folder / "html"]
    done = subprocess.run(built, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / "html"


class Loaded(HTMLParser):
    """What a browser fetches to show a page: everything that is referred to, but for links."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        fetched = [values.get(key) for key in ("src", "srcset", "data", "poster", "xlink:href")]
        fetched += [values.get("href")] if tag in ("link", "image", "use") else []
        self.addresses += [address for address in fetched if address]


def test_the_site_is_read_without_a_network(site: Path):
    pages = sorted(site.rglob("*.html"))
    assert {path.relative_to(site).with_suffix("").as_posix() for path in pages} >= {
        path.relative_to(ROOT / "docs").with_suffix("").as_posix() for path in PAGES[1:]
    }
    for page in pages:
        loaded = Loaded()
        loaded.feed(page.read_text(encoding="utf-8"))
        assert loaded.addresses, page.name
        for address in loaded.addresses:
            inside = address.startswith(("data:", "#")) or (page.parent / address.partition("?")[0]).is_file()
            assert inside, f"{page.name} loads {address}"
    for path in [*site.rglob("*.css"), *pages]:
        text = path.read_text(encoding="utf-8")
        assert re.findall(r"""(?:url\(|@import)\s*["']?(?:https?:)?//[^"')]+""", text) == [], path.name


def test_the_site_draws_its_diagrams(site: Path):
    html = (site / "architecture.html").read_text(encoding="utf-8")
    assert "<svg" in html and "flowchart LR" not in html


def test_the_reference_has_every_flag_and_no_other(site: Path, capsys: pytest.CaptureFixture[str]):
    for page, verbs, whole in (("commands", [*VERBS], False), ("configuration", ["train"], True)):
        html = (site / "reference" / f"{page}.html").read_text(encoding="utf-8")
        for verb in verbs:
            flags = {flag for flag in shown(verb, capsys) if ("." in flag) == whole}
            part = html if whole else html.split(f'id="{verb.replace(" ", "-")}"')[1].split("</section>")[0]
            found = set(re.findall(r'<span class="sig-name descname"><span class="pre">(--[\w.-]+)', part))
            assert found - {"--data"} == flags - {"--data"}, verb
