"""A GPU computes what the CPU computes, at the head_dim of the real models (256), forwards and backwards."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from gemlet.attention import attention, reference
from gemlet.config import RunConfig
from gemlet.data import TokenStream
from gemlet.eager import generate_uncached
from gemlet.generate import generate, generate_samples
from gemlet.loss import IGNORE, _softmax, _to_gradient, linear_cross_entropy
from gemlet.model import Gemma
from gemlet.ready import Ready
from gemlet.sampling import SamplingParams
from gemlet.testing import tiny_config, tiny_model
from gemlet.train import new_state, speed_up, train_step

HEAD_DIM = 256
# B, N, K, T, S, window: full, a window that holds all, sliding, not whole blocks, behind a cache, one query
CASES = {
    "full": (2, 4, 1, 96, 96, None),
    "a window that holds everything": (2, 4, 1, 96, 96, 96),
    "sliding": (2, 4, 1, 128, 128, 16),
    "sliding, the last block is short": (1, 4, 2, 130, 130, 32),
    "sliding, a window of more than half": (1, 4, 1, 96, 96, 64),
    "new tokens behind a cache": (1, 4, 1, 24, 64, 32),
    "one token behind a cache": (2, 4, 1, 1, 64, 32),
    "one head a key": (1, 2, 2, 64, 64, 16),
}
# against the reference in float32; in 16 bits the inputs are rounded before, so that only the computation differs
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def _relative(a: Tensor, b: Tensor) -> float:
    a, b = a.detach().double().cpu(), b.detach().double().cpu()
    return float((a - b).norm() / b.norm().clamp_min(1e-12))


def _with_gradients(
    attend: Callable[..., Tensor], inputs: list[Tensor], device: torch.device, dtype: torch.dtype, window: int | None
) -> list[Tensor]:
    q, k, v = (x.detach().to(device, dtype, copy=True).requires_grad_() for x in inputs)
    y = attend(q, k, v, window=window, scale=HEAD_DIM**-0.5)
    y.backward(torch.linspace(-1, 1, y.numel(), device=device).view(y.shape).to(dtype))
    assert all(x.grad is not None for x in (q, k, v))
    return [y, *(x.grad for x in (q, k, v) if x.grad is not None)]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_attention_is_the_reference(device: torch.device, case: str, dtype: torch.dtype) -> None:
    B, N, K, T, S, window = CASES[case]
    torch.manual_seed(0)
    inputs = [torch.randn(B, heads, length, HEAD_DIM).to(dtype).float() for heads, length in ((N, T), (K, S), (K, S))]
    expected = _with_gradients(reference, inputs, torch.device("cpu"), torch.float32, window)
    found = _with_gradients(attention, inputs, device, dtype, window)
    for name, a, b in zip(("output", "q", "k", "v"), found, expected, strict=True):
        assert _relative(a, b) < TOLERANCE[dtype], name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("vocabulary", [1000, 70_000])  # the second one has several chunks
def test_the_loss_is_that_of_all_logits(device: torch.device, vocabulary: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(150, 64).to(dtype).float(), torch.randn(vocabulary, 64).to(dtype).float() / 8
    targets = torch.randint(0, vocabulary, (150,))
    targets[::7] = IGNORE
    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    expected = torch.nn.functional.cross_entropy(h @ w.T, targets, ignore_index=IGNORE, reduction="sum")
    expected.backward()
    x, y = hidden.to(device, dtype).requires_grad_(), weight.to(device).requires_grad_()
    loss = linear_cross_entropy(x, y, targets.to(device))
    loss.backward()
    assert h.grad is not None and w.grad is not None and x.grad is not None and y.grad is not None
    bound = 2e-5 if dtype == torch.float32 else 2e-2
    assert abs(loss.item() / expected.item() - 1) < bound
    assert _relative(x.grad, h.grad) < bound and _relative(y.grad, w.grad) < bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_softmax_kernel_is_its_reference(device: torch.device, dtype: torch.dtype) -> None:
    """In rows longer than what the kernel takes at a time, with columns beyond the vocabulary."""
    torch.manual_seed(0)
    vocabulary = 5001
    logits = torch.randn(30, 5056, device=device, dtype=dtype) * 3
    targets = torch.randint(0, vocabulary, (30,), device=device)
    targets[::5] = IGNORE
    _compare_softmax(_softmax(device.type, dtype), logits, targets, vocabulary)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernel itself is tested here")
def test_the_interpreted_softmax_kernel_is_its_reference() -> None:
    """One row of it has a logit of minus infinity, as a mask makes them."""
    to_gradient = pytest.importorskip("gemlet.kernels.softmax", reason="Triton is not here").to_gradient
    torch.manual_seed(0)
    logits, targets = torch.randn(6, 5056) * 3, torch.tensor([0, 5000, IGNORE, 7, 4095, 4096])
    logits[3, 4000:] = -torch.inf
    _compare_softmax(to_gradient, logits, targets, 5001)


def _compare_softmax(
    to_gradient: Callable[[Tensor, Tensor, int, int], Tensor], logits: Tensor, targets: Tensor, vocabulary: int
) -> None:
    found, expected = logits.clone(), logits.clone()
    loss = to_gradient(found, targets, vocabulary, IGNORE)
    assert loss.item() == pytest.approx(_to_gradient(expected, targets, vocabulary, IGNORE).item(), rel=1e-5)
    scored = (targets != IGNORE)[:, None]
    assert _relative(found * scored, expected * scored) < (1e-5 if logits.dtype == torch.float32 else 4e-3)
    assert not found[:, vocabulary:].any()


def test_steps_launched_at_once_are_the_steps(device: torch.device) -> None:
    """With micro-batches and a sliding window, over several steps, each with other tokens."""
    if device.type == "cpu":
        pytest.skip("CUDA graphs are for NVIDIA's GPUs")
    run = _run()
    run = run.replace(train=run.train.replace(micro_batch_size=2, precision="bf16", lr=1e-3))
    stream = TokenStream([np.random.default_rng(0).integers(0, run.model.vocab_size, 4000).astype(np.uint16)], 0)
    found: list[list[float]] = [[], []]
    for fast, figures in enumerate(found):
        state = new_state(run, device)
        if fast:
            speed_up(state, run.train)
        for _ in range(7):
            figures += train_step(state, stream, run)
    assert found[1] == pytest.approx(found[0], rel=2e-2)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_training_is_that_of_the_cpu(device: torch.device, optimizer: str) -> None:
    """The first losses of a run: float32 products, the same batches, the same weights."""
    run = _run()
    changes = {"micro_batch_size": 2, "optimizer": optimizer, "precision": "fp32", "lr": 1e-3, "muon_lr": 1e-3}
    run = run.replace(train=run.train.replace(**changes))
    stream = TokenStream([np.random.default_rng(0).integers(0, run.model.vocab_size, 4000).astype(np.uint16)], 0)
    losses = []
    for where in (torch.device("cpu"), device):
        state = new_state(run, where)
        losses.append([train_step(state, stream, run)[0] for _ in range(5)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert losses[0][0] != losses[0][-1], "the weights have moved"


def test_the_16_bit_step_follows_the_32_bit_step(device: torch.device) -> None:
    """In bf16 the loss of the same weights on the same batch is that of float32, and so is the gradient's norm."""
    run = _run()
    stream = TokenStream([np.random.default_rng(0).integers(0, run.model.vocab_size, 4000).astype(np.uint16)], 0)
    found = []
    for precision in ("fp32", "bf16"):
        mine = run.replace(train=run.train.replace(precision=precision))
        found.append(train_step(new_state(mine, device), stream, mine))
    assert found[1] == pytest.approx(found[0], rel=5e-2)


