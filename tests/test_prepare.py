import hashlib
import json
import os
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tokenizers

from gemlet import sources
from gemlet.config import DataConfig
from gemlet.errors import GemletError
from gemlet.prepare import Meta, load_meta, prepare, verify
from gemlet.testing import tiny_corpus, tiny_tokenizer
from gemlet.tokenizer import Tokenizer
from tests.loopback_hub import LoopbackHub

module = import_module("gemlet.prepare")  # gemlet.prepare itself is the function

STORIES = [f"{number}. {text} 🎈" for number in range(20) for text in tiny_corpus()]


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    monkeypatch.setattr(module, "_BATCH", 5_000)
    monkeypatch.setattr(module, "SHARD_TOKENS", 8_000)


def jsonl(path: Path, texts: list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), "utf-8")
    return path


def data(tmp_path: Path, texts: list[str] = STORIES, **changes: Any) -> DataConfig:
    """A configuration for these texts, with a tokenizer that is there already."""
    if not (tmp_path / "tokenizer").exists():
        tiny_tokenizer().save(tmp_path / "tokenizer")
    values = {"source": str(jsonl(tmp_path / "a.jsonl", texts)), "tokenizer": str(tmp_path / "tokenizer"), **changes}
    return DataConfig(**values)


def make(config: DataConfig, out: Path, **options) -> Meta:
    assert prepare(config, out, vocab_size=300, **options) == out
    return load_meta(out)


def texts_of(folder: Path, split: str) -> list[str]:
    """The documents of a split, decoded."""
    meta, tokenizer = load_meta(folder), Tokenizer.load(folder)
    tokens = np.concatenate([np.fromfile(folder / s.file, meta.dtype) for s in meta.splits[split].shards])
    documents = np.split(tokens, np.flatnonzero(tokens == meta.eos_token_id) + 1)
    assert len(documents.pop()) == 0
    return [tokenizer.decode(document.tolist()) for document in documents]


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def refusal(config: DataConfig, out: Path) -> str:
    with pytest.raises(GemletError) as caught:
        prepare(config, out, vocab_size=300)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_folder_holds_every_document_once(tmp_path):
    config = data(tmp_path)
    meta = make(config, tmp_path / "t")
    train, validation = texts_of(tmp_path / "t", "train"), texts_of(tmp_path / "t", "validation")
    held = [t for t in STORIES if int.from_bytes(hashlib.sha256(t.encode()).digest()[:8], "big") % 100 == 0]
    assert validation == held and 1 <= len(held) <= 20
    assert train == [t for t in STORIES if t not in held]
    for name, texts in (("train", train), ("validation", validation)):
        split = meta.splits[name]
        assert split.documents == len(texts)
        assert split.bytes == sum(len(t.encode()) for t in texts)
        assert split.tokens == sum(len(tiny_tokenizer().encode(t)) + 1 for t in texts)
    assert len(meta.splits["train"].shards) > 3
    assert (meta.dtype, meta.vocab_size, meta.eos_token_id, meta.bos_token_id) == ("uint16", 320, 0, 0)
    assert meta.tokenizer_hash == tiny_tokenizer().hash == Tokenizer.load(tmp_path / "t").hash
    verify(tmp_path / "t")
    assert not any(str(tmp_path) in text for text in (tmp_path / "t" / "meta.json").read_text("utf-8").splitlines())


def test_the_bytes_do_not_depend_on_the_number_of_threads(tmp_path, monkeypatch):
    config = data(tmp_path)
    found = []
    for cores in (1, 7):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cores=cores: set(range(cores)), raising=False)
        make(config, tmp_path / f"t{cores}")
        found.append(content(tmp_path / f"t{cores}"))
    assert found[0] == found[1]


