"""cxrfast: prepare and train on NIH ChestX-ray14 at the limit of the hardware.

Importing it loads neither torch nor a compiled part; each public name below is imported when it is first used.
"""

from importlib import import_module
from typing import Any

# Public name -> the module that defines it.
_PUBLIC = {
    "AucCounts": "cxrfast.auc",
    "WeightedBCEWithAUC": "cxrfast.loss",
    "decode": "cxrfast.decode",
    "decode_resize": "cxrfast.decode.native",
}
__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:  # PEP 562
    if name == "__version__":
        return _version()
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("cxrfast")
    except PackageNotFoundError:  # run from a checkout that was never installed
        return "0+unknown"
