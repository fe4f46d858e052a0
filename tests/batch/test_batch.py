"""The pipeline's types: the shift, the masks, row selection, and the errors that name the field."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import pytest
import torch

from megarlhf.batch.base import Axes, Batch, cat
from megarlhf.batch.rollouts import PolicyRows, Prompts, Rollout
from megarlhf.batch.supervised import AnchoredPairs, LabelledResponses, PreferencePairs, TokenBatch


def a_rollout(rows: int = 4, width: int = 8) -> Rollout:
    """Row i: a prompt of 2 tokens, a response of i + 1 tokens; token j of row i is 10 i + j."""
    tokens = 10 * torch.arange(rows)[:, None] + torch.arange(width)
    lengths = 3 + torch.arange(rows)
    return Rollout(
        tokens=tokens,
        prompt_lengths=torch.full((rows,), 2),
        lengths=lengths,
        terminated=torch.arange(rows) % 2 == 0,
        sampler_logprobs=-torch.rand(rows, width - 1),
        prompt_ids=100 + torch.arange(rows),
        answers=tuple(str(i) for i in range(rows)),
    )


def policy_rows(rows: int = 4) -> PolicyRows:
    return PolicyRows(a_rollout(rows), torch.randn(rows, 7), torch.randn(rows, 7))


def test_response_mask_covers_exactly_the_response_labels():
    rollout = a_rollout()
    for row in range(4):
        response = rollout.tokens[row, 2 : 3 + row]  # what the prompt is followed by, EOS included
        assert rollout.labels[row][rollout.response_mask[row]].tolist() == response.tolist()
    assert rollout.response_mask.sum(dim=1).tolist() == rollout.response_lengths.tolist() == [1, 2, 3, 4]
    assert rollout.inputs[0].tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert rollout.labels[0].tolist() == [1, 2, 3, 4, 5, 6, 7]


def test_prompts_repeat_keeps_copies_adjacent():
    prompts = Prompts(torch.tensor([[1, 2], [3, 0]]), torch.tensor([2, 1]), torch.tensor([7, 9]), ("a", ""))
    repeated = prompts.repeat(3)
    assert repeated.ids.tolist() == [7, 7, 7, 9, 9, 9]
    assert repeated.answers == ("a", "a", "a", "", "", "")
    assert repeated.tokens[:, 0].tolist() == [1, 1, 1, 3, 3, 3]


def test_padding_changes_no_mask_and_cat_keeps_rows():
    short, long = a_rollout(2, width=5), a_rollout(3, width=9)
    both = cat([short, long])
    assert both.tokens.shape == (5, 9)
    assert both.answers == ("0", "1", "0", "1", "2")
    assert both.response_mask.sum(dim=1).tolist() == [1, 2, 1, 2, 3]
    assert torch.equal(both.sampler_logprobs[:2, :4], short.sampler_logprobs)
    assert not both.sampler_logprobs[:2, 4:].any()
    with pytest.raises(ValueError, match="tokens has width 9, asked for 4"):
        long.padded_to(3)


def test_trimming_undoes_padding_in_every_field():
    given = policy_rows()
    back = given.padded_to(12).trimmed(7)
    for before, after in ((given, back), (given.rollout, back.rollout)):
        for name, value in vars(before).items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(vars(after)[name], value)
    assert back.rollout.answers == given.rollout.answers
    tokens, ones, two = torch.ones(4, 3, dtype=torch.int64), torch.full((4,), 1), torch.full((4,), 2)
    pairs = PreferencePairs(tokens, ones, two, torch.ones(2))
    assert pairs.trimmed(1).tokens.shape == (4, 2)
    assert pairs.padded_to(5).weight.shape == (2,)
    against = AnchoredPairs(pairs, torch.arange(8.0).view(4, 2)).padded_to(5)
    assert against.ref_logprobs.shape == against.response_mask.shape == (4, 5)
    assert torch.equal(against.trimmed(2).ref_logprobs, torch.arange(8.0).view(4, 2))


@pytest.mark.parametrize("index", [torch.tensor([3, 0, 3]), slice(1, 3), torch.tensor([], dtype=torch.int64)])
def test_rows_selects_in_every_field(index):
    given = policy_rows()
    selected = given.rows(index)
    ids = torch.arange(4)[index].tolist()
    assert selected.rollout.answers == tuple(str(i) for i in ids)
    assert selected.rollout.prompt_ids.tolist() == [100 + i for i in ids]
    assert torch.equal(selected.advantages, given.advantages[index])


def test_mini_batches_visit_every_row_once_and_repeat_with_the_seed():
    given = policy_rows(6)
    orders = []
    for _ in range(2):
        generator = torch.Generator().manual_seed(3)
        batches = list(given.mini_batches(2, generator))
        assert [len(batch) for batch in batches] == [2, 2, 2]
        orders.append([i for batch in batches for i in batch.rollout.prompt_ids.tolist()])
        for batch in batches:  # fields stay with their row
            rows = batch.rollout.prompt_ids - 100
            assert torch.equal(batch.logprobs, given.logprobs[rows])
    assert orders[0] == orders[1]
    assert sorted(orders[0]) == [100, 101, 102, 103, 104, 105] != orders[0]
    with pytest.raises(ValueError, match="6 rows do not divide into chunks of 4"):
        next(given.mini_batches(4, torch.Generator()))


def test_preference_pairs_select_pairs():
    tokens = torch.arange(6)[:, None].repeat(1, 3)
    prompts = torch.tensor([1, 1, 2, 2, 1, 1])
    pairs = PreferencePairs(tokens, prompts, torch.tensor([3, 2, 3, 2, 3, 2]), torch.tensor([0.5, 1.0, 2.0]))
    against = AnchoredPairs(pairs, torch.arange(12.0).view(6, 2))
    assert against.response_mask.tolist() == [[1, 1], [1, 0], [0, 1], [0, 0], [1, 1], [1, 0]]
    for index in (torch.tensor([2, 0]), slice(2, None, None)):
        chosen = torch.arange(3)[index]
        selected = pairs.rows(index)
        assert selected.tokens[0::2, 0].tolist() == (2 * chosen).tolist()
        assert selected.tokens[1::2, 0].tolist() == (2 * chosen + 1).tolist()
        assert torch.equal(selected.weight, pairs.weight[index])
        assert torch.equal(against.rows(index).pairs.weight, pairs.weight[index])
        assert against.rows(index).ref_logprobs[0::2, 0].tolist() == (4.0 * chosen).tolist()


@dataclasses.dataclass(frozen=True, eq=False)
class Judged(Batch):
    """Rollouts with numbers a step of reasoning, of which there are as many in every row."""

    rollout: Rollout
    step_scores: Annotated[torch.Tensor, Axes(torch.float32, ("row", "step"))]
    step_mask: Annotated[torch.Tensor, Axes(torch.bool, ("row", "step"))]

    @property
    def tokens(self) -> torch.Tensor:
        """The rollout's."""
        return self.rollout.tokens

    @property
    def lengths(self) -> torch.Tensor:
        """The rollout's."""
        return self.rollout.lengths


