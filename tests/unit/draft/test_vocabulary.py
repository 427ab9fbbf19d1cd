import torch
from hypothesis import given
from hypothesis import strategies as st

from updraft_draft import vocabulary


def test_without_traffic_the_vocabulary_is_the_end_tokens_and_the_lowest_ids() -> None:
    chosen = vocabulary.choose(torch.zeros(1000), always={999}, size=32)
    assert chosen.tolist() == [*range(31), 999]


def test_each_text_adds_to_the_counts() -> None:
    texts = [torch.tensor([900, 901, 900]), torch.tensor([5, 900])]
    assert vocabulary.count(texts, 1000).nonzero().flatten().tolist() == [5, 900, 901]
    assert vocabulary.count(texts, 1000)[900] == 3


@given(st.integers(1, 200), st.integers(1, 250), st.data())
def test_the_more_frequent_of_two_tokens_comes_in_first_if_its_id_is_not_higher(
    vocab_size: int, size: int, data: st.DataObject
) -> None:
    counts = torch.tensor(data.draw(st.lists(st.integers(0, 50), min_size=vocab_size, max_size=vocab_size))).float()
    chosen = vocabulary.choose(counts, always=(), size=size).tolist()
    assert chosen == sorted(set(chosen))
    assert len(chosen) == min(size, vocab_size)
    for token in set(range(vocab_size)) - set(chosen):
        assert all(counts[other] > counts[token] for other in chosen if other > token)


def test_a_token_that_was_seen_comes_in_before_low_ids_that_were_not() -> None:
    counts = torch.zeros(50_000)
    counts[49_000] = 1.0
    assert 49_000 in vocabulary.choose(counts, always=(), size=8192).tolist()


def test_a_vocabulary_larger_than_the_targets_is_the_targets() -> None:
    chosen = vocabulary.choose(torch.zeros(100), always={5000}, size=8192)
    assert torch.equal(chosen, torch.arange(100))
    assert chosen.dtype == torch.int64


def test_end_tokens_that_the_vocabulary_does_not_have_are_left_out() -> None:
    chosen = vocabulary.choose(torch.zeros(100), always=[-1, 10**9, 10**30, 99], size=8)
    assert chosen.tolist() == [*range(7), 99]


def test_the_share_of_unknown_tokens_counts_every_occurrence() -> None:
    texts = [torch.tensor([1, 7, 7]), torch.tensor([2])]
    assert vocabulary.unknown_share(texts, torch.tensor([1, 2, 3])) == 0.5
    assert vocabulary.unknown_share([], torch.tensor([1])) == 0.0
