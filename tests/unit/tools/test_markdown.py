from tools import markdown

WORDS = " ".join(["word"] * 60)


def test_a_wide_paragraph_is_wrapped_and_keeps_its_words() -> None:
    page = markdown.wrapped(WORDS)
    assert max(map(len, page.splitlines())) <= markdown.WIDTH
    assert page.split() == WORDS.split()


def test_a_wide_item_of_a_list_continues_below_its_text() -> None:
    first, second = markdown.wrapped("- " + WORDS).splitlines()[:2]
    assert first.startswith("- word")
    assert second.startswith("  word")


def test_tables_code_and_headings_stay_as_they_are() -> None:
    page = f"# {WORDS}\n\n| {WORDS} |\n\n```\n{WORDS}\n```\n"
    assert markdown.wrapped(page) == page