def judged(rows: int = 2, steps: int = 3) -> Judged:
    return Judged(a_rollout(rows), torch.randn(rows, steps), torch.ones(rows, steps, dtype=torch.bool))


def test_padding_and_trimming_touch_token_axes_alone():
    batch = judged()
    for changed in (batch.padded_to(12), batch.trimmed(3), batch.padded_to(12).trimmed(7)):
        assert torch.equal(changed.step_scores, batch.step_scores)
    assert batch.padded_to(12).tokens.shape == (2, 13)
    both = cat([batch, judged().padded_to(11)])
    assert both.step_scores.shape == (4, 3)
    assert both.tokens.shape == (4, 12)
    assert torch.equal(both.rows(slice(0, 2)).step_scores, batch.step_scores)


def test_axes_of_one_name_are_equally_long():
    with pytest.raises(ValueError, match=r"Judged.step_mask: got torch.bool \[2, 4\]; must be torch.bool \[2, 3\]"):
        dataclasses.replace(judged(), step_mask=torch.ones(2, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"Judged.step_scores: got torch.float32 \[2, 3\]; must be .* \[3, 3\]"):
        dataclasses.replace(judged(), rollout=a_rollout(3))


def test_what_is_made_from_checked_rows_is_not_checked_again(monkeypatch):
    """A check looks at values, for which a GPU must be waited for."""
    batch = policy_rows()
    checked = []

    def check(made: Batch) -> None:
        checked.append(made)

    monkeypatch.setattr(Batch, "__post_init__", check)
    cat([batch.rows(slice(0, 2)).padded_to(9).trimmed(8).to("cpu"), batch.rows(torch.tensor([3]))])
    assert checked == []
    dataclasses.replace(batch, advantages=batch.logprobs)
    assert len(checked) == 1


def test_to_keeps_every_value():
    given = policy_rows()
    moved = given.to("cpu")
    assert torch.equal(moved.rollout.tokens, given.rollout.tokens)
    assert moved.rollout.answers == given.rollout.answers
    assert torch.equal(moved.logprobs, given.logprobs)


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        a_rollout().tokens = torch.zeros(1)  # type: ignore[misc]


def test_empty_givenis_a_batch():
    empty = a_rollout().rows(slice(0, 0))
    assert len(empty) == 0
    assert empty.response_mask.shape == (0, 7)
    given = policy_rows().rows(slice(0, 0))
    assert list(given.mini_batches(2, torch.Generator())) == []


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("tokens", torch.zeros(4, 8), r"Rollout.tokens: got torch.float32 \[4, 8\]"),
        ("tokens", torch.zeros(8, dtype=torch.int64), r"Rollout.tokens: got torch.int64 \[8\]"),
        ("lengths", torch.ones(3, dtype=torch.int64), r"Rollout.lengths: got torch.int64 \[3\]; .* \[4\]"),
        ("lengths", torch.full((4,), 9), r"Rollout.lengths: row 0 is 9; must be in 1..8"),
        ("prompt_lengths", torch.tensor([2, 2, 6, 2]), r"Rollout.prompt_lengths: row 2 is 6; must be in 1..5"),
        ("prompt_lengths", torch.tensor([2, 0, 2, 2]), r"Rollout.prompt_lengths: row 1 is 0"),
        ("terminated", torch.ones(4), r"Rollout.terminated: got torch.float32 \[4\]; must be torch.bool"),
        ("sampler_logprobs", torch.zeros(4, 8), r"Rollout.sampler_logprobs: got torch.float32 \[4, 8\]; .* \[4, 7\]"),
        ("answers", ("a",), r"Rollout.answers: got tuple of 1; must be a tuple of 4"),
    ],
)
def test_rollout_errors_name_field_and_shapes(field, value, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(a_rollout(), **{field: value})


def test_other_errors_name_field_and_shapes():
    tokens, lengths = torch.zeros(4, 3, dtype=torch.int64), torch.full((4,), 3)
    with pytest.raises(ValueError, match=r"PolicyRows.advantages: got torch.float32 \[4, 6\]; .* \[4, 7\]"):
        dataclasses.replace(policy_rows(), advantages=torch.zeros(4, 6))
    with pytest.raises(ValueError, match=r"Prompts.ids: got torch.int32"):
        Prompts(tokens, lengths, torch.zeros(4, dtype=torch.int32), ("",) * 4)
    with pytest.raises(ValueError, match=r"TokenBatch.loss_mask: got torch.bool \[4, 3\]; .* \[4, 2\]"):
        TokenBatch(tokens, lengths, torch.ones(4, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"PreferencePairs.weight: got torch.float32 \[4\]; .* \[2\]"):
        PreferencePairs(tokens, lengths, lengths, torch.ones(4))
    with pytest.raises(ValueError, match=r"PreferencePairs.tokens: 3 sequences; there must be 2 a row"):
        PreferencePairs(tokens[:3], lengths[:3], lengths[:3], torch.ones(1))
    with pytest.raises(ValueError, match=r"PreferencePairs.prompt_lengths: row 1 is 4; must be in 1..3"):
        PreferencePairs(tokens, torch.tensor([1, 4, 1, 1]), lengths, torch.ones(2))
    with pytest.raises(ValueError, match=r"LabelledResponses.correct: got torch.int64 \[4\]; must be torch.float32"):
        LabelledResponses(tokens, lengths, lengths, torch.ones(4))
