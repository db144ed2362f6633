"""The reward model beside trl's RewardTrainer, loss and gradients, and beside transformers, opened and scored."""
import pytest
import torch

import judge
import reward
from model import Config, ScalarHead
from packing import pack
from tokenizer import Tokenizer

transformers = pytest.importorskip("transformers", reason="transformers is not installed (requirements-test.txt)")
trl = pytest.importorskip("trl", reason="trl is not installed (requirements-test.txt)")

VOCAB, PAD = 64, 1
TOLERANCE = dict(atol=1e-5, rtol=1e-5)


def saved_head(folder, qk_norm, tied=False, **shape):
    torch.manual_seed(0)
    sizes = dict(vocab_size=VOCAB, n_layer=2, n_head=4, n_kv_head=2, n_embd=32, n_hidden=48, context=64, eos_id=0,
                 pad_id=PAD)
    head = ScalarHead(Config(**sizes | shape, qk_norm=qk_norm, tied=tied))
    for p in head.parameters():
        torch.nn.init.normal_(p, mean=1.0 if p.dim() == 1 else 0.0, std=0.2)
    head.bias = -0.5
    head.save(str(folder))
    return head


def opened(folder):
    return transformers.AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()


def ragged(n=5, seed=1):
    """[(prompt, [chosen, rejected])], of which no token is padding."""
    generator = torch.Generator().manual_seed(seed)
    ids = lambda least, most: torch.randint(2, VOCAB, (torch.randint(least, most, (), generator=generator),),
                                            generator=generator).tolist()
    return [(ids(2, 20), [ids(1, 30), ids(1, 30)]) for _ in range(n)]


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("margins", [False, True])
@pytest.mark.parametrize("centering", [0.0, 0.01])
def test_loss_gradients_and_metrics_equal_trls(qk_norm, margins, centering, tmp_path):
    ours, groups = saved_head(tmp_path / "head", qk_norm), ragged()
    margin_P = torch.rand(len(groups), generator=torch.Generator().manual_seed(2)) * 2 if margins else torch.zeros(5)

    theirs = opened(tmp_path / "head")
    options = dict(output_dir=str(tmp_path / "trl"), report_to="none", bf16=False, use_cpu=True, save_strategy="no",
                   gradient_checkpointing=False, disable_tqdm=True, center_rewards_coefficient=centering or None)
    words = {f"w{i}": i for i in range(VOCAB)}
    from tokenizers import Tokenizer as Words
    from tokenizers.models import WordLevel
    spec = Words(WordLevel(words, unk_token="w2"))
    processing = transformers.PreTrainedTokenizerFast(tokenizer_object=spec, pad_token="w1", eos_token="w0")
    import datasets
    from trl.trainer.reward_trainer import DataCollatorForPreference
    dummy = datasets.Dataset.from_list([{"chosen_ids": [2, 3], "rejected_ids": [4]}])
    trainer = trl.RewardTrainer(model=theirs, args=trl.RewardConfig(**options), train_dataset=dummy,
                                processing_class=processing)
    rows = [dict(chosen_ids=prompt + chosen, rejected_ids=prompt + rejected, **({"margin": m} if margins else {}))
            for (prompt, (chosen, rejected)), m in zip(groups, margin_P.tolist())]
    model = trainer.model.eval()
    wanted = trainer.compute_loss(model, DataCollatorForPreference(pad_token_id=PAD)(rows))
    wanted.backward()

    chosen_P, rejected_P = reward.pair_scores(ours, pack(groups))
    loss = reward.bradley_terry(chosen_P, rejected_P, margin_P, centering).mean()
    loss.backward()
    torch.testing.assert_close(loss, wanted, **TOLERANCE)
    gradients = dict(model.named_parameters())
    assert len(gradients) == len(list(ours.parameters()))
    for name, p in ours.named_parameters():
        torch.testing.assert_close(p.grad, gradients[name].grad, **TOLERANCE, msg=name)

    metrics = reward.reward_metrics(torch.stack((chosen_P, rejected_P), -1).detach())
    for name, value in metrics.items():
        assert trainer._metrics["eval"][name] == [pytest.approx(value.item(), abs=1e-5)], name


@pytest.mark.parametrize("qk_norm, tied", [(False, False), (True, False), (True, True)])
def test_a_directory_opens_in_transformers_whose_score_and_the_bias_are_the_reward(qk_norm, tied, tmp_path):
    tokenizer = Tokenizer.train(["what is 1 and 2? 3, or so they say"], 300)
    ours = saved_head(tmp_path, qk_norm, tied, vocab_size=384, eos_id=tokenizer.eot_id, pad_id=tokenizer.pad_id)
    tokenizer.save(tmp_path)
    theirs, their_tokenizer = opened(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert type(theirs).__name__ == ("Qwen3" if qk_norm else "Llama") + "ForSequenceClassification"
    assert theirs.config.num_labels == 1 and theirs.config.pad_token_id == their_tokenizer.pad_token_id

    chats = [[{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
             for question in ("what is 1 and 2?", "so?") for answer in ("3", "they say 3, or so", "")]
    texts = [their_tokenizer.apply_chat_template(chat, tokenize=False).removesuffix("\n") for chat in chats]
    batch = their_tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
    with torch.no_grad():
        scores = theirs(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, 0]
    rewards = judge.load_reward(str(tmp_path))(chats)
    assert theirs.config.score_bias == ours.bias
    torch.testing.assert_close(rewards, scores + theirs.config.score_bias, **TOLERANCE)
