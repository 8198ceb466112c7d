"""A merged model as one GGUF file in bfloat16, for llama.cpp: Llama architectures with a byte-level BPE tokenizer it knows.

The layout is the one llama.cpp's own converter writes (convert_hf_to_gguf.py): rows of queries and keys in the order its rotary
embedding takes them, norms in float32, tokens with their kinds, merges, and the name of the rule that splits text before BPE. That rule is
recognised by its structure; any other is refused, because a wrong one gives other tokens without an error.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from understudy.chat import closed_template
from understudy.errors import AdapterError
from understudy.files import read_json

if TYPE_CHECKING:
    import gguf
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # llama.cpp's kinds of tokens
REMEDY = "export it with --format merged and convert that with llama.cpp's own converter"


def write_gguf(model: PreTrainedModel, tokenizer_folder: Path, file: Path, name: str) -> None:
    """Write the file. Raises AdapterError for a model or a tokenizer that this layout does not fit."""
    import gguf
    from transformers import AutoTokenizer

    config = model.config
    splitter = splitter_of(read_json(tokenizer_folder / "tokenizer.json"))
    check_model(config)
    writer = gguf.GGUFWriter(str(file), "llama")
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    _add_tokenizer(writer, AutoTokenizer.from_pretrained(str(tokenizer_folder), local_files_only=True), config.vocab_size, splitter)
    _add_tensors(writer, model)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def splitter_of(tokenizer: dict[str, Any]) -> str:
    """llama.cpp's name for the rule by which a tokenizer.json splits text before byte-level BPE. Raises AdapterError for one it has none for here."""
    rule = tokenizer.get("pre_tokenizer") or {}
    steps = [dict(step) for step in rule.get("pretokenizers", [rule])]
    kinds = [step.get("type") for step in steps]
    last = steps[-1]
    is_plain = tokenizer.get("normalizer") is None and tokenizer["model"].get("type") == "BPE" and not tokenizer["model"].get("byte_fallback")
    by_words = last.get("type") == "ByteLevel" and last.get("use_regex", True) and not last.get("add_prefix_space")
    if is_plain and by_words and kinds == ["ByteLevel"]:
        return "gpt-2"
    if is_plain and by_words and kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits"):
        return "smollm"
    raise AdapterError("the tokenizer splits text by a rule that is not known to be one of llama.cpp's", REMEDY)


def check_model(config: Any) -> None:
    """Raise AdapterError for anything but a plain Llama."""
    is_plain = config.model_type == "llama" and not config.attention_bias and not config.mlp_bias and config.hidden_act == "silu"
    if not is_plain or config.rope_parameters.get("rope_type") != "default" or config.head_dim * config.num_attention_heads != config.hidden_size:
        raise AdapterError(f"{config.model_type} with these settings is not a plain Llama", REMEDY)


def interleaved(weight: Tensor, heads: int) -> Tensor:
    """[heads × d, in] with each head's rows reordered from halves (transformers' rotary embedding) to pairs (llama.cpp's)."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns)


def _add_tokenizer(writer: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerBase, size: int, splitter: str) -> None:
    stored = read_json(Path(tokenizer.name_or_path) / "tokenizer.json")
    by_id = {place: token for token, place in stored["model"]["vocab"].items()}
    kinds = dict.fromkeys(by_id, NORMAL)
    for added in stored["added_tokens"]:
        by_id[added["id"]] = added["content"]
        kinds[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(splitter)
    writer.add_token_list([by_id.get(place, f"[PAD{place}]") for place in range(size)])
    writer.add_token_types([kinds.get(place, UNUSED) for place in range(size)])
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in stored["model"]["merges"]])
    ids = {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id, "unk": tokenizer.unk_token_id, "pad": tokenizer.pad_token_id}
    for kind, place in ids.items():
        if place is not None:
            getattr(writer, f"add_{kind}_token_id")(place)
    writer.add_add_bos_token(tokenizer.bos_token_id in tokenizer("a").input_ids)
    writer.add_add_space_prefix(False)
    template = closed_template(tokenizer) or tokenizer.chat_template
    if isinstance(template, str):
        writer.add_chat_template(template)


def _add_tensors(writer: gguf.GGUFWriter, model: PreTrainedModel) -> None:
    import gguf

    config = model.config
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for key, tensor in model.state_dict().items():
        if key == "lm_head.weight" and config.tie_word_embeddings:
            continue
        name = names.get_name(key, try_suffixes=(".weight",))
        if name is None:
            raise AdapterError(f"llama.cpp has no place for {key}", REMEDY)
        kind = key.split(".")[-2]
        ordered = interleaved(tensor, heads[kind]) if kind in heads else tensor
        if tensor.dim() == 1:
            writer.add_tensor(name, ordered.float().numpy())
        else:
            bits = ordered.to(torch.bfloat16).contiguous().view(torch.uint16).numpy()
            writer.add_tensor(name, np.ascontiguousarray(bits).view(np.uint8), raw_dtype=gguf.GGMLQuantizationType.BF16)
