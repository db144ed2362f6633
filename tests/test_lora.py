"""Adapters: closed forms, what is trained and what stays, merging, saving, resuming, and every way a load can fail."""
import copy
import io
import json
import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode

import engine
import likelihood
import lora
import optim
from model import GPT, Config, Linear, ScalarHead

VOCAB = 80
RATES = dict(lr=0.01, matrix_lr=0.02, embed_lr=0.05, weight_decay=0.5, betas=(0.9, 0.95), momentum=0.9)
LEAVES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def randomise(model):
    for p in model.parameters():
        torch.nn.init.normal_(p, mean=1.0 if p.dim() == 1 else 0.0, std=0.2)
    return model


def tiny(seed=0, **changes):
    torch.manual_seed(seed)
    shape = dict(vocab_size=VOCAB, n_layer=2, n_head=4, n_kv_head=2, n_embd=32, n_hidden=48, context=32)
    return randomise(GPT(Config(**shape | changes)))


def adapted(targets="all", rank=3, alpha=6, seed=0, rslora=False, dropout=0.0, **changes):
    """A tiny model with adapters that are not zero."""
    model = lora.add(tiny(seed, **changes), rank, alpha, targets, rslora, dropout)
    for layer in lora.adapters(model).values():
        torch.nn.init.normal_(layer.lora_B, std=0.2)
    return model


def random_ids(B=3, T=13, seed=1):
    return torch.randint(0, VOCAB, (B, T), generator=torch.Generator().manual_seed(seed))


def nll(model, seed=1):
    ids = random_ids(seed=seed)
    return model(ids, ids.roll(-1, 1))


def logits(model):
    with torch.no_grad():
        return model.logits(model.forward_hidden(random_ids()))


def equal(a, b):
    torch.testing.assert_close(a, b, atol=0, rtol=0)


def weights_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


# --- the layer ---

def layer(rank=2, alpha=3, rslora=False, dropout=0.0, n_in=5, n_out=4):
    torch.manual_seed(0)
    made = lora.LoraLinear(Linear(n_in, n_out), rank, alpha, rslora, dropout)
    torch.nn.init.normal_(made.lora_B)
    return made


@pytest.mark.parametrize("rslora, scale", [(False, 0.75), (True, 1.5)])
def test_the_output_is_the_weights_plus_scale_times_b_a(rslora, scale):
    made, x = layer(4, 3, rslora), torch.randn(2, 3, 5)
    expected = x @ made.weight.T
    for r in range(4):
        expected = expected + scale * (x @ made.lora_A[r]).unsqueeze(-1) * made.lora_B[:, r]
    torch.testing.assert_close(made(x), expected)
    torch.testing.assert_close(x @ made.merged_weight().T, expected)


def test_gradients_are_the_hand_derived_ones():
    made, x, g = layer(), torch.randn(6, 5), torch.randn(6, 4)
    made.weight.requires_grad_(False)
    made(x).backward(g)
    torch.testing.assert_close(made.lora_B.grad, 1.5 * g.T @ (x @ made.lora_A.T))
    torch.testing.assert_close(made.lora_A.grad, 1.5 * (g @ made.lora_B).T @ x)
    assert made.weight.grad is None


def test_rank_stabilised_scale_is_8_where_the_plain_one_is_4():
    assert (layer(4, 16, True).scale, layer(4, 16, False).scale) == (8.0, 4.0)


def test_a_begins_kaiming_uniform_and_b_at_zero():
    torch.manual_seed(0)
    made = lora.LoraLinear(Linear(64, 8), 32, 1, False, 0.0)
    assert not made.lora_B.any()
    bound = 1 / math.sqrt(64)
    assert 0.95 * bound < made.lora_A.abs().max() <= bound and made.lora_A.abs().mean() > 0.45 * bound


def test_products_are_in_the_inputs_dtype_and_gradients_in_the_parameters():
    made, x = layer(), torch.randn(6, 5)
    half = made(x.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), made(x), atol=0.1, rtol=0.05)
    half.sum().backward()
    assert made.lora_A.grad.dtype == made.lora_B.grad.dtype == torch.float32


def test_the_folded_product_is_the_layers_output():
    made, x = layer(), torch.randn(2, 3, 5)
    torch.testing.assert_close(F.linear(*made.folded(x)), made(x))
    made.enabled = False
    equal(F.linear(*made.folded(x)), F.linear(x, made.weight))


