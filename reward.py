"""Reward modelling: from pairs of answers a model learns to score, so that the preferred one scores higher.

The Transformer's head is one number, read at an answer's last token, and the loss that of Bradley and Terry (Ouyang et
al. 2022, arXiv:2203.02155, eq. 1): minus the log-probability that the chosen answer wins.

    python data.py --kind=pairs --from_model=out/sft --task=sorting,addition --out_dir=data/pairs
    python reward.py --data=data/pairs --init_from=out/sft
    python reward.py --data=data/pairs --init_from=out/sft --method=lora --lr=5e-3 --out_dir=out/reward_lora

Shapes: P pairs, packed in one row with each prompt once. A step is one optimizer update.
"""
import math

import numpy as np
import torch
import torch.nn.functional as F

import common
import judge
import lora
import optim
from configurator import configure
from model import ScalarHead, fetch
from pairs import PairBatches, Pairs, fixed_pairs
from results import mean_stderr
from tokenizer import Tokenizer

# --- run ---
out_dir = "out/reward"      # model directory to write, with its log and resume state
init_from = "out/sft"       # model directory to start from, a policy's or a reward model's, or hub:ORG/NAME
resume = False              # go on with the run in out_dir, exactly where its newest saved state stands
overwrite = False           # replace a run that out_dir already holds
seed = 1337                 # order of the data, score layer and adapters
device = "auto"             # auto, cuda, mps or cpu
dtype = "auto"              # activations and products: auto (bf16 where the hardware is fast at it), bf16, fp32
# --- data ---
data = "data/pairs"         # folder written by data.py --kind=pairs
context = 0                 # tokens of a prompt with one answer; longer prompts are cut on the left; 0: the model's
pairs_per_step = 32         # global batch in pairs = micro_pairs * accumulation * ranks
micro_pairs = 0             # pairs of one forward pass on one rank, P; lower it if memory runs out; 0: all at once
# --- method ---
margin_weight = 0.0         # the chosen answer must lead by this times the pair's own margin (Llama 2); 0: only lead
centering = 0.01            # weight of (s_w + s_l)^2, which holds scores near zero; 0: none
method = "full"             # full, or lora (adapters beside frozen weights; the score layer is trained whole)
lora_rank = 8               # rank of the adapters; higher learns more and costs more
lora_alpha = 16.0           # their scale is alpha / rank
lora_targets = "all"        # layers with adapters: all of the blocks, or names such as q_proj,v_proj
rslora = False              # scale by alpha / sqrt(rank): for high ranks
lora_dropout = 0.0          # share of an adapter's inputs dropped
checkpointing = False       # recompute activations in backward: less memory, a third more time
# --- optimizer ---
optimizer = "adamw"         # adamw, or muon for the matrices of the blocks (full alone)
lr = 5e-4                   # peak rate of AdamW; large models want 1e-6 to 1e-5, adapters ten times that
matrix_lr = 0.005           # peak rate of Muon
embed_lr = 0.0              # peak rate of the embedding; 0: lr
weight_decay = 0.0          # on matrices only
beta1 = 0.9                 # AdamW's decay of the mean gradient
beta2 = 0.95                # AdamW's decay of the mean squared gradient
momentum = 0.9              # Muon's
grad_clip = 1.0             # largest gradient norm; 0: no clipping
# --- schedule ---
epochs = 1.0                # passes over the pairs, if max_steps is 0; a second one soon learns them by heart
max_steps = 0               # optimizer updates; the decay ends here; 0: as many as the epochs have
max_seconds = 0.0           # end decay and training after this many seconds, if that comes first; evaluation follows
schedule = "cosine"         # cosine, wsd (warmup, stable, linear decay) or constant
warmup_steps = 10           # linear warmup
final_lr = 0.1              # last learning rate as a share of the peak
# --- evaluation and log ---
eval_every = 100            # steps between evaluations; each one saves, as the end of the run does
eval_pairs = 500            # held-out pairs to evaluate on, always the same; 0: all
samples = 1                 # held-out pairs printed with their scores at each evaluation; 0: none
spike_factor = 100.0        # skip an update whose gradient norm is this many times the median; hard pairs have 10
spike_patience = 10         # stop after this many skipped updates in a row
curves = True               # draw curves.png and calibration.png at the end
report_to = ""              # wandb or tensorboard, if installed


