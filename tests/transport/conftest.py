from __future__ import annotations

import pytest


@pytest.fixture(params=["compiled", "python"])
def pump(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run a test once with the compiled pump and once with the plain Python loop."""
    monkeypatch.setenv("FEDCORE_PUMP", request.param)
    return request.param
