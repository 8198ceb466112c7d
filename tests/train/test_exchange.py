"""Adapters from elsewhere: what can be served comes in with its lineage unknown, what cannot is refused; and ours go out whole."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, GgufConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from serve.identity import check_files
from train.exchange import config_faults, export_adapter, import_adapter
from train.gguf_export import splitter_of
from train.methods import prepare, save_method
from train.recipe import Recipe
from understudy.adapters import CONFIG, WEIGHTS, adapter_digest, find_adapter, require_served
from understudy.cli import main
from understudy.commands.wiring import default_model, resolve_name
from understudy.errors import AdapterError, NotFoundError, UsageError
from understudy.files import read_json, write_json
from understudy.models import CARD, weights_digest
from understudy.workspace import Workspace, create_workspace

IDS = torch.tensor([[1, 2, 3, 4, 5]])


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A model folder, as `models add` leaves it."""
    torch.manual_seed(0)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    folder = tmp_path_factory.mktemp("models") / "little"
    LlamaForCausalLM(LlamaConfig(vocab_size=600, hidden_size=16, intermediate_size=24, num_hidden_layers=2, initializer_range=0.2, **heads)).to(
        torch.bfloat16
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_json(folder / CARD, {"id": "little", "origin": "test", "weights_digest": weights_digest(folder)})
    return folder


@pytest.fixture
def workspace(base: Path, tmp_path: Path) -> Workspace:
    made = create_workspace(str(tmp_path / "workspace"), "models: {base: little}\n")
    made.models.mkdir()
    (made.models / "little").symlink_to(base)
    return made


@pytest.fixture(scope="module")
def written_by_peft(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What plain PEFT writes, and a trainer's pickle of its arguments beside it."""
    torch.manual_seed(1)
    model = get_peft_model(LlamaForCausalLM.from_pretrained(base), LoraConfig(r=2, lora_alpha=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.3)
    folder = tmp_path_factory.mktemp("peft") / "adapter"
    model.save_pretrained(str(folder), save_embedding_layers=False)
    (folder / "training_args.bin").write_bytes(b"\x80\x04.")
    return folder


@pytest.fixture
def made_elsewhere(written_by_peft: Path, tmp_path: Path) -> Path:
    """The test's own copy of it."""
    return shutil.copytree(written_by_peft, tmp_path / "elsewhere")


def change_config(folder: Path, **changes: Any) -> None:
    write_json(folder / CONFIG, read_json(folder / CONFIG) | changes)


def test_an_adapter_from_elsewhere_comes_in_once_with_its_lineage_unknown(workspace: Workspace, made_elsewhere: Path) -> None:
    first = import_adapter(workspace, made_elsewhere, "theirs", None, None)
    manifest, folder = find_adapter(workspace, "theirs")
    assert sorted(file.name for file in folder.iterdir()) == ["README.md", CONFIG, WEIGHTS, "manifest.json"]
    assert (folder / WEIGHTS).read_bytes() == (made_elsewhere / WEIGHTS).read_bytes()
    assert check_files(manifest, folder).passed
    assert (manifest.lineage, manifest.dataset_digest, manifest.prompt_version, manifest.seed) == ("unknown", "", "", None)
    assert (manifest.base, manifest.rank, manifest.alpha, manifest.quantisation) == ("little", 2, 4, "none")
    assert manifest.targets == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert manifest.served_base_digest == weights_digest(workspace.models / "little")
    again = import_adapter(workspace, made_elsewhere, "theirs", "little", None)
    assert again == first | {"reused": True}
    assert [p.name for p in workspace.runs.glob("*") if p.is_dir()] == []


def test_a_dataset_stated_is_recorded_with_what_it_teaches(workspace: Workspace, made_elsewhere: Path) -> None:
    summary = {"prompt_version": "p1", "tenants": ["default"], "group_ids": ["g"], "question_digests": ["q"]}
    write_json(workspace.datasets / "abc123" / "dataset.json", summary)
    import_adapter(workspace, made_elsewhere, "theirs", None, "abc")
    manifest, _ = find_adapter(workspace, "theirs")
    assert (manifest.lineage, manifest.dataset_digest) == ("stated", "abc123")
    assert manifest.model_dump(include=summary.keys()) == summary
    assert import_adapter(workspace, made_elsewhere, "theirs", None, None)["lineage"] == "stated"  # what is registered stays as it is
    with pytest.raises(NotFoundError, match="no datasets"):
        import_adapter(workspace, made_elsewhere, "theirs", None, "zzz")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"peft_type": "IA3"}, "IA3, not LORA"),
        ({"use_dora": True}, "use_dora"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "all"}, "biases"),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern"),
        ({"r": 1024}, "rank is 1024"),
        ({"r": True}, "rank is True"),
        ({"lora_alpha": 2.5}, "lora_alpha"),
        ({"init_lora_weights": "pissa_niter_4"}, "base's own weights"),
        ({"target_modules": None}, "target_modules"),
        ({"task_type": "SEQ_CLS"}, "SEQ_CLS"),
        ({"arrow_config": {"top_k": 3}}, "arrow_config"),
    ],
)
def test_a_configuration_that_cannot_be_served_is_refused(workspace: Workspace, made_elsewhere: Path, changes: dict[str, Any], reason: str) -> None:
    assert config_faults(read_json(made_elsewhere / CONFIG)) == []
    change_config(made_elsewhere, **changes)
    with pytest.raises(AdapterError, match=reason):
        import_adapter(workspace, made_elsewhere, "theirs", None, None)
    assert not workspace.adapters.exists()


