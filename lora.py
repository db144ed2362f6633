"""Low-rank adapters beside frozen linear layers, saved in PEFT's layout (Hu et al. 2021, arXiv:2106.09685).

    y = W x + s B A dropout(x),   s = alpha / r, or alpha / sqrt(r) for rsLoRA (Kalajdzievski 2023, arXiv:2312.03732)

W (n_out, n_in) stays; A (r, n_in) and B (n_out, r) are trained. B begins at zero: nothing changes before the first
update. GPT.save and generation take the sum W + s B A: a directory written by a model with adapters opens everywhere.
"""
import contextlib
import json
import math
import os

import torch
import torch.nn.functional as F
from torch import nn

import common
from model import Linear, read_json, read_tensors

PREFIX = "base_model.model."        # of every name in an adapter's file


class LoraLinear(Linear):
    """A linear layer with an adapter; `weight` is the layer's own."""

    def __init__(self, linear, rank, alpha, rslora, dropout):
        with torch.device("meta"):      # no memory for a weight that is replaced
            super().__init__(linear.in_features, linear.out_features)
        self.weight = linear.weight
        self.rank, self.alpha, self.rslora, self.dropout = rank, alpha, rslora, dropout
        self.scale = alpha / (math.sqrt(rank) if rslora else rank)
        self.enabled = True
        self.lora_A = nn.Parameter(torch.empty(rank, self.in_features, device=self.weight.device))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, rank, device=self.weight.device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def low_rank(self, x):
        """s A dropout(x), (..., r). Without gradients nothing is dropped: that is evaluation."""
        kept = F.dropout(x, self.dropout, self.training and torch.is_grad_enabled())
        return F.linear(kept, self.lora_A.to(x.dtype)) * self.scale

    def forward(self, x):
        out = super().forward(x)
        return out + F.linear(self.low_rank(x), self.lora_B.to(x.dtype)) if self.enabled else out

    def merged_weight(self):
        return self.weight + self.scale * (self.lora_B @ self.lora_A) if self.enabled else self.weight

    def folded(self, x):
        if not self.enabled:
            return super().folded(x)
        return torch.cat((x, self.low_rank(x)), -1), torch.cat((self.weight, self.lora_B), 1).to(x.dtype)


def add(model, rank, alpha, targets, rslora=False, dropout=0.0):
    """The model with adapters on the Linear layers that `targets` names, and all other parameters frozen; in place,
    before an optimizer is built or ranks are joined.

    targets: names with commas between them, each the end of a layer's dotted name ("q_proj,v_proj",
    "layers.0.mlp.up_proj", "lm_head"), or "all" for every Linear of the blocks. ValueError on a name without a layer.
    """
    if type(rank) is not int or rank < 1:
        raise ValueError(f"an adapter's rank must be a whole number of at least 1, got {rank!r}")
    if not (is_number(alpha) and 0 < alpha < math.inf and is_number(dropout) and 0 <= dropout < 1):
        raise ValueError(f"an adapter needs alpha above 0 and dropout from 0 to below 1, got {alpha!r} and {dropout!r}")
    if has_adapters(model):
        raise ValueError("the model has adapters already; merge them before adding others")
    chosen = matching(model, targets)
    if "lm_head" in chosen and model.config.tied:
        raise ValueError("lm_head is the embedding's own matrix in this model (tied), and an adapter would part them; "
                         "leave lm_head out of the targets")
    model.requires_grad_(False)
    for name in chosen:
        parent, _, child = name.rpartition(".")
        layer = LoraLinear(model.get_submodule(name), rank, alpha, bool(rslora), dropout)
        setattr(model.get_submodule(parent), child, layer.train(model.training))
    return model


def is_number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def linears(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, Linear)}


def matching(model, targets):
    """Names of the Linear layers that `targets` means, in the model's order."""
    names, chosen = list(linears(model)), set()
    for target in (target.strip() for target in targets.split(",")):
        found = [name for name in names if f".{name}".endswith(f".{target}") or target == "all" and ".layers." in name]
        if not found:
            known = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in names))
            raise ValueError(f"no linear layer is named {target!r}; there are {known}, and all for those of the blocks")
        chosen.update(found)
    return [name for name in names if name in chosen]


def has_adapters(model):
    return any(isinstance(module, LoraLinear) for module in model.modules())


def adapters(model):
    """{name: layer} of the layers with adapters; ValueError if there are none."""
    found = {name: module for name, module in linears(model).items() if isinstance(module, LoraLinear)}
    if not found:
        raise ValueError("the model has no adapters: none were added, or they are merged already")
    return found


@contextlib.contextmanager
def disabled(model):
    """Within it the model is the one that the adapters were added to, to the bit: a reference without a second copy."""
    layers = adapters(model).values()
    before = [layer.enabled for layer in layers]
    try:
        for layer in layers:
            layer.enabled = False
        yield model
    finally:
        for layer, enabled in zip(layers, before):
            layer.enabled = enabled


@torch.no_grad()
def merge(model):
    """The model with its adapters' products added to the weights (fp32) and plain layers again, all of it trainable;
    in place. ValueError where there are no adapters, as on a second call."""
    layers = adapters(model)
    if not all(layer.enabled for layer in layers.values()):
        raise ValueError("the adapters are disabled, and merging now would lose them; merge outside lora.disabled")
    for name, layer in layers.items():
        with torch.device("meta"):
            plain = Linear(layer.in_features, layer.out_features)
        plain.weight = layer.weight                 # the parameter stays the same object
        plain.weight.copy_(layer.merged_weight())
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, plain.train(layer.training))
    return model.requires_grad_(True)


