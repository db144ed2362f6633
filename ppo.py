"""Proximal policy optimization: a model samples answers, a verifier or a reward model scores them, a critic says which
tokens were better than expected, and clipped updates make those likelier (Schulman et al. 2017, arXiv:1707.06347; with
a KL penalty to where it began, Ziegler et al. 2019, arXiv:1909.08593, and Ouyang et al. 2022, arXiv:2203.02155).

    python ppo.py --init_from=out/sft --tasks=sorting --rewards=verifier
    python ppo.py --init_from=out/sft --tasks=addition --rewards=verifier=1,reward_model:out/reward=0.5 --method=lora

Letters: Q questions of a rollout, A answers (answers_per_question to each, question by question), L tokens of the
longest answer. (A, L) tensors are 0 beyond an answer's end. A step is one optimizer update of actor and critic; a
rollout is made before the first of the epochs * minibatches steps that learn from it.
"""
import contextlib
import math

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

import common
import lora
import optim
import rollouts
from configurator import configure
from model import GPT, ScalarHead, fetch
from packing import pack
from reference import weights_fingerprint
from tokenizer import Tokenizer

# --- run ---
out_dir = "out/ppo"         # model directory to write, with its log and resume state; the critic lies in critic/
init_from = "out/sft"       # model directory to start from, or hub:ORG/NAME; the frozen reference is the same model
critic_from = ""            # reward model or critic to start the critic from; empty: init_from's backbone
resume = False              # go on with the run in out_dir, exactly where its newest saved state stands
overwrite = False           # replace a run that out_dir already holds
seed = 1337                 # questions, samples, order of the minibatches, adapters
device = "auto"             # auto, cuda, mps or cpu
dtype = "auto"              # activations and products: auto (bf16 where the hardware is fast at it), bf16, fp32
# --- rollouts ---
tasks = "sorting"           # tasks of tasks.py and .jsonl files of prompts, with shares, as in sorting=0.7,addition=0.3
path = ""                   # folder of published tasks (gsm8k, svamp), or one that holds a folder of each
too_long = "error"          # a prompt that leaves no room for its answer: error, or drop
rewards = "verifier"        # verifier, format, reward_model:DIR, file.py:function, each by option =WEIGHT, added up
n_questions = 0             # ask the same so many generated questions again and again; 0: new ones without end
questions_per_rollout = 64  # Q
answers_per_question = 1    # sampled to each; more share the question's computation
max_new_tokens = 0          # tokens of an answer at most; 0: what the tasks allow
temperature = 1.0           # of sampling, and of every log-probability; higher explores more
rollout_batch = 64          # answers sampled at once on a rank; lower it if memory runs out, raise it on a GPU
missing_eos_penalty = 0.0   # taken off the score of an answer that did not end by itself; 0: none
# --- method ---
kl_coef = 0.05              # KL penalty per token in the reward, in units of reward a nat; 0: no reference is loaded
kl_estimator = "k1"         # k1 (log-ratio) or k3 (never negative, of less variance)
kl_target = 0.0             # nats an answer: kl_coef then moves to hold the KL there; 0: kl_coef stays
kl_horizon = 10000          # answers over which kl_coef can move by a fifth; fewer: it moves faster
gamma = 1.0                 # discount of later rewards
lam = 0.95                  # GAE: 1 trusts rewards alone, 0 the critic alone
whiten_rewards = False      # bring the token rewards to variance 1, keeping their mean
epochs = 4                  # passes over a rollout
minibatches = 1             # updates of a pass
micro_questions = 0         # questions of one forward pass on one rank; lower it if memory runs out; 0: all at once
clip_range = 0.2            # the ratio of new to old probability gains nothing outside 1 -+ this
value_clip = 0.2            # the same for the critic's distance from its old value; 0: no clipping
stop_kl = 0.0               # leave a rollout once the policy moved this far from it, as 0.02 nats a token; 0: never
method = "full"             # full, or lora: adapters beside the actor's frozen weights, which are then the reference
lora_rank = 8               # rank of the adapters; higher learns more and costs more
lora_alpha = 16.0           # their scale is alpha / rank
lora_targets = "all"        # layers with adapters: all of the blocks, or names such as q_proj,v_proj,lm_head
checkpointing = False       # recompute activations in backward: less memory, a third more time
# --- optimizer ---
lr = 1e-4                   # peak rate of the actor's AdamW; large models want 1e-6, adapters ten times that
critic_lr = 3e-4            # the critic's
weight_decay = 0.0          # on matrices only
beta1 = 0.9                 # AdamW's decay of the mean gradient
beta2 = 0.95                # AdamW's decay of the mean squared gradient
grad_clip = 1.0             # largest gradient norm, of actor and critic each; 0: no clipping
# --- schedule ---
max_steps = 400             # optimizer updates; the decay ends here
max_seconds = 0.0           # end decay and training after this many seconds, if that comes first; evaluation follows
schedule = "constant"       # cosine, wsd (warmup, stable, linear decay) or constant
warmup_steps = 10           # linear warmup
final_lr = 0.1              # last learning rate as a share of the peak
# --- evaluation and log ---
eval_every = 40             # steps between evaluations; each one saves, as the end of the run does
eval_questions = 100        # dev questions of each task
pass_k = 8                  # sampled answers to each for pass@k; 0: greedy alone
samples = 2                 # dev questions answered and printed with their rewards at each evaluation; 0: none
collapse = 0.1              # say so once when the entropy falls below this share of the first rollout's; 0: never
stuck_rollouts = 10         # say so after this many rollouts in a row whose scores were all equal
spike_patience = 10         # stop after this many updates in a row that are not finite
curves = True               # draw curves.png at the end
report_to = ""              # wandb or tensorboard, if installed


