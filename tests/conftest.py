"""Settings of the test run: few threads, no hub, repeatable.
Not here: models and helpers of single tests."""

import os

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "2")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
