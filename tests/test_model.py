"""The Transformer against transformers' Llama and Qwen3, closed forms, invariances, and every way a load can fail."""
import json
import math
import os
import re
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import common
import model as model_file
import optim
from kernels import pad_offsets
from model import GPT, Config

ROOT = Path(model_file.__file__).resolve().parent
VOCAB = 80


def tiny(seed=0, **changes):
    """A small model whose every parameter is random: zeros at initialisation would hide mistakes."""
    torch.manual_seed(seed)
    shape = dict(vocab_size=VOCAB, n_layer=2, n_head=4, n_kv_head=2, n_embd=32, n_hidden=48, context=32)
    return randomise(GPT(Config(**shape | changes)))


def randomise(model):
    for p in model.parameters():
        torch.nn.init.normal_(p, mean=1.0 if p.dim() == 1 else 0.0, std=0.2)
    return model


def random_ids(B=3, T=13, seed=1):
    return torch.randint(0, VOCAB, (B, T), generator=torch.Generator().manual_seed(seed))


def all_logits(model, ids, cu_seqlens=None):
    return model.logits(model.forward_hidden(ids, cu_seqlens))


# --- parity with transformers ---

def theirs(qk_norm, tied, n_kv_head, **changes):
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM
    torch.manual_seed(0)
    kind, model = (Qwen3Config, Qwen3ForCausalLM) if qk_norm else (LlamaConfig, LlamaForCausalLM)
    shape = dict(vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=n_kv_head, head_dim=8, max_position_embeddings=32, rms_norm_eps=1e-3,
                 rope_parameters={"rope_type": "default", "rope_theta": 500.0}, tie_word_embeddings=tied,
                 bos_token_id=0, eos_token_id=0, pad_token_id=1)
    return randomise(model(kind(**shape | changes))).eval()


KINDS = [(qk_norm, tied, n_kv_head) for qk_norm in (False, True) for tied in (False, True) for n_kv_head in (4, 2, 1)]


@torch.no_grad()
@pytest.mark.parametrize("qk_norm, tied, n_kv_head", KINDS)
def test_transformers_opens_what_we_save_and_computes_the_same_logits(tmp_path, qk_norm, tied, n_kv_head):
    from transformers import AutoModelForCausalLM
    ours = tiny(qk_norm=qk_norm, tied=tied, n_kv_head=n_kv_head, rope_theta=500.0, norm_eps=1e-3, eos_id=0, pad_id=1)
    ours.save(str(tmp_path))
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded).__name__ == ("Qwen3ForCausalLM" if qk_norm else "LlamaForCausalLM")
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert loaded.dtype == torch.float32 and loaded.generation_config.eos_token_id == 0
    assert loaded.num_parameters() == ours.config.n_params()
    torch.testing.assert_close(all_logits(ours, random_ids()), loaded(random_ids()).logits, atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("qk_norm, tied, n_kv_head", KINDS)
def test_we_open_what_transformers_saves_and_compute_the_same_logits(tmp_path, qk_norm, tied, n_kv_head):
    reference = theirs(qk_norm, tied, n_kv_head)
    reference.save_pretrained(tmp_path)
    ours = GPT.load(str(tmp_path))
    assert (ours.config.qk_norm, ours.config.tied, ours.config.n_kv_head) == (qk_norm, tied, n_kv_head)
    assert (ours.config.rope_theta, ours.config.norm_eps, ours.config.eos_id, ours.config.pad_id) == (500.0, 1e-3, 0, 1)
    torch.testing.assert_close(all_logits(ours, random_ids()), reference(random_ids()).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("qk_norm, tied, n_kv_head", [(True, False, 2), (False, True, 4), (True, True, 1)])
def test_gradients_equal_those_of_transformers(tmp_path, qk_norm, tied, n_kv_head):
    reference = theirs(qk_norm, tied, n_kv_head)
    reference.save_pretrained(tmp_path)
    ours, ids, targets = GPT.load(str(tmp_path)), random_ids(), random_ids(seed=2)
    ours(ids, targets).mean().backward()
    torch.nn.functional.cross_entropy(reference(ids).logits.flatten(0, 1), targets.flatten()).backward()
    expected = {name: p.grad for name, p in reference.named_parameters()}
    for name, p in ours.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], atol=1e-5, rtol=1e-4, msg=name)


