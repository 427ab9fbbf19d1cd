"""The saved training state: a folder with everything that replay and registry do not already hold.

A save writes a temporary folder, syncs and renames it. The name contains a number, higher than that of all states before, and
the digest of the content, so that damage is detected; the previous state is kept for that case. States of another target are
rejected, because silently starting over would lose days of training. After a kill the steps since the last save are repeated;
use counts and weights come from the same state, so no sample is used more often than intended. A state is that of all ranks
and does not depend on their number.
"""

import json
import logging
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from shutil import rmtree
from typing import Any, Self

from torch import Tensor

from updraft_chassis.durable import sync
from updraft_chassis.errors import Conflict, Corrupt, Exhausted
from updraft_draft.config import DraftConfig
from updraft_trainer.states import saved_values

logger = logging.getLogger(__name__)

FORMAT = "updraft-trainer-state/2"

NUM_KEPT = 2

MAX_SENT = 256
"""Number of digests kept; weights only ever return to a recent value."""

MAX_TENANTS = 4096
"""Tenants that a version lists: 32 KiB of its manifest."""

_PART, _REMOVED = "state.part", "state.removed"
"""A state that is being written, and one that is being deleted."""

_NAME = re.compile(r"state-(\d{8,})-([0-9a-f]{64})")


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
    folders: list[str] = field(default_factory=list)
    """Ids of the data folders whose samples `uses` counts: those of the ranks that were there at the last save."""
    origin: str = ""
    """Where training started, in words."""
    sent_digests: list[str] = field(default_factory=list)
    """Tensor digests sent to the registry, newest last."""
    tenants: list[str] = field(default_factory=list)
    """Hashes of the tenants that the draft may have learned from, also before `origin`; ascending, at most MAX_TENANTS."""
    has_more_tenants: bool = False
    """There were others."""

    def learn_from(self, tenants: Iterable[str], *, has_more: bool = False) -> None:
        """The draft has learned from samples of these tenants; empty ones are nobody's. `has_more`: and from others."""
        all_tenants = sorted({*self.tenants, *filter(None, tenants)})
        if len(all_tenants) != len(self.tenants):
            known = set(self.tenants)  # those stay, whoever comes
            new = [tenant for tenant in all_tenants if tenant not in known][: MAX_TENANTS - len(known)]
            self.has_more_tenants |= len(known) + len(new) < len(all_tenants)
            self.tenants = sorted({*known, *new})
        self.has_more_tenants |= has_more

    def count_use(self, trace_id: str) -> None:
        uses = self.uses.get(trace_id, 0)
        self.uses[trace_id] = uses + 1
        if uses == 0:
            self.num_samples += 1
            self.first_trace_id = self.first_trace_id or trace_id
            self.last_trace_id = trace_id

    def count_uses(self, trace_ids: Iterable[str]) -> int:
        """Count one use of each sample; return how many samples had no use before."""
        before = self.num_samples
        for trace_id in trace_ids:
            self.count_use(trace_id)
        return self.num_samples - before

    def count_as_used(self, trace_ids: Iterable[str]) -> None:
        """The draft may have learned from these samples; nobody knows how often."""
        for trace_id in trace_ids:
            self.uses.setdefault(trace_id, 1)

    def add_sent(self, tensors_digest: str) -> None:
        """Record a candidate that the registry has responded to, so that it is not sent again."""
        self.sent_digests = [*self.sent_digests, tensors_digest][-MAX_SENT:]


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """`token_ids` int64 [V]: the draft vocabulary. `learner`: the whole `state_dict()` of a learner. `history` has the uses of
    all ranks. `rng`: the state of a `random.Random`. `taken_s`: the Unix time that it is of.
    """

    identity: Identity
    token_ids: Tensor
    learner: dict[str, Any]
    history: TrainingHistory
    rng: tuple[Any, ...]
    config_digest: str
    draft_config: DraftConfig
    taken_s: float

    def copied(self) -> "State":
        """A copy on the CPU, which training does not change."""
        return replace(
            self,
            token_ids=saved_values.copied(self.token_ids),
            learner=saved_values.copied(self.learner),
            history=replace(self.history, uses=self.history.uses.copy()),
        )


@dataclass(frozen=True, slots=True, order=True)
class SavedState:
    """A state on disk. Later ones are greater."""

    number: int
    digest: str

    @classmethod
    def named(cls, name: str) -> Self | None:
        match = _NAME.fullmatch(name)
        return cls(int(match[1]), f"sha256:{match[2]}") if match else None

    @property
    def name(self) -> str:
        return f"state-{self.number:08d}-{self.digest.removeprefix('sha256:')}"


