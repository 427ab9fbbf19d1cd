"""Drafts from elsewhere: when a Job imports one, which version it became, and what its DraftImport says."""

import json
from dataclasses import replace
from typing import Any

import pytest
from tests.support.manifests import CONFIG, speculator
from tests.support.observed import NOW, as_child, connected, draft, draft_import, imported, observed, pod, version

from updraft_operator.api.draft_import import DraftImport, DraftImportStatus
from updraft_operator.api.speculator import AdaptiveSpeculator
from updraft_operator.manifests import importing
from updraft_operator.planning import imports, versions
from updraft_operator.planning.objects import Child, Ref
from updraft_operator.planning.observed import ConnectionState, Observed, Refusal, RegistryView
from updraft_operator.planning.plan import written
from updraft_operator.planning.pods import PodState

AWAY = RegistryView(connection=ConnectionState.UNREACHABLE)


def _name(owner: DraftImport, of: AdaptiveSpeculator | None = None) -> str:
    return imports.job_name(of or speculator(), owner)


def _status(observation: Observed, name: str = "mine") -> DraftImportStatus:
    return {each.metadata.name: new for each, new in imports.statuses(observation, NOW)}[name]


def _conditions(status: DraftImportStatus) -> dict[str, tuple[str, str, str]]:
    return {each.type: (each.status, each.reason, each.message) for each in status.conditions}


def _job(owner: DraftImport, **status: Any) -> dict[Ref, Child]:
    content = importing.job(speculator(), owner, _name(owner), CONFIG, is_first=False)
    child = as_child(content, status=status)
    return {child.ref: child}


def _ended(owner: DraftImport, result: str) -> PodState:
    return pod(f"{_name(owner)}-x", "import", result=result, is_finished=True)


def _failed(message: str = "it had no more tries") -> dict[str, Any]:
    return {"conditions": [{"type": "Failed", "status": "True", "message": message}]}


def _after_failure(generation: int = 1) -> DraftImport:
    """An import that failed, whose Job is gone, with the spec of this generation now."""
    mine = draft_import()
    pods = (pod(f"{_name(mine)}-x", "import", problem=("CrashLoopBackOff", "404 Not Found")),)
    failed = _status(observed(registry=connected(), imports=(mine,), pods=pods, children=_job(mine, **_failed())))
    return draft_import(status=written(failed), generation=generation)


def test_an_import_waits_for_the_registry_then_for_its_job() -> None:
    mine = draft_import()
    waiting = _conditions(_status(observed(registry=AWAY, imports=(mine,))))
    assert waiting["Ready"][:2] == ("False", "WaitingForRegistry")
    running = _conditions(_status(observed(registry=connected(), imports=(mine,), children=_job(mine))))
    assert running["Ready"][:2] == ("False", "Importing")
    assert running.keys() == waiting.keys() == {"Ready"}


def test_a_running_import_says_what_its_pod_lacks() -> None:
    mine = draft_import()
    problem = ("CreateContainerConfigError", 'import: secret "lab" not found')
    pods = (pod(f"{_name(mine)}-x", "import", problem=problem),)
    status = _status(observed(registry=connected(), imports=(mine,), pods=pods, children=_job(mine)))
    assert _conditions(status) == {"Ready": ("False", "Importing", 'import: secret "lab" not found')}


def test_a_job_that_may_not_be_made_is_said_at_the_import() -> None:
    mine = draft_import()
    refusal = Refusal(ref=Ref("Job", _name(mine)), digest="", reason="QuotaExceeded", message="exceeded quota")
    status = _status(observed(registry=connected(), imports=(mine,), refusals=(refusal,)))
    assert _conditions(status) == {"Ready": ("False", "QuotaExceeded", "exceeded quota")}
    invalid = replace(refusal, reason="InvalidPodTemplate")
    stalled = _status(observed(registry=connected(), imports=(mine,), refusals=(invalid,)))
    assert _conditions(stalled)["Stalled"] == ("True", "InvalidPodTemplate", "exceeded quota")


def test_an_import_takes_the_number_that_its_pod_left_as_its_last_word() -> None:
    mine = draft_import()
    observation = observed(
        registry=connected([version(4)]),
        imports=(mine,),
        drafts=(draft(4),),
        pods=(_ended(mine, json.dumps(imported(4))),),
        children=_job(mine),
    )
    status = _status(observation)
    assert (status.version, status.digest) == (4, f"sha256:{4:064x}")
    assert _conditions(status) == {"Ready": ("True", "Imported", "imported as version 4")}
    assert list(imports.jobs(observation)) == []
    ((_, told),) = versions.statuses(observation, NOW)
    assert told.draft_import_name == "mine"


