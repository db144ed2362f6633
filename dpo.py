"""Direct preference optimization: a model learns from which of two answers is better, without a reward model.

DPO (Rafailov et al. 2023, arXiv:2305.18290) and the losses that followed it, each with its paper; KTO needs no pairs.

    python data.py --kind=pairs --from_model=out/sft --task=addition --out_dir=data/pairs
    python dpo.py --data=data/pairs --init_from=out/sft --eval_tasks=addition
    python dpo.py --data=data/pairs --init_from=out/sft --loss=simpo --beta=2 --out_dir=out/simpo

Shapes: P pairs, A answers (2P, or those of thumbs), L tokens of the longest answer, N tokens of the packed row. A step
is one optimizer update.
"""
import math
import os

import torch
import torch.nn.functional as F

import common
import lora
import optim
from configurator import configure
from formats import split_weights
from model import GPT, fetch, read_json
from packing import pack
from pairs import PairBatches, Pairs, ThumbBatches, Thumbs, fixed_pairs, holds_thumbs
from reference import Reference, answer_logps
from rollouts import greedy_accuracy, greedy_tasks, print_samples
from tokenizer import Tokenizer

# --- run ---
out_dir = "out/dpo"         # model directory to write, with its log and resume state
init_from = "out/sft"       # model directory to start from, or hub:ORG/NAME; it is the reference too
resume = False              # go on with the run in out_dir, exactly where its newest saved state stands
overwrite = False           # replace a run that out_dir already holds
seed = 1337                 # order of the data and adapters
device = "auto"             # auto, cuda, mps or cpu
dtype = "auto"              # activations and products: auto (bf16 where the hardware is fast at it), bf16, fp32
# --- data ---
data = "data/pairs"         # folder written by data.py --kind=pairs: pairs, or thumbs for kto
context = 0                 # longest prompt with an answer, in tokens; longer ones are cut; 0: the model's
pairs_per_step = 64         # global batch in pairs (or thumbs) = micro_pairs * accumulation * ranks
micro_pairs = 0             # pairs of one forward pass on one rank; lower it if memory runs out; 0: all at once
# --- method ---
loss = "sigmoid"            # one of the losses below, or several with weights as in "sigmoid=1,ipo=0.5"
beta = 0.1                  # pull towards the reference: larger stays closer; simpo wants 2 or more
sft_weight = -1.0           # of the chosen answers' mean nll per token (RPO); -1: 1 for cpo, 0 for orpo, simpo and kto,
                            # 0.1 for others, which otherwise push down both answers where pairs are alike
label_smoothing = 0.0       # share of labels thought wrong: sigmoid (cDPO), robust, exo (0: 0.001), cpo, simpo
simpo_gamma = 0.5           # margin that simpo wants beyond zero, not multiplied by beta
discopop_tau = 0.05         # temperature of discopop's switch between its two losses
desirable_weight = 1.0      # kto: of thumbs up
undesirable_weight = 1.0    # kto: of thumbs down; keep weight times count of the two alike
reference = "auto"          # auto (adapters off under lora, else a frozen copy) or stored (computed once, beforehand)
reference_dir = ""          # folder of the stored reference, to share it between runs; empty: out_dir
method = "full"             # full or lora (adapters beside frozen weights)
lora_rank = 8               # rank of the adapters; higher learns more and costs more
lora_alpha = 16.0           # their scale is alpha / rank
lora_targets = "all"        # layers with adapters: all of the blocks, or names such as q_proj,v_proj,lm_head
rslora = False              # scale by alpha / sqrt(rank): for high ranks
checkpointing = False       # recompute activations in backward: less memory, a third more time
# --- optimizer ---
optimizer = "adamw"         # adamw, or muon for the matrices of the blocks (full alone)
lr = 5e-5                   # peak rate of AdamW; large models want 5e-7 to 5e-6, adapters ten times that
matrix_lr = 0.001           # peak rate of Muon
embed_lr = 0.0              # peak rate of the embedding; 0: lr
weight_decay = 0.0          # on matrices only
beta1 = 0.9                 # AdamW's decay of the mean gradient
beta2 = 0.95                # AdamW's decay of the mean squared gradient
momentum = 0.9              # Muon's
grad_clip = 1.0             # largest gradient norm; 0: no clipping
# --- schedule ---
epochs = 1.0                # passes over the pairs, if max_steps is 0
max_steps = 0               # optimizer updates; the decay ends here; 0: as many as the epochs have
max_seconds = 0.0           # end decay and training after this many seconds, if that comes first; evaluation follows
schedule = "cosine"         # cosine, wsd (warmup, stable, linear decay) or constant
warmup_steps = 10           # linear warmup
final_lr = 0.1              # last learning rate as a share of the peak
# --- evaluation and log ---
eval_every = 25             # steps between evaluations; each one saves, as the end of the run does
eval_pairs = 500            # held-out pairs to evaluate on, always the same; 0: all
eval_tasks = ""             # tasks of tasks.py to answer greedily at each evaluation: best/ then goes by them
eval_questions = 100        # questions of each, from its dev split
samples = 2                 # held-out prompts answered and printed at each evaluation; 0: none
spike_factor = 10.0         # skip an update whose gradient norm is this many times the running median
spike_patience = 10         # stop after this many skipped updates in a row
curves = True               # draw curves.png at the end
report_to = ""              # wandb or tensorboard, if installed


