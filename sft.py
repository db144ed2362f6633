"""Supervised finetuning: a base model learns to answer in conversations, from what assistants wrote in them.

The loss is the mean negative log-likelihood of the assistants' tokens and the <|im_end|> that ends each of their turns
(Ouyang et al. 2022, arXiv:2203.02155, section 3.5); all else is read and not trained.

    python data.py --kind=chats --sources=task:addition,task:sorting --tokenizer=out/pretrain --out_dir=data/chats
    python sft.py --data=data/chats --init_from=out/pretrain
    python sft.py --data=data/chats --method=lora --lr=1e-3 --out_dir=out/lora

Shapes: B rows of one forward pass, T tokens of a row, packed with whole chats. A step is one optimizer update.
"""
import math

import torch

import common
import lora
import optim
from chats import ChatBatches, Chats, fixed_chats
from configurator import configure
from kernels import pad_offsets
from model import GPT, fetch
from rollouts import greedy_accuracy, greedy_tasks, print_samples
from tokenizer import Tokenizer

# --- run ---
out_dir = "out/sft"         # model directory to write, with its log and resume state
init_from = "out/pretrain"  # model directory to start from, or hub:ORG/NAME
resume = False              # go on with the run in out_dir, exactly where its newest saved state stands
overwrite = False           # replace a run that out_dir already holds
seed = 1337                 # order and packing of the data, adapters, noise and samples
device = "auto"             # auto, cuda, mps or cpu
dtype = "auto"              # activations and products: auto (bf16 where the hardware is fast at it), bf16, fp32
compile = "auto"            # torch.compile, of packed rows: auto (on cuda with a C compiler), true, false
# --- data ---
data = "data/chats"         # folder written by data.py --kind=chats
context = 0                 # tokens in a row, T; longer than the longest chat; 0: the model's
rows_per_step = 8           # global batch in rows = micro_rows * accumulation * ranks
micro_rows = 0              # rows of one forward pass on one rank, B; lower it if memory runs out; 0: all at once
packing = True              # several whole chats a row, blind to each other; False: one a row, padded
source_weights = ""         # weight of a source's tokens in the loss, as in "alpaca.jsonl=0.5"; others have 1
# --- method ---
method = "full"             # full, lora (adapters beside frozen weights) or head (the output matrix alone)
lora_rank = 8               # rank of the adapters; higher learns more and costs more
lora_alpha = 16.0           # their scale is alpha / rank
lora_targets = "all"        # layers with adapters: all of the blocks, or names such as q_proj,v_proj,lm_head
rslora = False              # scale by alpha / sqrt(rank): for high ranks
lora_dropout = 0.0          # share of an adapter's inputs dropped
neftune = 0.0               # noise on embeddings, alpha of arXiv:2310.05914 (5 is usual); 0: none
checkpointing = False       # recompute activations in backward: less memory, a third more time
# --- optimizer ---
optimizer = "adamw"         # adamw, or muon for the matrices of the blocks (full alone)
lr = 5e-4                   # peak rate of AdamW; large models want 1e-5 to 5e-5, adapters ten times that
matrix_lr = 0.01            # peak rate of Muon
embed_lr = 0.0              # peak rate of the embedding; 0: lr
weight_decay = 0.0          # on matrices only
beta1 = 0.9                 # AdamW's decay of the mean gradient
beta2 = 0.95                # AdamW's decay of the mean squared gradient
momentum = 0.9              # Muon's
grad_clip = 1.0             # largest gradient norm; 0: no clipping
# --- schedule ---
epochs = 2.0                # passes over the chats, if max_steps is 0
max_steps = 0               # optimizer updates; the decay ends here; 0: as many as the epochs have
max_seconds = 0.0           # end decay and training after this many seconds, if that comes first; evaluation follows
schedule = "cosine"         # cosine, wsd (warmup, stable, linear decay) or constant
warmup_steps = 10           # linear warmup
final_lr = 0.1              # last learning rate as a share of the peak
# --- evaluation and log ---
eval_every = 100            # steps between evaluations; each one saves, as the end of the run does
eval_examples = 500         # held-out chats to evaluate on, always the same; 0: all
eval_tasks = ""             # tasks of tasks.py to answer greedily at each evaluation, as in "addition,sorting"
eval_questions = 100        # questions of each, from its dev split
token_stats = 10            # steps between measures of entropy and accuracy in training; 0: at evaluations alone
samples = 2                 # conversations of the held-out side answered and printed at each evaluation; 0: none
spike_factor = 10.0         # skip an update whose gradient norm is this many times the running median
spike_patience = 10         # stop after this many skipped updates in a row
curves = True               # draw curves.png at the end
report_to = ""              # wandb or tensorboard, if installed


def weighted_nll(nll_BT, weights_BT):
    """The sum of the targets' negative log-likelihoods in nats, each times its weight (None: 1)."""
    return (nll_BT if weights_BT is None else nll_BT * weights_BT).sum()


