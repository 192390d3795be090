"""Builds `dynaprune_kernels/_C.abi3.so` where torch and a C++ compiler are there, else a pure-Python package.

Everything that is not about the compiled extension is in pyproject.toml. Environment variables:
DYNAPRUNE_NO_EXT=1 leaves the extension out, CXX names the compiler, MAX_JOBS limits parallel compilation,
DEBUG=1 compiles without optimisation and with debug information.
"""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

from packaging.version import Version
from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
OLDEST_TORCH = Version("2.10")  # the first whose stable C interface has all that csrc/bindings uses
FREE_THREADED = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))  # CPython has no limited API there

try:
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    torch = None


def cpp_compiler() -> str | None:
    """The C++ compiler's command: $CXX if set, else the first of c++, g++ and clang++ on the PATH."""
    candidates = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    return next((command for command in candidates if shutil.which(command.split()[0])), None)


def reason_against_extension(sources: list[str]) -> str | None:
    """Why the extension cannot or shall not be built here; None where it is built."""
    if os.environ.get("DYNAPRUNE_NO_EXT", "0") not in ("", "0"):
        return "DYNAPRUNE_NO_EXT was set during the installation"
    if torch is None:
        return (
            "torch could not be imported during the installation; install torch, setuptools and ninja first, "
            "then run `pip install --no-build-isolation .`"
        )
    if Version(torch.__version__) < OLDEST_TORCH:
        return f"the torch found during the installation is {torch.__version__}, older than {OLDEST_TORCH}"
    if cpp_compiler() is None:
        wanted = os.environ.get("CXX") or "c++, g++ or clang++"
        return f"no C++ compiler was found during the installation (looked for {wanted}; CXX names another)"
    if not sources:
        return "the source tree has no csrc/*.cpp"
    return None


def compile_flags() -> list[str]:
    """Compiler flags: no -march and no -ffast-math, the kernels choose their instruction set at run time."""
    optimisation = ["-O0", "-g"] if os.environ.get("DEBUG", "0") not in ("", "0") else ["-O3", "-g0"]
    return [
        "-std=c++17",
        *optimisation,
        "-fvisibility=hidden",
        "-fvisibility-inlines-hidden",
        "-Wall",
        "-Wno-psabi",
        "-Wno-unused-function",
        "-DTORCH_TARGET_VERSION=0x020a000000000000",
    ]


def record(folder: Path, facts: dict[str, Any]) -> None:
    """Leaves what `python -m dynaprune_kernels.info` tells about this build beside the extension."""
    target = folder / "dynaprune_kernels" / "_build.json"
    unfinished = target.with_suffix(".tmp")
    unfinished.write_text(json.dumps(facts, indent=2) + "\n")
    unfinished.replace(target)


def pure_arguments(reason: str) -> dict[str, Any]:
    """The arguments of `setup` for a package without the extension, which remembers why."""

    class BuildPure(build_py):
        def run(self) -> None:
            super().run()
            record(
                ROOT if self.editable_mode else Path(self.build_lib), {"extension": False, "reason": reason}
            )

    print(f"dynaprune: installing without the compiled CPU kernels: {reason}")
    return {"cmdclass": {"build_py": BuildPure}}


def extension_arguments(sources: list[str]) -> dict[str, Any]:
    """The arguments of `setup` for a package with the extension, which remembers how it was built."""
    compiler = cpp_compiler() or "c++"
    os.environ["CXX"] = compiler
    flags = compile_flags()
    headers = [
        str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/**/*") if path.suffix in (".h", ".inc")
    ]
    extension = CppExtension(
        "dynaprune_kernels._C",
        sources,
        include_dirs=[str(ROOT / "csrc")],
        depends=headers,
        extra_compile_args={"cxx": flags},
        py_limited_api=not FREE_THREADED,  # torch then adds -DPy_LIMITED_API=0x030A0000
    )

    class BuildRecorded(BuildExtension):
        def run(self) -> None:
            try:
                super().run()
            except Exception:
                print(
                    "dynaprune: DYNAPRUNE_NO_EXT=1 installs without the compiled CPU kernels", file=sys.stderr
                )
                raise
            version = subprocess.run(
                [*compiler.split(), "--version"], capture_output=True, text=True, check=True
            )
            facts = {"torch": torch.__version__, "compiler": version.stdout.splitlines()[0], "flags": flags}
            in_place = self.inplace or self.editable_mode
            record(ROOT if in_place else Path(self.build_lib), {"extension": True, **facts})

    tag = {} if FREE_THREADED else {"bdist_wheel": {"py_limited_api": "cp310"}}
    return {"ext_modules": [extension], "cmdclass": {"build_ext": BuildRecorded}, "options": tag}


def main() -> None:
    """Decides what can be built here and hands it to setuptools."""
    folders = ("csrc/cpu", "csrc/bindings")
    sources = sorted(
        str(path.relative_to(ROOT)) for folder in folders for path in (ROOT / folder).glob("*.cpp")
    )
    reason = reason_against_extension(sources)
    arguments = extension_arguments(sources) if reason is None else pure_arguments(reason)
    kernels = find_packages(include=["dynaprune_kernels", "dynaprune_kernels.*"])
    training = find_packages("python", include=["dynaprune", "dynaprune.*"])
    setup(packages=kernels + training, **arguments)


main()