def test_a_version_names_its_import_also_when_that_is_deleted() -> None:
    known = draft(4, status={"draftImportName": "mine"})
    ((_, told),) = versions.statuses(observed(registry=connected([version(4)]), drafts=(known,)), NOW)
    assert told.draft_import_name == "mine"


def test_two_imports_of_the_same_weights_are_one_version_that_names_the_first() -> None:
    both = draft_import("first", status=imported(4)), draft_import("second", status=imported(4))
    for seen in (both, both[::-1]):
        observation = observed(registry=connected([version(4)]), imports=seen, drafts=(draft(4),))
        assert [_status(observation, name).version for name in ("first", "second")] == [4, 4]
        ((_, told),) = versions.statuses(observation, NOW)
        assert told.draft_import_name == "first"


@pytest.mark.parametrize(
    "result",
    [
        *("", "x", "{}", "[]", "null", '{"version": 4}', '{"version": null, "digest": "d"}'),
        *('{"version": "four", "digest": "d"}', '{"version": [], "digest": "d"}', '{"version": 4, "digest": "other"}'),
    ],
)
def test_other_last_words_are_no_number(result: str) -> None:
    mine = draft_import()
    view = connected([version(4)])
    (state,) = imports.states(observed(registry=view, imports=(mine,), pods=(_ended(mine, result),)))
    assert state.registered is None


@pytest.mark.parametrize(
    ("pods", "said"),
    [
        pytest.param((), "it had no more tries", id="the Job's words"),
        pytest.param(
            (pod(f"{_name(draft_import())}-x", "import", problem=("CrashLoopBackOff", "404 Not Found")),),
            "404 Not Found",
            id="the pod's words",
        ),
    ],
)
def test_a_failed_import_says_why(pods: Any, said: str) -> None:
    mine = draft_import()
    children = _job(mine, **_failed())
    status = _status(observed(registry=connected(), imports=(mine,), pods=pods, children=children))
    assert _conditions(status) == {"Ready": ("False", "ImportFailed", said), "Stalled": ("True", "ImportFailed", said)}


@pytest.mark.parametrize("has_job", [True, False])
def test_a_failed_import_keeps_its_reason_when_its_pods_and_then_its_job_are_gone(*, has_job: bool) -> None:
    failed = _after_failure()
    children = _job(failed, **_failed()) if has_job else {}
    observation = observed(registry=connected(), imports=(failed,), children=children)
    assert list(imports.jobs(observation)) == []
    assert _status(observation) == failed.status


def test_a_failed_import_is_tried_again_with_another_secret() -> None:
    again = _after_failure(generation=2)
    (job,) = imports.jobs(observed(registry=connected(), imports=(again,)))
    assert job["metadata"]["name"] == _name(again) != _name(draft_import())
    status = _status(observed(registry=connected(), imports=(again,), children=_job(again)))
    assert _conditions(status).keys() == {"Ready"}


def test_an_import_is_tried_again_for_another_speculator_of_the_same_name() -> None:
    owner = speculator()
    other = owner.model_copy(update={"metadata": owner.metadata.model_copy(update={"uid": "another"})})
    children = _job(draft_import(), **_failed())
    observation = observed(speculator=other, registry=connected(), imports=(_after_failure(),), children=children)
    (job,) = imports.jobs(observation)
    assert job["metadata"]["name"] == _name(draft_import(), other)
    assert list(imports.outdated(observation)) == [*children]


def test_the_job_of_an_earlier_spec_is_deleted() -> None:
    children = _job(draft_import())
    changed = draft_import(generation=2)
    seen = observed(registry=connected(), imports=(changed,), children={**children, **_job(changed)})
    assert list(imports.outdated(seen)) == [*children]


COMPLETE = {"conditions": [{"type": "Complete", "status": "True"}]}


@pytest.mark.parametrize(
    ("pods", "is_lost"),
    [
        pytest.param((), True, id="its pod is gone"),
        pytest.param((_ended(draft_import(), json.dumps(imported(9))),), True, id="of another registry"),
        pytest.param((_ended(draft_import(), json.dumps(imported(4))),), False, id="registered"),
        pytest.param((pod(f"{_name(draft_import())}-x", "import"),), False, id="its pod has not been seen to end"),
    ],
)
def test_a_job_whose_result_is_lost_is_deleted_so_that_another_one_runs(pods: Any, *, is_lost: bool) -> None:
    mine = draft_import()
    children = _job(mine, **COMPLETE)
    seen = observed(registry=connected([version(4)]), imports=(mine,), pods=pods, children=children)
    assert list(imports.outdated(seen)) == ([*children] if is_lost else [])
    assert list(imports.outdated(observed(registry=AWAY, imports=(mine,), pods=pods, children=children))) == []


