"""PngSuite (Willem van Schaik): every valid file gives Pillow's image, every broken one its reason."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import cxrfast
from cxrfast.decode import Code, Status, pillow
from cxrfast.errors import InputError

pytest.importorskip("cxrfast.decode.native", reason="the compiled decoder is not installed")
pytestmark = [
    pytest.mark.films,
    pytest.mark.filterwarnings("ignore:Palette images with Transparency:UserWarning:PIL"),
]

BROKEN = {
    **dict.fromkeys(["xs1n0g01", "xs2n0g01", "xs4n0g01", "xs7n0g01"], (Code.UNSUPPORTED, "not a PNG file", 0)),
    **dict.fromkeys(["xcrn0g04", "xlfn0g04"], (Code.UNSUPPORTED, "not a PNG file", 0)),  # signature's line ends changed
    **dict.fromkeys(["xc1n0g08", "xc9n2c08"], (Code.CORRUPT, "invalid IHDR", 8)),  # colour types 1 and 9
    **dict.fromkeys(["xd0n2c08", "xd3n2c08", "xd9n2c08"], (Code.CORRUPT, "invalid IHDR", 8)),  # depths 0, 3, 99
    "xhdn0g08": (Code.CORRUPT, "CRC-32 mismatch in IHDR", 8),
    "xcsn0g01": (Code.CORRUPT, "CRC-32 mismatch in IDAT", 49),  # Pillow alone lets it pass
    "xdtn0g01": (Code.CORRUPT, "no IDAT chunk", 49),
}


@pytest.fixture
def suite(data: Path) -> list[Path]:
    return sorted((data / "pngsuite").glob("*.png"))


def test_valid_files(suite: list[Path], isa: str) -> None:
    valid = [file for file in suite if not file.name.startswith("x")]
    assert len(valid) == 161
    greys = [pillow.decode(file)[1] for file in valid]
    for file, grey in zip(valid, greys, strict=True):
        assert np.array_equal(cxrfast.decode(file), grey), file.name
    for size in (8, 32, 40, 224):
        decoded = cxrfast.decode_resize(valid, size, threads=1)
        for file, grey, status, image in zip(valid, greys, decoded.statuses, decoded.images, strict=True):
            expected = Image.fromarray(grey).resize((size, size), Image.Resampling.BILINEAR)
            assert status.ok, (file.name, status)
            assert np.array_equal(image, np.asarray(expected)), (file.name, size)


def test_broken_files(suite: list[Path], isa: str) -> None:
    broken = [file for file in suite if file.name.startswith("x")]
    assert {file.stem for file in broken} == BROKEN.keys()
    decoded = cxrfast.decode_resize(broken, 32)
    assert not decoded.images.any()
    for file, status in zip(broken, decoded.statuses, strict=True):
        assert status == Status(*BROKEN[file.stem])
        with pytest.raises(InputError):
            cxrfast.decode(file)


def test_pillow_backend_agrees(suite: list[Path]) -> None:
    """Which files are accepted, and why not, depends on the file, not on the backend."""
    for file in suite:
        ours = cxrfast.decode_resize([file], 8).statuses[0]
        assert pillow.decode(file)[0] == ours, file.name
