"""Reinforcement learning from groups of answers: what a group's better answers did is made likelier, its worse less.

GRPO (Shao et al. 2024, arXiv:2402.03300) and its relatives; no critic: an answer is measured against the others to the
same question. Questions, verifiers and rewards: rollouts.py.

    python grpo.py --init_from=out/sft --tasks=sorting=0.5,addition=0.5
    python grpo.py --init_from=out/sft --tasks=gsm8k --path=data/gsm8k --rewards=verifier=1,format=0.1 --form=dr_grpo

Shapes: P questions of a step, G answers to each, A = P G answers question by question, L tokens of the longest answer.
A step is one rollout and the iterations * minibatches optimizer updates that it is used for.
"""
import contextlib
import math

import torch

import common
import lora
import optim
import rollouts
from configurator import configure
from model import GPT, fetch
from reference import weights_fingerprint
from rollouts import Questions, Rewards
from tokenizer import Tokenizer

# --- run ---
out_dir = "out/grpo"        # model directory to write, with its log and resume state
init_from = "out/sft"       # model directory to start from, or hub:ORG/NAME; the frozen reference, if any, is a copy
resume = False              # go on with the run in out_dir, exactly where its newest saved state stands
overwrite = False           # replace a run that out_dir already holds
seed = 1337                 # questions, samples and adapters
device = "auto"             # auto, cuda, mps or cpu
dtype = "auto"              # activations and products: auto (bf16 where the hardware is fast at it), bf16, fp32
# --- questions and rewards ---
tasks = "sorting=0.5,addition=0.5"  # tasks of tasks.py and .jsonl files of prompts, with their shares of the questions
path = ""                   # folder of published tasks (gsm8k, svamp), or one that holds a folder of each
n_questions = 0             # questions of a generated task, asked again each epoch; 0: new ones without end
by_difficulty = False       # prefer what is answered right sometimes, neither never nor always; wants a finite set
too_long = "error"          # a prompt that leaves no room for its answer: error, or drop
rewards = "verifier=1"      # verifier, format, reward_model:FOLDER, FILE.py:FUNCTION, each =WEIGHT
questions_per_step = 16     # P, of all ranks
group_size = 8              # G, answers to each question; more cost more and rank finer
refill = 0                  # rounds of new questions in place of groups without signal (DAPO's dynamic sampling)
# --- answers ---
max_new_tokens = 0          # longest answer in tokens; 0: as long as the longest of the tasks
temperature = 1.0           # of sampling, and of every log-probability; higher explores more
truncated = "keep"          # an answer cut off at max_new_tokens: keep, mask (not trained on) or punish
truncated_penalty = 1.0     # taken off its reward, for punish
overlong = 0                # answers are punished from this many tokens before max_new_tokens on; 0: never
rollout_batch = 64          # answers sampled at once on a rank; lower it if memory runs out, raise it on a GPU
# --- method ---
form = "dapo"               # loss: grpo, dr_grpo, dapo, bnpo, cispo, gspo or rloo (docs/grpo.md)
scale = "group"             # divide advantages by the std of rewards in the group, in the batch, or by none
leave_one_out = False       # baseline: the mean of the group's other answers, not of all of them
clip_low = 0.2              # the ratio counts from 1 - clip_low ...
clip_high = 0.2             # ... to 1 + clip_high; 0.28 keeps more entropy (DAPO); gspo wants 3e-4 and 4e-4
cispo_cap = 5.0             # largest weight of a token in cispo
iterations = 1              # passes over each rollout
minibatches = 1             # updates of each pass; whole groups stay together
beta = 0.0                  # pull towards the reference; 0: none is loaded
kl = "k3"                   # its estimator: k1, k2 or k3
kl_in = "loss"              # where it acts: in the loss of each token, or in the reward of each answer
kl_correction = True        # multiply it by the ratio in the loss, which makes its gradient right
correction = "none"         # for a sampler that differs from the trainer: none, token or sequence weights
correction_cap = 3.0        # largest such weight
method = "full"             # full or lora (adapters beside frozen weights; the reference is without them)
lora_rank = 8               # rank of the adapters; higher learns more and costs more
lora_alpha = 16.0           # their scale is alpha / rank
lora_targets = "all"        # layers with adapters: all of the blocks, or names such as q_proj,v_proj,lm_head
micro_questions = 0         # groups of one forward pass on one rank; lower it if memory runs out; 0: all at once
checkpointing = False       # recompute activations in backward: less memory, a third more time
# --- optimizer and schedule ---
lr = 1e-4                   # peak rate of AdamW; large models want 1e-6, adapters ten times that
weight_decay = 0.0          # on matrices only
beta1 = 0.9                 # AdamW's decay of the mean gradient
beta2 = 0.95                # AdamW's decay of the mean squared gradient
grad_clip = 1.0             # largest gradient norm; 0: no clipping
max_steps = 100             # rollouts; the decay ends here
max_seconds = 0.0           # end decay and training after this many seconds, if that comes first; evaluation follows
schedule = "constant"       # constant, cosine or wsd (warmup, stable, linear decay)
warmup_steps = 5            # linear warmup
final_lr = 0.1              # last learning rate as a share of the peak
# --- evaluation and log ---
eval_every = 20             # steps between evaluations; each one saves, as the end of the run does
eval_questions = 100        # dev questions of each task, always the same
pass_k = 8                  # sampled answers to each for pass@k; 0: greedy alone
samples = 2                 # answers of each task printed with their rewards at each evaluation; 0: none
collapse = 0.1              # say so once when the entropy falls below this share of the first step's; 0: never
stuck_steps = 10            # say so after this many steps in a row without any signal
spike_factor = 100.0        # skip an update whose gradient norm is this many times the running median
spike_patience = 10         # stop after this many skipped updates in a row
curves = True               # draw curves.png at the end
report_to = ""              # wandb or tensorboard, if installed

