"""Every test's zoo: a temporary folder in which tiny checkpoints are written and merged."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from zoo import Zoo

from mowmerge.checkpoint import reader

torch.set_num_threads(1)
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")  # other things run on the machine that runs the tests


@pytest.fixture
def zoo(tmp_path: Path) -> Zoo:
    """An empty zoo of the test's own."""
    return Zoo(tmp_path)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes that were read of tensors in files, so far."""
    total, real = [0], reader._File.read

    def read(self: reader._File, out: memoryview, offset: int) -> int:
        got = real(self, out, offset)
        total[0] += got
        return got

    monkeypatch.setattr(reader._File, "read", read)
    return total
