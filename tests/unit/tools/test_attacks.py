"""The table of attacks comes from tests that exist, and from nothing else."""

from pathlib import Path

import pytest
from tools import attacks
from tools.attacks import BOUNDARIES, MarkError

CHECKOUT = Path(__file__).parents[3]

SOUND = """
import pytest

@pytest.mark.attack(boundary="registry", attack="a call | without a token", outcome="it is refused")
@pytest.mark.attack(boundary="client", attack="a slow client", outcome="it is disconnected")
@pytest.mark.parametrize("a", [1])
async def test_it(a): ...

def test_another(): ...
"""


def checkout(folder: Path, source: str) -> Path:
    (folder / "tests").mkdir()
    (folder / "tests" / "test_it.py").write_text(source)
    return folder


def test_a_marked_test_is_a_row_of_its_boundary_and_links_to_its_file(tmp_path: Path) -> None:
    attacks.write(checkout(tmp_path, SOUND), tmp_path)
    page = (tmp_path / "docs" / "security.md").read_text()
    titles = [line[3:] for line in page.splitlines() if line.startswith("## ")]
    assert titles == [BOUNDARIES["client"][0], BOUNDARIES["registry"][0]]
    assert "| a call \\| without a token | it is refused | [test_it](../tests/test_it.py) |" in page


@pytest.mark.parametrize(
    ("mark", "why"),
    [
        ('(boundary="moon", attack="a", outcome="b")', "moon is none of client, plugin"),
        ('(boundary="client", attack="a")', "with boundary, attack, outcome as plain text"),
        ('(boundary="client", attack="a", outcome="b", more="c")', "with boundary, attack, outcome"),
        ('("client", "a", "b")', "with boundary, attack, outcome"),
        ('(boundary="client", attack=f"{1}", outcome="b")', "as plain text"),
        ('(boundary="client", attack="a", outcome="")', "as plain text"),
        ("", "with boundary, attack, outcome"),
    ],
)
def test_a_mark_that_makes_no_row_is_an_error_with_its_line(tmp_path: Path, mark: str, why: str) -> None:
    source = f"import pytest\n\n@pytest.mark.attack{mark}\ndef test_it(): ...\n"
    with pytest.raises(MarkError, match=f"tests/test_it.py:3: .*{why}"):
        attacks.collect(checkout(tmp_path, source))


def test_a_mark_on_what_is_no_test_is_an_error(tmp_path: Path) -> None:
    source = SOUND.replace("test_it", "helper")
    with pytest.raises(MarkError, match="an attack is marked on a test"):
        attacks.collect(checkout(tmp_path, source))


def test_every_boundary_has_an_attack_and_no_row_comes_twice() -> None:
    found = attacks.collect(CHECKOUT)
    assert {attack.boundary for attack in found} == set(BOUNDARIES)
    said = [(attack.boundary, attack.attack) for attack in found]
    assert len(said) == len(set(said))