def test_dropout_falls_on_the_adapters_input_alone_keeps_its_mean_and_only_in_training():
    made, x = layer(dropout=0.25), torch.ones(20000, 5)
    plain = layer()(x)
    assert (made(x) - plain).abs().max() > 0.1
    torch.testing.assert_close(made(x).mean(0), plain[0], atol=0.03, rtol=0)
    with torch.no_grad():
        equal(made(x), plain)                           # evaluation, here, is what runs without gradients
    equal(made.eval()(x), plain)
    made.train()
    torch.nn.init.zeros_(made.lora_B)
    equal(made(x), F.linear(x, made.weight))            # the frozen path sees all of its input


def test_dropout_reaches_an_adapted_head_through_the_loss():
    model = adapted("lm_head", dropout=0.5)
    assert (nll(model) - nll(model)).abs().max() > 0.01
    equal(nll(model.eval()), nll(model.eval()))


# --- add ---

@pytest.mark.parametrize("targets, tied", [("q_proj,v_proj", False), ("all", False), ("all,lm_head", False),
                                           ("q_proj", True), ("all", True)])
def test_adding_changes_nothing_to_the_bit(targets, tied):
    model = tiny(tied=tied)
    before, loss = logits(model), nll(model)
    assert lora.add(model, 4, 8, targets) is model
    equal(logits(model), before)
    torch.testing.assert_close(nll(model), loss, atol=0 if "head" not in targets else 1e-5, rtol=0)


@pytest.mark.parametrize("targets, names", [
    ("q_proj", [f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)]),
    (" v_proj , self_attn.q_proj", [f"model.layers.{i}.self_attn.{n}_proj" for i in (0, 1) for n in "qv"]),
    ("layers.1.mlp.up_proj,q_proj,q_proj", ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj",
                                           "model.layers.1.mlp.up_proj"]),
    ("lm_head", ["lm_head"]),
    ("all", [f"model.layers.{i}.{part}.{name}" for i in (0, 1) for part, names in
             (("self_attn", LEAVES[:4]), ("mlp", LEAVES[4:])) for name in names])])
def test_targets_name_layers_by_the_end_of_their_names(targets, names):
    assert list(lora.adapters(lora.add(tiny(), 2, 4, targets))) == names


@pytest.mark.parametrize("targets", ["q", "proj", "c_attn", "", "q_proj,", "embed_tokens", "norm", "All", "rojq_proj"])
def test_a_target_without_a_layer_is_refused_with_the_names_there_are(targets):
    model = tiny()
    with pytest.raises(ValueError, match="no linear layer is named .*; there are q_proj, k_proj, v_proj, o_proj, "
                                         "gate_proj, up_proj, down_proj, lm_head, and all"):
        lora.add(model, 2, 4, targets)
    assert not lora.has_adapters(model) and all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("options", [dict(rank=0), dict(rank=-1), dict(rank=2.0), dict(rank=True), dict(alpha=0),
                                     dict(alpha=-1), dict(alpha=math.nan), dict(alpha=math.inf), dict(alpha="8"),
                                     dict(dropout=1.0), dict(dropout=-0.1), dict(dropout=None)])
def test_numbers_that_cannot_be_are_refused(options):
    with pytest.raises(ValueError, match=repr(next(iter(options.values())))):
        lora.add(tiny(), **dict(rank=2, alpha=4, targets="all") | options)


def test_adding_twice_is_refused():
    with pytest.raises(ValueError, match="has adapters already"):
        lora.add(adapted("q_proj"), 2, 4, "v_proj")


def test_an_adapter_on_a_tied_head_is_refused():
    with pytest.raises(ValueError, match="leave lm_head out of the targets"):
        lora.add(tiny(tied=True), 2, 4, "all,lm_head")


def test_the_trained_numbers_are_rank_times_inputs_and_outputs_and_nothing_else():
    model = lora.add(tiny(), 3, 6, "q_proj,down_proj")
    trained = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    assert all(".lora_" in name for name in trained)
    assert sum(trained.values()) == 2 * 3 * ((32 + 32) + (48 + 32))


