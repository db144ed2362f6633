"""Log-likelihoods of given text under a model, by lm-evaluation-harness's conventions.

    loglikelihoods(model, tokenizer, [("Question: 1+1?\\nAnswer:", " 2"), ...]) -> [(nats, is_greedy, n_tokens), ...]

Continuations of one context form a tree, (context ids, [continuation ids, ...]). A tree is one row of a batch: the
context, then its branches one after another, each at the positions right after the context and blind to the other
branches. So the context is computed once, however many continuations it has.

Shapes: B trees, T tokens of a tree, C channels, N predicted tokens.
"""

import numpy as np
import torch
import torch.nn.functional as F

from kernels import linear_logprob


def loglikelihoods(model, tokenizer, pairs, batch_tokens=0, greedy=True, rank=0, world_size=1, progress=None):
    """[(nats, is_greedy, tokens)] of (context, continuation)s: the log-likelihood of each continuation, whether greedy
    decoding would give it, and how many tokens it has.

    The two are encoded jointly, white space at the end of the context going to the continuation; an empty context is
    the end-of-text token. What is longer than the model's context loses its left end, so that the last context + 1
    tokens stay. With several ranks each computes its share of the trees and gets every result.
    ValueError on an empty continuation, and on one that alone is longer than the model's context.
    """
    encoded = encode_pairs(tokenizer, pairs)
    trees, places = plant(encoded, model.config.context)
    scored = score(model, trees, batch_tokens, greedy, rank, world_size, progress)
    return [(*scored[tree][branch], len(ids)) for (tree, branch), (_, ids) in zip(places, encoded)]


def encode_pairs(tokenizer, pairs):
    """[(context ids, continuation ids)]: of context + continuation, what follows the context's own number of ids."""
    begin = tokenizer.prefix_ids
    moved = [(context.rstrip(), context[len(context.rstrip()):] + continuation) for context, continuation in pairs]
    contexts = list(dict.fromkeys(context for context, _ in moved))
    ids_of = dict(zip(contexts, tokenizer.encode_batch(contexts)))
    wholes = tokenizer.encode_batch([context + continuation for context, continuation in moved])
    encoded = []
    for number, ((context, continuation), whole) in enumerate(zip(moved, wholes)):
        first = len(ids_of[context])
        if len(whole) <= first:
            raise ValueError(f"continuation {number + 1:,} is empty, or melts into its context: {continuation!r:.60} "
                             f"after {context[-60:]!r}")
        before = begin if context else [tokenizer.start_id]
        encoded.append(([*before, *ids_of[context].tolist()], whole[first:].tolist()))
    return encoded


def plant(encoded, context_length):
    """(trees, [(tree, branch) of each pair]): pairs of one context share a tree, unless one of them is cut."""
    trees, places, known = [], [], {}
    for number, (context, continuation) in enumerate(encoded):
        room = context_length + 1 - len(continuation)           # the last token is predicted and never read
        if room < 1:
            raise ValueError(f"continuation {number + 1:,} has {len(continuation)} tokens, more than the model's "
                             f"context of {context_length}; it cannot be scored in one piece")
        context = tuple(context[-room:])
        if context not in known:
            known[context] = len(trees)
            trees.append((list(context), []))
        places.append((known[context], len(trees[known[context]][1])))
        trees[known[context]][1].append(continuation)
    return trees, places


def windows(ids, first_id, context_length, stride=0):
    """Trees of one branch that predict every id once: windows of context_length, each moved on by `stride` tokens.

    A stride of 0 is context_length: windows do not overlap, but for the one token that the first target follows
    (lm-evaluation-harness's rolling windows). A smaller one gives every target but the first window's at least
    context_length - stride tokens before it, at context_length / stride times the price.
    """
    step = stride or context_length
    if not 1 <= step <= context_length:
        raise ValueError(f"stride must be from 1 to the model's context {context_length}, or 0 for that, got {stride}")
    whole, done, trees = [first_id, *ids], 0, []                # whole[i + 1] is the target ids[i]
    while done < len(ids):
        end = min(done + (step if done else context_length), len(ids))
        trees.append((whole[max(0, end - context_length):done + 1], [whole[done + 1:end + 1]]))
        done = end
    return trees


