"""Builds what a wheel adds to the sources, also the editable one of `make install`: C++ kernels, and the console's libraries.

A wheel runs on many machines, so it carries one library per set of CPU features, and `updraft_kernels.loader` chooses one.
Without a g++ that compiles and links, the wheel carries none and is a pure one; torch's operations then do their work.
npm checks the digests of cli/package-lock.json. Without it, the console's pages are complete but do not change by themselves.
"""

import hashlib
import os
import platform
import shutil
import subprocess
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

KERNELS = "services/inference/updraft_kernels"

_FLAGS = ("-std=c++17", "-O3", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-Wno-psabi")
_AVX512 = ("-march=x86-64-v4", "-mtune=icelake-server", "-mprefer-vector-width=512")  # the fastest on a Zen 4 too
VARIANTS: dict[str, dict[str, tuple[str, ...]]] = {
    "x86_64": {
        "amx": (
            "-march=x86-64-v4",
            "-mavx512vnni",
            "-mavx512bf16",
            "-mamx-tile",
            "-mamx-bf16",
            "-mtune=sapphirerapids",
        ),
        "vnni": (*_AVX512, "-mavx512vnni"),
        "avx512": _AVX512,
        "avx2": ("-march=x86-64-v3",),
    },
    "aarch64": {"neon": ()},
}
"""The compiler's flags per variant, by machine; `loader.CPU_FLAGS` says what each needs of a CPU."""

PACKAGE = "cli"
"""The folder of package.json and its lock."""
VENDOR = "cli/updraft_cli/ui/static/vendor"
VENDORED = {
    "htmx.min.js": "htmx.org/dist/htmx.min.js",
    "htmx.LICENSE": "htmx.org/LICENSE",
    "htmx-sse.js": "htmx-ext-sse/dist/sse.min.js",
    "htmx-sse.LICENSE": "htmx-ext-sse/LICENSE",
    "idiomorph-ext.min.js": "idiomorph/dist/idiomorph-ext.min.js",
    "idiomorph.LICENSE": "idiomorph/LICENSE",
    "uPlot.iife.min.js": "uplot/dist/uPlot.iife.min.js",
    "uPlot.min.css": "uplot/dist/uPlot.min.css",
    "uPlot.LICENSE": "uplot/LICENSE",
}
"""Files in the wheel, and where npm puts them."""

STAMP = "lock.sha256"
"""A file beside them: a digest of the lock that they are from, and of themselves."""

_NPM_OPTIONS = (
    "--omit=dev",
    "--ignore-scripts",
    "--no-audit",
    "--no-fund",
    "--loglevel=error",
    "--prefer-offline",
    "--fetch-retries=1",
    "--fetch-retry-mintimeout=1000",
    "--fetch-timeout=20000",
)
_NPM_S = 60


class BuildHook(BuildHookInterface[Any]):
    """Adds the kernels and the console's libraries, where they can be had, and the platform to the wheel's tag."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        self._add_kernels(build_data)
        self._add_console_libraries(build_data)

    def _add_console_libraries(self, build_data: dict[str, Any]) -> None:
        package, vendor = Path(self.root, PACKAGE), Path(self.root, VENDOR)
        if not package.joinpath("package-lock.json").is_file() or not vendor.parent.is_dir():
            return
        if problem := vendor_libraries(package, vendor):
            self.app.display_warning(f"The pages of `updraft ui` may not change by themselves: {problem}")
        else:
            build_data["artifacts"] += [f"{VENDOR}/{name}" for name in VENDORED]

    def _add_kernels(self, build_data: dict[str, Any]) -> None:
        sources = Path(self.root, KERNELS)
        if not sources.is_dir():  # a wheel of requirements alone
            return
        compiler = shutil.which("g++")
        problem = why_unusable(compiler) if compiler else "there is no g++"
        with tempfile.TemporaryDirectory(dir=sources) as folder:
            built = [] if problem or compiler is None else compile_kernels(sources, Path(folder), compiler)
            libraries = [library.rename(sources / library.name) for library in built]
        for old in set(sources.glob("*.so")) - set(libraries):
            old.unlink()
        if not libraries:
            reason = problem or f"there are no kernels for {platform.machine()} that this g++ can compile"
            self.app.display_warning(f"No C++ kernels, so torch's operations do their work: {reason}")
            return
        build_data["artifacts"] += [f"{KERNELS}/{library.name}" for library in libraries]
        build_data["pure_python"] = False  # ctypes loads them, so any Python will do
        build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"


def vendor_libraries(package: Path, vendor: Path) -> str:
    """Put the files of VENDORED into `vendor`, unless they are there from this lock. Return why not; empty: they are there.

    Nothing of `vendor` changes before npm has installed everything.
    """
    try:
        if _are_vendored(package, vendor):
            return ""
        with tempfile.TemporaryDirectory() as folder:
            if problem := _install_packages(package, Path(folder)):
                return problem
            files = {name: Path(folder, "node_modules", source).read_bytes() for name, source in VENDORED.items()}
        if vendor.exists():
            shutil.rmtree(vendor)
        vendor.mkdir()
        for name, content in files.items():
            vendor.joinpath(name).write_bytes(content)
        vendor.joinpath(STAMP).write_text(_digest(package, vendor))
    except OSError as error:
        return str(error)
    return ""


def _are_vendored(package: Path, vendor: Path) -> bool:
    """Whether `vendor` has every file, as npm installed it from this lock."""
    names = (*VENDORED, STAMP)
    if not all(vendor.joinpath(name).is_file() for name in names):
        return False
    return vendor.joinpath(STAMP).read_text() == _digest(package, vendor)


def _digest(package: Path, vendor: Path) -> str:
    """Of the lock, the list, and the content of each vendored file."""
    digest = hashlib.sha256(package.joinpath("package-lock.json").read_bytes() + repr(VENDORED).encode())
    for name in VENDORED:
        digest.update(hashlib.sha256(vendor.joinpath(name).read_bytes()).digest())
    return digest.hexdigest()


def _install_packages(package: Path, folder: Path) -> str:
    """Let npm install what the lock says, without any script of a package. Return why not. OSError: npm is broken."""
    npm = shutil.which("npm")
    if npm is None:
        return "there is no npm"
    for name in ("package.json", "package-lock.json"):
        shutil.copyfile(package / name, folder / name)
    try:
        result = subprocess.run(  # noqa: S603 - npm
            [npm, "ci", *_NPM_OPTIONS], cwd=folder, capture_output=True, text=True, check=False, timeout=_NPM_S
        )
    except subprocess.TimeoutExpired:
        return f"npm did not finish within {_NPM_S} seconds"
    return "" if result.returncode == 0 else f"npm failed: {result.stderr.strip() or result.stdout.strip()}"


def why_unusable(compiler: str) -> str:
    """Why a compiler can make no library whatever the source is: without headers or libstdc++, for example. Empty if it can."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text(
            "#include <omp.h>\n#include <vector>\nstd::vector<int> probe() { return {omp_get_max_threads()}; }\n"
        )
        try:
            _run(compiler, "-std=c++17", "-fPIC", "-shared", source, "-o", source.with_suffix(".so"))
        except (RuntimeError, OSError) as error:
            return str(error)
    return ""


