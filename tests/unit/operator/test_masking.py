"""Last words of containers become conditions, which more people may read than Secrets."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from updraft_operator.masking import masked
from updraft_operator.planning.pods import PodState

SECRET = "Zk3xQ9vLw8RtY2mB"  # noqa: S105 - of this test
RANDOM = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"


@pytest.mark.attack(
    boundary="text",
    attack="reading a password, key or token from the last words of a container that failed, in a condition",
    outcome="it is masked; what failed is still said",
)
@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (
            f"cannot connect to redis://updraft:6f1c:{SECRET}@redis:6379/0: refused",
            "cannot connect to redis://***@redis:6379/0: refused",
        ),
        (f"proxy http://me:{SECRET}@proxy.example:3128 failed", "proxy http://***@proxy.example:3128 failed"),
        (f"401 for Authorization: Bearer {SECRET}", "401 for Authorization: Bearer ***"),
        (f"sent bearer {SECRET}", "sent bearer ***"),
        (f"HF_TOKEN={SECRET} is not valid", "HF_TOKEN=*** is not valid"),
        (f'{{"api_key": "{SECRET}", "model": "m"}}', '{"api_key": "***", "model": "m"}'),
        (f"started with --password {SECRET} --port 80", "started with --password *** --port 80"),
        (f"GET /b?X-Amz-Signature={SECRET}&x=1: 403", "GET /b?X-Amz-Signature=***&x=1: 403"),
        (f"key hf_{SECRET} was refused", "key *** was refused"),
        (f"key sk-{SECRET} was refused", "key *** was refused"),
        ("key AKIAIOSFODNN7EXAMPLE was refused", "key *** was refused"),
        (f"the token eyJhbGciOi.eyJpc3Mi.{SECRET}", "the token ***"),
        (f"read {RANDOM} from a file", "read *** from a file"),
    ],
)
def test_a_secret_in_last_words_is_masked(words: str, shown: str) -> None:
    ended = {"terminated": {"exitCode": 1, "reason": "Error", "message": f"Traceback\n{words}\n"}}
    container = {"name": "inference", "image": "i", "ready": False, "restartCount": 1, "state": ended}
    body = {"metadata": {"name": "qwen-serving-1"}, "status": {"containerStatuses": [container]}}
    problem = PodState.of(body).problem
    assert problem is not None
    assert problem.message == f"inference exited with status 1: {shown}, 1 restarts"


@pytest.mark.parametrize(
    "words",
    [
        "401 Unauthorized for https://huggingface.co/org/model",
        "the weights are sha256:9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
        "image registry.example/updraft@sha256:9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
        "No such file: /models/target/model-00001-of-00002.safetensors",
        "CUDA out of memory. Tried to allocate 2.00 GiB",
        "UPDRAFT_INFERENCE_MODEL: field required",
        "0/3 nodes are available: 3 Insufficient nvidia.com/gpu.",
        "the tokenizer has 151936 tokens, the model 152064",
    ],
)
def test_what_is_no_secret_is_shown(words: str) -> None:
    assert masked(words) == words


@pytest.mark.attack(
    boundary="text",
    attack="control characters and line breaks in the last words of a container",
    outcome="they become spaces in one printable line",
)
@given(st.text(max_size=300))
def test_a_message_is_one_printable_line(text: str) -> None:
    assert masked(text).isprintable()
