"""torch's rendezvous of a server whose ranks are all on this machine: nobody else has to reach it, so it listens here only.

torch opens it on all addresses, and it asks for no key: whoever reaches the pod's port could fill its memory. Its library gloo
listens on the address of the pod's name, also for one rank. vLLM's ranks meet by a file, which is not hooked.
"""

import errno
import logging
import os
import socket
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from updraft_tap import hooks
from updraft_tap.hooks import Binding, Hook

log = logging.getLogger(__name__)

_HERE = "127.0.0.1"
_NAMES = (_HERE, "localhost", "0.0.0.0")  # noqa: S104 - compared, not bound
"""Addresses at which the ranks of one machine meet, but also those of several, if the first one listens on all addresses."""
_GLOO_INTERFACE, _LOOPBACK = "GLOO_SOCKET_IFNAME", "lo"
_CREATE = "torch.distributed.rendezvous._create_c10d_store"
_CHOSEN = "UPDRAFT_TAP_CHOSE_GLOO_INTERFACE"
"""Set by us, so that processes which inherit the choice know whose it is."""
_AGENT_STORE = "TORCHELASTIC_USE_AGENT_STORE"
"""Set to True by torchrun, which has opened the rendezvous itself."""


def keep_local(is_one_node: Callable[[], bool] = lambda: False) -> str:
    """Hook torch where it opens a rendezvous. Returns why that cannot be; "" if it is done.

    `is_one_node` says whether several ranks are all on this machine; an error means that it is not known.
    """
    create = partial(_create, is_one_node)
    binding = Binding(target=_CREATE, hook=create, parameters=("hostname", "port", "rank", "world_size", "timeout"))
    (problem,) = hooks.install((binding,)).values()
    if problem:
        log.error("Updraft cannot keep torch's rendezvous from the network: %s", problem)
    return problem


def _create(
    is_one_node: Callable[[], bool], original: Hook, hostname: str, port: int, rank: int, *args: Any, **kwargs: Any
) -> Any:
    """AROUND _create_c10d_store."""
    world_size, timeout = (_argument(name, at, args, kwargs) for at, name in enumerate(("world_size", "timeout")))
    is_here = world_size == 1 or (hostname in _NAMES and _is_true(is_one_node))
    if not is_here or os.environ.get(_AGENT_STORE) == "True":
        if os.environ.pop(_CHOSEN, ""):  # ranks in other processes, perhaps of other machines, have to be reached
            os.environ.pop(_GLOO_INTERFACE, None)
        return original(hostname, port, rank, *args, **kwargs)
    _keep_gloo_local()
    if rank:  # the first one listens
        return original(_HERE, port, rank, *args, **kwargs)
    try:
        listener = socket.create_server((_HERE, port))
    except (OSError, OverflowError) as error:
        # A port in use may be this process's, which shares it. Of everything else torch says what is wrong.
        if getattr(error, "errno", None) != errno.EADDRINUSE:
            log.error("Updraft cannot keep torch's rendezvous from the network: %s", error)
        return original(_HERE, port, rank, *args, **kwargs)

    from torch.distributed import TCPStore  # type: ignore[attr-defined] # torch names it in no __all__  # noqa: PLC0415

    return TCPStore(
        host_name=_HERE,
        port=listener.getsockname()[1],
        world_size=world_size,
        is_master=True,
        timeout=timeout,
        multi_tenant=True,
        use_libuv=False,  # which ignored the socket before torch 2.8
        master_listen_fd=listener.detach(),
    )


def _argument(name: str, at: int, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    return kwargs[name] if name in kwargs else args[at]


def _keep_gloo_local() -> None:
    is_there = any(name == _LOOPBACK for _, name in socket.if_nameindex())
    if is_there and _GLOO_INTERFACE not in os.environ:
        os.environ[_GLOO_INTERFACE], os.environ[_CHOSEN] = _LOOPBACK, "1"


def _is_true(ask: Callable[[], bool]) -> bool:
    try:
        return ask()
    except Exception as error:  # noqa: BLE001  (torch then does as it would)
        log.warning("Updraft does not know whether all ranks are on this machine: %s", error)
        return False
