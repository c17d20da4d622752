"""The compiled parts. Everything else about the package is in pyproject.toml.

Each part is optional: where one cannot be built, the package installs without it, runs on the slower path that stands
in for it, and `cxrfast-doctor` says what is missing. CXRFAST_REQUIRE_BUILD=1 (CI) makes a failed build an error, and
CXRFAST_WERROR=1 its warnings too.
"""

from __future__ import annotations

import glob
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

WARNINGS = ["-Wall", "-Wextra", "-Wpedantic", "-Wshadow"]
if os.environ.get("CXRFAST_WERROR") == "1":
    WARNINGS.append("-Werror")


STABLE_ABI = "0x020a000000000000"  # torch 2.10: major, minor in the first two bytes

# Plain shared libraries, loaded by torch or DALI and not by Python: no Python version in their names.
PLAIN = {name: f"{name}.so" for name in ("_block", "_block_cuda", "_loss", "_loss_cuda", "_dali_operator")}


class OptionalBuild(build_ext):
    """Builds what can be built and says in one line what could not."""

    def get_ext_filename(self, fullname: str) -> str:
        *package, name = fullname.split(".")
        return os.path.join(*package, PLAIN[name]) if name in PLAIN else super().get_ext_filename(fullname)

    def run(self) -> None:
        note = Path(self.build_lib, "cxrfast", "_dali_build.json")
        if not note.is_file() or json.loads(note.read_text())["dali"] != dali_build["dali"]:
            note.with_name(PLAIN["_dali_operator"]).unlink(missing_ok=True)  # its sources do not change with DALI
        super().run()
        # what cxrfast-doctor says of the operator, and the DALI that it fits
        for folder in (note.parent, Path("cxrfast")) if self.inplace else (note.parent,):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / note.name).write_text(json.dumps(dali_build))

    def build_extension(self, ext: Extension) -> None:
        try:
            if ext.name.endswith("_cuda"):
                self.build_with_nvcc(ext)
            else:
                super().build_extension(ext)
        except Exception as error:
            if os.environ.get("CXRFAST_REQUIRE_BUILD") == "1":
                raise
            if ext.name == "cxrfast._dali_operator":
                dali_build["reason"] = str(error)
            print(f"warning: {ext.name} was not built ({error}); its fallback will be used", file=sys.stderr)

    def build_with_nvcc(self, ext: Extension) -> None:
        """One nvcc command from sources to shared library; setuptools has no notion of CUDA."""
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        libraries = [f"-l{library}" for library in ext.libraries]
        folders = [f"-L{folder}" for folder in ext.library_dirs]
        self.spawn(["nvcc", "-shared", *ext.extra_compile_args, *ext.sources, "-o", str(target), *folders, *libraries])


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

    On torch's stable ABI and Python's: the library knows neither Python's version nor torch's (>= 2.10). It is a module
    of Python too (bce_auc_direct.cpp). So that every CPU and CUDA give the same bits, multiplications and additions are
    not fused (-ffp-contract=off).
    """
    torch = folder_of("torch")
    if torch is None:
        print("warning: no torch where the package is built; the plain torch loss will be used", file=sys.stderr)
        return None
    return Extension(
        "cxrfast._loss",
        sorted(glob.glob("csrc/loss/*.cpp")),
        depends=sorted(glob.glob("csrc/*.h") + glob.glob("csrc/loss/*.h")),
        language="c++",
        extra_compile_args=[
            *("-isystem", str(torch / "include"), f"-DTORCH_TARGET_VERSION={STABLE_ABI}", "-std=c++20", "-O3"),
            *("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden", *WARNINGS),
        ],
        library_dirs=[str(torch / "lib")],
        libraries=["torch_cpu"],
    )


def block_extension() -> Extension | None:
    """cxrfast/_block.so: a block of the network on the CPU (csrc/block), on torch's stable ABI like the loss."""
    torch = folder_of("torch")
    if torch is None:
        return None
    return Extension(
        "cxrfast._block",
        sorted(glob.glob("csrc/block/*.cpp")),
        depends=sorted(glob.glob("csrc/*.h") + glob.glob("csrc/block/*.h")),
        language="c++",
        extra_compile_args=[
            *("-isystem", str(torch / "include"), f"-DTORCH_TARGET_VERSION={STABLE_ABI}", "-std=c++20", "-O3"),
            *("-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden", *WARNINGS),
        ],
        library_dirs=[str(torch / "lib")],
        libraries=["torch_cpu"],
    )