def kl_estimate(logp_AL, ref_AL, estimator):
    """Estimates of KL(policy || reference) at tokens the policy sampled, (A, L) nats (joschu.net/blog/kl-approx.html).

        k1 = log pi - log ref        k3 = ref / pi - 1 - log(ref / pi)
    """
    if estimator == "k1":
        return logp_AL - ref_AL
    return (ref_AL - logp_AL).exp() - 1 - (ref_AL - logp_AL)


def token_rewards(scores_A, kl_AL, mask_AL, kl_coef):
    """(A, L): minus kl_coef times the KL of each token, and an answer's score on its last one.

        R(x, y) = r(x, y) - beta log(pi(y | x) / ref(y | x))        eq. 2 of arXiv:1909.08593, token by token
    """
    ends_AL = torch.arange(mask_AL.size(1), device=mask_AL.device) == mask_AL.sum(1, keepdim=True) - 1
    return (scores_A[:, None] * ends_AL - kl_coef * kl_AL) * mask_AL


def adapt_kl_coef(kl_coef, kl, target, n_answers, horizon):
    """The coefficient after n_answers with a mean KL of `kl`: larger if that is above the target (section 2.2 of
    arXiv:1909.08593, where the answers over the horizon are K_beta = 0.1)."""
    return kl_coef * (1 + min(0.2, max(-0.2, kl / target - 1)) * min(1.0, n_answers / horizon))


def gae(rewards_AL, values_AL, mask_AL, gamma, lam):
    """(advantages, returns), (A, L) each (Schulman et al. 2015, arXiv:1506.02438, eq. 16).

        delta_t = r_t + gamma V_{t+1} - V_t        A_t = delta_t + gamma lam A_{t+1}        R_t = A_t + V_t

    V_t is the value before token t is chosen. After an answer's last token V and A are 0: the answer is over.
    """
    rewards_AL, values_AL = rewards_AL * mask_AL, values_AL * mask_AL
    advantage_A = next_value_A = torch.zeros_like(rewards_AL[:, 0])
    advantages = []
    for reward_A, value_A in zip(rewards_AL.unbind(1)[::-1], values_AL.unbind(1)[::-1]):
        advantage_A = reward_A + gamma * next_value_A - value_A + gamma * lam * advantage_A
        next_value_A = value_A
        advantages.append(advantage_A)
    advantages_AL = torch.stack(advantages[::-1], 1)
    return advantages_AL, advantages_AL + values_AL