# --- losses: (P,) from a and b (P,), which speak of the chosen and the rejected answer. They are the log-ratios
#     log pi(y|x) - log ref(y|x), summed over the answer's tokens, in nats; LOSSES says where they are anything else ---

def sigmoid(a, b, beta, label_smoothing=0.0):
    """DPO, eq. 7 of Rafailov et al. 2023 (arXiv:2305.18290): -log sigmoid(beta (a - b)). With label_smoothing e it is
    cDPO (Mitchell 2023), -(1 - e) log sigmoid(z) - e log sigmoid(-z); on log-probabilities CPO's preference term, eq. 3
    of Xu et al. 2024 (arXiv:2401.08417); on means per token the length-normalised DPO of Tulu 3 (arXiv:2411.15124)."""
    z = beta * (a - b)
    return -(1 - label_smoothing) * F.logsigmoid(z) - label_smoothing * F.logsigmoid(-z)


def robust(a, b, beta, label_smoothing=0.0):
    """rDPO, Chowdhury et al. 2024 (arXiv:2403.00409), unbiased under a share label_smoothing of flipped labels."""
    z, e = beta * (a - b), label_smoothing
    return (-(1 - e) * F.logsigmoid(z) + e * F.logsigmoid(-z)) / (1 - 2 * e)


def hinge(a, b, beta):
    """SLiC (Zhao et al. 2023, arXiv:2305.10425) on log-ratios, as in RSO (Liu et al. 2023, arXiv:2309.06657)."""
    return torch.relu(1 - beta * (a - b))


def ipo(a, b, beta):
    """IPO, eq. 17 of Azar et al. 2023 (arXiv:2310.12036), on log-ratios per token, as its authors ran it."""
    return (a - b - 1 / (2 * beta)) ** 2


def exo(a, b, beta, label_smoothing=0.0):
    """EXO for pairs, eq. 16 of Ji et al. 2024 (arXiv:2402.00856): the KL divergence of the policy's preference, softmax
    of beta (a, b), from the data's, (1 - e, e); e = 0 would be infinite and stands for 0.001."""
    z, e = beta * (a - b), label_smoothing or 1e-3
    return (torch.sigmoid(z) * (F.logsigmoid(z) - math.log1p(-e))
            + torch.sigmoid(-z) * (F.logsigmoid(-z) - math.log(e)))


def nca(a, b, beta):
    """NCA for pairs, Chen et al. 2024 (arXiv:2402.05369): each answer against noise, so that a itself must rise."""
    return -F.logsigmoid(beta * a) - 0.5 * F.logsigmoid(-beta * a) - 0.5 * F.logsigmoid(-beta * b)


def bco(a, b, beta):
    """BCO, Jung et al. 2024 (arXiv:2404.04656): a binary classifier of single answers, without its reward shift."""
    return -F.logsigmoid(beta * a) - F.logsigmoid(-beta * b)


def sppo(a, b, beta):
    """SPPO, eq. 4.7 of Wu et al. 2024 (arXiv:2405.00675), the win probability being 1 for chosen, 0 for rejected."""
    return (a - 0.5 / beta) ** 2 + (b + 0.5 / beta) ** 2


def apo_zero(a, b, beta):
    """APO-zero, eq. 7 of D'Oosterlinck et al. 2024 (arXiv:2408.06266): chosen up, rejected down."""
    return 1 - torch.sigmoid(beta * a) + torch.sigmoid(beta * b)


