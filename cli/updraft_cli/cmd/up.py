"""`updraft up`: a stack in the foreground until a signal: the first signal stops it in order, the second at once."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import click
from rich.console import Console

from updraft_cli.cmd.model import fetched
from updraft_cli.local.console import console
from updraft_cli.local.folders import cache_folder, data_folder
from updraft_cli.local.plan import StackConfig
from updraft_cli.local.running import noted
from updraft_cli.local.stack import Stack
from updraft_cli.local.terminal import Terminal
from updraft_cli.models.smollm2 import SMOLLM2
from updraft_rollouts.terms import Strategy


def _settings(_: click.Context, __: click.Parameter, pairs: tuple[str, ...]) -> dict[str, str]:
    for pair in pairs:
        if "=" not in pair:
            raise click.BadParameter(f"{pair} is not KEY=VALUE")
    return dict(pair.split("=", 1) for pair in pairs)


PORT = click.IntRange(0, 65535)

# SIGHUP: the terminal was closed. Under nohup it is ignored, and we leave it so.
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@click.command()
@click.option(
    "--model",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help=f"Folder of the target model, Hugging Face layout.  [default: {SMOLLM2.name}, converted once]",
)
@click.option(
    "--data",
    type=click.Path(path_type=Path, file_okay=False),
    envvar="UPDRAFT_DATA",
    show_envvar=True,
    default=lambda: data_folder(os.environ),
    help="Folder for all data and logs; the next start continues from it.  [default: ~/.local/share/updraft]",
)
@click.option("--port", type=PORT, default=8000, show_default=True, help="HTTP port (OpenAI API); 0 takes a free one.")
@click.option("--registry-port", type=PORT, default=50051, show_default=True, help="gRPC port; 0 takes a free one.")
@click.option("--redis-url", help="Your own Redis, redis://host:port/db.  [default: a private one, on a unix socket]")
@click.option("--slots", type=click.IntRange(1), help="Requests served at the same time.  [default: 8]")
@click.option("--threads", type=click.IntRange(0), help="Threads of inference.  [default: chosen by torch]")
@click.option("--trainer-threads", type=click.IntRange(1), help="Threads of the trainer.  [default: 1]")
@click.option("--trainer/--no-trainer", default=True, help="Learn from the traffic, or only serve.  [default: learn]")
@click.option(
    "--strategy",
    type=click.Choice([term.value for term in Strategy], case_sensitive=False),
    help="How a new draft that passed the offline gate comes to serve.  [default: Immediate]",
)
@click.option(
    "--drafter",
    type=click.Choice(["auto", "none", "ngram", "eagle3", "hybrid"]),
    help="Drafter of requests that do not choose one. auto: the learned draft mixed with n-gram lookup.  [default: auto]",
)
@click.option("--lookahead", type=click.IntRange(0, 16), help="Maximum draft tokens per step.  [default: 3]")
@click.option(
    "--engine", type=click.Choice(["torch", "sglang", "vllm"]), help="Engine that runs the model.  [default: torch]"
)
@click.option(
    "--sglang-python",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    envvar="UPDRAFT_SGLANG_PYTHON",
    show_envvar=True,
    help="With --engine sglang: a Python interpreter with SGLang, which starts the server. Clients use the server's own port.",
)
@click.option(
    "--vllm-python",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    envvar="UPDRAFT_VLLM_PYTHON",
    show_envvar=True,
    help="With --engine vllm: a Python interpreter with vLLM, which starts the server. Clients use the server's own port.",
)
@click.option(
    "--set",
    "settings",
    metavar="KEY=VALUE",
    multiple=True,
    callback=_settings,
    help="Any other setting, e.g. UPDRAFT_TRAINER_LEARNING_RATE=1e-4. Repeatable.",
)
def up(model: Path | None, trainer: bool, **options: Any) -> None:  # noqa: FBT001 - a flag of the command line
    """Run the whole loop on this machine.

    Starts Redis, the registry, the trainer and inference as separate processes, waits until they are ready, prints the
    address of the console and their logs, and restarts any that ends. Ctrl-C stops in order: running requests finish, and
    the trainer saves. A second Ctrl-C stops at once. In both cases, the next start on the same data folder continues from
    there.
    """
    config = StackConfig(
        model=model or fetched(cache_folder(os.environ)),
        model_name=None if model else SMOLLM2.name,
        trainer=trainer,
        **options,
    )
    terminal = Terminal(Console())
    stack = Stack(config, listener=terminal.listen)
    try:
        with _interrupted_by_signals(terminal, stack.kill), stack, noted(config.data, os.environ):
            terminal.welcome(stack)
            point = partial(terminal.point_to_console, stack.folder.path)
            with console(stack.folder.path, stack.addresses.registry, point, terminal.print):
                threading.Event().wait()
    except KeyboardInterrupt:
        terminal.print("Everything has stopped. The data is kept.")


@contextmanager
def _interrupted_by_signals(terminal: Terminal, kill: Callable[[], None]) -> Iterator[None]:
    """Raise KeyboardInterrupt in the block at the first signal; call `kill` at every further one."""
    num_signals = 0

    def on_signal(_signum: int, _frame: FrameType | None) -> None:
        nonlocal num_signals
        num_signals += 1
        if num_signals == 1:
            terminal.print("Stopping: requests finish, and the trainer saves. Ctrl-C again stops at once.")
            raise KeyboardInterrupt
        # In a thread: this handler may have interrupted code that holds a lock which killing needs.
        threading.Thread(target=kill, name="kill").start()

    replaced = {
        signum: signal.signal(signum, on_signal)
        for signum in _SIGNALS
        if signal.getsignal(signum) is not signal.SIG_IGN
    }
    try:
        yield
    finally:
        for signum, handler in replaced.items():
            signal.signal(signum, handler)
