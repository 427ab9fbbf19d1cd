from pathlib import Path

from tools.generated import differences


def write(root: Path, **files: str) -> Path:
    for name, text in {"proto/a/x.proto": "source", "proto/a/__init__.py": "", **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_a_checkout_with_the_same_generated_files_is_up_to_date_whatever_else_it_holds(tmp_path: Path) -> None:
    files = {"proto/a/x_pb2.py": "code", "docs/reference/settings.md": "page"}
    fresh = write(tmp_path / "fresh", **files)
    checkout = write(tmp_path / "checkout", **files, **{"docs/concepts.md": "prose", "proto/a/y.proto": "source"})
    assert differences(fresh, checkout) == []


def test_what_was_changed_is_missing_or_left_over_is_named(tmp_path: Path) -> None:
    fresh = write(
        tmp_path / "fresh",
        **{"proto/a/x_pb2.py": "new", "proto/a/x_pb2.pyi": "missing", "docs/reference/settings.md": "same"},
    )
    checkout = write(
        tmp_path / "checkout",
        **{"proto/a/x_pb2.py": "old", "proto/a/gone_pb2_grpc.py": "left", "docs/reference/settings.md": "same"},
    )
    assert differences(fresh, checkout) == ["proto/a/gone_pb2_grpc.py", "proto/a/x_pb2.py", "proto/a/x_pb2.pyi"]