@torch.no_grad()
def score(model, trees, batch_tokens=0, greedy=False, rank=0, world_size=1, progress=None):
    """[[(nats, is_greedy or None) of each branch] of each tree]. Trees are taken longest first, `batch_tokens` a batch
    (0: what suits the device); `progress` is called with the number of trees that each batch finished."""
    device = model.lm_head.weight.device
    head = model.lm_head.merged_weight().to(model.model.dtype)
    batch_tokens = batch_tokens or (4096 if device.type == "cpu" else 65536)
    sizes = [len(context) + sum(len(branch) - 1 for branch in branches) for context, branches in trees]
    order = sorted(range(len(trees)), key=lambda i: (-sizes[i], i))[rank::world_size]
    results = {}
    while order:
        rows = max(1, batch_tokens // sizes[order[0]])
        batch, order = order[:rows], order[rows:]
        ids, positions, branches, picks, targets = lay_out([trees[i] for i in batch], sizes[batch[0]])
        hidden = tree_hidden(model, *(torch.from_numpy(x).to(device) for x in (ids, positions, branches)))
        hidden = hidden.flatten(0, 1)[torch.from_numpy(picks).to(device)]               # (N, C)
        targets = torch.from_numpy(targets).to(device)
        logp = linear_logprob(hidden, head, targets).double().cpu().numpy()
        hits = np.concatenate([model.logits(part).argmax(-1).cpu().numpy() for part in hidden.split(1024)]
                              ) == targets.cpu().numpy() if greedy else None
        at = 0
        for i in batch:
            results[i] = []
            for branch in trees[i][1]:
                here, at = slice(at, at + len(branch)), at + len(branch)
                results[i].append((float(logp[here].sum()), bool(hits[here].all()) if greedy else None))
        if progress:
            progress(len(batch))
    if world_size > 1:
        shares = [None] * world_size
        torch.distributed.all_gather_object(shares, results)
        results = {i: result for share in shares for i, result in share.items()}
    return [results[i] for i in range(len(trees))]


def lay_out(trees, T):
    """Arrays of a batch: ids, positions and branch numbers (B, T), the context being branch 0 and padding -1; and of
    each predicted token its place in the flattened (B*T) hidden states and its id, (N,)."""
    ids, positions = np.zeros((2, len(trees), T), np.int64)
    branches, picks, targets = np.full((len(trees), T), -1), [], []
    for row, (context, continuations) in enumerate(trees):
        at = len(context)
        ids[row, :at], positions[row, :at], branches[row, :at] = context, np.arange(at), 0
        for number, continuation in enumerate(continuations, 1):
            n = len(continuation) - 1
            ids[row, at:at + n] = continuation[:-1]
            positions[row, at:at + n] = np.arange(len(context), len(context) + n)
            branches[row, at:at + n] = number
            picks += [row * T + len(context) - 1, *range(row * T + at, row * T + at + n)]
            targets += continuation
            at += n
    return ids, positions, branches, np.array(picks), np.array(targets)


def tree_hidden(model, ids, positions, branches):
    """Final hidden states (B, T, C) of a batch of trees: a token sees the context and its own branch, up to itself."""
    if not (branches > 1).any():                                # one branch after each context: plain causal rows
        return model.forward_hidden(ids)
    T = ids.size(1)
    seen = (branches[:, None, :] == 0) | (branches[:, None, :] == branches[:, :, None])
    seen = (seen & torch.ones(T, T, dtype=torch.bool, device=ids.device).tril()).unsqueeze(1)       # (B, 1, T, T)

    def attend(layer, q, k, v):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, seen, enable_gqa=q.size(1) != k.size(1)).transpose(1, 2)

    return model.model(ids, positions=positions, attend=attend)
