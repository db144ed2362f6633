"""The Transformer, and its loading and saving in the Hugging Face layout.

Pre-norm, RMSNorm, rotary positions, SwiGLU, grouped-query attention, no biases. With qk_norm it is exactly Qwen3,
without it exactly Llama, and parameters carry Hugging Face's names, so that a directory written here opens in
transformers and vLLM as it is.

Shapes: B sequences, T tokens, C channels, H query heads, K key heads, D head width, V vocabulary.
"""
import dataclasses
import functools
import json
import math
import os

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import common
from kernels import attention, bidirectional_attention, linear_logprob, rms_norm, rotate, swiglu
from recompute import Off, instead_of


@dataclasses.dataclass
class Config:
    """The shape of a model. ValueError where the numbers do not fit together."""
    vocab_size: int                 # rows of the embedding: the tokenizer's ids, padded to a multiple of 128
    n_layer: int = 6
    n_head: int = 6                 # query heads
    n_kv_head: int = 0              # key and value heads, shared by groups of query heads; 0: as many as n_head
    n_embd: int = 384               # channels C
    head_dim: int = 0               # D; 0: n_embd / n_head
    n_hidden: int = 0               # width of the SwiGLU; 0: 8/3 n_embd, rounded up to a multiple of 64
    context: int = 256              # the longest sequence trained on, in tokens
    rope_theta: float = 10000.0
    qk_norm: bool = True            # True: Qwen3; False: Llama
    tied: bool = False              # the head is the embedding's own matrix
    norm_eps: float = 1e-6
    eos_id: int | None = None       # ends a text
    end_ids: tuple = ()             # more ids that end an answer: <|im_end|>, once trained with the chat template
    pad_id: int | None = None
    rope_scaling: dict | None = None    # Llama 3's stretched rotary frequencies: see rope_frequencies
    causal: bool = True             # False: a token sees what follows too, as pretrain.py --objective=mlm trains

    def __post_init__(self):
        self.n_kv_head = self.n_kv_head or self.n_head
        self.n_hidden = self.n_hidden or -(-8 * self.n_embd // 3 // 64) * 64
        sizes = self.vocab_size, self.n_layer, self.n_head, self.n_kv_head, self.n_embd, self.n_hidden, self.context
        if min(sizes) < 1 or self.head_dim < 0:
            raise ValueError(f"every size of a model must be at least 1, got {dataclasses.asdict(self)}")
        if not self.head_dim and self.n_embd % self.n_head:
            fitting = [h for h in range(1, self.n_head) if self.n_embd % (2 * h) == 0]
            raise ValueError(f"n_embd={self.n_embd} is not a multiple of n_head={self.n_head}" +
                             (f"; try n_head={fitting[-1]}" if fitting else ""))
        self.head_dim = self.head_dim or self.n_embd // self.n_head
        if self.n_head % self.n_kv_head:
            raise ValueError(f"n_head={self.n_head} is not a multiple of n_kv_head={self.n_kv_head}")
        if self.head_dim % 2:
            raise ValueError(f"rotary positions need an even head width, got n_embd / n_head = {self.head_dim}")

    @property
    def stop_ids(self):
        """The ids that end an answer."""
        return tuple(dict.fromkeys(i for i in (self.eos_id, *self.end_ids) if i is not None))

    def n_params(self, embeddings=True):
        """The number of parameters in closed form; without embeddings: the matrices of the blocks and the head."""
        C, D = self.n_embd, self.head_dim
        block = C * D * (2 * self.n_head + 2 * self.n_kv_head) + 3 * C * self.n_hidden
        if not embeddings:
            return self.n_layer * block + self.vocab_size * C
        norms = self.n_layer * (2 * C + (2 * D if self.qk_norm else 0)) + C
        return self.n_layer * block + norms + self.vocab_size * C * (1 if self.tied else 2)

    def flops_per_token(self, length):
        """Training FLOPs a token, forward and backward: 6 for each matrix weight, and 12 L H D T for attention
        (Chowdhery et al. 2022, arXiv:2204.02311, appendix B), of which causality needs half."""
        attention = (6 if self.causal else 12) * self.n_layer * self.n_head * self.head_dim * length
        return 6 * self.n_params(embeddings=False) + attention

    def to_hf(self):
        """The dictionary of Hugging Face's config.json."""
        scaling = {"rope_scaling": {"rope_type": "llama3", **self.rope_scaling}} if self.rope_scaling else {}
        name = "Qwen3" if self.qk_norm else "Llama"
        # transformers has no such model that sees both ways, and must not open one as a causal one
        return {"architectures": [name + ("ForCausalLM" if self.causal else "ForMaskedLM")],
                "model_type": ("" if self.causal else "masked_") + name.lower(),
                "vocab_size": self.vocab_size, "hidden_size": self.n_embd, "intermediate_size": self.n_hidden,
                "num_hidden_layers": self.n_layer, "num_attention_heads": self.n_head,
                "num_key_value_heads": self.n_kv_head, "head_dim": self.head_dim, "hidden_act": "silu",
                "max_position_embeddings": self.context, "rope_theta": self.rope_theta, **scaling,
                "rms_norm_eps": self.norm_eps,
                "tie_word_embeddings": self.tied, "attention_bias": False, "attention_dropout": 0.0, "mlp_bias": False,
                "use_sliding_window": False, "initializer_range": 0.02, "use_cache": True,
                "bos_token_id": self.eos_id, "eos_token_id": self.eos_id, "pad_token_id": self.pad_id,
                "dtype": "float32", "torch_dtype": "float32"}

    @classmethod
    def from_hf(cls, hf, path, generation=None):
        """The Config of a config.json's dictionary, with the end ids of a generation_config.json's; ValueError for a
        model that this Transformer does not compute."""
        kind = hf.get("model_type") if isinstance(hf, dict) else None
        causal = kind not in ("masked_llama", "masked_qwen3")
        kind = kind if causal else kind.removeprefix("masked_")
        if kind not in ("llama", "qwen3"):
            raise ValueError(f"{path}/config.json is of model type {kind!r}; model.py computes llama and qwen3 alone")
        rope = {**(hf.get("rope_parameters") or {}), **(hf.get("rope_scaling") or {})}
        scaled = rope.get("rope_type", rope.get("type", "default"))
        odd = {"rope_scaling": scaled not in ("default", "llama3"),
               "hidden_act": hf.get("hidden_act", "silu") != "silu", "attention_bias": hf.get("attention_bias", False),
               "mlp_bias": hf.get("mlp_bias", False), "use_sliding_window": hf.get("use_sliding_window", False)}
        for name in (name for name, refused in odd.items() if refused):
            raise ValueError(f"{path}/config.json has {name}={hf.get(name) or rope!r}, which model.py does not compute")
        for name in ("vocab_size", "num_hidden_layers", "num_attention_heads", "hidden_size", "intermediate_size",
                     "max_position_embeddings"):
            if not isinstance(hf.get(name, 1), int):
                raise ValueError(f"{path}/config.json has {name}={hf[name]!r}, which is not a whole number")
        try:
            eos, *ends = as_list(hf.get("eos_token_id")) or [None]
            ends += [i for i in as_list((generation or {}).get("eos_token_id")) if i not in (eos, *ends)]
            if not all(isinstance(i, (int, type(None))) for i in (eos, *ends)):
                raise ValueError(f"{path}/config.json and generation_config.json have eos_token_id={[eos, *ends]!r}, "
                                 "which are not whole numbers")
            scaling = {name: rope[name] for name in LLAMA3_ROPE} if scaled == "llama3" else None
            return cls(vocab_size=hf["vocab_size"], n_layer=hf["num_hidden_layers"], n_head=hf["num_attention_heads"],
                       n_kv_head=hf.get("num_key_value_heads") or 0, n_embd=hf["hidden_size"],
                       head_dim=hf.get("head_dim") or (128 if kind == "qwen3" else 0), n_hidden=hf["intermediate_size"],
                       context=hf["max_position_embeddings"], qk_norm=kind == "qwen3",
                       rope_theta=hf.get("rope_theta") or rope.get("rope_theta") or 10000.0,
                       tied=hf.get("tie_word_embeddings", False), norm_eps=hf["rms_norm_eps"],
                       eos_id=eos, end_ids=tuple(ends), pad_id=hf.get("pad_token_id"), rope_scaling=scaling,
                       causal=causal)
        except KeyError as missing:
            raise ValueError(f"{path}/config.json has no {missing}") from None


def as_list(value):
    return value if isinstance(value, list) else [] if value is None else [value]


class Linear(nn.Linear):
    """A bias-free linear layer that keeps fp32 master weights and multiplies in its input's dtype."""

    def __init__(self, n_in, n_out):
        super().__init__(n_in, n_out, bias=False)

    def forward(self, x):
        with instead_of(x):
            return F.linear(x, self.weight.to(x.dtype))

    def merged_weight(self):
        """The matrix that the layer multiplies by; an adapter (lora.py) adds its own to `weight`."""
        return self.weight

    def folded(self, x):
        """(input, matrix), in x's dtype, whose product is the layer's output."""
        return x, self.weight.to(x.dtype)


class Norm(nn.Module):
    def __init__(self, n, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(n)), eps

    def forward(self, x):
        return rms_norm(x, self.weight, self.eps)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        C, D = config.n_embd, config.head_dim
        self.head_dim = D
        self.q_proj = Linear(C, config.n_head * D)
        self.k_proj = Linear(C, config.n_kv_head * D)
        self.v_proj = Linear(C, config.n_kv_head * D)
        self.o_proj = Linear(config.n_head * D, C)
        if config.qk_norm:
            self.q_norm, self.k_norm = Norm(D, config.norm_eps), Norm(D, config.norm_eps)
        self.qk_norm = config.qk_norm

    def forward(self, x, cos, sin, cu_seqlens, attend):
        q, k, v = (proj(x).unflatten(-1, (-1, self.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)                               # (B, T, H, D), (B, T, K, D)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        out = attend(q, k, v) if attend else attention(q, k, v, cu_seqlens)
        return self.o_proj(out.flatten(2))


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, config):
        super().__init__()
        self.gate_proj = Linear(config.n_embd, config.n_hidden)
        self.up_proj = Linear(config.n_embd, config.n_hidden)
        self.down_proj = Linear(config.n_hidden, config.n_embd)

    def forward(self, x):
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.self_attn, self.mlp = Attention(config), MLP(config)
        self.input_layernorm = Norm(config.n_embd, config.norm_eps)
        self.post_attention_layernorm = Norm(config.n_embd, config.norm_eps)

    def forward(self, x, cos, sin, cu_seqlens, attend=None):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, cu_seqlens, attend)
        return x + self.mlp(self.post_attention_layernorm(x))


class Backbone(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.n_embd)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = Norm(config.n_embd, config.norm_eps)
        self.dtype = torch.float32              # of the activations and products; weights stay fp32
        self.checkpointing = False              # recompute each block in backward: less memory, a third more time

    def forward(self, ids, cu_seqlens=None, positions=None, attend=None):
        """Final hidden states (B, T, C). positions (B, T), and attend(layer, q, k, v), which then stands for attention,
        are for tokens that do not just follow one another (likelihood.py)."""
        x = self.embed_tokens(ids).to(self.dtype)
        if not self.config.causal:
            attend = lambda layer, q, k, v: bidirectional_attention(q, k, v, cu_seqlens)
        if positions is None:
            positions = torch.arange(ids.size(1), device=ids.device)
        cos, sin = rope(positions, rope_frequencies(self.config, ids.device), self.dtype)
        for i, layer in enumerate(self.layers):
            inputs = x, cos, sin, cu_seqlens, attend and functools.partial(attend, i)
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, *inputs, use_reentrant=False, context_fn=lambda: (Off(), Off()))
            else:
                x = layer(*inputs)
        return self.norm(x)


