"""Prefix sharing is exact: log-probabilities and gradients of the adapter equal example-by-example training."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tests.conftest import MODELS
from tests.train.conftest import target_logprobs
from train.attention import QUERY_BLOCK, ROUND, Branch, ancestry, attend_by_branch, dense_mask, flex_mask, plan_blocks, rounded_up
from train.batches import Batcher
from train.fused import fuse_layers
from train.methods import prepare
from train.recipe import Recipe
from train.trie import Row, TrieBatch, backbone, check_architecture, distinct_tokens, merge_tries, weighted_loss
from understudy.chat import Encoded
from understudy.errors import TrainingError
from understudy.records import Example

VOCABULARY = 7  # few tokens, so that random rows share prefixes
TOLERANCE = 1e-5
ROUNDING = 1e-6  # ten units in the last place of float32


def adapted(base: Any, shared: str, spread: float = 0.1) -> Any:
    """The base with LoRA on every linear, none of it zero; `shared` is how a trie is attended to, or "alone" for PEFT and SDPA as they come."""
    base.requires_grad_(False)
    if shared == "branches":
        attend_by_branch(base)
    made = prepare(base, Recipe(rank=4), list)
    if shared != "alone":
        fuse_layers(made)
    torch.manual_seed(1)
    for parameter in made.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(0, spread)
    return made.eval()


def tiny(vocabulary: int = VOCABULARY) -> LlamaForCausalLM:
    """Of weights so wide that attention is not flat: flat, float32 itself is off by more than the tolerance (measured against float64)."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, initializer_range=0.1, **sizes)).float()


@pytest.fixture(scope="module", params=["branches", "dense mask"])
def shared(request: pytest.FixtureRequest) -> Any:
    return adapted(tiny(), request.param)


@pytest.fixture(scope="module")
def alone() -> Any:
    return adapted(tiny(), "alone")


@st.composite
def rows(draw: st.DrawFn) -> list[Row]:
    made = []
    for _ in range(draw(st.integers(1, 6))):
        ids = draw(st.lists(st.integers(0, VOCABULARY - 1), min_size=2, max_size=12))
        made.append(Row(Encoded(ids, draw(st.integers(0, len(ids) - 1))), draw(st.sampled_from([0.5, 1.0, 2.0])), draw(st.sampled_from([None, 0.0, 3.0]))))
    return made


def logprobs_alone(model: Any, row: Row) -> torch.Tensor:
    """Of the row's completion tokens, by the model's own forward pass on the row alone.

    The softmax is in float64: torch's float32 log_softmax over 49,152 logits is itself off by 1e-5.
    """
    ids = torch.tensor(row.encoded.ids)
    logprobs = torch.log_softmax(model(ids[None]).logits[0, :-1].double(), dim=-1).gather(1, ids[1:, None])[:, 0]
    return logprobs[max(1, row.encoded.completion) - 1 :]


def loss_alone(model: Any, row: Row) -> torch.Tensor:
    logprobs = logprobs_alone(model, row)
    weights = torch.full_like(logprobs, row.weight)
    if row.first_weight is not None and row.encoded.completion > 0:
        weights[0] = row.first_weight
    return -(weights * logprobs).sum()


def adapter_gradients(model: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))


