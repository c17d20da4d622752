"""cxrfast: prepare and train on NIH ChestX-ray14 at the limit of the hardware."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("cxrfast")
except PackageNotFoundError:  # run from a checkout that was never installed
    __version__ = "0+unknown"