@pytest.mark.parametrize("tied", [False, True])
def test_backward_reaches_every_adapter_and_nothing_else(tied):
    model = adapted(tied=tied)
    nll(model).sum().backward()
    assert all((p.grad is not None and p.grad.any()) == (".lora_" in name) for name, p in model.named_parameters())


@pytest.mark.parametrize("targets", ["all", "q_proj,lm_head"])
def test_loss_and_gradients_are_those_of_a_model_with_the_merged_weights(targets):
    """dL/dB = s dL/dW A^T and dL/dA = s B^T dL/dW, with dL/dW from full training of the merged model."""
    model = adapted(targets)
    merged = lora.merge(copy.deepcopy(model))
    loss, expected = nll(model), nll(merged)
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    loss.mean().backward()
    expected.mean().backward()
    for name, layer in lora.adapters(model).items():
        grad = merged.get_parameter(f"{name}.weight").grad
        torch.testing.assert_close(layer.lora_B.grad, 2 * grad @ layer.lora_A.T, atol=2e-6, rtol=1e-4)
        torch.testing.assert_close(layer.lora_A.grad, 2 * layer.lora_B.T @ grad, atol=2e-6, rtol=1e-4)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_recomputing_blocks_in_backward_changes_no_gradient(dropout):
    grads = []
    for checkpointing in (False, True):
        model = adapted(dropout=dropout)
        model.model.checkpointing = checkpointing
        torch.manual_seed(3)
        nll(model).sum().backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    for plain, recomputed in zip(*grads):
        equal(recomputed, plain)


def flops_of_training(model):
    with FlopCounterMode(display=False) as counter:
        nll(model).sum().backward()
    return counter.get_total_flops()


def test_no_gradient_of_a_frozen_matrix_is_computed():
    """Full training multiplies each matrix three times a token; adapters leave out the gradient of W, and, in the first
    block, that of q_proj's, k_proj's and v_proj's input, which nothing needs."""
    full, frozen, tokens = tiny(), lora.add(tiny(), 1, 1, "layers.0.self_attn.q_proj"), 3 * 13
    C, block = 32, full.config.n_params(embeddings=False)
    first = C * 8 * (4 + 2 + 2)                 # numbers in q_proj, k_proj and v_proj of one block
    adapter = 2 * tokens * (32 + 32) * 3 - 2 * tokens * 32      # A's input needs no gradient either
    assert flops_of_training(full) - flops_of_training(frozen) == 2 * tokens * (block + first) - adapter


def test_log_likelihoods_are_the_adapted_models():
    model = adapted("all,lm_head")
    tokens = random_ids(B=1)[0].tolist()
    trees = likelihood.windows(tokens[1:], tokens[0], model.config.context)
    ((got, _),), = likelihood.score(model, trees)
    ((expected, _),), = likelihood.score(lora.merge(model), trees)
    assert got == pytest.approx(expected, abs=1e-4)


# --- the optimizer ---

@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_adamw_takes_every_adapter_and_muon_none(optimizer):
    model = lora.add(tiny(), 2, 4, "all,lm_head")
    built = optim.build(model, optimizer, **RATES)
    assert [type(part) for part in built.optimizers] == [torch.optim.AdamW]
    taken = [id(p) for group in built.param_groups for p in group["params"]]
    assert sorted(taken) == sorted(id(p) for name, p in model.named_parameters() if ".lora_" in name)
    assert {group["peak_lr"] for group in built.param_groups} == {RATES["lr"]}


def test_muon_keeps_the_block_matrices_that_are_trained_beside_adapters():
    model = lora.add(tiny(), 2, 4, "q_proj")
    for block in model.model.layers:
        block.mlp.requires_grad_(True)
    muon, adamw = optim.build(model, "muon", **RATES).optimizers
    assert len(muon.param_groups[0]["params"]) == 2 * 3
    assert sum(len(group["params"]) for group in adamw.param_groups) == 2 * 2


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_adapters_do_not_decay(optimizer):
    model = adapted("all,lm_head")
    before = weights_of(model)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optim.build(model, optimizer, **RATES).step()
    for name, tensor in model.state_dict().items():
        equal(tensor, before[name])