FORMS = ("grpo", "dr_grpo", "dapo", "bnpo", "cispo", "gspo", "rloo")


def advantages(reward_PG, scale="group", leave_one_out=False):
    """(P, G): by how much each answer is better than its group, exactly 0 where all rewards are equal.

        A_i = (r_i - mean(r)) / (std(r) + 1e-4)         GRPO, section 4.1.2; std with Bessel's correction
        A_i = r_i - mean of the others                  leave_one_out: RLOO (Ahmadian et al. 2024, arXiv:2402.14740)

    scale "group": std of the group; "batch": of all P G rewards (with leave_one_out: of all advantages); "none": 1
    (Dr. GRPO: Liu et al. 2025, arXiv:2503.20783). ValueError for a group of 1, which has nothing to compare with.
    """
    G = reward_PG.size(1)
    if G < 2:
        raise ValueError(f"an advantage within a group needs at least 2 answers, got group_size={G}")
    advantage_PG = reward_PG - reward_PG.mean(1, keepdim=True)
    if leave_one_out:
        advantage_PG = advantage_PG * G / (G - 1)
    if scale == "group":
        advantage_PG = advantage_PG / (reward_PG.std(1, keepdim=True) + 1e-4)
    elif scale == "batch":
        advantage_PG = advantage_PG / ((advantage_PG if leave_one_out else reward_PG).std() + 1e-4)
    return advantage_PG.masked_fill((reward_PG == reward_PG[:, :1]).all(1, keepdim=True), 0.0)


def ratios(logp_AL, old_AL, mask_AL, form):
    """pi(o_t) / pi_old(o_t), (A, L), or one number an answer, (A, 1): of gspo their geometric mean (GSPO, Zheng et al.
    2025, arXiv:2507.18071, eq. 7), of rloo their product."""
    log_ratio_AL = (logp_AL - old_AL) * mask_AL
    if form == "gspo":
        return (log_ratio_AL.sum(1, keepdim=True) / mask_AL.sum(1, keepdim=True).clamp(min=1)).exp()
    return log_ratio_AL.sum(1, keepdim=True).exp() if form == "rloo" else log_ratio_AL.exp()


