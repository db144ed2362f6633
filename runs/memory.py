"""Peak memory of one forward and backward pass at vocabulary 50,304, with linear_logprob and with whole logits.

Each in a process of its own: the highest resident size during the step, less that before it.
"""
import os
import resource
import subprocess
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
B, T, V = 8, 1024, 50304


def step(whole_logits):
    import torch

    import common
    from model import GPT, Config
    common.keep_freed_memory()
    torch.manual_seed(0)
    model = GPT(Config(V, n_layer=2, n_head=4, n_embd=256, context=T))
    ids = torch.randint(V, (B, T + 1))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if whole_logits:
        logits = model.logits(model.forward_hidden(ids[:, :-1]))
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
    else:
        model(ids[:, :-1], ids[:, 1:]).mean().backward()
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2 ** 10)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        step(sys.argv[1] == "whole")
    else:
        print(f"the logits alone, {B} x {T} x {V} in fp32: {B * T * V * 4 / 2 ** 20:,.0f} MiB")
        for kind in "chunks", "whole":
            peak = float(subprocess.check_output([sys.executable, __file__, kind]).split()[-1])
            print(f"a step of 2 layers, 256 wide, with the logits in {kind}: {peak:,.0f} MiB more than before it")
