"""`updraft-trainer ranks`: torchrun, which starts the ranks of this pod and restarts those of all pods when one is lost.

It adds two things to torchrun. The first pod is told to host the rendezvous: torchrun finds out by DNS, which may not know a
new pod yet. And it ends with one sentence that a person can act on, because the operator shows a container's last words.
"""

import json
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from updraft_chassis import lifecycle
from updraft_chassis.errors import Unavailable

_ERROR_FILE = "TORCHELASTIC_ERROR_FILE"
"""Variable in which torchrun names the file where a rank says why it ended."""

_OWN_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
"""Variable by which the ranks of each start have a store of their own. With that of torchrun, a pod that replaces another one
waits for an address that the first pod writes only once (torch 2.13, `DynamicRendezvousHandler.next_rendezvous`)."""

SHUTDOWN_S = 110
"""How long torchrun waits for ranks that were told to stop, and may save twice: less than the pod's own grace period."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """`num_nodes` pods with `ranks_per_node` ranks each, which meet at `endpoint`, host:port of the first pod."""

    num_nodes: int
    ranks_per_node: int
    endpoint: str
    id: str
    """The same for all pods of a trainer."""
    address: str = ""
    """Where the other pods reach this one; empty for its host name."""
    max_restarts: int = 100
    """Restarts of the ranks, of which each failure and each loss of another pod costs one. Then the pod ends, and Kubernetes
    restarts it, later and later, and shows why."""
    meeting_s: int = 600
    """How long a pod waits for the others. Then it says so and ends, and Kubernetes restarts it."""

    def arguments(self, pod: str) -> list[str]:
        """torchrun's, in the pod of this name."""
        first = self.endpoint.partition(":")[0].partition(".")[0]
        is_host = str(first in (pod, "localhost")).lower()
        return [
            *(f"--nnodes={self.num_nodes}", f"--nproc-per-node={self.ranks_per_node}"),
            *("--rdzv-backend=c10d", f"--rdzv-endpoint={self.endpoint}", f"--rdzv-id={self.id}"),
            f"--rdzv-conf=is_host={is_host},join_timeout={self.meeting_s},read_timeout={self.meeting_s}",
            *(f"--max-restarts={self.max_restarts}", f"--shutdown-timeout={SHUTDOWN_S}"),
            *([f"--local-addr={self.address}"] if self.address else []),
            *("-m", "updraft_trainer", "rank"),
        ]


def main(launch: Launch) -> None:
    """Run until SIGTERM, or until the ranks ended for good; SystemExit(1) with a sentence in that case."""
    if launch.ranks_per_node > 1:
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # torchrun's own default, without its warning
    os.environ[_OWN_STORE] = "1"
    with lifecycle.errors_as_sentences("updraft-trainer"):
        _run(launch)


def _run(launch: Launch) -> None:
    from torch.distributed import run  # noqa: PLC0415 - takes seconds
    from torch.distributed.elastic.multiprocessing.api import SignalException  # noqa: PLC0415
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError  # noqa: PLC0415
    from torch.distributed.elastic.rendezvous import RendezvousError  # noqa: PLC0415

    try:
        run.run(run.parse_args(launch.arguments(_pod())))  # type: ignore[no-untyped-call] # torch's
    except SignalException as error:
        if error.sigval not in (signal.SIGTERM, signal.SIGINT):
            raise
    except RendezvousError as error:
        raise Unavailable(_rendezvous_failure(launch, error)) from error
    except ChildFailedError as error:
        number, failure = error.get_first_failure()
        is_killed, words = failure.exitcode < 0, failure.error_file_data.get("message")
        end = f"was killed by {failure.signal_name()}" if is_killed else f"ended with status {failure.exitcode}"
        raise Unavailable(f"rank {number} {end}" + (f": {words}" if words else "")) from error


def _pod() -> str:
    """This pod's name. Its host name is the node's on the network of the host."""
    return os.environ.get("UPDRAFT_TRAINER_POD_NAME") or socket.gethostname()


def _rendezvous_failure(launch: Launch, error: Exception) -> str:
    reason = " ".join(str(error).split()) or type(error).__name__
    advice = "check that all of them run, and that this one reaches that address"
    return f"the rendezvous of {launch.num_nodes} pods at {launch.endpoint} failed: {advice} ({reason})"


def rank(main: Callable[[], None], environment: Mapping[str, str]) -> None:
    """Run `main`, one rank. SystemExit(1) even if it ends well: another pod was told to stop, and is waited for.

    torchrun would take a good end for the end of all, and wait minutes for the ranks of the pod that has gone.
    """
    with last_words(environment), lifecycle.errors_as_sentences("updraft-trainer"):
        main()
        raise Unavailable("the ranks ended because another pod was told to stop; they start again once it is back")


@contextmanager
def last_words(environment: Mapping[str, str]) -> Iterator[None]:
    """Leave the sentence with which this process ends to torchrun, if that started it."""
    try:
        yield
    except SystemExit as ended:
        if ended.code and ended.__context__ is not None and (path := environment.get(_ERROR_FILE)):
            content = {"message": str(_root_cause(ended.__context__)), "timestamp": int(time.time())}
            Path(path).write_text(json.dumps(content), encoding="utf-8")
        raise


def _root_cause(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
