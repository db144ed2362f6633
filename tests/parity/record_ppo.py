"""Writes tests/parity/ppo_reference.json: PPO's numbers from two old releases of trl (the newest has no PPO).

    pip install --no-deps --target trl112 trl==1.12.0; pip install --no-deps --target trl0114 trl==0.11.4
    PYTHONPATH=trl112 python tests/parity/record_ppo.py
    PYTHONPATH=trl0114 python tests/parity/record_ppo.py

Each call replaces its own release's part of the file. 1.12.0: the whole trainer is run on a random Llama with given
answers, and its local variables are read where it whitens and where it goes backward. 0.11.4: the methods
compute_rewards, compute_advantages and loss are called on random numbers.
"""
import json
import os
import sys
import types
from unittest import mock

import torch

HERE = os.path.dirname(os.path.abspath(__file__))
FILE = os.path.join(HERE, "ppo_reference.json")
LENGTHS = [8, 3, 5, 1, 8, 7, 2, 4, 6, 8, 1, 3, 5, 7, 2, 6]      # tokens of answers; all but the first end with <eos>


def plain(values):
    """Nested lists and numbers of tensors."""
    return {name: value.tolist() if isinstance(value, torch.Tensor) else value for name, value in values.items()}


def trl_1_12(folder, estimator, whiten_rewards):
    """What one rollout and its four updates of trl's trainer compute."""
    import numpy as np
    from datasets import Dataset
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import (
        LlamaConfig,
        LlamaForCausalLM,
        LlamaForSequenceClassification,
        PreTrainedTokenizerFast,
    )
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    words = {word: i for i, word in enumerate(["<pad>", "<eos>", *"abcdefghijklmnopqrstuv"])}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, unk_token="a")), pad_token="<pad>",
                                        eos_token="<eos>", padding_side="left")
    shape = LlamaConfig(vocab_size=24, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
                        initializer_range=0.2, pad_token_id=0, eos_token_id=1, num_labels=1)
    torch.manual_seed(0)
    np.random.seed(0)
    policy, reference = LlamaForCausalLM(shape), LlamaForCausalLM(shape)
    value_model, reward_model = LlamaForSequenceClassification(shape), LlamaForSequenceClassification(shape)
    config = PPOConfig(output_dir=folder, report_to="none", bf16=False, use_cpu=True, gradient_checkpointing=False,
                       save_strategy="no", disable_tqdm=True, per_device_train_batch_size=8,
                       gradient_accumulation_steps=2, num_mini_batches=2, num_ppo_epochs=2, total_episodes=16,
                       response_length=8, stop_token="eos", missing_eos_penalty=1.0, kl_coef=0.3, gamma=0.9, lam=0.8,
                       kl_estimator=estimator, whiten_rewards=whiten_rewards, cliprange=0.1, cliprange_value=0.1,
                       learning_rate=0.02, num_sample_generations=0)
    data = Dataset.from_dict({"input_ids": torch.randint(2, 24, (16, 4)).tolist()})
    trainer = PPOTrainer(config, tokenizer, policy, reference, reward_model, data, value_model)
    generate, whiten, backward = ppo_trainer.batch_generation, ppo_trainer.masked_whiten, trainer.accelerator.backward
    record = dict(estimator=estimator, whiten_rewards=whiten_rewards, kl_coef=0.3, gamma=0.9, lam=0.8, clip_range=0.1,
                  value_clip=0.1, missing_eos_penalty=1.0, updates=[])

    def given_answers(*arguments):
        rows, logits = generate(*arguments)
        rows = rows.clone()
        for row, length in zip(rows, LENGTHS):
            answer = row[4:]                        # a view
            answer[answer < 2] = 2
            answer[length - 1] = 1
        rows[0, -1] = 2                             # the one that does not end
        return rows, logits

    def record_advantages(values, mask, shift_mean=True):
        out = whiten(values, mask, shift_mean)
        found = sys._getframe(1).f_locals
        if shift_mean:
            assert (found["sequence_lengths"] + 1).tolist() == LENGTHS
            names = {"logp": "logprobs", "ref": "ref_logprobs", "values": "values", "kl": "kl", "rewards": "rewards",
                     "returns": "returns", "scores": "scores", "finished": "contain_eos_token"}
            record.update(plain({ours: found[theirs] for ours, theirs in names.items()}))
            record.update(plain(dict(lengths=found["sequence_lengths"] + 1, raw_advantages=values,
                                     advantages=out.masked_fill(~mask, 0))))
        return out

    def record_update(loss, **options):
        found = sys._getframe(1).f_locals
        rows = {"rows": found["micro_batch_inds"].tolist(), "logp": found["new_logprobs"], "values": found["vpred"],
                "policy_loss": found["pg_loss"], "value_loss": found["vf_loss"]}
        record["updates"].append(plain(rows))
        return backward(loss, **options)

    ppo_trainer.batch_generation, ppo_trainer.masked_whiten = given_answers, record_advantages
    trainer.accelerator.backward = record_update
    trainer.train()
    ppo_trainer.batch_generation, ppo_trainer.masked_whiten = generate, whiten
    return record


