"""torch's rendezvous of a server whose ranks are all on this machine: nobody else has to reach it, so it listens here only.

torch opens it on all addresses, and it asks for no key: whoever reaches the pod's port could fill its memory. Its library gloo
listens on the address of the pod's name, also for one rank, and where ranks meet by a file.
"""

import errno
import logging
import os
import socket
import tempfile
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from updraft_tap import hooks
from updraft_tap.hooks import Binding, Hook

log = logging.getLogger(__name__)

_HERE = "127.0.0.1"
_NAMES = (_HERE, "localhost", "0.0.0.0")  # noqa: S104 - compared, not bound
"""Addresses at which a rank reaches those of its own machine only."""
_GLOO_INTERFACE, _LOOPBACK = "GLOO_SOCKET_IFNAME", "lo"
_CHOSEN = "UPDRAFT_TAP_CHOSE_GLOO_INTERFACE"
"""Set by us, so that processes which inherit the choice know whose it is."""
_AGENT_STORE = "TORCHELASTIC_USE_AGENT_STORE"
"""Set to True by torchrun, which has opened the rendezvous itself."""


def keep_local() -> str:
    """Hook torch where it opens a rendezvous. Returns why that cannot be; "" if it is done."""
    problem = "; ".join(filter(None, hooks.install(_BINDINGS).values()))
    if problem:
        log.error("Updraft cannot keep torch's rendezvous from the network: %s", problem)
    return problem


def _meet(original: Hook, url: Any, *args: Any, **kwargs: Any) -> Any:
    """AROUND rendezvous. A file in a temporary folder is of this machine; where no file is used, `_create` decides."""
    place = urlsplit(url) if isinstance(url, str) else None
    if place is not None and place.scheme == "file" and Path(place.path).is_relative_to(tempfile.gettempdir()):
        _keep_gloo_local()
    return original(url, *args, **kwargs)


def _create(
    original: Hook, hostname: str, port: int, rank: int, world_size: int, timeout: Any, *args: Any, **kwargs: Any
) -> Any:
    """AROUND _create_c10d_store."""
    is_here = world_size == 1 or hostname in _NAMES
    if not is_here or os.environ.get(_AGENT_STORE) == "True":
        if os.environ.pop(_CHOSEN, ""):  # ranks in other processes, perhaps of other machines, have to be reached
            os.environ.pop(_GLOO_INTERFACE, None)
        return original(hostname, port, rank, world_size, timeout, *args, **kwargs)
    _keep_gloo_local()
    if rank:  # the first one listens
        return original(_HERE, port, rank, world_size, timeout, *args, **kwargs)
    try:
        listener = socket.create_server((_HERE, port))
    except (OSError, OverflowError) as error:
        # A port in use may be this process's, which shares it. Of everything else torch says what is wrong.
        if getattr(error, "errno", None) != errno.EADDRINUSE:
            log.error("Updraft cannot keep torch's rendezvous from the network: %s", error)
        return original(_HERE, port, rank, world_size, timeout, *args, **kwargs)

    from torch.distributed import TCPStore  # type: ignore[attr-defined] # torch names it in no __all__  # noqa: PLC0415

    return TCPStore(
        host_name=_HERE,
        port=listener.getsockname()[1],
        world_size=world_size,
        is_master=True,
        timeout=timeout,
        multi_tenant=True,
        master_listen_fd=listener.detach(),
    )


def _keep_gloo_local() -> None:
    if _GLOO_INTERFACE not in os.environ:
        os.environ[_GLOO_INTERFACE], os.environ[_CHOSEN] = _LOOPBACK, "1"


_BINDINGS = (
    Binding(
        target="torch.distributed.distributed_c10d.rendezvous", hook=_meet, parameters=("url", "rank", "world_size")
    ),
    Binding(
        target="torch.distributed.rendezvous._create_c10d_store",
        hook=_create,
        parameters=("hostname", "port", "rank", "world_size", "timeout"),
    ),
)
