"""What the training tests share: a tokenizer trained on the prompts themselves, rows over made passages, a model of two layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from rag.prompts import ABSTENTION, ANSWER_TASK, PLAN_TASK, PROMPT_VERSION, VALIDATE_TASK, answer_target, proposal_text, score_target
from train.attention import attend_by_branch
from train.fused import fuse_layers
from train.head import target_logprobs_of
from train.methods import Sample, prepare
from train.recipe import Recipe
from train.trie import TrieBatch, source_states
from understudy.digests import digest_of
from understudy.files import write_json, write_jsonl
from understudy.records import Example
from understudy.workspace import Workspace, create_workspace

VOCABULARY = 600
TEMPLATE = (
    "{% for message in messages %}<|start|>{{ message.role }}\n{{ message.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


def target_logprobs(model: PreTrainedModel, batch: TrieBatch) -> torch.Tensor:
    """Log-probabilities [targets] (float32) of the batch's targets; the head runs on the positions that need it."""
    hidden = source_states(model, batch)
    return target_logprobs_of(model.get_output_embeddings(), hidden, batch.targets.to(hidden.device))


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level, so that decoding gives back the text."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=["<|start|>", "<|end|>"], initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator([PLAN_TASK, ANSWER_TASK, VALIDATE_TASK], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|end|>", chat_template=TEMPLATE, clean_up_tokenization_spaces=False)


@pytest.fixture(scope="session")
def passages() -> dict[str, str]:
    """Texts by chunk id."""
    return {f"c{i}": f"Rule {i}: the owner of thing {i} waits {i + 3} days before acting." for i in range(9)}


@pytest.fixture(scope="session")
def examples(passages: dict[str, str]) -> list[Example]:
    """Three sets of three passages, each with answers, an abstention and judged answers; and plans, which show none."""

    def row(task: str, question: str, target: str, shown: list[str], **changes: Any) -> Example:
        values = {
            "task": task,
            "question": question,
            "target": target,
            "passage_ids": shown,
            "split": "train",
            "kind": "good",
            "group_ids": [],
            "trace_id": "t",
        }
        return Example.model_validate(values | changes)

    made = []
    for first in (0, 3, 6):
        shown = [f"c{i}" for i in range(first, first + 3)]
        for i in range(first, first + 3):
            question, answer = f"How long does the owner of thing {i} wait?", f"{i + 3} days."
            made.append(row("plan", question, f"owner thing {i} wait", []))
            made.append(row("answer", question, answer_target([passages[f"c{i}"]], answer), shown, weight=0.5))
            made.append(row("validate", question, score_target(True), shown, proposal=proposal_text([passages[f"c{i}"]], answer)))
            made.append(row("validate", question, score_target(False), shown, proposal=proposal_text([], "A year.")))
            made.append(row("plan", f"Who pays for thing {i}?", f"thing {i} payer", []))
        made.append(row("answer", f"Who pays for rule {first}?", ABSTENTION, shown))
    return made


@pytest.fixture(scope="session")
def make_model() -> Callable[[Recipe], Any]:
    """The same frozen bf16 base each time, as training has it on a CPU, with a float32 adapter drawn from the recipe's seed."""

    def make(recipe: Recipe, sample: Sample = list) -> Any:
        base = tiny_base()
        base.requires_grad_(False)
        attend_by_branch(base)
        model = prepare(base, recipe, sample)
        fuse_layers(model)
        return model

    return make


def tiny_base() -> LlamaForCausalLM:
    """Two layers in bf16, always the same."""
    torch.manual_seed(0)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, initializer_range=0.2, **heads)
    return LlamaForCausalLM(config).to(torch.bfloat16)


@pytest.fixture(scope="session")
def make_workspace(
    examples: list[Example], passages: dict[str, str], tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[], Workspace]:
    """Workspaces with the model of two layers as their base, and a dataset: what `understudy train` needs, in small."""

    def make() -> Workspace:
        workspace = create_workspace(str(tmp_path_factory.mktemp("tiny") / "w"), "models: {base: tiny}\n")
        base = workspace.models / "tiny"
        tiny_base().save_pretrained(base)
        tokenizer.save_pretrained(base)
        rows = [example.model_copy(update={"split": "train" if place < 32 else "validation"}) for place, example in enumerate(examples)]
        folder = workspace.datasets / digest_of([row.model_dump() for row in rows])
        write_jsonl(folder / "examples.jsonl", [row.model_dump() for row in rows])
        write_json(folder / "passages.json", passages)
        counts = {"train": 32, "validation": len(rows) - 32}
        lineage = {"prompt_version": PROMPT_VERSION, "tenants": ["default"], "group_ids": ["g1"], "question_digests": ["q1"]}
        write_json(folder / "dataset.json", {"examples": counts, "by_step": {"plan": 18, "answer": 12, "validate": 18}, "by_kind": {"good": 9}, **lineage})
        return workspace

    return make