def _run() -> RunConfig:
    train = RunConfig().train.replace(sequence_length=48, batch_size=4, max_steps=8, warmup_steps=2)
    shape = tiny_config(head_dim=HEAD_DIM, sliding_window=16, max_position_embeddings=64)
    return RunConfig(model=shape, train=train)


def _on(device: torch.device) -> Gemma:
    shape = {"head_dim": HEAD_DIM, "sliding_window": 8, "max_position_embeddings": 64, "eos_token_id": None}
    return tiny_model(**shape).to(device)


def test_logits_are_those_of_the_cpu(device: torch.device) -> None:
    ids = torch.arange(2, 52)[None].repeat(2, 1)
    with torch.no_grad():
        assert _relative(_on(device)(ids.to(device)), _on(torch.device("cpu"))(ids)) < 1e-4


def test_cached_decoding_is_uncached_decoding(device: torch.device) -> None:
    """Beyond twice the window, alone and in a batch."""
    model, params = _on(device), SamplingParams(max_new_tokens=24, temperature=0)
    prompt = list(range(5, 25))
    expected = list(generate_uncached(model, prompt, params))
    assert len(expected) > 16, "the window was passed twice"
    assert list(generate(model, prompt, params)) == expected
    batched: list[list[int]] = [[], [], []]
    for sample, token in generate_samples(model, prompt, params, 3):
        batched[sample].append(token)
    assert batched == [expected] * 3
    ready = Ready(model)  # which keeps a decoder, graph and all
    assert list(generate(ready, prompt[:3], params)) == list(generate_uncached(model, prompt[:3], params))
    assert list(generate(ready, prompt, params)) == expected
