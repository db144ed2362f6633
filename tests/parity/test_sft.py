"""SFT beside trl's SFTTrainer on the same weights and conversations: loss, every gradient, metrics, what is trained.

trl opens the directory that we save, prepares the conversations itself through the chat template (assistant_only_loss)
and pads them; we encode them ourselves and pack them."""
import numpy as np
import pytest
import torch

import chats
import sft
from model import GPT, Config
from tokenizer import Tokenizer

transformers = pytest.importorskip("transformers", reason="transformers is not installed (requirements-test.txt)")
trl = pytest.importorskip("trl", reason="trl is not installed (requirements-test.txt)")

NAMES = "user", "assistant"
TALKS = [[{"role": role, "content": text} for role, text in zip(NAMES * 3, turns)] for turns in (
    ("What is 2+2?", "<think>\n2+2=4\n</think><answer>4</answer>"), ("Hi", "Ho"),
    ("Sort 3 1 2, please, and tell me how you did it.", "1 2 3: the smallest digit first, then the next.",
     "And 9 8?", "8 9", "Thanks.", "You are welcome, any time."),
    ("Name a colour.", "Blue, as the sky is at noon when no cloud is in sight.", "Another!", "Red."))]
TALKS.append([{"role": "system", "content": "Be brief."}, *TALKS[2][:4]])
KINDS = [dict(qk_norm=True), dict(qk_norm=False), dict(qk_norm=False, tied=True)]


def base(folder, **changes):
    """A random model and a tokenizer, saved in `folder`; log-probabilities far from equal."""
    tokenizer = Tokenizer.train([message["content"] for talk in TALKS for message in talk] * 9, 320)
    tokenizer.save(folder)
    torch.manual_seed(0)
    model = GPT(Config(**dict(vocab_size=384, n_layer=2, n_head=4, n_kv_head=2, n_embd=32, n_hidden=48, context=256,
                              eos_id=tokenizer.eot_id, pad_id=tokenizer.pad_id) | changes))
    for p in model.parameters():
        torch.nn.init.normal_(p, mean=1.0 if p.dim() == 1 else 0.0, std=0.2)
    model.save(str(folder))
    return model, tokenizer


def their_trainer(folder, out_dir, **changes):
    """(trainer, its model, the padded batch that it makes of all conversations)."""
    import datasets
    options = dict(output_dir=str(out_dir), report_to="none", bf16=False, use_cpu=True, gradient_checkpointing=False,
                   save_strategy="no", disable_tqdm=True, assistant_only_loss=True, max_length=None,
                   per_device_train_batch_size=len(TALKS))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    trainer = trl.SFTTrainer(model, trl.SFTConfig(**options | changes),
                             train_dataset=datasets.Dataset.from_list([{"messages": talk} for talk in TALKS]),
                             processing_class=transformers.AutoTokenizer.from_pretrained(folder))
    rows = [{name: row[name] for name in ("input_ids", "labels")} for row in trainer.train_dataset]
    return trainer, trainer.model.eval(), trainer.data_collator(rows)


def our_batch(tokenizer, packed):
    """(ids, targets, None, cu_seqlens) of all conversations in two packed rows, or one a row, padded."""
    split = chats.Chats.__new__(chats.Chats)
    encoded = chats.encode_chats(tokenizer, TALKS)
    split.tokens, split.mask = (np.concatenate([pair[i] for pair in encoded]) for i in (0, 1))
    split.lengths, split.pad_id = np.array([len(ids) for ids, _ in encoded]), tokenizer.pad_id
    split.offsets = np.concatenate([[0], np.cumsum(split.lengths)])
    rows = [[2, 0], [4, 1, 3]] if packed else [[i] for i in range(len(TALKS))]
    return split.assemble(rows, max(split.lengths[row].sum() for row in rows) + 3)


def ours(model, batch, n=None):
    """The loss and its gradients, as sft.py computes them: divided by n targets, or by those of the batch."""
    ids, targets, weights, cu_seqlens = batch
    model.zero_grad()
    loss = sft.weighted_nll(model(ids, targets, cu_seqlens), weights) / (n or (targets != -100).sum())
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


def theirs(trainer, model, batch, n=None):
    model.zero_grad()
    loss = trainer.compute_loss(model, dict(batch), num_items_in_batch=n and torch.tensor(n))
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_and_every_gradient_equal_trls(kind, packed, tmp_path):
    model, tokenizer = base(tmp_path / "base", **kind)
    trainer, their_model, their_batch = their_trainer(tmp_path / "base", tmp_path / "out")
    for n in (None, 1000):              # trained tokens of this batch; of a whole step that it is a part of
        loss, gradients = ours(model, our_batch(tokenizer, packed), n)
        expected, their_gradients = theirs(trainer, their_model, their_batch, n)
        assert loss.item() == pytest.approx(expected.item(), abs=1e-5, rel=1e-6)
        assert gradients.keys() == their_gradients.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, their_gradients[name], atol=1e-5, rtol=1e-5)
            assert gradient.abs().max() > 1e-4, name


def test_what_is_trained_is_what_trl_trains(tmp_path):
    _, tokenizer = base(tmp_path / "base")
    _, _, batch = their_trainer(tmp_path / "base", tmp_path / "out")
    ids, targets, _, _ = our_batch(tokenizer, packed=False)
    for row, (talk, labels) in enumerate(zip(TALKS, batch["labels"])):
        expected = [label for label in labels.tolist() if label != -100]
        assert targets[row][targets[row] != -100].tolist() == expected
        assert expected.count(tokenizer.chat_end_id) == sum(message["role"] == "assistant" for message in talk)
        n = batch["attention_mask"][row].sum()
        assert torch.equal(ids[row, :n], batch["input_ids"][row, :n])
        assert torch.equal(targets[row, :n - 1], labels[1:n])


def test_entropy_and_token_accuracy_equal_trls(tmp_path):
    model, tokenizer = base(tmp_path / "base")
    ids, targets, _, cu_seqlens = our_batch(tokenizer, packed=True)
    updates = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(5):                  # until some tokens are learnt
        model(ids, targets, cu_seqlens).mean().backward()
        updates.step()
        updates.zero_grad()
    model.save(str(tmp_path / "base"))
    trainer, their_model, their_batch = their_trainer(tmp_path / "base", tmp_path / "out")
    nats, entropy, hits, n = sft.token_sums(*model(ids, targets, cu_seqlens, want_entropy=True, want_hits=True),
                                            targets).tolist()
    loss, _ = theirs(trainer, their_model, their_batch)
    [their_entropy], [accuracy] = (trainer._metrics["eval"][name] for name in ("entropy", "mean_token_accuracy"))
    assert nats / n == pytest.approx(loss.item(), abs=1e-5)
    assert entropy / n == pytest.approx(their_entropy, abs=1e-5) and hits / n == pytest.approx(accuracy, abs=1e-6)
    assert their_entropy > 0.1 and 0.1 < accuracy < 0.9, accuracy


def test_a_batch_without_a_trained_token_has_loss_0_as_trls(tmp_path):
    model, tokenizer = base(tmp_path / "base")
    trainer, their_model, their_batch = their_trainer(tmp_path / "base", tmp_path / "out")
    their_batch["labels"] = torch.full_like(their_batch["labels"], -100)
    ids, targets, _, cu_seqlens = our_batch(tokenizer, packed=True)
    loss, gradients = ours(model, (ids, torch.full_like(targets, -100), None, cu_seqlens), n=1)
    expected, _ = theirs(trainer, their_model, their_batch)
    assert loss == expected == 0 and not any(gradient.any() for gradient in gradients.values())
