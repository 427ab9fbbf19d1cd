"""A drawing of rectangles, lines and texts as SVG, which a browser shows in the reader's light or dark scheme.

Colors are names of roles ("good"), not values, so both schemes are written once, here. The background is transparent.
"""

from collections.abc import Iterable, Sequence
from html import escape

LIGHT = {
    "ink": "#1f2328", "quiet": "#59636e", "line": "#c3cad2", "card": "#f3f5f7", "good": "#1a7f37", "good-soft": "#dafbe1",
    "bad": "#cf222e", "bad-soft": "#ffebe9", "target": "#0969da", "target-soft": "#ddf4ff", "warm": "#9a6700",
    "warm-soft": "#fff8c5", "plum": "#8250df", "plum-soft": "#fbefff",
}  # fmt: skip
DARK = {
    "ink": "#e6edf3", "quiet": "#9aa4af", "line": "#49525d", "card": "#262c34", "good": "#4ac26b", "good-soft": "#12351f",
    "bad": "#ff7b72", "bad-soft": "#43191a", "target": "#6cb6ff", "target-soft": "#0d2d4f", "warm": "#d9a621",
    "warm-soft": "#3a2c05", "plum": "#c297ff", "plum-soft": "#2f1f4a",
}  # fmt: skip
WIDTH = 880
MONOSPACE = 'ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace'
SANS = 'system-ui, -apple-system, "Segoe UI", "Noto Sans", "DejaVu Sans", Helvetica, Arial, sans-serif'

Point = tuple[float, float]


class Drawing:
    """Collects elements; `render` gives the file. Coordinates are in units of which the picture is `WIDTH` wide."""

    def __init__(self, title: str, height: float) -> None:
        self._title = title
        self._height = height
        self._elements: list[str] = []

    def text(self, at: Point, content: str, *, color: str = "ink", size: float = 14, style: str = "") -> None:
        """`style` is a list of words: middle or end (which part of the text is at the point), bold, mono, upward."""
        words = set(style.split())
        anchor = next((f' text-anchor="{word}"' for word in ("middle", "end") if word in words), "")
        weight = ' font-weight="600"' if "bold" in words else ""
        family = ' class="mono"' if "mono" in words else ""
        x, y = _number(at[0]), _number(at[1])
        turn = f' transform="rotate(-90 {x} {y})"' if "upward" in words else ""
        attributes = f'x="{x}" y="{y}" font-size="{_number(size)}" fill="var(--{color})"{anchor}{weight}{family}{turn}'
        self._elements.append(f'<text {attributes} xml:space="preserve">{escape(content, quote=False)}</text>')

    def lines(
        self, at: Point, contents: Sequence[str], *, color: str = "quiet", size: float = 13, style: str = ""
    ) -> None:
        """Several lines of text, the first at the point."""
        for number, content in enumerate(contents):
            self.text((at[0], at[1] + number * size * 1.35), content, color=color, size=size, style=style)

    def box(self, at: Point, size: Point, *, fill: str = "none", stroke: str = "none", dashed: bool = False) -> None:
        paint = f'fill="{_paint(fill)}" stroke="{_paint(stroke)}"{_dashes(dashed=dashed)}'
        x, y, width, height = map(_number, (*at, *size))
        self._elements.append(f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="5" {paint}/>')

    def bar(self, at: Point, size: Point, *, fill: str) -> None:
        """A rectangle with sharp corners, whose size means something."""
        x, y, width, height = map(_number, (*at, *size))
        self._elements.append(f'<rect x="{x}" y="{y}" width="{width}" height="{height}" fill="{_paint(fill)}"/>')

    def line(
        self,
        points: Iterable[Point],
        *,
        color: str = "line",
        width: float = 1,
        dashed: bool = False,
        arrow: bool = False,
    ) -> None:
        path = " L ".join(f"{_number(x)} {_number(y)}" for x, y in points)
        head = f' marker-end="url(#{color}-head)"' if arrow else ""
        paint = f'fill="none" stroke="var(--{color})" stroke-width="{_number(width)}"{_dashes(dashed=dashed)}{head}'
        self._elements.append(f'<path d="M {path}" {paint}/>')

    def dot(self, at: Point, *, color: str, radius: float = 4) -> None:
        x, y = map(_number, at)
        self._elements.append(f'<circle cx="{x}" cy="{y}" r="{_number(radius)}" fill="var(--{color})"/>')

    def render(self) -> str:
        size = f'viewBox="0 0 {WIDTH} {_number(self._height)}" role="img" aria-label="{escape(self._title)}"'
        heads = "".join(_head(color) for color in ("ink", "quiet", "good", "target", "warm", "plum"))
        return "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" {size}>',
                f"<title>{escape(self._title, quote=False)}</title>",
                "<style>",
                f"svg {{ {_variables(LIGHT)} font-family: {SANS}; }}",
                f"@media (prefers-color-scheme: dark) {{ svg {{ {_variables(DARK)} }} }}",
                f".mono {{ font-family: {MONOSPACE}; }}",
                "</style>",
                f"<defs>{heads}</defs>",
                *self._elements,
                "</svg>\n",
            ]
        )


def _number(value: float) -> str:
    """At most one decimal, so that files are equal wherever they are made."""
    return f"{round(value, 1) + 0.0:g}"


def _paint(color: str) -> str:
    return color if color == "none" else f"var(--{color})"


def _dashes(*, dashed: bool) -> str:
    return ' stroke-dasharray="4 3"' if dashed else ""


def _variables(colors: dict[str, str]) -> str:
    return " ".join(f"--{name}: {value};" for name, value in colors.items())


def _head(color: str) -> str:
    size = 'viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto"'
    return f'<marker id="{color}-head" {size}><path d="M 0 0 L 8 4 L 0 8 z" fill="var(--{color})"/></marker>'
