"""These tests hold a GPU against the CPU. `pytest tests/gpu --device cpu` runs them without one, to try the tests."""

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cuda", help="where tests/gpu computes")


@pytest.fixture
def device(request: pytest.FixtureRequest) -> torch.device:
    chosen = torch.device(str(request.config.getoption("--device", "cuda")))
    if chosen.type == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device is here")
    return chosen
