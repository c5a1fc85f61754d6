"""A model as a folder of static files: a page that tells stories in a browser, with no server but one for files.

    python3 -m http.server --directory OUT        # and open http://localhost:8000

The page is gemlet's, `page/` beside this file. It computes with wllama, llama.cpp compiled to WebAssembly, which is not
part of gemlet: `fetch_wllama` has npm put its packages in a cache, or the user has them somewhere. Whatever the place,
a file of them is taken only if it has the SHA-256 below. The page asks nobody but its own server for anything: a
content security policy has the browser itself see to that.
"""

import hashlib
import html
import os
import re
import shutil
import string
import subprocess
import tarfile
import tempfile
import zlib
from collections.abc import Sequence
from contextlib import suppress
from importlib import resources
from pathlib import Path

from gemlet.errors import GemletError
from gemlet.export.gguf import DTYPES, export_gguf
from gemlet.files import new_folder, writing
from gemlet.folder import read_config
from gemlet.lm import model_folder

WLLAMA = "3.13.0"
"""The release of both packages; of the same release they are compiled from the same llama.cpp."""

FILES = {
    "wllama/index.js": (
        "@wllama/wllama",
        "esm/index.js",
        "fffd95c16ca191f31f4303664a05189c43d0cb20c52b67276c04e8857b138b64",
    ),
    "wllama/wllama.wasm": (
        "@wllama/wllama",
        "esm/wasm/wllama.wasm",
        "79ac5be917b71d50571a4f584436a9f6baf6b6e57719d094ed8bd950e9a65780",
    ),
    "wllama/LICENSE": (
        "@wllama/wllama",
        "LICENCE",
        "5866e3bd7e3cbd3f7c8bea6efd8a1e7fa7cc8de68c30f428aff7c6584a0fb720",
    ),
    "wllama/compat.js": (
        "@wllama/wllama-compat",
        "wasm/wllama.js",
        "942062a7495790a317061b27a6bcd2bd3b247e2ddef53a069baf5abb07284758",
    ),
    "wllama/compat.wasm": (
        "@wllama/wllama-compat",
        "wasm/wllama.wasm",
        "35df8c1e2f7dbd74b8e8b01054fb9f1fbe86cf566945fbf4cef3965855a8b92e",
    ),
}
"""{file of the page: (package, file of the package, SHA-256)}. The compat build is for browsers that lack what the
other one needs of WebAssembly (64-bit memory, suspended calls), Safari above all; no other browser loads it."""

PACKAGES = tuple(dict.fromkeys(package for package, _, _ in FILES.values()))

_DOWNLOAD = 8_400_000  # bytes of the two archives
_LARGEST_FILE = 2**26  # bytes; no file of theirs comes near, so a larger one is not to be read

BEGINNINGS = (
    "Once upon a time",
    "One day, a little girl named Lily",
    "There was a small dragon who",
    "On a rainy morning, Tom",
)

CONTEXT = 4096
"""Tokens that the page computes with at most, where the model has more: their keys and values fit any phone."""

LARGEST = 2**31
"""Bytes of the largest model file that wllama reads."""


def export_web(
    source: str | Path,
    out: str | Path,
    *,
    dtype: str = "q8_0",
    name: str | None = None,
    beginnings: Sequence[str] = BEGINNINGS,
    wllama: str | Path | None = None,
) -> Path:
    """Write the page for the model of `source` (as for `gemlet.load`) to `out`, new or empty.

    `dtype` is that of the GGUF file: f32, f16, bf16, q8_0 or q4_0. The page is called `name` (unset: as the run, the
    hub's model or the folder) and suggests `beginnings`, the first of them already written. `wllama` is a folder that
    holds the packages (unset: the cache that `fetch_wllama` fills). Raises GemletError where they are not there or not
    the ones that gemlet knows, and for a model that is too large for a browser.
    """
    folder, out = model_folder(source), Path(out)
    config = read_config(folder)
    if dtype not in DTYPES:
        raise GemletError(f"dtype is {dtype!r}, but must be one of {', '.join(DTYPES)}")
    if not beginnings:
        raise GemletError("there is no beginning for the page to suggest; give at least one")
    weights = DTYPES[dtype][0]
    size = config.num_parameters * weights.size // weights.block
    if size > LARGEST:
        raise GemletError(
            f"{config.num_parameters:,} parameters take {size / 1e9:.1f} GB as {dtype}, but a browser reads a model "
            f"of at most {LARGEST / 1e9:.1f} GB; give a smaller dtype ({', '.join(DTYPES)}) or a smaller model"
        )
    packed = read_wllama(cache_folder() if wllama is None else Path(wllama))
    with new_folder(out, size + sum(map(len, packed.values()))) as new:
        model = export_gguf(folder, new / "model.gguf", dtype)
        model.with_suffix(".Modelfile").unlink()  # for Ollama, which reads no page
        for file, content in packed.items():
            (new / file).parent.mkdir(exist_ok=True)
            (new / file).write_bytes(content)
        for page in resources.files("gemlet.export").joinpath("page").iterdir():
            (new / page.name).write_bytes(page.read_bytes())
        name = name or _name(folder)
        index = string.Template((new / "index.html").read_text("utf-8")).substitute(
            name=html.escape(name),
            prompt=html.escape(beginnings[0]),
            beginnings="\n".join(f'      <button type="button">{html.escape(text)}</button>' for text in beginnings),
            parameters=f"{config.num_parameters:,}",
            file=html.escape(f"{_slug(name)}-{dtype}.gguf"),
            size=f"{model.stat().st_size / 1e6:,.1f} MB",
            dtype=dtype,
            context=min(config.max_position_embeddings, CONTEXT),
        )
        (new / "index.html").write_text(index, encoding="utf-8")
    return out