@torch.no_grad()
@pytest.mark.parametrize("qk_norm", [False, True])
def test_heads_need_not_add_up_to_the_width(tmp_path, qk_norm):
    reference = theirs(qk_norm, False, 2, head_dim=6)
    reference.save_pretrained(tmp_path)
    ours = GPT.load(str(tmp_path))
    torch.testing.assert_close(all_logits(ours, random_ids()), reference(random_ids()).logits, atol=1e-4, rtol=1e-4)
    assert ours.config.n_params() == sum(p.numel() for p in ours.parameters())


@torch.no_grad()
@pytest.mark.parametrize("tied", [False, True])
def test_sharded_checkpoints_load(tmp_path, tied):
    reference = theirs(True, tied, 2)
    reference.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1 and not (tmp_path / "model.safetensors").exists()
    logits = all_logits(GPT.load(str(tmp_path)), random_ids())
    torch.testing.assert_close(logits, reference(random_ids()).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("tied", [False, True])
def test_bf16_checkpoints_load_as_fp32_masters_of_the_same_values(tmp_path, tied):
    reference = theirs(False, tied, 2).to(torch.bfloat16)
    reference.save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors")["model.norm.weight"].dtype == torch.bfloat16
    ours = GPT.load(str(tmp_path))
    values = dict(reference.named_parameters())
    for name, p in ours.named_parameters():
        assert p.dtype == torch.float32 and p.requires_grad and torch.equal(p, values[name].float())


def test_a_config_in_the_older_layout_loads_the_same(tmp_path):
    tiny(qk_norm=False, rope_theta=500.0).save(str(tmp_path))
    config = json.loads((tmp_path / "config.json").read_text())
    for name in ("head_dim", "mlp_bias", "use_sliding_window", "dtype", "use_cache"):
        del config[name]
    (tmp_path / "config.json").write_text(json.dumps(config | dict(rope_scaling=None, eos_token_id=[0, 2])))
    loaded = GPT.load(str(tmp_path))
    assert loaded.config.rope_theta == 500.0 and loaded.config.head_dim == 8 and loaded.config.eos_id == 0


# --- save and load ---

@pytest.mark.parametrize("tied", [False, True])
def test_a_saved_model_loads_bitwise_equal_in_fp32_whatever_dtype_it_computed_in(tmp_path, tied):
    ours = tiny(tied=tied, eos_id=0, pad_id=1)
    ours.model.dtype = torch.bfloat16
    ours.save(str(tmp_path / "new" / "folder"))
    loaded = GPT.load(str(tmp_path / "new" / "folder"))
    assert loaded.config == ours.config
    written = load_file(tmp_path / "new" / "folder" / "model.safetensors")
    assert {tensor.dtype for tensor in written.values()} == {torch.float32}
    for (name, a), (other, b) in zip(ours.named_parameters(), loaded.named_parameters(), strict=True):
        assert name == other and torch.equal(a, b) and b.requires_grad and b.device.type == "cpu"
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied


def test_a_tied_model_is_still_tied_after_training_a_loaded_one(tmp_path):
    tiny(tied=True).save(str(tmp_path))
    loaded = GPT.load(str(tmp_path))
    loaded(random_ids(), random_ids(seed=2)).sum().backward()
    torch.optim.SGD(loaded.parameters(), lr=0.1).step()
    assert torch.equal(loaded.lm_head.weight, loaded.model.embed_tokens.weight)


def files_of(directory):
    return {path.name: path.read_bytes() for path in Path(directory).iterdir()}


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "model.safetensors"])
def test_a_save_that_fails_leaves_the_old_file_and_is_one_sentence(tmp_path, monkeypatch, name):
    tiny(seed=0, eos_id=0).save(str(tmp_path))
    before = files_of(tmp_path)
    replace = os.replace

    def full(source, target):
        if os.path.basename(target) == name:
            raise OSError(28, "No space left on device")
        replace(source, target)

    other = tiny(seed=1, eos_id=2)
    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", full)
        with pytest.raises(ValueError, match="No space left on device") as error:
            other.save(str(tmp_path))
    assert name in one_sentence(error)
    assert files_of(tmp_path)[name] == before[name] and files_of(tmp_path).keys() == before.keys()
    other.save(str(tmp_path))
    assert files_of(tmp_path)[name] != before[name]


