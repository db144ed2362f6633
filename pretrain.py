"""Pretraining: a Transformer learns to predict the next token of text, from nothing or from a model directory.

    python data.py --sources=stdlib --out_dir=data/text
    python pretrain.py --data=data/text --max_steps=1000            one process
    torchrun --nproc_per_node=2 pretrain.py --data=data/text        the same steps on two
    python pretrain.py --data=data/text --objective=mlm --out_dir=out/mlm       hidden tokens from both sides (BERT)

Shapes: B rows of one forward pass, T tokens of context. A step is one optimizer update.
"""
import math
import os

import torch

import common
import engine
import masking
import mixing
import optim
from configurator import configure
from kernels import pad_offsets
from model import GPT, Config, fetch
from texts import fixed_rows
from tokenizer import Tokenizer

# --- run ---
out_dir = "out/pretrain"    # model directory to write, with its log and resume state
init_from = ""              # model directory to start from, or hub:ORG/NAME; empty: random weights
resume = False              # go on with the run in out_dir, exactly where its newest saved state stands
overwrite = False           # replace a run that out_dir already holds
seed = 1337                 # weights and the order of the data
device = "auto"             # auto, cuda, mps or cpu
dtype = "auto"              # activations and products: auto (bf16 where the hardware is fast at it), bf16, fp32
compile = "auto"            # torch.compile: auto (on cuda with a C compiler), true, false
# --- objective ---
objective = "clm"           # clm: the next token, for all later stages; mlm: hidden tokens from both sides (masking.py)
mask_share = 0.15           # mlm: share of the tokens that are hidden; more learns from more, with less to go by
# --- data ---
data = "data/text"          # folder written by data.py; several are mixed: data/web=0.7,data/code=0.3
mix_temperature = 1.0       # folders without weights get shares ~ tokens^(1/this): 1 proportional, higher flatter
max_source_epochs = 0.0     # cap on the passes over each source of a mixture; the others take its share; 0: none
data_stages = ""            # mixtures for later: "0.8:data/web=0.4,data/math=0.6" from 80 % of max_steps on; ; between
context = 256               # tokens in a row, T
rows_per_step = 16          # global batch in rows = micro_rows * accumulation * ranks
micro_rows = 0              # rows of one forward pass on one rank, B; lower it if memory runs out; 0: all at once
mask_documents = False      # True: documents packed in a row do not see each other
# --- model (init_from brings its own) ---
n_layer = 6                 # blocks
n_head = 6                  # query heads; each is n_embd / n_head wide
n_kv_head = 0               # key and value heads, shared by groups of query heads; 0: as many as n_head
n_embd = 384                # width C of the residual stream
n_hidden = 0                # width of the SwiGLU; 0: 8/3 n_embd
qk_norm = True              # normalise queries and keys: Qwen3's layout; false: Llama's
tied = False                # share the embedding with the head: fewer parameters, a worse loss at these sizes
rope_theta = 10000.0        # base of the rotary frequencies; higher for long context
checkpointing = False       # recompute activations in backward: less memory, a third more time
# --- optimizer ---
optimizer = "muon"          # muon (for the matrices of the blocks, AdamW for the rest) or adamw
lr = 0.004                  # peak rate of AdamW: head and norms, and the matrices without Muon
matrix_lr = 0.02            # peak rate of Muon
embed_lr = 0.05             # peak rate of the embedding; 0: lr
weight_decay = 0.0          # on matrices only
beta1 = 0.9                 # AdamW's decay of the mean gradient
beta2 = 0.95                # AdamW's decay of the mean squared gradient
momentum = 0.9              # Muon's
muon_steps = 5              # of Muon's iteration: 5, or 4, which is cheaper and enough below width 256
grad_clip = 1.0             # largest gradient norm; 0: no clipping
# --- schedule ---
max_steps = 1000            # optimizer updates; the decay ends here
max_seconds = 0.0           # end decay and training after this many seconds, if that comes first; evaluation follows
schedule = "wsd"            # wsd (warmup, stable, linear decay), cosine or constant
warmup_steps = 20           # linear warmup
decay_fraction = 0.6        # share of the run that wsd's decay takes
final_lr = 0.0              # last learning rate as a share of the peak
# --- evaluation and log ---
eval_every = 250            # steps between evaluations; each one saves, as the end of the run does
eval_tokens = 200_000       # held-out tokens to evaluate on, of each source, always the same; 0: all
sample_tokens = 64          # tokens of the sample printed at each evaluation; 0: none
spike_factor = 10.0         # skip an update whose gradient norm is this many times the running median
spike_patience = 10         # stop after this many skipped updates in a row
curves = True               # draw curves.png at the end
report_to = ""              # wandb or tensorboard, if installed


