"""Builds `dynaprune_kernels/_C.abi3.so` where torch and a C++ compiler are there, else a pure-Python package;
with nvcc also `_C_cuda.abi3.so`.

Everything that is not about the compiled extensions is in pyproject.toml. Environment variables:
DYNAPRUNE_NO_EXT=1 leaves both extensions out, CXX names the compiler, MAX_JOBS limits parallel compilation,
DEBUG=1 compiles without optimisation and with debug information. The CUDA part needs no GPU. It is built
for a torch with CUDA. DYNAPRUNE_NO_CUDA=1 leaves it out; FORCE_CUDA=1 builds it for any torch and makes it
an error that it cannot be built; CUDA_HOME names the toolkit, TORCH_CUDA_ARCH_LIST the architectures
("8.0;9.0a").
"""

import concurrent.futures
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any, NamedTuple

from packaging.version import Version
from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
OLDEST_TORCH = Version("2.10")  # the first whose stable C interface has all that csrc/bindings uses
OLDEST_NVCC = Version("12.0")  # the first that knows sm_90a
ARCHITECTURES = "8.0;9.0a"
FREE_THREADED = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))  # CPython has no limited API there

try:
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    torch = None


class Toolkit(NamedTuple):
    """A CUDA toolkit: its compiler with its version, and what an extension is compiled and linked with."""

    nvcc: str
    version: Version
    include: Path
    libraries: Path


def wanted(variable: str) -> bool:
    """Whether an environment variable is set to something other than 0."""
    return os.environ.get(variable, "0") not in ("", "0")


def cpp_compiler() -> str | None:
    """The C++ compiler's command: $CXX if set, else the first of c++, g++ and clang++ on the PATH."""
    candidates = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    return next((command for command in candidates if shutil.which(command.split()[0])), None)


def sources_of(*patterns: str) -> list[str]:
    """Files of csrc by pattern, as paths below the root."""
    return sorted(
        str(path.relative_to(ROOT)) for pattern in patterns for path in ROOT.glob(f"csrc/{pattern}")
    )


def reason_against_extension(sources: list[str]) -> str | None:
    """Why the extension cannot or shall not be built here; None where it is built."""
    if wanted("DYNAPRUNE_NO_EXT"):
        return "DYNAPRUNE_NO_EXT was set during the installation"
    if torch is None:
        return (
            "torch could not be imported during the installation; install torch, setuptools and ninja first, "
            "then run `pip install --no-build-isolation .`"
        )
    if Version(torch.__version__) < OLDEST_TORCH:
        return f"the torch found during the installation is {torch.__version__}, older than {OLDEST_TORCH}"
    if cpp_compiler() is None:
        looked_for = os.environ.get("CXX") or "c++, g++ or clang++"
        return (
            f"no C++ compiler was found during the installation (looked for {looked_for}; CXX names another)"
        )
    if not sources:
        return "the source tree has no csrc/*.cpp"
    return None


def said_by(*command: str) -> str:
    """What a command prints."""
    finished = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True
    )
    return finished.stdout