def train(model, updates, steps):
    for step in steps:
        nll(model, seed=step).mean().backward()
        updates.step()
        updates.zero_grad()


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_training_lowers_the_loss_and_leaves_the_base_as_it_was_to_the_bit(optimizer):
    model = lora.add(tiny(), 4, 8, "all,lm_head")
    base, base_logits = weights_of(model), logits(model)
    before = nll(model).mean()
    train(model, optim.build(model, optimizer, **RATES), [1] * 40)
    assert nll(model).mean() < before - 1
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, base[name]) == (".lora_" not in name), name
    with lora.disabled(model):
        equal(logits(model), base_logits)


def test_a_run_resumed_from_state_dicts_repeats_the_uninterrupted_one_to_the_bit():
    whole = lora.add(tiny(), 4, 8, "all")
    updates = optim.build(whole, "muon", **RATES)
    train(whole, updates, range(3))
    buffer = io.BytesIO()
    torch.save(dict(model=whole.state_dict(), optimizer=updates.state_dict()), buffer)
    train(whole, updates, range(3, 6))

    state = torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)
    resumed = lora.add(tiny(seed=5), 4, 8, "all")
    updates = optim.build(resumed, "muon", **RATES)
    resumed.load_state_dict(state["model"])
    updates.load_state_dict(state["optimizer"])
    train(resumed, updates, range(3, 6))
    for name, tensor in whole.state_dict().items():
        equal(resumed.state_dict()[name], tensor)


# --- disabled ---

def test_disabled_adapters_come_back_also_after_an_error_and_within_another_disabled():
    model = adapted()
    on, base = logits(model), logits(tiny())
    assert (on - base).abs().max() > 0.1
    with pytest.raises(KeyError), lora.disabled(model):
        with lora.disabled(model) as same:
            assert same is model
        equal(logits(model), base)
        raise KeyError
    equal(logits(model), on)


def test_disabled_adapters_are_absent_from_the_loss_generation_and_saving(tmp_path):
    model, base = adapted("all,lm_head"), tiny()
    with lora.disabled(model):
        equal(nll(model), nll(base))
        assert generate(model) == generate(base)
        model.save(str(tmp_path))
    assert generate(model) != generate(base)
    equal(logits(GPT.load(str(tmp_path))), logits(base))


@pytest.mark.parametrize("call", [lora.merge, lambda model: lora.disabled(model).__enter__(),
                                  lambda model: lora.save(model, "nowhere", "base")])
def test_a_model_without_adapters_is_refused(call):
    with pytest.raises(ValueError, match="has no adapters: none were added, or they are merged already"):
        call(tiny())


# --- merge, saving and generation of the merged model ---

