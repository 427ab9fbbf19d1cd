"""The learner lowers the loss of a learnable rule, survives what is not a number, and goes on where it stopped."""

from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.support.likeliest import show_likeliest
from tests.support.tiny_target import DRAFT_VOCAB, HIDDEN, VOCAB, make_tiny_target
from tests.support.traces import TraceMaker
from torch._subclasses.fake_tensor import FakeTensorMode

from updraft_artifacts.sizing import sizing
from updraft_draft import checkpoint, vocabulary
from updraft_draft.target_weights import read_head
from updraft_draft.tensors import EncodedRows, decoded
from updraft_trainer.data.sample import Sample, read_sample
from updraft_trainer.data.teacher import LastHidden, TopK
from updraft_trainer.learning import head_loss, losses
from updraft_trainer.learning.average import FITTED_DECAY, TRAINED_DECAY
from updraft_trainer.learning.compute import Compute
from updraft_trainer.learning.learner import MAX_BAD_STEPS, Hyperparameters, Learner
from updraft_trainer.learning.losses import Predictions, forward_kl
from updraft_trainer.publishing.estimate import num_tokens, verify_steps
from updraft_trainer.publishing.publish import snapshot


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_target(tmp_path_factory.mktemp("models") / "target")


@pytest.fixture(scope="module")
def samples(target: Path) -> list[Sample]:
    maker = TraceMaker(target)
    return [read_sample(maker.data(seed), maker.expected) for seed in range(12)]


@pytest.fixture(scope="module")
def rejected(target: Path) -> list[Sample]:
    """Samples with two rows after each rejection."""
    maker = TraceMaker(target)
    return [read_sample(maker.data(seed, counterfactual_rows=2), maker.expected) for seed in range(4)]


def likeliest(target: Path, k: int, seeds: range, *, counterfactual_rows: int = 0) -> list[Sample]:
    """The samples of these seeds with k tokens of each row as their teacher."""
    maker, head = TraceMaker(target), read_head(target).head
    traces = [maker.trace(seed, counterfactual_rows=counterfactual_rows) for seed in seeds]
    return [read_sample(show_likeliest(one, head, k=k).SerializeToString(), maker.expected) for one in traces]


def make_learner(target: Path, compute: Compute | None = None, **hyper: float | str | bool) -> Learner:
    head = read_head(target)
    chosen = Hyperparameters(learning_rate=3e-3, **hyper)  # type: ignore[arg-type]
    return Learner(head, head.draft(draft_vocab_size=DRAFT_VOCAB), torch.arange(DRAFT_VOCAB), chosen, compute=compute)


def acceptance_length(learner: Learner, samples: list[Sample]) -> float:
    return sum(map(num_tokens, samples)) / sum(verify_steps(learner.network, samples, lookahead=3))


@pytest.mark.parametrize("loss", ["forward_kl", "reverse_kl", "acceptance"])
def test_a_rule_is_learnt_and_held_out_text_needs_fewer_steps(target: Path, samples: list[Sample], loss: str) -> None:
    learner = make_learner(target, loss=loss)
    before = acceptance_length(learner, samples[8:])
    losses = [learner.train(samples[:8]).loss for _ in range(40)]
    assert losses[-1] < losses[0]
    assert acceptance_length(learner, samples[8:]) > before + 0.3


def test_a_step_on_hidden_states_that_are_not_finite_changes_nothing(target: Path, samples: list[Sample]) -> None:
    learner = make_learner(target)
    learner.train(samples[:4])
    before = {name: p.clone() for name, p in learner.network.named_parameters()}
    bad = replace(samples[0], aux=EncodedRows.of(torch.full_like(samples[0].aux.decoded(), float("nan"))))
    report = learner.train([bad])
    assert report.is_skipped
    assert learner.step == 1
    assert all(torch.equal(p, before[name]) for name, p in learner.network.named_parameters())


