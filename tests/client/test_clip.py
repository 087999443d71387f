"""A site's own bound on the norm of its updates: whatever the run asks for, no larger update leaves."""

from __future__ import annotations

import itertools
import logging
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import fedcore.client as fl
from fedcore.client.testing import local_run
from fedcore.errors import ConfigError, NonFiniteError
from fedcore.site.settings import SiteSettings

COUNT, CLIP = 30_000, 0.75


def script(step: np.float32) -> list[np.ndarray]:
    """Add to each element in each round; return the global models and the last one."""
    fl.init({"w": np.linspace(-1, 1, COUNT, dtype=np.float32)})
    seen = []
    while fl.is_running():
        model = fl.receive()
        seen.append(np.array(model["w"]))
        if fl.is_train():
            model = {name: value + step for name, value in model.items()}
        fl.send(model, weight=5)
    return seen


@pytest.mark.parametrize("encoding", ["raw", "int8", "nf4"])
def test_a_site_sends_no_larger_update_than_its_own_settings_allow(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, encoding: str
) -> None:
    caplog.set_level(logging.INFO, logger="fedcore.client")
    settings = {"run": {"name": "clipped", "rounds": 3}, "transfer": {"update": encoding}}
    with local_run(tmp_path, settings=settings, clip=CLIP) as local:
        seen = script(np.float32(0.01))
        assert local.result().ok
    models = [*seen, load_file(local.folder / "final/model.safetensors")["w"]]
    changes = [
        float(np.linalg.norm(after.astype(np.float64) - before))
        for before, after in itertools.pairwise(models)
    ]
    moved = [change for change in changes if change > 0]
    assert len(moved) == 3
    assert all(0.9 * CLIP < change <= CLIP * (1 + 1e-6) for change in moved)
    said = [text for text in caplog.messages if "it was scaled" in text]
    assert len(said) == 3
    assert sum("at most 0.75 (FEDCORE_CLIP)" in text for text in caplog.messages) == 1


def test_an_update_within_the_bound_leaves_as_it_is(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="fedcore.client")
    with local_run(tmp_path, clip=CLIP) as local:
        script(np.float32(0.001))
        assert local.result().ok
    final = load_file(local.folder / "final/model.safetensors")["w"]
    want = np.linspace(-1, 1, COUNT, dtype=np.float32)
    for _ in range(2):
        want = want + np.float32(0.001)
    assert np.abs(final - want).max() <= 2**-23
    assert not [text for text in caplog.messages if "it was scaled" in text]


def test_an_update_with_nan_does_not_leave_a_site_with_a_bound(tmp_path: Path) -> None:
    with (
        pytest.raises(NonFiniteError, match="tensor 'w', element 0"),
        local_run(tmp_path, clip=CLIP),
    ):
        script(np.float32("nan"))


@pytest.mark.parametrize("text", ["0", "-1", "nan", "inf", "a lot"])
def test_a_bound_that_is_no_positive_number_ends_the_script(text: str) -> None:
    environ = {
        "FEDCORE_SERVER": "tcp://127.0.0.1:1",
        "FEDCORE_SITE": "north",
        "FEDCORE_INSECURE": "1",
        "FEDCORE_CLIP": text,
    }
    with pytest.raises(ConfigError, match="FEDCORE_CLIP is .*: expected a positive"):
        SiteSettings.from_environment(environ)
    assert SiteSettings.from_environment({**environ, "FEDCORE_CLIP": "0.5"}).clip == 0.5
