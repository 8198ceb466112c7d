"""What is trained: LoRA, or another parameter-efficient method, each put on the frozen base by one function.

Every method but the two that learn virtual tokens changes only how a token's own activations are computed, so a token
trie (train/trie.py) gives it the gradients of example-by-example training as it does for LoRA. Virtual tokens come
before the first token of every row: here they become the trie's root, computed once, which every token may attend to.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from train.attention import Branch
from train.recipe import MethodName, Recipe
from train.trie import TrieBatch, backbone, weighted_loss
from understudy.adapters import CONFIG, WEIGHTS, is_served
from understudy.errors import TrainingError
from understudy.files import read_json, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Sample = Callable[[], list[TrieBatch]]  # some training batches, for methods that choose what to train by its gradients
SPARSE = "UNDERSTUDY_SPARSE"  # peft_type of a sparse change; PEFT's SHiRA would load it without its indices, so that it must not try


@dataclass(frozen=True)
class Method:
    """A way to train: `attach` puts it on a frozen base and returns the model whose trainable parameters are it."""

    attach: Callable[[PreTrainedModel, Recipe, Sample], PreTrainedModel]
    source: str  # the paper
    can_merge: bool  # into the base's weights, which can then be served as a base of their own


def prepare(model: PreTrainedModel, recipe: Recipe, sample: Sample) -> PreTrainedModel:
    """The base with the recipe's method on it, its weights drawn from the recipe's seed. Raises TrainingError."""
    torch.manual_seed(recipe.seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            adapted = METHODS[recipe.method].attach(model, recipe, sample)
        except ValueError as error:  # how PEFT reports targets that the base lacks
            raise TrainingError(f"{recipe.method} does not fit this base: {error}", "name other layers with `targets`") from error
    for module in adapted.modules():  # autocast casts once; PEFT would cast every input to float32 and autocast back
        if hasattr(module, "cast_input_dtype_enabled"):
            module.cast_input_dtype_enabled = False
    return adapted


def serving_warning(method: MethodName) -> str | None:
    """What to say before time is spent on an adapter that cannot be served; None where it can."""
    if is_served(method):
        return None
    way = "`adapters export --format merged` makes a base of its own of it" if METHODS[method].can_merge else "it stays an experiment"
    return f"vLLM serves LoRA adapters only: `serve` and `prove` will refuse what {method} trains; {way}"


def attach_lora(model: PreTrainedModel, recipe: Recipe, _sample: Sample) -> PreTrainedModel:
    """Low-rank updates of the target layers; with method dora, apart from their columns' magnitudes."""
    from peft import LoraConfig

    is_dora = recipe.method == "dora"
    config = LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.alpha,
        target_modules=recipe.targets,
        use_rslora=recipe.use_rslora,
        use_dora=is_dora,
        lora_dropout=recipe.lora_dropout,
        layers_to_transform=recipe.layers_to_transform,
        bias="none",
        task_type="CAUSAL_LM",
    )
    return _by_peft(model, config)


def attach_ia3(model: PreTrainedModel, recipe: Recipe, _sample: Sample) -> PreTrainedModel:
    """Scales of the target layers' outputs, and of the inputs of those that end a feed-forward block."""
    from peft import IA3Config

    ends = [target for target in recipe.targets if target in ("down_proj", "fc2", "c_proj", "w2")]
    return _by_peft(model, IA3Config(target_modules=recipe.targets, feedforward_modules=ends, task_type="CAUSAL_LM"))


def attach_bitfit(model: PreTrainedModel, recipe: Recipe, _sample: Sample) -> PreTrainedModel:
    """A bias added to what each target layer gives, from zero; the base's own bias, where it has one, is added to."""
    from peft import BeftConfig

    return _by_peft(model, BeftConfig(target_modules=recipe.targets, task_type="CAUSAL_LM"))