# --- files, in PEFT's layout ---

def save(model, directory, base):
    """Writes adapter_model.safetensors (fp32) and adapter_config.json, each atomically. `base`: the model directory or
    hub name that the adapters belong to. The directory should be one of its own: beside a model's config.json,
    transformers would take the adapter, and `base`, for what it is asked to open."""
    from safetensors.torch import save as as_bytes
    layers = adapters(model)
    weights = {f"{PREFIX}{name}.{part}.weight": getattr(layer, part).detach().float().cpu().contiguous()
               for name, layer in layers.items() for part in ("lora_A", "lora_B")}
    short = dict.fromkeys(name.rpartition(".")[2] for name in layers)
    whole = matching(model, ",".join(short)) == list(layers)        # short names say it, or only the full ones
    first = next(iter(layers.values()))
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM" if hasattr(model, "lm_head") else None,
              "base_model_name_or_path": str(base), "r": first.rank, "lora_alpha": first.alpha,
              "lora_dropout": first.dropout, "use_rslora": first.rslora,
              "target_modules": list(short if whole else layers), "bias": "none", "fan_in_fan_out": False,
              "init_lora_weights": True, "inference_mode": True}
    common.write_atomic(os.path.join(directory, "adapter_config.json"), json.dumps(config, indent=2).encode())
    content = as_bytes(weights, metadata={"format": "pt"})
    common.write_atomic(os.path.join(directory, "adapter_model.safetensors"), content)


# Options of adapter_config.json that `load` follows or that change nothing once trained; any other must be unset.
FOLLOWED = {"peft_type", "target_modules", "r", "lora_alpha", "lora_dropout", "use_rslora", "bias", "init_lora_weights"}
IRRELEVANT = {"task_type", "base_model_name_or_path", "revision", "inference_mode", "peft_version", "auto_mapping",
              "qalora_group_size", "megatron_core", "eva_config"}


def read_config(directory):
    """The dictionary of an adapter_config.json; ValueError if it asks for more than LoRA on linear layers."""
    path = os.path.join(directory, "adapter_config.json")
    if not os.path.isfile(path):
        raise ValueError(f"{directory!r} is not an adapter: it has no adapter_config.json")
    config = read_json(path)
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise ValueError(f"{path} is of another kind than LORA: {str(config)[:80]}")
    odd = {name: value for name, value in config.items() if value and name not in FOLLOWED | IRRELEVANT}
    if config.get("bias", "none") != "none":
        odd["bias"] = config["bias"]
    if config.get("init_lora_weights", True) not in (True, False, "gaussian", "orthogonal", "eva"):   # others change W
        odd["init_lora_weights"] = config["init_lora_weights"]
    for name, value in odd.items():
        raise ValueError(f"{path} has {name}={value!r}, which lora.py does not compute")
    for name in (name for name in ("r", "lora_alpha") if not is_number(config.get(name))):
        raise ValueError(f"{path} should have a number as {name}, and has {config.get(name)!r}")
    targets = config.get("target_modules")
    if not isinstance(targets, list) or not targets or not all(isinstance(target, str) for target in targets):
        raise ValueError(f"{path} should list names of layers as target_modules, and has {targets!r}")
    return config


@torch.no_grad()
def load(model, directory):
    """The model with the adapter in a directory (ours, or PEFT's LoRA on linear layers) added, as `add` does it.
    ValueError for an adapter of another model or kind, or one that is not finite; the model is then as it was."""
    config = read_config(directory)
    weights = read_tensors(os.path.join(directory, "adapter_model.safetensors"))
    try:
        names = matching(model, ",".join(config["target_modules"]))
    except ValueError as error:
        raise ValueError(f"the adapter in {directory} is for another model: {error}") from None
    own = model.state_dict()
    for name in [name for name in weights if ".lora_" not in name]:     # PEFT adds a copy of an adapted head's weight
        base = own.get(name.removeprefix(PREFIX).replace(".base_layer.", "."))
        if base is not None and torch.equal(base.cpu().float(), weights[name].float()):
            del weights[name]
    rank, layers = config["r"], linears(model)
    wanted = {}
    for name in names:
        wanted[f"{PREFIX}{name}.lora_A.weight"] = rank, layers[name].in_features
        wanted[f"{PREFIX}{name}.lora_B.weight"] = layers[name].out_features, rank
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    for name in (name for name in {**wanted, **found} if wanted.get(name) != found.get(name)):
        raise ValueError(f"the adapter in {directory} is for another model: {name} should be "
                         f"{wanted.get(name, 'absent')} and is {found.get(name, 'absent')}")
    for name in (name for name, tensor in weights.items() if not tensor.isfinite().all()):
        raise ValueError(f"the adapter in {directory} is damaged: {name} holds values that are not finite")
    add(model, rank, config["lora_alpha"], ",".join(names), config.get("use_rslora", False),
        config.get("lora_dropout", 0.0))
    for name, layer in adapters(model).items():
        layer.lora_A.copy_(weights[f"{PREFIX}{name}.lora_A.weight"])
        layer.lora_B.copy_(weights[f"{PREFIX}{name}.lora_B.weight"])
    return model
