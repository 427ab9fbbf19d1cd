"""A person decides, by `updraft draft` and `updraft rollout`, against a real registry; a speculator for each test."""

import asyncio
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner, Result
from tests.integration.cli.conftest import Run
from tests.support import checkpoints, families
from tests.support.certificates import Authority
from tests.support.ports import free_port
from tests.support.published_drafts import SPECFORGE, SPECULATORS, Reference, write
from tests.support.registry import RegistryProcess, client, publish
from tests.support.wait import LONG_S

from updraft.registry.v1 import registry_pb2 as pb
from updraft_cli.__main__ import cli
from updraft_draft import checkpoint as drafts

_numbers = itertools.count()


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RegistryProcess]:
    """A registry without pods that promotes what passes its gate."""
    with RegistryProcess(tmp_path_factory.mktemp("registry")) as process:
        yield process


@pytest.fixture
def name(registry: RegistryProcess) -> str:
    """A speculator of the test's own: version 2 won, version 3 waits for a person."""
    name = f"speculator-{next(_numbers)}"
    asyncio.run(_publish(registry.address, name))
    return name


@pytest.fixture
def ask(run: Run, registry: RegistryProcess, name: str) -> Run:
    return lambda *arguments: run(*arguments, "--registry", registry.address, "--speculator", name)


def test_promote_makes_a_waiting_version_stable_and_later_ones_are_tried_as_usual(ask: Run, name: str) -> None:
    promoted = ask("draft", "promote", "latest", "--reason", "measured elsewhere")
    assert promoted.output == f"Version 3 is promoted for {name}: version 3 is stable\n"
    assert "promoted: measured elsewhere" in ask("draft", "history", "3").output


def test_a_rejected_version_is_never_served_again(ask: Run, name: str) -> None:
    assert ask("draft", "reject", "stable", "--yes", "--reason", "bad").output == (
        f"Version 2 is rejected for {name}: version 1 is stable; version 3 is held:"
        " it has no evaluation: promote it to serve it\n"
    )
    for decision in ("pin", "promote"):
        refused = ask("draft", decision, "2")
        assert refused.exit_code == 1
        assert "never serves again: rejected: bad" in refused.output
        assert refused.output.count("\n") == 1


def test_away_from_a_terminal_nothing_is_asked(ask: Run, name: str) -> None:
    assert ask("draft", "reject", "3").output.startswith(f"Version 3 is rejected for {name}: ")


def test_on_a_terminal_a_rejection_is_asked_for(registry: RegistryProcess, name: str) -> None:
    reject = ["draft", "reject", "3", "--registry", registry.address, "--speculator", name]
    refused = _on_terminal(*reject, typed="n\n")
    assert "Version 3 of " in refused
    assert "Never serve it again? [y/N]" in refused
    assert "is rejected" not in refused
    assert "Version 3 is rejected" in _on_terminal(*reject, typed="y\n")


def test_colours_are_for_terminals_only_and_can_be_turned_off(ask: Run, registry: RegistryProcess, name: str) -> None:
    shown = ["draft", "list", "--registry", registry.address, "--speculator", name]
    green = "\x1b[1;32mstable"
    assert green in _on_terminal(*shown)
    assert green not in _on_terminal(*shown, NO_COLOR="1")
    assert "\x1b" not in ask("draft", "list").output


def test_retain_marks_a_version_until_it_is_taken_back(ask: Run) -> None:
    assert ask("draft", "retain", "1").exit_code == 0
    assert "superseded, retained" in ask("draft", "list").output
    assert ask("draft", "retain", "1", "--off").exit_code == 0
    assert "retained" not in ask("draft", "list").output


def test_a_word_that_no_version_has_now_is_one_sentence(ask: Run, name: str) -> None:
    result = ask("draft", "show", "candidate")
    assert (result.exit_code, result.output) == (1, f"Error: {name} has no candidate version now\n")


