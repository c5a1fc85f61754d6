"""These tests hold a GPU against the CPU. `pytest tests/gpu --device cpu` runs them without one, to try the tests.

Where no GPU is, Triton's kernels are computed by its interpreter, in numpy: slowly, and in float32.
"""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anybody imports Triton


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cuda", help="where tests/gpu computes")


@pytest.fixture
def device(request: pytest.FixtureRequest) -> torch.device:
    chosen = torch.device(str(request.config.getoption("--device", "cuda")))
    if chosen.type == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device is here")
    return chosen
