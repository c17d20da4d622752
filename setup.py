"""The compiled parts. Everything else about the package is in pyproject.toml.

Each part is optional: where one cannot be built, the package installs without it, runs on the slower path that stands in
for it, and `cxrfast-doctor` says what is missing. CXRFAST_REQUIRE_BUILD=1 (CI) makes a failed build an error, and
CXRFAST_WERROR=1 its warnings too.
"""

from __future__ import annotations

import glob
import os
import sys

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

WARNINGS = ["-Wall", "-Wextra", "-Wpedantic", "-Wshadow"]
if os.environ.get("CXRFAST_WERROR") == "1":
    WARNINGS.append("-Werror")


class OptionalBuild(build_ext):
    """Builds what can be built and says in one line what could not."""

    def build_extension(self, ext: Extension) -> None:
        try:
            super().build_extension(ext)
        except Exception as error:
            if os.environ.get("CXRFAST_REQUIRE_BUILD") == "1":
                raise
            print(f"warning: {ext.name} was not built ({error}); its fallback will be used", file=sys.stderr)


def png_extension() -> Extension:
    """cxrfast._png: the decoder of csrc/png with its Python binding."""
    sources = sorted(glob.glob("csrc/png/*.cpp"))
    return Extension(
        "cxrfast._png",
        sources,
        include_dirs=["csrc"],
        depends=sorted(glob.glob("csrc/png/*.h")),
        language="c++",
        # pybind11 as a system header: our warnings are not for it
        extra_compile_args=[
            *("-isystem", pybind11.get_include(), "-std=c++20", "-O3", "-fvisibility=hidden", "-pthread"),
            *WARNINGS,
        ],
        extra_link_args=["-pthread"],
    )


setup(
    ext_modules=[png_extension()] if glob.glob("csrc/png/bind.cpp") else [],
    cmdclass={"build_ext": OptionalBuild},
)