def trl_0_11():
    """What the methods of trl 0.11's trainer, which puts the score on the last token, make of random numbers."""
    sys.modules.setdefault("tyro", mock.MagicMock())        # of its command line alone
    from trl.trainer.ppo_trainer import PPOTrainer
    torch.manual_seed(0)
    logp, new_logp, ref = (-torch.rand(6, 8) * 3 for _ in range(3))
    new_logp = logp + 0.3 * torch.randn(6, 8)
    values, new_values, scores = torch.randn(6, 8), torch.randn(6, 8), torch.randn(6)
    mask = (torch.arange(8) < torch.tensor(LENGTHS[:6])[:, None]).float()
    options = dict(gamma=0.9, lam=0.8, clip_range=0.2, value_clip=0.2, kl_coef=0.3)
    trainer = types.SimpleNamespace(
        config=types.SimpleNamespace(kl_penalty="kl", gamma=0.9, lam=0.8, whiten_rewards=False, cliprange=0.2,
                                     cliprange_value=0.2, vf_coef=1.0, ratio_threshold=10.0),
        kl_ctl=types.SimpleNamespace(value=0.3))
    trainer._kl_penalty = lambda *given: PPOTrainer._kl_penalty(trainer, *given)
    rewards, _, kl = PPOTrainer.compute_rewards(trainer, scores, logp, ref, mask)
    _, advantages, returns = PPOTrainer.compute_advantages(trainer, values, rewards, mask)
    policy_loss, value_loss, _ = PPOTrainer.loss(trainer, logp, values * mask, torch.zeros(6, 8, 2), new_values,
                                                 new_logp, mask, advantages, returns)
    found = dict(logp=logp, new_logp=new_logp, ref=ref, values=values, new_values=new_values, scores=scores, kl=kl,
                 rewards=rewards, advantages=advantages, returns=returns, policy_loss=policy_loss,
                 value_loss=value_loss, lengths=LENGTHS[:6])
    return plain(options | found)


def main():
    import tempfile

    import trl
    parts = {}
    if os.path.exists(FILE):
        with open(FILE, encoding="utf-8") as f:
            parts = json.load(f)
    if trl.__version__ == "1.12.0":
        with tempfile.TemporaryDirectory() as folder:
            parts["1.12.0"] = [trl_1_12(folder, "k1", False), trl_1_12(folder, "k3", True)]
    elif trl.__version__ == "0.11.4":
        parts["0.11.4"] = trl_0_11()
    else:
        raise SystemExit(f"record_ppo.py: found trl {trl.__version__} and reads 1.12.0 and 0.11.4; set PYTHONPATH")
    with open(FILE, "w", encoding="utf-8") as f:
        rounded = json.loads(json.dumps(parts), parse_float=lambda x: float(f"{float(x):.7g}"))
        lines = [f"{json.dumps(name)}: {json.dumps(rounded[name])}" for name in sorted(rounded)]
        f.write("{" + ",\n".join(lines) + "}\n")


if __name__ == "__main__":
    main()
