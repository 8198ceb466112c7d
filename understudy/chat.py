"""Chat templates: the one way messages become token ids, for training and for proving the server agrees."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from understudy.digests import digest_of
from understudy.errors import TrainingError
from understudy.records import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Encoded:
    """Token ids of a conversation; the loss falls on `ids[completion:]`."""

    ids: list[int]
    completion: int


def encode_prompt(tokenizer: PreTrainedTokenizerBase, messages: list[Message]) -> list[int]:
    """Token ids of a prompt, ready for the assistant's turn.

    A reasoning model's think block is closed in the prompt, in training as in serving (see close_thinking).
    """
    return list(tokenizer.encode(render_prompt(tokenizer, messages), add_special_tokens=False))


def render_prompt(tokenizer: PreTrainedTokenizerBase, messages: list[Message]) -> str:
    """The prompt's text by the model's own template."""
    turns = [message.model_dump() for message in messages]
    options: dict[str, Any] = {"enable_thinking": False}
    text = str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True, **options))
    return text + close_thinking(text)


def close_thinking(prompt: str) -> str:
    """What must follow a prompt whose template opened a think block (R1 distillations), so that the answer comes at once."""
    return "\n</think>\n\n" if prompt.endswith("<think>\n") else ""


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
    """Digest of the chat template's source."""
    return digest_of(tokenizer.chat_template or "")
