"""What linear.cpp computes are plain products and their gradients, by however many threads."""

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gemlet.geglu import geglu
from gemlet.kernels import linear as kernel
from gemlet.linear import feed_forward, linear, linears, together
from gemlet.testing import tiny_model

pytestmark = pytest.mark.skipif(
    not kernel.available("cpu", torch.bfloat16), reason="no C++ compiler, or no AMX in the processor"
)

SHAPES = [
    (32, 32, 32), (33, 32, 64), (100, 96, 32, 64, 32), (257, 64, 320), (600, 640, 96, 32), (300, 2048, 64),
    (64, 640, 416), (1100, 32, 64), (2050, 64, 32, 32),
]  # fmt: skip
"""Tokens, inputs, outputs: less than a square beyond the last, more blocks than threads and fewer, one and several
strips of columns, one weight and several, one and several parts of the tokens."""

FEED_FORWARD = [(32, 32, 32), (33, 32, 64), (257, 64, 320), (600, 96, 32), (100, 640, 1312), (1100, 32, 64)]
"""Tokens, width, inner width."""


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def case(tokens: int, inputs: int, *outputs: int, dtype: torch.dtype = torch.float32) -> list[list[Tensor]]:
    """States; weights; a gradient for each result."""
    g = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, inputs, generator=g).bfloat16()
    weights = [(torch.randn(n, inputs, generator=g) * inputs**-0.5).to(dtype) for n in outputs]
    return [[x], weights, [torch.randn(tokens, n, generator=g).bfloat16() for n in outputs]]


def feed_forward_case(tokens: int, width: int, inner: int, dtype: torch.dtype = torch.float32) -> list[list[Tensor]]:
    """States; the weights of gate, up and down; a gradient of the result."""
    x, weights, _ = case(tokens, width, inner, inner, dtype=dtype)
    [down] = case(tokens, inner, width, dtype=dtype)[1]
    return [x, [*weights, down], case(tokens, inner, width)[2]]


def computed(way: Callable[..., list[Tensor] | Tensor], x: list[Tensor], weights: list[Tensor], grad: list[Tensor]):
    """The results, and the gradients of x and the weights."""
    tensors = [t.detach().requires_grad_() for t in (*x, *weights)]
    out = way(*tensors)
    out = [out] if isinstance(out, Tensor) else out
    upstream = [g.to(y.dtype) for g, y in zip(grad, out, strict=True)]
    return [*(y.detach() for y in out), *torch.autograd.grad(out, tensors, upstream)]


def rounded(tensors: list[Tensor]) -> list[Tensor]:
    """As the kernel takes them, in float32."""
    return [t.bfloat16().float() for t in tensors]


def same(found: list[Tensor], expected: list[Tensor]) -> bool:
    return len(found) == len(expected) and all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def plain(x: Tensor, *weights: Tensor) -> list[Tensor]:
    return [x @ w.T for w in weights]


def plain_feed_forward(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return (F.gelu(x @ gate.T, approximate="tanh") * (x @ up.T)) @ down.T


def test_it_is_what_the_model_takes(monkeypatch):
    """Else nothing here would be tested; and with it, the model computes what it does without."""
    model = tiny_model(3, hidden_size=64, intermediate_size=96, head_dim=32)
    model.compute_in(torch.bfloat16)
    ids = torch.randint(0, model.config.vocab_size, (2, 40), generator=torch.Generator().manual_seed(0))

    def gradients() -> tuple[Tensor, ...]:
        return torch.autograd.grad(model(ids).square().mean(), list(model.parameters()))

    names = "linear", "feed_forward"
    called = {name: 0 for name in names}

    def counted(name: str) -> Callable:
        function = getattr(kernel, name)

        def call(*tensors):
            called[name] += 1
            return function(*tensors)

        return call

    with monkeypatch.context() as patch:
        for name in names:
            patch.setattr(kernel, name, counted(name))
        found = gradients()
    layers = model.config.num_hidden_layers
    assert called == {"linear": 2 * layers, "feed_forward": layers}
    monkeypatch.setattr(kernel, "available", lambda *_: False)
    for ours, theirs in zip(found, gradients(), strict=True):
        assert (ours - theirs).norm() < 0.03 * theirs.norm()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", kernel.DTYPES)
def test_it_is_the_products_and_their_gradients(shape, dtype):
    x, weights, grad = case(*shape, dtype=dtype)
    n = len(weights)
    found = computed(linears, x, weights, grad)
    expected = computed(plain, rounded(x), rounded(weights), rounded(grad))
    assert [y.dtype for y in found] == [torch.bfloat16] * (n + 1) + [dtype] * n
    # to the nearest number that bf16 has; in float32, but for the order of a sum
    for ours, theirs in zip(found, expected, strict=True):
        error, size = (ours.float() - theirs).abs(), theirs.abs().max()
        assert (error <= (2**-8 * theirs.abs() if ours.dtype == torch.bfloat16 else 0) + 1e-5 * size).all()


@pytest.mark.parametrize("shape", FEED_FORWARD)
@pytest.mark.parametrize("dtype", kernel.DTYPES)
def test_it_is_the_feed_forward_part_and_its_gradients(shape, dtype):
    x, weights, grad = feed_forward_case(*shape, dtype=dtype)
    found = computed(feed_forward, x, weights, grad)
    expected = computed(plain_feed_forward, rounded(x), rounded(weights), rounded(grad))
    assert [y.dtype for y in found] == [torch.bfloat16] * 2 + [dtype] * 3
    # what lies between the products is rounded to 8 bits
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours.float() - theirs).norm() < 0.004 * theirs.norm()
        assert (ours.float() - theirs).abs().max() < 0.02 * theirs.abs().max()


