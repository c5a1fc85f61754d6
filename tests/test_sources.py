import gzip
import json
import os
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gemlet import sources, tales
from gemlet.errors import GemletError
from gemlet.sources import documents, fingerprint, has_validation
from tests.loopback_hub import LoopbackHub

STORIES = ["Once upon a time.\n\nThe end.", "A fox said “hi”.", "Ünï 🎈 \0 \u200f"]


def read(path: Path, **options) -> list[str]:
    return list(documents(str(path), **options))


def refusal(path: Path, **options) -> str:
    with pytest.raises(GemletError) as caught:
        read(path, **options)
    assert len(str(caught.value)) < 300 + len(str(path)) and "\n" not in str(caught.value)
    return str(caught.value)


def parquet(path: Path, texts: list, column: str = "text") -> Path:
    pq.write_table(pa.table({column: texts}), path, row_group_size=2)
    return path


def write(path: Path, content: bytes) -> Path:
    """A file of this content, packed as its name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".gz":
        content = gzip.compress(content)
    elif path.suffix == ".zst":
        content = pa.Codec("zstd").compress(content, asbytes=True)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    "name", ["a.txt", "a.txt.gz", "a.txt.zst", "a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet"]
)
def test_every_format_gives_the_same_documents(tmp_path, name):
    if name == "a.parquet":
        path = parquet(tmp_path / name, STORIES)
    elif ".jsonl" in name:
        path = write(tmp_path / name, "".join(json.dumps({"id": 1, "text": s}) + "\n" for s in STORIES).encode())
    else:
        path = write(tmp_path / name, "".join(f"{s}\n<|endoftext|>\n" for s in STORIES).encode())
    assert read(path) == STORIES
    assert read(path, max_documents=2) == STORIES[:2]


@pytest.mark.parametrize(
    ("split", "text", "expected"),
    [
        ("auto", "a\n<|endoftext|>\nb\n\n\nc", ["a", "b\n\n\nc"]),
        ("auto", "a\nb\n\nc\n\n\n\nd\n \n\t\ne", ["a\nb\n\nc", "d", "e"]),
        ("auto", "a\n\nb <|endoftext|> c\n", ["a\n\nb <|endoftext|> c"]),
        ("endoftext", "  <|endoftext|>\na\n<|endoftext|> \n\n<|endoftext|>b\n", ["a", "<|endoftext|>b"]),
        ("blank-lines", "a\nb\n\nc\n\n\nd", ["a\nb", "c", "d"]),
        ("line", "a b\n\n c\nd", ["a b", "c", "d"]),
        ("file", "a\n\n\n<|endoftext|>\n\n\nb", ["a\n\n\n<|endoftext|>\n\n\nb"]),
    ],
)
def test_the_rules_that_separate_documents(tmp_path, split, text, expected):
    path = write(tmp_path / "a.txt", text.encode())
    assert read(path, split=split) == expected
    assert read(write(tmp_path / "b.txt", text.replace("\n", "\r\n").encode()), split=split) == expected
    assert read(write(tmp_path / "c.txt", b"\xef\xbb\xbf" + text.encode()), split=split) == expected


def test_chunk_borders_change_nothing(tmp_path, monkeypatch):
    path = write(tmp_path / "a.txt", "\r\n<|endoftext|>\r\n".join(STORIES).encode())
    whole = read(path)
    for size in (1, 2, 3, 5, 7):
        monkeypatch.setattr(sources, "_CHUNK", size)
        assert read(path) == whole == STORIES


def test_text_in_fields_is_taken_as_it_is(tmp_path):
    odd = ["a\n<|endoftext|>\nb", "c\r\n\r\n\r\nd", "\ufeffx\u2028y\x85\x1cz"]
    assert read(parquet(tmp_path / "a.parquet", odd)) == odd
    assert read(write(tmp_path / "a.jsonl", "\n".join(json.dumps({"text": t}) for t in odd).encode())) == odd
    story = write(tmp_path / "b.jsonl", b'{"story": "once", "text": 3}')
    assert read(story, text_field="story") == ["once"]


def test_folders_are_read_through_and_through_in_order(tmp_path):
    write(tmp_path / "b.txt", b"three")
    write(tmp_path / "a" / "2.txt.gz", b"two")
    write(tmp_path / "a" / "1.jsonl", b'{"text": "one"}')
    write(tmp_path / "a" / "empty.txt", b"")
    write(tmp_path / "a" / "picture.png", b"\x89PNG")
    write(tmp_path / ".git" / "x.txt", b"hidden")
    assert read(tmp_path) == ["one", "two", "three"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("latin.txt", b"caf\xe9 au lait", ["byte 3 ", "UTF-8"]),
        ("cut.txt", "né".encode()[:-1], ["byte 1 ", "ends inside"]),
        ("late.txt.gz", b"a" * 3_000_000 + b"\xff", ["byte 3,000,000 of the unpacked"]),
        ("wide.txt", "some text".encode("utf-16"), ["UTF-16", "byte 0", "iconv"]),
        ("wide.jsonl", ("some text" * 9).encode("utf-16-be"), ["UTF-16", "byte 0"]),
        ("random.txt", bytes(range(256)), ["byte 128 "]),
        ("zeros.txt", bytes(100), ["binary", "byte 0"]),
        ("empty.txt", b"", ["0 documents in"]),
        ("blank.txt", b" \n\n\t\r\n", ["0 documents in"]),
        ("bad.txt.gz", None, ["cannot be read"]),
        ("cut.txt.zst", None, ["cannot be read", "runcated"]),
        ("bad.parquet", b"PAR1 no", ["not a whole .parquet"]),
        ("a.jsonl", b'{"text": "x"}\n\n{"text": ', ["a.jsonl:3: not valid JSON"]),
        ("a.jsonl", b'{"text": "x"}\n{"txt": "y"}', ["a.jsonl:2: no key 'text'", "txt"]),
        ("a.jsonl", b'{"text": null}', ["a.jsonl:1: 'text' is null"]),
        ("a.jsonl", b'{"text": {"en": "x"}}', ["a.jsonl:1: 'text' is a dict"]),
        ("a.jsonl", b'["x"]', ["a.jsonl:1: a list"]),
        ("a.jsonl", b"[" * 100_000, ["a.jsonl:1: not valid JSON"]),
        ("a.pdf", b"%PDF", ["a.pdf is no .txt"]),
        ("a.parquet.gz", b"", ["is no .txt"]),
    ],
)
def test_what_cannot_be_read_is_refused_with_its_place(tmp_path, name, content, words):
    path = tmp_path / name
    if content is not None:
        write(path, content)
    elif name == "bad.txt.gz":
        path.write_bytes(b"no gzip")
    else:
        path.write_bytes(pa.Codec("zstd").compress(os.urandom(9000), asbytes=True)[:-50])
    message = refusal(path)
    assert [w for w in [path.name, *words] if w not in message] == []


def test_parquet_columns_are_checked(tmp_path):
    assert "row 3: 'text' is null" in refusal(parquet(tmp_path / "a.parquet", ["x", "y", None]))
    assert "no column 'text', only story" in refusal(parquet(tmp_path / "b.parquet", ["x"], "story"))
    assert "holds int64, not strings" in refusal(parquet(tmp_path / "c.parquet", [1]))


def test_a_source_that_is_not_there_suggests_one(tmp_path):
    write(tmp_path / "stories.txt", b"x")
    assert "did you mean 'tales'" in refusal(Path("tale"))
    assert "did you mean 'tinystories'" in refusal(Path("tinystorys"))
    assert "did you mean 'stories.txt'" in refusal(tmp_path / "storys.txt")
    write(tmp_path / "other" / "a.pdf", b"x")
    assert "(1 others)" in refusal(tmp_path / "other")


def test_a_packed_bomb_is_refused_without_unpacking_it_all(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "_LONGEST", 5 * 2**20)
    seen = []
    monkeypatch.setattr(sources, "_refuse_other_encodings", lambda path, start: seen.append(len(start)))
    path = write(tmp_path / "a.txt.gz", b"a" * 2**26)
    assert path.stat().st_size < 2**17
    assert "more than 5,242,880 characters" in refusal(path, split="file")
    assert seen == [2**20]


def test_tales_keep_validation_apart():
    assert list(documents("tales", max_documents=250)) == list(islice(tales.stories(), 250))
    validation = list(documents("tales", split_name="validation", max_documents=250))
    assert validation == list(islice(tales.stories(seed=1), 2))
    assert has_validation("tales")


def test_a_fingerprint_follows_the_content(tmp_path):
    path = write(tmp_path / "a.txt", b"one")
    first = fingerprint(str(path))
    assert not has_validation(str(path))
    moved = write(tmp_path / "sub" / "b.txt", b"one")
    assert fingerprint(str(moved))["identity"] == first["identity"]
    assert fingerprint(str(tmp_path / "sub"))["identity"] == first["identity"]
    write(path, b"two")
    assert fingerprint(str(path))["identity"] != first["identity"]
    os.utime(path, ns=(0, first["files"][0]["stat"][2]))  # same name, size and time: known, so not read again
    assert fingerprint(str(path), first) == first


# --- the hub ---

PROBE = """
import sys
from gemlet.errors import GemletError
from gemlet.sources import documents, has_validation
for name in sys.argv[1].split(","):
    try:
        print(has_validation(name))
        for split in sys.argv[2].split(","):
            print(split, *documents(name, split_name=split))
    except GemletError as error:
        print("refused:", error)
