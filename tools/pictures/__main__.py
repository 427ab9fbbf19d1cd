"""Writes the pictures of the docs: `make pictures`. A test compares them with what this writes."""

from pathlib import Path

from tools.pictures.gallery import drawn

IMAGES = Path(__file__).parents[2] / "docs" / "images"


def main() -> None:
    """Write every picture into docs/images."""
    for name, text in drawn().items():
        (IMAGES / name).write_text(text, encoding="utf-8")
        print(f"wrote docs/images/{name}")


if __name__ == "__main__":
    main()