def attach_prompt_tuning(model: PreTrainedModel, recipe: Recipe, _sample: Sample) -> PreTrainedModel:
    """Embeddings of virtual tokens before the prompt, begun as those of random words."""
    from peft import PromptTuningConfig, PromptTuningInit

    if model.device.type != "cpu":
        model.set_attn_implementation("sdpa")  # its mask can be given a root
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=recipe.virtual_tokens, prompt_tuning_init=PromptTuningInit.SAMPLE_VOCAB)
    adapted = _by_peft(model, config)
    decoder, count = backbone(adapted), recipe.virtual_tokens
    plain_forward = decoder.forward

    def forward(input_ids: Tensor | None = None, **kwargs: Any) -> Any:
        if input_ids is None:  # PEFT's own forward pass has prepended them
            return plain_forward(**kwargs)
        words, positions = decoder.get_input_embeddings()(input_ids), kwargs["position_ids"]
        kwargs["inputs_embeds"] = torch.cat([adapted.get_prompt(1).to(words.dtype), words], dim=1)
        kwargs["position_ids"] = torch.cat([torch.arange(count, device=positions.device)[None], positions + count], dim=1)
        if "branches" in kwargs:
            kwargs["branches"] = rooted(kwargs["branches"], count)
        else:
            kwargs["attention_mask"] = rooted_mask(kwargs["attention_mask"], count)
        output = plain_forward(**kwargs)
        output.last_hidden_state = output.last_hidden_state[:, count:]
        return output

    decoder.forward = forward
    return adapted


def attach_prefix_tuning(model: PreTrainedModel, recipe: Recipe, _sample: Sample) -> PreTrainedModel:
    """Keys and values of virtual tokens in every layer. Its tokens attend by a dense mask: a trie's blocks begin at its own first token."""
    from peft import PrefixTuningConfig

    model.set_attn_implementation("sdpa")
    adapted = _by_peft(model, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=recipe.virtual_tokens))

    decoder, count = backbone(adapted), recipe.virtual_tokens
    plain_forward = decoder.forward

    def forward(**kwargs: Any) -> Any:
        if kwargs.get("past_key_values") is None:  # else it is PEFT's own forward pass
            mask = kwargs["attention_mask"]
            kwargs["past_key_values"] = adapted.get_prompt(1)
            kwargs["position_ids"] = kwargs["position_ids"] + count  # as PEFT counts
            kwargs["attention_mask"] = torch.cat([mask.new_zeros(1, 1, mask.shape[2], count), mask], dim=3)
        return plain_forward(**kwargs)

    decoder.forward = forward
    return adapted


def attach_sparse(model: PreTrainedModel, recipe: Recipe, sample: Sample) -> PreTrainedModel:
    """Changes of few entries of the target matrices, as many as LoRA of the recipe's rank has; PEFT's SHiRA holds them.

    fishmask takes each matrix' entries of the largest empirical Fisher information; far takes whole feed-forward nodes, those
    of the largest sum of it, where the paper takes those that a first short training moved most.
    """
    from peft import ShiraConfig

    feed_forward = ["gate_proj", "up_proj", "down_proj"]
    targets = [target for target in recipe.targets if recipe.method == "fishmask" or target in feed_forward]
    if not targets:
        raise ValueError(f"far trains {', '.join(feed_forward)}, and `targets` names none of them")
    layers = {name: layer for name, layer in model.named_modules() if name.rpartition(".")[2] in targets}
    importance = fisher_information(model, layers, sample())
    if recipe.method == "far":
        _spread_over_nodes(importance)
    by_layer = {id(layers[name]): values for name, values in importance.items()}

    def choose(layer: Any, rank: int, **_: Any) -> Tensor:
        values = by_layer.pop(id(layer))
        mask = torch.zeros(values.numel(), dtype=layer.weight.dtype, device=layer.weight.device)
        mask[values.flatten().argsort(descending=True, stable=True)[: rank * sum(values.shape)]] = 1
        return mask.view_as(values)

    config = ShiraConfig(r=recipe.rank, target_modules=targets, task_type="CAUSAL_LM")
    config.mask_fn = choose
    return _by_peft(model, config)


METHODS: dict[str, Method] = {
    "lora": Method(attach_lora, "LoRA (arXiv:2106.09685), QLoRA (arXiv:2305.14314)", can_merge=True),
    "dora": Method(attach_lora, "DoRA (arXiv:2402.09353)", can_merge=True),
    "ia3": Method(attach_ia3, "(IA)³ (arXiv:2205.05638)", can_merge=True),
    "bitfit": Method(attach_bitfit, "BitFit (arXiv:2106.10199)", can_merge=False),
    "prompt_tuning": Method(attach_prompt_tuning, "prompt tuning (arXiv:2104.08691)", can_merge=False),
    "prefix_tuning": Method(attach_prefix_tuning, "prefix tuning (arXiv:2101.00190)", can_merge=False),
    "fishmask": Method(attach_sparse, "FISH Mask (arXiv:2111.09839)", can_merge=True),
    "far": Method(attach_sparse, "Freeze And Reconfigure (arXiv:2205.01541)", can_merge=True),
}


