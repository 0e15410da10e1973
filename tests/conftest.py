"""Every test's zoo: a temporary folder in which tiny checkpoints are written and merged."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from zoo import Zoo

torch.set_num_threads(1)


@pytest.fixture
def zoo(tmp_path: Path) -> Zoo:
    """An empty zoo of the test's own."""
    return Zoo(tmp_path)
