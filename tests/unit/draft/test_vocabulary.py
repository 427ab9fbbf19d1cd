import torch

from updraft_draft import vocabulary


def test_the_vocabulary_has_the_traffic_the_end_tokens_and_then_the_lowest_ids() -> None:
    traffic = [torch.tensor([900, 901, 900]), torch.tensor([5, 902])]
    chosen = vocabulary.choose(traffic, always={999}, vocab_size=1000, size=32).tolist()
    assert chosen == [*range(28), 900, 901, 902, 999]


def test_rare_tokens_of_the_traffic_do_not_crowd_out_the_common_ones() -> None:
    traffic = [torch.arange(500, 900), torch.tensor([899, 898])]
    chosen = vocabulary.choose(traffic, always=(), vocab_size=1000, size=40).tolist()
    assert len(chosen) == 40
    assert sum(token >= 500 for token in chosen) == 20
    assert {898, 899} < set(chosen)


def test_a_vocabulary_larger_than_the_targets_is_the_targets() -> None:
    chosen = vocabulary.choose([], always={5000}, vocab_size=100, size=8192)
    assert torch.equal(chosen, torch.arange(100))
    assert chosen.dtype == torch.int64


def test_end_tokens_that_the_vocabulary_does_not_have_are_left_out() -> None:
    chosen = vocabulary.choose([], always=[-1, 10**9, 10**30, 99], vocab_size=100, size=8)
    assert chosen.tolist() == [*range(7), 99]


def test_the_share_of_unknown_tokens_counts_every_occurrence() -> None:
    texts = [torch.tensor([1, 7, 7]), torch.tensor([2])]
    assert vocabulary.unknown_share(texts, torch.tensor([1, 2, 3])) == 0.5
    assert vocabulary.unknown_share([], torch.tensor([1])) == 0.0
