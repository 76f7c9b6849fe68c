from __future__ import annotations

import contextlib
import os

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread_one_seed():
    """The problems are tiny: more threads only wait for each other. They are on T2I_TEST_DEVICE."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    device = os.environ.get("T2I_TEST_DEVICE")
    with torch.device(device) if device else contextlib.nullcontext():
        yield
    torch.set_num_threads(threads)
