"""The command line: exit codes, and one line for whatever a user can get wrong."""

import errno
import json
import subprocess
import sys

import pytest

from gemlet import cli, verbs
from gemlet.cli import main
from gemlet.config import RunConfig
from gemlet.errors import GemletError
from gemlet.records import validated
from gemlet.testing import tiny_corpus

TINY = """
[model]
vocab_size = 320
hidden_size = 32
intermediate_size = 64
num_hidden_layers = 2
num_attention_heads = 2
num_key_value_heads = 1
head_dim = 16
sliding_window = 8
max_position_embeddings = 64

[train]
max_steps = 4
sequence_length = 32
batch_size = 4
warmup_steps = 1
eval_every = 2
eval_tokens = 128
save_every = 2
sample_every = 0
device = "cpu"
compile = "off"
precision = "fp32"
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder with a preset, documents, and a run of four steps."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "tiny.toml").write_text(TINY, encoding="utf-8")
    (folder / "stories.txt").write_text("\n<|endoftext|>\n".join(tiny_corpus()), encoding="utf-8")
    given = ["--preset", str(folder / "tiny.toml"), "--data", str(folder / "stories.txt")]
    assert main(["train", *given, "--out", str(folder / "run")]) == 0
    return folder


def complaint(capsys, *argv: str, code: int = 2) -> str:
    """The single line that a command line fails with."""
    capsys.readouterr()
    assert main(argv) == code
    out, err = capsys.readouterr()
    assert err.count("\n") == 1 and "Traceback" not in err and len(err) < 700, err
    assert out == ""
    return err


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["trian"], ["'trian'", "did you mean 'train'"]),
        (["train", "--out", "x", "--train.max-stepz", "5"], ["--train.max-stepz", "did you mean --train.max-steps"]),
        (["train", "--out", "x", "--train.max-steps", "ten"], ["--train.max-steps", "not a whole number: 'ten'"]),
        (["train", "--out", "x", "--train.lr", "fast"], ["--train.lr", "not a number: 'fast'"]),
        (["train", "--out", "x", "--train.schedule", "step"], ["'step'", "--train.schedule", "cosine"]),
        (["train", "--out", "x", "--train.max-steps"], ["--train.max-steps", "missing value"]),
        (["train", "--out", "x", "--train.max-steps", "0"], ["train.max_steps is 0", "greater than or equal to 1"]),
        (["train", "--out", "x", "--data.max-documents", "few"], ["--data.max-documents", "'few'"]),
        (["train", "--out", "x", "--train.lr", "1e-4", "--train.min-lr", "1"], ["min_lr is 1, above lr", "0.0001"]),
        (["train", "--out", "x", "--train.lr", "nan"], ["train.lr is nan", "finite"]),
        (["train", "--out", "x", "--model.head-dim", "7"], ["head_dim is 7", "even"]),
        (["train", "--out", "x", "--model.num-attention-heads", "3"], ["num_attention_heads", "hidden_size"]),
        (["train"], ["missing --out"]),
        (["train", "--out", "x", "stray"], ["stray"]),
        (["train", "--out", "x", "--preset", "tails"], ["unknown preset 'tails'", "did you mean 'tales'"]),
        (["train", "--out", "x", "--preset", "no-such.toml"], ["no-such.toml"]),
        (["train", "--out", "x", "--resume"], ["x"]),
        (["train", "--out", "x", "--data", "no-such-file.txt"], ["no-such-file.txt"]),
        (["prepare", "--out", "x", "--data", "no-such-file.txt"], ["no-such-file.txt"]),
        (["tokenizer", "--out", "x", "--data", "no-such-file.txt"], ["no-such-file.txt"]),
        (["eval", "--model", "no-such-folder/at-all/here", "--data", "tales"], ["no-such-folder"]),
        (["eval", "--model", "x", "--data", "tales", "--split", "words"], ["split is 'words'", "'line'"]),
        (["generate", "--model", "no-such-folder/at-all/here"], ["no-such-folder"]),
        (["generate", "--model", "x", "--num-samples", "0"], ["--num-samples is 0"]),
        (["generate"], ["missing --model"]),
    ],
)
def test_bad_usage_is_one_line_and_exit_code_2(argv, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = complaint(capsys, *argv)
    assert [word for word in words if word not in line] == []
    assert not (tmp_path / "x" / "checkpoints").exists()


def test_a_misspelt_key_in_a_configuration_file_is_named(capsys, tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text("[train]\nmax_step = 5\n", encoding="utf-8")
    assert "did you mean 'max_steps'" in complaint(capsys, "train", "--preset", str(path), "--out", str(tmp_path / "x"))


def test_flags_and_a_file_fail_with_the_same_sentence(capsys, run):
    bad = {"model": {"num_key_value_heads": 3, "head_dim": 7}, "train": {"min_lr": 1.0}}
    with pytest.raises(GemletError) as error:
        base = RunConfig.from_toml(TINY).model_dump()
        validated(RunConfig, {key: base[key] | bad.get(key, {}) for key in base}, "bad flags")
    flags = ["--model.num-key-value-heads", "3", "--model.head-dim", "7", "--train.min-lr", "1"]
    given = ["train", "--preset", str(run / "tiny.toml"), "--out", str(run / "other"), *flags]
    assert complaint(capsys, *given) == f"gemlet train: {error.value}\n"


def test_every_field_is_a_flag_and_the_preset_is_its_default(run):
    flags = [
        "--preset",
        str(run / "tiny.toml"),
        "--data",
        "here",
        "--train.max_steps=9",
        "--model.no-tie-word-embeddings",
    ]
    more = ["--train.sample-prompts", "One", "Two", "--model.layer-types", "full_attention", "sliding_attention"]
    parsed = cli._parse("train", ["--out", "x", *flags, *more])
    expected = RunConfig.from_toml(TINY).model_dump()
    expected["data"]["source"] = "here"
    expected["train"] |= {"max_steps": 9, "sample_prompts": ("One", "Two")}
    expected["model"] |= {"tie_word_embeddings": False, "layer_types": ("full_attention", "sliding_attention")}
    assert parsed.run == validated(RunConfig, expected, "expected")


@pytest.mark.parametrize("preset", ["tales", "tinystories-10min"])  # off in one, on in the other
@pytest.mark.parametrize(
    ("flag", "apart"), [("--train.separate-documents", True), ("--train.no-separate-documents", False)]
)
def test_a_switch_has_both_forms_whatever_the_preset(preset, flag, apart):
    verb = cli._parse("train", ["--preset", preset, flag, "--out", "x"])
    assert verb.run.train.separate_documents is apart


def test_resuming_starts_from_the_configuration_of_the_run(run, capsys):
    parsed = cli._parse("train", ["--resume", "--out", str(run / "run"), "--train.max-steps", "6"])
    saved = RunConfig.from_toml((run / "run" / "config.toml").read_text("utf-8"))
    assert parsed.run == saved.replace(train=saved.train.replace(max_steps=6))


def test_an_output_folder_that_holds_a_run_is_refused(run, capsys):
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    given = ["train", "--preset", str(run / "tiny.toml"), "--data", str(run / "stories.txt"), "--out", str(run / "run")]
    assert "--resume" in complaint(capsys, *given)
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_eval_prints_one_json_object(run, capsys):
    given = ["eval", "--model", str(run / "run/checkpoints/best"), "--data", str(run / "stories.txt")]
    capsys.readouterr()
    assert main([*given, "--json", "--max-documents", "5"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["documents"] == 5
    assert figures["bytes"] == sum(len(text.encode()) for text in tiny_corpus()[:5])
    assert set(figures) == {"nats_per_token", "perplexity", "bits_per_byte", "tokens", "bytes", "documents"}
    assert main([*given, "--max-documents", "5"]) == 0
    assert f"{figures['bits_per_byte']:.4f}" in capsys.readouterr().out


def test_eval_says_what_fewer_bits_cost(run, capsys):
    given = ["eval", "--model", str(run / "run/checkpoints/best"), "--data", str(run / "stories.txt"), "--json"]
    nats = {}
    for weights in ("auto", "fp32", "int8", "int4"):
        assert main([*given, "--max-documents", "5", "--weights", weights]) == 0
        nats[weights] = json.loads(capsys.readouterr().out)["nats_per_token"]
    assert nats["fp32"] == nats["auto"]
    assert 0 < abs(nats["int8"] - nats["auto"]) < abs(nats["int4"] - nats["auto"]) < 0.05


def test_generate_streams_the_same_samples_for_a_seed(run, capsys):
    given = ["generate", "--model", str(run / "run/checkpoints/best"), "--prompt", "Once", "--max-new-tokens", "8"]
    capsys.readouterr()
    assert main([*given, "--seed", "3", "--num-samples", "2"]) == 0
    both = capsys.readouterr()
    assert both.out.startswith("Once") and "tokens/s" in both.err
    first, second = both.out.split("\n---\n\n")
    for seed, text in (("3", first), ("4", second)):
        assert main([*given, "--seed", seed]) == 0
        assert capsys.readouterr().out == text


def test_prepare_and_tokenizer_write_what_train_takes(run, capsys):
    given = ["--data", str(run / "stories.txt"), "--vocab-size", "300"]
    assert main(["tokenizer", *given, "--out", str(run / "bpe")]) == 0
    assert (run / "bpe" / "tokenizer.json").is_file()
    assert main(["prepare", *given, "--out", str(run / "tokens"), "--tokenizer", str(run / "bpe")]) == 0
    assert "vocabulary 300" in capsys.readouterr().out
    given = ["--preset", str(run / "tiny.toml"), "--data", str(run / "tokens"), "--model.vocab-size", "300"]
    assert main(["train", *given, "--out", str(run / "from-tokens")]) == 0


def test_a_model_that_is_damaged_is_refused(run, capsys, tmp_path):
    (tmp_path / "config.json").write_text("{", encoding="utf-8")
    assert str(tmp_path) in complaint(capsys, "generate", "--model", str(tmp_path))


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/runs/a"), 2, "No space left on device: /runs/a"),
        (PermissionError(errno.EACCES, "Permission denied", "/runs/a"), 2, "Permission denied: /runs/a"),
        (KeyError("x"), 1, "KeyError: 'x': this is a defect of gemlet; run it with --debug"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (GemletError("a sentence"), 2, "a sentence"),
    ],
)
def test_what_is_raised_becomes_an_exit_code_and_a_line(error, code, words, capsys, monkeypatch):
    def fail(self: object) -> None:
        raise error

    monkeypatch.setattr(verbs.Doctor, "__call__", fail)
    assert words in complaint(capsys, "doctor", code=code)
    assert main(["doctor", "--debug"]) == code
    assert "Traceback" in capsys.readouterr().err


def test_doctor_names_versions_and_the_device(capsys):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "torch" in out and "threads" in out and "\nhub " not in out


def test_help_of_every_verb_needs_no_torch():
    code = (
        "import sys; from gemlet.cli import VERBS, main\n"
        "codes = [main([v, '--help']) for v in VERBS] + [main([]), main(['--help']), main(['--version'])]\n"
        "sys.exit(any(codes) or 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "--train.max-steps" in done.stdout and "Optimizer updates of the whole run" in done.stdout


def test_a_reader_that_leaves_early_is_no_error():
    command = f"{sys.executable} -m gemlet train --help"
    process = subprocess.Popen(command.split(), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 141