def assert_gradients_equal(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    """Every tensor, relative to its norm, but for what float32 leaves of the whole gradient where queries and keys of short rows cancel out."""
    whole = torch.stack([t.norm() for t in wanted.values()]).norm()
    assert set(found) == set(wanted)
    for name, gradient in wanted.items():
        assert (found[name] - gradient).norm() <= TOLERANCE * gradient.norm() + ROUNDING * whole, name


def assert_logprobs_equal(model: Any, trie: TrieBatch, reference: Any, batch: list[Row]) -> None:
    """The rows' tokens have in the trie the log-probabilities that they have alone, relative to the norm of all."""
    with torch.no_grad():
        by_place = dict(zip(zip(trie.sources.tolist(), trie.targets.tolist(), strict=True), target_logprobs(model, trie), strict=True))
        found = []
        for row, path in zip(batch, nodes_of(batch), strict=True):
            found += [by_place[path[i - 1], row.encoded.ids[i]] for i in range(max(1, row.encoded.completion), len(path))]
        wanted = torch.cat([logprobs_alone(reference, row) for row in batch])
        assert (torch.stack(found) - wanted).norm() <= TOLERANCE * wanted.norm()


def nodes_of(batch: list[Row]) -> list[list[int]]:
    """The trie node of each row's tokens: prefixes numbered as they first come."""
    seen: dict[tuple[int, ...], int] = {}
    return [[seen.setdefault(tuple(row.encoded.ids[: i + 1]), len(seen)) for i in range(len(row.encoded.ids))] for row in batch]


@settings(max_examples=25, deadline=None)
@given(batch=rows())
def test_logprobs_and_adapter_gradients_equal_one_by_one(shared: Any, alone: Any, batch: list[Row]) -> None:
    trie = merge_tries(batch)
    assert_logprobs_equal(shared, trie, alone, batch)
    together, apart = weighted_loss(shared, trie), torch.stack([loss_alone(alone, row) for row in batch]).sum()
    assert torch.isclose(together.double(), apart, rtol=TOLERANCE)
    assert_gradients_equal(adapter_gradients(shared, together), adapter_gradients(alone, apart))


@settings(max_examples=12, deadline=None)
@given(batch=rows())
def test_a_batch_without_sharing_is_packing(shared: Any, alone: Any, batch: list[Row]) -> None:
    """Its rows lie one after the other with positions of their own, and a packed batch of transformers gives the same."""
    apart = [Row(Encoded([i, *row.encoded.ids[1:]], max(1, row.encoded.completion)), row.weight) for i, row in enumerate(batch)]
    trie = merge_tries(apart)
    assert trie.ids.tolist() == [token for row in apart for token in row.encoded.ids]
    assert trie.positions.tolist() == [i for row in apart for i in range(len(row.encoded.ids))]
    assert len(trie.ids) == trie.tokens
    packed = alone(input_ids=trie.ids[None], position_ids=trie.positions[None], use_cache=False).logits[0]  # positions that start anew are borders to it
    logprobs = torch.log_softmax(packed[trie.sources], dim=-1).gather(1, trie.targets[:, None])[:, 0]
    loss = -(logprobs * trie.weights).sum()
    together = weighted_loss(shared, trie)
    assert torch.isclose(together, loss, rtol=TOLERANCE)
    assert_gradients_equal(adapter_gradients(shared, together), adapter_gradients(alone, loss))


@settings(max_examples=40, deadline=None)
@given(batch=rows())
def test_nodes_are_the_distinct_prefixes(batch: list[Row]) -> None:
    trie = merge_tries(batch)
    prefixes = {tuple(row.encoded.ids[: i + 1]) for row in batch for i in range(len(row.encoded.ids))}
    assert len(trie.ids) == len(prefixes) == distinct_tokens(batch)
    assert torch.equal(dense_mask(trie.branches, len(trie.ids)).sum(dim=1), trie.positions + 1)  # a node sees its ancestors and itself
    total = sum(row.weight * (len(row.encoded.ids) - max(1, row.encoded.completion)) for row in batch)
    total += sum(row.first_weight - row.weight for row in batch if row.first_weight is not None and row.encoded.completion > 0)
    assert float(trie.weights.sum()) == pytest.approx(total)


@settings(max_examples=25, deadline=None)
@given(batch=rows())
def test_blocks_and_the_walk_of_the_trie_are_the_dense_mask(batch: list[Row]) -> None:
    """What the CPU attends by and what FlexAttention gets, which no test here can run on a GPU."""
    trie = merge_tries(batch)
    nodes = len(trie.ids)
    wanted = dense_mask(trie.branches, nodes)
    places = torch.arange(nodes)
    assert torch.equal(ancestry(trie.branches)(torch.tensor(0), torch.tensor(0), places[:, None], places[None]), wanted)
    by_blocks = torch.zeros_like(wanted)
    for block in plan_blocks(tuple(trie.branches), torch.float32):
        keys = torch.cat([torch.arange(start, end) for start, end in block.runs])
        by_blocks[block.start : block.end, keys] = block.bias == 0
    assert torch.equal(by_blocks, wanted)


def test_a_flex_mask_holds_the_trie() -> None:
    trie = merge_tries([Row(Encoded([*range(200), 300 + i, *range(100)], 200)) for i in range(3)])
    mask = flex_mask(trie.branches, torch.device("cpu"))
    nodes = len(trie.ids)
    places = torch.arange(nodes)
    assert mask.seq_lengths == (nodes, nodes)
    assert torch.equal(mask.mask_mod(0, 0, places[:, None], places[None]), dense_mask(trie.branches, nodes))
    blocks = mask.to_dense()[0, 0].bool()
    assert not blocks[0, 1] and blocks[1, 0]  # blocks of 128 that no query needs are left out


@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 2**32), budgets=st.tuples(st.integers(256, 700), st.integers(700, 4000)))
def test_an_epoch_sees_the_same_rows_whatever_the_batching(
    examples: list[Example], passages: dict[str, str], tokenizer: PreTrainedTokenizerFast, seed: int, budgets: tuple[int, int]
) -> None:
    seen = []
    for budget in budgets:
        batches = Batcher(examples, passages, tokenizer, Recipe(tokens_per_batch=budget)).epoch(seed, 0)
        seen.append(Counter((tuple(row.encoded.ids), row.encoded.completion, row.weight, row.first_weight) for batch in batches for row in batch))
    assert seen[0] == seen[1]


