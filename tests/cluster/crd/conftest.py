"""Every test of this folder finds our kinds on the control plane."""

import pytest
from tests.cluster.crds import crds

__all__ = ["crds"]


@pytest.fixture(autouse=True)
def _both_kinds(crds: None) -> None:
    pass
