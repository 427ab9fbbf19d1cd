"""`updraft demo`."""

import os
from pathlib import Path
from typing import Any

import click
import psutil
from rich.console import Console

from updraft_cli.cmd.model import fetched
from updraft_cli.local.folders import cache_folder
from updraft_cli.models.smollm2 import SMOLLM2


@click.command(short_help="Watch a draft learn, and get a report.")
@click.option("--minutes", type=click.FloatRange(0.5, 120), default=9.0, show_default=True, help="Length of the run.")
@click.option("--streams", type=click.IntRange(1, 8), default=4, show_default=True, help="Concurrent live requests.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the choice and order of the prompts.")
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("demo-report"),
    show_default=True,
    help="Folder for report.html and report.json.",
)
@click.option(
    "--data",
    type=click.Path(path_type=Path, file_okay=False),
    help="Empty folder that keeps versions, samples and logs.  [default: a temporary one]",
)
@click.option("--check", is_flag=True, help="Exit with 1 if a bar is missed.")
@click.option(
    "--started", type=float, envvar="UPDRAFT_DEMO_STARTED", hidden=True, help="Start of the set-up, Unix time."
)
def demo(*, out: Path, data: Path | None, check: bool, started: float | None, **plan: Any) -> None:
    """Watch a draft learn from real prompts while the traffic shifts and returns, and get a report of the gain.

    Starts the whole loop on this machine without any draft, and sends code prompts, then mathematics, then code again. In the
    same run, it measures the learning draft against no speculation, n-gram lookup, and the draft frozen at the shift. Ctrl-C
    stops it; the report then has the measurements so far.
    """
    # The report's libraries and the prompts take a second to import, which no other command should pay for.
    from updraft_cli.demo import outcome, run  # noqa: PLC0415
    from updraft_cli.demo.plan import make_plan  # noqa: PLC0415
    from updraft_cli.ui.server import has_scripts  # noqa: PLC0415

    console = Console(highlight=False)
    options = run.Options(
        plan=make_plan(**plan),
        model=fetched(cache_folder(os.environ)),
        model_name=SMOLLM2.name,
        out=out,
        data=data,
        started_unix_s=psutil.Process().create_time() if started is None else started,
    )
    report, page = run.run(options, console)
    outcome.show(console, report, page)
    if not has_scripts():
        click.echo("The report has tables instead of charts: this program was built without npm.", err=True)
    if check and not all(bar.met for bar in report.bars):
        raise SystemExit(1)