def test_long_branches_are_cut_into_blocks_without_a_difference() -> None:
    blocked, reference = adapted(tiny(50), "branches"), adapted(tiny(50), "alone")
    prefix = torch.randint(0, 50, (2 * QUERY_BLOCK + 7,)).tolist()
    batch = [Row(Encoded([*prefix, 49 - length % 7, *torch.randint(0, 50, (length,)).tolist()], len(prefix))) for length in (1, 9, QUERY_BLOCK + 3)]
    loss, wanted = weighted_loss(blocked, merge_tries(batch)), torch.stack([loss_alone(reference, row) for row in batch]).sum()
    assert torch.isclose(loss.double(), wanted, rtol=TOLERANCE)
    assert_gradients_equal(adapter_gradients(blocked, loss), adapter_gradients(reference, wanted))


def test_shapes_repeat_however_long_rows_are() -> None:
    """Else a CPU library compiles and keeps a kernel for every batch."""
    sizes = set()
    for length in range(1, 3 * QUERY_BLOCK, 37):
        batch = merge_tries([Row(Encoded([0, *range(length), 400 + i, *range(i)], 1 + length)) for i in range(1, 9)])
        spare = rounded_up(len(batch.ids)) - len(batch.ids)
        blocks = plan_blocks((*batch.branches, *([Branch(len(batch.ids), len(batch.ids) + spare, ())] if spare else [])), torch.float32)
        assert [block.start for block in blocks] == list(range(0, len(batch.ids), QUERY_BLOCK))
        sizes |= {size for block in blocks for size in block.bias.shape}
    assert all(size % ROUND == 0 for size in sizes)


def test_sliding_windows_and_scaled_logits_are_refused() -> None:
    check_architecture(SimpleNamespace(model_type="llama", logits_scaling=1.0))
    for fault in ({"sliding_window": 64}, {"layer_types": ["full_attention", "linear_attention"]}, {"final_logit_softcapping": 30.0}, {"logits_scaling": 8}):
        with pytest.raises(TrainingError):
            check_architecture(SimpleNamespace(model_type="m", **fault))


@pytest.mark.training
def test_real_weights_train_as_one_by_one() -> None:
    """SmolLM2-135M in float32, rank 4 on every linear: three questions over one passage, and two rows that share the system prompt alone."""
    folder = MODELS / "smollm2-135m-instruct"
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)

    def row(passage: str, question: str, answer: str) -> Row:
        prompt = tokenizer.encode(f"Answer from the passage.\n{passage}\nQuestion: {question}\nAnswer:")
        return Row(Encoded([*prompt, *tokenizer.encode(f" {answer}<|im_end|>")], len(prompt)))

    passage = "The register of systems is kept by the data office, which reviews it in March and in September of each year."
    batch = [row(passage, "Who keeps the register?", "The data office."), row(passage, "When is it reviewed?", "In March and in September.")]
    batch += [row(passage, "Who pays?", "Not stated."), row("Access ends on the last day.", "When does access end?", "On the last day.")]
    load = {"dtype": torch.float32, "local_files_only": True, "attn_implementation": "sdpa"}
    blocked, reference = (adapted(AutoModelForCausalLM.from_pretrained(folder, **load), how, 0.01) for how in ("branches", "alone"))
    trie = merge_tries(batch)
    assert len(trie.ids) < 0.7 * trie.tokens
    assert backbone(blocked).config._attn_implementation != backbone(reference).config._attn_implementation
    assert_logprobs_equal(blocked, trie, reference, batch)
    together, apart = weighted_loss(blocked, trie), torch.stack([loss_alone(reference, row) for row in batch]).sum()
    assert torch.isclose(together.double(), apart, rtol=TOLERANCE)
    found, wanted = adapter_gradients(blocked, together), adapter_gradients(reference, apart)
    off = {name: (found[name] - gradient).norm() for name, gradient in wanted.items()}
    assert torch.stack(list(off.values())).norm() <= TOLERANCE * torch.stack([gradient.norm() for gradient in wanted.values()]).norm()
    assert all(off[name] <= 3 * TOLERANCE * gradient.norm() for name, gradient in wanted.items())  # one by one is itself up to 0.8 from float64
