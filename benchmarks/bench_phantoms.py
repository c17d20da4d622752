"""What does a phantom film cost to make, step by step, on one core? (600 in 90 s on two cores: 300 ms a film.)"""

from __future__ import annotations

from io import BytesIO
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cxrfast.phantoms import png
from cxrfast.phantoms.draw import SIGNS, Case, draw_film

CASE = Case((0, 1, 1), (0, 2, 1), 50.0, "M", "PA", frozenset(SIGNS[:2]))
TIME = (2016, 9, 1, 12, 0, 0)


@pytest.fixture(scope="module")
def film() -> np.ndarray:
    """A film of 1024 px whose file, decoded, is the film."""
    pixels = draw_film(CASE)
    for encode in (png.encode_grey, png.encode_rgba):
        assert np.array_equal(np.asarray(Image.open(BytesIO(encode(pixels, TIME))).convert("L")), pixels)
    return pixels


def test_draw(benchmark: Any) -> None:
    assert benchmark(draw_film, CASE).shape == (1024, 1024)


def test_choose_row_filters(benchmark: Any, film: np.ndarray) -> None:
    assert benchmark(png.filter_rows, film).shape == (1024, 1025)


@pytest.mark.parametrize("kind", ["grey", "rgba"])
def test_encode(benchmark: Any, film: np.ndarray, kind: str) -> None:
    encode = png.encode_grey if kind == "grey" else png.encode_rgba
    benchmark.extra_info["nbytes"] = len(benchmark(encode, film, TIME))