def whiten(x_AL, mask_AL, shift_mean=True):
    """x with mean 0 (shift_mean False: its own) and variance 1 over the mask, and 0 outside it. Variance with Bessel's
    correction, as trl has it."""
    n = mask_AL.sum()
    mean = (x_AL * mask_AL).sum() / n
    variance = ((x_AL - mean).square() * mask_AL).sum() / (n - 1).clamp(min=1)
    return ((x_AL - mean) * (variance + 1e-8).rsqrt() + (0 if shift_mean else mean)) * mask_AL


def policy_loss(logp_AL, old_AL, advantages_AL, clip_range):
    """(A, L) losses, and where clipping made them larger (eq. 7 of arXiv:1707.06347, its sign turned).

        max(-A rho, -A clip(rho, 1 - eps, 1 + eps)),   rho = pi / pi_old
    """
    ratio_AL = (logp_AL - old_AL).exp()
    plain_AL, clipped_AL = -advantages_AL * ratio_AL, -advantages_AL * ratio_AL.clamp(1 - clip_range, 1 + clip_range)
    return torch.maximum(plain_AL, clipped_AL), clipped_AL > plain_AL


def value_loss(values_AL, old_values_AL, returns_AL, clip_range):
    """(A, L) losses, and where clipping made them larger: half the squared error, of the value or of the value held
    within clip_range (0: no clipping) of that at the rollout, whichever is larger (arXiv:2005.12729, section 3)."""
    plain_AL = (values_AL - returns_AL).square()
    reach = clip_range or math.inf
    near_AL = torch.clamp(values_AL, old_values_AL - reach, old_values_AL + reach)
    clipped_AL = (near_AL - returns_AL).square()
    return torch.maximum(plain_AL, clipped_AL) / 2, clipped_AL > plain_AL


def explained_variance(values_AL, returns_AL, mask_AL):
    """The share of the returns' variance that the values foresaw: 1 is all of it, below 0 worse than a constant."""
    returns, errors = returns_AL[mask_AL], (returns_AL - values_AL)[mask_AL]
    variance = returns.var(correction=0).item()
    return 1 - errors.var(correction=0).item() / variance if variance else 0.0


def minibatch(seed, rollout, update, n_questions, minibatches):
    """Numbers of the questions in a rollout's update: each question once in an epoch, in another order every epoch."""
    epoch, i = divmod(update, minibatches)
    return np.random.default_rng((seed, rollout, epoch)).permutation(n_questions).reshape(minibatches, -1)[i].tolist()


@torch.no_grad()
def observe(drawn, actor, reference, critic):
    """[dict] of each answer in a rollout before any update: logp, ref, entropy and values, (tokens,) each. The value
    of a token is the critic's where it is predicted; ref is logp where there is no reference."""
    packed = drawn.packed
    inputs = dict(ids=packed.ids, targets=packed.targets, temperature=temperature, **packed.layout)
    nll, entropy = actor(**inputs, want_entropy=True)
    ref_nll = nll
    if reference is not None:
        with lora.disabled(actor) if reference is actor else contextlib.nullcontext():
            ref_nll = reference(**inputs)
    seen = dict(logp=-nll, ref=-ref_nll, entropy=entropy, values=critic(packed.ids, **packed.layout))
    columns = {name: packed.by_answer(x).cpu() for name, x in seen.items()}
    return [{name: x_AL[a, :n] for name, x_AL in columns.items()} for a, n in enumerate(packed.lengths.tolist())]


def describe(padded, scores_A, finished_A, returns_AL, mask_AL):
    """A rollout in numbers, by trl's names where it has them."""
    gap = (padded["logp"] - padded["sampler"])[mask_AL].abs()
    return {"objective/scores": scores_A.mean().item(), "objective/scores_std": scores_A.std(correction=0).item(),
            "objective/entropy": padded["entropy"].sum(1).mean().item(),
            "explained_variance": explained_variance(padded["values"], returns_AL, mask_AL),
            "val/num_eos_tokens": int(finished_A.sum()), "completions/mean_length": mask_AL.sum().item() / len(mask_AL),
            "completions/clipped_ratio": 1 - finished_A.double().mean().item(),
            "sampling/sampling_logp_difference/mean": gap.mean().item(),
            "sampling/sampling_logp_difference/max": gap.max().item()}


