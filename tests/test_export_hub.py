"""Pushing against a hub on the loopback interface: what is said beforehand, what arrives, what is refused."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import constants

from gemlet.checkpoint import save_model
from gemlet.errors import GemletError
from gemlet.export.hf import export_hf
from gemlet.export.hub import plan_push, published, push
from gemlet.lm import load
from gemlet.testing import tiny_model, tiny_tokenizer
from tests.loopback_hub import LoopbackHub

TOKENS = {"hf_me": "me", "read_me": "me", "hf_you": "you"}
FILES = ["README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json"]
FILES.append("tokenizer_config.json")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A checkpoint's files, without a run."""
    path = tmp_path_factory.mktemp("model") / "tiny"
    save_model(path, tiny_model(3), tiny_tokenizer())
    return path


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub that huggingface_hub in this process takes for the real one."""
    with LoopbackHub(users=dict(TOKENS)) as hub:
        for name, value in hub.environment(tmp_path / "home", HF_TOKEN="hf_me").items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True, raising=False)  # older releases have no Xet
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "home" / "token"))
        yield hub


def do(source, name="me/tiny", private=None, go=True, **options) -> list[str]:
    """The lines of the plan and, if `go`, what the push returns."""
    with published(source, name, **options) as folder:
        plan = plan_push(folder, name, private=private)
        return [*str(plan).splitlines(), *([push(plan)] if go else [])]


def refusal(source, **arguments) -> str:
    with pytest.raises(GemletError) as caught:
        do(source, **arguments)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300 + len(str(source))
    return str(caught.value)


def test_what_is_pushed_is_what_loads(folder, hub, tmp_path):
    said = do(folder)
    assert said[0] == f"{hub.url}/me/tiny (new, private)"
    assert [line.split()[-1] for line in said if "  upload  " in line] == FILES
    assert "6 to upload" in said[-2] and "0 unchanged" in said[-2]
    assert said[-1] == f"{hub.url}/me/tiny"
    assert sorted(hub.files("me/tiny")) == [".gitattributes", *FILES]
    assert hub.is_private("me/tiny") and hub.commits("me/tiny") == ["Upload with gemlet"]
    code = "import gemlet; print(gemlet.load('me/tiny').logits([0, 1, 2, 3]).double().flatten().tolist())"
    environment = {**os.environ, **hub.environment(tmp_path / "other", HF_TOKEN="hf_me")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == load(folder).logits([0, 1, 2, 3]).double().flatten().tolist()


def test_a_plan_changes_nothing(folder, hub):
    do(folder, go=False)
    assert hub.uploads() == []


def test_a_second_push_sends_only_what_is_new(folder, hub, tmp_path):
    do(folder)
    before = hub.uploads()
    said = do(folder)
    assert said[-2:] == ["  0 to upload (0.0 kB), 6 unchanged", f"{hub.url}/me/tiny"]
    assert hub.uploads() == before
    export_hf(folder, tmp_path / "sharded", max_shard_bytes=40_000)
    said = do(tmp_path / "sharded")
    assert [line.split()[-1] for line in said if "  remove  " in line] == ["model.safetensors"]
    assert [line.split()[-1] for line in said if "  upload  " in line][-1].endswith(".index.json")
    assert "model.safetensors" not in hub.files("me/tiny") and len(hub.commits("me/tiny")) == 2
    do(folder)
    assert sorted(hub.files("me/tiny")) == [".gitattributes", *FILES]


def test_a_folder_that_was_exported_is_pushed_as_it_is(folder, hub, tmp_path):
    """With what its owner wrote and put beside it, and without what is hidden; options make a new export of it."""
    export_hf(folder, tmp_path / "mine")
    (tmp_path / "mine" / "picture.png").write_bytes(b"png")
    (tmp_path / "mine" / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n")
    (tmp_path / "mine" / ".secret").write_text("x")
    do(tmp_path / "mine", max_shard_bytes=10**9)
    assert hub.files("me/tiny")["picture.png"] == b"png"
    assert hub.files("me/tiny")["README.md"] == b"---\nlicense: mit\n---\n# Mine\n"
    assert ".secret" not in hub.files("me/tiny")
    do(tmp_path / "mine", dtype="bf16")
    assert json.loads(hub.files("me/tiny")["config.json"])["dtype"] == "bfloat16"


def test_visibility(folder, hub):
    assert do(folder, private=False)[0].endswith("(new, public)")
    assert not hub.is_private("me/tiny")
    assert do(folder)[0].endswith("(there already, public)")
    assert "me/tiny is there already and public" in refusal(folder, private=True)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"token": ""}, "no token of the Hugging Face hub: log in with `hf auth login`"),
        ({"token": "hf_unknown"}, "the hub does not know the token"),
        ({"token": "read_me"}, "the token of me may only read"),
        ({"token": "hf_you"}, "the token is you's, who is not me nor in an organisation of that name: give you/tiny"),
        ({"name": "tiny"}, "'tiny' has no owner: give me/tiny"),
        ({"name": "me/ti ny"}, "is not a name on the hub"),
        ({"name": "a/b/c"}, "is not a name on the hub"),
        ({"ENDPOINT": "http://127.0.0.1:9"}, "http://127.0.0.1:9 cannot be reached"),
        ({"HF_HUB_OFFLINE": True}, "HF_HUB_OFFLINE is set"),
        ({"license": "a: b: ["}, "license is 'a: b: ['"),
        ({"language": "English!"}, "language is 'English!'"),
    ],
)
def test_what_cannot_be_pushed_is_refused_in_one_line(folder, hub, monkeypatch, arguments, words):
    arguments = dict(arguments)
    monkeypatch.setenv("HF_TOKEN", arguments.pop("token", "hf_me"))
    for setting in [name for name in arguments if name.isupper()]:
        monkeypatch.setattr(constants, setting, arguments.pop(setting))
    assert words in refusal(folder, **arguments)
    assert hub.uploads() == []


@pytest.mark.parametrize(
    ("part", "answer", "words"),
    [
        ("/api/repos/create", (403, "no rights here"), "the token may not write to me/tiny (no rights here)"),
        ("/api/repos/create", (409, "there"), "me/tiny is taken by now"),
        ("/preupload/", (403, "no rights"), "the token may not write to me/tiny"),
        ("/commit/", (412, "moved"), "me/tiny was changed by someone"),
        ("/commit/", (400, "bad README"), "the hub refuses me/tiny with status 400: bad README"),
        ("/lfs/objects/batch", (413, "storage is full"), "the hub refuses me/tiny with status 413: storage is full"),
        ("/lfs/", (404, "gone"), "the hub refuses me/tiny"),
    ],
)
def test_a_hub_that_fails_on_the_way_is_told_in_one_line(folder, hub, part, answer, words):
    hub.fail = {part: answer}
    assert words in refusal(folder)


def test_someone_else_was_faster(folder, hub, tmp_path):
    """Between the plan and the push the repository moved: what was said is no longer true, so nothing is done."""
    out = export_hf(folder, tmp_path / "out")
    push(plan_push(out, "me/tiny"))
    (out / "notes.md").write_text("mine")
    late = plan_push(out, "me/tiny")
    (out / "notes.md").write_text("theirs")
    push(plan_push(out, "me/tiny"))
    (out / "notes.md").write_text("mine")
    with pytest.raises(GemletError, match="me/tiny was changed by someone while this push was prepared"):
        push(late)
    assert len(hub.commits("me/tiny")) == 2 and hub.files("me/tiny")["notes.md"] == b"theirs"


def test_a_checkpoint_as_it_lies_is_not_for_others(folder, hub, tmp_path):
    shutil.copytree(folder, tmp_path / "step")
    (tmp_path / "step" / "train_state").mkdir()
    with pytest.raises(GemletError, match="train_state, which is not for others"):
        plan_push(tmp_path / "step", "me/tiny")
    do(tmp_path / "step")  # published in the form of an export
    assert sorted(hub.files("me/tiny")) == [".gitattributes", *FILES]