def apo_down(a, b, beta):
    """APO-down, eq. 8 of the same: both down, rejected further. For chosen answers worse than the model's own."""
    return torch.sigmoid(beta * a) + 1 - torch.sigmoid(beta * (a - b))


def discopop(a, b, beta, discopop_tau=0.05):
    """DiscoPOP, eq. 5 of Lu et al. 2024 (arXiv:2406.08414): (1 - g) -log sigmoid(z) + g exp(-z), g = sigmoid(z / tau);
    the product is one exponential, so that a large negative z is not 0 times infinity."""
    z = beta * (a - b)
    return (-torch.sigmoid(-z / discopop_tau) * F.logsigmoid(z)
            + torch.exp(F.logsigmoid(z / discopop_tau) - z))


def simpo(a, b, beta, simpo_gamma=0.5, label_smoothing=0.0):
    """SimPO, eq. 6 of Meng et al. 2024 (arXiv:2405.14734): -log sigmoid(beta (a - b) - gamma) on mean log-probabilities
    per token."""
    return sigmoid(a - simpo_gamma / beta, b, beta, label_smoothing)


def log1mexp(x):
    """log(1 - e^x) for x < 0, without cancellation at either end (Maechler 2012)."""
    x = x.clamp(max=-1e-10)
    small = x.clamp(max=-math.log(2))       # each branch sees what it can bear: a gradient of the other would be NaN
    return torch.where(x < -math.log(2), torch.log1p(-small.exp()), torch.log(-torch.expm1(x.clamp(min=-math.log(2)))))


def log_odds_ratio(a, b):
    """log of odds(chosen) / odds(rejected), odds = p / (1 - p), from mean log-probabilities per token."""
    return a - b - (log1mexp(a) - log1mexp(b))


def orpo(a, b, beta):
    """ORPO's preference term, eq. 7 of Hong et al. 2024 (arXiv:2403.07691), times its lambda (beta). Its other term,
    the nll of prompts with their chosen answers, is added in the step."""
    return -beta * F.logsigmoid(log_odds_ratio(a, b))


def kto(ratio_A, label_A, kl, beta, desirable_weight=1.0, undesirable_weight=1.0):
    """KTO, section 4 of Ethayarajh et al. 2024 (arXiv:2402.01306), (A,) from single answers:

        lambda_D (1 - sigmoid(beta (ratio - kl)))  if desirable,  else  lambda_U (1 - sigmoid(beta (kl - ratio)))

    kl: z_0, the divergence from the reference, estimated on mismatched answers, at least 0, without gradient.
    """
    return torch.where(label_A, desirable_weight * torch.sigmoid(beta * (kl - ratio_A)),
                       undesirable_weight * torch.sigmoid(beta * (ratio_A - kl)))


LOSSES = dict(                  # name: function, what its a and b are, its options beside beta
    sigmoid=(sigmoid, "ratios", "label_smoothing"), sigmoid_norm=(sigmoid, "mean ratios"),
    robust=(robust, "ratios", "label_smoothing"), hinge=(hinge, "ratios"), ipo=(ipo, "mean ratios"),
    exo=(exo, "ratios", "label_smoothing"), nca=(nca, "ratios"), bco=(bco, "ratios"), sppo=(sppo, "ratios"),
    apo_zero=(apo_zero, "ratios"), apo_down=(apo_down, "ratios"), discopop=(discopop, "ratios", "discopop_tau"),
    cpo=(sigmoid, "logps", "label_smoothing"), simpo=(simpo, "mean logps", "simpo_gamma", "label_smoothing"),
    orpo=(orpo, "mean logps"), kto=(kto, "ratios", "desirable_weight", "undesirable_weight"))
ALIASES = dict(dpo="sigmoid", exo_pair="exo", nca_pair="nca", bco_pair="bco", sppo_hard="sppo")
SFT_WEIGHTS = dict(cpo=1.0, orpo=0.0, simpo=0.0, kto=0.0)       # where sft_weight is -1; 0.1 for the others