def test_a_vocabulary_that_needs_it_is_stored_in_four_bytes(tmp_path):
    spec = json.loads(tiny_tokenizer()._backend.to_str())
    spec["model"]["vocab"] |= {f"unused {id}": id for id in range(320, 2**16 + 320)}
    Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(spec)), None, "<end>").save(tmp_path / "large")
    meta = make(data(tmp_path, tokenizer=str(tmp_path / "large")), tmp_path / "t")
    assert (meta.dtype, meta.eos_token_id) == ("uint32", 2**16 + 320)
    assert len(texts_of(tmp_path / "t", "train")) == meta.splits["train"].documents
    verify(tmp_path / "t")


def test_a_second_run_returns_at_once(tmp_path, monkeypatch):
    config = data(tmp_path)
    make(config, tmp_path / "t")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "t").iterdir()}
    (tmp_path / "t" / "unfinished.json").write_text("{}")  # as a kill at the very end leaves it
    monkeypatch.setattr(sources, "documents", None)
    monkeypatch.setattr(sources, "_sha256", None)
    make(config, tmp_path / "t")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "t").iterdir()} == before
    assert prepare(DataConfig(source=str(tmp_path / "t")), tmp_path / "other", vocab_size=9) == tmp_path / "t"
    assert not (tmp_path / "other").exists()


def test_the_same_data_elsewhere_is_the_same_data(tmp_path):
    make(data(tmp_path), tmp_path / "t")
    tiny_tokenizer().save(tmp_path / "elsewhere")
    moved = jsonl(tmp_path / "sub" / "b.jsonl", STORIES)
    make(data(tmp_path, source=str(moved), tokenizer=str(tmp_path / "elsewhere")), tmp_path / "t")


def test_a_folder_of_other_data_is_refused_by_name(tmp_path):
    make(data(tmp_path), tmp_path / "t")
    before = content(tmp_path / "t")
    Tokenizer.train(STORIES, 300).save(tmp_path / "other")
    other = str(jsonl(tmp_path / "b.jsonl", STORIES[1:]))
    assert "(source 'a.jsonl', now 'b.jsonl')" in refusal(data(tmp_path, source=other), tmp_path / "t")
    assert "(source 'a.jsonl', which has changed since)" in refusal(data(tmp_path, STORIES[1:]), tmp_path / "t")
    assert "(tokenizer " in refusal(data(tmp_path, tokenizer=str(tmp_path / "other")), tmp_path / "t")
    assert "(tokenizer " in refusal(data(tmp_path, tokenizer="bpe"), tmp_path / "t")
    assert "(max_documents None, now 5)" in refusal(data(tmp_path, max_documents=5), tmp_path / "t")
    assert "(validation None, now 'b.jsonl')" in refusal(data(tmp_path, validation=other), tmp_path / "t")
    assert content(tmp_path / "t") == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    assert "is not empty (thesis.txt)" in refusal(data(tmp_path), tmp_path / "mine")
    assert "is a file" in refusal(data(tmp_path), tmp_path / "a.jsonl")


def test_a_bpe_is_trained_on_documents_that_are_not_held_out(tmp_path, monkeypatch):
    config = data(tmp_path, tokenizer="bpe")
    meta = make(config, tmp_path / "t")
    train = texts_of(tmp_path / "t", "train")
    assert meta.vocab_size == 300
    assert meta.tokenizer_hash == Tokenizer.train(train, 300).hash
    monkeypatch.setattr(module, "BPE_SAMPLE", 1000)
    sampled = make(config, tmp_path / "s")
    sample, left = [], 1000
    for text in train:
        sample.append(text[:left])
        left = max(0, left - len(text))
    assert sum(map(len, sample)) == 1000
    assert sampled.tokenizer_hash == Tokenizer.train(sample, 300).hash


def test_a_bpe_that_came_out_smaller_may_be_asked_for_by_either_size(tmp_path):
    config = data(tmp_path, ["ab cd", "ef gh"], tokenizer="bpe")
    meta = make(config, tmp_path / "t")
    assert meta.vocab_size < 300
    for size in (300, meta.vocab_size):
        assert prepare(config, tmp_path / "t", vocab_size=size) == tmp_path / "t"
    with pytest.raises(GemletError, match="tokenizer"):
        prepare(config, tmp_path / "t", vocab_size=299)