def bradley_terry(chosen_P, rejected_P, margin_P, centering=0.0):
    """The (P,) losses of pairs whose answers score chosen_P and rejected_P.

        -log sigmoid(s_w - s_l - m) + c (s_w + s_l)^2

    Ouyang et al. 2022 (arXiv:2203.02155), eq. 1; the margin m of Touvron et al. 2023 (arXiv:2307.09288), eq. 2; the
    centring term of Eisenstein et al. 2023 (arXiv:2312.09244), section 2, on the sum: the loss alone leaves a constant
    free that every score may have. ValueError on unequal shapes, which would otherwise broadcast into a wrong loss.
    """
    shapes = [tuple(x.shape) for x in (chosen_P, rejected_P, margin_P)]
    if len(set(shapes)) > 1 or len(shapes[0]) != 1:
        raise ValueError(f"bradley_terry needs three tensors of one shape (P,), got {shapes}")
    return -F.logsigmoid(chosen_P - rejected_P - margin_P) + centering * (chosen_P + rejected_P) ** 2


def pair_scores(model, packed):
    """(chosen_P, rejected_P): the scores at the last tokens of a packed row's answers, found by their lengths."""
    score_A = model(packed.ids, **packed.layout)[0, packed.last]
    return score_A[0::2], score_A[1::2]


def score(model_dir, conversations, device="auto"):
    """(n,) rewards of conversations that end with the assistant's turn, from a reward model's directory."""
    return judge.load_reward(model_dir, common.pick_device(device))(conversations)


@torch.no_grad()
def evaluate(model, pairs, micro, max_pairs, run):
    """(P, 2) float64 scores of the chosen and the rejected answers of the first held-out pairs, on every rank."""
    score_P2 = torch.zeros(min(max_pairs or len(pairs), len(pairs)), 2, dtype=torch.float64)
    for indices in fixed_pairs(pairs, micro, max_pairs, run.rank, run.world_size):
        if indices:
            scores = pair_scores(model, pairs.packed(indices, run.device))
            score_P2[indices] = torch.stack(scores, -1).cpu().double()
    return run.total(score_P2)


def reward_metrics(score_P2):
    """trl's metrics of the (P, 2) scores of pairs, chosen and rejected. Of equal scores none is right."""
    margin_P = score_P2[:, 0] - score_P2[:, 1]
    return dict(accuracy=(margin_P > 0).double().mean(), margin=margin_P.mean(), min_reward=score_P2.min(),
                mean_reward=score_P2.mean(), max_reward=score_P2.max())


def by_source(values_P, pairs):
    """{source: (mean, standard error, pairs)} of values of the first pairs, of all of them under "". Pairs with the
    same prompt go together."""
    values_P, sources = np.asarray(values_P, float), np.array(pairs.sources[:len(values_P)])
    prompts = np.array([hash(tuple(prompt)) for prompt in pairs.prompts[:len(values_P)]])
    chosen = {name: sources == name for name in sorted(set(pairs.sources[:len(values_P)]))}
    chosen[""] = np.full(len(values_P), True)
    return {name: (*mean_stderr(values_P[of], groups=prompts[of]), int(of.sum())) for name, of in chosen.items()}


def longer_wins(pairs, max_pairs):
    """(P,): 1 where the chosen answer of a held-out pair has more tokens, 1/2 where both have equally many. Its mean is
    the accuracy of looking at the length alone."""
    longer_P = np.sign([len(w) - len(l) for w, l in zip(pairs.chosen, pairs.rejected)][:max_pairs or None])
    return (longer_P + 1) / 2


def reliability(margin_P, bins=10):
    """([(pairs, mean predicted, share right)] of equal bins of the predicted probability, expected calibration error).

    The model calls the answer with the larger score the better one, with probability sigmoid(|s_w - s_l|), from 0.5 to
    1. The error is the mean over pairs of |share right - mean predicted| of their bin (Guo et al. 2017,
    arXiv:1706.04599, eq. 5).
    """
    margin_P = np.asarray(margin_P, float)
    predicted_P = 1 / (1 + np.exp(-np.abs(margin_P)))
    right_P = np.where(margin_P == 0, 0.5, margin_P > 0)
    bin_P = np.minimum((predicted_P - 0.5) * 2 * bins, bins - 1).astype(int)
    found = [(int(of.sum()), float(predicted_P[of].mean()), float(right_P[of].mean()))
             for of in (bin_P == b for b in range(bins)) if of.any()]
    return found, sum(n * abs(right - predicted) for n, predicted, right in found) / len(margin_P)