def test_write_atomic_renames_only_what_is_on_the_disk(tmp_path, monkeypatch):
    events, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (events.append(os.fstat(file).st_size), fsync(file)))
    monkeypatch.setattr(os, "replace", lambda *names: (events.append("renamed"), replace(*names)))
    common.write_atomic(str(tmp_path / "file"), b"12345")
    assert events[:2] == [5, "renamed"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("PytorchStreamWriter failed"),
                                   RuntimeError(), KeyboardInterrupt(), TypeError("a bug")])
def test_write_atomic_keeps_the_old_file_whatever_interrupts_the_new_one(tmp_path, error):
    def half(file):
        file.write(b"half of the ne")
        raise error

    path = tmp_path / "state.pt"
    common.write_atomic(str(path), b"old")
    with pytest.raises(ValueError if isinstance(error, (OSError, RuntimeError)) else type(error)):
        common.write_atomic(str(path), half)
    assert path.read_bytes() == b"old"
    common.write_atomic(str(path), lambda file: file.write(b"new"))
    assert files_of(tmp_path) == {"state.pt": b"new"}


def test_write_atomic_makes_folders_and_takes_a_bare_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    common.write_atomic("bare", b"1")
    common.write_atomic("a/b/c", b"2")
    assert (tmp_path / "bare").read_bytes() == b"1" and (tmp_path / "a/b/c").read_bytes() == b"2"


# --- what GPT.load refuses ---

def one_sentence(error):
    """The message of a ValueError that a script turns into a sentence: of one line, raised by a file of ours."""
    assert error.type is ValueError and Path(error.traceback[-1].path).parent == ROOT
    message = str(error.value)
    assert message and "\n" not in message
    return message


def refusal(path):
    with pytest.raises(ValueError) as error:
        GPT.load(str(path))
    return one_sentence(error)


@pytest.fixture
def saved(tmp_path):
    tiny().save(str(tmp_path))
    return tmp_path


def change_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def change_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")


def test_load_refuses_a_missing_directory_by_name(tmp_path):
    assert "nowhere" in refusal(tmp_path / "nowhere")
    assert "config.json" in refusal(tmp_path)


def test_load_refuses_a_directory_without_weights(saved):
    (saved / "model.safetensors").unlink()
    assert "model.safetensors" in refusal(saved)


@pytest.mark.parametrize("kept", [0, 4, 100, 0.5, -1])
def test_load_refuses_weights_that_are_cut_short(saved, kept):
    content = (saved / "model.safetensors").read_bytes()
    (saved / "model.safetensors").write_bytes(content[:int(kept * len(content)) if isinstance(kept, float) else kept])
    assert "model.safetensors" in refusal(saved)


def test_load_refuses_weights_whose_header_is_nonsense(saved):
    (saved / "model.safetensors").write_bytes(struct.pack("<Q", 8) + b"not json" + b"\0" * 64)
    assert "model.safetensors" in refusal(saved)


@pytest.mark.parametrize("changes, name, shapes", [
    (dict(vocab_size=96), "model.embed_tokens.weight", ["(96, 32)", "(80, 32)"]),
    (dict(intermediate_size=64), "mlp", ["64", "48"]),
    (dict(num_key_value_heads=1), "k_proj", ["(8, 32)", "(16, 32)"]),
    (dict(num_hidden_layers=3), "model.layers.2.", ["absent"]),
    (dict(num_hidden_layers=1), "model.layers.1.", ["absent"])])
def test_load_refuses_weights_of_other_shapes_than_the_config_and_names_both(saved, changes, name, shapes):
    change_config(saved, **changes)
    said = refusal(saved)
    assert name in said and all(shape in said for shape in shapes)


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "lm_head.weight",
                                  "model.layers.1.self_attn.q_norm.weight"])
def test_load_refuses_a_missing_name(saved, name):
    change_weights(saved, lambda weights: weights.pop(name))
    assert name in refusal(saved) and "absent" in refusal(saved)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_load_refuses_weights_that_are_not_finite_and_names_them(saved, value):
    change_weights(saved, lambda weights: weights["model.norm.weight"].index_fill_(0, torch.tensor([3]), value))
    assert "model.norm.weight holds 1 values that are not finite" in refusal(saved)


def test_load_refuses_a_tied_model_without_its_embedding(tmp_path):
    tiny(tied=True).save(str(tmp_path))
    change_weights(tmp_path, lambda weights: weights.pop("model.embed_tokens.weight"))
    assert "model.embed_tokens.weight" in refusal(tmp_path)


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.q_proj.bias", "score.weight",
                                  "model.layers.7.mlp.up_proj.weight"])