@pytest.mark.parametrize(
    ("texts", "train", "validation"),
    [
        (["one", "two", "three"], None, None),
        (["one", "two", "one"], None, None),
        (["word " * 99 + "last"] * 2, ["word " * 94 + "word"] * 2, ["word " * 4 + "last"] * 2),
        (["x" * 100], ["x" * 95], ["x" * 5]),
    ],
)
def test_there_is_always_something_to_validate_on(tmp_path, texts, train, validation):
    make(data(tmp_path, texts), tmp_path / "t")
    found = texts_of(tmp_path / "t", "train"), texts_of(tmp_path / "t", "validation")
    assert set(found[0]).isdisjoint(found[1])
    if train is None:  # whole documents, the least sha256 is held out
        least = min(texts, key=lambda text: hashlib.sha256(text.encode()).hexdigest())
        train, validation = [t for t in texts if t != least], [t for t in texts if t == least]
    assert found == (train, validation)


def test_a_document_too_short_to_divide_is_refused_before_anything_is_written(tmp_path):
    assert "the only document is 'x': too short" in refusal(data(tmp_path, ["x"]), tmp_path / "t")
    assert "0 documents in" in refusal(data(tmp_path, []), tmp_path / "t")
    assert "no data at" in refusal(data(tmp_path, source=str(tmp_path / "none")), tmp_path / "t")
    assert not (tmp_path / "t").exists()


def test_no_validation_document_is_trained_on(tmp_path):
    own = str(jsonl(tmp_path / "v.jsonl", [*STORIES[10:13], "another one"]))
    make(data(tmp_path, validation=own), tmp_path / "t")
    assert texts_of(tmp_path / "t", "validation") == [*STORIES[10:13], "another one"]
    assert texts_of(tmp_path / "t", "train") == STORIES[:10] + STORIES[13:]
    same = data(tmp_path, STORIES[:9], validation=str(tmp_path / "a.jsonl"))
    assert "0 documents to train on" in refusal(same, tmp_path / "s")


def test_tales_validate_on_tales_that_are_not_trained_on(tmp_path):
    config = data(tmp_path, source="tales", max_documents=300)
    meta = make(config, tmp_path / "t")
    assert meta.splits["validation"].documents == 3
    assert meta.splits["train"].documents == 300
    make(config, tmp_path / "t")


def test_text_that_looks_like_an_end_token_is_text(tmp_path):
    texts = [f"<|endoftext|>{i}\n<|endoftext|>\n<|endoftext|>" for i in range(1000)]
    meta = make(data(tmp_path, texts), tmp_path / "t")
    assert sorted(texts_of(tmp_path / "t", "train") + texts_of(tmp_path / "t", "validation")) == sorted(texts)
    assert sum(split.documents for split in meta.splits.values()) == 1000


def test_progress_counts_up_to_what_meta_says(tmp_path):
    calls = []
    meta = make(data(tmp_path), tmp_path / "t", progress=lambda *figures: calls.append(figures))
    assert calls == sorted(calls) and len(calls) > 5
    splits = meta.splits.values()
    assert calls[-1][:3] == tuple(sum(getattr(s, key) for s in splits) for key in ("documents", "tokens", "bytes"))
    assert calls[-1][3] == (tmp_path / "a.jsonl").stat().st_size


