"""Drafts on a terminal, to the letter."""

from textwrap import dedent

import pytest
from tests.support.registry_answers import NOW, ago_ms, screen, state, version

from updraft.registry.v1 import registry_pb2 as pb
from updraft_cli import output
from updraft_cli.backends import wire
from updraft_cli.backends.differences import difference
from updraft_cli.backends.drafts import DraftList, History
from updraft_cli.cmd.draft import differences_view as difference_view
from updraft_cli.cmd.draft import view
from updraft_cli.models.importing import Imported

LONG = (
    "acceptance is significantly lower by more than 2 %: "
    "1.21 against 1.30 tokens per step, -7.0 % (-9.6 to -4.3 % at 95 %)"
)

TRANSITIONS = [
    pb.Transition(
        unix_ms=ago_ms(500), version=2, to_phase=pb.PHASE_PENDING, reason="published (Trainer)", actor="operator"
    ),
    pb.Transition(
        unix_ms=ago_ms(499),
        version=2,
        from_phase=pb.PHASE_PENDING,
        to_phase=pb.PHASE_STABLE,
        reason="acceptance length 1.36 against 1.30, gain +4.4 % (+1.6 to +7.3 %)",
        actor="gate",
    ),
    pb.Transition(unix_ms=ago_ms(300), reason="paused: lunch", actor="operator"),
]


def listing() -> DraftList:
    versions = [
        version(3, pb.PHASE_ROLLED_BACK, LONG),
        version(2, retain=True),
        version(1, pb.PHASE_SUPERSEDED, "version 2 took over"),
    ]
    return wire.draft_list("default", pb.ListResponse(versions=versions, speculators=[state(pinned=2)]))


def golden(text: str) -> str:
    return dedent(text).strip("\n")


def test_the_list_fits_a_terminal_of_80_columns() -> None:
    assert screen(view.rendered_list(listing(), NOW, is_wide=False)) == golden("""
        version  phase                     accepted  published  reason
              3  rolled back                      -  2 h ago    acceptance is significa…
              2  stable, pinned, retained      1.55  3 h ago    why
              1  superseded                       -  4 h ago    version 2 took over
    """)


def test_the_wide_list_has_everything_and_the_whole_reason() -> None:
    header, first, *_ = screen(view.rendered_list(listing(), NOW, is_wide=True), 300).splitlines()
    columns = "version phase accepted by position parent samples step size source digest published (UTC) reason"
    row = f"3 rolled back - - 2 60 21 1.1 kB trainer 7884ef7e0f8d 2026-11-24 10:00:00 {LONG}"
    assert (header.split(), first.split()) == (columns.split(), row.split())


def test_an_empty_list_says_what_is_waited_for() -> None:
    answer = pb.ListResponse(
        speculators=[pb.SpeculatorState(speculator="default", message="no version serves; waiting for the first")]
    )
    shown = screen(view.rendered_list(wire.draft_list("default", answer), NOW, is_wide=False))
    assert shown == "No drafts of default yet. No version serves; waiting for the first."


def test_one_version_is_told_from_its_phase_to_its_tensors() -> None:
    details = wire.draft_details(version(2, retain=True), state(), TRANSITIONS[:2])
    assert screen(view.rendered_details(details, NOW, is_wide=False)) == golden("""
        version     2 of default
        phase       stable since 2026-11-24 09:30:00 UTC; kept regardless of the
                    retention policy
        reason      why
        published   2026-11-24 09:00:00 UTC (3 h ago), source trainer, code
                    updraft/0.1.0
        trained     from version 1, 40 samples, step 14
        offline     3.00 tokens per step, 1.99 with version 1 (12 held-out requests, up
                    to 3 draft tokens)
        live        1.55 tokens per step over 33,212 steps; accepted by position: 36 %
                    25 % 11 %
        weights     1.1 kB, 963fe937e6d1
        tensors     28e61d24b506
        target      aaaaaaaaaaaa
        tokenizer   dddddddddddd
        vocabulary  e01a3c8f2eda

        time (UTC)           became   by        why
        2026-11-24 11:51:40  pending  operator  published (Trainer)
        2026-11-24 11:51:41  stable   gate      acceptance length 1.36 against 1.30,
                                                gain +4.4 % (+1.6 to +7.3 %)

        tensor       type  shape   digest
        d2t          I64   16      f23d672bb9b3
        fc.weight    BF16  8 x 32  14458a4861fa
        norm.weight  F32   8       2d863f3a3148
        t2d          BOOL  64      64a46288914d
    """)


def test_the_offline_estimate_is_that_for_the_traffic_of_its_time() -> None:
    one = version(2)
    for n, sample in enumerate(one.manifest.evaluation.samples):
        sample.weight = 2.0 if n % 2 else 0.0
        sample.tokens, sample.candidate_steps, sample.baseline_steps = (60, 20, 30) if n % 2 else (60, 60, 60)
    evaluation = wire.draft_details(one).evaluation
    assert evaluation is not None
    assert (evaluation.requests, evaluation.candidate_length, evaluation.baseline_length) == (6, 3.0, 2.0)