def test_the_average_follows_the_weights_and_needs_no_more_steps(target: Path, samples: list[Sample]) -> None:
    learner = make_learner(target)
    first = learner.average.fc.weight.detach().clone()
    for _ in range(40):
        learner.train(samples[:8])
    assert not torch.equal(learner.average.fc.weight, first)
    assert not torch.equal(learner.average.fc.weight, learner.network.fc.weight)
    assert learner.average.lm_head.weight is learner.network.lm_head.weight
    averaged = sum(verify_steps(learner.average, samples[8:], lookahead=3))
    assert averaged <= 1.05 * sum(verify_steps(learner.network, samples[8:], lookahead=3))


@pytest.mark.parametrize("is_fitted", [True, False], ids=["in closed form", "trained"])
def test_after_a_start_from_a_good_draft_the_average_moves_slowly_also_if_training_is_resumed(
    target: Path, samples: list[Sample], *, is_fitted: bool
) -> None:
    learner, resumed = make_learner(target), make_learner(target)
    for _ in range(60):
        learner.train(samples[:4])
    if is_fitted:
        learner.start_from_fit(learner.average)
    else:
        learner.start_from(learner.average.state_dict())
    first = learner.average.fc.weight.detach().clone()
    resumed.load_state_dict(deepcopy(learner.state_dict()))
    for one in (learner, resumed):
        one.train(samples[:4])
        moved, step = one.average.fc.weight - first, one.network.fc.weight - first
        decay = FITTED_DECAY if is_fitted else TRAINED_DECAY
        assert torch.allclose(moved, step * (1 - decay), rtol=1e-2, atol=1e-8)