def cuda_toolkit() -> Toolkit | str:
    """The toolkit to build the CUDA part with, or why it cannot or shall not be built here."""
    if wanted("DYNAPRUNE_NO_CUDA"):
        return "DYNAPRUNE_NO_CUDA was set during the installation"
    if torch.version.cuda is None and not wanted("FORCE_CUDA"):
        return "the torch found during the installation has no CUDA (FORCE_CUDA=1 builds them all the same)"
    if not sources_of("core/launch/*.cu"):
        return "the source tree has no csrc/core/launch/*.cu"
    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    places = [f"{named}/bin/nvcc"] if named else ["nvcc", "/usr/local/cuda/bin/nvcc"]
    nvcc = next((path for path in map(shutil.which, places) if path), None)
    if nvcc is None:
        looked_for = " and ".join(places)
        return (
            f"no nvcc was found during the installation (looked for {looked_for}; CUDA_HOME names a toolkit)"
        )
    try:
        version = Version(said_by(nvcc, "--version").partition("release ")[2].partition(",")[0])
        # An nvcc on the PATH may be a script: the one that it calls knows its toolkit.
        steps = said_by(nvcc, "--dryrun", "-c", "-x", "cu", os.devnull)
        home = Path(steps.partition("TOP=")[2].partition("\n")[0].strip()).resolve()
    except (OSError, ValueError, subprocess.CalledProcessError) as error:
        return f"{nvcc} does not tell what it is: {error}"
    if version < OLDEST_NVCC:
        return f"the nvcc found during the installation is {version}, older than {OLDEST_NVCC}"
    folders = [home / name for name in ("lib64", "lib", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib")]
    libraries = next((folder for folder in folders if (folder / "libcudart_static.a").is_file()), None)
    if libraries is None:
        return f"the toolkit in {home} has no libcudart_static.a"
    return Toolkit(nvcc, version, home / "include", libraries)


def cuda_architectures() -> list[str]:
    """What to compile for, from TORCH_CUDA_ARCH_LIST: numbers from 8.0 on, 9.0 always as 9.0a.

    Raises:
        SystemExit: a name instead of a number, or nothing from 8.0 on.
    """
    listed = (os.environ.get("TORCH_CUDA_ARCH_LIST") or ARCHITECTURES).replace(";", " ").split()
    chosen = []
    for entry in listed:
        number, plus, kind = entry.partition("+")
        major, _, minor = number.removesuffix("a").partition(".")
        if not (major.isdigit() and minor.isdigit()) or (plus and kind != "PTX"):
            raise SystemExit(
                f'expected TORCH_CUDA_ARCH_LIST like "{ARCHITECTURES}" or "8.0 9.0+PTX", got {entry!r}'
            )
        if int(major) < 8:
            print(f"dynaprune: compute capability {entry} is left out, the kernels need 8.0")
            continue
        chosen.append(("9.0a" if number == "9.0" else number) + ("+PTX" if plus else ""))
    if not chosen:
        raise SystemExit(f"expected an architecture from 8.0 on in TORCH_CUDA_ARCH_LIST, got {listed}")
    return list(dict.fromkeys(chosen))


def debugging() -> bool:
    """Whether DEBUG=1 asks for a build without optimisation."""
    return wanted("DEBUG")


def compile_flags() -> list[str]:
    """Compiler flags: no -march and no -ffast-math, the kernels choose their instruction set at run time."""
    return [
        "-std=c++17",
        *(["-O0", "-g"] if debugging() else ["-O3", "-g0"]),
        "-fvisibility=hidden",
        "-fvisibility-inlines-hidden",
        "-Wall",
        "-Wno-psabi",
        "-Wno-unused-function",
        "-DTORCH_TARGET_VERSION=0x020a000000000000",
    ]


def nvcc_flags(source: str, architectures: list[str]) -> list[str]:
    """Flags for one .cu file; `*_sm90.cu` is compiled for 9.0a alone, the others for every architecture."""
    flags = ["-std=c++17", *(["-O0", "-g"] if debugging() else ["-O3"]), "-Icsrc"]
    flags += ["-Xcompiler=-fPIC,-fvisibility=hidden", "-Xptxas=--warn-on-spills"]
    if any(entry.startswith("9.0a") for entry in architectures):
        flags.append("-DDYNAPRUNE_SM90A")
    if wanted("DYNAPRUNE_WATCHDOG"):  # core/ptx/watchdog_sm90.h
        flags.append("-DDYNAPRUNE_WATCHDOG")
    for entry in architectures:
        number = entry.removesuffix("+PTX").replace(".", "")
        if number == "90a" or not source.endswith("_sm90.cu"):
            flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if entry.endswith("+PTX") and not source.endswith("_sm90.cu"):
            portable = number.removesuffix("a")
            flags.append(f"-gencode=arch=compute_{portable},code=compute_{portable}")
    return flags


def compile_cuda(toolkit: Toolkit, architectures: list[str], folder: Path) -> list[str]:
    """Compiles every csrc/core/launch/*.cu that is newer than its object in `folder`; returns the objects."""
    sources = sources_of("core/launch/*.cu")
    if not any(entry.startswith("9.0a") for entry in architectures):
        sources = [source for source in sources if not source.endswith("_sm90.cu")]
    folder.mkdir(parents=True, exist_ok=True)
    headers = max((ROOT / header).stat().st_mtime for header in sources_of("*.h", "core/**/*.h"))
    host_compiler = next(word for word in os.environ["CXX"].split() if not word.endswith("ccache"))

    def compiled(source: str) -> str:
        target = folder / Path(source).with_suffix(".o").name
        command = [toolkit.nvcc, "-ccbin", host_compiler, *nvcc_flags(source, architectures)]
        command += ["-c", source, "-o", str(target)]
        made_by = target.with_suffix(".command")
        newest = max(headers, (ROOT / source).stat().st_mtime)
        fresh = target.is_file() and target.stat().st_mtime > newest
        if not (fresh and made_by.is_file() and made_by.read_text() == " ".join(command)):
            print(f"nvcc {source}", flush=True)
            made_by.unlink(missing_ok=True)
            subprocess.run(command, cwd=ROOT, check=True)
            made_by.write_text(" ".join(command))
        return str(target)

    with concurrent.futures.ThreadPoolExecutor(
        int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
    ) as pool:
        return list(pool.map(compiled, sources))


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


def extension(name: str, sources: list[str], headers: list[str], **options: Any) -> Any:
    """An extension on torch's stable interface."""
    return CppExtension(
        f"dynaprune_kernels.{name}",
        sources,
        include_dirs=[str(ROOT / "csrc"), *options.pop("include_dirs", [])],
        depends=headers,
        py_limited_api=not FREE_THREADED,  # torch then adds -DPy_LIMITED_API=0x030A0000
        **options,
    )


def cuda_extension(toolkit: Toolkit, architectures: list[str]) -> Any:
    """The CUDA part. libcudart is linked statically, so that it loads where no driver is.

    libtorch is kept among what it needs although no symbol is taken from it: through it a torch with CUDA has
    what bindings/cuda_common.h declares weakly.
    """
    return extension(
        "_C_cuda",
        sources_of("bindings/cuda_*.cpp"),
        sources_of("*.h", "bindings/checks.h", "bindings/cuda_*.h", "core/**/*.[hc]*"),
        include_dirs=[str(toolkit.include)],
        define_macros=[("DYNAPRUNE_CUDA_ARCHITECTURES", f'"{" ".join(architectures)}"')],
        extra_compile_args={"cxx": compile_flags()},
        extra_link_args=[
            *("-Wl,--no-as-needed", "-ltorch", "-Wl,--as-needed"),
            str(toolkit.libraries / "libcudart_static.a"),
            "-Wl,--exclude-libs,ALL",
            *("-ldl", "-lpthread", "-lrt"),
        ],
    )


def extension_arguments(sources: list[str], toolkit: Toolkit | str) -> dict[str, Any]:
    """The arguments of `setup` for a package with the extension, which remembers how it was built.

    Args:
        toolkit: for the CUDA part, or why there is none.
    """
    compiler = cpp_compiler() or "c++"
    os.environ["CXX"] = compiler
    flags = compile_flags()
    cpu_headers = sources_of("*.h", "cpu/*.h", "bindings/*.h")
    extensions = [extension("_C", sources, cpu_headers, extra_compile_args={"cxx": flags})]
    if isinstance(toolkit, str):
        print(f"dynaprune: installing without the CUDA kernels: {toolkit}")
        cuda_facts: dict[str, Any] = {"extension": False, "reason": toolkit}
    else:
        architectures = cuda_architectures()
        extensions.append(cuda_extension(toolkit, architectures))
        cuda_facts = {
            "extension": True,
            "compiler": f"nvcc {toolkit.version}",
            "architectures": architectures,
            "flags": nvcc_flags("", architectures),
        }

    class BuildRecorded(BuildExtension):
        def build_extension(self, ext: Any) -> None:
            if ext.name.endswith("._C_cuda"):
                assert isinstance(toolkit, Toolkit)
                ext.extra_objects = compile_cuda(
                    toolkit, architectures, Path(self.build_temp).resolve() / "cuda"
                )
                ext.depends = [*ext.depends, *ext.extra_objects]
            super().build_extension(ext)

        def run(self) -> None:
            try:
                super().run()
            except Exception:
                print(
                    "dynaprune: DYNAPRUNE_NO_CUDA=1 installs without the CUDA kernels, "
                    "DYNAPRUNE_NO_EXT=1 without any compiled ones",
                    file=sys.stderr,
                )
                raise
            version = said_by(*compiler.split(), "--version").splitlines()[0]
            facts = {"torch": torch.__version__, "compiler": version, "flags": flags}
            in_place = self.inplace or self.editable_mode
            record(
                ROOT if in_place else Path(self.build_lib), {"extension": True, **facts, "cuda": cuda_facts}
            )

    tag = {} if FREE_THREADED else {"bdist_wheel": {"py_limited_api": "cp310"}}
    return {"ext_modules": extensions, "cmdclass": {"build_ext": BuildRecorded}, "options": tag}


def main() -> None:
    """Decides what can be built here and hands it to setuptools."""
    sources = [name for name in sources_of("cpu/*.cpp", "bindings/*.cpp") if "/cuda_" not in name]
    reason = reason_against_extension(sources)
    toolkit = reason or cuda_toolkit()
    if wanted("FORCE_CUDA") and isinstance(toolkit, str):
        raise SystemExit(f"FORCE_CUDA is set, but the CUDA kernels cannot be built: {toolkit}")
    arguments = pure_arguments(reason) if reason is not None else extension_arguments(sources, toolkit)
    kernels = find_packages(include=["dynaprune_kernels", "dynaprune_kernels.*"])
    training = find_packages("python", include=["dynaprune", "dynaprune.*"])
    setup(packages=kernels + training, **arguments)


main()