def test_wide_a_version_has_its_digests_whole() -> None:
    details = wire.draft_details(version(2))
    assert details.draft.digest in screen(view.rendered_details(details, NOW, is_wide=True), 200)


def test_the_history_tells_what_happened_to_no_version_in_particular_too() -> None:
    events = History(speculator="default", events=tuple(map(wire.history_entry, TRANSITIONS)))
    assert screen(view.rendered_history(events, is_wide=False)) == golden("""
        time (UTC)           version  became   by        why
        2026-11-24 11:51:40        2  pending  operator  published (Trainer)
        2026-11-24 11:51:41        2  stable   gate      acceptance length 1.36 against
                                                         1.30, gain +4.4 % (+1.6 to +7.3
                                                         %)
        2026-11-24 11:55:00        -  -        operator  paused: lunch
    """)
    assert "was      became" in screen(view.rendered_history(events, is_wide=True), 200)


@pytest.mark.parametrize("is_wide", [False, True])
def test_reasons_are_shown_as_they_were_written_whatever_brackets_are_in_them(
    capsys: pytest.CaptureFixture[str], *, is_wide: bool
) -> None:
    told = "rollback [/incident 12] [ops] :bug:"
    versions = [version(2, pb.PHASE_ROLLED_BACK, told)]
    found = wire.draft_list("default", pb.ListResponse(versions=versions, speculators=[state()]))
    event = wire.history_entry(pb.Transition(unix_ms=ago_ms(500), version=2, reason=told, actor="operator"))
    history = History(speculator="default", events=(event,))
    details = wire.draft_details(versions[0])
    imported = Imported(speculator="default", existed=True, message="", draft=found.drafts[0])
    form: output.Format = "wide" if is_wide else "table"
    output.show(found, form, names=(), rendered=lambda is_wide: view.rendered_list(found, NOW, is_wide=is_wide))
    output.show(history, form, names=(), rendered=lambda is_wide: view.rendered_history(history, is_wide=is_wide))
    output.show(details, form, names=(), rendered=lambda is_wide: view.rendered_details(details, NOW, is_wide=is_wide))
    output.show(imported, form, names=(), rendered=lambda is_wide: view.rendered_import(imported, is_wide=is_wide))
    assert capsys.readouterr().out.count(told) == 4


def test_a_difference_shows_only_what_differs() -> None:
    found = difference(wire.draft_details(version(1, pb.PHASE_SUPERSEDED)), wire.draft_details(version(2), state()))
    assert screen(difference_view.rendered(found, is_wide=False)) == golden("""
                                          version 1            version 2
        manifest    phase                 superseded           stable
                    parent                none                 1
                    published             2026-11-24 08:00:00  2026-11-24 09:00:00
                    weights               ed1a24342adb         963fe937e6d1
                    tensors               22cf880192a9         28e61d24b506
        provenance  samples               20                   40
                    step                  7                    14
        evaluation  tokens per step       1.49                 3.00
                    baseline              1.00 with no draft   1.99 with version 1
        traffic     tokens per step       -                    1.55
                    accepted by position  -                    36 % 25 % 11 %

        2 of 4 tensors differ; 2 are equal.

        tensor       type and shape  version 1     version 2
        fc.weight    BF16 8 x 32     72984d68ae21  14458a4861fa
        norm.weight  F32 8           914d19097385  2d863f3a3148
    """)


def test_wide_a_difference_shows_what_is_equal_too() -> None:
    found = difference(wire.draft_details(version(1)), wire.draft_details(version(2)))
    shown = screen(difference_view.rendered(found, is_wide=True), 300)
    assert "vocab_size" in shown
    assert "\nt2d" in shown
    assert details_digest(2) in shown


def test_the_same_weights_are_called_so() -> None:
    same = wire.draft_details(version(1))
    assert screen(difference_view.rendered(difference(same, same), is_wide=False)) == (
        "All 4 tensors are equal: the same weights."
    )


def test_an_import_tells_what_follows_and_says_nothing_twice() -> None:
    held = wire.draft(version(2, pb.PHASE_HELD, "promote it to serve it"))
    imported = Imported(
        speculator="default", existed=False, message="version 2 is held: promote it to serve it", draft=held
    )
    assert screen(view.rendered_import(imported, is_wide=False), 200) == (
        "Imported as version 2 of default, held. Version 2 is held: promote it to serve it."
    )


def test_an_import_of_known_weights_names_their_version() -> None:
    known = Imported(speculator="default", existed=True, message="", draft=wire.draft(version(2)))
    assert screen(view.rendered_import(known, is_wide=False), 200) == (
        "default already has these weights: version 2, stable: why"
    )


def details_digest(number: int) -> str:
    return wire.draft(version(number)).digest
