"""Reasoning models' think blocks are closed by one template, which training renders with and the engine is started with."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rag.prompts import EXAMPLE_SHOTS, answer_messages, answer_target, plan_messages
from understudy.chat import closed_template, encode_example, encode_prompt, render_prompt, template_digest
from understudy.digests import digest_of
from understudy.records import Message

# As R1 distillations ship it, less tools: it drops what stands before </think> in assistant turns, and opens a think block.
R1 = (
    "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}{% set ns = namespace(system='') %}"
    "{%- for message in messages %}{%- if message['role'] == 'system' %}{% set ns.system = message['content'] %}{%- endif %}{%- endfor %}"
    "{{ bos_token }}{{ ns.system }}{%- for message in messages %}{%- if message['role'] == 'user' %}{{ '<｜User｜>' + message['content'] }}{%- endif %}"
    "{%- if message['role'] == 'assistant' %}{% set content = message['content'] %}"
    "{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}"
    "{{ '<｜Assistant｜>' + content + '<｜end▁of▁sentence｜>' }}{%- endif %}{%- endfor -%}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\\n' }}{% endif %}"
)
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}\n<|im_start|>assistant\n{% endif %}\n"
)
HYBRID = CHATML.replace("assistant\n{%", "assistant\n{% if enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}{%")  # as Qwen3
CLOSED = "<think>\n\n</think>\n\n"
SHIPPED = Path(str(find_spec("trl").submodule_search_locations[0])) / "chat_templates" / "deepseek_r1_distill.jinja"  # type: ignore[union-attr, index]
OPENING = {
    "r1": R1,
    "r1 as shipped": SHIPPED.read_text(encoding="utf-8"),
    "ends in a newline": R1 + "\n",
    "no newline after the tag": R1.replace("<think>\\n", "<think>"),
    "plain text": "\n  {{ messages[-1]['content'] }}\n{% if add_generation_prompt %}\n<think>\n{% endif %}\n",
}


def make_tokenizer(template: str | None) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer: every text has ids of its own."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={character: number for number, character in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<｜begin▁of▁sentence｜>", eos_token="<｜end▁of▁sentence｜>")
    tokenizer.chat_template = template
    return tokenizer


def serve(tokenizer: PreTrainedTokenizerFast, messages: list[Message]) -> list[int]:
    """Token ids as the engine makes them of messages: by the template given to it, else the model's own."""
    turns = [message.model_dump() for message in messages]
    template = closed_template(tokenizer)
    options = {"return_dict": False, "enable_thinking": False}
    return list(tokenizer.apply_chat_template(turns, chat_template=template, add_generation_prompt=True, **options))


PROMPTS = [
    plan_messages("Why?"),
    answer_messages("Why?", ["One passage.", "Another one."]),
    answer_messages("Why?", ["A <think>\n"], EXAMPLE_SHOTS),
    [Message(role="user", content="And?"), Message(role="assistant", content="Hm.</think>Yes.")],
]


@pytest.mark.parametrize("template", [*OPENING.values(), CHATML, HYBRID])
@pytest.mark.parametrize("messages", PROMPTS)
def test_training_rows_are_tokenised_as_the_engine_does(template: str, messages: list[Message]) -> None:
    tokenizer = make_tokenizer(template)
    assert encode_prompt(tokenizer, messages) == serve(tokenizer, messages)
    row = encode_example(tokenizer, messages, answer_target(["a b c"], "d"))
    assert row.ids[: row.completion] == serve(tokenizer, messages)
    assert tokenizer.decode(row.ids[row.completion :]) == "Quote: a b c\nAnswer: d<｜end▁of▁sentence｜>"


@pytest.mark.parametrize("template", OPENING.values(), ids=OPENING)
@pytest.mark.parametrize("messages", PROMPTS)
def test_an_open_think_block_is_closed_and_nothing_else_changes(template: str, messages: list[Message]) -> None:
    tokenizer = make_tokenizer(template)
    own = tokenizer.apply_chat_template([m.model_dump() for m in messages], tokenize=False, add_generation_prompt=True)
    assert own.rstrip().endswith("<think>")
    assert render_prompt(tokenizer, messages) == own.rstrip().removesuffix("<think>") + CLOSED
    closed = closed_template(tokenizer)
    assert template_digest(tokenizer) == digest_of(closed)
    without = {"tokenize": False, "add_generation_prompt": False}  # a whole conversation, as when a client continues one
    turns = [message.model_dump() for message in messages]
    assert tokenizer.apply_chat_template(turns, chat_template=closed, **without) == tokenizer.apply_chat_template(turns, **without)


def test_a_prompt_that_opens_no_block_stays_as_it_is_under_a_closed_template() -> None:
    template = R1.replace("if add_generation_prompt %}{{ '<｜A", "if add_generation_prompt and messages[-1]['role'] != 'assistant' %}{{ '<｜A")
    tokenizer = make_tokenizer(template)
    assert render_prompt(tokenizer, PROMPTS[-1]).endswith("Yes.<｜end▁of▁sentence｜>")
    assert render_prompt(tokenizer, PROMPTS[0]).endswith(CLOSED)


@pytest.mark.parametrize("template", [CHATML, HYBRID, "{{ '<think>' }} {{ messages[0]['content'] }}", None])
def test_other_templates_are_left_alone(template: str | None) -> None:
    tokenizer = make_tokenizer(template)
    assert closed_template(tokenizer) is None
    assert template_digest(tokenizer) == digest_of(template or "")