def say(now, measured, scores_A, run):
    """Says what a reader of the log should not overlook: a collapsed policy, once; scores that teach nothing."""
    entropy = measured["objective/entropy"] / measured["completions/mean_length"]
    now["entropy"] = now["entropy"] or entropy
    if not now["collapsed"] and entropy < collapse * now["entropy"]:
        now["collapsed"] = True
        run.print(f"the policy's entropy fell to {entropy:.3g} nats a token from {now['entropy']:.3g}: it explores no "
                  "more; a lower lr, a larger kl_coef or fewer epochs keep it open")
    now["equal"] = 0 if scores_A.std(correction=0) > 0 else now["equal"] + 1
    if now["equal"] == stuck_rollouts:
        run.print(f"all {len(scores_A)} scores were {scores_A[0]:.3g} in each of {now['equal']} rollouts and teach "
                  "nothing; take easier tasks, a reward that grades (format=0.1 beside verifier), a higher "
                  "temperature or more questions")


def check_critic(critic, tokenizer, config):
    """SystemExit if the critic cannot read what the actor, of `config`, writes."""
    if not critic_from:
        return
    theirs = Tokenizer.load(fetch(critic_from))
    if theirs.fingerprint != tokenizer.fingerprint or critic.config.vocab_size != config.vocab_size:
        raise SystemExit(f"ppo.py: the critic in {critic_from} reads {critic.config.vocab_size} ids of tokenizer "
                         f"{theirs.fingerprint} and the actor in {init_from} writes {config.vocab_size} of "
                         f"{tokenizer.fingerprint}; take a reward model trained from this actor")
    if critic.config.context < config.context:
        raise SystemExit(f"ppo.py: the critic in {critic_from} reads {critic.config.context} tokens and the actor in "
                         f"{init_from} up to {config.context}; take one with as long a context")


def save(run, actor, critic, updates, step, tokenizer, best=False):
    """run.save, and the critic: for the state, and as a directory beside each of the actor's."""
    run.extra["critic"] = critic.state_dict()
    for folder in [run.path("critic")] * run.is_main + [run.path("best", "critic")] * (run.is_main and best):
        critic.save(folder)
        tokenizer.save(folder)
    run.save(actor, updates, step, tokenizer, best)


