"""The other objective of pretraining: hidden tokens guessed from both sides (BERT, Devlin et al., arXiv:1810.04805).

Of the tokens of a row a share is chosen; of these 80 % become <|mask|>, 10 % a random token and 10 % stay as they are.
Only the chosen ones have targets. Special tokens are never chosen.

Shapes: B rows, T tokens.
"""
import zlib

import numpy as np
import torch

from common import exact

KEPT, RANDOM = 0.1, 0.1     # shares of the chosen tokens that stay, and that become another; the others are <|mask|>


def mask_rows(ids_BT, targets_BT, mask_id, text_ids, share, key):
    """(ids, targets), both (B, T): what the model sees, and the chosen tokens' own ids, -100 elsewhere.

    Chosen are round(share * n), at least one, of a row's n tokens of text that stand where targets_BT is not -100:
    batches put -100 where a row repeats another's tokens. text_ids: the ids that are no specials, in order. key: a
    tuple of numbers of at least 0. A row's choice is a function of key and its ids alone, not of the rows beside it,
    so that it does not depend on micro-batches or ranks.
    """
    ids_BT, seen_BT = ids_BT.numpy(), ids_BT.numpy().copy()
    guessed_BT = np.full_like(ids_BT, -100)
    text_BT = np.isin(ids_BT, text_ids) & (targets_BT.numpy() != -100)
    for ids_T, seen_T, guessed_T, text_T in zip(ids_BT, seen_BT, guessed_BT, text_BT):
        places = np.flatnonzero(text_T)
        if not len(places):
            continue
        rng = np.random.default_rng((*key, zlib.crc32(ids_T.tobytes())))
        chosen = rng.permutation(places)[:max(1, round(share * len(places)))]
        fate = rng.random(len(chosen))
        others = rng.choice(text_ids, len(chosen))
        guessed_T[chosen] = ids_T[chosen]
        seen_T[chosen] = np.where(fate < KEPT, ids_T[chosen], np.where(fate < KEPT + RANDOM, others, mask_id))
    return torch.from_numpy(seen_BT), torch.from_numpy(guessed_BT)


class MaskedBatches:
    """The rows of `batches` with tokens hidden, anew in every step; what else it has is that of `batches`.

    total: sums a number over the ranks. accumulation: micro-batches of a step on one rank."""

    def __init__(self, batches, tokenizer, share, seed, accumulation, total):
        self.batches, self.seed, self.accumulation, self.total = batches, seed, accumulation, total
        self.rule = tokenizer.specials["<|mask|>"], np.flatnonzero(tokenizer.token_bytes), share
        self.latest = None, []

    def __getattr__(self, name):
        return getattr(self.batches, name)

    def micros(self, step):
        """All micro-batches of a step on this rank."""
        if self.latest[0] != step:
            self.latest = step, [self.masked(self.batches(step, i), step + 1) for i in range(self.accumulation)]
        return self.latest[1]

    def masked(self, batch, number):
        ids_BT, targets_BT, cu_seqlens = batch
        return *mask_rows(ids_BT, targets_BT, *self.rule, (self.seed, number)), cu_seqlens

    def __call__(self, step, micro):
        return self.micros(step)[micro]

    def targets_in_step(self, step):
        """Hidden tokens of the whole step, over all micro-batches and ranks: its one denominator."""
        return max(1, int(self.total(sum(int((targets != -100).sum()) for _, targets, _ in self.micros(step)))))

    def held_out(self, rows):
        """Held-out rows, of fixed_rows, with the same tokens hidden at every evaluation."""
        return (self.masked(batch, 0) for batch in rows)


@torch.no_grad()
def evaluate(model, rows, run):
    """(nats per hidden token, share of them that are guessed right) over rows, summed over ranks."""
    total = torch.zeros(3, dtype=torch.float64)
    for ids_BT, targets_BT, cu_seqlens in rows:
        columns = model.forward(*run.move(ids_BT, targets_BT, cu_seqlens), want_hits=True)     # compiled or not
        nll_BT, hits_BT = map(exact, columns)
        total += torch.stack([nll_BT.sum().cpu(), hits_BT.sum().cpu(), (targets_BT != -100).sum()])
    nats, hits, tokens = run.total(total).tolist()
    return nats / max(1, tokens), hits / max(1, tokens)
