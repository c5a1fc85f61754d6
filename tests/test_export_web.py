"""A page's folder: whole or not there, complete, asking nobody; wllama's packages are taken as they are known."""

import hashlib
import io
import re
import sys
import tarfile
from html.parser import HTMLParser
from pathlib import Path

import pytest

from gemlet.checkpoint import save_model
from gemlet.errors import GemletError
from gemlet.export import web
from gemlet.export.web import BEGINNINGS, FILES, PACKAGES, WLLAMA, cache_folder, export_web, fetch_wllama, read_wllama
from gemlet.sampling import SamplingParams
from gemlet.testing import tiny_model, tiny_tokenizer

ARCHIVES = ("wllama-wllama-3.13.0.tgz", "wllama-wllama-compat-3.13.0.tgz")


def content(package: str, inside: str) -> bytes:
    """What stands for a file of wllama here."""
    return f"// {package}, {inside}".encode()


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Stand-ins are known instead of the real files, and the cache is empty."""
    digests = {
        file: (package, inside, hashlib.sha256(content(package, inside)).hexdigest())
        for file, (package, inside, _) in FILES.items()
    }
    monkeypatch.setattr(web, "FILES", digests)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    """The packages as npm installs them."""
    folder = tmp_path / "node_modules"
    for package, inside, _ in FILES.values():
        (folder / package / inside).parent.mkdir(parents=True, exist_ok=True)
        (folder / package / inside).write_bytes(content(package, inside))
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny & small"
    save_model(folder, tiny_model(), tiny_tokenizer())
    return folder


@pytest.fixture
def site(model: Path, packages: Path, tmp_path: Path) -> Path:
    return export_web(model, tmp_path / "site", wllama=packages)


def pack(folder: Path, before: tuple[tarfile.TarInfo, ...] = (), changed: str | None = None) -> Path:
    """The packages as `npm pack` leaves them; `before` come first in each archive, one file has a `changed` content."""
    folder.mkdir(exist_ok=True)
    for package, archive in zip(PACKAGES, ARCHIVES, strict=True):
        with tarfile.open(folder / archive, "w:gz") as file:
            for member in before:
                file.addfile(member)
            for owner, inside, _ in FILES.values():
                if owner == package:
                    data = b"something else" if inside == changed else content(owner, inside)
                    member = tarfile.TarInfo(f"package/{inside}")
                    member.size = len(data)
                    file.addfile(member, io.BytesIO(data))
    return folder


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


class Page(HTMLParser):
    """The elements of a page, [(tag, attributes)]."""

    def __init__(self, site: Path):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.feed((site / "index.html").read_text("utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def of(self, *tags: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.elements if tag in tags]


# The folder


def test_the_folder_is_all_there(site: Path):
    page = {"index.html", "page.css", "page.js", "icon.svg"}
    assert names(site) == page | {"model.gguf"} | set(FILES)
    assert (site / "model.gguf").read_bytes()[:4] == b"GGUF"
    for file, (package, inside, _) in FILES.items():
        assert (site / file).read_bytes() == content(package, inside)


def test_the_page_says_what_the_model_is(site: Path):
    text = (site / "index.html").read_text("utf-8")
    assert "$" not in text and "<h1>tiny &amp; small</h1>" in text and "<dd>q8_0</dd>" in text
    assert f"{tiny_model().config.num_parameters:,}" in text
    assert 'download="tiny-small-q8_0.gguf"' in text and 'data-tokens="128"' in text
    size = (site / "model.gguf").stat().st_size
    assert f"{size / 1e6:,.1f} MB" in text


def test_name_and_beginnings_are_text_and_not_markup(model: Path, packages: Path, tmp_path: Path):
    given = {"name": "<b>$name</b>", "beginnings": ['"</textarea><script>', "Es war einmal"]}
    site = export_web(model, tmp_path / "site", wllama=packages, dtype="f16", **given)
    page, text = Page(site), (site / "index.html").read_text("utf-8")
    assert [script.get("src") for script in page.of("script")] == ["page.js"] and not page.of("b")
    assert "<h1>&lt;b&gt;$name&lt;/b&gt;</h1>" in text and ">Es war einmal</button>" in text


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("runs/tales/checkpoints/step-00000010", "tales"),
        ("hub/models--owner--small-tales/snapshots/0123abcd", "small-tales"),
        ("models/tales", "tales"),
    ],
)
def test_a_model_is_called_as_its_run_or_its_repository(model: Path, packages: Path, tmp_path: Path, folder, name):
    (tmp_path / folder).parent.mkdir(parents=True)
    (tmp_path / folder).symlink_to(model)
    site = export_web(tmp_path / folder, tmp_path / "site", wllama=packages)
    assert f"<h1>{name}</h1>" in (site / "index.html").read_text("utf-8")


def test_a_long_context_is_cut_to_what_a_phone_can_hold(packages: Path, tmp_path: Path):
    save_model(tmp_path / "long", tiny_model(max_position_embeddings=32768), tiny_tokenizer())
    site = export_web(tmp_path / "long", tmp_path / "site", wllama=packages)
    assert 'data-tokens="4096"' in (site / "index.html").read_text("utf-8")


def test_a_failure_leaves_nothing(model: Path, packages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def broken(*_):
        raise GemletError("no such thing in GGUF")

    monkeypatch.setattr(web, "export_gguf", broken)
    with pytest.raises(GemletError, match="no such thing"):
        export_web(model, tmp_path / "new" / "site", wllama=packages)
    assert list((tmp_path / "new").iterdir()) == []


def test_what_is_there_stays(model: Path, packages: Path, tmp_path: Path):
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "mine.html").touch()
    with pytest.raises(GemletError, match=r"site is there already and not empty"):
        export_web(model, tmp_path / "site", wllama=packages)
    assert names(tmp_path / "site") == {"mine.html"}


def test_what_cannot_be_is_refused(model: Path, packages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(GemletError, match="dtype is 'int3', but must be one of f32,"):
        export_web(model, tmp_path / "site", dtype="int3", wllama=packages)
    with pytest.raises(GemletError, match="give at least one"):
        export_web(model, tmp_path / "site", beginnings=(), wllama=packages)
    monkeypatch.setattr(web, "LARGEST", 50_000)
    with pytest.raises(GemletError, match=r"parameters take 0\.0 GB as f32, but a browser reads a model of at most"):
        export_web(model, tmp_path / "site", dtype="f32", wllama=packages)
    assert not (tmp_path / "site").exists()


# The page


def test_the_page_names_only_files_that_are_there(site: Path):
    page = Page(site)
    linked = {value for _, a in page.elements for key in ("src", "href") if (value := a.get(key))}
    scripted = re.findall(r"""["'](?:\./)?([\w/.-]+\.(?:js|wasm|gguf|css|svg))["']""", (site / "page.js").read_text())
    assert {"page.css", "page.js", "icon.svg", "model.gguf"} <= linked and {"wllama/index.js"} <= set(scripted)
    assert sorted((linked | set(scripted)) - names(site)) == []


def test_the_page_names_no_other_server(site: Path):
    texts = [(site / file).read_text("utf-8") for file in ("index.html", "page.css", "page.js", "icon.svg")]
    named = {address for text in texts for address in re.findall(r"https?://[\w.:/-]+", text)}
    assert named == {"http://localhost:8000", "http://www.w3.org/2000/svg"}  # an advice, and the name of SVG
    assert [text for text in texts if re.search(r"""["'(`]//""", text)] == []
    policy = next(m["content"] for m in Page(site).of("meta") if m.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None and policy.startswith("default-src 'none'")
    sources = {source for part in policy.split(";") for source in part.split()[1:]}
    assert sources == {"'none'", "'self'", "blob:", "'wasm-unsafe-eval'"}


def test_everything_that_is_typed_or_pressed_has_a_name(site: Path):
    page, labelled = Page(site), {label.get("for") for label in Page(site).of("label")}
    assert [a for a in page.of("input", "textarea") if a.get("id") not in labelled] == []
    ids = [a["id"] for _, a in page.elements if "id" in a]
    assert len(ids) == len(set(ids))
    described = {a["aria-describedby"] for _, a in page.elements if "aria-describedby" in a}
    assert described <= set(ids)
    script = (site / "page.js").read_text("utf-8")
    lists = re.findall(r"\[([^\]]*)\]\.map\(element\)", script)
    asked = set(re.findall(r'element\("([\w-]+)"\)', script)) | set(re.findall(r'"([\w-]+)"', " ".join(lists)))
    assert "form" in asked and asked <= set(ids)
    assert all(a.get("alt") is not None for a in page.of("img"))


def test_the_page_samples_as_gemlet_does_unless_told(site: Path):
    values = {a["id"]: a.get("value") for a in Page(site).of("input")}
    defaults = SamplingParams()
    assert (values["temperature"], values["top-p"]) == (str(defaults.temperature), str(defaults.top_p))
    shown = re.findall(r"<output for=\"([\w-]+)\">([\d.]+)</output>", (site / "index.html").read_text("utf-8"))
    assert dict(shown) == {"temperature": values["temperature"], "top-p": values["top-p"]}
    off = (defaults.top_k, defaults.min_p, defaults.repetition_penalty)
    assert off == (None, 0, 1) and 'samplers: ["temperature", "top_p"]' in (site / "page.js").read_text("utf-8")


def test_the_first_beginning_is_written_already(site: Path):
    text = (site / "index.html").read_text("utf-8")
    assert re.search(r"<textarea[^>]*>([^<]*)</textarea>", text)[1] == BEGINNINGS[0]  # pyright: ignore[reportOptionalSubscript]
    assert re.findall(r'<button type="button">([^<]*)</button>', text) == list(BEGINNINGS)


# wllama


def test_archives_and_unpacked_packages_are_the_same(packages: Path, tmp_path: Path):
    assert read_wllama(packages) == read_wllama(pack(tmp_path / "packed"))
    assert set(read_wllama(packages)) == set(FILES)


def test_without_wllama_it_says_how_to_get_it(model: Path, tmp_path: Path):
    with pytest.raises(GemletError) as error:
        export_web(model, tmp_path / "site")
    assert str(cache_folder()) in str(error.value) and "--fetch" in str(error.value) and "\n" not in str(error.value)
    assert f"npm pack @wllama/wllama@{WLLAMA} @wllama/wllama-compat@{WLLAMA}" in str(error.value)
    assert not (tmp_path / "site").exists()


@pytest.mark.parametrize("file", FILES)
def test_a_file_with_another_content_is_refused(packages: Path, file: str):
    package, inside, _ = FILES[file]
    (packages / package / inside).write_bytes(content(package, inside) + b" and more")
    with pytest.raises(GemletError, match=rf"{inside} of {package} is not that of release {WLLAMA}"):
        read_wllama(packages)
    (packages / package / inside).unlink()
    with pytest.raises(GemletError, match=f"{package} has no {inside}"):
        read_wllama(packages)


def test_names_in_an_archive_lead_nowhere(tmp_path: Path):
    """Whatever an archive says, what is taken is what is known, and nothing is written."""
    package, inside, _ = next(iter(FILES.values()))
    hostile = [tarfile.TarInfo(name) for name in ("../escaped", "/escaped", "package/../../escaped")]
    link = tarfile.TarInfo("package/" + inside.rpartition("/")[0])
    link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path)
    folder = pack(tmp_path / "packed", (*hostile, link))
    before = names(tmp_path)
    assert read_wllama(folder)["wllama/index.js"] == content(package, inside)
    assert names(tmp_path) == before


def test_a_link_in_place_of_a_file_is_no_file(tmp_path: Path):
    package, inside, _ = next(iter(FILES.values()))
    (tmp_path / "secret").write_bytes(content(package, inside))
    folder = pack(tmp_path / "packed")
    with tarfile.open(folder / ARCHIVES[0], "w:gz") as file:
        link = tarfile.TarInfo(f"package/{inside}")
        link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path / "secret")
        file.addfile(link)
    with pytest.raises(GemletError, match=f"{package} has no {inside}"):
        read_wllama(folder)