def test_it_is_as_exact_as_three_products_and_geglu(monkeypatch):
    x, weights, grad = feed_forward_case(500, 64, 128)
    expected = computed(plain_feed_forward, rounded(x), rounded(weights), rounded(grad))
    found = computed(feed_forward, x, weights, grad)
    monkeypatch.setattr(kernel, "available", lambda *_: False)
    others = computed(lambda x, gate, up, down: linear(geglu(linear(x, gate), linear(x, up)), down), x, weights, grad)
    for ours, theirs, exact in zip(found, others, expected, strict=True):
        assert (ours.float() - exact).norm() <= 1.05 * (theirs.float() - exact).norm()


def test_what_is_large_is_no_trouble():
    """GELU of what is far from 0 is 0 or what it is of, and so is its way back."""
    (x,), (gate, up, down), [grad] = feed_forward_case(64, 32, 32)
    gate = gate * 1000
    found = computed(feed_forward, [x], [gate, up, down], [grad])
    expected = computed(plain_feed_forward, rounded([x]), rounded([gate, up, down]), rounded([grad]))
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.isfinite().all()
        assert (ours.float() - theirs).norm() < 0.01 * theirs.norm()


@pytest.mark.parametrize(
    "way, tensors",
    [(linears, case(*shape)) for shape in SHAPES] + [(feed_forward, feed_forward_case(*s)) for s in FEED_FORWARD],
)
def test_no_bit_depends_on_the_number_of_threads(threads, way, tensors):
    threads(1)
    expected = computed(way, *tensors)
    for count in (2, 3, 8):
        threads(count)
        assert same(computed(way, *tensors), expected)


def test_a_row_depends_on_nothing_beside_it():
    (x,), weights, _ = case(200, 64, 96, 32)
    _, inner, _ = feed_forward_case(200, 64, 96)
    whole, whole_part = linears(x, *weights), feed_forward(x, *inner)
    for first, count in ((0, 32), (32, 64), (77, 123)):
        rows = slice(first, first + count)
        assert same(linears(x[rows], *weights), [y[rows] for y in whole])
        assert torch.equal(feed_forward(x[rows], *inner), whole_part[rows])


def test_tensors_may_lie_in_any_way():
    def turned(x: Tensor) -> Tensor:
        return x.T.contiguous().T

    for way, tensors in ((linears, case(120, 64, 96, 32)), (feed_forward, feed_forward_case(120, 64, 96))):
        expected = computed(way, *tensors)
        assert same(computed(way, *([turned(x) for x in part] for part in tensors)), expected)
        x, weights, grad = tensors
        cut = [x[0].view(4, 30, -1)], weights, [g.view(4, 30, -1) for g in grad]
        assert same([y.reshape(e.shape) for y, e in zip(computed(way, *cut), expected, strict=True)], expected)


@pytest.mark.parametrize("tokens, inputs, outputs", [(31, 32, 32), (32, 33, 32), (32, 32, 20)])
def test_what_it_cannot_do_torch_does(tokens, inputs, outputs):
    (x,), weights, _ = case(tokens, inputs, outputs)
    assert not together(x, *weights)
    expected = x.float() @ weights[0].bfloat16().float().T
    torch.testing.assert_close(linear(x, *weights).float(), expected, atol=0.02, rtol=0.02)


def test_they_can_be_traced():
    (x,), weights, grad = case(64, 32, 96, 64)
    torch.library.opcheck(kernel.linear, (x.requires_grad_(), [w.requires_grad_() for w in weights]))
    torch.library.opcheck(kernel.linear_backward, (grad, x.detach(), [w.detach() for w in weights]))
    (x,), weights, grad = feed_forward_case(64, 32, 96)
    tensors = (x, *weights)
    torch.library.opcheck(kernel.feed_forward, tuple(t.requires_grad_() for t in tensors))
    tensors = [t.detach() for t in tensors]
    _, *states = kernel.feed_forward(*tensors)
    torch.library.opcheck(kernel.feed_forward_backward, (*grad, tensors[0], *states, *tensors[1:]))


def test_compiled_they_are_the_same():
    for way, tensors in ((linears, case(64, 32, 96, 64)), (feed_forward, feed_forward_case(64, 32, 96))):
        assert same(computed(torch.compile(way), *tensors), computed(way, *tensors))