def draw_calibration(found, error, path):
    """A picture of `reliability`: the share right over the predicted probability, each bin's area its pairs."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axis = plt.subplots(figsize=(4.5, 4.5))
    counts, predicted, right = zip(*found)
    axis.plot([0.5, 1], [0.5, 1], "k--", linewidth=1, label="calibrated")
    axis.scatter(predicted, right, s=[20 + 400 * n / sum(counts) for n in counts], alpha=0.7)
    axis.plot(predicted, right, linewidth=1, label=f"held-out pairs, error {error:.3f}")
    axis.set(xlabel="predicted: sigmoid(|margin|)", ylabel="observed: share right", xlim=(0.48, 1.02),
             ylim=(-0.03, 1.03))
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.tight_layout()
    common.write_atomic(path, lambda f: figure.savefig(f, format="png", dpi=110))
    plt.close(figure)


def print_samples(tokenizer, pairs, score_P2, count, run):
    """Prints the first held-out pairs with their scores, bias and all."""
    for i, (chosen, rejected) in enumerate(score_P2[:count].tolist()):
        text = (tokenizer.decode(pairs.prompts[i]) + f"\n[{chosen:+.2f} chosen] {tokenizer.decode(pairs.chosen[i])}"
                f"\n[{rejected:+.2f} rejected] {tokenizer.decode(pairs.rejected[i])}")
        run.print("  sample: " + text.replace("\n", "\n  | "))


def print_tables(right, longer, found, error, run):
    """Prints the accuracy of each source beside that of length alone, and the reliability table."""
    width = max(map(len, (*right, "source")))
    run.print(f"{'source'.ljust(width)}   pairs  ranked rightly  longer answer wins")
    for name, (mean, stderr, n) in right.items():
        run.print(f"{(name or 'all').ljust(width)}  {n:6,}  {mean:6.1%} ± {stderr:5.1%}  {longer[name][0]:6.1%} "
                  f"± {longer[name][1]:5.1%}")
    run.print(f"calibration error {error:.3f}: pairs, predicted, share right")
    run.print(*(f"  {n:6,}   {predicted:.3f}   {share:.3f}" for n, predicted, share in found))


def main(config):
    least = dict(epochs=0, max_steps=0, eval_every=1, context=0, pairs_per_step=1, micro_pairs=0, eval_pairs=0,
                 samples=0, seed=0, lr=0, matrix_lr=0, embed_lr=0, weight_decay=0, grad_clip=0, max_seconds=0,
                 spike_factor=1, beta1=0, beta2=0, momentum=0, warmup_steps=0, final_lr=0, spike_patience=1,
                 margin_weight=0, centering=0)
    common.check(config, least, method=("full", "lora"))
    optim.lr_scale(0, 0.0, schedule, warmup_steps)          # refuses an unknown schedule now
    folder = fetch(init_from)
    run = common.start(config)                              # ranks, device, seeds, out_dir
    micro = micro_pairs or max(1, pairs_per_step // run.world_size)
    accumulation, rest = divmod(pairs_per_step, micro * run.world_size)
    if rest or not accumulation:
        raise SystemExit(f"reward.py: pairs_per_step={pairs_per_step} is not a multiple of micro_pairs * ranks = "
                         f"{micro} * {run.world_size}")

    # model
    tokenizer, model = Tokenizer.load(folder), ScalarHead.begin(folder)
    if tokenizer.chat_end_id is None:
        raise SystemExit(f"reward.py: the tokenizer in {init_from} has no <|im_start|> and <|im_end|> to write chats "
                         "with; begin from a model whose tokenizer has them")
    T = context or model.config.context
    if T > model.config.context:
        raise SystemExit(f"reward.py: --context={context} is longer than the {model.config.context} tokens that "
                         f"{init_from} was trained on; lower it, or pretrain with a longer context first")
    if model.config.pad_id in (None, tokenizer.chat_end_id):
        model.config.pad_id = tokenizer.eot_id              # transformers scores the last token that is not padding
    if method == "lora":
        lora.add(model, lora_rank, lora_alpha, lora_targets, rslora, lora_dropout)
        model.score.requires_grad_(True)
    model.model.checkpointing = checkpointing
    model = run.parallel(model)

    # data
    batches = PairBatches(data, "train", pairs_per_step, micro, T, seed, run.rank, run.world_size, tokenizer)
    held_out = Pairs(data, "val", tokenizer, T)
    if margin_weight and not batches.pairs.margins.any():
        raise SystemExit(f"reward.py: --margin_weight={margin_weight}, but no pair in {data} has a margin; "
                         "leave it out")
    longer_P = longer_wins(held_out, eval_pairs)
    longer = by_source(longer_P, held_out)
    held = f"{batches.n_pairs:,} pairs, {batches.pairs.fingerprint}, tokenizer {tokenizer.fingerprint}"
    if run.state and run.state["extra"]["data"] != held:
        raise SystemExit(f"reward.py: --resume=true, but {data} held {run.state['extra']['data']} and now holds {held};"
                         " restore it, or begin a new run")
    last_step = max_steps or math.ceil(epochs * batches.steps_per_epoch)

    # optimizer, and where the resumed run stopped
    updates = optim.build(model, optimizer, lr, matrix_lr, embed_lr, weight_decay, (beta1, beta2), momentum, 5,
                          run.dtype)
    run.resume(model, updates)
    run.extra["data"], model.bias = held, run.extra.get("bias", model.bias)
    guard = optim.SpikeGuard(spike_factor, spike_patience, **run.extra.get("guard", {}))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    dropped = "".join(f", {count:,} {reason} dropped" for reason, count in batches.pairs.dropped.items())
    dropped += "".join(f", {count:,} with {what} cut" for what, count in batches.pairs.cut.items())
    run.print(f"{trained / 1e6:.2f}M of {sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters trained, "
              f"{held}{dropped}, {last_step} steps in all; the longer answer is the chosen one in {longer_P.mean():.1%}"
              f" of {len(longer_P):,} held-out pairs")

    for step in range(run.first_step, last_step + 1):
        done = max(step / last_step, run.elapsed() / max_seconds if max_seconds else 0)
        stopping = run.stop_requested()

        # evaluate and save
        if done >= 1 or step % eval_every == 0 and (step > run.first_step or step == 0):
            score_P2 = evaluate(model, held_out, micro, eval_pairs, run)
            margin_P = score_P2[:, 0] - score_P2[:, 1]
            required_P = margin_weight * held_out.margins[:len(score_P2)].double()
            right, (found, error) = by_source(margin_P > 0, held_out), reliability(margin_P)
            metrics = dict(eval_loss=bradley_terry(*score_P2.T, required_P, centering).mean().item())
            metrics |= {f"eval_{name}": value.item() for name, value in reward_metrics(score_P2).items()}
            metrics |= dict(eval_std_reward=score_P2.std().item(), eval_calibration_error=error)
            for name, (mean, stderr, _) in right.items():
                of = f"/{name}" * bool(name)
                metrics |= {f"eval_accuracy{of}": mean} | ({} if math.isnan(stderr) else
                                                           {f"eval_accuracy_stderr{of}": stderr})
                metrics |= {} if step else {f"eval_longer_wins{of}": longer[name][0]}
            model.bias = run.extra["bias"] = -score_P2[:, 0].mean().item()      # reference answers have mean zero
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
                print_samples(tokenizer, held_out, score_P2 + model.bias, samples, run)
        elif stopping:
            run.extra.update(guard=guard.state())
            run.save(model, updates, step, tokenizer)
        if done >= 1 or stopping:
            break

        # learning rate
        begin = run.clock()
        scale = optim.lr_scale(step, done, schedule, warmup_steps, final=final_lr)
        for group in updates.param_groups:
            group["lr"] = group["peak_lr"] * scale

        # gradients: one denominator for the whole step, all micro-batches and ranks
        loss_sum, n_tokens, scores = 0.0, 0, []
        for i in range(accumulation):
            run.meet(model, now=i == accumulation - 1)
            indices = batches(step, i)
            packed = batches.pairs.packed(indices, run.device)
            [required_P] = run.move(margin_weight * batches.pairs.margins[indices])
            chosen_P, rejected_P = pair_scores(model, packed)
            loss = bradley_terry(chosen_P, rejected_P, required_P, centering).sum()
            (loss * (run.world_size / pairs_per_step)).backward()
            loss_sum, n_tokens = loss_sum + loss.detach(), n_tokens + packed.ids.numel()
            scores.append(torch.stack((chosen_P, rejected_P), -1).detach())

        # update
        loss = run.total(loss_sum) / pairs_per_step
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
        updates.step(guard.accepts(loss, grad_norm))
        updates.zero_grad()

        # log the whole step
        of_ranks = torch.zeros(run.world_size, pairs_per_step // run.world_size, 2)
        of_ranks[run.rank] = torch.cat(scores).cpu()
        tokens_in_step = int(run.total(n_tokens))
        run.extra["num_tokens"] = run.extra.get("num_tokens", 0) + tokens_in_step
        run.log(step, done, loss=loss, **reward_metrics(run.total(of_ranks).flatten(0, 1)), grad_norm=grad_norm,
                learning_rate=lr * scale, epoch=batches.epoch(step + 1), num_tokens=run.extra["num_tokens"],
                tokens_per_second=tokens_in_step / (run.clock() - begin),
                pairs_per_second=pairs_per_step / (run.clock() - begin), skipped_updates=guard.skipped)

    if done >= 1:
        print_tables(right, longer, found, error, run)
        if curves and run.is_main:
            draw_calibration(found, error, run.path("calibration.png"))
    run.finish()
    if done < 1:
        run.print(f"stopped before step {step}; go on with the same options and --resume=true")
    else:
        run.print(f"{out_dir}: ranks {metrics['eval_accuracy']:.1%} of held-out pairs rightly after {run.clock():.1f} "
                  f"s; let it judge: python eval.py --model=A --against=B --tasks=judge=PROMPTS --judge={out_dir}")


if __name__ == "__main__":
    main(configure(globals()))