def test_load_refuses_an_unknown_extra_name(saved, name):
    change_weights(saved, lambda weights: weights.update({name: torch.zeros(3)}))
    assert name in refusal(saved)


def test_load_ignores_the_rotary_frequencies_of_old_checkpoints(saved):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    change_weights(saved, lambda weights: weights.update({name: torch.zeros(4)}))
    GPT.load(str(saved))


def test_load_refuses_gpt2(saved):
    change_config(saved, model_type="gpt2")
    assert "'gpt2'" in refusal(saved)


@pytest.mark.parametrize("changes, said", [
    (dict(rope_scaling={"type": "linear", "factor": 2.0}), "linear"),
    (dict(rope_scaling={"rope_type": "llama3", "factor": 8.0}), "low_freq_factor"),
    (dict(rope_parameters={"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0}), "yarn"),
    (dict(rope_parameters={"rope_type": "default", "rope_theta": 500.0},
          rope_scaling={"rope_type": "dynamic", "factor": 8.0}), "dynamic"),
    (dict(attention_bias=True), "attention_bias"), (dict(mlp_bias=True), "mlp_bias"),
    (dict(hidden_act="gelu"), "gelu"), (dict(use_sliding_window=True, sliding_window=4), "sliding_window")])
def test_load_refuses_what_the_model_does_not_compute(saved, changes, said):
    change_config(saved, **changes)
    assert said in refusal(saved)


@pytest.mark.parametrize("name", ["vocab_size", "num_hidden_layers", "hidden_size", "intermediate_size",
                                  "rms_norm_eps"])
def test_load_refuses_a_config_without_a_size_and_names_it(saved, name):
    config = json.loads((saved / "config.json").read_text())
    del config[name]
    (saved / "config.json").write_text(json.dumps(config))
    assert name in refusal(saved)


@pytest.mark.parametrize("text", ["", "{", '{"model_type": "qwen3",}', "[1, 2]", "null", "\0"])
def test_load_refuses_a_broken_config(saved, text):
    (saved / "config.json").write_text(text)
    assert "config.json" in refusal(saved)


@pytest.mark.parametrize("changes", [dict(hidden_size="32"), dict(num_attention_heads=None), dict(vocab_size=80.5)])
def test_load_refuses_a_size_that_is_no_whole_number(saved, changes):
    change_config(saved, **changes)
    assert next(iter(changes)) in refusal(saved)


@pytest.mark.parametrize("text, said", [
    ("", "model.safetensors.index.json"), ("{}", "model.safetensors.index.json"),
    ('{"weight_map": {"model.norm.weight": "model-2-of-2.safetensors"}}', "model-2-of-2.safetensors")])
def test_load_refuses_a_broken_index_or_a_missing_shard(saved, text, said):
    (saved / "model.safetensors").unlink()
    (saved / "model.safetensors.index.json").write_text(text)
    assert said in refusal(saved)


@pytest.mark.parametrize("reason", ["404 Client Error\nand a page of text", ""])
def test_a_hub_model_that_cannot_be_fetched_is_one_sentence_with_its_name(monkeypatch, reason):
    import huggingface_hub

    def snapshot_download(*_, **__):
        raise OSError(reason)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert "hub:no/model" in refusal("hub:no/model")


def test_a_hub_model_loads_from_the_folder_it_was_fetched_to(saved, monkeypatch):
    import huggingface_hub
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: {"org/name": str(saved)}[name])
    assert GPT.load("hub:org/name").config == tiny().config


# --- the shape ---

@pytest.mark.parametrize("changes, numbers", [
    (dict(n_embd=30), ["30", "4", "n_head=3"]), (dict(n_embd=12), ["3"]), (dict(n_kv_head=3), ["4", "3"]),
    (dict(n_layer=0), ["0"]), (dict(n_embd=-32), ["-32"]), (dict(vocab_size=0), ["0"]), (dict(context=0), ["0"]),
    (dict(head_dim=5), ["5"]), (dict(head_dim=-2), ["-2"])])
def test_sizes_that_do_not_fit_are_one_sentence_with_the_numbers(changes, numbers):
    with pytest.raises(ValueError) as error:
        tiny(**changes)
    assert all(number in one_sentence(error) for number in numbers)


@pytest.mark.parametrize("n_embd, n_head", [(384, 7), (32, 5), (30, 8)])
def test_the_number_of_heads_that_the_sentence_suggests_fits(n_embd, n_head):
    with pytest.raises(ValueError) as error:
        Config(VOCAB, n_head=n_head, n_embd=n_embd)
    Config(VOCAB, n_head=int(re.search(r"try n_head=(\d+)", one_sentence(error)).group(1)), n_embd=n_embd)


SHAPES = [dict(), dict(tied=True), dict(qk_norm=False), dict(qk_norm=False, tied=True, n_kv_head=1),
          dict(n_kv_head=0, n_hidden=0, n_layer=3), dict(head_dim=10)]


@pytest.mark.parametrize("changes", SHAPES)
def test_the_number_of_parameters_equals_its_closed_form(changes):
    model = tiny(**changes)
    assert model.config.n_params() == sum(p.numel() for p in model.parameters())
    blocks = sum(p.numel() for name, p in model.named_parameters() if p.dim() == 2 and ".layers." in name)
    assert model.config.n_params(embeddings=False) == blocks + VOCAB * 32


def test_flops_per_token_equal_a_count_by_hand():
    config = Config(100, n_layer=2, n_head=4, n_kv_head=2, n_embd=32, n_hidden=48, context=64)
    forward_matrices = 2 * (32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 48)      # q, k and v, o, MLP; 2 FLOPs a weight
    forward_attention = 2 * (2 * 4 * 8 * 64) / 2                # q k' and p v, 2 FLOPs each over 64 keys; causal: half
    forward = 2 * (forward_matrices + forward_attention) + 2 * 100 * 32         # two layers and the head
    assert config.flops_per_token(64) == 3 * forward            # backward costs twice the forward


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("n_embd", [32, 256])
def test_the_first_loss_is_ln_vocab_size(tied, n_embd):
    torch.manual_seed(0)
    model = GPT(Config(1024, n_layer=2, n_head=4, n_embd=n_embd, n_hidden=64, context=64, tied=tied))
    ids = torch.randint(0, 1024, (4, 65))
    assert model(ids[:, :-1], ids[:, 1:]).mean().item() == pytest.approx(math.log(1024), rel=0.02)


# --- the loss ---

@pytest.mark.parametrize("tied", [False, True])
def test_the_loss_is_minus_the_log_probability_of_each_target_and_0_where_it_is_ignored(tied):
    model, ids, targets = tiny(tied=tied), random_ids(), random_ids(seed=2)
    targets[:, ::3] = -100
    logp = torch.log_softmax(all_logits(model, ids).double(), -1)
    expected = -logp.gather(-1, targets.clamp_min(0).unsqueeze(-1)).squeeze(-1) * (targets != -100)
    nll = model(ids, targets)
    assert nll.dtype == torch.float32 and nll.shape == targets.shape
    torch.testing.assert_close(nll, expected.float(), atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(model(ids, targets), nll)


def test_entropies_and_hits_are_those_of_all_logits_and_leave_the_loss_as_it_is():
    model, ids, targets = tiny(), random_ids(), random_ids(seed=2)
    logp = torch.log_softmax(all_logits(model, ids).double() / 0.7, -1)
    targets[:, ::2] = logp.argmax(-1)[:, ::2]
    targets[:, ::3] = -100
    nll, entropy, hits = model(ids, targets, temperature=0.7, want_entropy=True, want_hits=True)
    assert torch.equal(nll, model(ids, targets, temperature=0.7)) and nll.requires_grad
    asked = targets != -100
    torch.testing.assert_close(entropy, (-(logp.exp() * logp).sum(-1) * asked).float(), atol=1e-5, rtol=1e-5)
    assert torch.equal(hits, (logp.argmax(-1) == targets) & asked) and 0 < hits.sum() < asked.sum()
    assert not entropy.requires_grad and len(model(ids, targets, want_hits=True)) == 2


def test_no_output_depends_on_a_later_token():
    model, ids, targets = tiny(), random_ids(), random_ids(seed=2)
    before = model(ids, targets)
    for t in range(1, ids.size(1)):
        changed = ids.clone()
        changed[:, t:] = (changed[:, t:] + 1) % VOCAB
        after = model(changed, targets)
        torch.testing.assert_close(after[:, :t], before[:, :t], atol=1e-5, rtol=0)
        assert (after[:, t:] - before[:, t:]).abs().max() > 1e-2


def packed():
    """Two rows of 13 tokens that hold documents of 5, 1, 7 and of 4, 9 tokens; and its cu_seqlens."""
    return random_ids(2), random_ids(2, seed=2), torch.tensor([0, 5, 6, 13, 17, 26], dtype=torch.int32)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-5), (torch.bfloat16, 5e-2)])