def add_noise(model, alpha):
    """From now on training adds uniform noise of size alpha / sqrt(T C) to the embeddings (NEFTune, Jain et al. 2023,
    arXiv:2310.05914, algorithm 1); without gradients nothing is added."""
    def hook(module, inputs, x):
        size = alpha / math.sqrt(x.size(-2) * x.size(-1))
        return x + torch.zeros_like(x).uniform_(-size, size) if torch.is_grad_enabled() else x
    model.model.embed_tokens.register_forward_hook(hook)


def token_sums(nll_BT, entropy_BT, hits_BT, targets_BT):
    """(4,) float64 sums over the targets, each counted once whatever its weight: negative log-likelihoods and entropies
    in nats, how many are the likeliest token, and how many there are."""
    return torch.stack([common.exact(x.detach()).sum() for x in (nll_BT, entropy_BT, hits_BT, targets_BT != -100)])


@torch.no_grad()
def evaluate(model, rows, run):
    """Loss and entropy in nats per trained token, and the share of trained tokens that are the likeliest, over held-out
    chats, exactly: every target once, summed over ranks."""
    total = 0.0
    for ids_BT, targets_BT, _, cu_seqlens in rows:
        ids_BT, targets_BT, cu_seqlens = run.move(ids_BT, targets_BT, cu_seqlens)
        columns = model.forward(ids_BT, targets_BT, cu_seqlens, want_entropy=True, want_hits=True)  # compiled or not
        total += token_sums(*columns, targets_BT)
    *sums, targets = run.total(total).tolist()
    names = "eval_loss", "eval_entropy", "eval_mean_token_accuracy"
    return {name: value / max(1, targets) for name, value in zip(names, sums)}


def openings(chats, count):
    """The ids of the first chats, each up to its first answer."""
    return [chats.tokens[start:start + chats.mask[start:end].argmax()].tolist()
            for start, end in zip(chats.offsets[:count], chats.offsets[1:])]


