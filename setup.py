"""Builds `dynaprune_kernels/_C.abi3.so` where torch and a C++ compiler are there, else a pure-Python package.

Everything that is not about the compiled extension is in pyproject.toml. Environment variables:
DYNAPRUNE_NO_EXT=1 leaves the extension out, CXX names the compiler, MAX_JOBS limits parallel compilation,
DEBUG=1 compiles without optimisation and with debug information.
"""

import json
import os
import shutil
import subprocess
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


def extension_arguments(sources: list[str], flags: list[str]) -> dict[str, Any]:
    """The arguments of `setup` that build the stable-ABI extension."""
    os.environ["CXX"] = cpp_compiler() or "c++"
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
    arguments: dict[str, Any] = {"ext_modules": [extension]}
    if not FREE_THREADED:
        arguments["options"] = {"bdist_wheel": {"py_limited_api": "cp310"}}
    return arguments


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
        "-DTORCH_TARGET_VERSION=0x020a000000000000",
    ]


def build_facts(reason: str | None, flags: list[str]) -> dict[str, Any]:
    """What `python -m dynaprune_kernels.info` tells about this build."""
    if reason is not None:
        return {"extension": False, "reason": reason}
    version = subprocess.run(
        [*os.environ["CXX"].split(), "--version"], capture_output=True, text=True, check=True
    )
    return {
        "extension": True,
        "torch": torch.__version__,
        "compiler": version.stdout.splitlines()[0],
        "flags": flags,
    }


def main() -> None:
    """Decides what can be built here and hands it to setuptools."""
    sources = sorted(
        str(path.relative_to(ROOT))
        for part in ("cpu", "bindings")
        for path in ROOT.glob(f"csrc/{part}/*.cpp")
    )
    flags = compile_flags()
    reason = reason_against_extension(sources)
    arguments = {} if reason else extension_arguments(sources, flags)

    class RecordBuild(build_py):
        """Leaves the facts of this build beside the extension, where `dynaprune_kernels` reads them."""

        def run(self) -> None:
            target = ROOT / "dynaprune_kernels" / "_build.json"
            unfinished = target.with_suffix(".tmp")
            unfinished.write_text(json.dumps(build_facts(reason, flags), indent=2) + "\n")
            unfinished.replace(target)
            super().run()

    commands: dict[str, type] = {"build_py": RecordBuild}
    if reason:
        print(f"dynaprune: installing without the compiled CPU kernels: {reason}")
    else:
        commands["build_ext"] = BuildExtension
    kernels = find_packages(include=["dynaprune_kernels", "dynaprune_kernels.*"])
    training = find_packages("python", include=["dynaprune", "dynaprune.*"])
    setup(packages=kernels + training, cmdclass=commands, **arguments)


main()