def test_packed_documents_have_the_losses_that_each_has_alone(dtype, tolerance):
    model, (ids, targets, cu_seqlens) = tiny(), packed()
    model.model.dtype = dtype
    nll = model(ids, targets, cu_seqlens).flatten()
    for begin, end in zip(cu_seqlens.tolist(), cu_seqlens.tolist()[1:]):
        alone = model(ids.flatten()[None, begin:end], targets.flatten()[None, begin:end])
        torch.testing.assert_close(nll[begin:end], alone[0], atol=tolerance, rtol=tolerance)
    assert (nll - model(ids, targets).flatten()).abs().max() > 1e-2


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def test_gradients_do_not_depend_on_how_a_batch_is_split():
    model, ids, targets = tiny(), random_ids(4), random_ids(4, seed=2)
    targets[0, 2:], targets[1, 7:] = -100, -100                 # ragged
    whole = gradients(model, model(ids, targets).sum() / 30)
    split = gradients(model, sum(model(a[None], b[None]).sum() / 30 for a, b in zip(ids, targets)))
    for name in whole:
        torch.testing.assert_close(whole[name], split[name], atol=2e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("documents", [False, True])
def test_gradient_checkpointing_gives_equal_gradients(documents):
    model, (ids, targets, cu_seqlens) = tiny(), packed()
    cu_seqlens = cu_seqlens if documents else None
    plain = gradients(model, model(ids, targets, cu_seqlens).mean())
    calls = []
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda *_: calls.append(1))
    model.model.checkpointing = True
    checkpointed = gradients(model, model(ids, targets, cu_seqlens).mean())
    assert len(calls) == 2 * len(model.model.layers)            # each block ran forward again
    for name in plain:
        torch.testing.assert_close(plain[name], checkpointed[name], msg=name)