def main(config):
    least = dict(epochs=0, max_steps=0, eval_every=1, context=0, rows_per_step=1, micro_rows=0, eval_examples=0,
                 eval_questions=1, samples=0, seed=0, lr=0, matrix_lr=0, embed_lr=0, weight_decay=0, grad_clip=0,
                 max_seconds=0, spike_factor=1, beta1=0, beta2=0, momentum=0, warmup_steps=0, final_lr=0, neftune=0,
                 spike_patience=1, token_stats=0, lora_rank=1, lora_alpha=0, lora_dropout=0)
    common.check(config, least, method=("full", "lora", "head"))
    asked = greedy_tasks(eval_tasks)
    optim.lr_scale(0, 0.0, schedule, warmup_steps)          # refuses an unknown schedule now
    folder = fetch(init_from)
    run = common.start(config)                              # ranks, device, seeds, out_dir
    micro = micro_rows or max(1, rows_per_step // run.world_size)
    accumulation, rest = divmod(rows_per_step, micro * run.world_size)
    if rest or not accumulation:
        raise SystemExit(f"sft.py: rows_per_step={rows_per_step} is not a multiple of micro_rows * ranks = "
                         f"{micro} * {run.world_size}")

    # model
    tokenizer, model = Tokenizer.load(folder), GPT.load(folder)
    if tokenizer.chat_end_id is None:
        raise SystemExit(f"sft.py: the tokenizer in {init_from} has no <|im_start|> and <|im_end|> to write chats "
                         "with; begin from a model whose tokenizer has them")
    if model.config.vocab_size < tokenizer.vocab_size:
        raise SystemExit(f"sft.py: the tokenizer in {init_from} has {tokenizer.vocab_size} ids and its model "
                         f"{model.config.vocab_size}; begin from a model whose embedding has a row for every id")
    T = context or model.config.context
    if T > model.config.context:
        raise SystemExit(f"sft.py: --context={context} is longer than the {model.config.context} tokens that "
                         f"{init_from} was trained on; lower it, or pretrain with a longer context first")
    if tokenizer.chat_end_id not in model.config.stop_ids:
        model.config.end_ids += (tokenizer.chat_end_id,)    # chat.py and eval.py know a chat model by it
    if method == "lora":
        lora.add(model, lora_rank, lora_alpha, lora_targets, rslora, lora_dropout)
    elif method == "head":
        model.requires_grad_(False)
        model.lm_head.requires_grad_(True)
    if neftune:
        add_noise(model, neftune)
    model.model.checkpointing = checkpointing
    model = run.parallel(model)
    compiled = run.compiles(compile) and packing            # rows of one chat each have another length in every batch
    if compiled:
        model.compile(dynamic=False)

    def padded(batch):
        """The batch with as many offsets as any other: a compiled model has a graph for each number."""
        *batch, cu_seqlens = batch
        return *batch, pad_offsets(cu_seqlens, micro * batches.most_documents + 1) if compiled else cu_seqlens

    # data
    batches = ChatBatches(data, "train", rows_per_step, micro, T, seed, run.rank, run.world_size, tokenizer, packing,
                          source_weights)
    held_out = Chats(data, "val", tokenizer)                # says now what would be wrong at the first evaluation
    held_out.check_fit(T)
    held = f"{batches.n_tokens:,} tokens of {batches.n_examples:,} chats, tokenizer {tokenizer.fingerprint}"
    if run.state and run.state["extra"]["data"] != held:
        raise SystemExit(f"sft.py: --resume=true, but {data} held {run.state['extra']['data']} and now holds {held}; "
                         "restore it, or begin a new run")
    last_step = max_steps or math.ceil(epochs * batches.steps_per_epoch)

    # optimizer, and where the resumed run stopped
    updates = optim.build(model, optimizer, lr, matrix_lr, embed_lr, weight_decay, (beta1, beta2), momentum, 5,
                          run.dtype, compiled)
    run.resume(model, updates)
    run.extra["data"] = held
    guard = optim.SpikeGuard(spike_factor, spike_patience, **run.extra.get("guard", {}))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    run.print(f"{trained / 1e6:.2f}M of {model.config.n_params() / 1e6:.2f}M parameters trained, {held}; "
              f"{batches.efficiency:.1%} of what is processed is real, {last_step} steps in all")

    for step in range(run.first_step, last_step + 1):
        done = max(step / last_step, run.elapsed() / max_seconds if max_seconds else 0)
        stopping = run.stop_requested()

        # evaluate and save
        if done >= 1 or step % eval_every == 0 and (step > run.first_step or step == 0):
            rows = fixed_chats(data, "val", T, micro, eval_examples, run.rank, run.world_size, tokenizer)
            metrics = evaluate(model, rows, run)
            for task in asked if run.is_main else ():
                right, formatted = greedy_accuracy(model, tokenizer, task, eval_questions)
                metrics |= {f"eval_accuracy/{task}": right, f"eval_format/{task}": formatted}
            if run.extra.get("evaluated") != step:          # a finished run that is resumed says it once
                run.log(step, done, **metrics)
            best = metrics["eval_loss"] < run.extra.get("best_eval_loss", math.inf)
            run.extra.update(guard=guard.state(), evaluated=step)
            if best:
                run.extra["best_eval_loss"] = metrics["eval_loss"]
            run.save(model, updates, step, tokenizer, best)
            if run.is_main:
                if method == "lora":
                    lora.save(model, run.path("adapter"), base=init_from)
                print_samples(model, tokenizer, openings(held_out, samples), run)
        elif stopping:
            run.extra.update(guard=guard.state())
            run.save(model, updates, step, tokenizer)
        if done >= 1 or stopping:
            break

        # learning rate
        begin = run.mark()
        scale = optim.lr_scale(step, done, schedule, warmup_steps, final=final_lr)
        for group in updates.param_groups:
            group["lr"] = group["peak_lr"] * scale

        # gradients: one denominator for the whole step, all micro-batches and ranks
        denominator = batches.targets_in_step(step) or 1
        measured = token_stats > 0 and step % token_stats == 0
        loss_sum = sums = 0.0
        for i in range(accumulation):
            run.meet(model, now=i == accumulation - 1)
            ids_BT, targets_BT, weights_BT, cu_seqlens = run.move(*padded(batches(step, i)))
            nll_BT = model(ids_BT, targets_BT, cu_seqlens, want_entropy=measured, want_hits=measured)
            if measured:
                nll_BT, entropy_BT, hits_BT = nll_BT
                sums += token_sums(nll_BT, entropy_BT, hits_BT, targets_BT)
            nll = weighted_nll(nll_BT, weights_BT)
            (nll * (run.world_size / denominator)).backward()
            loss_sum += nll.detach()

        # update
        loss = run.total(loss_sum) / denominator
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
        updates.step(guard.accepts(loss, grad_norm))
        updates.zero_grad()

        # log the whole step
        n_tokens = batches.targets_in_step(step, weighted=False)
        run.extra["num_tokens"] = run.extra.get("num_tokens", 0) + n_tokens
        metrics = dict(loss=loss, grad_norm=grad_norm, learning_rate=lr * scale, epoch=batches.epoch(step + 1),
                       num_tokens=run.extra["num_tokens"], tokens_per_second=run.rate(begin) * n_tokens,
                       skipped_updates=guard.skipped)
        if measured:
            _, entropy, hits, n = run.total(sums)
            metrics.update(entropy=entropy / n.clamp_min(1), mean_token_accuracy=hits / n.clamp_min(1))
        run.log(step, done, **metrics)

    run.finish()
    if done < 1:
        run.print(f"stopped before step {step}; go on with the same options and --resume=true")
    else:
        run.print(f"{out_dir}: {metrics['eval_loss']:.4f} nats per trained token on held-out chats after "
                  f"{run.clock():.1f} s; talk to it: python chat.py --model={out_dir}")


if __name__ == "__main__":
    main(configure(globals()))
