from pathlib import Path

import pytest
from tests.support.tiny_tokenizer import write_tokenizer

from updraft_chassis.errors import InvalidInput
from updraft_inference.text.chat_template import ChatTemplate

HELLO = [{"role": "user", "content": "Hello"}]


def test_messages_become_the_prompt_of_the_folders_template(tmp_path: Path) -> None:
    template = ChatTemplate.open(write_tokenizer(tmp_path))

    assert template is not None
    assert template.render(HELLO) == "<|start|>user\nHello<|end|>\n<|start|>assistant\n"


def test_a_template_in_a_file_of_its_own_wins(tmp_path: Path) -> None:
    (write_tokenizer(tmp_path) / "chat_template.jinja").write_text("{{ bos_token }}!")

    template = ChatTemplate.open(tmp_path)

    assert template is not None
    assert template.render(HELLO) == "<|start|>!"


def test_a_folder_without_a_template_has_none(tmp_path: Path) -> None:
    assert ChatTemplate.open(write_tokenizer(tmp_path, template=None)) is None


def test_blocks_leave_no_blank_lines() -> None:
    template = ChatTemplate("{% if true %}\n  {% for m in messages %}\nx\n  {% endfor %}\n{% endif %}\n")

    assert template.render(HELLO) == "x\n"


def test_the_names_of_hugging_face_are_there() -> None:
    template = ChatTemplate(
        "{{ messages | tojson(indent=1) }}{{ strftime_now('%Y') | length }}"
        "{% generation %}g{% endgeneration %}{% for m in messages %}{% break %}{% endfor %}"
    )

    assert template.render([{"role": "user", "content": "<é>"}]).endswith('"content": "<é>"\n }\n]4g')


def test_a_template_that_refuses_says_why() -> None:
    template = ChatTemplate("{{ raise_exception('roles must alternate') }}")

    with pytest.raises(InvalidInput, match="roles must alternate"):
        template.render(HELLO)


@pytest.mark.parametrize(
    "source",
    [
        pytest.param("{{ messages.append(1) }}", id="changes its input"),
        pytest.param("{{ ''.__class__.__mro__[1].__subclasses__() }}", id="reaches for the interpreter"),
        pytest.param("{{ messages[0].content + 1 }}", id="fails"),
    ],
)
def test_a_template_that_misbehaves_is_an_error_of_the_request(source: str) -> None:
    with pytest.raises(InvalidInput, match="rejects these messages"):
        ChatTemplate(source).render(HELLO)


def test_a_template_that_is_none_is_told_at_the_start() -> None:
    with pytest.raises(InvalidInput, match="not valid jinja2"):
        ChatTemplate("{% if %}")