def cache_folder() -> Path:
    """Where `fetch_wllama` puts the packages: gemlet's folder of the user's cache, XDG_CACHE_HOME or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gemlet" / "wllama"


def fetch_wllama(folder: Path | None = None) -> Path:
    """Have the user's npm download the packages (8 MB) into a folder, unless they are there; the folder is returned.

    Nothing of a package is run. What npm brought is checked before it is put in its place.
    """
    folder = folder or cache_folder()
    with suppress(GemletError):
        read_wllama(folder)
        return folder
    npm = shutil.which("npm")
    if npm is None:
        raise GemletError(
            f"wllama {WLLAMA} is downloaded with npm, which is not here: install Node.js, or run `{_npm_pack()}` on "
            "another machine and give the folder with what it wrote"
        )
    with writing(folder, _DOWNLOAD):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as new:
            command = [npm, *_npm_pack().split()[1:], "--ignore-scripts", "--pack-destination", new]
            done = subprocess.run(command, capture_output=True, text=True, errors="replace")
            if done.returncode:
                said = " ".join(done.stderr.split())[:120] or f"exit code {done.returncode}"
                raise GemletError(f"npm could not download wllama {WLLAMA}; it says: {said}")
            read_wllama(Path(new))
            for package in PACKAGES:
                os.replace(Path(new, _archive(package)), folder / _archive(package))
    return folder


def read_wllama(folder: Path) -> dict[str, bytes]:
    """The files of wllama that the page needs, {file of the page: content}.

    In the folder the packages are archives, as npm pack writes them, or unpacked, as in a node_modules. Raises
    GemletError where a file is missing or has another content than gemlet knows.
    """
    contents: dict[str, bytes] = {}
    for package in PACKAGES:
        wanted = {inside: file for file, (owner, inside, _) in FILES.items() if owner == package}
        unpacked, archive = folder / package, folder / _archive(package)
        if unpacked.is_dir():
            found = {inside: (unpacked / inside).read_bytes() for inside in wanted if (unpacked / inside).is_file()}
        elif archive.is_file():
            found = _unpacked(archive, wanted)
        else:
            raise GemletError(
                f"the page needs {package} {WLLAMA}, which is not in {folder}: have it downloaded (--fetch), or run "
                f"`{_npm_pack()}` and give the folder with what it wrote (--wllama)"
            )
        contents |= {wanted[inside]: content for inside, content in found.items()}
    for file, (package, inside, digest) in FILES.items():
        if file not in contents:
            raise GemletError(f"{folder}: {package} has no {inside}; it is not release {WLLAMA}, or not whole")
        if hashlib.sha256(contents[file]).hexdigest() != digest:
            raise GemletError(f"{folder}: {inside} of {package} is not that of release {WLLAMA} (its SHA-256 differs)")
    return contents


def _unpacked(archive: Path, wanted: dict[str, str]) -> dict[str, bytes]:
    """The content of the wanted files of an npm archive. Nothing is written, so no name in it can lead anywhere."""
    found: dict[str, bytes] = {}
    try:
        with tarfile.open(archive, "r:gz") as packed:
            for member in packed:
                inside = member.name.removeprefix("package/")
                if inside in wanted and member.isreg() and member.size <= _LARGEST_FILE:
                    stream = packed.extractfile(member)
                    found[inside] = stream.read() if stream else b""
    except (tarfile.TarError, zlib.error, EOFError, OSError) as error:
        raise GemletError(f"{archive} cannot be read ({error}); remove it and fetch it again") from error
    return found


def _archive(package: str) -> str:
    """The name that npm pack gives the archive of a package: @wllama/wllama becomes wllama-wllama-VERSION.tgz."""
    return f"{package.removeprefix('@').replace('/', '-')}-{WLLAMA}.tgz"


def _npm_pack() -> str:
    return " ".join(["npm pack", *(f"{package}@{WLLAMA}" for package in PACKAGES)])


def _name(folder: Path) -> str:
    """What to call a model: RUN/checkpoints/* is the run, a snapshot in the hub's cache the hub's model."""
    above = folder.absolute().parents
    if above[0].name == "checkpoints":
        return above[1].name
    if above[0].name == "snapshots":
        return above[1].name.rpartition("--")[2]
    return folder.absolute().name


def _slug(name: str) -> str:
    """The name as a part of a file's name."""
    return re.sub(r"[^\w.]+", "-", name).strip("-.") or "model"
