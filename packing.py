"""Prompts and their answers in one flat row, each prompt computed once however many answers it has.

    packed = pack([(prompt_ids, [answer_ids, ...]), ...])
    logp_AL = -packed.by_answer(model(packed.ids, packed.targets, **packed.layout))

A group lies in the row as its prompt and, after it, its answers, each at the positions right after the prompt and blind
to the other answers and groups. The prompt's last token, which predicts the first of every answer, stands before each
of them, so that a position has one target.

Letters: A answers of all groups in their order, L tokens of the longest answer, N tokens of the row.
"""
import dataclasses

import numpy as np
import torch

from plain_attention import Documents, document_attention


@dataclasses.dataclass
class Packed:
    """What pack returns. `layout` is what a forward pass of GPT or ScalarHead takes beside ids (and targets)."""
    ids: torch.Tensor           # (1, N)
    targets: torch.Tensor       # (1, N): answers' tokens, each at the position before it; -100 elsewhere
    positions: torch.Tensor     # (1, N)
    documents: Documents        # each answer with its prompt
    places: torch.Tensor        # (A, L): the positions in the row that predict each answer's tokens; 0 beyond its end
    mask: torch.Tensor          # (A, L) bool: which of them there are
    last: torch.Tensor          # (A,): the positions of the answers' last tokens
    lengths: torch.Tensor       # (A,): tokens of each answer

    @property
    def layout(self):
        return dict(positions=self.positions, attend=self.attend)

    def attend(self, layer, q, k, v):
        return document_attention(q, k, v, self.documents)

    def by_answer(self, values):
        """(A, L) of values (1, N) at the targets, 0 beyond an answer's end; in row a, column t speaks of token t."""
        return values.flatten()[self.places] * self.mask


def pack(groups, device="cpu"):
    """The Packed row of [(prompt ids, [answer ids, ...])]. ValueError on a prompt or an answer without tokens."""
    ids, targets, positions, documents, predicted, last = [], [], [], [], [], []
    for prompt, answers in groups:
        if not len(prompt) or not answers or not all(map(len, answers)):
            raise ValueError("a prompt and each of its answers needs at least one token, got a prompt of "
                             f"{len(prompt)} and answers of {[len(answer) for answer in answers]}")
        shared = np.arange(len(ids), len(ids) + len(prompt) - 1)        # all but the prompt's last token
        ids += prompt[:-1]
        targets += [-100] * len(shared)
        positions += range(len(shared))
        for answer in answers:
            own = np.arange(len(ids), len(ids) + len(answer) + 1)
            ids += [prompt[-1], *answer]
            targets += [*answer, -100]
            positions += range(len(shared), len(shared) + len(own))
            documents.append(np.concatenate([shared, own]))
            predicted.append(own[:-1])
            last.append(own[-1])
    lengths = torch.tensor([len(own) for own in predicted])
    places = np.stack([np.pad(own, (0, int(lengths.max()) - len(own))) for own in predicted])
    tensors = [torch.tensor([x], device=device) for x in (ids, targets, positions)]
    mask = torch.arange(places.shape[1]) < lengths[:, None]
    return Packed(*tensors, Documents(documents, len(ids), device), torch.from_numpy(places).to(device),
                  mask.to(device), torch.tensor(np.array(last), device=device), lengths.to(device))
