"""LoRA beside PEFT's on the same weights: logits, gradients, merged weights, and adapters opened both ways.

Most tests give PEFT transformers' model of the very directory that ours is saved in."""
import pytest
import torch
from safetensors.torch import load_file

import lora
from model import GPT, Config, ScalarHead

transformers = pytest.importorskip("transformers", reason="transformers is not installed (requirements-test.txt)")
peft = pytest.importorskip("peft", reason="peft is not installed (requirements-test.txt)")

VOCAB = 96
TOLERANCE = dict(atol=5e-6, rtol=5e-6)
KINDS = [dict(qk_norm=True), dict(qk_norm=False), dict(qk_norm=False, tied=True)]
TARGETS = ["q_proj,v_proj", "all", "self_attn.o_proj,layers.1.mlp.up_proj"]


def base(folder, **changes):
    """A small random model saved in `folder`."""
    torch.manual_seed(0)
    shape = dict(vocab_size=VOCAB, n_layer=2, n_head=4, n_kv_head=2, n_embd=32, n_hidden=48, context=32, eos_id=0,
                 pad_id=1)
    model = GPT(Config(**shape | changes))
    for p in model.parameters():
        torch.nn.init.normal_(p, mean=1.0 if p.dim() == 1 else 0.0, std=0.15)
    model.save(str(folder))
    return model


