"""masking.py and pretrain.py --objective=mlm: who is hidden, the loss, resumes and ranks, and who refuses it."""
import json
import math
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from kernels import attention, bidirectional_attention
from masking import MaskedBatches, evaluate, mask_rows
from model import GPT, Config, ScalarHead
from tokenizer import MASK, Tokenizer

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TINY = ["--objective=mlm", "--n_layer=2", "--n_head=2", "--n_embd=32", "--context=32", "--rows_per_step=8",
        "--device=cpu", "--dtype=fp32", "--eval_every=4", "--eval_tokens=512", "--warmup_steps=2", "--curves=false"]
TEXT_IDS, MASK_ID = np.arange(90), 99


def rows(B=64, T=200, seed=0):
    """Ids of which 90 to 98 are specials, and next tokens as targets."""
    ids_BT = torch.from_numpy(np.random.default_rng(seed).integers(0, 99, (B, T)))
    return ids_BT, ids_BT.roll(-1, 1)


def test_the_mean_loss_of_an_evaluation_is_summed_in_float64():
    class Run:
        move, total = staticmethod(lambda *tensors: tensors), staticmethod(lambda total: total)

    class Model:
        forward = staticmethod(lambda *_, want_hits: (nll_BT, nll_BT > 5e7))

    nll_BT = torch.rand(3, 1000) * 1e8
    targets_BT = torch.zeros(3, 1000, dtype=torch.int64)
    rows = [(targets_BT, targets_BT, None)] * 2
    nats, hits = evaluate(Model, rows, Run)
    assert nats == pytest.approx(nll_BT.double().mean().item(), rel=1e-14)
    assert hits == (nll_BT > 5e7).double().mean().item()


# --- who is hidden ---

def test_fifteen_in_a_hundred_tokens_of_text_are_chosen_and_their_fates_are_80_10_10():
    ids_BT, targets_BT = rows(B=400)
    seen_BT, guessed_BT = mask_rows(ids_BT, targets_BT, MASK_ID, TEXT_IDS, 0.15, (7, 1))
    chosen_BT = guessed_BT != -100
    text_B = (ids_BT < 90).sum(1)
    assert chosen_BT.sum(1).tolist() == [round(0.15 * n) for n in text_B.tolist()]      # exactly, in every row
    assert torch.equal(guessed_BT[chosen_BT], ids_BT[chosen_BT])                        # the tokens themselves
    assert torch.equal(seen_BT[~chosen_BT], ids_BT[~chosen_BT])                         # nothing else changes
    fate, own = seen_BT[chosen_BT], ids_BT[chosen_BT]
    n = len(own)
    hidden, kept = (fate == MASK_ID).sum() / n, (fate == own).sum() / n
    assert hidden == pytest.approx(0.8, abs=0.02) and kept == pytest.approx(0.1, abs=0.02)
    places = chosen_BT.nonzero()[:, 1].double()
    assert places.mean() == pytest.approx(99.5, abs=2) and places.min() == 0 and places.max() == 199
    others = fate[(fate != MASK_ID) & (fate != own)]
    assert others.max() < 90 and len(others.unique()) > 80                              # of all text, no special


def test_specials_and_tokens_that_another_row_has_are_never_chosen():
    ids_BT, targets_BT = rows()
    targets_BT[:, :50] = -100
    _, guessed_BT = mask_rows(ids_BT, targets_BT, MASK_ID, TEXT_IDS, 0.9, (7, 1))
    assert (guessed_BT[:, :50] == -100).all() and guessed_BT.max() < 90
    for ids_BT, targets_BT in ((torch.full((2, 8), 95), torch.zeros(2, 8, dtype=torch.long)),
                               (torch.zeros(2, 8, dtype=torch.long), torch.full((2, 8), -100))):
        seen_BT, guessed_BT = mask_rows(ids_BT, targets_BT, MASK_ID, TEXT_IDS, 0.5, (7, 1))
        assert torch.equal(seen_BT, ids_BT) and (guessed_BT == -100).all()


def test_a_row_with_any_text_has_one_token_chosen():
    _, guessed_BT = mask_rows(torch.tensor([[95, 3, 95]]), torch.zeros(1, 3, dtype=torch.long), MASK_ID, TEXT_IDS, 0.15,
                              (0, 1))
    assert guessed_BT.tolist() == [[-100, 3, -100]]


