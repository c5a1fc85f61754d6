"""A model's folder onto the Hugging Face hub, through huggingface_hub: its token, its cache, its variables.

`plan_push` asks the hub what is there and says what would change; nothing is changed before `push`. A push is one
commit: others see all of it or nothing, and what the hub has already is not sent again.
"""

import hashlib
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemlet.checkpoint import SHARD_BYTES
from gemlet.errors import GemletError
from gemlet.export.hf import KEPT, export_hf
from gemlet.files import human_size
from gemlet.folder import INDEX, stored_weights
from gemlet.lm import model_folder

LOGIN = "log in with `hf auth login`, or set HF_TOKEN to a token that may write (huggingface.co/settings/tokens)"


@dataclass(frozen=True)
class Push:
    """What a push would do."""

    repo: str
    """OWNER/NAME"""
    folder: Path
    private: bool
    revision: str | None
    """The commit that the repository stands at; None where there is no such repository yet."""
    uploads: dict[str, int]
    """{path: bytes} of the files that are new there or differ."""
    unchanged: tuple[str, ...]
    """Files that the repository has already."""
    removed: tuple[str, ...]
    """Files of another model in the repository, which would be taken for a part of this one."""

    def __str__(self) -> str:
        from huggingface_hub import constants

        visibility = "private" if self.private else "public"
        state = f"new, {visibility}" if self.revision is None else f"there already, {visibility}"
        lines = [f"{constants.ENDPOINT}/{self.repo} ({state})"]
        lines += [f"  upload  {human_size(size):>9}  {path}" for path, size in self.uploads.items()]
        lines += [f"  remove             {path}" for path in self.removed]
        total = human_size(sum(self.uploads.values()))
        lines.append(f"  {len(self.uploads)} to upload ({total}), {len(self.unchanged)} unchanged")
        return "\n".join(lines)


@contextmanager
def published(
    source: str | Path,
    name: str,
    *,
    dtype: str | None = None,
    max_shard_bytes: int = SHARD_BYTES,
    license: str | None = None,
    language: str | None = None,
) -> Iterator[Path]:
    """The folder to push as `name`: what `export_hf` writes with these arguments, which is gone after the block.

    A folder that has its README.md and no state of a training is ready as it is, unless a change is asked for.
    """
    folder = model_folder(source)
    ready = (folder / "README.md").is_file() and not (folder / "train_state").exists()
    if ready and dtype is license is language is None and _largest(folder) <= max_shard_bytes:
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="gemlet-") as temporary:
        yield export_hf(
            folder,
            Path(temporary) / "model",
            dtype=dtype,
            max_shard_bytes=max_shard_bytes,
            license=license,
            language=language,
            name=name,
        )


def _largest(folder: Path) -> int:
    """The size of the largest file of weights."""
    return max((file.stat().st_size for file in folder.glob("*.safetensors")), default=0)


def plan_push(folder: str | Path, name: str, *, private: bool | None = None) -> Push:
    """What pushing a folder that `export_hf` wrote to the repository `name`, OWNER/NAME, would do.

    A new repository is private unless `private` is False; one that is there keeps what it is, and is refused where that
    is not what is asked for. Reads the hub and changes nothing.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    folder = Path(folder)
    stored_weights(folder)
    if (folder / "train_state").exists():
        raise GemletError(
            f"{folder} is a checkpoint with its train_state, which is not for others: export it, push the export"
        )
    files = {
        path.relative_to(folder).as_posix(): path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    }
    with _explained(name):
        _require_writer(name)
        try:
            info = HfApi().model_info(name, files_metadata=True)
        except RepositoryNotFoundError:
            uploads = {path: file.stat().st_size for path, file in files.items()}
            return Push(name, folder, private is not False, None, uploads, (), ())
    if private is not None and private is not info.private:
        raise GemletError(
            f"{name} is there already and {'private' if info.private else 'public'}: change that on its settings page, "
            "push to another name, or leave the flag out"
        )
    there = {file.rfilename: file for file in info.siblings or []}
    same = tuple(path for path, file in files.items() if path in there and _same(file, there[path]))
    uploads = {path: file.stat().st_size for path, file in files.items() if path not in same}
    removed = tuple(path for path in there if path not in files and _is_of_a_model(path))
    return Push(name, folder, bool(info.private), info.sha, uploads, same, removed)


def push(plan: Push) -> str:
    """Do what the plan says, in one commit, and return the repository's address.

    Where the repository has changed since the plan was made, nothing happens but a GemletError.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants

    api = HfApi()
    operations = [CommitOperationAdd(path, plan.folder / path) for path in plan.uploads]
    operations += [CommitOperationDelete(path) for path in plan.removed]
    with _explained(plan.repo):
        if plan.revision is None:
            api.create_repo(plan.repo, private=plan.private)
        if operations:
            api.create_commit(plan.repo, operations, commit_message="Upload with gemlet", parent_commit=plan.revision)
    return f"{constants.ENDPOINT}/{plan.repo}"