@pytest.mark.parametrize("causal", [True, False])
def test_a_model_compiles_to_one_graph_without_breaks_whatever_its_documents(causal):
    graphs = []

    def backend(graph, inputs):
        from torch._dynamo.backends.debugging import aot_eager
        graphs.append(graph)
        return aot_eager(graph, inputs)
    model = tiny(causal=causal)
    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=False)
    ids, targets = random_ids(2, 16), random_ids(2, 16, seed=2)
    for offsets in [0, 5, 32], [0, 1, 2, 9, 16, 32], [0, 32]:
        cu_seqlens = pad_offsets(torch.tensor(offsets, dtype=torch.int32), 8)
        nll = compiled(ids, targets, cu_seqlens)
        torch.testing.assert_close(nll, model(ids, targets, cu_seqlens), atol=1e-5, rtol=1e-5)
        found = gradients(model, nll.mean())
        for name, gradient in gradients(model, model(ids, targets, cu_seqlens).mean()).items():
            torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=1e-4, msg=name)
    assert len(graphs) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_and_gradients_stay_fp32_whatever_the_products_are_in(dtype):
    model = tiny()
    model.model.dtype = dtype
    assert model.forward_hidden(random_ids()).dtype == dtype and all_logits(model, random_ids()).dtype == torch.float32
    nll = model(random_ids(), random_ids(seed=2))
    assert nll.dtype == torch.float32
    assert all(grad.dtype == torch.float32 and grad.isfinite().all() for grad in gradients(model, nll.mean()).values())


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_tiny_model_learns_one_batch_by_heart(optimizer, tied):
    torch.manual_seed(0)
    model = GPT(Config(VOCAB, n_layer=2, n_head=4, n_kv_head=2, n_embd=32, n_hidden=48, context=32, tied=tied))
    ids, targets = random_ids(2, 16), random_ids(2, 16, seed=2)
    updates = optim.build(model, optimizer, lr=0.01, matrix_lr=0.02, embed_lr=0.02, weight_decay=0.0, betas=(0.9, 0.95),
                          momentum=0.9)
    for _ in range(80):
        loss = model(ids, targets).mean()
        updates.zero_grad()
        loss.backward()
        updates.step()
    assert loss.item() < 0.05
