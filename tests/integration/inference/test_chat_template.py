"""The prompt of a chat is the one that `transformers` would build."""

from pathlib import Path

import pytest
from tests.support.tiny_tokenizer import TEMPLATE, write_tokenizer
from transformers import PreTrainedTokenizerFast

from updraft_inference.text.chat_template import ChatTemplate
from updraft_inference.text.tokenization import Tokenizer

MESSAGES = [
    {"role": "system", "content": "Be brief.\n"},
    {"role": "user", "content": " <b>é</b> {{ not code }} 'quoted' "},
    {"role": "assistant", "content": ""},
    {"role": "user", "content": "go on\n\n"},
]
BLOCKS = """\
{%- set ns = namespace(found=false) -%}
{% for message in messages %}
    {% if message['role'] == 'system' %}
        {% set ns.found = true %}
<<SYS>>{{ message.content | trim }}<</SYS>>
    {% elif loop.index0 % 2 == 0 %}
        {% continue %}
    {% else %}
{{ bos_token }}{{ message | tojson }}{{ eos_token }}
    {% endif %}
{% endfor %}
{% if not tools and add_generation_prompt %}[{{ ns.found }}]
{% endif %}
"""


@pytest.mark.parametrize("template", [pytest.param(TEMPLATE, id="one line"), pytest.param(BLOCKS, id="blocks")])
def test_rendering_and_tokens_agree(tmp_path: Path, template: str) -> None:
    folder = write_tokenizer(tmp_path / "tiny", template=template)
    reference = PreTrainedTokenizerFast.from_pretrained(folder)
    ours = ChatTemplate.open(folder)
    assert ours is not None

    prompt = ours.render(MESSAGES)

    assert prompt == reference.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    expected = reference.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=False)
    assert list(Tokenizer.open(folder).encode(prompt, add_special_tokens=False)) == expected