def rooted(branches: list[Branch], count: int) -> list[Branch]:
    """The branches of a trie whose root are `count` nodes more, which everything may attend to."""
    moved = []
    for branch in branches:
        above = [(start + count, end + count) for start, end in branch.ancestors]
        runs = [(0, above[0][1]), *above[1:]] if above and above[0][0] == count else [(0, count), *above]
        moved.append(Branch(branch.start + count, branch.end + count, tuple(runs)))
    return [Branch(0, count, ()), *moved]


def rooted_mask(bias: Tensor, count: int) -> Tensor:
    """The same of an additive attention mask [1, 1, nodes, nodes]."""
    nodes = bias.shape[2]
    wider = bias.new_zeros(1, 1, count + nodes, count + nodes)
    wider[..., :count, :] = torch.finfo(bias.dtype).min
    wider[..., :count, :count].triu_(1)
    wider[..., count:, count:] = bias
    return wider


def fisher_information(model: PreTrainedModel, layers: dict[str, Any], batches: list[TrieBatch]) -> dict[str, Tensor]:
    """Mean squared gradient of each entry of the layers' weights over the batches (one gradient a batch): layer name → [out, in] float32."""
    if not batches:
        raise TrainingError("there are no batches to choose by", "build a dataset first")
    sums = {name: torch.zeros(layer.weight.shape, device=layer.weight.device) for name, layer in layers.items()}
    for layer in layers.values():
        layer.weight.requires_grad_(True)
    for batch in batches:
        (weighted_loss(model, batch) / batch.weights.sum().to(model.device)).backward()  # type: ignore[no-untyped-call]
        for name, layer in layers.items():
            sums[name] += layer.weight.grad.float() ** 2 / len(batches)
            layer.weight.grad = None
    for layer in layers.values():
        layer.weight.requires_grad_(False)
    return sums


def save_method(model: PreTrainedModel, recipe: Recipe, folder: Path, base_id: str) -> None:
    """Write weights and configuration, the base named by its id: PEFT's files, or a sparse change's values and indices."""
    from peft.tuners.shira.layer import ShiraLayer

    if recipe.method in ("fishmask", "far"):
        tensors = {}
        for name, layer in model.named_modules():
            if isinstance(layer, ShiraLayer):
                plain = name.removeprefix("base_model.model.")
                tensors[f"{plain}.values"] = layer.shira_weight["default"].detach().cpu().contiguous()
                tensors[f"{plain}.indices"] = layer.shira_indices["default"].cpu().contiguous()  # [2, values]: row and column
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        write_json(folder / CONFIG, {"peft_type": SPARSE, "r": recipe.rank, "target_modules": sorted(recipe.targets), "base_model_name_or_path": base_id})
        return
    model.peft_config["default"].base_model_name_or_path = base_id
    model.save_pretrained(folder, save_embedding_layers=False)  # "auto" would ask a hub about the base
    (folder / "README.md").unlink(missing_ok=True)
    config = read_json(folder / CONFIG)
    lists = {key: sorted(config[key]) for key in ("target_modules", "feedforward_modules") if config.get(key)}  # sets have no order of their own
    write_json(folder / CONFIG, config | lists | {"base_model_name_or_path": base_id})


def add_sparse(model: PreTrainedModel, folder: Path) -> None:
    """Add a saved sparse change to a model's own weights."""
    tensors = load_file(folder / WEIGHTS)
    with torch.no_grad():
        for key in [key for key in tensors if key.endswith(".values")]:
            name = key.removesuffix(".values")
            weight = model.get_submodule(name).weight
            assert isinstance(weight, Tensor)
            rows, columns = tensors[f"{name}.indices"].long()
            weight.index_put_((rows, columns), tensors[key].to(weight.dtype), accumulate=True)


def _by_peft(model: PreTrainedModel, config: Any) -> PreTrainedModel:
    from peft import get_peft_model

    adapted: PreTrainedModel = get_peft_model(model, config)
    return adapted


def _spread_over_nodes(importance: dict[str, Tensor]) -> None:
    """Give every entry the importance of its feed-forward node: of gate and up a row, of down a column."""
    nodes: dict[str, Tensor] = {}
    for name, values in importance.items():
        block, _, kind = name.rpartition(".")
        nodes[block] = nodes.get(block, torch.zeros(())) + values.sum(dim=0 if kind == "down_proj" else 1)
    for name, values in importance.items():
        block, _, kind = name.rpartition(".")
        importance[name] = (nodes[block][None, :] if kind == "down_proj" else nodes[block][:, None]).expand_as(values)