def cuda_extensions() -> list[Extension]:
    """cxrfast/_loss_cuda.so and cxrfast/_block_cuda.so: the same on CUDA. None without nvcc, or without a torch for
    nvcc's own CUDA."""
    torch, nvcc = folder_of("torch"), shutil.which("nvcc")
    if torch is None or nvcc is None or not (torch / "lib" / "libtorch_cuda.so").exists():
        return []
    reported = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    ours = re.search(r"release (\d+)", reported)
    theirs = re.search(r"^cuda\b.*= '(\d+)", (torch / "version.py").read_text(), re.MULTILINE)
    if ours is None or theirs is None or ours[1] != theirs[1]:
        print(
            "warning: nvcc and torch are of different CUDA versions; plain torch will be used on GPUs",
            file=sys.stderr,
        )
        return []
    parts = {
        "cxrfast._loss_cuda": ("csrc/loss/bce_auc_cuda.cu", ["-fmad=false"]),  # the CPU's bits
        "cxrfast._block_cuda": ("csrc/block/block_cuda.cu", []),
    }
    return [
        Extension(
            name,
            [source],
            depends=sorted(glob.glob("csrc/*.h") + glob.glob(f"{Path(source).parent}/*.*h")),
            extra_compile_args=[
                *("-isystem", str(torch / "include"), f"-DTORCH_TARGET_VERSION={STABLE_ABI}", "-DUSE_CUDA"),
                *("-std=c++20", "-O3", *flags, "-Xcompiler=-fPIC,-fvisibility=hidden"),
                # from the T4 on; later cards compile the last one's PTX when it is first used
                *(f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in (75, 80, 90)),
                "-gencode=arch=compute_90,code=compute_90",
            ],
            library_dirs=[str(torch / "lib")],
            libraries=["torch_cpu", "torch_cuda"],
        )
        for name, (source, flags) in parts.items()
    ]


def dali_operator() -> Extension | None:
    """cxrfast/_dali_operator.so: the decoder as DALI operators, csrc/dali with a csrc/png of its own.

    None where DALI or the CUDA headers are absent; the reason is noted for cxrfast-doctor.
    """
    dali, cuda = folder_of("nvidia.dali"), cuda_headers()
    if dali is None or cuda is None:
        dali_build["reason"] = (
            "NVIDIA DALI was not there when cxrfast was built"
            if dali is None
            else "no CUDA headers: neither a toolkit nor the packages " + ", ".join(CUDA_HEADER_PACKAGES)
        )
        if os.environ.get("CXRFAST_REQUIRE_BUILD") == "1":
            raise SystemExit(f"the DALI operator cannot be built: {dali_build['reason']}")
        return None
    dali_build["dali"] = dali_version()
    headers = [flag for folder in (dali / "include", *cuda) for flag in ("-isystem", str(folder))]
    return Extension(
        "cxrfast._dali_operator",
        sorted({*glob.glob("csrc/png/*.cpp"), *glob.glob("csrc/dali/*.cpp")} - {"csrc/png/bind.cpp"}),
        include_dirs=["csrc"],
        depends=sorted(glob.glob("csrc/png/*.h")),
        language="c++",
        extra_compile_args=[
            *(*headers, "-std=c++20", "-O3", "-fvisibility=hidden", "-pthread", *WARNINGS),
            "-Wno-free-nonheap-object",  # a false alarm inside DALI's headers, raised where they are inlined
        ],
        extra_link_args=["-pthread"],
        library_dirs=[str(dali)],
        libraries=["dali"],
    )


CUDA_HEADER_PACKAGES = ("nvidia-cuda-runtime-cu12", "nvidia-cuda-nvcc-cu12", "nvidia-cuda-cccl-cu12")


def cuda_headers() -> list[Path] | None:
    """The folders of the CUDA headers: the toolkit's, or those of the three packages."""
    toolkits = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    for toolkit in toolkits:
        if toolkit and Path(toolkit, "include", "cuda_runtime_api.h").is_file():
            return [Path(toolkit, "include")]
    spec = importlib.util.find_spec("nvidia")
    for root in spec.submodule_search_locations or () if spec is not None else ():
        folders = [Path(root, name, "include") for name in ("cuda_runtime", "cuda_nvcc", "cuda_cccl")]
        if all(folder.is_dir() for folder in folders):
            return folders
    return None


def folder_of(package: str) -> Path | None:
    """Where a package is installed, found without importing it."""
    try:
        spec = importlib.util.find_spec(package)
    except ModuleNotFoundError:  # its parent is not there
        return None
    return Path(spec.origin).parent if spec is not None and spec.origin else None


def dali_version() -> str:
    """The installed DALI's version, under whichever CUDA's name it was published."""
    for cuda in ("130", "120", "110"):
        try:
            return version(f"nvidia-dali-cuda{cuda}")
        except PackageNotFoundError:
            continue
    return ""


dali_build = {"dali": "", "reason": ""}
extensions = [png_extension(), block_extension(), loss_extension(), *cuda_extensions(), dali_operator()]
setup(
    ext_modules=[extension for extension in extensions if extension is not None],
    cmdclass={"build_ext": OptionalBuild},
)
