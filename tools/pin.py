"""Versions of packages for the Makefile, one a line.

    python tools/pin.py > constraints.txt     what is installed in this environment
    python tools/pin.py oldest                the oldest that pyproject.toml allows, each with its later repairs

Packages whose pinned version has left Python 3.10 behind get a second pin for it, the last version that had not. torch
is not among the oldest: its wheels of other versions are gigabytes.
"""

from __future__ import annotations

import re
import sys
from importlib.metadata import distributions, requires

# Asked of `pip install --dry-run --python-version 3.10`; to be renewed when a pin above is.
FOR_PYTHON_3_10 = {
    "contourpy": "1.3.2",
    "filelock": "4.1.0",
    "fonttools": "4.65.0",
    "hypothesis": "6.168.5",
    "imagecodecs": "2025.3.30",
    "matplotlib": "3.10.9",
    "networkx": "3.4.2",
    "numpy": "2.2.6",
    "pandas": "2.3.3",
    "pandas-stubs": "2.3.3.260113",
    "pillow": "12.3.0",
    "pycparser": "3.11",
    "python-dateutil": "3.0.0",
    "scikit-learn": "1.7.2",
    "scipy": "1.15.3",
}


def oldest() -> list[str]:
    """``name==X.Y.*`` for each ``name>=X.Y`` that cxrfast and its tests require."""
    allowed = (re.fullmatch(r'([\w-]+)>=([\d.]+)(; extra == "test")?', line) for line in requires("cxrfast") or ())
    return [f"{found[1]}=={found[2]}.*" for found in allowed if found and found[1] != "torch"]


def pins() -> list[str]:
    """A line a package, sorted; two for those that need another version on Python 3.10."""
    lines = ["# Every version, for the Makefile's installations. Written by tools/pin.py."]
    for distribution in sorted(distributions(), key=lambda found: found.name.lower()):
        name, pin = distribution.name.lower().replace("_", "-"), distribution.version.split("+")[0]
        if name == "cxrfast":
            continue
        if ">=3.11" in str(distribution.metadata.json.get("requires_python", "")):
            lines.append(f'{name}=={pin}; python_version >= "3.11"')
            if name in FOR_PYTHON_3_10:
                lines.append(f'{name}=={FOR_PYTHON_3_10[name]}; python_version < "3.11"')
        else:
            lines.append(f"{name}=={pin}")
    return lines


if __name__ == "__main__":
    print("\n".join(oldest() if sys.argv[1:] == ["oldest"] else pins()))
