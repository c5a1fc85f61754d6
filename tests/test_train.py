"""Training by equivalence: micro-batches and the whole batch, interrupted and straight, ours and plain torch."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from gemlet.checkpoint import Checkpoints, load_model
from gemlet.config import RunConfig, preset
from gemlet.data import TokenStream, batch
from gemlet.errors import GemletError, TrainingError
from gemlet.evaluate import evaluate
from gemlet.optim import lr_at
from gemlet.prepare import prepare
from gemlet.tokenizer import Tokenizer
from gemlet.train import TrainState, new_state, train, train_step, with_tokenizer

MODEL = {
    "vocab_size": 400,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention"],
    "max_position_embeddings": 256,
}
TRAIN = {
    "max_steps": 12,
    "sequence_length": 24,
    "batch_size": 8,
    "warmup_steps": 2,
    "lr": 0.01,
    "log_every": 1,
    "eval_every": 4,
    "eval_tokens": 2000,
    "save_every": 3,
    "sample_every": 0,
    "precision": "fp32",
    "compile": "off",
    "device": "cpu",
}
TIMES = {"train/tok_per_sec", "train/mfu", "mem/peak_gib"}  # what another run cannot repeat


@pytest.fixture(scope="session")
def tokens(tmp_path_factory) -> Path:
    data = RunConfig.model_validate({"data": {"source": "tales", "max_documents": 300}}).data
    return prepare(data, tmp_path_factory.mktemp("data") / "tokens", vocab_size=400)


def config(tokens: Path, **changes) -> RunConfig:
    model = {**MODEL, **changes.pop("model", {})}
    return RunConfig.model_validate({"model": model, "data": {"source": str(tokens)}, "train": {**TRAIN, **changes}})


def start(tokens: Path, **changes) -> tuple[RunConfig, TrainState, TokenStream]:
    chosen, _ = with_tokenizer(config(tokens, **changes), tokens)
    return chosen, new_state(chosen, torch.device("cpu")), TokenStream.open(tokens, "train")


def metrics(out: Path) -> list[dict]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMES} for line in lines]


def saved_bytes(out: Path, step: int) -> dict[str, bytes]:
    folder = out / "checkpoints" / f"step-{step:08d}"
    return {
        "weights": (folder / "model.safetensors").read_bytes(),
        "optimizer": (folder / "train_state" / "optimizer.safetensors").read_bytes(),
    }


# One step


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("micro", [1, 2, 4])
def test_micro_batches_equal_one_big_batch(tokens, optimizer, micro):
    whole_config, whole, stream = start(tokens, optimizer=optimizer)
    parts_config, parts, _ = start(tokens, optimizer=optimizer, micro_batch_size=micro)
    gradients = []
    for c, state in ((whole_config, whole), (parts_config, parts)):
        for o in state.optimizers:  # look at the gradients before they are cleared
            o.zero_grad = lambda *_, **__: None
        loss, norm = train_step(state, stream, c)
        gradients.append((loss, norm, [p.grad for p in state.model.parameters() if p.grad is not None]))
    (loss, norm, big), (loss_parts, norm_parts, small) = gradients
    assert loss_parts == pytest.approx(loss, rel=1e-5) and norm_parts == pytest.approx(norm, rel=1e-4)
    for a, b in zip(big, small, strict=True):
        assert (a - b).norm() <= 1e-4 * a.norm() + 1e-9


def test_a_step_is_what_plain_torch_does(tokens):
    c, state, stream = start(tokens, grad_clip=0.1, weight_decay=0.1)
    _, twin, _ = start(tokens)
    decayed = [p for n, p in twin.model.named_parameters() if "_proj" in n]
    others = [p for n, p in twin.model.named_parameters() if "_proj" not in n]
    reference = torch.optim.AdamW(
        [{"params": others, "weight_decay": 0.0}, {"params": decayed, "weight_decay": 0.1}],
        betas=(0.9, 0.95),
        eps=1e-10,
    )
    for step in range(3):
        inputs, targets = batch(stream, c.train, step)
        loss = F.cross_entropy(twin.model(inputs).flatten(0, 1), targets.flatten())
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(twin.model.parameters(), 0.1)
        for group in reference.param_groups:
            group["lr"] = 0.01 * lr_at(step, c.train)
        reference.step()
        reference.zero_grad()
        ours_loss, ours_norm = train_step(state, stream, c)
        assert ours_loss == pytest.approx(loss.item(), rel=1e-5) and ours_norm == pytest.approx(norm.item(), rel=1e-4)
    for (name, a), (_, b) in zip(state.model.named_parameters(), twin.model.named_parameters(), strict=True):
        assert (a - b).abs().max() < 3e-4, name  # Adam divides by gradients: tiny ones differ by rounding


def test_separate_documents_are_trained_as_if_alone(tokens):
    """The loss of a step is that of the pieces of its rows, each in a forward pass of its own."""
    c, state, stream = start(tokens, separate_documents=True, sequence_length=128, micro_batch_size=2)
    _, twin, _ = start(tokens)
    inputs, targets = batch(stream, c.train, 0)
    total, documents = 0.0, 0
    for row, wanted in zip(inputs, targets, strict=True):
        cuts = [t for t in range(1, len(row)) if row[t] == stream.eos_token_id]
        lengths = [b - a for a, b in zip([0, *cuts], [*cuts, len(row)], strict=True)]
        documents += len(lengths)
        for piece, goal in zip(row.split(lengths), wanted.split(lengths), strict=True):
            total += F.cross_entropy(twin.model(piece[None])[0], goal, reduction="sum").item()
    assert documents > len(inputs)
    loss, _ = train_step(state, stream, c)
    assert loss == pytest.approx(total / targets.numel(), rel=1e-5)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_keeps_float32_weights_and_nearly_the_same_loss(tokens, precision):
    full_config, full, stream = start(tokens)
    half_config, half, _ = start(tokens, precision=precision)
    for _ in range(6):
        expected, _ = train_step(full, stream, full_config)
        loss, _ = train_step(half, stream, half_config)
        assert loss == pytest.approx(expected, rel=0.02)
    assert all(p.dtype == torch.float32 for p in half.model.parameters())
    assert half.scaler.is_enabled() == (precision == "fp16")


def test_an_fp16_overflow_skips_the_update_and_lowers_the_scale(tokens):
    c, state, stream = start(tokens, precision="fp16")
    state.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60)
    before = [p.clone() for p in state.model.parameters()]
    train_step(state, stream, c)
    assert state.scaler.get_scale() < 2.0**60
    assert all(torch.equal(a, b) for a, b in zip(before, state.model.parameters(), strict=True))


def test_a_gradient_that_is_not_finite_stops_before_the_weights_are_touched(tokens):
    c, state, stream = start(tokens)
    train_step(state, stream, c)
    weight = state.model.get_parameter("model.layers.1.mlp.down_proj.weight")
    hook = weight.register_hook(lambda g: g.index_fill(0, torch.tensor([3]), math.nan))
    before = [p.clone() for p in state.model.parameters()]
    with pytest.raises(TrainingError, match=r"gradient of model\.layers\.1\.mlp\.down_proj\.weight .* at step 2 .*lr"):
        train_step(state, stream, c)
    hook.remove()
    assert all(torch.equal(a, b) for a, b in zip(before, state.model.parameters(), strict=True))


def test_weights_that_are_not_finite_are_named(tokens):
    c, state, stream = start(tokens)
    with torch.no_grad():
        state.model.get_parameter("model.layers.0.self_attn.q_proj.weight")[0, 0] = math.inf
    with pytest.raises(TrainingError, match=r"weights of model\.layers\.0\.self_attn\.q_proj\.weight"):
        train_step(state, stream, c)


def test_tokens_seen_once_are_learned(tokens):
    c, state, stream = start(tokens, max_steps=60, optimizer="muon")
    losses = [train_step(state, stream, c)[0] for _ in range(60)]
    assert losses[-1] < losses[0] - 1.5


# A run


def test_a_run_leaves_what_it_promises(tokens, tmp_path):
    out = tmp_path / "run"
    result = train(config(tokens, sample_every=6), out, quiet=True)
    assert result.step == 12 and result.checkpoint == out / "checkpoints" / "best"
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert {p.name for p in (out / "samples").iterdir()} == {"step-00000006.txt", "step-00000012.txt"}
    assert (out / "samples" / "step-00000012.txt").read_text().startswith("Once upon a time")
    lines = metrics(out)
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert {"train/loss", "train/lr", "train/grad_norm", "train/tokens", "val/loss", "val/ppl", "val/bpb"} <= set(
        lines[3]
    )
    assert set(json.loads((out / "metrics.jsonl").read_text().splitlines()[0])) >= TIMES
    # the checkpoint that is called best has the loss that was reported for it
    tokenizer = Tokenizer.load(result.checkpoint)
    stream = TokenStream.open(tokens, "validation")
    texts = [tokenizer.decode(ids) for ids in stream.documents()]
    again = evaluate(load_model(result.checkpoint), tokenizer, texts)
    assert min(line["val/loss"] for line in lines if "val/loss" in line) == result.val_loss
    assert again.nats_per_token == pytest.approx(result.val_loss, rel=1e-5)
    assert again.bits_per_byte == pytest.approx(result.val_bpb, rel=1e-5)
    assert RunConfig.from_toml((out / "config.toml").read_text()).model.vocab_size == tokenizer.vocab_size


def test_tiny_numbers_are_zero_in_a_run_and_themselves_behind_it(tokens, tmp_path, monkeypatch):
    seen = []

    def spy(*args):
        seen.append((torch.full((64,), 1e-39) * 0.5).count_nonzero().item())
        return train_step(*args)

    monkeypatch.setattr(sys.modules[train.__module__], "train_step", spy)
    train(config(tokens, max_steps=3), tmp_path / "run", quiet=True)
    assert seen == [0, 0, 0]
    assert (torch.full((64,), 1e-39) * 0.5).count_nonzero() == 64


def test_raw_text_is_prepared_into_the_run(tmp_path):
    (tmp_path / "stories.txt").write_text(
        "\n<|endoftext|>\n".join(f"The cat had {i} mice and a hat." for i in range(400))
    )
    chosen = config(tmp_path, max_steps=2, warmup_steps=0)
    chosen = chosen.replace(data={"source": str(tmp_path / "stories.txt")})
    result = train(chosen, tmp_path / "run", quiet=True)
    assert (tmp_path / "run" / "tokens" / "meta.json").is_file() and math.isfinite(result.val_loss)


# Resume


def child(out: Path, file: Path, resume: bool = False) -> subprocess.Popen:
    how = ["--resume"] if resume else ["--preset", str(file)]
    command = [sys.executable, "-m", "gemlet", "train", "--out", str(out), *how]
    return subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)


def wait_for_line(out: Path, n: int) -> None:
    deadline = time.monotonic() + 60
    while not ((out / "metrics.jsonl").exists() and (out / "metrics.jsonl").read_bytes().count(b"\n") >= n):
        assert time.monotonic() < deadline, "the run wrote no metrics"
        time.sleep(0.005)


@pytest.fixture(scope="session")
def straight(tokens, tmp_path_factory) -> tuple[Path, Path]:
    """A run that nobody interrupts, and its configuration."""
    folder = tmp_path_factory.mktemp("straight")
    file = folder / "run.toml"
    # few evaluations: each draws the loss, which takes longer than ten of these steps
    file.write_text(config(tokens, max_steps=40, eval_every=10, optimizer="muon", precision="bf16").to_toml())
    assert child(folder / "run", file).wait() == 0
    return folder / "run", file


def test_killed_and_resumed_is_byte_for_byte_the_straight_run(straight, tmp_path):
    expected, file = straight
    out = tmp_path / "run"
    for resume, line in ((False, 5), (True, 17), (True, 30)):
        process = child(out, file, resume)
        wait_for_line(out, line)
        process.kill()
        process.wait()
    assert child(out, file, resume=True).wait() == 0
    assert saved_bytes(out, 40) == saved_bytes(expected, 40)
    assert metrics(out) == metrics(expected)


@pytest.mark.skipif(os.name == "nt", reason="Windows ends a process that is sent a signal; it cannot handle it")
def test_a_signal_saves_the_step_and_the_run_goes_on_from_it(straight, tmp_path):
    expected, file = straight
    out, steps = tmp_path / "run", 0
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        process = child(out, file, resume=steps > 0)
        wait_for_line(out, steps + 7)
        process.send_signal(number)
        assert process.wait() == code
        steps = len(metrics(out))
        newest = Checkpoints(out / "checkpoints", 2).latest()
        assert newest is not None and int(newest.name.removeprefix("step-")) == steps
    assert child(out, file, resume=True).wait() == 0
    assert saved_bytes(out, 40) == saved_bytes(expected, 40)
    assert metrics(out) == metrics(expected)


def test_a_finished_run_resumes_to_itself(tokens, tmp_path):
    out = tmp_path / "run"
    first = train(config(tokens), out, quiet=True)
    before = (out / "metrics.jsonl").read_bytes()
    again = train(None, out, resume=True, quiet=True)
    assert (again.step, again.val_loss, again.val_bpb) == (first.step, first.val_loss, first.val_bpb)
    assert (out / "metrics.jsonl").read_bytes() == before


def test_more_steps_go_on_from_the_end(tokens, tmp_path):
    train(config(tokens), tmp_path / "run", quiet=True)
    result = train(config(tokens, max_steps=15), tmp_path / "run", resume=True, quiet=True)
    assert result.step == 15 and len(metrics(tmp_path / "run")) == 15


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model": {"hidden_size": 64}}, "model.hidden_size was 32 and is now 64"),
        ({"model": {"sliding_window": 9}}, "model.sliding_window was 8 and is now 9"),
        ({"optimizer": "muon"}, "train.optimizer was 'adamw' and is now 'muon'"),
    ],
)
def test_another_model_is_not_resumed(tokens, tmp_path, changes, named):
    train(config(tokens, max_steps=3), tmp_path / "run", quiet=True)
    with pytest.raises(GemletError, match=named):
        train(config(tokens, max_steps=6, **changes), tmp_path / "run", resume=True, quiet=True)


def test_other_data_is_not_resumed(tokens, tmp_path):
    data = preset("tales").data
    (mine,) = [prepare(data.replace(max_documents=200), tmp_path / "mine", vocab_size=400)]
    out = tmp_path / "run"
    train(config(mine, max_steps=3), out, quiet=True)
    with pytest.raises(GemletError, match=r"data\.source was .*mine.* and is now"):
        train(config(tokens, max_steps=6), out, resume=True, quiet=True)
    for file in mine.iterdir():
        file.unlink()
    prepare(data.replace(max_documents=250), mine, vocab_size=400)
    with pytest.raises(GemletError, match="tokens of the run are not those of its checkpoint"):
        train(None, out, resume=True, quiet=True)


def test_folders_that_hold_a_run_or_none(tokens, tmp_path):
    out = tmp_path / "run"
    with pytest.raises(GemletError, match="nothing to resume"):
        train(None, out, resume=True, quiet=True)
    train(config(tokens, max_steps=3), out, quiet=True)
    weights = saved_bytes(out, 3)
    with pytest.raises(GemletError, match="holds a run already; go on with it by --resume"):
        train(config(tokens, max_steps=3), out, quiet=True)
    assert saved_bytes(out, 3) == weights
