"""Patches are applied wherever they lie among the pieces that a file is copied in."""

import io
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bnguard.checkpoint import storage
from bnguard.checkpoint.storage import Patch, Source

PATH = Path("file")


@given(st.data())
def test_patches_across_pieces(data):
    content = bytes(range(200))
    start = data.draw(st.integers(0, 50))
    source = Source(PATH, io.BytesIO(content), start, data.draw(st.integers(1, 150)))
    edges = sorted(data.draw(st.sets(st.integers(start, start + source.size), max_size=8)))
    pairs = zip(edges[::2], edges[1::2], strict=False)
    patches = [Patch(PATH, low, b"\xff" * (high - low)) for low, high in pairs]
    expected = bytearray(content)
    for patch in patches:
        expected[patch.position : patch.position + len(patch.data)] = patch.data
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(storage, "CHUNK_BYTES", data.draw(st.integers(1, 60)))
        pieces = list(source.patched(reversed(patches)))
    assert b"".join(pieces) == bytes(expected[start : start + source.size])
