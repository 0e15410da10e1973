"""Every test's zoo: a temporary folder in which tiny checkpoints are written and merged."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from zoo import Zoo

torch.set_num_threads(1)
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")  # other things run on the machine that runs the tests


@pytest.fixture
def zoo(tmp_path: Path) -> Zoo:
    """An empty zoo of the test's own."""
    return Zoo(tmp_path)
