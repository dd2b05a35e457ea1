"""How the engine's tests run torch."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _one_torch_thread() -> None:
    """Tiny models gain nothing from threads, and OpenMP's waste several times as much on a busy machine."""
    torch.set_num_threads(1)