def read_losses(text, e=0.0, weight=-1.0):
    """({name: weight} of "sigmoid=1,ipo=0.5", weight of the SFT term); ValueError on anything else, with the list of
    names, and on label_smoothing e or sft_weight `weight` that these losses do not read or cannot bear."""
    losses = {}
    for name, share in split_weights(text):
        name = ALIASES.get(name, name)
        if name not in LOSSES:
            raise ValueError(f"there is no loss {name!r}; there are {', '.join([*LOSSES, *ALIASES])}, and the SFT term "
                             "is --sft_weight")
        losses[name] = 1.0 if share is None else share
        if losses[name] <= 0:
            raise ValueError(f"the weight of a loss must be above 0, got {share:g} for {name}")
    if not losses or "kto" in losses and len(losses) > 1:
        raise ValueError(f"--loss is one loss or several of pairs, while kto stands alone; got {text!r}")
    if e and not any("label_smoothing" in LOSSES[name] for name in losses) or e >= 0.5:
        readers = [name for name in LOSSES if "label_smoothing" in LOSSES[name]]
        raise ValueError(f"--label_smoothing={e} must be below 0.5, and 0 but for {', '.join(readers)}; got {text}")
    if weight < 0 and weight != -1:
        raise ValueError(f"--sft_weight must be at least 0, or -1 for the loss's own, got {weight}")
    return losses, weight if weight >= 0 else max(SFT_WEIGHTS.get(name, 0.1) for name in losses)


def scores(kind, logp_A, ref_A, n_A):
    """What a loss calls a and b, (P,) each, from the answers' log-probabilities and numbers of tokens."""
    x_A = logp_A - ref_A if "ratios" in kind else logp_A
    x_A = x_A / n_A if "mean" in kind else x_A
    return x_A[0::2], x_A[1::2]


def loss_sum(losses, logp_A, ref_A, n_A, label_A, kl, options):
    """The weighted losses, summed over pairs (kto: over answers)."""
    total = 0.0
    for name, weight in losses.items():
        function, kind, *wanted = LOSSES[name]
        own = {option: options[option] for option in ("beta", *wanted)}
        if name == "kto":
            values = kto(logp_A - ref_A, label_A, kl, **own)
        else:
            values = function(*scores(kind, logp_A, ref_A, n_A), **own)
        total = total + weight * values.sum()
    return total


def texts(packed):
    """(1, N) targets of the answers and of their prompts, which ORPO trains too; each prompt token once."""
    return packed.ids.roll(-1, 1).index_fill(1, packed.last, -100)


def mean_loss(terms, data, numbers, losses, sft):
    """The mean loss of data's `numbers` from three sums over them or over some of them: pair losses per pair (kto: per
    answer), sft times the chosen answers' nats per token, and ORPO's nats per token of prompts and chosen answers."""
    groups, labels = data.groups(numbers), data.liked(numbers)
    chosen = sum(len(answers[0]) for (_, answers), label in zip(groups, labels[::len(groups[0][1])]) if label)
    text = chosen + sum(len(prompt) - 1 for prompt, _ in groups)
    pair_losses, chosen_nats, text_nats = terms
    return (pair_losses / (len(labels) if "kto" in losses else len(numbers)) + sft * chosen_nats / max(1, chosen)
            + losses.get("orpo", 0.0) * text_nats / text)


# --- metrics, by trl's names ---

@torch.no_grad()
def columns(packed, label_A, logp_A, reward_A, *seen_1N):
    """(A, 6 or 7) of answers: what `summarise` makes metrics of. seen: mean logits, entropies and by choice hits."""
    found = (label_A, logp_A, reward_A, packed.lengths, *(packed.by_answer(x.float()).sum(1) for x in seen_1N))
    return torch.stack([x.float() for x in found], 1).cpu().double()


def summarise(table_A, paired, losses):
    """Metrics of a whole step's answers, of pairs one after the other; none of a side without answers."""
    label_A, logp_A, reward_A, n_A, logits_A, entropy_A, *hits_A = table_A.unbind(1)
    metrics = dict(entropy=entropy_A.sum() / n_A.sum())
    for side, of in (("chosen", label_A > 0), ("rejected", label_A == 0)):
        if of.any():
            metrics |= {f"rewards/{side}": reward_A[of].mean(), f"logps/{side}": logp_A[of].mean(),
                        f"logits/{side}": logits_A[of].sum() / n_A[of].sum()}
    if len(metrics) == 7:                                   # both sides
        metrics["rewards/margins"] = metrics["rewards/chosen"] - metrics["rewards/rejected"]
    if hits_A and (label_A > 0).any():
        metrics["mean_token_accuracy"] = hits_A[0][label_A > 0].sum() / n_A[label_A > 0].sum()
    if paired:
        metrics["rewards/accuracies"] = (reward_A[0::2] > reward_A[1::2]).double().mean()
    if "orpo" in losses:
        log_odds_P = log_odds_ratio(*scores("mean logps", logp_A, None, n_A))
        metrics |= dict(log_odds_chosen=log_odds_P.mean(), log_odds_ratio=F.logsigmoid(log_odds_P).mean())
    return {name: value.item() for name, value in metrics.items()}