def their_base(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def theirs(folder, targets, **changes):
    """PEFT's model with adapters that are not zero."""
    options = dict(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM", init_lora_weights=False)
    torch.manual_seed(1)
    return peft.get_peft_model(their_base(folder), peft.LoraConfig(**options | changes)).eval()


def fill(model, seed=2):
    """Adapters that are not zero."""
    torch.manual_seed(seed)
    for layer in lora.adapters(model).values():
        for part in (layer.lora_A, layer.lora_B):
            torch.nn.init.normal_(part, std=0.2)
    return model


def ids(B=3, T=13):
    return torch.randint(0, VOCAB, (B, T), generator=torch.Generator().manual_seed(3))


def logits(model):
    return model.logits(model.forward_hidden(ids())) if isinstance(model, GPT) else model(ids()).logits


def names(targets):
    """PEFT's way to say our `targets`."""
    return ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"] if targets == "all" else \
        targets.split(",")


@torch.no_grad()
@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("kind", KINDS)
def test_pefts_adapter_opens_here_and_gives_the_same_logits(kind, targets, tmp_path):
    plain = logits(base(tmp_path, **kind))
    reference = theirs(tmp_path, names(targets))
    reference.save_pretrained(tmp_path / "adapter")
    ours = lora.load(GPT.load(str(tmp_path)), str(tmp_path / "adapter"))
    assert len(lora.adapters(ours)) == sum("lora_A" in name for name, _ in reference.named_parameters())
    assert (logits(ours) - plain).abs().max() > 0.01        # the adapter does something
    torch.testing.assert_close(logits(ours), logits(reference), **TOLERANCE)


@torch.no_grad()
@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rslora", [False, True])
def test_our_adapter_opens_in_peft_and_gives_the_same_logits(kind, targets, rslora, tmp_path):
    ours = fill(lora.add(base(tmp_path, **kind), 4, 6, targets, rslora=rslora))
    lora.save(ours, str(tmp_path / "adapter"), tmp_path)
    reference = peft.PeftModel.from_pretrained(their_base(tmp_path), tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(ours), logits(reference), **TOLERANCE)
    wanted = {name for name in reference.state_dict() if "lora_" in name}
    assert len(wanted) == 2 * len(lora.adapters(ours))      # no adapter of theirs is at its initial values


@torch.no_grad()
def test_pefts_auto_class_finds_the_base_from_our_adapter_alone(tmp_path):
    ours = fill(lora.add(base(tmp_path / "base"), 4, 8, "all"))
    lora.save(ours, str(tmp_path / "adapter"), tmp_path / "base")
    reference = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(ours), logits(reference), **TOLERANCE)


@torch.no_grad()
@pytest.mark.parametrize("rslora, scale", [(False, 4.0), (True, 8.0)])
def test_the_scale_is_pefts(rslora, scale, tmp_path):
    base(tmp_path)
    reference = theirs(tmp_path, ["q_proj"], lora_alpha=16, use_rslora=rslora)
    ours = lora.add(GPT.load(str(tmp_path)), 4, 16, "q_proj", rslora=rslora)
    their_scales = {module.scaling["default"] for module in reference.modules() if hasattr(module, "lora_A")}
    assert their_scales == {layer.scale for layer in lora.adapters(ours).values()} == {scale}


@pytest.mark.parametrize("targets", ["q_proj,v_proj", "all", "all,lm_head"])
@pytest.mark.parametrize("rslora", [False, True])
def test_loss_and_gradients_equal_pefts_and_only_adapters_have_any(targets, rslora, tmp_path):
    base(tmp_path)
    reference = theirs(tmp_path, [*names(targets.removesuffix(",lm_head")), *["lm_head"] * ("lm_head" in targets)],
                       use_rslora=rslora)
    reference.save_pretrained(tmp_path / "adapter")
    ours = lora.load(GPT.load(str(tmp_path)), str(tmp_path / "adapter"))
    labels = ids().clone()
    labels[0, :9] = labels[2, 4:] = -100
    loss = reference(ids(), labels=labels).loss
    loss.backward()
    targets_BT = torch.cat((labels[:, 1:], torch.full((3, 1), -100)), 1)
    our_loss = ours(ids(), targets_BT).sum() / (targets_BT != -100).sum()
    our_loss.backward()
    torch.testing.assert_close(our_loss, loss, **TOLERANCE)
    expected = {name.replace(".default.weight", "").removeprefix(lora.PREFIX): p.grad
                for name, p in reference.named_parameters() if p.grad is not None}
    got = {name: p.grad for name, p in ours.named_parameters() if p.grad is not None}
    assert set(got) == set(expected) and all(".lora_" in name for name in got)
    for name in got:
        assert got[name].abs().max() > 1e-4
        torch.testing.assert_close(got[name], expected[name], **TOLERANCE)


@torch.no_grad()
def test_an_adapter_on_the_head_goes_both_ways_though_peft_adds_a_copy_of_the_head(tmp_path):
    ours = fill(lora.add(base(tmp_path), 4, 8, "q_proj,lm_head"))
    lora.save(ours, str(tmp_path / "ours"), tmp_path)
    reference = peft.PeftModel.from_pretrained(their_base(tmp_path), tmp_path / "ours").eval()
    torch.testing.assert_close(logits(ours), logits(reference), **TOLERANCE)
    reference.save_pretrained(tmp_path / "theirs")
    assert f"{lora.PREFIX}lm_head.base_layer.weight" in load_file(tmp_path / "theirs" / "adapter_model.safetensors")
    again = lora.load(GPT.load(str(tmp_path)), str(tmp_path / "theirs"))
    torch.testing.assert_close(logits(again), logits(ours), atol=0, rtol=0)
    other = GPT.load(str(tmp_path))
    other.lm_head.weight[0, 0] += 1         # the adapter came with another head than this
    with pytest.raises(ValueError, match="is for another model: base_model.model.lm_head.base_layer.weight"):
        lora.load(other, str(tmp_path / "theirs"))


@torch.no_grad()
def test_merged_weights_equal_pefts(tmp_path):
    ours = fill(lora.add(base(tmp_path), 4, 16, "all"))
    lora.save(ours, str(tmp_path / "adapter"), tmp_path)
    reference = peft.PeftModel.from_pretrained(their_base(tmp_path), tmp_path / "adapter").merge_and_unload()
    merged = lora.merge(ours).state_dict()
    assert set(merged) == set(reference.state_dict())
    for name, weight in reference.state_dict().items():
        torch.testing.assert_close(merged[name], weight, **TOLERANCE)


@torch.no_grad()
def test_transformers_opens_what_a_model_with_adapters_saves(tmp_path):
    ours = fill(lora.add(base(tmp_path / "base"), 4, 16, "all"))
    ours.save(str(tmp_path / "merged"))
    torch.testing.assert_close(logits(their_base(tmp_path / "merged").eval()), logits(ours), **TOLERANCE)


@torch.no_grad()
def test_disabled_adapters_give_what_pefts_disabled_adapters_give(tmp_path):
    base(tmp_path)
    reference = theirs(tmp_path, ["q_proj", "up_proj"])
    reference.save_pretrained(tmp_path / "adapter")
    ours = lora.load(GPT.load(str(tmp_path)), str(tmp_path / "adapter"))
    with lora.disabled(ours), reference.disable_adapter():
        torch.testing.assert_close(logits(ours), logits(reference), **TOLERANCE)


@torch.no_grad()
def test_our_adapter_of_a_scalar_head_opens_in_peft(tmp_path):
    torch.manual_seed(0)
    model = ScalarHead(Config(VOCAB, n_layer=2, n_head=2, n_embd=32, n_hidden=48, context=32, eos_id=0, pad_id=1))
    model.save(str(tmp_path))
    ours = fill(lora.add(model, 4, 8, "all"))
    lora.save(ours, str(tmp_path / "adapter"), tmp_path)
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=1)
    before = plain.eval()(ids()).logits
    reference = peft.PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()
    assert (reference(ids()).logits - before).abs().max() > 0.01
    torch.testing.assert_close(ours(ids())[:, -1:], reference(ids()).logits, **TOLERANCE)


@pytest.mark.parametrize("option, value", [("use_dora", True), ("bias", "lora_only"), ("modules_to_save", ["lm_head"]),
                                           ("rank_pattern", {"k_proj": 2}), ("alpha_pattern", {"q_proj": 3}),
                                           ("layers_to_transform", [0]), ("exclude_modules", ["k_proj"])])
def test_pefts_other_options_are_refused_by_name(option, value, tmp_path):
    base(tmp_path)
    theirs(tmp_path, ["q_proj", "k_proj"], **{option: value}).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=f"has {option}=.* which lora.py does not compute"):
        lora.load(GPT.load(str(tmp_path)), str(tmp_path / "adapter"))
