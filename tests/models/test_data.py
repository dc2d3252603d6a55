"""The shared data sets: right sizes, made once, the same every time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from udlkernels.models import data


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "udlkernels"


def test_mnist1d_is_generated_then_kept(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = data.mnist1d()
    assert [tuple(t.shape) for t in (*made.train, *made.test)] == [
        *((4000, 40), (4000,), (1000, 40), (1000,))
    ]
    assert made.train[0].dtype == torch.float32 and made.train[1].dtype == torch.int64
    assert torch.cat([made.train[1], made.test[1]]).bincount().tolist() == [500] * 10
    monkeypatch.setattr(data, "_generate_mnist1d", lambda: pytest.fail("generated again"))
    kept = data.mnist1d()
    assert all(map(torch.equal, (*made.train, *made.test), (*kept.train, *kept.test)))


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 half a zip", b"text"], ids=repr)
def test_spoiled_cache_is_made_anew(
    cache: Path, monkeypatch: pytest.MonkeyPatch, content: bytes
) -> None:
    small = {name: torch.ones(2).numpy() for name in ("x", "y", "x_test", "y_test")}
    monkeypatch.setattr(data, "_generate_mnist1d", lambda: small)
    data.mnist1d()
    (path,) = cache.iterdir()
    path.write_bytes(content)
    assert torch.equal(data.mnist1d().train[0], torch.ones(2))
    assert path.read_bytes() != content
