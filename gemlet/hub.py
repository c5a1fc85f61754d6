"""Files of the Hugging Face hub, through huggingface_hub, so that its cache and variables hold: HF_HOME, HF_TOKEN,
HF_HUB_OFFLINE, HF_ENDPOINT.

`repository` lists, `Repository.fetch` downloads one file. A file that is whole is never downloaded again, and without
a network both work from what is there. Whatever goes wrong is one `GemletError` that says how to go on.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gemlet.errors import GemletError
from gemlet.files import write_text

Kind = Literal["model", "dataset"]


@dataclass(frozen=True)
class Repository:
    """A repository at one revision."""

    name: str
    kind: Kind
    revision: str
    files: tuple[str, ...]
    offline: bool

    def fetch(self, file: str) -> Path:
        """The local path of one of `files`, downloaded if the cache has it not."""
        from huggingface_hub import hf_hub_download

        with _explained(self.name, self.kind, file):
            return Path(
                hf_hub_download(
                    self.name, file, repo_type=self.kind, revision=self.revision, local_files_only=self.offline
                )
            )


def repository(name: str, kind: Kind) -> Repository:
    """The newest revision of OWNER/NAME; where the hub cannot be reached, the one that was last listed or downloaded.

    The list of files is remembered beside the cache: a cache that lacks one of them is then not taken for whole.
    """
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    record = Path(constants.HF_HOME) / "gemlet" / f"{kind}s--{name.replace('/', '--')}.json"
    with _explained(name, kind):
        try:
            info = HfApi().dataset_info(name) if kind == "dataset" else HfApi().model_info(name)
        except ValueError:  # not a name that a repository can have
            raise
        except Exception as error:  # the HTTP library, and so its errors, differ between versions of huggingface_hub
            if isinstance(error, HfHubHTTPError) and error.response.status_code < 500:
                raise
            if record.is_file():
                listed = json.loads(record.read_text(encoding="utf-8"))
                return Repository(name, kind, listed["revision"], tuple(listed["files"]), offline=True)
            folder = Path(snapshot_download(name, repo_type=kind, local_files_only=True))
            files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
            return Repository(name, kind, folder.name, tuple(files), offline=True)
        found = Repository(
            name, kind, str(info.sha), tuple(sorted(file.rfilename for file in info.siblings or [])), offline=False
        )
    with suppress(GemletError):  # a cache that cannot be written to is still a cache
        write_text(record, json.dumps({"revision": found.revision, "files": found.files}))
    return found


def may_be_name(source: str | Path) -> bool:
    """Whether a source may be a name on the hub, OWNER/NAME: a path that is wrong is not to be asked of the hub."""
    path = Path(source).expanduser()
    return str(source).count("/") == 1 and not path.exists() and not path.parent.is_dir()


@contextmanager
def _explained(name: str, kind: Kind, file: str = "") -> Iterator[None]:
    """Turn what huggingface_hub raises into one sentence."""
    from huggingface_hub import constants, errors

    what = f"the hub's {kind} {name}" + (f" ({file})" if file else "")
    instead = "give a file or folder instead" if kind == "dataset" else "give a folder that holds it instead"
    try:
        yield
    except errors.LocalEntryNotFoundError as error:
        raise GemletError(
            f"{what} is not in the cache {constants.HF_HUB_CACHE}, and the hub cannot be reached: connect once, or "
            f"copy the cache of a machine that has it and name it by HF_HOME, or {instead}"
        ) from error
    except errors.GatedRepoError as error:
        raise GemletError(
            f"{what} is gated: accept its terms on its page on the hub, then set HF_TOKEN to a token of that account"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise GemletError(
            f"{what} does not exist, or is private: check the name (OWNER/NAME); for a private one set HF_TOKEN to a "
            "token that may read it"
        ) from error
    except errors.EntryNotFoundError as error:
        raise GemletError(f"{what} does not exist on the hub; {instead}") from error
    except errors.HFValidationError as error:
        raise GemletError(f"{name!r} is not the name of a {kind} on the hub: those look like OWNER/NAME") from error
    except errors.HfHubHTTPError as error:
        raise GemletError(
            f"{what}: the hub answered with HTTP status {error.response.status_code}; check HF_TOKEN and try again, "
            f"or {instead}"
        ) from error
    except Exception as error:
        if isinstance(error, GemletError):
            raise
        reason = " ".join(str(error).split())[:80]
        raise GemletError(
            f"{what} cannot be downloaded ({type(error).__name__}: {reason}); run the same command again to go on, or "
            f"{instead}"
        ) from error