def _require_writer(name: str) -> None:
    """Check that the name is one and that the token may write there, as far as the hub tells beforehand."""
    from huggingface_hub import HfApi, constants, get_token
    from huggingface_hub.utils import validate_repo_id

    if constants.HF_HUB_OFFLINE:
        raise GemletError("HF_HUB_OFFLINE is set, so nothing can be pushed: unset it")
    if get_token() is None:
        raise GemletError(f"no token of the Hugging Face hub: {LOGIN}")
    owner, slash, model = name.partition("/")
    validate_repo_id(name)
    who = HfApi().whoami()
    if not slash:
        raise GemletError(f"{name!r} has no owner: give {who['name']}/{name}")
    owners = [who["name"], *(organisation["name"] for organisation in who.get("orgs", []))]
    if owner not in owners:
        raise GemletError(
            f"the token is {who['name']}'s, who is not {owner} nor in an organisation of that name: give "
            f"{who['name']}/{model}, or the token of one who may write there"
        )
    if who.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise GemletError(f"the token of {who['name']} may only read: {LOGIN}")


def _is_of_a_model(path: str) -> bool:
    """Whether a file of this name is read as a part of the model where it lies."""
    return path in (*KEPT, INDEX) or re.fullmatch(r"model(-\d+-of-\d+)?\.safetensors", path) is not None


def _same(file: Path, there: Any) -> bool:
    """Whether a file has the content that the repository lists: by SHA-256 if that is in LFS, else as git names it."""
    size = file.stat().st_size
    if size != there.size:
        return False
    with open(file, "rb") as content:
        if there.lfs is not None:
            return hashlib.file_digest(content, "sha256").hexdigest() == there.lfs.sha256
        return hashlib.sha1(f"blob {size}\0".encode() + content.read()).hexdigest() == there.blob_id


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """Turn what huggingface_hub raises into one sentence; its errors differ between versions, their answers do not."""
    from huggingface_hub import constants, errors

    try:
        yield
    except GemletError:
        raise
    except errors.HFValidationError as error:
        raise GemletError(f"{name!r} is not a name on the hub: give OWNER/NAME, of letters, digits, - _ .") from error
    except Exception as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        said = " ".join(str(getattr(error, "server_message", None) or error).split())[:100]
        answers = {
            401: f"the hub does not know the token: {LOGIN}",
            403: f"the token may not write to {name} ({said}): take one that may, or another name",
            409: f"{name} is taken by now, or just being changed: try again",
            412: f"{name} was changed by someone while this push was prepared: try again",
        }
        what = answers.get(status) if isinstance(status, int) else None
        if what is None and (status is not None or isinstance(error, ValueError)):
            what = f"the hub refuses {name}{'' if status is None else f' with status {status}'}: {said}"
        if what is None:
            what = (
                f"{constants.ENDPOINT} cannot be reached, or was lost ({type(error).__name__}: {said[:80]}); nothing "
                "was published: try again, and what has arrived is not sent again"
            )
        raise GemletError(what) from error