def test_weights_that_are_not_pairs_on_this_base_are_refused(workspace: Workspace, made_elsewhere: Path) -> None:
    good = load_file(made_elsewhere / WEIGHTS)
    first, second = sorted(good)[:2]

    def refused(tensors: dict[str, torch.Tensor], reason: str) -> None:
        save_file(tensors, made_elsewhere / WEIGHTS)
        with pytest.raises(AdapterError, match=reason):
            import_adapter(workspace, made_elsewhere, "theirs", None, None)

    refused({key: value for key, value in good.items() if key != first}, "one half")
    refused(good | {first: torch.ones(3, 16)}, "rank 2 need")
    refused(good | {first: torch.full_like(good[first], float("nan"))}, "not finite")
    refused(good | {"base_model.model.lm_head.weight": torch.ones(2, 2)}, "no LoRA weight")
    refused({key.replace("layers.1", "layers.7"): value for key, value in good.items()}, r"layers\.7")
    save_file({key: value for key, value in good.items() if ".1.self_attn" not in key}, made_elsewhere / WEIGHTS)
    assert import_adapter(workspace, made_elsewhere, "partly", None, None)["reused"] is False  # its targets are a list: what is missing is zero
    change_config(made_elsewhere, target_modules=".*_proj")
    with pytest.raises(AdapterError, match="stands for some"):
        import_adapter(workspace, made_elsewhere, "theirs", None, None)
    (made_elsewhere / WEIGHTS).write_bytes((made_elsewhere / WEIGHTS).read_bytes()[:100])
    with pytest.raises(AdapterError, match="not safetensors"):
        import_adapter(workspace, made_elsewhere, "theirs", None, None)
    (made_elsewhere / WEIGHTS).rename(made_elsewhere / "adapter_model.bin")
    with pytest.raises(AdapterError, match="pickle"):
        import_adapter(workspace, made_elsewhere, "theirs", None, None)
    assert second in good


def test_another_base_or_tokenizer_or_name_is_refused(workspace: Workspace, made_elsewhere: Path, base: Path) -> None:
    with pytest.raises(UsageError, match="reserved"):
        import_adapter(workspace, made_elsewhere, "base", None, None)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (base / file).exists():
            shutil.copy2(base / file, made_elsewhere)
    import_adapter(workspace, made_elsewhere, "theirs", None, None)
    template = next(file for file in made_elsewhere.iterdir() if file.suffix in (".json", ".jinja") and "<|start|>{{" in file.read_text())
    template.write_text(template.read_text().replace("<|start|>{{", "<|start|> {{"))
    with pytest.raises(AdapterError, match="chat template"):
        import_adapter(workspace, made_elsewhere, "theirs", None, None)
    words = json.loads((made_elsewhere / "tokenizer.json").read_text())
    words["added_tokens"][0]["content"] = "<|begin|>"
    (made_elsewhere / "tokenizer.json").write_text(json.dumps(words))
    with pytest.raises(AdapterError, match="another tokenizer"):
        import_adapter(workspace, made_elsewhere, "theirs", None, None)
    change_config(made_elsewhere, base_model_name_or_path="owner/unheard-of")
    with pytest.raises(NotFoundError, match="unheard-of"):
        import_adapter(workspace, made_elsewhere, "theirs", None, None)


def test_exports_are_the_adapter_and_the_base_with_it(
    workspace: Workspace, made_elsewhere: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import_adapter(workspace, made_elsewhere, "theirs", None, None)
    command = ["--workspace", str(workspace.root), "--json", "adapters", "export", "theirs"]
    assert main([*command, str(tmp_path / "peft")]) == 0
    assert main([*command, str(tmp_path / "merged"), "--format", "merged"]) == 0
    assert main([*command, str(tmp_path / "merged")]) == 2  # is there already
    capsys.readouterr()
    assert read_json(tmp_path / "peft" / CONFIG)["base_model_name_or_path"] == "little"

    plain, whole = (LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in (base, tmp_path / "merged"))
    adapted = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base, dtype=torch.float32), str(tmp_path / "peft"))
    with torch.no_grad():
        logits = [model(IDS).logits for model in (adapted, whole, plain)]
    assert (logits[0] - logits[1]).abs().mean() < 0.05 * (logits[0] - logits[2]).abs().mean()  # bfloat16 rounds
    PreTrainedTokenizerFast.from_pretrained(tmp_path / "merged")
    assert main(["--workspace", str(workspace.root), "models", "add", str(tmp_path / "merged")]) == 0