def test_an_import_whose_results_are_lost_again_and_again_fails() -> None:
    mine, names = draft_import(), list[str]()
    for _ in range(imports.MOST_ATTEMPTS):
        (job,) = imports.jobs(observed(registry=connected(), imports=(mine,)))
        names.append(job["metadata"]["name"])
        child = as_child(job, status=COMPLETE)
        seen = observed(registry=connected(), imports=(mine,), children={child.ref: child})
        is_last = len(names) == imports.MOST_ATTEMPTS
        assert list(imports.outdated(seen)) == ([] if is_last else [child.ref])
        mine = draft_import(status=written(_status(seen)))
    assert len(set(names)) == imports.MOST_ATTEMPTS
    assert mine.status.job_name == names[-1]
    later = observed(registry=connected(), imports=(mine,))
    assert _conditions(_status(later))["Stalled"][1] == "ImportFailed"
    assert list(imports.jobs(later)) == []
    (another,) = imports.jobs(observed(registry=connected(), imports=(draft_import(generation=2),)))
    assert another["metadata"]["name"] not in names


def test_a_result_that_the_registry_does_not_have_yet_is_no_lost_one() -> None:
    mine, pods = draft_import(), (_ended(draft_import(), json.dumps(imported(9))),)
    for _ in range(2 * imports.MOST_ATTEMPTS):
        seen = observed(registry=connected(), imports=(mine,), pods=pods, children=_job(mine, **COMPLETE))
        assert list(imports.outdated(seen)) == [*_job(mine)]
        mine = draft_import(status=written(_status(seen)))
        assert mine.status.job_name == _name(mine)
        assert _conditions(mine.status)["Ready"][1] == "Importing"


def test_an_import_that_is_done_needs_no_job_for_another_secret() -> None:
    done = draft_import(status=imported(4), generation=2)
    assert list(imports.jobs(observed(registry=connected([version(4)]), imports=(done,)))) == []


@pytest.mark.parametrize(
    ("view", "known", "number"),
    [
        pytest.param(connected([version(4)]), f"sha256:{4:064x}", 4, id="the same content"),
        pytest.param(connected([version(4)]), "sha256:other", None, id="a registry that began anew"),
        pytest.param(connected([version(2)]), f"sha256:{4:064x}", None, id="one that is not so far yet"),
        pytest.param(connected([version(5)]), f"sha256:{4:064x}", 4, id="weights that are no longer kept"),
        pytest.param(AWAY, "sha256:other", 4, id="a registry that is away"),
    ],
)
def test_the_number_of_an_import_is_good_in_the_registry_that_gave_it(
    view: RegistryView, known: str, number: int | None
) -> None:
    status = _status(observed(registry=view, imports=(draft_import(status=imported(4, known)),)))
    assert status.version == number


def test_a_new_registry_gets_the_draft_again_on_the_day_of_the_import() -> None:
    lost, view = draft_import(status=imported(4)), connected([version(2)])
    done: dict[str, Any] = {"pods": (_ended(lost, json.dumps(imported(4))),), "children": _job(lost, **COMPLETE)}
    assert list(imports.outdated(observed(registry=view, imports=(lost,), **done))) == [*done["children"]]
    again = (_ended(lost, json.dumps(imported(3))),)
    seen = observed(registry=connected([version(2), version(3)]), imports=(lost,), pods=again)
    assert _status(seen).version == 3


def test_a_converted_draft_keeps_its_number_although_its_file_had_another_digest() -> None:
    mine = draft_import(status=imported(4), digest=f"sha256:{9:064x}")
    assert _status(observed(registry=connected([version(4)]), imports=(mine,))).version == 4


def test_an_import_without_a_speculator_says_so_unless_it_is_done() -> None:
    status = imports.orphaned(_after_failure(), NOW)
    assert status is not None
    assert _conditions(status).keys() == {"Ready"}
    assert _conditions(status)["Ready"][:2] == ("False", "SpeculatorNotFound")
    assert imports.orphaned(draft_import(status=imported(4)), NOW) is None


def test_a_version_that_is_no_longer_kept_is_said_to_be() -> None:
    status = _status(observed(registry=connected([version(5)]), imports=(draft_import(status=imported(4)),)))
    assert _conditions(status)["Ready"][2] == "imported as version 4, which is no longer kept"


def test_another_object_of_the_same_name_is_another_import() -> None:
    first, second = draft_import(), draft_import()
    second = second.model_copy(update={"metadata": second.metadata.model_copy(update={"uid": "another-uid"})})
    assert _name(first) != _name(second)


def test_the_name_of_a_job_is_short_enough_for_a_label() -> None:
    assert len(f"{_name(draft_import('a' * 253, generation=9999))}-abcde") <= 63