@torch.no_grad()
def mean_logits(model, hidden):
    """(1, N) means over the vocabulary of the logits: the product with the head's mean row."""
    hidden, weight = model.lm_head.folded(hidden)
    return hidden.float() @ weight.float().mean(0)


def displaced(began, metrics):
    """Whether the chosen answers became clearly less likely while the margins rose (likelihood displacement, Razin et
    al. 2024, arXiv:2410.08847)."""
    now = [metrics.get(f"eval_{name}") for name in ("logps/chosen", "rewards/margins")]
    if None in (*now, *began.values()):
        return False
    return now[0] < 1.05 * began["logps/chosen"] and now[1] > began["rewards/margins"]


def main(config):
    least = dict(epochs=0, max_steps=0, eval_every=1, context=0, pairs_per_step=1, micro_pairs=0, eval_pairs=0,
                 eval_questions=1, samples=0, seed=0, lr=0, matrix_lr=0, embed_lr=0, weight_decay=0, grad_clip=0,
                 max_seconds=0, spike_factor=1, beta1=0, beta2=0, momentum=0, warmup_steps=0, final_lr=0,
                 spike_patience=1, beta=1e-9, label_smoothing=0, simpo_gamma=0, discopop_tau=1e-9, desirable_weight=0,
                 undesirable_weight=0)
    common.check(config, least, method=("full", "lora"), reference=("auto", "stored"))
    asked = greedy_tasks(eval_tasks)
    optim.lr_scale(0, 0.0, schedule, warmup_steps)          # refuses an unknown schedule now
    how = dict(beta=beta, label_smoothing=label_smoothing, simpo_gamma=simpo_gamma, discopop_tau=discopop_tau,
               desirable_weight=desirable_weight, undesirable_weight=undesirable_weight)
    losses, sft = read_losses(config["loss"], label_smoothing, sft_weight)
    single, compared = "kto" in losses, any("logps" not in LOSSES[name][1] for name in losses)
    if reference == "stored" and (single or not compared):
        raise SystemExit("dpo.py: reference must be auto, or stored for losses with a reference other than kto (whose "
                         f"pairs are shuffled), got --reference={reference} --loss={config['loss']}")
    paired = not holds_thumbs(data)
    if not paired and not single:
        raise SystemExit(f"dpo.py: {data} holds single answers with a thumb up or down, from which --loss=kto learns; "
                         f"--loss={config['loss']} needs pairs")
    folder = fetch(init_from)
    if "SequenceClassification" in str(read_json(os.path.join(folder, "config.json"))):
        raise SystemExit(f"dpo.py: {init_from} is a reward model, which gives numbers and no answers; begin from the "
                         "model that sft.py wrote")
    run = common.start(config)                              # ranks, device, seeds, out_dir
    micro = micro_pairs or max(1, pairs_per_step // run.world_size)
    accumulation, rest = divmod(pairs_per_step, micro * run.world_size)
    if rest or not accumulation:
        raise SystemExit(f"dpo.py: pairs_per_step={pairs_per_step} is not a multiple of micro_pairs * ranks = "
                         f"{micro} * {run.world_size}")

    # model and reference
    tokenizer, model = Tokenizer.load(folder), GPT.load(folder)
    if tokenizer.chat_end_id is None:
        raise SystemExit(f"dpo.py: the tokenizer in {init_from} has no <|im_start|> and <|im_end|> to write chats "
                         "with; begin from a model whose tokenizer has them")
    T = context or model.config.context
    if T > model.config.context:
        raise SystemExit(f"dpo.py: --context={context} is longer than the {model.config.context} tokens that "
                         f"{init_from} was trained on; lower it, or pretrain with a longer context first")
    if tokenizer.chat_end_id not in model.config.stop_ids:
        model.config.end_ids += (tokenizer.chat_end_id,)    # chat.py and eval.py know a chat model by it
    ref = Reference(model, run, copied=compared and method == "full")
    if method == "lora":
        lora.add(model, lora_rank, lora_alpha, lora_targets, rslora)    # no dropout: it would part policy and reference
    model.model.checkpointing = checkpointing
    model = run.parallel(model)
    kept = {}                                               # the hidden states of the latest forward pass
    model.model.register_forward_hook(lambda module, inputs, hidden: kept.update(hidden=hidden.detach()))

    # data
    batches = (PairBatches if paired else ThumbBatches)(data, "train", pairs_per_step, micro, T, seed, run.rank,
                                                        run.world_size, tokenizer)
    train, val = batches.pairs, (Pairs if paired else Thumbs)(data, "val", tokenizer, T)
    n_val = min(len(val), eval_pairs or len(val))
    if single and min(pairs_per_step, n_val) < 2:
        raise SystemExit("dpo.py: kto estimates its divergence on prompts with the answers of other rows, so that "
                         f"pairs_per_step and the held-out rows must be at least 2, got {pairs_per_step} and {n_val}")
    held = (f"{len(train):,} {'pairs' if paired else 'answers'} {train.fingerprint} and {len(val):,} held out "
            f"{val.fingerprint}, to train {ref.name}")
    if run.state and run.state["extra"]["data"] != held:
        raise SystemExit(f"dpo.py: --resume=true, but {data} and {init_from} held {run.state['extra']['data']} and now "
                         f"hold {held}; restore them, or begin a new run")
    last_step = max_steps or math.ceil(epochs * batches.steps_per_epoch)
    if reference == "stored":
        ref.store(os.path.join(reference_dir or out_dir, "reference.pt"), (train, val), micro,
                  anew=overwrite and not reference_dir)

    def forward(pairs, indices, kl, hits=False):
        """The three terms of `mean_loss` over a micro-batch, with gradients, and (them and the tokens processed, the
        answers' `columns`) to count."""
        packed, label_A = pairs.packed(indices, run.device), pairs.liked(indices).to(run.device)
        ref_A = ref.of(pairs, indices, packed) if compared else None
        targets = texts(packed) if "orpo" in losses else packed.targets
        nll_1N, *seen_1N = model(packed.ids, targets, want_entropy=True, want_hits=hits, **packed.layout)
        logp_A = -packed.by_answer(nll_1N).sum(1)
        mean = "mean" in LOSSES[next(iter(losses))][1]
        reward_A = beta * (logp_A - ref_A if compared else logp_A / packed.lengths if mean else logp_A)
        terms = (loss_sum(losses, logp_A, ref_A, packed.lengths, label_A, kl, how), -logp_A[label_A].sum(),
                 nll_1N.sum() + logp_A[~label_A].sum())
        sums = torch.tensor([*(term.item() for term in terms), packed.ids.numel()], dtype=torch.float64)
        return terms, (sums, columns(packed, label_A, logp_A, reward_A, mean_logits(model, kept["hidden"]), *seen_1N))

    @torch.no_grad()
    def divergence(pairs, numbers, parts):
        """KTO's z_0: the mean log-ratio of mismatched answers, at least 0; over the whole step, so that it does not
        depend on how the step is split. `parts`: this rank's places in `numbers`, a micro-batch each."""
        total = torch.zeros(2, dtype=torch.float64)
        for places in filter(None, parts):
            packed = pack(pairs.mismatched(numbers, places, T), run.device)
            ratio_A = answer_logps(model, packed) - ref(packed)
            total += torch.tensor([ratio_A.sum().item(), len(ratio_A)], dtype=torch.float64)
        ratios, n = run.total(total).tolist()
        return max(0.0, ratios / n)

    def finish(counted, pairs, numbers, kl):
        """The mean loss, the metrics and the tokens processed of `numbers`, from what each rank counted."""
        *terms, processed = run.total(sum((sums for sums, _ in counted), torch.zeros(4, dtype=torch.float64))).tolist()
        table_A, text = torch.cat(run.gather([table for _, table in counted])), "orpo" in losses
        metrics = summarise(table_A, paired, losses) | (dict(kl=kl) if single else {})
        metrics["nll_loss"] = mean_loss([0.0, *terms[1:]], pairs, numbers, {"orpo": 1.0} if text else {}, 1.0 - text)
        return mean_loss(terms, pairs, numbers, losses, sft), metrics, round(processed)

    @torch.no_grad()
    def evaluate():
        """eval_ metrics over the first held-out pairs, each once."""
        numbers, parts = range(n_val), list(fixed_pairs(val, micro, n_val, run.rank, run.world_size))
        kl = divergence(val, numbers, parts) if single else 0.0
        counted = [forward(val, indices, kl, hits=True)[1] for indices in parts if indices]
        mean, metrics, _ = finish(counted, val, numbers, kl)
        return {f"eval_{name}": value for name, value in dict(loss=mean, **metrics).items() if "logits" not in name}

    # optimizer, and where the resumed run stopped
    updates = optim.build(model, optimizer, lr, matrix_lr, embed_lr, weight_decay, (beta1, beta2), momentum, 5,
                          run.dtype)
    run.resume(model, updates)
    run.extra["data"] = held
    guard = optim.SpikeGuard(spike_factor, spike_patience, **run.extra.get("guard", {}))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    run.print(f"{trained / 1e6:.2f}M of {model.config.n_params() / 1e6:.2f}M parameters trained, {held}; "
              f"{', '.join(f'{w:g} {name}' for name, w in losses.items())}, SFT term {sft:g}, {last_step} steps in all")
    for cause, n in (item for pairs in (train, val) for item in pairs.dropped.items()):
        run.print(f"left out: {n:,} rows {cause}")

    for step in range(run.first_step, last_step + 1):
        done = max(step / last_step, run.elapsed() / max_seconds if max_seconds else 0)
        stopping = run.stop_requested()

        # evaluate and save
        if done >= 1 or step % eval_every == 0 and (step > run.first_step or step == 0):
            metrics = evaluate()
            for task in asked if run.is_main else ():
                right, formatted = greedy_accuracy(model, tokenizer, task, eval_questions)
                metrics |= {f"eval_accuracy/{task}": right, f"eval_format/{task}": formatted}
            if run.extra.get("evaluated") != step:          # a finished run that is resumed says it once
                run.log(step, done, **metrics)
            accuracy = sum(metrics.get(f"eval_accuracy/{task}", 0.0) for task in asked)
            standing = [accuracy, -metrics["eval_loss"]]    # by accuracy, if asked for: the loss may fall without it
            best = standing > run.extra.get("best", [-math.inf, -math.inf])
            run.extra.update(guard=guard.state(), evaluated=step, best=standing if best else run.extra["best"])
            began = run.extra.setdefault("began", {name: metrics.get(f"eval_{name}") for name in
                                                   ("logps/chosen", "rewards/margins")})
            if displaced(began, metrics):
                run.print(f"  the chosen answers' log-probability fell from {began['logps/chosen']:.4g} to "
                          f"{metrics['eval_logps/chosen']:.4g} while margins rose: what is preferred is being unlearnt "
                          "too; raise --sft_weight or --beta, lower --lr, or stop at best/ (--eval_tasks)")
            run.save(model, updates, step, tokenizer, best)
            if run.is_main:
                if method == "lora":
                    lora.save(model, run.path("adapter"), base=init_from)
                print_samples(model, tokenizer, val.prompts[:samples], run)
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
        numbers = batches.numbers(step)
        parts = torch.arange(pairs_per_step).view(-1, run.world_size, micro)[:, run.rank].tolist()
        kl, counted = divergence(train, numbers, parts) if single else 0.0, []
        for i in range(accumulation):
            run.meet(model, now=i == accumulation - 1)
            terms, sums = forward(train, batches(step, i), kl)
            (mean_loss(terms, train, numbers, losses, sft) * run.world_size).backward()
            counted.append(sums)

        # update
        loss, metrics, n_tokens = finish(counted, train, numbers, kl)
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
        updates.step(guard.accepts(loss, grad_norm))
        updates.zero_grad()

        # log the whole step
        run.extra["num_tokens"] = run.extra.get("num_tokens", 0) + n_tokens
        run.log(step, done, loss=loss, **metrics, grad_norm=grad_norm, learning_rate=lr * scale,
                epoch=batches.epoch(step + 1), num_tokens=run.extra["num_tokens"],
                pairs_per_second=pairs_per_step / (run.clock() - begin), skipped_updates=guard.skipped)

    run.finish()
    if done < 1:
        run.print(f"stopped before step {step}; go on with the same options and --resume=true")
    else:
        run.print(f"{out_dir}: held-out loss {metrics['eval_loss']:.4f} after {run.clock():.1f} s, the best so far in "
                  f"best/; talk to it: python chat.py --model={out_dir}")


if __name__ == "__main__":
    main(configure(globals()))
