"""Fixtures of the room kv."""

from __future__ import annotations

from typing import Any

import pytest
from tiny_models import FAMILIES, tiny_model


@pytest.fixture(scope="session", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="session")
def llama() -> Any:
    return tiny_model()
