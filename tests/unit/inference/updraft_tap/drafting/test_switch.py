from updraft_tap.drafting.switch import Drafting


def test_nothing_is_drafted_until_a_trained_draft_is_in_place() -> None:
    drafting = Drafting(is_untrained=True)
    said = []
    for version in (0, 1, 2, 0):
        drafting.serve(version)
        said.append((drafting.allows(1), drafting.is_useless))

    assert said == [(False, True), (True, False), (True, False), (False, True)]


def test_a_server_that_starts_with_a_trained_draft_drafts_from_its_first_step() -> None:
    assert Drafting(is_untrained=False).allows(1)