def policy_loss(logp_AL, ratio, advantage_A, form, clip_low, clip_high, cispo_cap):
    """Loss of each token, (A, L) or (A, 1).

        -min(ratio A, clip(ratio, 1 - clip_low, 1 + clip_high) A)       GRPO eq. 3; two bounds: DAPO, arXiv:2503.14476
        -min(ratio, cispo_cap) A log pi, the weight without gradient    CISPO (arXiv:2506.13585, eq. 4)
    """
    advantage_A1 = advantage_A[:, None]
    if form == "cispo":
        return -ratio.detach().clamp(max=cispo_cap) * advantage_A1 * logp_AL
    return -torch.min(ratio * advantage_A1, ratio.clamp(1 - clip_low, 1 + clip_high) * advantage_A1)


def kl_estimate(logp_AL, reference_AL, kind):
    """KL(pi, reference) of each token from one sample of pi (Schulman 2020, joschu.net/blog/kl-approx): k1 is unbiased
    and signed, k2 has little bias, k3 is unbiased and never negative."""
    log_ratio_AL = logp_AL - reference_AL
    if kind == "k1":
        return log_ratio_AL
    return log_ratio_AL ** 2 / 2 if kind == "k2" else torch.expm1(-log_ratio_AL) + log_ratio_AL


def token_weights(mask_AL, form, answers, tokens, longest):
    """(A, L): what each token's loss counts in the step's, given the step's answers and tokens over all ranks.

    grpo, gspo, rloo: the mean over answers of the mean over their tokens. dr_grpo: the sum over tokens, by a constant,
    answers * longest. dapo, cispo, bnpo: the mean over tokens; of the whole rollout, or for bnpo of the minibatch.
    """
    if form in ("grpo", "gspo", "rloo"):
        return mask_AL / mask_AL.sum(1, keepdim=True).clamp(min=1) / answers
    return mask_AL / (answers * longest if form == "dr_grpo" else max(1, tokens))


def correction_weights(old_AL, sampler_AL, mask_AL, level, cap):
    """min(pi_old / pi_sampler, cap), (A, L) or (A, 1): truncated importance sampling for a sampler whose numbers differ
    from the trainer's (Yao et al. 2025, fengyao.notion.site/off-policy-rl); None: no correction."""
    log_ratio_AL = (old_AL - sampler_AL) * mask_AL
    if level == "none":
        return None
    return (log_ratio_AL.sum(1, keepdim=True) if level == "sequence" else log_ratio_AL).exp().clamp(max=cap)


def overlong_penalty(lengths_A, longest, room):
    """(A,) from 0 to -1: DAPO's soft punishment (arXiv:2503.14476, eq. 13), which falls over the last `room` tokens."""
    return ((longest - room - lengths_A) / room).clamp(-1, 0)


def split(numbers, size):
    """`numbers` in lists of `size`, the last one shorter; 0: all in one."""
    size = size or max(1, len(numbers))
    return [list(numbers[i:i + size]) for i in range(0, len(numbers), size)]


SUMS = ("tokens", "entropy", "kl", "clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean",
        "cispo_clip_ratio", "sampling/sampling_logp_difference/mean", "sampling/importance_sampling_ratio/mean")
PEAKS = ("clip_ratio/high_max", "sampling/sampling_logp_difference/max", "sampling/importance_sampling_ratio/max",
         "clip_ratio/low_min", "sampling/importance_sampling_ratio/min")


@torch.no_grad()
def watch(mask_AL, ratio, advantage_A, old_AL, sampler_AL, kl_AL, entropy_AL, clip_low, clip_high, cispo_cap):
    """(values of SUMS, of PEAKS) over the tokens of one forward pass, the latter two of PEAKS negated."""
    better_A1, lengths_A = advantage_A[:, None], mask_AL.sum(1).clamp(min=1)
    low_AL = (ratio < 1 - clip_low) & (better_A1 < 0) & mask_AL
    high_AL = (ratio > 1 + clip_high) & (better_A1 > 0) & mask_AL
    gap_AL = (old_AL - sampler_AL) * mask_AL
    sums = (mask_AL, entropy_AL * mask_AL, kl_AL * mask_AL, low_AL, high_AL, low_AL | high_AL,
            (ratio > cispo_cap) & (better_A1 > 0) & mask_AL, gap_AL.abs(), gap_AL.exp() * mask_AL)
    peaks = (high_AL.sum(1) / lengths_A, gap_AL.abs(), gap_AL.exp(), -low_AL.sum(1) / lengths_A, -gap_AL.exp())
    return [float(x.sum()) for x in sums], [float(x.max()) for x in peaks]