def test_a_gguf_export_is_read_back_as_the_same_model_and_tokenizer(workspace: Workspace, made_elsewhere: Path, tmp_path: Path) -> None:
    """By transformers' reader, which knows nothing of our writer."""
    import_adapter(workspace, made_elsewhere, "theirs", None, None)
    export_adapter(workspace, "theirs", tmp_path / "merged", "merged")
    export_adapter(workspace, "theirs", tmp_path / "gguf", "gguf")
    (file,) = (tmp_path / "gguf").glob("*.gguf")
    options = {"gguf_file": file.name, "dtype": torch.float32, "quantization_config": GgufConfig(dequantize=True)}
    read = LlamaForCausalLM.from_pretrained(tmp_path / "gguf", **options)
    wanted = LlamaForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert read.state_dict().keys() == wanted.state_dict().keys()
    for key, tensor in wanted.state_dict().items():
        assert torch.equal(read.state_dict()[key], tensor), key
    with torch.no_grad():
        assert torch.allclose(read(IDS).logits, wanted(IDS).logits, atol=1e-5)
    text = "<|start|>user\nHow long, in 2024?  Déjà vu.<|end|>\n"
    tokenizers = [AutoTokenizer.from_pretrained(tmp_path / "gguf", gguf_file=file.name), AutoTokenizer.from_pretrained(tmp_path / "merged")]
    assert tokenizers[0](text).input_ids == tokenizers[1](text).input_ids
    assert tokenizers[0].chat_template == tokenizers[1].chat_template


def test_a_tokenizer_that_llama_cpp_may_split_otherwise_is_refused(base: Path) -> None:
    stored = read_json(base / "tokenizer.json")
    assert splitter_of(stored) == "gpt-2"
    by_words = stored["pre_tokenizer"]
    digits = {"type": "Digits", "individual_digits": True}
    assert splitter_of(stored | {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [digits, by_words]}}) == "smollm"
    for other in ({"pre_tokenizer": by_words | {"add_prefix_space": True}}, {"pre_tokenizer": None}, {"normalizer": {"type": "NFC"}}):
        with pytest.raises(AdapterError, match="splits text"):
            splitter_of(stored | other)


@pytest.mark.parametrize("method", ["ia3", "far", "bitfit"])
def test_what_vllm_cannot_apply_is_refused_by_name_and_passed_over_by_default(
    workspace: Workspace, base: Path, tmp_path: Path, method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = Recipe.model_validate({"method": method, "rank": 2, "quantisation": "none"})
    from train.trie import Row, merge_tries
    from understudy.chat import Encoded

    batch = merge_tries([Row(Encoded([1, 2, 3, 4], 1))])
    model = prepare(LlamaForCausalLM.from_pretrained(base, dtype=torch.float32).requires_grad_(False), recipe, lambda: [batch])
    folder = workspace.adapters / "odd" / "digest"
    folder.mkdir(parents=True)
    save_method(model, recipe, folder, "little")
    digest = adapter_digest(folder, weights_digest(base))
    values = {"name": "odd", "digest": digest, "base": "little", "base_digest": "", "served_base_digest": weights_digest(base), "quantisation": "none"}
    values |= {"tokenizer_digest": "", "chat_template_digest": "", "prompt_version": "", "dataset_digest": "", "recipe": {}, "seed": 0, "rank": 2, "alpha": 4}
    values |= {"targets": [], "packages": {}, "metrics": {}, "tenants": [], "group_ids": [], "question_digests": [], "created_at": 9e9, "method": method}
    write_json(folder / "manifest.json", values)

    from serve.engine import plan_engine

    assert plan_engine(workspace).adapters == []
    assert default_model(workspace) == "base"
    with pytest.raises(AdapterError, match=method):
        resolve_name(workspace, "odd")
    with pytest.raises(AdapterError, match=method):
        require_served(find_adapter(workspace, "odd")[0])
    assert main(["--workspace", str(workspace.root), "prove", "odd"]) == 1
    assert f"trained by {method}" in capsys.readouterr().err
    if method == "bitfit":
        with pytest.raises(AdapterError, match="cannot be merged"):
            export_adapter(workspace, "odd", tmp_path / "merged", "merged")
    else:
        assert export_adapter(workspace, "odd", tmp_path / "merged", "merged")["bytes"] > 0