def test_another_vocabulary_keeps_what_the_draft_knows_of_tokens_that_stay(target: Path, samples: list[Sample]) -> None:
    head = read_head(target)
    config, rare = head.draft(draft_vocab_size=DRAFT_VOCAB // 2), torch.arange(VOCAB - DRAFT_VOCAB // 2, VOCAB)
    learner = Learner(head, config, rare, Hyperparameters(learning_rate=3e-3, trains_head=True))
    for _ in range(5):
        learner.train(samples[:4])
    assert not make_learner(target).update_vocabulary(samples)  # it can propose all tokens already

    before, fc = learner.network.copy(), learner.network.fc.weight.clone()
    learner.network.zero_grad(set_to_none=True)
    assert learner.update_vocabulary(samples)
    new = set(learner.network.token_ids.tolist()) - set(before.token_ids.tolist())
    assert new
    rows = dict(zip(learner.network.token_ids.tolist(), learner.network.lm_head.weight, strict=True))
    for token, row in zip(before.token_ids.tolist(), before.lm_head.weight, strict=True):
        assert token not in rows or torch.equal(rows[token], row)
    assert all(torch.equal(rows[token], head.head[token].float()) for token in new)
    assert torch.equal(learner.network.fc.weight, fc)
    assert torch.equal(learner.average.token_ids, learner.network.token_ids)

    texts = [sample.ids[sample.first_output :] for sample in samples]
    unknown = [vocabulary.unknown_share(texts, ids) for ids in (before.token_ids, learner.network.token_ids)]
    assert unknown[1] < unknown[0]
    assert not learner.train(samples[:4]).is_skipped
    assert not learner.update_vocabulary(samples)


def test_no_sample_changes_no_vocabulary(target: Path) -> None:
    head = read_head(target)
    rare = torch.arange(VOCAB - DRAFT_VOCAB // 2, VOCAB)
    learner = Learner(head, head.draft(draft_vocab_size=len(rare)), rare, Hyperparameters())
    assert not learner.update_vocabulary([])
    assert torch.equal(learner.network.token_ids, rare)


def test_a_start_from_a_draft_takes_its_vocabulary(target: Path, samples: list[Sample]) -> None:
    head = read_head(target)
    config = head.draft(draft_vocab_size=DRAFT_VOCAB // 2)
    low, high = (torch.arange(DRAFT_VOCAB // 2) + first for first in (0, DRAFT_VOCAB // 2))
    started, other = (Learner(head, config, ids, Hyperparameters()) for ids in (low, high))
    started.start_from(other.network.state_dict())
    assert started.train(samples[:4]) == other.train(samples[:4])


def test_after_several_bad_steps_the_last_good_weights_return(target: Path, samples: list[Sample]) -> None:
    learner = make_learner(target)
    learner.mark_good()
    good = learner.network.fc.weight.detach().clone()
    learner.train(samples[:4])
    bad = replace(samples[0], teacher=LastHidden(torch.full((samples[0].num_rows, HIDDEN), float("inf"))))
    for _ in range(MAX_BAD_STEPS):
        assert learner.train([bad]).is_skipped
    assert torch.equal(learner.network.fc.weight, good)
    assert torch.equal(learner.average.fc.weight, good)
    assert not learner.train(samples[:4]).is_skipped


def test_a_resumed_learner_takes_the_same_next_step(target: Path, samples: list[Sample]) -> None:
    one, other = make_learner(target), make_learner(target)
    for _ in range(3):
        one.train(samples[:4])
    other.load_state_dict(deepcopy(one.state_dict()))
    first, second = one.train(samples[4:8]), other.train(samples[4:8])
    assert first == second
    assert torch.equal(one.network.fc.weight, other.network.fc.weight)
    assert torch.equal(one.average.fc.weight, other.average.fc.weight)


def test_states_and_versions_have_the_size_that_is_planned_for(
    target: Path, samples: list[Sample], tmp_path: Path
) -> None:
    def num_bytes(state: object) -> int:
        if isinstance(state, torch.Tensor):
            return state.nbytes
        return sum(map(num_bytes, state.values())) if isinstance(state, dict) else 0

    learner = make_learner(target, Compute(dtype=torch.bfloat16))
    learner.train(samples[:2])
    sizes = sizing(read_head(target).config, learner.network.config)
    assert num_bytes(learner.state_dict()) == pytest.approx(sizes.state.amount, rel=0.02)
    checkpoint.save(snapshot(learner.network), tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_size == pytest.approx(sizes.version.amount, abs=4096)


def test_only_what_is_asked_for_is_trained(target: Path, samples: list[Sample]) -> None:
    frozen, trained = make_learner(target), make_learner(target, trains_head=True)
    before = frozen.network.lm_head.weight.detach().clone()
    frozen.train(samples[:4])
    trained.train(samples[:4])
    assert torch.equal(frozen.network.lm_head.weight, before)
    assert not torch.equal(trained.network.lm_head.weight, before)


def test_a_batch_without_a_token_of_the_draft_vocabulary_is_no_step(target: Path, samples: list[Sample]) -> None:
    learner = make_learner(target)
    foreign = replace(samples[0], ids=torch.full_like(samples[0].ids, 400))
    assert learner.train([foreign]).num_rows == 0
    assert learner.step == 0


def test_corrections_weigh_more(target: Path, samples: list[Sample]) -> None:
    marked = [replace(s, corrections=s.corrections & (torch.arange(len(s.ids)) % 3 == 0)) for s in samples[:4]]
    plain, weighted = make_learner(target, correction_weight=0.0), make_learner(target, correction_weight=5.0)
    assert plain.train(marked).loss != weighted.train(marked).loss


def test_how_likely_all_samples_were_to_be_captured_changes_nothing(target: Path, samples: list[Sample]) -> None:
    scarce = [replace(sample, probability=0.01) for sample in samples[:4]]
    assert make_learner(target).train(scarce).loss == pytest.approx(make_learner(target).train(samples[:4]).loss)


def test_without_a_discard_weight_rows_after_rejections_change_not_a_bit(target: Path, rejected: list[Sample]) -> None:
    plain, blind = make_learner(target), make_learner(target)
    without = [replace(sample, counterfactuals=()) for sample in rejected]
    for _ in range(3):
        assert plain.train(without) == blind.train(rejected)
    assert torch.equal(plain.network.fc.weight, blind.network.fc.weight)


def test_a_discard_weight_changes_not_a_bit_where_nothing_was_captured(target: Path, samples: list[Sample]) -> None:
    assert make_learner(target, discard_weight=1.0).train(samples[:4]) == make_learner(target).train(samples[:4])


def test_the_discard_loss_is_the_divergence_along_the_rejected_drafts(target: Path, rejected: list[Sample]) -> None:
    """By hand: the draft reads the rejected text as a text of its own, two steps from every row."""
    one = rejected[0].counterfactuals[9]
    sample = replace(rejected[0], counterfactuals=(one,))
    weighted = make_learner(target, discard_weight=3.0, ttt_steps=2, step_decay=0.5)
    plain = make_learner(target, ttt_steps=2, step_decay=0.5)
    network, place = make_learner(target).network, one.start

    ids = torch.cat([sample.ids[1:place], one.ids, torch.tensor([0, 0])])[None]
    aux = decoded([sample.aux[:place], one.aux])[None]
    head = read_head(target).head[:DRAFT_VOCAB].float()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        states = network.unroll(aux, ids, num_steps=2)
        log_q = [network.logits(state[0]).float().log_softmax(-1) for state in states]
    assert isinstance(one.teacher, LastHidden)
    log_p = (one.teacher.states.float() @ head.T).log_softmax(-1)
    p = log_p.exp()
    expected = 0.0
    for j, decay in enumerate([1.0, 0.5]):
        # What follows the draft at index i of the text is predicted by step j of the row j + 1 before it.
        kl = [(p[n] * (log_p[n] - log_q[j][place + n - 1 - j])).sum() for n in range(2)]
        expected += 3.0 * decay * float(kl[0] + kl[1]) / 2

    assert expected > 1
    measured, base = weighted.train([sample]), plain.train([sample])
    assert measured.loss - base.loss == pytest.approx(expected, rel=0.01)
    assert measured.num_rows - base.num_rows == 2


def test_the_discard_loss_goes_down_on_a_fixed_batch(target: Path, rejected: list[Sample]) -> None:
    """Where all of a text's branches fit into a step, the same ones are seen every time."""
    few = [replace(sample, counterfactuals=sample.counterfactuals[3:5]) for sample in rejected]

    def discarded(learner: Learner) -> float:
        """The loss with a weight of one, less that with none; nothing is learnt of it."""
        losses = []
        for weight in (1.0, 0.0):
            probe = make_learner(target, discard_weight=weight)
            probe.network.load_state_dict(learner.network.state_dict())
            losses.append(probe.train(few).loss)
        return losses[0] - losses[1]

    learner = make_learner(target, discard_weight=1.0)
    before = discarded(learner)
    for _ in range(15):
        assert not learner.train(few).is_skipped
    assert discarded(learner) < 0.5 * before


def test_a_resumed_learner_goes_on_with_the_branches_whose_turn_it_is(target: Path, rejected: list[Sample]) -> None:
    one, other = make_learner(target, discard_weight=1.0), make_learner(target, discard_weight=1.0)
    for _ in range(3):
        one.train(rejected)
    other.load_state_dict(deepcopy(one.state_dict()))
    assert one.train(rejected) == other.train(rejected)


@pytest.mark.parametrize("loss", ["forward_kl", "reverse_kl", "acceptance"])
def test_a_rule_is_learnt_from_the_likeliest_tokens(target: Path, samples: list[Sample], loss: str) -> None:
    learner = make_learner(target, loss=loss)
    before = acceptance_length(learner, samples[8:])
    taught = likeliest(target, 4, range(8))
    reports = [learner.train(taught) for _ in range(40)]
    assert not any(report.is_skipped for report in reports)
    assert acceptance_length(learner, samples[8:]) > before + 0.3


@pytest.mark.parametrize("loss", ["forward_kl", "reverse_kl", "acceptance"])
def test_the_likeliest_of_all_tokens_teach_what_the_last_hidden_state_teaches(
    target: Path, samples: list[Sample], loss: str
) -> None:
    of_hidden, of_tokens = make_learner(target, loss=loss), make_learner(target, loss=loss)
    first, second = of_hidden.train(samples[:4]), of_tokens.train(likeliest(target, VOCAB, range(4)))
    assert second.num_rows == first.num_rows
    assert second.loss == pytest.approx(first.loss, rel=1e-5)
    assert second.grad_norm == pytest.approx(first.grad_norm, rel=1e-4)
    for mine, other in zip(of_hidden.network.parameters(), of_tokens.network.parameters(), strict=True):
        assert (mine.grad is None) == (other.grad is None)
        if mine.grad is not None and other.grad is not None:
            scale = float(mine.grad.abs().max())
            torch.testing.assert_close(other.grad, mine.grad, rtol=0.02, atol=0.005 * scale)


def test_both_forms_of_the_teacher_meet_in_one_step(target: Path, rejected: list[Sample]) -> None:
    tokens = likeliest(target, VOCAB, range(4), counterfactual_rows=2)
    mixed = [rejected[0], tokens[1], rejected[2], tokens[3]]
    fewer = likeliest(target, 8, range(3, 4), counterfactual_rows=2)
    together, apart, uneven = (make_learner(target, discard_weight=1.0) for _ in range(3))
    one, other = together.train(mixed), apart.train(rejected)
    assert one.num_rows == other.num_rows
    assert one.loss == pytest.approx(other.loss, rel=1e-5)
    report = uneven.train([*mixed[:3], *fewer])
    assert not report.is_skipped
    assert report.num_rows == other.num_rows


def test_rows_after_a_rejection_that_name_no_token_of_the_draft_are_not_trained_on(target: Path) -> None:
    (sample,) = likeliest(target, 1, range(1), counterfactual_rows=2)
    foreign = TopK(torch.tensor([[DRAFT_VOCAB + 1], [5]]), torch.zeros(2, 1))
    kept = tuple(replace(one, teacher=foreign) for one in sample.counterfactuals[:3])
    weighted, plain = make_learner(target, discard_weight=1.0), make_learner(target)
    measured = weighted.train([replace(sample, counterfactuals=kept)])
    assert measured.num_rows - plain.train([sample]).num_rows == 3
    nowhere = replace(kept[0], teacher=foreign.at(slice(0, 1)), ids=kept[0].ids[:1], aux=kept[0].aux[:1])
    report = make_learner(target, discard_weight=1.0).train([replace(sample, counterfactuals=(nowhere,))])
    without = make_learner(target).train([sample])
    assert report.num_rows == without.num_rows
    assert report.loss == pytest.approx(without.loss, rel=1e-4)


def test_samples_that_start_with_context_alone_learn_with_others(target: Path, samples: list[Sample]) -> None:
    (late,) = likeliest(target, 4, range(1))
    assert isinstance(late.teacher, TopK)
    late = replace(late, teacher=late.teacher.at(slice(10, None)), first_teacher_row=late.first_teacher_row + 10)
    learner = make_learner(target)
    alone = len(late.teacher)
    assert learner.train([late]).num_rows == alone
    assert learner.train([samples[1], late]).num_rows == alone + len(samples[1].ids) - samples[1].first_output


@pytest.mark.parametrize("k", [1, 4, VOCAB])
def test_an_estimate_does_not_depend_on_the_form_of_the_teacher(target: Path, samples: list[Sample], k: int) -> None:
    """It walks through the text; what the target might have said instead is not asked."""
    learner = make_learner(target)
    for _ in range(20):
        learner.train(samples[:4])
    held_out = likeliest(target, k, range(8, 12))
    assert list(map(num_tokens, held_out)) == list(map(num_tokens, samples[8:]))
    steps = verify_steps(learner.network, samples[8:], lookahead=3)
    assert verify_steps(learner.network, held_out, lookahead=3) == steps


@pytest.mark.parametrize("pack_tokens", [1, 60])
def test_passes_of_few_tokens_add_up_to_one_of_all(target: Path, rejected: list[Sample], pack_tokens: int) -> None:
    samples = [replace(rejected[0], probability=0.5), replace(rejected[1], counterfactuals=()), *rejected[2:]]
    whole = make_learner(target, discard_weight=0.5)
    parts = make_learner(target, Compute(pack_tokens=pack_tokens), discard_weight=0.5)
    expected, report = whole.train(samples), parts.train(samples)
    assert report.num_rows == expected.num_rows
    assert report.loss == pytest.approx(expected.loss, rel=1e-4)
    assert report.grad_norm == pytest.approx(expected.grad_norm, rel=0.01)


def test_a_step_holds_few_rows_at_a_time_however_many_samples_there_are(
    target: Path, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head_loss, "MIN_CHUNK_ROWS", 7)
    monkeypatch.setitem(head_loss.LOGIT_BYTES, "cpu", 1)
    budget = 2 * samples[0].num_rows
    learner = make_learner(target, Compute(pack_tokens=budget))
    forward_rows, logit_rows = list[int](), list[int]()
    learner.network.fc.register_forward_pre_hook(lambda _, aux: forward_rows.append(len(aux[0])))

    def watched(logits: torch.Tensor, target: Predictions) -> tuple[torch.Tensor, torch.Tensor]:
        logit_rows.append(len(logits))
        return forward_kl(logits, target)

    learner._text_loss = watched
    report = learner.train(samples[:4])
    assert sum(logit_rows) >= report.num_rows
    assert max(logit_rows) <= 7
    assert max(forward_rows) <= budget
    assert len(forward_rows) > 1


def test_a_frozen_head_that_is_the_targets_is_in_memory_once(target: Path, samples: list[Sample]) -> None:
    learner = make_learner(target, Compute(dtype=torch.bfloat16))
    assert learner.network.lm_head.weight.dtype == torch.bfloat16
    assert learner._vocabulary.head.data_ptr() == learner.network.lm_head.weight.data_ptr()
    trained = make_learner(target, trains_head=True)
    assert trained.network.lm_head.weight.dtype == torch.float32
    other = learner.network.state_dict() | {"lm_head.weight": learner.network.lm_head.weight * 2}
    learner.start_from(other)
    assert learner._vocabulary.head.data_ptr() != learner.network.lm_head.weight.data_ptr()
    assert not learner.train(samples[:2]).is_skipped


@pytest.mark.parametrize("has_products", [True, False])
def test_a_published_draft_is_judged_in_either_type_of_products(
    target: Path, samples: list[Sample], monkeypatch: pytest.MonkeyPatch, *, has_products: bool
) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: has_products)
    learner = make_learner(target)
    learner.network.share(learner.network.embedding.bfloat16())
    published = snapshot(learner.network)
    assert published.fc.weight.dtype == torch.bfloat16
    steps = sum(verify_steps(published, samples[:4], lookahead=3))
    assert steps == pytest.approx(sum(verify_steps(learner.network, samples[:4], lookahead=3)), rel=0.1)
    assert published.fc.weight.dtype == torch.bfloat16


def test_a_device_out_of_memory_costs_half_the_budget_once(
    target: Path, samples: list[Sample], caplog: pytest.LogCaptureFixture
) -> None:
    needed = samples[0].num_rows - 1
    limited, whole = make_learner(target, Compute(pack_tokens=4 * needed)), make_learner(target)
    limit = 2 * needed

    def allocate(_: object, aux: tuple[torch.Tensor]) -> None:
        if len(aux[0]) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")

    limited.network.fc.register_forward_pre_hook(allocate)
    report, expected = limited.train(samples[:4]), whole.train(samples[:4])
    assert report.loss == pytest.approx(expected.loss, rel=1e-4)
    assert report.num_rows == expected.num_rows
    assert f"{2 * needed:,}" in caplog.text
    limit = 1
    before = limited.network.fc.weight.detach().clone()
    report = limited.train(samples[:4])
    assert (report.num_rows, report.is_skipped) == (0, True)
    assert torch.equal(limited.network.fc.weight, before)
    assert "UPDRAFT_TRAINER_RECOMPUTE" in caplog.text
    assert f"passes have {needed:,}" not in caplog.text


@pytest.mark.parametrize("trains_head", [False, True])
def test_a_pass_needs_no_value_from_the_device(
    target: Path, rejected: list[Sample], monkeypatch: pytest.MonkeyPatch, *, trains_head: bool
) -> None:
    """Tensors without values: to ask one for a value or for how many values are not zero raises."""
    monkeypatch.setattr(losses, "is_native", lambda _: False)  # a GPU has no such kernel
    learner = make_learner(target, trains_head=trains_head, discard_weight=0.5)
    samples = [*rejected, *likeliest(target, 4, range(2))]
    (batch,) = learner._batches(samples, [1.0] * len(samples))
    with FakeTensorMode(allow_non_fake_inputs=True):
        loss = learner._backward(batch.to(torch.device("cpu")), ([1.0] * 3, [1.0] * 3))
    assert loss.shape == ()
    assert all(p.grad is not None for p in learner.network.parameters() if p.requires_grad)
