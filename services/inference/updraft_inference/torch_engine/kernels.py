"""The engine's own kernels as a library: compiled where it runs, once a machine, and kept.

There is no package that has them for this torch, and a wheel of ours for each processor would be much to keep. Where there
is no compiler the engine runs torch's operations (`operations.Plain`), which are slower.
"""

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import stat
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from updraft_chassis.errors import Unavailable

logger = logging.getLogger(__name__)

NATIVE = Path(__file__).with_name("native")
SOURCES = sorted(NATIVE.glob("*.cpp"))
_COMPILER = "g++"  # clang's OpenMP is another one than torch's
_FLAGS = (
    "-std=c++17",
    "-O3",
    "-march=native",
    "-fopenmp",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fPIC",
    "-Wno-psabi",
)
_LIMIT_S = 60.0
_OTHERS_MAY_WRITE = stat.S_IWGRP | stat.S_IWOTH

_POINTER, _SIZE, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
_SIGNATURES = {
    "add_norm": ([*[_POINTER] * 5, *[_SIZE] * 2, _FLOAT], None),
    "gate": ([*[_POINTER] * 2, *[_SIZE] * 2], None),
    "choices": ([*[_POINTER] * 5, *[_SIZE] * 2], None),
    "attend": ([*[_POINTER] * 9, *[_SIZE] * 6, *[_FLOAT] * 2], ctypes.c_bool),
}


def default_folder() -> Path:
    """Where they are kept unless somebody says otherwise."""
    try:
        return Path.home() / ".cache/updraft/kernels"
    except RuntimeError:  # a user without a home
        return Path(tempfile.gettempdir()) / f"updraft-kernels-{os.geteuid()}"


def load(folder: Path) -> ctypes.CDLL | None:
    """The library, from `folder` or compiled into it; None where that is not possible, which is logged. After torch, on whose
    threads it computes."""
    try:
        library = ctypes.CDLL(str(_found(folder.resolve()) or _compiled(folder.resolve())))
        return _declared(library)
    except (OSError, RuntimeError, ValueError, subprocess.SubprocessError, AttributeError, Unavailable) as error:
        reason = (getattr(error, "stderr", None) or str(error))[-500:]
        logger.warning("The engine runs without its own kernels, and slower", extra={"reason": reason})
        return None


def _found(folder: Path) -> Path | None:
    """A whole library for this source and processor."""
    return next((each for each in _candidates(folder) if _is_whole(each)), None)


def _is_whole(library: Path) -> bool:
    try:
        return library.name == _name(library)
    except OSError:  # somebody else's, or no file
        return False


def _candidates(folder: Path) -> Iterator[Path]:
    if folder.is_dir():
        _check_owner(folder)
        yield from folder.glob(f"kernels-{_identity()}-*.so")


def _check_owner(folder: Path) -> None:
    """What lies there is run: it has to be ours, or root's."""
    found = folder.stat()
    if found.st_uid not in (0, os.geteuid()) or found.st_mode & _OTHERS_MAY_WRITE:
        raise Unavailable(f"others may write to {folder}, and what lies there would be run")


def _compiled(folder: Path) -> Path:
    """Its place. Who is killed on the way leaves no half of it under its name."""
    compiler = shutil.which(_COMPILER)
    if compiler is None:
        raise Unavailable(f"there is no {_COMPILER} to compile them with")
    logger.info("Compiling the engine's kernels, once for this machine", extra={"folder": str(folder)})
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    _check_owner(folder)
    started = time.monotonic()
    with tempfile.TemporaryDirectory(dir=folder, prefix=".compiling-") as scratch:
        objects, made = [Path(scratch) / f"{source.stem}.o" for source in SOURCES], Path(scratch) / "kernels.so"
        for source, compiled in zip(SOURCES, objects, strict=True):
            _run([compiler, *_FLAGS, "-c", str(source), "-o", str(compiled)])
        # Without -fopenmp: torch's OpenMP is in the process already, and another one would be another pool of threads.
        _run([compiler, "-shared", *map(str, objects), "-o", str(made)])
        library = made.replace(folder / _name(made))
    logger.info("Compiled them", extra={"seconds": round(time.monotonic() - started, 1)})
    return library


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=_LIMIT_S)  # noqa: S603 - ours


def _name(library: Path) -> str:
    """With its own digest: half a library would end the process that loads it."""
    return f"kernels-{_identity()}-{_digest(library.read_bytes())}.so"


def _identity() -> str:
    """Of all that a library is compiled for: one folder may be of several machines."""
    return _digest(
        "\0".join(
            [
                *(each.read_text() for each in [*SOURCES, *sorted(NATIVE.glob("*.h"))]),
                *_FLAGS,
                platform.machine(),
                _processor(),
            ]
        ).encode()
    )


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _processor() -> str:
    """What `-march=native` looks at."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    kinds = ("model name", "flags", "Features", "CPU implementer", "CPU part")
    return "\n".join(dict.fromkeys(line for line in lines if line.startswith(kinds)))


def _declared(library: ctypes.CDLL) -> ctypes.CDLL:
    for name, (arguments, result) in _SIGNATURES.items():
        for dtype in ("float32", "bfloat16"):
            function = getattr(library, f"{name}_{dtype}")
            function.argtypes, function.restype = arguments, result
    library.multiply.argtypes, library.multiply.restype = [*[_POINTER] * 4, *[_SIZE] * 3], None
    for name in ("has_wide_vectors", "has_tiles"):
        getattr(library, name).restype = ctypes.c_bool
    return library