@pytest.mark.parametrize("own_validation", [False, True])
def test_an_interruption_at_any_write_goes_on_to_the_same_bytes(tmp_path, monkeypatch, own_validation):
    changes: dict[str, Any] = {"validation": str(jsonl(tmp_path / "v.jsonl", STORIES[5:9]))} if own_validation else {}
    config = data(tmp_path, tokenizer="bpe", **changes)
    make(config, tmp_path / "straight")
    write, writes = module.write_bytes, []

    def failing(path, content):
        writes.append(path.name)
        if len(writes) % 3 == 0:
            path.with_name(f".tmp-{path.name}").write_bytes(content[: len(content) // 2])  # as a kill would leave it
            raise KeyboardInterrupt
        write(path, content)

    monkeypatch.setattr(module, "write_bytes", failing)
    for _ in range(30):
        try:
            prepare(config, tmp_path / "t", vocab_size=300)
            break
        except KeyboardInterrupt:
            with pytest.raises(GemletError, match="is half prepared; run the same gemlet prepare again"):
                load_meta(tmp_path / "t")
    found = content(tmp_path / "t")
    assert {name: found[name] for name in found if not name.startswith(".tmp-")} == content(tmp_path / "straight")
    assert len(writes) > len(set(writes)) > 3
    verify(tmp_path / "t")


KILLED = """
import importlib, os, signal, sys
module = importlib.import_module("gemlet.prepare")
from gemlet.config import DataConfig
module._BATCH, module.SHARD_TOKENS = 5_000, 8_000
calls = 0
def progress(*figures):
    global calls
    calls += 1
    if calls == int(sys.argv[4]):
        os.kill(os.getpid(), signal.SIGKILL)
module.prepare(DataConfig(source=sys.argv[1], tokenizer=sys.argv[2]), sys.argv[3], vocab_size=300, progress=progress)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL")
def test_after_a_kill_the_finished_shards_are_not_made_again(tmp_path):
    config = data(tmp_path)
    make(config, tmp_path / "straight")
    command = [sys.executable, "-c", KILLED, config.source, config.tokenizer, str(tmp_path / "t"), "20"]
    assert subprocess.run(command, timeout=60).returncode == -9
    done = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "t").glob("*.bin")}
    assert 1 <= len(done) < len(list((tmp_path / "straight").glob("*.bin")))
    make(config, tmp_path / "t")
    assert {name: (tmp_path / "t" / name).stat().st_mtime_ns for name in done} == done
    assert content(tmp_path / "t") == content(tmp_path / "straight")


def test_after_an_interruption_changed_data_starts_anew(tmp_path):
    def stop(documents, *_):
        if documents > 400:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(data(tmp_path), tmp_path / "t", progress=stop)
    assert list((tmp_path / "t").glob("train-*.bin"))
    mended = data(tmp_path, ["mended", *STORIES])
    make(mended, tmp_path / "t")
    make(mended, tmp_path / "straight")
    assert content(tmp_path / "t") == content(tmp_path / "straight")


def test_a_full_disk_is_told_and_loses_nothing(tmp_path):
    resource = pytest.importorskip("resource")
    config = data(tmp_path)
    make(config, tmp_path / "straight")
    largest = max(p.stat().st_size for p in (tmp_path / "straight").glob("*.bin"))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    (tmp_path / "t").mkdir()
    tokenizer = sum(p.stat().st_size for p in (tmp_path / "tokenizer").iterdir())
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (max(largest - 1, tokenizer), before[1]))
        message = refusal(config, tmp_path / "t")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert f"cannot write {tmp_path / 't'}" in message and "B needed" in message and "free" in message
    assert not list((tmp_path / "t").glob(".tmp-*"))
    make(config, tmp_path / "t")
    assert content(tmp_path / "t") == content(tmp_path / "straight")


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    return prepare(data(folder, STORIES[:200]), folder / "t", vocab_size=300)


def damaged(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "t"))


def refused(folder: Path, check=load_meta) -> str:
    with pytest.raises(GemletError) as caught:
        check(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_shards_that_are_not_whole_are_refused_by_name(whole, tmp_path):
    folder = damaged(whole, tmp_path)
    shard = folder / "train-00000.bin"
    good = shard.read_bytes()
    for size in (0, 1, 2, len(good) // 2, len(good) - 1, len(good) + 2):
        shard.write_bytes((good + b"xx")[:size])
        assert f"{shard} has {size:,} bytes, but must have {len(good):,}" in refused(folder)
    shard.unlink()
    assert f"{shard} is missing" in refused(folder)


def test_a_changed_bit_is_found_by_verify(whole, tmp_path):
    folder = damaged(whole, tmp_path)
    shard = folder / "train-00000.bin"
    good = shard.read_bytes()
    for at in range(0, len(good), len(good) // 10):
        shard.write_bytes(good[:at] + bytes([good[at] ^ 16]) + good[at + 1 :])
        assert f"{shard} was changed" in refused(folder, verify)
    shard.write_bytes(good)
    verify(folder)


def test_an_id_beyond_the_vocabulary_is_found_by_verify(whole, tmp_path):
    folder = damaged(whole, tmp_path)
    shard, file = folder / "train-00000.bin", folder / "meta.json"
    tokens = np.fromfile(shard, np.uint16)
    tokens[7] = 320
    shard.write_bytes(tokens.tobytes())
    meta = json.loads(file.read_text("utf-8"))
    meta["splits"]["train"]["shards"][0]["sha256"] = hashlib.sha256(tokens.tobytes()).hexdigest()
    file.write_text(json.dumps(meta), "utf-8")
    assert "token 7 is 320, but the vocabulary has 320" in refused(folder, verify)


def test_tokens_of_another_tokenizer_are_refused(whole, tmp_path):
    folder = damaged(whole, tmp_path)
    Tokenizer.train(STORIES, 320).save(folder)
    assert "made with another tokenizer" in refused(folder)


def test_a_meta_that_is_wrong_is_refused(whole, tmp_path):
    folder = damaged(whole, tmp_path)
    file = folder / "meta.json"
    good = json.loads(file.read_text("utf-8"))
    train = good["splits"]["train"]
    shard = train["shards"][0]
    for change, words in (
        ({"format": 2}, "is not of format 1"),
        ({"dtype": "uint8"}, "dtype is 'uint8'"),
        ({"vocab": 1}, "unknown key 'vocab'"),
        ({"splits": {"train": train}}, "has the splits train, but must have train and validation"),
        ({"splits": {**good["splits"], "train": {**train, "tokens": 1}}}, "the shards of train are not 1 tokens"),
        ({"splits": {**good["splits"], "train": {**train, "shards": [{**shard, "file": "../x"}]}}}, "'../x'"),
    ):
        file.write_text(json.dumps({**good, **change}), "utf-8")
        assert words in refused(folder)
    for text in ("{", "[]", '{"format": 1}'):
        file.write_text(text)
        assert str(file) in refused(folder)
    file.unlink()
    assert "it has no meta.json" in refused(folder)


def test_fingerprints_tell_data_apart(tmp_path):
    first = make(data(tmp_path, STORIES[:200]), tmp_path / "first")
    again = make(data(tmp_path, STORIES[:200]), tmp_path / "same")
    other = make(data(tmp_path, STORIES[:199]), tmp_path / "other")
    assert first.fingerprint == again.fingerprint != other.fingerprint


HUB = """
import sys
from gemlet.config import DataConfig
from gemlet.prepare import load_meta, prepare
prepare(DataConfig(source="hub:someone/stories"), sys.argv[1], vocab_size=300)
print({name: split.documents for name, split in load_meta(sys.argv[1]).splits.items()})
"""


def test_a_hub_set_is_prepared_and_then_needs_no_network(tmp_path):
    def shard(texts: list[str]) -> bytes:
        pq.write_table(pa.table({"text": texts}), tmp_path / "x.parquet")
        return (tmp_path / "x.parquet").read_bytes()

    def run(**env: str) -> str:
        environment = {**os.environ, **hub.environment(tmp_path / "home", **env)}
        command = [sys.executable, "-c", HUB, str(tmp_path / "t")]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60).stdout.strip()

    with LoopbackHub() as hub:
        files = {f"data/train-0000{i}-of-00003.parquet": shard(STORIES[i::3]) for i in range(3)}
        files["data/validation-00000-of-00001.parquet"] = shard(["a story", *STORIES[:2]])
        hub.add("dataset", "someone/stories", files)
        expected = str({"train": len(STORIES) - 2, "validation": 3})
        assert run() == expected
        before = len(hub.requests)
        assert run() == expected
        assert len(hub.requests) == before
    assert texts_of(tmp_path / "t", "train")[:2] == [STORIES[3], STORIES[6]]
