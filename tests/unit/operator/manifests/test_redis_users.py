import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
from pydantic import SecretStr

from updraft_chassis.streams import connect
from updraft_operator.manifests.redis_users import (
    RedisUser,
    Role,
    address_problem,
    hashed,
    password_of,
    rules,
    speculator_of,
    user_name,
    user_url,
)
from updraft_operator.settings import OperatorSettings

INSTALL = Path(__file__).parents[4] / "docs" / "install.md"
PASSWORD = 64 * "7"
NAME = user_name("6f1c", "team", "chat", Role.WRITER)


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        pytest.param("redis://h:6379/0", "redis://USER@h:6379/0", id="no password"),
        pytest.param("redis://:secret@h:6379/0", "redis://USER@h:6379/0", id="password"),
        pytest.param("rediss://admin:s%40cret@h/1?ssl_ca_certs=/ca", "rediss://USER@h/1?ssl_ca_certs=%2Fca", id="TLS"),
        pytest.param("redis+cluster://admin:a@b@h:7000", "redis+cluster://USER@h:7000", id="cluster"),
        pytest.param("redis://h?username=admin&password=secret&db=1", "redis://USER@h?db=1", id="in parameters"),
        pytest.param("rediss://h/0?ssl_password=secret&other=secret", "rediss://USER@h/0", id="unknown parameters"),
        pytest.param("redis://h/0#secret", "redis://USER@h/0", id="fragment"),
        pytest.param("redis://admin:secret@[::1]:6379", "redis://USER@[::1]:6379", id="IPv6"),
        pytest.param("unix://admin:secret@/run/redis.sock?db=2", "unix://USER@/run/redis.sock?db=2", id="socket"),
    ],
)
def test_the_address_of_a_user_has_nothing_of_the_administrator(url: str, expected: str) -> None:
    made = user_url(url, NAME, PASSWORD)
    assert made == expected.replace("USER", f"{NAME}:{PASSWORD}")
    assert "secret" not in made
    assert "admin" not in made
    assert address_problem(url) == ""


@pytest.mark.parametrize(
    "url",
    [
        *("redis://:/Ab9@h:6379/0", "redis://:12#x@h", "redis://:12?x@h", "redis://:Ab9#x@h", "redis://:[Ab9@h"),
        *("redis://admin:12/Ab9@h", "redis://admin:12?Ab9@h", "redis://admin:12#Ab9@h", "redis://admin/Ab9@h"),
        *("rediss+cluster://:/Ab9@h:7000", "unix://:Ab9/x@/run/redis.sock", "redis:///0", "h:6379"),
    ],
)
def test_an_address_whose_password_may_be_taken_for_something_else_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="percent-encode special characters of the password") as raised:
        OperatorSettings(redis_url=SecretStr(url))
    assert url not in str(raised.value)
    assert "Ab9" not in str(raised.value)


def test_an_operator_without_redis_needs_no_address() -> None:
    assert not OperatorSettings(redis_url=SecretStr("")).config.has_redis


async def test_a_client_takes_user_and_password_from_the_address() -> None:
    client = connect(user_url("redis://:secret@h:6379/3", NAME, PASSWORD))
    given = client.get_connection_kwargs()
    assert {name: given[name] for name in ("username", "password", "host", "db")} == {
        "username": NAME,
        "password": PASSWORD,
        "host": "h",
        "db": 3,
    }
    await client.aclose()


def test_only_a_password_that_was_made_for_a_user_is_used_again() -> None:
    assert password_of(user_url("redis://h", NAME, PASSWORD)) == PASSWORD
    for url in ("", "redis://h", "redis://:short@h", f"redis://:{PASSWORD}7@h", "redis://[", "not an address"):
        assert password_of(url) == ""


def test_the_user_of_a_speculator_is_known_by_its_name() -> None:
    assert speculator_of(NAME, "6f1c") == ("team", "chat")
    for name in ("default", NAME, f"{NAME}.more", "updraft.6f1c.team.chat.admin", "updraft.6f1c.team.writer"):
        assert speculator_of(name, "another") is None
    assert speculator_of("updraft.6f1c.team.chat.admin", "6f1c") is None
    assert speculator_of("updraft.6f1c.team.writer", "6f1c") is None


def test_nothing_of_a_user_stays_but_passwords_that_pods_may_still_have() -> None:
    user = RedisUser(name=NAME, rules=rules(Role.WRITER, "6f1c:team", "chat"), password_hash=hashed(PASSWORD))
    own, former = f"#{user.password_hash}", f"#{hashed('former')}"
    assert user.words([hashed("former")]) == ("reset", "on", own, *user.rules)
    during_a_change = replace(user, keeps_former=True).words([hashed("former")])
    assert during_a_change == ("reset", "on", *sorted((own, former)), *user.rules)


@pytest.mark.parametrize(("user", "role"), [("chat-pods", Role.WRITER), ("chat-trainer", Role.READER)])
def test_the_users_that_people_make_by_hand_are_described_as_the_operator_makes_them(user: str, role: Role) -> None:
    _, _, command = INSTALL.read_text(encoding="utf-8").partition(f"ACL SETUSER {user} on '>PASSWORD' ")
    command = re.split(r"\n(?:\$|```)", command)[0].replace("\\\n", " ")
    assert shlex.split(command) == list(rules(role, "UID:NAMESPACE", "chat"))