def summarise(seen, form, kl):
    """Metrics of all that was watched: means over the tokens, without what this form or run does not have."""
    tokens, *sums = torch.tensor([sums for sums, _ in seen] or [[0.0]], dtype=torch.float64).sum(0).tolist()
    if not tokens:
        return dict(tokens=0)
    peaks = torch.tensor([peaks for _, peaks in seen], dtype=torch.float64).amax(0).tolist()
    found = dict(zip(SUMS, (tokens, *(value / tokens for value in sums))))
    found |= dict(zip(PEAKS, (*peaks[:3], *(0.0 - peak for peak in peaks[3:]))))
    absent = "clip_ratio" if form == "cispo" else "cispo"
    return {name: value for name, value in found.items() if not name.startswith(absent) and (kl or name != "kl")}


def describe(table_PGN, names):
    """Metrics, by trl's names, of the step's answers: table_PGN has for each the columns `names`."""
    reward, *parts, length, finished = table_PGN.flatten(0, 1).unbind(-1)       # a function may be named reward, too
    metrics = dict(reward=reward.mean(), reward_std=reward.std())
    for name, part in zip(names[1:-2], parts):
        metrics |= {f"rewards/{name}/mean": part.mean(), f"rewards/{name}/std": part.std()}
    ended = length[finished > 0]
    for name, lengths in (("length", length), ("terminated_length", ended if len(ended) else torch.zeros(1))):
        metrics |= {f"completions/{kind}_{name}": getattr(lengths, kind)() for kind in ("mean", "min", "max")}
    return metrics | {"completions/clipped_ratio": 1 - finished.mean()}


def advise(run, flat, reward_mean, entropy, collapse, stuck_steps):
    """Says once what a run that no longer learns needs."""
    extra = run.extra
    extra["stuck"] = extra.get("stuck", 0) + 1 if flat else 0
    said = extra.setdefault("said", [])
    if extra["stuck"] >= stuck_steps and "stuck" not in said:
        said.append("stuck")
        run.print(f"for {extra['stuck']} steps all answers to a question earned the same ({reward_mean:.3g} in the "
                  "mean), which teaches nothing: if they are wrong, train longer with sft.py, ask easier questions or "
                  "reward the format too (--rewards=verifier=1,format=0.2); if they are right, ask harder ones; in "
                  "either case try a higher --temperature or a larger --group_size")
    if entropy is not None:
        first = extra.setdefault("first_entropy", entropy)
        if entropy < collapse * first and "collapse" not in said:
            said.append("collapse")
            run.print(f"the entropy collapsed from {first:.3g} to {entropy:.3g} nats a token: answers to a question "
                      "are nearly all the same, and little is left to learn from; begin again from best/ with a lower "
                      "--lr, --clip_high=0.28, a higher --temperature or a pull to the reference (--beta=0.04)")