@torch.no_grad()
def evaluate(model, rows, token_bytes, run):
    """(nats per token, bits per byte) over held-out rows, exactly: every target once, summed over ranks.

    Bits per byte count the text alone: predictions of special tokens, which have no bytes, are left out of it.
    """
    total = 0.0                                             # nats, tokens, nats of text, bytes
    for ids_BT, targets_BT, cu_seqlens in rows:
        nll_BT = common.exact(model.forward(*run.move(ids_BT, targets_BT, cu_seqlens)))     # compiled or not
        bytes_BT = token_bytes[targets_BT.clamp_min(0)] * (targets_BT != -100)
        n_targets, bytes_BT = (targets_BT != -100).sum(), bytes_BT.to(nll_BT.device)
        total += torch.stack([nll_BT.sum(), n_targets.to(nll_BT.device), (nll_BT * (bytes_BT > 0)).sum(),
                              bytes_BT.sum()])
    nats, tokens, text_nats, n_bytes = run.total(total).tolist()
    return nats / tokens, text_nats / math.log(2) / max(1, n_bytes)


def main(config):
    least = dict(max_steps=1, eval_every=1, context=1, rows_per_step=1, micro_rows=0, eval_tokens=0, sample_tokens=0,
                 seed=0, lr=0, matrix_lr=0, embed_lr=0, weight_decay=0, grad_clip=0, max_seconds=0, spike_factor=1,
                 beta1=0, beta2=0, momentum=0, warmup_steps=0, decay_fraction=0, final_lr=0, rope_theta=1,
                 spike_patience=1, mix_temperature=0, max_source_epochs=0)
    common.check(config, least, objective=("clm", "mlm"))
    mlm, second = objective == "mlm", "val_accuracy" if objective == "mlm" else "val_bpb"
    if not 0 < mask_share < 1:
        raise SystemExit(f"pretrain.py: mask_share must lie between 0 and 1, got {mask_share}")
    optim.lr_scale(0, 0.0, schedule, warmup_steps)          # refuses an unknown schedule now
    run = common.start(config)                              # ranks, device, seeds, out_dir
    micro = micro_rows or max(1, rows_per_step // run.world_size)
    accumulation, rest = divmod(rows_per_step, micro * run.world_size)
    if rest or not accumulation:
        raise SystemExit(f"pretrain.py: rows_per_step={rows_per_step} is not a multiple of micro_rows * ranks = "
                         f"{micro} * {run.world_size}")
    compiled = run.compiles(compile)

    # data
    folders = mixing.open_folders(data, data_stages)        # says now what would be wrong at the first evaluation
    tokenizer = Tokenizer.load(folders[0])
    batches = mixture = mixing.text_batches(config, micro, run.rank, run.world_size, tokenizer)
    token_bytes = torch.from_numpy(tokenizer.token_bytes)
    wrote = tokenizer                                       # the data's; the model's may have <|mask|> besides
    if mlm:
        tokenizer = tokenizer.with_mask()
        batches = masking.MaskedBatches(batches, tokenizer, mask_share, seed, accumulation, run.total)
    held = f"{batches.n_tokens:,} tokens of tokenizer {tokenizer.fingerprint}"
    if run.state and run.state["extra"]["data"] != held:
        raise SystemExit(f"pretrain.py: --resume=true, but {data} held {run.state['extra']['data']} and now holds "
                         f"{held}; restore it, or begin a new run")

    # model
    if init_from:
        folder = fetch(init_from)
        model, its = GPT.load(folder, masked=mlm), tokenizer
        if os.path.exists(os.path.join(folder, "tokenizer.json")):
            its = Tokenizer.load(folder).with_mask() if mlm else Tokenizer.load(folder)
        if mlm and its.fingerprint == tokenizer.fingerprint and model.config.vocab_size < tokenizer.vocab_size:
            raise SystemExit(f"pretrain.py: {init_from} has vocab_size {model.config.vocab_size}, all of it taken by "
                             "its tokenizer, and no row left for <|mask|>; train with --objective=mlm from nothing")
        if its.fingerprint != tokenizer.fingerprint or model.config.vocab_size < tokenizer.vocab_size:
            raise SystemExit(f"pretrain.py: {init_from} has vocab_size {model.config.vocab_size} and tokenizer "
                             f"{its.fingerprint}, but {data} was encoded with {tokenizer.vocab_size} tokens of "
                             f"{tokenizer.fingerprint}; prepare it with --tokenizer={folder}")
        model.config.context = max(context, model.config.context)
    else:
        model = GPT(Config(-(-tokenizer.vocab_size // 128) * 128, n_layer, n_head, n_kv_head, n_embd, n_hidden=n_hidden,
                           context=context, rope_theta=rope_theta, qk_norm=qk_norm, tied=tied,
                           eos_id=tokenizer.eot_id, pad_id=tokenizer.pad_id, causal=not mlm))
    model.model.checkpointing = checkpointing
    model = run.parallel(model)
    if compiled:
        model.compile(dynamic=False)

    def padded(batch):
        """The batch with as many offsets as any other: a compiled model has a graph for each number."""
        *batch, cu_seqlens = batch
        if compiled and cu_seqlens is not None:
            cu_seqlens = pad_offsets(cu_seqlens, micro * batches.most_documents + 1)
        return *batch, cu_seqlens

    # optimizer, and where the resumed run stopped
    updates = optim.build(model, optimizer, lr, matrix_lr, embed_lr, weight_decay, (beta1, beta2), momentum,
                          muon_steps, run.dtype, compiled)
    run.resume(model, updates)
    run.extra["data"] = held
    guard = optim.SpikeGuard(spike_factor, spike_patience, **run.extra.get("guard", {}))
    tokens_per_step = rows_per_step * context
    run.print(f"{model.config.n_params() / 1e6:.2f}M parameters, {batches.n_tokens:,} training tokens, "
              f"{batches.steps_per_epoch:,.0f} steps of {tokens_per_step:,} tokens an epoch, " +
              (f"{max_seconds:g} seconds" if max_seconds else f"{max_steps} steps in all"), *mixture.plan())

    for step in range(run.first_step, max_steps + 1):
        done = max(step / max_steps, run.elapsed() / max_seconds if max_seconds else 0)
        stopping = run.stop_requested()

        # evaluate and save
        if done >= 1 or step and step % eval_every == 0 and step > run.first_step:
            eval_rows = max(2 * micro, 8192 // context)     # no gradients: more rows fit
            held_out = [fixed_rows(folder, "val", context, eval_rows, eval_tokens, run.rank, run.world_size,
                                   mask_documents, wrote) for folder in folders]
            scores = [masking.evaluate(model, batches.held_out(rows), run) if mlm else
                      evaluate(model, rows, token_bytes, run) for rows in held_out]
            val_loss, score = mixture.average(scores, second)
            if run.extra.get("evaluated") != step:          # a finished run that is resumed says it once
                run.log(step, done, val_loss=val_loss, **{second: score}, **mixture.metrics(step, scores, second))
            best = val_loss < run.extra.get("best_val_loss", math.inf)
            run.extra.update(guard=guard.state(), evaluated=step)
            if best:
                run.extra["best_val_loss"] = val_loss
            run.save(model, updates, step, tokenizer, best)
            if sample_tokens and run.is_main and not mlm:
                [sample] = engine.generate(model, [[tokenizer.eot_id]], max_new_tokens=sample_tokens, temperature=0.8,
                                           seed=seed, overflow="slide")
                run.print("  sample: " + tokenizer.decode(sample.tokens).replace("\n", "\n  | "))
        elif stopping:
            run.extra.update(guard=guard.state())
            run.save(model, updates, step, tokenizer)
        if done >= 1 or stopping:
            break

        # learning rate
        begin = run.mark()
        scale = optim.lr_scale(step, done, schedule, warmup_steps, decay_fraction, final_lr)
        for group in updates.param_groups:
            group["lr"] = group["peak_lr"] * scale

        # gradients: one denominator for the whole step, all micro-batches and ranks
        targets_in_step = batches.targets_in_step(step)
        loss_sum, hits = 0.0, 0
        for i in range(accumulation):
            run.meet(model, now=i == accumulation - 1)
            nll_BT = model(*run.move(*padded(batches(step, i))), want_hits=mlm)
            if mlm:
                nll_BT, hits_BT = nll_BT
                hits += hits_BT.sum()
            (nll_BT.sum() * (run.world_size / targets_in_step)).backward()
            loss_sum += nll_BT.detach().sum()

        # update
        loss = run.total(loss_sum) / targets_in_step
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
        updates.step(guard.accepts(loss, grad_norm))
        updates.zero_grad()

        # log the whole step
        tokens_per_second = run.rate(begin) * tokens_per_step
        right = {"accuracy": run.total(hits) / targets_in_step} if mlm else {}
        mfu = tokens_per_second * (model.config.flops_per_token(context) / run.matmul_flops / run.world_size)
        run.log(step, done, loss=loss, grad_norm=grad_norm, learning_rate=lr * scale, epoch=batches.epoch(step + 1),
                num_tokens=(step + 1) * tokens_per_step, tokens_per_second=tokens_per_second, mfu=mfu,
                skipped_updates=guard.skipped, **right)

    run.finish()
    run.print(*mixture.report(step))
    if done < 1:
        run.print(f"stopped before step {step}; go on with the same options and --resume=true")
    elif mlm:
        run.print(f"{out_dir}: {val_loss:.4f} nats per hidden token, {score:.1%} of them right on held-out text after "
                  f"{run.clock():.1f} s; go on with it by --objective=mlm --init_from={out_dir}")
    else:
        run.print(f"{out_dir}: {val_loss:.4f} nats per token, {score:.4f} bits per byte on held-out text after "
                  f"{run.clock():.1f} s; talk to it: python chat.py --model={out_dir}; score it: python eval.py "
                  f"--model={out_dir} --tasks=bpb --text={','.join(folders)}")


if __name__ == "__main__":
    main(configure(globals()))