@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("targets", ["q_proj,v_proj", "all", "all,lm_head"])
def test_the_merged_model_is_a_plain_one_with_the_same_logits(targets, rslora):
    model = adapted(targets, rslora=rslora)
    before, loss = logits(model), nll(model)
    assert (before - logits(tiny())).abs().max() > 0.05
    lora.merge(model)
    assert {type(module) for module in model.modules()} == {type(module) for module in tiny().modules()}
    assert list(model.state_dict()) == list(tiny().state_dict())
    assert all(p.requires_grad and p.dtype == torch.float32 for p in model.parameters())
    torch.testing.assert_close(logits(model), before, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(nll(model), loss, atol=1e-5, rtol=1e-5)


def test_merged_weights_are_fp32_sums_however_coarse_the_activations():
    model = adapted()
    expected = {name: layer.weight.double() + 2 * layer.lora_B.double() @ layer.lora_A.double()
                for name, layer in lora.adapters(model).items()}
    model.model.dtype = torch.bfloat16
    lora.merge(model)
    for name, weight in expected.items():
        torch.testing.assert_close(model.get_submodule(name).weight.double(), weight, atol=1e-6, rtol=1e-6)


def test_merging_twice_or_while_disabled_is_refused_and_changes_nothing():
    model = adapted()
    before = logits(model)
    with pytest.raises(ValueError, match="merge outside lora.disabled"), lora.disabled(model):
        lora.merge(model)
    equal(logits(model), before)
    once = weights_of(lora.merge(model))
    with pytest.raises(ValueError, match="merged already"):
        lora.merge(model)
    for name, tensor in model.state_dict().items():
        equal(tensor, once[name])


def test_adapters_can_be_added_again_after_merging():
    model = lora.merge(adapted("q_proj"))
    before = logits(model)
    equal(logits(lora.add(model, 2, 4, "v_proj")), before)


@pytest.mark.parametrize("targets, tied", [("all", False), ("q_proj,lm_head", False), ("all", True)])
def test_a_saved_model_is_the_merged_one_and_the_model_keeps_its_adapters(targets, tied, tmp_path):
    model = adapted(targets, tied=tied)
    before, state = logits(model), weights_of(model)
    model.save(str(tmp_path))
    plain = tiny(tied=tied)
    plain.save(str(tmp_path / "plain"))
    names = set(load_file(tmp_path / "plain" / "model.safetensors"))
    assert set(load_file(tmp_path / "model.safetensors")) == names
    torch.testing.assert_close(logits(GPT.load(str(tmp_path))), before, atol=1e-5, rtol=1e-5)
    for name, tensor in model.state_dict().items():
        equal(tensor, state[name])


def test_a_scalar_head_saves_its_merged_weights_too(tmp_path):
    torch.manual_seed(0)
    model = lora.add(randomise(ScalarHead(Config(VOCAB, n_layer=1, n_head=2, n_embd=16, context=16))), 2, 4, "all")
    for layer in lora.adapters(model).values():
        torch.nn.init.normal_(layer.lora_B)
    model.save(str(tmp_path))
    with torch.no_grad():
        torch.testing.assert_close(ScalarHead.load(str(tmp_path))(random_ids()), model(random_ids()),
                                   atol=1e-5, rtol=1e-5)


def generate(model):
    return [sample.tokens for sample in engine.generate(model, random_ids().tolist(), max_new_tokens=12, temperature=0)]


@pytest.mark.parametrize("targets", ["all,lm_head", "q_proj"])
def test_generation_is_the_merged_models_and_drops_nothing(targets):
    model = adapted(targets, dropout=0.5).train()
    assert generate(model) == generate(lora.merge(copy.deepcopy(model))) != generate(tiny())


# --- files ---

@pytest.mark.parametrize("targets", ["q_proj,v_proj", "all", "layers.1.self_attn.q_proj", "all,lm_head"])
@pytest.mark.parametrize("rslora", [False, True])
def test_a_saved_adapter_loads_into_its_base_to_the_bit(targets, rslora, tmp_path):
    model = adapted(targets, rslora=rslora, dropout=0.1)
    lora.save(model, str(tmp_path), "out/base")
    again = lora.load(tiny(), str(tmp_path))
    assert list(again.state_dict()) == list(model.state_dict())
    for name, tensor in model.state_dict().items():
        equal(again.state_dict()[name], tensor)
    for one, other in zip(lora.adapters(model).values(), lora.adapters(again).values(), strict=True):
        assert (one.scale, one.dropout, one.rslora) == (other.scale, other.dropout, other.rslora)
    equal(logits(again), logits(model))
    assert [name for name, p in again.named_parameters() if p.requires_grad] == \
        [name for name, p in model.named_parameters() if p.requires_grad]


def test_the_files_are_pefts_layout(tmp_path):
    lora.save(adapted("q_proj,lm_head", rank=3, alpha=5, rslora=True, dropout=0.1), str(tmp_path), "out/base")
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    modules = ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj", "lm_head"]
    assert set(tensors) == {f"base_model.model.{name}.lora_{part}.weight" for name in modules for part in "AB"}
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert tensors["base_model.model.lm_head.lora_A.weight"].shape == (3, 32)
    assert tensors["base_model.model.lm_head.lora_B.weight"].shape == (VOCAB, 3)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config == {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "out/base", "r": 3,
                      "lora_alpha": 5, "lora_dropout": 0.1, "use_rslora": True, "target_modules": ["q_proj", "lm_head"],
                      "bias": "none", "fan_in_fan_out": False, "init_lora_weights": True, "inference_mode": True}


def test_a_disk_that_refuses_leaves_the_old_adapter(tmp_path, monkeypatch):
    lora.save(adapted("q_proj"), str(tmp_path), "base")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def refuse(*paths):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr("common.os.replace", refuse)
    with pytest.raises(ValueError, match="No space left on device"):
        lora.save(adapted("all", rank=2), str(tmp_path), "base")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def edit_config(**changes):
    def edit(folder):
        path = folder / "adapter_config.json"
        config = {name: value for name, value in (json.loads(path.read_text()) | changes).items() if value != "absent"}
        path.write_text(json.dumps(config))
    return edit


def edit_weights(change):
    def edit(folder):
        path = folder / "adapter_model.safetensors"
        save_file(change(load_file(path)), path)
    return edit


Q0A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
Q1B = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"
HEAD = "base_model.model.lm_head.weight"
WRONG = {
    "no config": (lambda folder: (folder / "adapter_config.json").unlink(), "it has no adapter_config.json"),
    "no weights": (lambda folder: (folder / "adapter_model.safetensors").unlink(), "there are no weights at"),
    "config is no JSON": (lambda folder: (folder / "adapter_config.json").write_text("{"), "is not valid JSON"),
    "config is a list": (lambda folder: (folder / "adapter_config.json").write_text("[]"), "of another kind than LORA"),
    "weights cut short": (lambda folder: (folder / "adapter_model.safetensors").write_bytes(
        (folder / "adapter_model.safetensors").read_bytes()[:-9]), "is damaged or cut short"),
    "another kind": (edit_config(peft_type="PREFIX_TUNING"), "of another kind than LORA: .*PREFIX_TUNING"),
    "an unknown option": (edit_config(use_newest_trick=True), "use_newest_trick=True, which lora.py does not compute"),
    "bias": (edit_config(bias="all"), "bias='all', which"),
    "an initialisation that changes the base": (edit_config(init_lora_weights="pissa"), "init_lora_weights='pissa'"),
    "no rank": (edit_config(r="absent"), "should have a number as r, and has None"),
    "alpha in words": (edit_config(lora_alpha="sixteen"), "a number as lora_alpha, and has 'sixteen'"),
    "targets as a pattern": (edit_config(target_modules=".*q_proj"), "names of layers as target_modules, and has"),
    "no targets": (edit_config(target_modules=[]), "names of layers as target_modules, and has"),
    "another rank": (edit_config(r=4), r"q_proj.lora_A.weight should be \(4, 32\) and is \(3, 32\)"),
    "another architecture": (edit_config(target_modules=["c_attn"]), "for another model: no linear layer is named 'c_"),
    "more targets than weights": (edit_config(target_modules=["q_proj", "v_proj"]),
                                  r"v_proj.lora_A.weight should be \(3, 32\) and is absent"),
    "fewer targets than weights": (edit_config(target_modules=["layers.1.self_attn.q_proj"]),
                                   r"layers.0.self_attn.q_proj.lora_A.weight should be absent and is \(3, 32\)"),
    "a tensor missing": (edit_weights(lambda w: {n: w[n] for n in w if n != Q1B}), f"{Q1B} should be .* is absent"),
    "another width": (edit_weights(lambda w: w | {Q0A: torch.zeros(3, 16)}), f"{Q0A} should be .* and is .3, 16"),
    "not finite": (edit_weights(lambda w: w | {Q1B: w[Q1B] * math.nan}), f"damaged: {Q1B} holds values that are not"),
    "a trained head": (edit_weights(lambda w: w | {HEAD: torch.zeros(VOCAB, 32)}), f"{HEAD} should be absent"),
}


@pytest.mark.parametrize("case", WRONG)
def test_an_adapter_that_does_not_fit_is_one_sentence_and_the_model_stays_as_it_was(case, tmp_path):
    damage, message = WRONG[case]
    lora.save(adapted("q_proj"), str(tmp_path), "base")
    damage(tmp_path)
    model = tiny()
    with pytest.raises(ValueError, match=message) as error:
        lora.load(model, str(tmp_path))
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)
    assert not lora.has_adapters(model) and all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("shape", [dict(n_layer=1), dict(n_layer=3), dict(n_embd=64), dict(n_head=8)])
def test_an_adapter_of_a_model_of_another_shape_is_refused(shape, tmp_path):
    lora.save(adapted("q_proj,o_proj"), str(tmp_path), "base")
    with pytest.raises(ValueError, match="is for another model: base_model.model.model.layers"):
        lora.load(tiny(**dict(head_dim=8) | shape), str(tmp_path))


def test_loading_over_adapters_is_refused(tmp_path):
    model = adapted("q_proj")
    lora.save(model, str(tmp_path), "base")
    with pytest.raises(ValueError, match="has adapters already"):
        lora.load(model, str(tmp_path))