LLAMA3_ROPE = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def rope_frequencies(config, device):
    """(D/2,) radians a token: theta^(-2d/D). With rope_scaling (Llama 3.1, arXiv:2407.21783, as in transformers) the
    wavelengths that are long against the original context are stretched by `factor`, those between blended."""
    D = config.head_dim
    frequency = config.rope_theta ** (-torch.arange(0, D, 2, device=device, dtype=torch.float32) / D)
    if config.rope_scaling:
        factor, low, high, original = (config.rope_scaling[name] for name in LLAMA3_ROPE)
        turns = original * frequency / (2 * math.pi)            # within the original context
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        frequency = frequency * (kept + (1 - kept) / factor)
    return frequency


def rope(positions, frequencies, dtype):
    """cos and sin of the angles at `positions` (...), each (..., 1, D); angles in fp32."""
    angle = positions[..., None, None].float() * frequencies
    angle = torch.cat((angle, angle), -1)
    return angle.cos().to(dtype), angle.sin().to(dtype)


class GPT(nn.Module):
    """The language model: model(ids, targets) are per-token losses, forward_hidden(ids) what every head builds on."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = Backbone(config)
        self.lm_head = Linear(config.n_embd, config.vocab_size)
        if config.tied:
            self.lm_head.weight = self.model.embed_tokens.weight
        self.apply(self.initialise)

    def initialise(self, module):
        """Every block adds nothing at first, the head is nearly uniform: the first loss is ln(vocab_size)."""
        C = self.config.n_embd
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=1 / C if self.config.tied else 0.5)
        elif isinstance(module, nn.Linear) and not (module is self.lm_head and self.config.tied):
            nn.init.normal_(module.weight, std=0.01 if module is self.lm_head else C ** -0.5)
        elif isinstance(module, Block):                     # after its children
            module.self_attn.q_proj.weight.data *= 0.25     # small, so that Muon turns them sooner (docs/log.md)
            module.self_attn.k_proj.weight.data *= 0.25
            nn.init.zeros_(module.self_attn.o_proj.weight)
            nn.init.zeros_(module.mlp.down_proj.weight)

    def forward_hidden(self, ids, cu_seqlens=None, **layout):
        """Final hidden states (B, T, C) of ids (B, T); with cu_seqlens, packed documents do not see each other.
        layout: of prompts with their answers (packing.py)."""
        return self.model(ids, cu_seqlens, **layout)

    def forward(self, ids, targets, cu_seqlens=None, *, temperature=1.0, want_entropy=False, want_hits=False, **layout):
        """Negative log-likelihood of each target under softmax(logits / temperature), (B, T) fp32 nats; 0 where targets
        == -100. With want_entropy then also that distribution's entropies (B, T), and with want_hits whether each
        target is its likeliest token; neither has a gradient."""
        hidden, weight = self.lm_head.folded(self.forward_hidden(ids, cu_seqlens, **layout))
        found = linear_logprob(hidden, weight, targets, temperature, want_entropy, want_hits)
        return (-found[0], *found[1:]) if want_entropy or want_hits else -found

    def logits(self, hidden):
        """(..., V) fp32 logits of final hidden states."""
        return self.lm_head(hidden).float()

    def save(self, directory):
        """Writes model.safetensors (fp32, adapters merged), config.json and generation_config.json, each atomically."""
        weights = merged_weights(self)
        if self.config.tied:
            del weights["lm_head.weight"]
        config = self.config.to_hf()
        generation = {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        if self.config.end_ids:
            generation["eos_token_id"] = [*self.config.end_ids, *as_list(self.config.eos_id)]
        write_model(directory, weights, config, generation)

    @classmethod
    def load(cls, path, masked=False):
        """The model in a directory in the Hugging Face layout (ours, or any local Llama or Qwen3; "hub:ORG/NAME"
        fetches one), as fp32 on the CPU. masked: for the masked objective, which goes on from either kind.
        ValueError on missing, unknown or non-finite weights or other shapes, and on a masked model not asked for."""
        path = fetch(path)
        found = architecture(read_json(os.path.join(path, "config.json")))
        config, weights, path = read_model(path, "MaskedLM" if masked and "MaskedLM" in found else "CausalLM")
        config.causal = not masked
        with torch.device("meta"):
            model = cls(config)
        if config.tied:
            stored = next((name for name in ("model.embed_tokens.weight", "lm_head.weight") if name in weights), None)
            if stored:
                weights["model.embed_tokens.weight"] = weights["lm_head.weight"] = weights[stored]
        fill(model, weights, path)
        if config.tied:
            model.lm_head.weight = model.model.embed_tokens.weight
        return model


class ScalarHead(nn.Module):
    """One number per token from the same Transformer: a reward or a value. Hugging Face's ...ForSequenceClassification
    with one label, which reads the number at the last token.

    bias: what a reward adds to that number (judge.load_reward), kept in config.json as score_bias: transformers' score
    layer has none, and forward adds none."""

    def __init__(self, config):
        super().__init__()
        self.config, self.bias = config, 0.0
        self.model = Backbone(config)
        self.score = Linear(config.n_embd, 1)

    def forward(self, ids, cu_seqlens=None, **layout):
        """(B, T), computed in fp32 from the hidden states on: near scores are to be told apart; layout as in
        GPT.forward_hidden."""
        return self.score(self.model(ids, cu_seqlens, **layout).float()).squeeze(-1)

    def save(self, directory):
        """Writes model.safetensors (fp32) and config.json, each atomically."""
        config = self.config.to_hf()
        kind = config["architectures"][0].replace("CausalLM", "SequenceClassification")
        labels = {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}, "score_bias": self.bias}
        write_model(directory, merged_weights(self), {**config, "architectures": [kind], **labels})

    @classmethod
    def load(cls, path):
        """The head in a directory of a ...ForSequenceClassification with one label; fails as GPT.load does."""
        config, weights, path = read_model(path, "SequenceClassification")
        with torch.device("meta"):
            model = cls(config)
        model.bias = read_json(os.path.join(path, "config.json")).get("score_bias", 0.0)
        if not isinstance(model.bias, (int, float)) or not math.isfinite(model.bias):
            raise ValueError(f"{path}/config.json has score_bias={model.bias!r}, which is not a finite number")
        return fill(model, weights, path)

    @classmethod
    def begin(cls, path):
        """The head to train from a directory: a reward model's own, or a language model's Transformer with a new score
        layer, small enough that every score begins near zero."""
        path = fetch(path)
        if "SequenceClassification" in architecture(read_json(os.path.join(path, "config.json"))):
            return cls.load(path)
        base = GPT.load(path)
        with torch.device("meta"):
            model = cls(base.config)
        model.model, model.score = base.model, Linear(base.config.n_embd, 1)
        nn.init.normal_(model.score.weight, std=0.01)
        return model


def merged_weights(model):
    """The state_dict that the model has without adapters and with what they add."""
    weights = {name: tensor for name, tensor in model.state_dict().items() if ".lora_" not in name}
    linears = {name: module for name, module in model.named_modules() if isinstance(module, Linear)}
    return weights | {f"{name}.weight": module.merged_weight() for name, module in linears.items()}


def write_model(directory, weights, config, generation=None):
    from safetensors.torch import save
    weights = {name: tensor.detach().float().cpu().contiguous() for name, tensor in weights.items()}
    for name, content in ("config.json", config), ("generation_config.json", generation):
        if content:
            common.write_atomic(os.path.join(directory, name), json.dumps(content, indent=2).encode())
    common.write_atomic(os.path.join(directory, "model.safetensors"), save(weights, metadata={"format": "pt"}))


OTHER_KIND = {"CausalLM": "a reward model ({}) where a language model is wanted; give a directory that pretrain.py, "
                          "sft.py, dpo.py, ppo.py or grpo.py wrote",
              "SequenceClassification": "a language model ({}) where a reward model is wanted; make one of it with "
                                        "python reward.py --init_from={}"}
MASKED = ("a model trained with pretrain.py --objective=mlm ({}), which sees both ways and cannot continue text; give "
          "a directory of --objective=clm, or go on with it by python pretrain.py --objective=mlm --init_from={}")


def read_model(path, kind):
    """(Config, {name: tensor}, local path) of a model directory; ValueError if its config.json names another kind of
    head than `kind`, CausalLM or SequenceClassification."""
    path = fetch(path)
    hf, generation = read_json(os.path.join(path, "config.json")), os.path.join(path, "generation_config.json")
    if "MaskedLM" in architecture(hf) and kind != "MaskedLM":
        raise ValueError(f"{path} holds " + MASKED.format(architecture(hf), path))
    if any(other in architecture(hf) for other in OTHER_KIND if other != kind):
        raise ValueError(f"{path} holds " + OTHER_KIND[kind].format(architecture(hf), path))
    generation = read_json(generation) if os.path.exists(generation) else None
    return Config.from_hf(hf, path, generation), read_weights(path), path


def architecture(hf):
    """The class that a config.json names, such as Qwen3ForCausalLM; empty if it names none."""
    named = hf.get("architectures") if isinstance(hf, dict) else None
    return str(named[0]) if isinstance(named, list) and named else ""


def fill(model, weights, path):
    """The model with these weights, as fp32; ValueError unless they are exactly its own, and finite."""
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in weights.items() if not name.endswith("rotary_emb.inv_freq")}
    if wanted != found:
        name = next(name for name in {**wanted, **found} if wanted.get(name) != found.get(name))
        raise ValueError(f"the weights in {path} do not fit its config.json: {name} should be "
                         f"{wanted.get(name, 'absent')} and is {found.get(name, 'absent')}")
    for name in wanted:
        if not weights[name].sum().isfinite() and not weights[name].isfinite().all():
            raise ValueError(f"the weights in {path} are damaged: {name} holds {(~weights[name].isfinite()).sum()} "
                             "values that are not finite; go back to an earlier state")
    model.load_state_dict({name: weights[name].float() for name in wanted}, assign=True)
    return model


def fetch(path):
    """The local directory of a model: `path` itself, or a copy of hub:ORG/NAME. ValueError if there is none."""
    if path.startswith("hub:"):
        from huggingface_hub import snapshot_download
        try:
            return snapshot_download(path[4:], allow_patterns=["*.json", "*.safetensors"])
        except Exception as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise ValueError(f"could not fetch {path} ({reason})") from None
    if not os.path.isfile(os.path.join(path, "config.json")):
        raise ValueError(f"{path!r} is not a model directory: it has no config.json; give "
                         "one that pretrain.py or a later stage wrote, or hub:ORG/NAME")
    return path


def read_json(path):
    try:
        with open(path, encoding="utf-8") as f:
            return json.load(f)
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None


def read_weights(path):
    """{name: tensor} of model.safetensors, or of all the shards that model.safetensors.index.json names."""
    index = os.path.join(path, "model.safetensors.index.json")
    names = ["model.safetensors"]
    if os.path.isfile(index):
        names = sorted(set(read_json(index).get("weight_map", {}).values()))
        if not names:
            raise ValueError(f"{index} names no files")
    weights = {}
    for name in names:
        weights.update(read_tensors(os.path.join(path, name)))
    return weights


def read_tensors(file):
    """{name: tensor} of one safetensors file."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file
    try:
        return load_file(file)
    except FileNotFoundError:
        raise ValueError(f"there are no weights at {file}") from None
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged or cut short ({error})") from None
