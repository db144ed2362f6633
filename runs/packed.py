"""Training tokens/s on packed rows: attention within documents beside masked SDPA and whole causal rows, in turn.

    python runs/packed.py [ROUNDS]

6 layers, 384 wide, 6 heads, 4,096 pieces, bf16, 4 rows of 1,024 tokens; documents of exponentially distributed length,
mean 128. Masked SDPA is what the trunk did before: a (T, T) mask for each row, given to torch's fused kernel. A step is
forward and backward; the best of five counts.
"""
import functools
import os
import sys
import time

import numpy as np
import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import common
import kernels
import model as models

B, T, MEAN = 4, 1024, 128


def seconds(step, n=5):
    step()
    times = []
    for _ in range(n):
        begin = time.perf_counter()
        step()
        times.append(time.perf_counter() - begin)
    return min(times)


def main(rounds=3):
    common.keep_freed_memory()
    torch.manual_seed(0)
    model = models.GPT(models.Config(4096, n_layer=6, n_head=6, n_embd=384, context=T))
    model.model.dtype = torch.bfloat16
    generator, ends = np.random.default_rng(0), [0]
    while ends[-1] < B * T:
        row_end = (ends[-1] // T + 1) * T
        ends.append(min(row_end, ends[-1] + max(8, int(generator.exponential(MEAN)))))
    cu_seqlens = torch.tensor(ends, dtype=torch.int32)
    ids, targets = torch.randint(4096, (2, B, T))

    def step(offsets=cu_seqlens):
        model(ids, targets, offsets).mean().backward()
        model.zero_grad()

    for i in range(int(rounds)):
        ours = seconds(step)
        models.attention = functools.partial(kernels.attention, impl="sdpa")
        masked = seconds(step)
        models.attention = kernels.attention
        dense = seconds(lambda: step(None))
        rates = [f"{B * T / took:,.0f}" for took in (ours, masked, dense)]
        print(f"round {i}: {len(ends) - 1} documents, {rates[0]} tokens/s; masked SDPA {rates[1]}, "
              f"{masked / ours:.2f}x; rows without documents {rates[2]}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
