"""What a preference loss compares the policy with: the log-probabilities of the model as it was before training.

    ref = Reference(model, run, copied=True)                what the model is now, before adapters are added to it
    ref_A = ref(packed)                                     computed: by the copy, or by the model without its adapters
    ref.store("out/dpo/reference.pt", (train, val), 8)      or all once, on disk; then no copy is needed
    ref_A = ref.of(train, indices, packed)                  looked up if stored, else computed

Letters: P pairs, A answers.
"""
import contextlib
import copy
import hashlib
import os

import torch

import common
import lora
from pairs import fixed_pairs


def answer_logps(model, packed):
    """(A,) log-probabilities of the answers, in nats. A reference has no gradients of its own and is not to be called
    under no_grad beside a policy that is not: other kernels round otherwise, and the loss would not begin at ln 2."""
    return -packed.by_answer(model.forward(packed.ids, packed.targets, **packed.layout)).sum(1)  # past DDP's hooks


def frozen_copy(model):
    """The model as it is now: a copy that shares nothing with it and has no gradients."""
    return copy.deepcopy(model).requires_grad_(False)


def weights_fingerprint(model):
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


class Reference:
    """reference(packed): (A,) log-probabilities of the answers in nats, by a frozen copy of `model` as it is now if
    `copied`, else by the model itself with its adapters off. `name` tells weights and dtypes apart."""

    def __init__(self, model, run, copied):
        self.name, self.copied, self.tables, self.run = f"{weights_fingerprint(model)} in {run.dtype}", copied, {}, run
        self.model = frozen_copy(model).to(run.device) if copied else model
        if copied:
            self.model.model.dtype = run.dtype

    def __call__(self, packed):
        with contextlib.nullcontext() if self.copied else lora.disabled(self.model):
            return answer_logps(self.model, packed)

    def of(self, pairs, indices, packed):
        """The same of these pairs, whose Packed row is `packed`; looked up once they are stored."""
        return self.tables[pairs][indices].flatten() if self.tables else self(packed)

    def store(self, path, splits, micro, anew=False):
        """From now on `of` looks up: what `path` holds, or, if there is none or `anew`, what is computed and written
        there. ValueError if what is stored is of another model or other data."""
        wanted, run = dict(weights=self.name, data=[pairs.fingerprint for pairs in splits]), self.run
        if run.is_main and anew and os.path.exists(path):
            os.remove(path)
        run.barrier()
        if os.path.exists(path):
            tables = read(path, wanted)
        else:
            run.print("computing the reference's log-probabilities of all pairs once")
            tables = [self.table(pairs, micro) for pairs in splits]
            if run.is_main:
                common.write_atomic(path, lambda f: torch.save(dict(**wanted, logps=tables), f))
            run.barrier()
        self.tables = {pairs: logps.to(run.device) for pairs, logps in zip(splits, tables)}
        self.model = None                                   # a copy has done its work

    def table(self, pairs, micro):
        """(P, 2) log-probabilities of the chosen and the rejected answers, on every rank."""
        logps = torch.zeros(len(pairs), 2, dtype=torch.float64)
        for indices in filter(None, fixed_pairs(pairs, micro, 0, self.run.rank, self.run.world_size)):
            logps[indices] = self(pairs.packed(indices, self.run.device)).view(-1, 2).cpu().double()
        return self.run.total(logps).float()


def read(path, wanted):
    """The tables stored at path; ValueError if it is damaged, or of other weights or data than `wanted`."""
    try:
        found = torch.load(path, weights_only=True)
        same = {name: found[name] == wanted[name] for name in wanted}
        tables = found["logps"]
    except Exception as error:
        raise ValueError(f"the stored reference {path} is damaged ({type(error).__name__}); remove it") from None
    for name in (name for name in wanted if not same[name]):
        raise ValueError(f"the stored reference {path} is of other {name}: {found[name]}, and this run has "
                         f"{wanted[name]}; remove it, or choose another --reference_dir")
    return tables