def test_pause_and_resume_answer_with_what_follows(ask: Run, name: str) -> None:
    assert "the rollout is paused: lunch" in ask("rollout", "pause", "--reason", "lunch").output
    assert "paused    yes: lunch" in ask("rollout", "status").output
    assert ask("rollout", "resume").output.startswith(f"The rollout goes on for {name}: version 2 is stable")


@pytest.mark.parametrize(("version", "exit_code"), [("1", 0), ("2", 0), ("3", 4), ("latest", 4)])
def test_the_status_of_a_version_is_an_exit_code_for_scripts(ask: Run, version: str, exit_code: int) -> None:
    assert ask("rollout", "status", version, "--exit-code").exit_code == exit_code
    assert ask("rollout", "status", version).exit_code == 0


def test_a_version_that_lost_is_exit_code_3(ask: Run) -> None:
    ask("draft", "reject", "3")
    assert ask("rollout", "status", "--exit-code", "-o", "name").exit_code == 3
    assert ask("rollout", "watch").exit_code == 3


def test_a_watch_of_what_is_over_ends_at_once_and_one_that_takes_too_long_with_4(ask: Run) -> None:
    assert ask("rollout", "watch", "stable").exit_code == 0
    late = ask("rollout", "watch", "--timeout", "1s")
    assert late.exit_code == 4
    assert "Not over within 1 s." in late.output


def test_a_policy_is_changed_by_flags_and_the_rest_of_it_stays(ask: Run) -> None:
    changed = ask("rollout", "policy", "set", "--strategy", "canary", "--step", "10:2m", "--confidence", "0.9")
    assert changed.output.splitlines() == [
        "strategy: immediate -> canary",
        "steps: 10:120s 50:120s -> 10:120s",
        "analysis.confidence: 0.95 -> 0.9",
        "Version 2 is stable; version 3 is held: it has no evaluation: promote it to serve it.",
    ]
    assert ask("rollout", "policy", "-o", "name").output == "canary\n"
    assert "is unchanged" in ask("rollout", "policy", "set", "--confidence", "0.9").output


def test_a_policy_that_is_shown_can_be_edited_and_set_again(ask: Run, tmp_path: Path) -> None:
    policy = yaml.safe_load(ask("rollout", "policy", "show", "-o", "yaml").output)
    assert policy["analysis"]["failure_limit"] == 2
    policy["analysis"]["failure_limit"] = 0
    (tmp_path / "policy.yaml").write_text(yaml.safe_dump(policy))
    changed = ask("rollout", "policy", "set", "--file", tmp_path / "policy.yaml")
    assert changed.output.splitlines()[0] == "analysis.failure_limit: 2 -> 0"
    assert ask("rollout", "policy", "set", "--default").output.splitlines()[0] == "analysis.failure_limit: 0 -> 2"


def test_a_policy_that_cannot_be_followed_is_refused_in_the_registrys_words(ask: Run) -> None:
    refused = ask("rollout", "policy", "set", "--step", "50:10s", "--step", "10:10s")
    assert refused.exit_code == 1
    assert refused.output == "Error: pods_percent must not decrease from step to step, got 50 and then 10\n"


def test_a_pulled_version_can_be_imported_into_another_speculator(
    run: Run, registry: RegistryProcess, ask: Run, name: str, tmp_path: Path
) -> None:
    folder = Path(ask("draft", "pull", "2", tmp_path / "drafts").output.strip())
    bring = ["draft", "import", folder, "--registry", registry.address, "--speculator", f"{name}-too"]
    assert run(*bring).output == (
        f"Imported as version 1 of {name}-too, stable: the first version needs no evaluation. Version 1 is stable.\n"
    )
    assert run(*bring, "-o", "name").output == "1\n"
    again = json.loads(run(*bring, "-o", "json").output)
    assert (again["existed"], again["draft"]["digest"]) == (True, checkpoints.draft(2).digest)


