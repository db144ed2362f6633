"""ppo.py's rewards, advantages, returns and losses equal those of the last trl releases that had PPO.

One environment cannot hold them, so their numbers lie in ppo_reference.json, and record_ppo.py wrote them there:

    pip install --no-deps --target trl112 trl==1.12.0; pip install --no-deps --target trl0114 trl==0.11.4
    PYTHONPATH=trl112 python tests/parity/record_ppo.py
    PYTHONPATH=trl0114 python tests/parity/record_ppo.py

0.11.4 puts the score on an answer's last token, as ppo.py does. 1.12.0 puts it one later where there is room, so that
values and rewards have one token more than the policy: the same functions with a longer mask.
"""
import json
import os

import pytest
import torch

import ppo

with open(os.path.join(os.path.dirname(__file__), "ppo_reference.json"), encoding="utf-8") as f:
    REFERENCE = json.load(f)


def tensors(part):
    return {name: torch.tensor(value) if isinstance(value, list) and name != "updates" else value
            for name, value in part.items()}


def up_to(lengths_A, L):
    return torch.arange(L) < lengths_A[:, None]


def close(ours, theirs, mask=None):
    torch.testing.assert_close(ours if mask is None else ours * mask, theirs if mask is None else theirs * mask,
                               atol=2e-6, rtol=1e-5)


def mean(loss_AL, mask_AL):
    return (loss_AL * mask_AL).sum() / mask_AL.sum()


def test_rewards_advantages_returns_and_losses_are_those_of_trl_0_11():
    r = tensors(REFERENCE["0.11.4"])
    mask = up_to(r["lengths"], 8)
    kl = ppo.kl_estimate(r["logp"], r["ref"], "k1")
    rewards = ppo.token_rewards(r["scores"], kl, mask, r["kl_coef"])
    advantages, returns = ppo.gae(rewards, r["values"], mask, r["gamma"], r["lam"])
    close(kl, r["kl"])
    close(rewards, r["rewards"], mask)
    close(returns, r["returns"], mask)
    advantages = ppo.whiten(advantages, mask)
    close(advantages, r["advantages"], mask)
    policy, _ = ppo.policy_loss(r["new_logp"], r["logp"], advantages, r["clip_range"])
    value, _ = ppo.value_loss(r["new_values"], r["values"], returns, r["value_clip"])
    close(mean(policy, mask), torch.tensor(r["policy_loss"]))
    close(mean(value, mask), torch.tensor(r["value_loss"]))


@pytest.mark.parametrize("part", REFERENCE["1.12.0"], ids=lambda part: part["estimator"])
def test_rewards_advantages_returns_and_losses_are_those_of_trl_1_12(part):
    r = tensors(part)
    mask, longer = up_to(r["lengths"], 8), up_to(r["lengths"] + 1, 8)
    kl = ppo.kl_estimate(r["logp"], r["ref"], r["estimator"])       # beyond an answer's end theirs are equal: 0
    close(kl, r["kl"])
    rewards = ppo.token_rewards(r["scores"], kl, longer, r["kl_coef"])
    if r["whiten_rewards"]:
        rewards = ppo.whiten(rewards, longer, shift_mean=False)
    close(rewards, r["rewards"])
    advantages, returns = ppo.gae(rewards, r["values"], longer, r["gamma"], r["lam"])
    close(advantages, r["raw_advantages"])
    close(returns, r["returns"])
    advantages = ppo.whiten(advantages, mask)
    close(advantages, r["advantages"])
    for update in map(tensors, r["updates"]):
        rows = update["rows"]
        policy, _ = ppo.policy_loss(update["logp"], r["logp"][rows], advantages[rows], r["clip_range"])
        value, _ = ppo.value_loss(update["values"], r["values"][rows], returns[rows], r["value_clip"])
        close(mean(policy, mask[rows]), torch.tensor(update["policy_loss"]))
        close(mean(value, longer[rows]), torch.tensor(update["value_loss"]))
    assert (update["logp"] - r["logp"][rows]).abs().max() > 0.1     # clipping had something to do