def main(config):
    least = dict(max_steps=1, eval_every=1, n_questions=0, questions_per_rollout=1, answers_per_question=1, seed=0,
                 max_new_tokens=0, micro_questions=0, rollout_batch=1, epochs=1, minibatches=1, eval_questions=1,
                 pass_k=0, samples=0, lr=0, critic_lr=0, weight_decay=0, grad_clip=0, max_seconds=0, beta1=0, beta2=0,
                 warmup_steps=0, final_lr=0, spike_patience=1, temperature=1e-3, missing_eos_penalty=0, kl_coef=0,
                 kl_target=0, kl_horizon=1, gamma=0, lam=0, clip_range=0, value_clip=0, stop_kl=0, collapse=0,
                 stuck_rollouts=1)
    common.check(config, least, method=("full", "lora"), kl_estimator=("k1", "k3"))
    for name in (name for name in ("gamma", "lam") if config[name] > 1):
        raise SystemExit(f"ppo.py: --{name} must be at most 1, got {config[name]}")
    if kl_target and not kl_coef:
        raise SystemExit(f"ppo.py: --kl_target={kl_target} moves kl_coef, which is 0 and would stay so; set --kl_coef")
    optim.lr_scale(0, 0.0, schedule, warmup_steps)          # refuses an unknown schedule now
    folder = fetch(init_from)
    run = common.start(config)                              # ranks, device, seeds, out_dir
    per_update = questions_per_rollout // minibatches
    micro = micro_questions or max(1, per_update // run.world_size)
    accumulation = per_update // (micro * run.world_size)
    if not accumulation or accumulation * micro * run.world_size * minibatches != questions_per_rollout:
        raise SystemExit(f"ppo.py: questions_per_rollout={questions_per_rollout} is not a multiple of minibatches * "
                         f"micro_questions * ranks = {minibatches} * {micro} * {run.world_size}")

    # models: actor, critic and, unless adapters or no penalty make it needless, the frozen reference
    tokenizer, actor = Tokenizer.load(folder), GPT.load(folder)
    if tokenizer.chat_end_id is None:
        raise SystemExit(f"ppo.py: the tokenizer in {init_from} has no <|im_start|> and <|im_end|> to write chats "
                         "with; begin from a model whose tokenizer has them")
    if tokenizer.chat_end_id not in actor.config.stop_ids:
        actor.config.end_ids += (tokenizer.chat_end_id,)    # chat.py and eval.py know a chat model by it
        run.print(f"{init_from} was not trained to chat: its answers seldom end, and few get a reward; begin from a "
                  "model that sft.py wrote")
    began = weights_fingerprint(actor)
    if run.state and run.state["extra"].get("began", began) != began:
        raise SystemExit(f"ppo.py: --resume=true, but {init_from} is not the model that this run began from; restore "
                         "it, or begin a new run")
    critic = ScalarHead.begin(critic_from or folder)
    check_critic(critic, tokenizer, actor.config)
    critic.bias = 0.0                                       # of a reward, not of a value
    reference = None
    if method == "lora":
        lora.add(actor, lora_rank, lora_alpha, lora_targets)
        reference = actor if kl_coef else None              # its adapters off
    elif kl_coef:
        reference = GPT.load(folder).to(run.device).requires_grad_(False)
        reference.model.dtype = run.dtype
    actor.model.checkpointing = critic.model.checkpointing = checkpointing
    actor, critic = run.parallel(actor), run.parallel(critic)

    # questions and rewards
    fit = dict(path=path, context=actor.config.context, max_new_tokens=max_new_tokens, too_long=too_long)
    questions = rollouts.Questions(tasks, "train", seed, tokenizer, n_questions=n_questions, **fit)
    dev = rollouts.Questions(tasks, "dev", seed, tokenizer, n_questions=eval_questions, **fit)
    questions(0, questions_per_rollout)                     # says now that there are too few
    reward = rollouts.Rewards(rewards, tokenizer, run.device, run.dtype)
    reward.check(dev.fixed(1))
    if reward.note:
        run.print(reward.note)

    # optimizer, and where the resumed run stopped
    built = [optim.build(model, "adamw", rate, rate, 0.0, weight_decay, (beta1, beta2), 0.0)
             for model, rate in ((actor, lr), (critic, critic_lr))]
    updates = optim.Optimizers(*(optimizer for each in built for optimizer in each.optimizers))
    run.resume(actor, updates)
    now = run.extra = dict(rollout=None, rollouts=0, update=0, kl_coef=kl_coef, episode=0, num_tokens=0, equal=0,
                           entropy=None, collapsed=False, best=(-1.0, 0.0)) | run.extra
    now["began"] = began
    if "critic" in now:
        critic.load_state_dict(now["critic"])
    guard = optim.SpikeGuard(math.inf, spike_patience, **now.get("guard", {}))
    trained = sum(p.numel() for p in actor.parameters() if p.requires_grad)
    run.print(f"{trained / 1e6:.2f}M of the actor's {actor.config.n_params() / 1e6:.2f}M parameters trained, and a "
              f"critic of {sum(p.numel() for p in critic.parameters()) / 1e6:.2f}M; {epochs * minibatches} steps a "
              f"rollout, {max_steps} in all")

    for step in range(run.first_step, max_steps + 1):
        done = max(step / max_steps, run.elapsed() / max_seconds if max_seconds else 0)
        stopping = run.stop_requested()

        # evaluate and save
        if done >= 1 or step % eval_every == 0 and (step > run.first_step or step == 0):
            metrics, answered = rollouts.evaluate(actor, tokenizer, dev.fixed(eval_questions), reward, run, pass_k,
                                                  temperature, questions.max_new_tokens, rollout_batch, seed)
            if now.get("evaluated") != step:                # a finished run that is resumed says it once
                run.log(step, done, **metrics)
            accuracies = [value for name, value in metrics.items() if name.startswith("eval_accuracy/")]
            score = sum(accuracies), metrics["eval_reward"]
            best = score > now["best"]
            now.update(guard=guard.state(), evaluated=step, best=max(score, now["best"]))
            save(run, actor, critic, updates, step, tokenizer, best)
            if run.is_main and method == "lora":
                lora.save(actor, run.path("adapter"), base=init_from)
            rollouts.print_answers(answered, samples, run)
        elif stopping:
            now.update(guard=guard.state())
            save(run, actor, critic, updates, step, tokenizer)
        if done >= 1 or stopping:
            break

        # learning rate
        begin = run.clock()
        scale = optim.lr_scale(step, done, schedule, warmup_steps, final=final_lr)
        for group in updates.param_groups:
            group["lr"] = group["peak_lr"] * scale

        # roll out and score: each rank its share of the questions, and then all ranks have all answers
        measured, G = {}, answers_per_question
        if now["rollout"] is None:
            asked = questions(now["rollouts"], questions_per_rollout)
            share = len(asked) // run.world_size
            drawn = rollouts.sample(actor, asked[run.rank * share:(run.rank + 1) * share], G, tokenizer,
                                    questions.max_new_tokens, temperature, max_batch=rollout_batch,
                                    seed=rollouts.step_seed(seed, now["rollouts"]))
            scores_A, parts = reward(drawn)
            seen = [answer for q in range(0, share, micro)
                    for answer in observe(drawn.part(range(q, min(q + micro, share))), actor, reference, critic)]
            answers = run.gather([
                dict(tokens=sample.tokens, sampler=torch.tensor(sample.logp), finished=sample.finish == "stop",
                     score=scores_A[a].item(), parts={name: part[a].item() for name, part in parts.items()}, **seen[a])
                for a, sample in enumerate(drawn.samples)])
            padded = {name: pad_sequence([answer[name] for answer in answers], batch_first=True)
                      for name in ("sampler", "logp", "ref", "entropy", "values")}
            lengths_A = torch.tensor([len(answer["tokens"]) for answer in answers])
            mask_AL = torch.arange(padded["logp"].size(1)) < lengths_A[:, None]
            finished_A = torch.tensor([answer["finished"] for answer in answers])
            scores_A = torch.tensor([answer["score"] for answer in answers]) - missing_eos_penalty * ~finished_A

            # rewards and advantages, over the whole rollout
            kl_AL = kl_estimate(padded["logp"], padded["ref"], kl_estimator) * mask_AL
            rewards_AL = token_rewards(scores_A, kl_AL, mask_AL, now["kl_coef"])
            if whiten_rewards:
                rewards_AL = whiten(rewards_AL, mask_AL, shift_mean=False)
            advantages_AL, returns_AL = gae(rewards_AL, padded["values"], mask_AL, gamma, lam)
            now["rollout"] = dict(prompts=[a.prompt_ids for a in asked], tokens=[a["tokens"] for a in answers],
                                  logp=padded["logp"], values=padded["values"], returns=returns_AL, mask=mask_AL,
                                  advantages=whiten(advantages_AL, mask_AL))

            # what is worth knowing of it
            measured = describe(padded, scores_A, finished_A, returns_AL, mask_AL)
            for name in parts:
                measured[f"rewards/{name}/mean"] = sum(answer["parts"][name] for answer in answers) / len(answers)
            measured["failed_rewards"] = int(run.total(sum(reward.failed.values())))
            if kl_coef:
                kl = kl_AL.sum(1).mean().item()             # of an answer
                measured |= {"objective/kl": kl, "objective/non_score_reward": -now["kl_coef"] * kl,
                             "objective/rlhf_reward": measured["objective/scores"] - now["kl_coef"] * kl,
                             "kl_coef": now["kl_coef"]}
            if kl_target:
                now["kl_coef"] = adapt_kl_coef(now["kl_coef"], kl, kl_target, len(answers), kl_horizon)
            now["episode"] += len(answers)
            now["num_tokens"] += int(lengths_A.sum())
            say(now, measured, scores_A, run)
            seconds = run.clock() - begin
            measured |= {"rollout_seconds": seconds, "rollout_tokens_per_second": int(lengths_A.sum()) / seconds}

        # gradients: one denominator for the whole step, all micro-batches and ranks
        begin, rollout = run.clock(), now["rollout"]
        chosen = minibatch(seed, now["rollouts"], now["update"], questions_per_rollout, minibatches)
        tokens_in_step = rollout["mask"].view(questions_per_rollout, -1)[chosen].sum().item()
        sums = torch.zeros(8, dtype=torch.float64)
        for i in range(accumulation):
            for model in (actor, critic):
                run.meet(model, now=i == accumulation - 1)
            part = chosen[run.rank::run.world_size][i * micro:(i + 1) * micro]
            packed = pack([(rollout["prompts"][q], rollout["tokens"][q * G:(q + 1) * G]) for q in part], run.device)
            rows, L = [q * G + g for q in part for g in range(G)], packed.mask.size(1)
            old_AL, advantages_AL, old_values_AL, returns_AL = run.move(
                *(rollout[name][rows, :L] for name in ("logp", "advantages", "values", "returns")))
            nll, entropy = actor(packed.ids, packed.targets, temperature=temperature, want_entropy=True,
                                 **packed.layout)
            logp_AL, values_AL = -packed.by_answer(nll), packed.by_answer(critic(packed.ids, **packed.layout))
            policy_AL, policy_clipped_AL = policy_loss(logp_AL, old_AL, advantages_AL, clip_range)
            value_AL, value_clipped_AL = value_loss(values_AL, old_values_AL, returns_AL, value_clip)
            (((policy_AL + value_AL) * packed.mask).sum() * (run.world_size / tokens_in_step)).backward()
            ratio_AL = (logp_AL - old_AL).exp()
            sums += torch.stack([x[packed.mask].sum().detach().double().cpu() for x in (
                policy_AL, value_AL, (logp_AL - old_AL).square() / 2, policy_clipped_AL, value_clipped_AL,
                packed.by_answer(entropy), ratio_AL, ratio_AL.square())])

        # update, unless the policy has left the rollout behind
        means = (run.total(sums) / tokens_in_step).tolist()
        policy, value, approxkl, policy_clipped, value_clipped, entropy, ratio, ratio_square = means
        norms = [torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf).item()
                 for model in (actor, critic)]
        left = 0 < stop_kl < approxkl                       # from sums over the ranks: they agree
        if not left and guard.accepts(policy + value, sum(norms)):
            updates.step()
        updates.zero_grad()
        now["update"] += 1
        if left or now["update"] == epochs * minibatches:
            now.update(rollout=None, rollouts=now["rollouts"] + 1, update=0)

        # log the whole step
        seconds = run.clock() - begin
        run.log(step, done, **measured, **{
            "loss/policy_avg": policy, "loss/value_avg": value, "policy/approxkl_avg": approxkl,
            "policy/clipfrac_avg": policy_clipped, "policy/entropy_avg": entropy, "val/clipfrac_avg": value_clipped,
            "val/ratio": ratio, "val/ratio_var": max(0.0, ratio_square - ratio ** 2), "stopped_early": int(left),
            "grad_norm": norms[0], "grad_norm/critic": norms[1], "lr": lr * scale, "episode": now["episode"],
            "num_tokens": now["num_tokens"], "eps": now["episode"] / run.clock(), "update_seconds": seconds,
            "update_tokens_per_second": tokens_in_step / seconds, "skipped_updates": guard.skipped})

    run.finish()
    if done < 1:
        run.print(f"stopped before step {step}; go on with the same options and --resume=true")
    else:
        run.print(f"{out_dir}: {', '.join(f'{name} {value:.3f}' for name, value in metrics.items())} after "
                  f"{run.clock():.1f} s; talk to it: python chat.py --model={out_dir}")


if __name__ == "__main__":
    main(configure(globals()))