def compile_kernels(sources: Path, output: Path, compiler: str) -> list[Path]:
    """Compile every variant of this machine that the compiler knows. RuntimeError, with its message, if a source is wrong."""
    variants = VARIANTS.get(platform.machine(), {})
    known = {name: flags for name, flags in variants.items() if _accepts(compiler, flags)}
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = {
            Path(folder, f"{name}-{source.stem}.o"): (source, flags)
            for source in sorted(sources.glob("*.cpp"))
            for name, flags in known.items()
        }
        for _ in pool.map(lambda job: _run(compiler, *_FLAGS, *job[1][1], "-c", job[1][0], "-o", job[0]), jobs.items()):
            pass
        return [_link(compiler, name, sorted(Path(folder).glob(f"{name}-*.o")), output) for name in known]


def _accepts(compiler: str, flags: tuple[str, ...]) -> bool:
    """Older compilers do not know AMX."""
    try:
        _run(compiler, *_FLAGS, *flags, "-fsyntax-only", "-x", "c++", os.devnull)
    except RuntimeError:
        return False
    return True


def _link(compiler: str, variant: str, objects: list[Path], output: Path) -> Path:
    """Without -fopenmp, because torch brings an OpenMP and a second one would be a second pool of threads."""
    linked = output / f".{variant}.so.part"
    _run(compiler, "-shared", *objects, "-o", linked)
    return linked.rename(output / f"{variant}-{hashlib.sha256(linked.read_bytes()).hexdigest()[:16]}.so")


def _run(*command: str | Path) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - the compiler
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))} failed:\n{result.stderr}")
