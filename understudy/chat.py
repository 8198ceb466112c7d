"""Chat templates: the one way messages become token ids, for training and for proving the server agrees."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from understudy.digests import digest_of
from understudy.errors import TrainingError
from understudy.records import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


# An empty block looks as Qwen3 writes it: reasoning models have seen that. The plus signs keep Jinja from trimming the template.
CLOSED_TEMPLATE = (
    "{% set own_prompt +%}OWN{%+ endset %}"
    "{% if add_generation_prompt and own_prompt.rstrip().endswith('<think>') %}{{ own_prompt.rstrip() + '\\n\\n</think>\\n\\n' }}"
    "{% else %}{{ own_prompt }}{% endif %}"
)


@dataclass(frozen=True)
class Encoded:
    """Token ids of a conversation; the loss falls on `ids[completion:]`."""

    ids: list[int]
    completion: int


def encode_prompt(tokenizer: PreTrainedTokenizerBase, messages: list[Message]) -> list[int]:
    """Token ids of a prompt, ready for the assistant's turn."""
    return list(tokenizer.encode(render_prompt(tokenizer, messages), add_special_tokens=False))


def render_prompt(tokenizer: PreTrainedTokenizerBase, messages: list[Message]) -> str:
    """The prompt's text by the model's own template, its think block closed."""
    return _render(tokenizer, [message.model_dump() for message in messages], closed_template(tokenizer))


def closed_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The chat template that training and serving use in place of the model's own; None where its own will do.

    A reasoning model's template may open a think block for the answer (R1 distillations): here the block is closed at once, so
    that the answer comes first. The own template is kept whole inside, because its wording cannot be edited safely.
    """
    if tokenizer.chat_template is None or not _opens_thinking(_render(tokenizer, [{"role": "user", "content": "?"}], None)):
        return None
    own = str(tokenizer.get_chat_template()).removesuffix("\n")  # Jinja drops a template's last newline, but not an inner one
    return CLOSED_TEMPLATE.replace("OWN", own)


def _opens_thinking(prompt: str) -> bool:
    """Whether a prompt leaves a think block open; the same test in Jinja is in CLOSED_TEMPLATE."""
    return prompt.rstrip().endswith("<think>")


def _render(tokenizer: PreTrainedTokenizerBase, turns: list[dict[str, str]], template: str | None) -> str:
    options: dict[str, Any] = {"enable_thinking": False, "chat_template": template}
    return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True, **options))


def encode_example(tokenizer: PreTrainedTokenizerBase, messages: list[Message], target: str) -> Encoded:
    """Token ids of prompt, target and end-of-turn; raises TrainingError where the tokenizer has no end-of-sequence token.

    The completion is tokenised apart from the prompt, as generation sees it: no token straddles the border.
    """
    if tokenizer.eos_token_id is None:
        raise TrainingError("the tokenizer has no end-of-sequence token", "set eos_token in its tokenizer_config.json")
    prompt = encode_prompt(tokenizer, messages)
    completion = list(tokenizer.encode(target, add_special_tokens=False))
    return Encoded([*prompt, *completion, int(tokenizer.eos_token_id)], len(prompt))


def template_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Digest of the source of the chat template that training and serving use."""
    return digest_of(closed_template(tokenizer) or tokenizer.chat_template or "")