def test_a_bare_checkpoint_takes_its_target_from_the_versions_before_it(
    run: Run, registry: RegistryProcess, ask: Run, name: str, tmp_path: Path
) -> None:
    (tmp_path / "model.safetensors").write_bytes(checkpoints.draft(9).data)
    (tmp_path / "config.json").write_text(checkpoints.CONFIG)
    assert ask("draft", "import", tmp_path).output.startswith(f"Imported as version 4 of {name}, held. Version 2 is ")
    unknown = run("draft", "import", tmp_path, "--registry", registry.address, "--speculator", f"{name}-too")
    assert unknown.exit_code == 1
    assert "name the model's folder with --target" in unknown.output


def test_a_draft_of_another_trainer_becomes_a_version_that_engines_load(
    run: Run, registry: RegistryProcess, name: str, tmp_path: Path
) -> None:
    families.make("llama, untied, wide heads", tmp_path / "model")
    tensors = Reference(norm_before_residual=False).tensors("midlayer.", torch.float16)
    write(tmp_path / "theirs", SPECFORGE, tensors)
    of = ["--registry", registry.address, "--speculator", f"{name}-new"]
    bring = ["draft", "import", tmp_path / "theirs", *of]
    assert "name the folder of its target with --target" in run(*bring).output
    imported = run(*bring, "--target", tmp_path / "model").output
    assert imported.startswith(f"Imported as version 1 of {name}-new, stable")
    pulled = Path(run("draft", "pull", "1", tmp_path / "drafts", *of).output.strip())
    _, found = drafts.load(pulled)
    assert torch.equal(found["fc.weight"].float(), tensors["fc.weight"].float())


def test_a_draft_that_no_pod_of_the_engine_can_load_is_refused_and_nothing_is_published(
    run: Run, registry: RegistryProcess, name: str, tmp_path: Path
) -> None:
    families.make("llama, untied, wide heads", tmp_path / "model")
    write(tmp_path / "theirs", SPECULATORS, Reference(norm_before_residual=True).tensors("layers.0."))
    of = ["--registry", registry.address, "--speculator", f"{name}-sglang", "--target", tmp_path / "model"]
    refused = run("draft", "import", tmp_path / "theirs", *of, "--engine", "sglang")
    assert refused.exit_code == 1
    assert "has norm_before_residual, which Updraft cannot swap into an SGLang or vLLM server" in refused.output
    assert run("draft", "import", tmp_path / "theirs", *of, "--engine", "torch").output.startswith(
        f"Imported as version 1 of {name}-sglang, stable"
    )


def test_a_difference_is_told_between_words_too(ask: Run) -> None:
    assert "2 of 4 tensors differ; 2 are equal." in ask("draft", "diff", "previous", "stable").output
    assert "fc.weight" in ask("draft", "diff", "1", "2", "-o", "name").output.splitlines()


def test_versions_are_completed_from_the_registry(registry: RegistryProcess, name: str) -> None:
    assert _completed(registry.address, f"updraft draft show --speculator {name} ") == [
        *("plain,3", "plain,2", "plain,1"),
        *("plain,stable", "plain,candidate", "plain,previous", "plain,latest"),
    ]
    assert _completed(registry.address, f"updraft draft pin --speculator {name} 2") == ["plain,2"]


def test_completion_is_silent_when_the_registry_is_away() -> None:
    assert _completed(f"127.0.0.1:{free_port()}", "updraft draft show 2") == []