"""


@pytest.fixture
def hub(tmp_path):
    with LoopbackHub() as hub:
        shards = {
            f"data/train-0000{i}-of-00003.parquet": parquet(tmp_path / "x", [f"t{i}a", f"t{i}b"]).read_bytes()
            for i in range(3)
        }
        shards["data/validation-00000-of-00001.parquet"] = parquet(tmp_path / "x", ["v"]).read_bytes()
        hub.add("dataset", "someone/stories", {"README.md": b"# x", "notes.txt": b"no", **shards})
        yield hub


def probe(
    hub: LoopbackHub, home: Path, name: str = "hub:someone/stories", splits: str = "train,validation", **env: str
) -> list[str]:
    """What a fresh process reads of one name or, with commas, several; its stderr must not hold a traceback."""
    done = subprocess.run(
        [sys.executable, "-c", PROBE, name, splits],
        env={**os.environ, **hub.environment(home, **env)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done.stdout.splitlines()


WHOLE = ["True", "train t0a t0b t1a t1b t2a t2b", "validation v"]
SHARDS = [f"data/train-0000{i}-of-00003.parquet" for i in range(3)]


def test_a_hub_set_is_read_once_and_then_from_the_cache(hub, tmp_path):
    assert probe(hub, tmp_path / "home") == WHOLE
    assert [hub.downloads(file) for file in SHARDS] == [1, 1, 1]
    assert hub.downloads("notes.txt") == hub.downloads("README.md") == 0
    assert probe(hub, tmp_path / "home") == WHOLE
    before = len(hub.requests)
    assert probe(hub, tmp_path / "home", HF_HUB_OFFLINE="1") == WHOLE
    assert len(hub.requests) == before
    assert [hub.downloads(file) for file in SHARDS] == [1, 1, 1]
    assert probe(hub, tmp_path / "home", HF_ENDPOINT="http://127.0.0.1:9") == WHOLE  # the network is gone


def test_after_a_kill_in_a_download_only_the_missing_files_are_fetched(hub, tmp_path):
    hub.stall = {SHARDS[1]: 50}
    environment = {**os.environ, **hub.environment(tmp_path)}
    process = subprocess.Popen(
        [sys.executable, "-c", PROBE, "hub:someone/stories", "train"], env=environment, stdout=subprocess.DEVNULL
    )
    while not hub.downloads(SHARDS[1]):
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    hub.stall = {}
    offline = probe(hub, tmp_path, HF_HUB_OFFLINE="1")[-1]  # what is there is not taken for the whole
    assert "(data/train-00001-of-00003.parquet) is not in the cache" in offline
    assert probe(hub, tmp_path) == WHOLE
    assert [hub.downloads(file) for file in SHARDS] == [1, 2, 1]


def test_a_hub_that_refuses_is_told_in_one_sentence(hub, tmp_path):
    hub.add("dataset", "someone/locked", {"a.txt": b"x"}, gated=True)
    hub.add("dataset", "someone/pictures", {"a.png": b"x"})
    hub.add("dataset", "someone/two", {"en/train.jsonl": b'{"text": "e"}', "fr/train.jsonl": b'{"text": "f"}'})
    answers = {
        "hub:someone/none": "someone/none does not exist, or is private: check the name",
        "hub:someone/locked": "someone/locked (a.txt) is gated: accept its terms",
        "hub:someone/pictures": "holds no .txt, .jsonl",
        "hub:someone/two": "in several folders: en, fr; choose one: hub:someone/two/FOLDER",
        "hub:some one/x": "is not the name of a dataset",
    }
    refusals = [line for line in probe(hub, tmp_path, ",".join(answers), "train") if line.startswith("refused: ")]
    for refusal, words in zip(refusals, answers.values(), strict=True):
        assert words in refusal
    assert probe(hub, tmp_path, "hub:someone/two/fr", "train,validation")[:2] == ["False", "train f"]


def test_a_token_opens_a_private_set(hub, tmp_path):
    hub.token = "hf_x"
    assert "set HF_TOKEN" in probe(hub, tmp_path)[-1]
    assert probe(hub, tmp_path, HF_TOKEN="hf_x") == WHOLE


def test_without_a_network_the_message_says_how_to_go_on(hub, tmp_path):
    for env in ({"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}):
        (line,) = probe(hub, tmp_path, "tinystories", **env)
        assert "roneneldan/TinyStories is not in the cache" in line and "HF_HOME" in line and "give a file" in line
    assert hub.requests == []
