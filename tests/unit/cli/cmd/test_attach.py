"""`updraft attach`, which prints what a server of the user needs."""

from click.testing import CliRunner

from updraft_cli.cmd.attach.server import attach


def printed(*arguments: str) -> str:
    return CliRunner().invoke(attach, arguments, catch_exceptions=False).output


def test_only_for_several_ranks_an_admin_key_and_an_address_are_printed() -> None:
    one, several = printed("--engine", "sglang"), printed("--engine", "sglang", "--tensor-parallel-size", "4")

    for part in ("--admin-key-file", "--tp-size 4 --config", "--attach http://127.0.0.1:30000"):
        assert part in several
        assert part not in one


def test_several_ranks_of_vllm_need_one_argument_and_no_key() -> None:
    one, several = printed("--engine", "vllm"), printed("--engine", "vllm", "--tensor-parallel-size", "2")

    assert several.replace(" --tensor-parallel-size 2", "") == one
    assert several != one
