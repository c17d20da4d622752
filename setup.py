"""The compiled parts. Everything else about the package is in pyproject.toml.

Each part is optional: where one cannot be built, the package installs without it, runs on the slower path that stands
in for it, and `cxrfast-doctor` says what is missing. CXRFAST_REQUIRE_BUILD=1 (CI) makes a failed build an error, and
CXRFAST_WERROR=1 its warnings too.
"""

from __future__ import annotations

import glob
import importlib.util
import os
import sys
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

WARNINGS = ["-Wall", "-Wextra", "-Wpedantic", "-Wshadow"]
if os.environ.get("CXRFAST_WERROR") == "1":
    WARNINGS.append("-Werror")


STABLE_ABI = "0x020a000000000000"  # torch 2.10: major, minor in the first two bytes

# Plain shared libraries, loaded by torch and not by Python: no Python version in their names.
PLAIN = {"_loss": "_loss.so", "_loss_cuda": "_loss_cuda.so"}


class OptionalBuild(build_ext):
    """Builds what can be built and says in one line what could not."""

    def get_ext_filename(self, fullname: str) -> str:
        *package, name = fullname.split(".")
        return os.path.join(*package, PLAIN[name]) if name in PLAIN else super().get_ext_filename(fullname)

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


def loss_extension() -> Extension | None:
    """cxrfast/_loss.so: the fused loss of csrc/loss on the CPU, for torch.ops.load_library. None without torch.

    On torch's stable ABI: the library knows neither Python's version nor torch's (>= 2.10). So that every CPU and CUDA
    give the same bits, multiplications and additions are not fused (-ffp-contract=off).
    """
    torch = torch_folder()
    if torch is None:
        print("warning: no torch where the package is built; the plain torch loss will be used", file=sys.stderr)
        return None
    return Extension(
        "cxrfast._loss",
        sorted(glob.glob("csrc/loss/*.cpp")),
        depends=sorted(glob.glob("csrc/loss/*.h")),
        language="c++",
        extra_compile_args=[
            *("-isystem", str(torch / "include"), f"-DTORCH_TARGET_VERSION={STABLE_ABI}", "-std=c++20", "-O3"),
            *("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden", *WARNINGS),
        ],
        library_dirs=[str(torch / "lib")],
        libraries=["torch_cpu"],
    )


def torch_folder() -> Path | None:
    """Where torch is installed, found without importing it."""
    spec = importlib.util.find_spec("torch")
    return Path(spec.origin).parent if spec is not None and spec.origin else None


extensions = [png_extension(), loss_extension()]
setup(
    ext_modules=[extension for extension in extensions if extension is not None],
    cmdclass={"build_ext": OptionalBuild},
)