class States:
    """The saved states in a folder, which nobody else writes to."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._damaged: set[SavedState] = set()
        """The next save removes them, so that it does not remove an intact one instead."""

    def save(self, state: State) -> Path:
        """Write a state durably and delete all but the last two. Exhausted if it cannot be written; older states are kept."""
        with self._writing() as part:
            digest = saved_values.write(part, _to_dict(state))
            number = max((saved.number for saved in self._saved()), default=0) + 1
            return self._add(part, SavedState(number, digest))

    def load(self, identity: Identity) -> State | None:
        """The newest intact state; None if the folder is empty. Errors as for `newest`."""
        saved = self.newest(identity)
        return None if saved is None else self.read(saved)

    def newest(self, identity: Identity) -> SavedState | None:
        """The newest intact state; None if the folder is empty.

        Conflict if it has another identity or format, Corrupt if no state is intact.
        """
        states = self._saved()
        for saved in states:
            try:
                self._check(saved, identity)
            except Corrupt as error:
                logger.warning("A saved state is damaged; trying the previous one: %s", error)
                self._damaged.add(saved)
                continue
            return saved
        if states:
            raise Corrupt(f"no saved state in {self._folder} is intact; move them away to start over")
        return None

    def read(self, saved: SavedState) -> State:
        """An intact state. Corrupt if it was damaged since it was checked."""
        return _from_dict(saved_values.read(self.path(saved), saved.digest))

    def path(self, saved: SavedState) -> Path:
        return self._folder / saved.name

    @contextmanager
    def receiving(self, saved: SavedState) -> Iterator[Path]:
        """An empty folder that holds the files of another folder's state when the block ends, which is then one of these.

        Exhausted if they cannot be written, Corrupt if they are not those of that state.
        """
        with self._writing() as part:
            yield part
            saved_values.check(part, saved.digest)
            for path in part.iterdir():
                sync(path)
            sync(part)
            self._add(part, saved)

    @contextmanager
    def _writing(self) -> Iterator[Path]:
        """A new temporary folder, deleted when the block ends. Exhausted if the block cannot write."""
        part = self._folder / _PART
        try:
            for left in (part, self._folder / _REMOVED):  # by a kill
                rmtree(left, ignore_errors=True)
            part.mkdir(parents=True)
            yield part
        except OSError as error:
            raise Exhausted(f"cannot save to {self._folder}: {error}") from error
        finally:
            rmtree(part, ignore_errors=True)

    def _add(self, part: Path, saved: SavedState) -> Path:
        if self.path(saved).exists():  # damaged, and now received from another rank
            self._remove(saved)
        path = part.rename(self.path(saved))
        sync(self._folder)
        intact = [one for one in self._saved() if one not in self._damaged]
        for old in {*intact[NUM_KEPT:], *self._damaged}:
            self._remove(old)
        return path

    def _remove(self, saved: SavedState) -> None:
        """Under another name, so that half of it is never taken for a damaged state."""
        removed = self.path(saved).rename(self._folder / _REMOVED)
        rmtree(removed)
        self._damaged.discard(saved)

    def _check(self, saved: SavedState, identity: Identity) -> None:
        """Conflict and Corrupt as for `newest`."""
        path = self.path(saved)
        content = saved_values.read_plain(path, saved.digest)
        if content["format"] != FORMAT:
            raise Conflict(f"{path} has the format {content['format']}, this version reads {FORMAT}")
        _check_identity(path, Identity(**content["identity"]), identity)
        saved_values.check(path, saved.digest)

    def _saved(self) -> list[SavedState]:
        """Newest first."""
        paths = self._folder.iterdir() if self._folder.is_dir() else ()
        return sorted((saved for path in paths if (saved := SavedState.named(path.name))), reverse=True)


def _check_identity(path: Path, saved: Identity, expected: Identity) -> None:
    for field_ in fields(Identity):
        ours, theirs = getattr(expected, field_.name), getattr(saved, field_.name)
        if ours != theirs:
            raise Conflict(
                f"{path} has the {field_.name.replace('_', ' ')} {theirs}, this trainer's is {ours};"
                " set UPDRAFT_TRAINER_DATA_DIR to another folder"
            )


def _from_dict(content: dict[str, Any]) -> State:
    return State(
        identity=Identity(**content["identity"]),
        token_ids=content["token_ids"],
        learner=content["learner"],
        history=TrainingHistory(**content["history"]),
        rng=content["rng"],
        config_digest=content["config_digest"],
        draft_config=DraftConfig.from_dict(json.loads(content["draft_config"])),
        taken_s=content["taken_s"],
    )


def _to_dict(state: State) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "identity": asdict(state.identity),
        "token_ids": state.token_ids,
        "learner": state.learner,
        "history": asdict(state.history),
        "rng": state.rng,
        "config_digest": state.config_digest,
        "draft_config": state.draft_config.to_json(),
        "taken_s": state.taken_s,
    }
