"""The files that a server starts with: the plugin's folder and an initial draft."""

import hashlib
import logging
import shutil
from dataclasses import dataclass
from pathlib import Path

from updraft_artifacts.draft_shape import ShapeChoice
from updraft_artifacts.model_folder import describe, target_fingerprint
from updraft_chassis.errors import Unavailable
from updraft_draft.config import DraftConfig
from updraft_inference.tap import initial_draft, plugin_folder
from updraft_inference.tap.server_kind import ServerKind

logger = logging.getLogger(__name__)

_STARTED_WITH = "started-with-"


@dataclass(frozen=True, slots=True, kw_only=True)
class Files:
    """Absolute paths of the two folders."""

    plugin: Path
    draft: Path


def prepare(
    kind: ServerKind, model: Path, *, plugin: Path, draft: Path | None, shape: ShapeChoice, config_json: str = ""
) -> None:
    """Write the plugin's folder and, unless `draft` is None, an initial draft. Files that are already correct stay."""
    plugin_folder.write(plugin, kind)
    if draft is not None:
        initial_draft.write(model, draft, shape, config_json)
    logger.info("Prepared for %s", kind.engine, extra={"plugin": str(plugin), "seed": str(draft or "")})


def prepared(kind: ServerKind, model: Path, folder: Path, shape: ShapeChoice) -> Files:
    """The plugin's folder, and an initial draft per model and shape, both below `folder`."""
    config = DraftConfig.of_target(describe(model), shape)
    digest = hashlib.sha256(config.to_json().encode()).hexdigest()[:8]
    name = f"seed-{target_fingerprint(model).removeprefix('sha256:')[:12]}-{digest}"
    plugin, draft = (folder / part for part in ("plugin", name))
    prepare(kind, model, plugin=plugin, draft=draft, shape=shape)
    return Files(plugin=plugin.resolve(), draft=draft.resolve())


def kept(draft: Path, folder: Path) -> Path:
    """A copy of the draft to start with. Pruning does not remove it, because the server may return to it."""
    if draft.resolve().is_relative_to(folder.resolve()):
        return draft
    copy = (folder / f"{_STARTED_WITH}{draft.name}").resolve()
    shutil.rmtree(copy, ignore_errors=True)
    try:
        shutil.copytree(draft, copy)
    except (OSError, shutil.Error) as error:
        raise Unavailable(f"cannot copy the draft in {draft}: {error}") from error
    return copy


def remove_others(draft: Path) -> None:
    """Remove the drafts of earlier starts."""
    for other in set(draft.parent.glob(f"{_STARTED_WITH}*")) - {draft}:
        shutil.rmtree(other, ignore_errors=True)