def test_a_choice_follows_seed_and_step_and_not_the_rows_beside_it():
    ids_BT, targets_BT = rows(8)
    mask = lambda part, key: mask_rows(ids_BT[part], targets_BT[part], MASK_ID, TEXT_IDS, 0.15, key)
    whole = mask(slice(None), (7, 1))
    again = [torch.cat(parts) for parts in zip(mask(slice(0, 3), (7, 1)), mask(slice(3, 8), (7, 1)))]
    assert all(map(torch.equal, whole, again))
    for key in ((8, 1), (7, 2)):
        assert not torch.equal(whole[1], mask(slice(None), key)[1])
    assert torch.equal(ids_BT, rows(8)[0])                                              # the argument is left alone


# --- attention and loss ---

@pytest.mark.parametrize("documents", [None, [0, 5, 13, 26]])
def test_attention_sees_both_sides_of_its_own_document_as_a_plain_softmax(documents):
    torch.manual_seed(0)
    q = torch.randn(2, 13, 4, 8, dtype=torch.float64)
    k, v = torch.randn(2, 2, 13, 2, 8, dtype=torch.float64)
    bounds = None if documents is None else torch.tensor(documents, dtype=torch.int32)
    got = bidirectional_attention(q, k, v, bounds)
    document = np.searchsorted(documents or [0, 13, 26], np.arange(26), "right").reshape(2, 13)
    for b in range(2):
        for h in range(4):
            scores = q[b, :, h] @ k[b, :, h // 2].T / math.sqrt(8)
            scores[torch.from_numpy(document[b][:, None] != document[b])] = -math.inf
            torch.testing.assert_close(got[b, :, h], scores.softmax(-1) @ v[b, :, h // 2])
    assert not torch.allclose(got, attention(q, k, v, bounds))


def naive_nll(model, ids_BT, guessed_BT):
    """Mean nats of the hidden tokens by torch's own functions from the model's weights, written out."""
    w, c = {name: tensor.double() for name, tensor in model.state_dict().items()}, model.config
    D, T = c.head_dim, ids_BT.size(1)
    norm = lambda x, name: x * (x.pow(2).mean(-1, keepdim=True) + c.norm_eps).rsqrt() * w[name]
    angle = torch.arange(T)[:, None] * c.rope_theta ** (-torch.arange(0, D, 2, dtype=torch.float64) / D)
    turn = torch.polar(torch.ones_like(angle), angle)[:, None]                          # (T, 1, D/2)

    def rotated(x):                                                                     # (B, T, H, D)
        pair = torch.complex(x[..., :D // 2], x[..., D // 2:]) * turn
        return torch.cat([pair.real, pair.imag], -1)

    x = w["model.embed_tokens.weight"][ids_BT]
    for i in range(c.n_layer):
        p = f"model.layers.{i}."
        h = norm(x, p + "input_layernorm.weight")
        q, k, v = ((h @ w[f"{p}self_attn.{n}_proj.weight"].T).unflatten(-1, (-1, D)) for n in "qkv")
        q, k = (rotated(norm(y, f"{p}self_attn.{n}_norm.weight")) for n, y in zip("qk", (q, k)))
        k, v = (y.repeat_interleave(c.n_head // c.n_kv_head, 2) for y in (k, v))
        out = F.scaled_dot_product_attention(*(y.transpose(1, 2) for y in (q, k, v)), is_causal=False)
        x = x + out.transpose(1, 2).flatten(2) @ w[p + "self_attn.o_proj.weight"].T
        h = norm(x, p + "post_attention_layernorm.weight")
        gate, up = (h @ w[f"{p}mlp.{n}_proj.weight"].T for n in ("gate", "up"))
        x = x + (F.silu(gate) * up) @ w[p + "mlp.down_proj.weight"].T
    logits = norm(x, "model.norm.weight") @ w["lm_head.weight"].T
    return F.cross_entropy(logits.flatten(0, 1), guessed_BT.flatten()), logits


def test_loss_and_hits_equal_a_naive_transformer_with_torchs_attention_that_is_not_causal():
    torch.manual_seed(1)
    model = GPT(Config(128, n_layer=2, n_head=4, n_kv_head=2, n_embd=32, context=24, causal=False))
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.1 * torch.randn_like(weight)                                    # zeros would hide attention
    seen_BT, guessed_BT = mask_rows(*rows(3, 24), MASK_ID, TEXT_IDS, 0.3, (7, 1))
    nll_BT, hits_BT = model(seen_BT, guessed_BT, want_hits=True)
    expected, logits = naive_nll(model, seen_BT, guessed_BT)
    n = (guessed_BT != -100).sum()
    assert (nll_BT.sum() / n).item() == pytest.approx(expected.item(), abs=2e-5)
    assert hits_BT.sum() == ((logits.argmax(-1) == guessed_BT) & (guessed_BT != -100)).sum()
    model.config.causal = True
    assert (model(seen_BT, guessed_BT).sum() / n).item() != pytest.approx(expected.item(), abs=1e-3)


# --- the token ---

@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_the_mask_is_the_next_id_and_all_others_stay(kind, tmp_path):
    plain = Tokenizer.train(["the cat sat on the mat " * 20], 290, kind)
    tok = plain.with_mask()
    assert tok.specials == {**plain.specials, MASK: plain.vocab_size} and tok.token_bytes[-1] == 0
    assert tok.encode("the mat <|mask|>") == plain.encode("the mat <|mask|>")
    assert tok.fingerprint != plain.fingerprint and MASK not in plain.specials
    tok.save(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    assert loaded.fingerprint == tok.fingerprint and loaded.with_mask() is loaded
    theirs = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.mask_token_id == tok.specials[MASK] and len(theirs) == tok.vocab_size


# --- pretrain.py ---

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder, pick = tmp_path_factory.mktemp("data"), random.Random(0)
    for i in range(8):
        (folder / f"{i}.txt").write_text(" ".join(
            f"the {pick.choice(['cat', 'dog', 'hen'])} {pick.choice(['sat', 'ran'])} on {j % 7} mats."
            for j in range(1500)))
    subprocess.run([sys.executable, "data.py", f"--sources={folder}/*.txt", f"--out_dir={folder}/text",
                    "--vocab_size=300", "--val_fraction=0.2"], cwd=ROOT, check=True, capture_output=True)
    return folder / "text"


def command(folder, out_dir, *flags, ranks=1):
    launch = [sys.executable] if ranks == 1 else [sys.executable, "-m", "torch.distributed.run", "--standalone",
                                                  f"--nproc_per_node={ranks}"]
    return [*launch, "pretrain.py", f"--data={folder}", f"--out_dir={out_dir}", *TINY, *flags]


def run(*args, **kwargs):
    return subprocess.run(command(*args, **kwargs), cwd=ROOT, capture_output=True, text=True, timeout=90,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})


def log(out_dir):
    return [json.loads(line) for line in open(os.path.join(out_dir, "log.jsonl"))]


def curve(out_dir, name="loss"):
    return [record[name] for record in log(out_dir) if name in record]


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    out_dir = tmp_path_factory.mktemp("out") / "whole"
    result = run(folder, out_dir, "--max_steps=24")
    assert result.returncode == 0, result.stderr
    return out_dir, result.stdout


def test_it_learns_to_guess_hidden_tokens_and_says_how_many_are_right(folder, whole, tmp_path):
    out_dir, stdout = whole
    assert curve(out_dir)[0] == pytest.approx(math.log(384), abs=0.12) and curve(out_dir)[-1] < 3.5
    assert "nats per hidden token" in stdout and "sample:" not in stdout and not curve(out_dir, "val_bpb")
    longer = tmp_path / "longer"
    assert run(folder, longer, "--max_steps=160", "--eval_every=160", "--rows_per_step=16").returncode == 0
    accuracy = curve(longer, "accuracy")
    assert accuracy[0] < 0.2 and curve(longer, "val_accuracy")[-1] > 0.5       # the commonest token's share is 0.15


def test_killed_and_resumed_it_repeats_the_uninterrupted_run_to_the_bit(folder, whole, tmp_path):
    out_dir = tmp_path / "killed"
    process = subprocess.Popen(command(folder, out_dir, "--max_steps=24"), cwd=ROOT, stdout=subprocess.DEVNULL,
                               env={**os.environ, "OMP_NUM_THREADS": "1"})
    while not (out_dir / "resume" / "state.pt").exists():
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    result = run(folder, out_dir, "--max_steps=24", "--resume=true")
    assert result.returncode == 0, result.stderr
    for name in ("loss", "accuracy", "val_loss", "val_accuracy"):
        assert curve(out_dir, name) == curve(whole[0], name)
    a, b = (load_file(path / "model.safetensors") for path in (out_dir, whole[0]))
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("masked", ["true", "false"])
def test_two_ranks_that_accumulate_equal_one_that_does_not(folder, tmp_path, masked):
    one, two = tmp_path / "one", tmp_path / "two"
    options = ["--max_steps=6", f"--mask_documents={masked}"]
    assert run(folder, one, *options).returncode == 0
    begun = run(folder, two, *options, "--micro_rows=2", ranks=2)
    assert begun.returncode == 0, begun.stderr
    for name in ("loss", "accuracy", "val_loss", "val_accuracy"):
        assert curve(two, name) == pytest.approx(curve(one, name), abs=2e-3 if "accuracy" in name else 1e-5)
    a, b = (load_file(path / "model.safetensors") for path in (one, two))
    for name in a:
        # AdamW divides by the gradient's own size: where that is near nothing, rounding moves the embedding most
        torch.testing.assert_close(a[name], b[name], atol=5e-5 if "embed" in name else 1e-5, rtol=0)


def test_the_denominator_is_the_hidden_tokens_of_all_ranks_and_micro_batches():
    tok = Tokenizer.train(["the cat sat on the mat " * 20], 290).with_mask()
    micro = lambda step, i: (*rows(2, 40, seed=i), None)
    batches = MaskedBatches(micro, tok, 0.15, 1, accumulation=3, total=lambda n: 2 * torch.tensor(float(n)))
    hidden = sum((batches(5, i)[1] != -100).sum().item() for i in range(3))
    assert batches.targets_in_step(5) == 2 * hidden > 0
    assert not torch.equal(batches(5, 0)[1], batches(6, 0)[1])                          # anew in every step


def test_the_checkpoint_says_its_objective_and_every_other_stage_refuses_it(folder, whole, tmp_path):
    out_dir = str(whole[0])
    config = json.load(open(whole[0] / "config.json"))
    assert config["architectures"] == ["Qwen3ForMaskedLM"] and json.load(open(whole[0] / "options.json"))
    assert MASK in Tokenizer.load(out_dir).specials and not GPT.load(out_dir, masked=True).config.causal
    for load in (GPT.load, ScalarHead.load, ScalarHead.begin):
        with pytest.raises(ValueError, match="--objective=mlm .Qwen3ForMaskedLM., which sees both ways"):
            load(out_dir)
    transformers = pytest.importorskip("transformers")
    with pytest.raises((ValueError, KeyError)):                 # rather than a causal model with these weights
        transformers.AutoModelForCausalLM.from_pretrained(out_dir)
    for script, *flags in (["chat.py", f"--model={out_dir}"], ["sft.py", f"--init_from={out_dir}"],
                           ["eval.py", f"--model={out_dir}", "--tasks=bpb", f"--text={folder}"],
                           ["pretrain.py", f"--init_from={out_dir}", f"--data={folder}"]):
        flags += [] if script in ("chat.py", "eval.py") else [f"--out_dir={tmp_path}/{script}"]
        result = subprocess.run([sys.executable, script, *flags], cwd=ROOT, capture_output=True, text=True, input="hi")
        assert result.returncode == 1 and "which sees both ways and cannot continue text" in result.stderr, script
        assert "Traceback" not in result.stderr


def test_it_goes_on_from_a_masked_model_and_from_a_causal_one_with_a_row_to_spare(folder, whole, tmp_path):
    result = run(folder, tmp_path / "more", "--max_steps=4", f"--init_from={whole[0]}")
    assert result.returncode == 0, result.stderr
    assert curve(tmp_path / "more")[0] == pytest.approx(curve(whole[0])[-1], abs=0.7)
    causal = tmp_path / "causal"
    result = run(folder, causal, "--max_steps=2", "--objective=clm", "--sample_tokens=0")
    assert result.returncode == 0, result.stderr
    result = run(folder, tmp_path / "turned", "--max_steps=2", f"--init_from={causal}")
    assert result.returncode == 0, result.stderr
    full = GPT(Config(Tokenizer.load(causal).vocab_size, n_layer=1, n_head=2, n_embd=32, context=32))
    full.save(tmp_path / "full")
    Tokenizer.load(causal).save(tmp_path / "full")
    result = run(folder, tmp_path / "x", "--max_steps=2", f"--init_from={tmp_path / 'full'}")
    assert result.returncode == 1 and "no row left for <|mask|>" in result.stderr and "Traceback" not in result.stderr


@pytest.mark.parametrize("flag, words", [("--objective=bert", "objective must be clm or mlm, got 'bert'"),
                                         ("--mask_share=0", "mask_share must lie between 0 and 1, got 0")])
def test_bad_options_end_in_one_sentence(folder, tmp_path, flag, words):
    result = run(folder, tmp_path / "x", flag)
    assert result.returncode == 1 and words in result.stderr and "Traceback" not in result.stderr
