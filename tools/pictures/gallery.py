"""All pictures by the name of their file in docs/images."""

from pathlib import Path

from tools.pictures import charts, gate, loop, speculation, swap

_BENCHMARKS = Path(__file__).parents[2] / "docs" / "benchmarks.md"


def drawn() -> dict[str, str]:
    """File names, and the SVG that belongs into each."""
    page = _BENCHMARKS.read_text(encoding="utf-8")
    return {
        "speculation.svg": speculation.picture(),
        "loop.svg": loop.picture(),
        "gate.svg": gate.picture(),
        "swap.svg": swap.picture(),
        "benchmark-demo.svg": charts.demo(page),
        "benchmark-learning.svg": charts.learning(page),
        "benchmark-default-drafter.svg": charts.default_drafter(page),
        "benchmark-fleet.svg": charts.fleet(page),
    }