def main(config):
    least = dict(seed=0, n_questions=0, questions_per_step=1, group_size=2, refill=0, max_new_tokens=0, overlong=0,
                 truncated_penalty=0, rollout_batch=1, clip_low=0, clip_high=0, cispo_cap=0, iterations=1,
                 minibatches=1, beta=0, correction_cap=0, micro_questions=0, lr=0, weight_decay=0, beta1=0, beta2=0,
                 grad_clip=0, max_steps=1, max_seconds=0, warmup_steps=0, final_lr=0, eval_every=1, eval_questions=1,
                 pass_k=0, samples=0, collapse=0, stuck_steps=1, spike_factor=1, spike_patience=1)
    common.check(config, least, form=FORMS, scale=("group", "batch", "none"), kl=("k1", "k2", "k3"),
                 kl_in=("loss", "reward"), correction=("none", "token", "sequence"),
                 truncated=("keep", "mask", "punish"), method=("full", "lora"))
    if not 0 < temperature < math.inf:
        raise SystemExit(f"grpo.py: --temperature must be above 0, for a group's answers to differ, got {temperature}")
    optim.lr_scale(0, 0.0, schedule, warmup_steps)          # refuses an unknown schedule now
    folder = fetch(init_from)
    run = common.start(config)                              # ranks, device, seeds, out_dir
    P, G = questions_per_step, group_size
    own, rest = divmod(P, run.world_size * minibatches)     # groups of a minibatch on this rank
    if rest or not own:
        raise SystemExit(f"grpo.py: questions_per_step={P} is not a multiple of minibatches * ranks = {minibatches} * "
                         f"{run.world_size}")

    # models
    tokenizer, model = Tokenizer.load(folder), GPT.load(folder)
    if tokenizer.chat_end_id is None:
        raise SystemExit(f"grpo.py: the tokenizer in {init_from} has no <|im_start|> and <|im_end|> to ask questions "
                         "with; begin from a model that sft.py wrote")
    if tokenizer.chat_end_id not in model.config.stop_ids:
        model.config.end_ids += (tokenizer.chat_end_id,)    # chat.py and eval.py know a chat model by it
        run.print(f"{init_from} was not trained to chat: its answers seldom end, and few get a reward; begin from a "
                  "model that sft.py wrote")
    began = weights_fingerprint(model)
    if run.state and run.state["extra"].get("began", began) != began:
        raise SystemExit(f"grpo.py: --resume=true, but {init_from} is not the model that this run began from; restore "
                         "it, or begin a new run")
    if method == "lora":
        lora.add(model, lora_rank, lora_alpha, lora_targets)
    model.model.checkpointing = checkpointing
    model = run.parallel(model)
    reference = None
    if beta and method == "full":
        reference = GPT.load(folder).to(run.device).requires_grad_(False)
        reference.model.dtype = run.dtype

    # questions and rewards
    options = dict(tokenizer=tokenizer, path=path, context=model.config.context, n_questions=n_questions,
                   max_new_tokens=max_new_tokens, too_long=too_long)
    questions = Questions(tasks, "train", seed, by_difficulty=by_difficulty, **options)
    questions(0, P)                                         # says now what would be wrong at the first step
    longest = questions.max_new_tokens
    if overlong > longest:
        raise SystemExit(f"grpo.py: --overlong={overlong} is more than the {longest} tokens of the longest answer")
    dev = Questions(tasks, "dev", seed, **options).fixed(eval_questions)
    reward = Rewards(rewards, tokenizer, run.device, run.dtype)
    reward.check(dev)
    verified = [name for name, asked in dev.items() if asked[0].task]
    if by_difficulty and len(verified) < len(dev):
        raise SystemExit(f"grpo.py: --by_difficulty=true goes by right answers, which nothing verifies in {tasks}")

    # optimizer, and where the resumed run stopped
    updates = optim.build(model, "adamw", lr, 0.0, 0.0, weight_decay, (beta1, beta2), 0.0)
    run.resume(model, updates)
    run.extra["began"] = began
    questions.rates = run.extra.setdefault("rates", {})
    guard = optim.SpikeGuard(spike_factor, spike_patience, **run.extra.get("guard", {}))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    run.print(f"{trained / 1e6:.2f}M of {model.config.n_params() / 1e6:.2f}M parameters trained, {P} questions x {G} "
              f"answers of at most {longest} tokens a step, {max_steps} steps in all; {questions.dropped} prompts too "
              "long and dropped", *filter(None, [reward.note]))

    def forward(policy, part, **options):
        """(A, L) log-probabilities at the sampling temperature; with want_entropy also the entropies."""
        packed = part.packed
        out = policy(packed.ids, packed.targets, temperature=temperature, **packed.layout, **options)
        return (-packed.by_answer(out[0]), packed.by_answer(out[1])) if options else -packed.by_answer(out)

    @torch.no_grad()
    def frozen(part):
        return forward(model, part)

    @torch.no_grad()
    def of_reference(part):
        with lora.disabled(model) if reference is None else contextlib.nullcontext():
            return forward(model if reference is None else reference, part)

    def trains(part):
        """(A,) bool: the answers that are trained on."""
        return part.finished | (truncated != "mask")

    for step in range(run.first_step, max_steps + 1):
        done = max(step / max_steps, run.elapsed() / max_seconds if max_seconds else 0)
        stopping = run.stop_requested()

        # evaluate and save
        if done >= 1 or step % eval_every == 0 and (step > run.first_step or step == 0):
            metrics, answered = rollouts.evaluate(model, tokenizer, dev, reward, run, pass_k, temperature, longest,
                                                  rollout_batch, seed)
            score = metrics["eval_reward"]
            if "verifier" in reward.functions and verified:
                score = sum(metrics[f"eval_accuracy/{name}"] for name in verified) / len(verified)
            if run.extra.get("evaluated") != step:          # a finished run that is resumed says it once
                run.log(step, done, **metrics)
            best = score > run.extra.get("best_score", -math.inf)
            run.extra.update(guard=guard.state(), evaluated=step, rates=questions.rates)
            if best:
                run.extra["best_score"] = score
            run.save(model, updates, step, tokenizer, best)
            if run.is_main:
                if method == "lora":
                    lora.save(model, run.path("adapter"), base=init_from)
                rollouts.print_answers(answered, samples, run)
        elif stopping:
            run.extra.update(guard=guard.state(), rates=questions.rates)
            run.save(model, updates, step, tokenizer)
        if done >= 1 or stopping:
            break

        # learning rate
        begin = run.clock()
        lr_now = lr * optim.lr_scale(step, done, schedule, warmup_steps, final=final_lr)
        for group in updates.param_groups:
            group["lr"] = lr_now

        # roll out and score: whole groups on a rank; groups without signal are asked anew
        generated, failed, groups, first_flat_P = 0, 0, {}, None
        mine, flat_P = range(run.rank * own * minibatches, (run.rank + 1) * own * minibatches), torch.ones(P).bool()
        names = ["reward", *reward.functions, "length", "finished"]
        table_PGN = torch.zeros(P, G, len(names), dtype=torch.float64)
        for attempt in range(1 + refill):
            asked, again = questions(step, P, attempt), flat_P.nonzero().flatten().tolist()
            slots = [p for p in mine if flat_P[p]]
            rollout = rollouts.sample(model, [asked[p] for p in slots], G, tokenizer, longest, temperature,
                                      seed=rollouts.step_seed(seed, step, attempt), max_batch=rollout_batch)
            reward_A, parts = reward(rollout)
            lengths_A, finished_A = rollout.lengths.cpu(), rollout.finished.cpu()
            if overlong:
                reward_A += overlong_penalty(lengths_A, longest, overlong)
            if truncated == "punish":
                reward_A -= truncated_penalty * ~finished_A
            if beta and kl_in == "reward":
                pulls = [kl_estimate(frozen(part), of_reference(part), kl).sum(1).cpu()
                         for part in map(rollout.part, split(range(len(slots)), micro_questions))]
                reward_A -= beta * torch.cat([torch.zeros(0), *pulls])
            columns = [reward_A, *parts.values(), lengths_A, finished_A]
            rows_SGN = torch.stack([x.double() for x in columns], -1).view(len(slots), G, len(names))
            for i, p in enumerate(slots):
                if not attempt or rows_SGN[i, :, 0].min() < rows_SGN[i, :, 0].max():
                    groups[p], table_PGN[p] = rollout.part([i]), rows_SGN[i]
            if by_difficulty:
                right_P = torch.zeros(P, dtype=torch.float64)
                right_P[slots] = rollouts.verdicts(rollout)[:, 0].double().view(-1, G).mean(1) if slots else right_P[:0]
                questions.record([asked[p] for p in again], run.total(right_P)[again].tolist())
            generated, failed = generated + lengths_A.sum().item(), failed + sum(reward.failed.values())
            whole_PGN = run.total(table_PGN)
            flat_P = whole_PGN[..., 0].amin(1) == whole_PGN[..., 0].amax(1)
            first_flat_P = flat_P if first_flat_P is None else first_flat_P
            if not flat_P.any():
                break
        rolled_out = run.clock()

        # advantage; a group that adds nothing to the gradient is not computed, but counts in the denominators
        advantage_PG = advantages(whole_PGN[..., 0].float(), scale, leave_one_out).to(run.device)
        needed_P = ~flat_P | bool(beta and kl_in == "loss")
        batches = []                                        # of each minibatch: its parts, what it has, its tokens
        for m in range(minibatches):
            numbers = [p for p in mine if p % minibatches == m]
            kept = [p for p in numbers if needed_P[p]]
            parts = []
            for chosen in split(kept or numbers[:1], micro_questions):      # every rank takes part in every update
                part, advantage_A = rollouts.joined([groups[p] for p in chosen]), advantage_PG[chosen].flatten()
                parts.append((part, advantage_A,
                              frozen(part) if iterations * minibatches > 1 else None,         # frozen for all updates
                              of_reference(part) if beta else None))
            tokens = sum((groups[p].lengths * trains(groups[p])).sum().item() for p in numbers)
            batches.append((parts, bool(kept), needed_P[m::minibatches].any(), run.total(tokens).item()))
        mean_tokens = sum(tokens for *_, tokens in batches) / minibatches

        # gradients: one denominator for a whole update, all micro-batches and ranks
        losses, grad_norms, seen = [], [], []
        for parts, watched, needed, tokens in batches * iterations:
            if not needed:
                continue
            loss_sum = 0.0
            for i, (part, advantage_A, old_AL, reference_AL) in enumerate(parts):
                run.meet(model, now=i == len(parts) - 1)
                mask_AL = part.packed.mask & trains(part)[:, None]
                logp_AL, entropy_AL = forward(model, part, want_entropy=True)
                old_AL = logp_AL.detach() if old_AL is None else old_AL
                ratio = ratios(logp_AL, old_AL, mask_AL, form)
                loss_AL = policy_loss(logp_AL, ratio, advantage_A, form, clip_low, clip_high, cispo_cap)
                if correction != "none":
                    loss_AL = loss_AL * correction_weights(old_AL, part.sampler_logp, mask_AL, correction,
                                                           correction_cap)
                kl_AL = torch.zeros_like(logp_AL) if reference_AL is None else kl_estimate(logp_AL, reference_AL, kl)
                if beta and kl_in == "loss":
                    loss_AL = loss_AL + beta * (kl_AL * ratio if kl_correction else kl_AL)
                weights_AL = token_weights(mask_AL, form, P * G / minibatches,
                                           tokens if form == "bnpo" else mean_tokens, longest)
                loss = (loss_AL * weights_AL).sum()
                (loss * run.world_size).backward()
                loss_sum += loss.detach()
                if watched:
                    seen.append(watch(mask_AL, ratio, advantage_A, old_AL, part.sampler_logp, kl_AL, entropy_AL,
                                      clip_low, clip_high, cispo_cap))

            # update
            losses.append(run.total(loss_sum).item())
            grad_norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf).item())
            if guard.accepts(losses[-1], grad_norms[-1]):
                updates.step()
            updates.zero_grad()

        # log the whole step
        now, watched = run.clock(), summarise(run.gather(seen), form, beta)
        computed, (generated, failed) = watched.pop("tokens"), run.total(torch.tensor([generated, failed])).tolist()
        run.extra["num_tokens"] = run.extra.get("num_tokens", 0) + int(generated)
        metrics = describe(whole_PGN, names)
        if losses:
            metrics |= dict(loss=sum(losses) / len(losses), grad_norm=sum(grad_norms) / len(grad_norms))
        run.log(step, done, **metrics, **watched, frac_reward_zero_std=first_flat_P.double().mean(),
                learning_rate=lr_now, refilled=(first_flat_P.sum() - flat_P.sum()).item(), failed_rewards=int(failed),
                num_tokens=run.extra["num_tokens"], rollout_seconds=rolled_out - begin, update_seconds=now - rolled_out,
                rollout_tokens_per_second=generated / (rolled_out - begin), step_time=now - begin,
                update_tokens_per_second=computed / (now - rolled_out), skipped_updates=guard.skipped)
        advise(run, flat_P.all().item(), metrics["reward"], watched.get("entropy"), collapse, stuck_steps)

    run.finish()
    if done < 1:
        run.print(f"stopped before step {step}; go on with the same options and --resume=true")
    else:
        figures = ", ".join(f"{name} {value:.3g}" for name, value in metrics.items() if name.startswith("eval_"))
        run.print(f"{out_dir}: {figures} on dev questions after {run.clock():.1f} s; the best ("
                  f"{run.extra['best_score']:.3g}) is in {run.path('best')}; talk to it: python chat.py "
                  f"--model={out_dir}")


if __name__ == "__main__":
    main(configure(globals()))