def test_who_brings_no_token_or_a_wrong_one_is_told_how_to_bring_one(run: Run, tmp_path: Path) -> None:
    for name, text in {
        "tokens": "operate:0123456789abcdef\nread:fedcba9876543210",
        "wrong": "no-token-of-theirs",
        "reader": "fedcba9876543210",
        "operator": "0123456789abcdef",
    }.items():
        (tmp_path / name).write_text(text)
    with RegistryProcess(tmp_path, tokens_file=tmp_path / "tokens") as process:

        def ask(*arguments: str, brings: str = "") -> Result:
            brought = ["--token-file", tmp_path / brings] if brings else []
            return run(*arguments, "--registry", process.address, *brought)

        assert ask("draft", "list").output.endswith("the call has none (--token-file, UPDRAFT_TOKEN_FILE)\n")
        assert "the call's token is unknown (--token-file" in ask("draft", "list", brings="wrong").output
        assert ask("draft", "list", brings="reader").exit_code == 0
        refused = ask("rollout", "pause", brings="reader")
        assert (refused.exit_code, refused.output.count("\n")) == (1, 1)
        assert "role read may not call Registry.Pause" in refused.output
        assert ask("rollout", "policy", "set", "--strategy", "manual", brings="operator").exit_code == 0
        assert "cannot be read" in ask("draft", "list", brings="nowhere").output


def test_a_registry_that_speaks_tls_is_reached_with_its_authority(run: Run, tmp_path: Path) -> None:
    ours, others = Authority(tmp_path / "ours"), Authority(tmp_path / "others")
    tls = ours.server()
    with RegistryProcess(tmp_path, tls_cert_file=tls.cert_file, tls_key_file=tls.key_file) as process:
        ask = ["draft", "list", "--registry", process.address]
        assert run(*ask, "--ca-file", ours.file).exit_code == 0
        assert "is not from the CA in --ca-file" in run(*ask, "--ca-file", others.file).output
        assert "it may require TLS (--ca-file)" in run(*ask).output
        by_another_name = ["draft", "list", "--registry", process.address.replace("127.0.0.1", "localhost")]
        assert "(--server-name)" in run(*by_another_name, "--ca-file", ours.file).output
        assert run(*by_another_name, "--ca-file", ours.file, "--server-name", "127.0.0.1").exit_code == 0


def test_a_registry_in_plaintext_is_not_reached_by_tls(ask: Run, tmp_path: Path) -> None:
    refused = ask("draft", "list", "--ca-file", Authority(tmp_path / "ca").file)
    assert "it does not speak TLS there; leave out --ca-file" in refused.output


def test_the_data_folder_of_a_stopped_registry_is_checked_and_rebuilt(run: Run, tmp_path: Path) -> None:
    with RegistryProcess(tmp_path) as process:
        folder = ["--data-dir", process.data]
        assert run("registry", "fsck", *folder).exit_code == 1, "it runs"
        process.terminate()
    assert run("registry", "fsck", *folder).exit_code == 0
    assert run("registry", "rebuild", *folder, "-o", "json").exit_code == 0


def _completed(address: str, line: str) -> list[str]:
    """What a bash offers for a line that ends at the cursor."""
    words = line.split(" ")
    variables = {
        "_UPDRAFT_COMPLETE": "bash_complete",
        "COMP_WORDS": line,
        "COMP_CWORD": str(len(words) - 1),
        "UPDRAFT_REGISTRY": address,
    }
    return CliRunner(env=variables).invoke(cli, prog_name="updraft").output.split()


def _on_terminal(*arguments: str, typed: str = "", **variables: str) -> str:
    """What the command says to a terminal at which somebody types."""
    ours, theirs = os.openpty()
    environ = {name: value for name, value in os.environ.items() if name != "NO_COLOR"} | {"TERM": "xterm"} | variables
    command = [sys.executable, "-m", "updraft_cli", *arguments]
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environ) as process:
        os.close(theirs)
        os.write(ours, typed.encode())
        said = b""
        with suppress(OSError):  # EIO is how a terminal ends
            while block := os.read(ours, 4096):
                said += block
        process.wait(LONG_S)
    os.close(ours)
    return said.decode()


async def _publish(address: str, name: str) -> None:
    async with client(address) as stub:
        for number, gain in ((1, 2.0), (2, 1.5)):
            fields = {"speculator": name, "evaluation": checkpoints.evaluation(baseline=number - 1, gain=gain)}
            await publish(stub, checkpoints.draft(number), source=pb.SOURCE_TRAINER, **fields)
        await publish(stub, checkpoints.draft(3), speculator=name)
