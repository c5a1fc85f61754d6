"""What is said of this machine without torch is what torch says."""

import os
import subprocess
import sys

import pytest
import torch

from gemlet import host


def test_where_torch_finds_a_gpu_there_may_be_one():
    assert host.may_have_gpu() or not torch.cuda.is_available()


@pytest.mark.parametrize(
    ("platform", "devices", "expected"),
    [
        ("linux", ["null", "nvidiactl", "kvm"], False),
        ("linux", ["nvidia0"], True),
        ("linux", ["kfd"], True),
        ("linux", ["dxg"], True),
        ("darwin", [], True),
    ],
)
def test_a_driver_is_the_sign_of_a_gpu(tmp_path, monkeypatch, platform, devices, expected):
    monkeypatch.setattr(sys, "platform", platform)
    for name in devices:
        (tmp_path / name).touch()
    assert host.may_have_gpu(tmp_path) is expected


@pytest.mark.parametrize(("asked", "expected"), [("3", 3), ("", None), ("0", None), ("nonsense", None)])
def test_threads_before_torch_is_loaded(asked, expected):
    code = "import sys; from gemlet.host import threads; print(threads(), 'torch' in sys.modules)"
    environment = {**os.environ, "OMP_NUM_THREADS": asked}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    count, loaded = done.stdout.split()
    assert loaded == "False"
    assert int(count) == expected if expected else 1 <= int(count) <= (os.cpu_count() or 1)


def test_threads_are_those_of_torch_where_it_is_loaded():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(before + 1)
        assert host.threads() == before + 1
    finally:
        torch.set_num_threads(before)
