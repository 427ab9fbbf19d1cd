"""The saved training state: one file with everything that replay and registry do not already hold.

A save writes a temporary file, syncs and renames it. The name contains the sha256 of the content, so that damage is detected;
the previous state is kept for that case. A folder of another target is rejected, because silently starting over would lose
days of training. After a kill the steps since the last save are repeated; use counts and weights come from the same file, so
no sample is used more often than intended. The trainer writes a copy while it trains on: a save takes the memory of one more
state.
"""

import hashlib
import json
import logging
import os
import pickle
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from updraft_chassis.durable import sync
from updraft_chassis.errors import Conflict, Corrupt, Exhausted
from updraft_draft.config import DraftConfig

logger = logging.getLogger(__name__)

FORMAT = "updraft-trainer-state/1"

NUM_KEPT = 2

MAX_SENT = 256
"""Number of digests kept; weights only ever return to a recent value."""

_DIGEST_CHARS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """A state can be continued only with the same identity."""

    speculator: str
    target_fingerprint: str
    tokenizer_fingerprint: str


@dataclass(slots=True, kw_only=True)
class TrainingHistory:
    uses: dict[str, int] = field(default_factory=dict)
    """How often each sample was trained on, by trace id."""
    num_samples: int = 0
    """Distinct samples trained on so far."""
    first_trace_id: str = ""
    last_trace_id: str = ""
    origin: str = ""
    """Where training started, in words."""
    sent_digests: list[str] = field(default_factory=list)
    """Tensor digests sent to the registry, newest last."""

    def count_use(self, trace_id: str) -> None:
        uses = self.uses.get(trace_id, 0)
        self.uses[trace_id] = uses + 1
        if uses == 0:
            self.num_samples += 1
            self.first_trace_id = self.first_trace_id or trace_id
            self.last_trace_id = trace_id

    def add_sent(self, tensors_digest: str) -> None:
        """Record a candidate that the registry has responded to, so that it is not sent again."""
        self.sent_digests = [*self.sent_digests, tensors_digest][-MAX_SENT:]


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """`token_ids` int64 [V]: the draft vocabulary. `rng`: the state of a `random.Random`.

    `draft_config` is None in states of earlier versions, whose drafts always had the shape of a target layer.
    """

    identity: Identity
    token_ids: Tensor
    learner: dict[str, Any]
    history: TrainingHistory
    rng: tuple[Any, ...]
    config_digest: str
    draft_config: DraftConfig | None = None


class States:
    """The saved states in a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def save(self, state: State) -> Path:
        """Write a state durably and delete all but the last two. Exhausted if it cannot be written; older states are kept."""
        part = self._folder / "state.part"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            path = self._write(part, state)
            for old in self._paths()[NUM_KEPT:]:
                old.unlink()
        except (OSError, RuntimeError) as error:  # torch reports an incomplete write as RuntimeError
            with suppress(OSError):
                part.unlink(missing_ok=True)
            raise Exhausted(f"cannot save to {self._folder}: {error}") from error
        return path

    def _write(self, part: Path, state: State) -> Path:
        with part.open("wb") as file:
            torch.save(_to_dict(state), file)
            file.flush()
            os.fsync(file.fileno())
        number = max((_number(path) for path in self._paths()), default=0) + 1
        path = self._folder / f"state-{number:08d}-{_digest(part)}.pt"
        part.rename(path)
        sync(self._folder)
        return path

    def load(self, identity: Identity) -> State | None:
        """The newest intact state; None if the folder is empty.

        Conflict if it has another identity, Corrupt if no state is intact.
        """
        paths = self._paths()
        for path in paths:
            try:
                state = _read(path)
            except Corrupt as error:
                logger.warning("A saved state is damaged; trying the previous one: %s", error)
                continue
            _check(path, state.identity, identity)
            return state
        if paths:
            raise Corrupt(f"no saved state in {self._folder} is intact; move them away to start over")
        return None

    def _paths(self) -> list[Path]:
        """Newest first."""
        return sorted(self._folder.glob("state-*.pt"), key=_number, reverse=True)


def _check(path: Path, saved: Identity, expected: Identity) -> None:
    for field_ in fields(Identity):
        ours, theirs = getattr(expected, field_.name), getattr(saved, field_.name)
        if ours != theirs:
            raise Conflict(
                f"{path} has the {field_.name.replace('_', ' ')} {theirs}, this trainer's is {ours};"
                " set UPDRAFT_TRAINER_DATA_DIR to another folder"
            )


def _read(path: Path) -> State:
    try:
        if not path.stem.endswith(_digest(path)):
            raise Corrupt(f"the content of {path} does not match the digest in its name")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, pickle.UnpicklingError) as error:
        raise Corrupt(f"{path} cannot be read: {error}") from error
    if content.get("format") != FORMAT:
        raise Conflict(f"{path} has the format {content.get('format')}, this version reads {FORMAT}")
    return State(
        identity=Identity(**content["identity"]),
        token_ids=content["token_ids"],
        learner=content["learner"],
        history=TrainingHistory(**content["progress"]),
        rng=content["rng"],
        config_digest=content["config_digest"],
        draft_config=DraftConfig.from_dict(json.loads(content["draft_config"])) if "draft_config" in content else None,
    )


def _to_dict(state: State) -> dict[str, Any]:
    """Plain types only, so that `torch.load(weights_only=True)` can read them."""
    return {
        "format": FORMAT,
        "identity": asdict(state.identity),
        "token_ids": state.token_ids,
        "learner": state.learner,
        "progress": asdict(state.history),
        "rng": state.rng,
        "config_digest": state.config_digest,
        **({"draft_config": state.draft_config.to_json()} if state.draft_config else {}),
    }


def _number(path: Path) -> int:
    return int(path.stem.split("-")[1])


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:_DIGEST_CHARS]
