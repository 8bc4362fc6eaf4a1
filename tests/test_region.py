"""Making, joining and leaving a region."""

import pyshare


def test_create_and_close() -> None:
    with pyshare.create(size=10_000) as region:
        assert len(region) == region.size == 10_000
        region.buf[9_999] = 7
        assert region.read(9_999, 1) == b"\x07"
    assert region.closed
