"""Loads the C++ kernels. `hatch_build.py` compiles them when the package is built, once per set of CPU features.

The name of a library carries a digest of its content, because opening a truncated library can kill the process.
"""

import ctypes
import hashlib
import logging
import platform
from pathlib import Path

logger = logging.getLogger(__name__)

FOLDER = Path(__file__).parent

_AVX2 = frozenset({"abm", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe"})
_AVX512 = _AVX2 | {"avx512bw", "avx512cd", "avx512dq", "avx512f", "avx512vl"}
_VNNI = _AVX512 | {"avx512_vnni"}
CPU_FLAGS = {
    "x86_64": {
        "amx": _VNNI | {"amx_bf16", "amx_tile", "avx512_bf16"},
        "vnni": _VNNI,
        "avx512": _AVX512,
        "avx2": _AVX2,
    },
    "aarch64": {"neon": frozenset({"asimd"})},
}
"""The flags in /proc/cpuinfo that each variant needs, by machine; the fastest variant comes first."""

_POINTER, _SIZE, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
_SIGNATURES = {
    "add_norm": ([*[_POINTER] * 5, *[_SIZE] * 2, _FLOAT], None),
    "silu_and_mul": ([*[_POINTER] * 2, *[_SIZE] * 2], None),
    "top_scores": ([*[_POINTER] * 5, *[_SIZE] * 2], None),
    "predictions": ([*[_POINTER] * 3, *[_SIZE] * 2], None),
    "forward_kl": ([*[_POINTER] * 5, *[_SIZE] * 2], None),
    "attention": ([*[_POINTER] * 9, *[_SIZE] * 6, *[_FLOAT] * 2], ctypes.c_bool),
}
_INT8_SIGNATURES = {
    "matmul_int8": [*[_POINTER] * 3, _SIZE],
    "draft_step": [*[_POINTER] * 4, *[_SIZE] * 2, _POINTER],
    "draft_head": [*[_POINTER] * 2, _SIZE, *[_POINTER] * 4],
}
"""All return whether there was memory."""


class Int8Weight(ctypes.Structure):
    """`Int8Weight` of int8.h. Whoever makes it keeps the memory."""

    _fields_ = (("blocks", _POINTER), ("scales", _POINTER), ("num_outputs", _SIZE), ("num_inputs", _SIZE))


class DraftStep(ctypes.Structure):
    """`Step` of draft.cpp: weights, cache and sizes. Whoever makes it keeps the memory."""

    _fields_ = (
        *((name, Int8Weight) for name in ("qkv", "o", "gate_up", "down", "head")),
        *(
            (name, _POINTER)
            for name in ("embedding", "token_norm", "state_norm", "mlp_norm", "final_norm", "cos", "sin")
        ),
        *((name, _POINTER) for name in ("keys", "values")),
        *((name, _SIZE) for name in ("hidden", "intermediate", "heads", "kv_heads", "head_size", "positions")),
        ("norms_residual", _SIZE),
        ("eps", _FLOAT),
    )


class Kernels(ctypes.CDLL):
    """A loaded library. Its functions take addresses and sizes and check neither."""

    def __init__(self, library: Path, variant: str) -> None:
        super().__init__(str(library))
        self.variant = variant
        for name, (arguments, result) in _SIGNATURES.items():
            for dtype in ("float32", "bfloat16"):
                function = getattr(self, f"{name}_{dtype}")
                function.argtypes, function.restype = arguments, result
        for name, arguments in _INT8_SIGNATURES.items() if self.has_int8 else ():
            function = getattr(self, name)
            function.argtypes, function.restype = arguments, ctypes.c_bool
        if self.has_amx:
            self.matmul_amx.argtypes, self.matmul_amx.restype = [*[_POINTER] * 4, *[_SIZE] * 3], None
            self.request_amx.restype = ctypes.c_bool
        if self.has_widening:
            self.matmul_avx2.argtypes, self.matmul_avx2.restype = [*[_POINTER] * 4, *[_SIZE] * 3], None

    @property
    def has_amx(self) -> bool:
        return self.variant == "amx"

    @property
    def has_widening(self) -> bool:
        """Whether it multiplies weights in bfloat16 that it widens, for CPUs on which torch has only a slow product."""
        return self.variant == "avx2"

    @property
    def has_wide_vectors(self) -> bool:
        """Whether `attention` is faster than torch's: it exchanges 16 floats by one instruction where others need dozens."""
        return self.variant in {"amx", "vnni", "avx512"}

    @property
    def has_int8(self) -> bool:
        """Whether it multiplies in int8, which takes an instruction that multiplies and adds 64 numbers."""
        return self.variant in {"amx", "vnni"}


def supported_variants() -> list[str]:
    """The variants that this CPU can run, fastest first."""
    available = _cpu_flags()
    return [variant for variant, flags in CPU_FLAGS.get(platform.machine(), {}).items() if flags <= available]


def load_kernels(folder: Path = FOLDER) -> Kernels | None:
    """Load the fastest variant that was built and that this CPU can run. None, and a warning, if there is none.

    Import torch first: the kernels use its OpenMP threads.
    """
    problems: list[str] = []
    for variant in supported_variants():
        try:
            kernels = load_variant(variant, folder)
        except (OSError, AttributeError) as error:
            problems.append(f"{variant}: {error}")
        else:
            level = logging.WARNING if problems else logging.INFO
            logger.log(level, "Loaded the C++ kernels", extra={"variant": variant, "skipped": problems})
            return kernels
    if not any(folder.glob("*.so")):
        problems = ["the package was built without a working C++ compiler"]
    reason = "; ".join(problems) or "this CPU lacks the features that they need"
    logger.warning("No C++ kernels; torch's operations, which are slower, do their work", extra={"reason": reason})
    return None


def load_variant(variant: str, folder: Path = FOLDER) -> Kernels:
    """Load one variant. OSError or AttributeError if it is missing, damaged or refused."""
    libraries = list(folder.glob(f"{variant}-*.so"))
    if not libraries:
        raise FileNotFoundError("it was not built")
    library = libraries[0].resolve()
    if library.stem != f"{variant}-{hashlib.sha256(library.read_bytes()).hexdigest()[:16]}":
        raise OSError(f"{library.name} is damaged")
    kernels = Kernels(library, variant)
    if kernels.has_amx and not kernels.request_amx():
        raise PermissionError("the operating system refused AMX to this process")
    return kernels


def _cpu_flags() -> frozenset[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return frozenset(flags.partition(":")[2].split())
