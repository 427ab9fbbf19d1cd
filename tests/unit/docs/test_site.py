"""The documentation site: every page is in its navigation, and links lead to the same places as in the checkout."""

from pathlib import Path

import pytest
from tools.docsite import navigation
from tools.docsite.__main__ import pages_that_load_from_another_host
from tools.docsite.paths import on_site
from tools.docsite.stage import BrokenLinkError, stage, staged

ROOT = Path(__file__).parents[3]


def test_every_page_of_the_docs_is_in_the_navigation_once() -> None:
    pages = {path.relative_to(ROOT) for path in (ROOT / "docs").rglob("*.md")}
    listed = navigation.sources(ROOT)
    assert pages - set(listed) == set()
    assert len(listed) == len(set(listed))


def test_no_two_pages_have_the_same_place() -> None:
    places = [on_site(path) for path in navigation.sources(ROOT)]
    assert len(places) == len(set(places))


def test_sections_list_pages_by_their_headings() -> None:
    reference = next(entry["Reference"] for entry in navigation.entries(ROOT) if "Reference" in entry)
    assert {"Settings": "reference/settings.md"} in reference
    assert {"The updraft command": "reference/cli.md"} in reference


def test_a_page_that_the_navigation_names_must_exist(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"names README\.md"):
        navigation.sources(tmp_path)


@pytest.mark.parametrize(
    ("path", "place"),
    [
        ("README.md", "index.md"),
        ("docs/gate.md", "gate.md"),
        ("docs/adr/README.md", "adr/index.md"),
        ("docs/images/loop.svg", "images/loop.svg"),
        ("CONTRIBUTING.md", "contributing.md"),
        ("SECURITY.md", "threat-model.md"),
        ("bench/gate/README.md", "bench/gate/readme.md"),
        ("operator", "source/operator.md"),
        ("proto/updraft/fleet/v1/fleet.proto", "source/proto/updraft/fleet/v1/fleet.proto.md"),
    ],
)
def test_a_file_has_a_place_on_the_site(path: str, place: str) -> None:
    assert on_site(Path(path)) == Path(place)


def test_links_are_those_of_the_site_and_code_stays_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "docs" / "adr").mkdir(parents=True)
    (tmp_path / "operator").mkdir()
    (tmp_path / "docs" / "gate.md").write_text("# Gate\n")
    page = tmp_path / "docs" / "adr" / "README.md"
    page.write_text(
        "[gate](../gate.md#why), [`it`](../../operator) `[x](../no.md)` [web](https://a.b) [here](#x)\n```\n[y](no)\n```\n"
    )

    text, linked = staged(tmp_path, Path("docs/adr/README.md"))

    assert text.decode() == (
        "[gate](../gate.md#why), [`it`](../source/operator.md) `[x](../no.md)` [web](https://a.b) [here](#x)\n"
        "```\n[y](no)\n```\n"
    )
    assert linked == {Path("docs/gate.md"), Path("operator")}


def test_a_list_of_the_pages_own_headings_is_left_to_the_site(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("# A\n\n- [B](#b)\n- [C](#c)\n\n## B\n")
    text, _ = staged(tmp_path, Path("a.md"))
    assert text.decode() == "# A\n\n## B\n"


def test_code_in_a_table_shows_no_escapes(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("| `[a\\|b]` | c \\| d |\n\n`e\\|f`\n")
    text, _ = staged(tmp_path, Path("a.md"))
    assert text.decode() == "| `[a|b]` | c \\| d |\n\n`e\\|f`\n"


def test_a_link_to_nothing_is_an_error_that_names_the_page(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("[b](b.md)")
    with pytest.raises(BrokenLinkError, match=r"a\.md links to b\.md, which does not exist"):
        staged(tmp_path, Path("a.md"))


def test_a_listing_is_fenced_so_that_no_fence_in_it_ends_it(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("text = '''\n```\n````\n'''\n")
    text, _ = staged(tmp_path, Path("a.py"))
    assert "\n`````python\ntext" in text.decode()


def test_a_folder_is_a_table_of_its_modules_and_their_purpose(tmp_path: Path) -> None:
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "gate.py").write_text('"""Decides | waits.\n\nMore."""\n')
    (tmp_path / "part" / "made.py").write_text("x = 1\n")
    text, _ = staged(tmp_path, Path("part"))
    assert text.decode().endswith("| `gate.py` | Decides \\| waits. |\n")


def test_the_whole_site_is_staged_and_a_second_time_nothing_is_written(tmp_path: Path) -> None:
    num_files = stage(ROOT, tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    assert len(before) == num_files
    (tmp_path / "pages" / "stale.md").touch()

    assert stage(ROOT, tmp_path) == num_files

    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("element", "is_remote"),
    [
        ('<script src="https://cdn.example/x.js"></script>', True),
        ('<link rel="stylesheet" href="//fonts.example/css">', True),
        ('<img alt="a" src="http://a.b/c.png">', True),
        ('<a href="https://arxiv.org/abs/2211.17192">a reader follows it</a>', False),
        ('<script src="assets/x.js"></script>', False),
    ],
)
def test_a_page_that_loads_something_from_another_host_is_found(
    tmp_path: Path, element: str, *, is_remote: bool
) -> None:
    (tmp_path / "page.html").write_text(f"<html>{element}</html>")
    assert pages_that_load_from_another_host(tmp_path) == (["page.html"] if is_remote else [])