def test_a_huge_file_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(web, "_LARGEST_FILE", 5)
    with pytest.raises(GemletError, match=r"has no esm/index\.js"):
        read_wllama(pack(tmp_path / "packed"))


@pytest.mark.parametrize("damage", [b"", b"\x1f\x8b no archive", None])
def test_a_damaged_archive_is_told(tmp_path: Path, damage: bytes | None):
    archive = pack(tmp_path / "packed") / ARCHIVES[0]
    archive.write_bytes(archive.read_bytes()[:60] if damage is None else damage)
    with pytest.raises(GemletError, match=f"{ARCHIVES[0]} cannot be read"):
        read_wllama(archive.parent)


@pytest.fixture
def npm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program npm that "downloads" from a folder, and notes what it was asked for in a file."""
    folder = tmp_path / "bin"
    folder.mkdir()
    script = folder / "npm"
    script.write_text(
        f"#!{sys.executable}\n"
        "import pathlib, shutil, sys\n"
        "here = pathlib.Path(__file__).parent\n"
        "with (here / 'asked').open('a') as file: print(*sys.argv[1:], file=file)\n"
        "target = sys.argv[sys.argv.index('--pack-destination') + 1]\n"
        "archives = sorted((here / 'packed').glob('*.tgz'))\n"
        "for archive in archives: shutil.copy(archive, target)\n"
        "if not archives: sys.exit('npm ERR! code ENOTFOUND\\nnpm ERR! network')\n"
    )
    script.chmod(0o755)
    pack(folder / "packed")
    monkeypatch.setenv("PATH", str(folder))
    return folder


def test_npm_is_asked_once_for_the_pinned_release(npm: Path, model: Path, tmp_path: Path):
    assert fetch_wllama() == fetch_wllama() == cache_folder()
    asked = (npm / "asked").read_text().splitlines()
    assert len(asked) == 1 and asked[0].startswith(f"pack @wllama/wllama@{WLLAMA} @wllama/wllama-compat@{WLLAMA} ")
    assert "--ignore-scripts" in asked[0] and names(cache_folder()) == set(ARCHIVES)
    assert (export_web(model, tmp_path / "site") / "wllama" / "index.js").is_file()


def test_what_npm_brings_is_checked_before_it_is_kept(npm: Path):
    package, inside, _ = next(iter(FILES.values()))
    pack(npm / "packed", changed=inside)
    with pytest.raises(GemletError, match=rf"{inside} of {package} is not that of release"):
        fetch_wllama()
    assert names(cache_folder()) == set()


def test_a_damaged_cache_is_fetched_again(npm: Path):
    archive = fetch_wllama() / ARCHIVES[1]
    archive.write_bytes(b"damaged")
    assert set(read_wllama(fetch_wllama())) == set(FILES)
    assert len((npm / "asked").read_text().splitlines()) == 2


def test_npm_that_fails_or_is_missing_is_told(npm: Path):
    for archive in (npm / "packed").iterdir():
        archive.unlink()
    with pytest.raises(GemletError, match=r"npm could not download wllama .*ENOTFOUND npm ERR! network"):
        fetch_wllama()
    (npm / "npm").unlink()
    with pytest.raises(GemletError, match=r"is downloaded with npm, which is not here: install Node\.js"):
        fetch_wllama()
    assert names(cache_folder()) == set()
