"""Every loss beside trl's: value and gradient on a random model and a ragged batch, rewards and metrics."""
import types

import pytest
import torch

import dpo
from model import GPT, Config
from packing import pack
from pairs import Pairs, Thumbs

transformers = pytest.importorskip("transformers", reason="transformers is not installed (requirements-test.txt)")
trl = pytest.importorskip("trl", reason="trl is not installed (requirements-test.txt)")
datasets = pytest.importorskip("datasets")

VOCAB = 64
GROUPS = [([5, 6, 7], [[8, 9, 12, 2], [8, 2]]), ([5], [[3], [4, 4, 4, 2]]), ([9, 9, 9, 9], [[50, 2], [51, 2]]),
          ([11, 6], [[30, 31, 2], [40, 41, 42, 43, 2]])]
THEIRS = dict(exo="exo_pair", nca="nca_pair", bco="bco_pair", sppo="sppo_hard")
OPTIONS = dict(beta=0.3, label_smoothing=0.0, simpo_gamma=0.5, discopop_tau=0.05, desirable_weight=1.3,
               undesirable_weight=0.7)
COMMON = dict(report_to="none", bf16=False, use_cpu=True, gradient_checkpointing=False, save_strategy="no",
              disable_tqdm=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A policy and a reference with log-probabilities far from uniform, saved; and a tokenizer of single words."""
    folder = tmp_path_factory.mktemp("parity")
    for seed, name in enumerate(("policy", "reference")):
        torch.manual_seed(seed)
        model = GPT(Config(vocab_size=VOCAB, n_layer=2, n_head=2, n_embd=32, context=64, eos_id=2, pad_id=0))
        for p in model.parameters():
            torch.nn.init.normal_(p, mean=1.0 if p.dim() == 1 else 0.0, std=0.2)
        model.save(str(folder / name))
    return folder


def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w1"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w2", unk_token="w1")


def their_model(folder, name):
    return transformers.AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32)


def text(ids):
    return " ".join(f"w{i}" for i in ids)


def ours(folder, losses, options, groups=GROUPS, label_A=None, kl=0.0, orpo=False, sft=0.0):
    """(loss, model with gradients, metrics) as a step of dpo.py has them."""
    model, reference = (GPT.load(str(folder / name)) for name in ("policy", "reference"))
    packed, hidden = pack(groups), []
    model.model.register_forward_hook(lambda module, inputs, out: hidden.append(out.detach()))
    ref_A = dpo.answer_logps(reference, packed)
    paired = label_A is None
    label_A = torch.tensor([True, False] * len(groups)) if paired else label_A
    targets = dpo.texts(packed) if orpo else packed.targets
    nll_1N, *seen_1N = model(packed.ids, targets, want_entropy=True, want_hits=True, **packed.layout)
    logp_A = -packed.by_answer(nll_1N).sum(1)
    terms = [dpo.loss_sum(losses, logp_A, ref_A, packed.lengths, label_A, kl, options), -logp_A[label_A].sum(),
             nll_1N.sum() + logp_A[~label_A].sum()]
    table_A = dpo.columns(packed, label_A, logp_A, options["beta"] * (logp_A - ref_A),
                          dpo.mean_logits(model, hidden[0]), *seen_1N)
    metrics = dpo.summarise(table_A, paired, losses)
    data = Thumbs.__new__(Thumbs)
    data.prompts, data.completions, data.labels = [p for p, _ in groups], [a[0] for _, a in groups], label_A
    if paired:
        data = Pairs.__new__(Pairs)
        data.labels = label_A.view(-1, 2)
        data.prompts, (data.chosen, data.rejected) = [p for p, _ in groups], zip(*(a for _, a in groups))
    loss = dpo.mean_loss(terms, data, range(len(groups)), losses, sft)
    loss.backward()
    return loss.item(), model, metrics


def assert_same_gradients(model, theirs):
    """To 1e-4 of a matrix's largest gradient: a squared loss subtracts log-probabilities that nearly cancel."""
    gradients = dict(theirs.named_parameters())
    for name, p in model.named_parameters():
        theirs_p = gradients[name].grad
        torch.testing.assert_close(p.grad, theirs_p, atol=1e-4 * theirs_p.abs().max().item(), rtol=1e-4)


def dpo_trainer(folder, out, names, **options):
    rows = [dict(prompt=text(p), chosen=text(c), rejected=text(r)) for p, (c, r) in GROUPS]
    model = their_model(folder, "policy")
    trainer = trl.DPOTrainer(
        model=model, ref_model=their_model(folder, "reference"), processing_class=tokenizer(),
        train_dataset=datasets.Dataset.from_list(rows),
        args=trl.DPOConfig(output_dir=str(out), loss_type=names, beta=0.3, **COMMON, **options))
    from trl.trainer.dpo_trainer import DataCollatorForPreference
    batch = DataCollatorForPreference(pad_token_id=0)(
        [dict(prompt_ids=p, chosen_ids=c, rejected_ids=r) for p, (c, r) in GROUPS])
    loss = trainer._compute_loss(trainer.model.eval(), batch, False)
    loss.backward()
    metrics = {name: values[-1] for name, values in trainer._metrics["eval"].items()}
    return loss.item(), trainer.model, metrics


SMOOTHED = {"robust": 0.1, "exo": 0.1}
OF_DPO = ["sigmoid", "sigmoid_norm", "robust", "hinge", "ipo", "exo", "nca", "bco", "sppo", "apo_zero", "apo_down",
          "discopop"]


@pytest.mark.parametrize("name", OF_DPO)
def test_a_loss_its_gradients_and_metrics_are_those_of_dpotrainer(folder, tmp_path, name):
    e = SMOOTHED.get(name, 0.0)
    theirs, their, their_metrics = dpo_trainer(folder, tmp_path, [THEIRS.get(name, name)], label_smoothing=e)
    loss, model, metrics = ours(folder, {name: 1.0}, {**OPTIONS, "label_smoothing": e})
    assert loss == pytest.approx(theirs, rel=1e-5, abs=1e-5)
    assert_same_gradients(model, their)
    for key in metrics:
        assert metrics[key] == pytest.approx(their_metrics[key], rel=1e-4, abs=1e-4), key
    assert len(metrics) == 10


def test_weighted_losses_with_the_sft_term_are_theirs(folder, tmp_path):
    theirs, their, _ = dpo_trainer(folder, tmp_path, ["sigmoid", "ipo", "sft"], loss_weights=[1.0, 0.5, 0.2])
    loss, model, _ = ours(folder, {"sigmoid": 1.0, "ipo": 0.5}, OPTIONS, sft=0.2)
    assert loss == pytest.approx(theirs, rel=1e-5)
    assert_same_gradients(model, their)


def test_conservative_dpo_is_cpos_smoothed_sigmoid_of_log_ratios():
    from trl.experimental.cpo import CPOTrainer
    a, b = -5 * torch.rand(2, 6)
    state = types.SimpleNamespace(alpha=0.0, beta=0.3, loss_type="sigmoid", label_smoothing=0.2,
                                  accelerator=types.SimpleNamespace(device="cpu"))
    torch.testing.assert_close(dpo.sigmoid(a, b, 0.3, 0.2), CPOTrainer.cpo_loss(state, a, b)[0])


@pytest.mark.parametrize("names", [("policy", "reference"), ("reference", "policy")])   # the mean ratio's sign turns
def test_kto_is_that_of_ktotrainer_where_the_divergence_is_clamped_and_where_it_is_not(folder, tmp_path, names):
    groups = [(p, [answers[i % 2]]) for i, (p, answers) in enumerate(GROUPS)]
    labels = [True, False, True, True]
    rows = [dict(prompt_ids=p, completion_ids=c, KL_completion_ids=groups[i - 1][1][0], label=label)
            for i, ((p, [c]), label) in enumerate(zip(groups, labels))]
    trainer = trl.KTOTrainer(
        model=their_model(folder, names[0]), ref_model=their_model(folder, names[1]), processing_class=tokenizer(),
        train_dataset=datasets.Dataset.from_list([dict(prompt=text(p), completion=text(c), label=label)
                                                  for (p, [c]), label in zip(groups, labels)]),
        args=trl.KTOConfig(output_dir=str(tmp_path), beta=0.3, desirable_weight=1.3, undesirable_weight=0.7,
                           per_device_train_batch_size=4, **COMMON))
    from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference
    loss = trainer._compute_loss(trainer.model.eval(), DataCollatorForUnpairedPreference(0)(rows), False)
    loss.backward()

    data = Thumbs.__new__(Thumbs)
    data.prompts, data.completions = [p for p, _ in groups], [a[0] for _, a in groups]
    packed = pack(data.mismatched(range(4), range(4), 64))
    policy, reference = (GPT.load(str(folder / name)) for name in names)
    raw = (dpo.answer_logps(policy, packed) - dpo.answer_logps(reference, packed)).mean().item()
    assert (raw > 0) == (names[0] == "reference")
    kl = max(0.0, raw)
    assert kl == pytest.approx(trainer._metrics["eval"]["kl"][-1], abs=1e-4)
    packed = pack(groups)
    logp_A = -packed.by_answer(policy(packed.ids, packed.targets, **packed.layout)).sum(1)
    mean = dpo.loss_sum({"kto": 1.0}, logp_A, dpo.answer_logps(reference, packed), packed.lengths,
                        torch.tensor(labels), kl, OPTIONS) / 4
    mean.backward()
    assert mean.item() == pytest.approx(loss.item(), abs=1e-5)
    assert_same_gradients(policy, trainer.model)


def experimental(kind, folder, out, **options):
    from trl.experimental import cpo, orpo
    trainer, config = {"orpo": (orpo.ORPOTrainer, orpo.ORPOConfig), "cpo": (cpo.CPOTrainer, cpo.CPOConfig)}[kind]
    rows = [dict(prompt=text(p) + " ", chosen=text(c[:-1] if c[-1] == 2 else c), rejected=text(r[:-1]))
            for p, (c, r) in GROUPS]
    trainer = trainer(model=their_model(folder, "policy"), processing_class=tokenizer(),
                      train_dataset=datasets.Dataset.from_list(rows),
                      args=config(output_dir=str(out), beta=0.3, per_device_train_batch_size=4, max_length=64,
                                  **COMMON, **options))
    batch = next(iter(trainer.get_train_dataloader()))
    loss, metrics = trainer.get_batch_loss_metrics(trainer.model.eval(), batch)
    loss.backward()
    return loss.item(), trainer.model, {name: float(x) for name, x in metrics.items()}, batch


def groups_of(batch):
    """The groups that their batch holds, by its own labels."""
    groups = []
    for i in range(len(batch["chosen_labels"])):
        answers = []
        for side in ("chosen", "rejected"):
            ids, labels = (batch[f"{side}_{what}"][i] for what in ("input_ids", "labels"))
            answers.append(labels[labels != -100].tolist())
            prompt = ids[:(labels != -100).nonzero()[0].item()].tolist()
        groups.append((prompt, answers))
    return groups


def test_orpo_is_that_of_orpotrainer(folder, tmp_path):
    theirs, their, their_metrics, batch = experimental("orpo", folder, tmp_path)
    loss, model, metrics = ours(folder, {"orpo": 1.0}, OPTIONS, groups_of(batch), orpo=True)
    assert loss == pytest.approx(theirs, rel=1e-5)
    assert_same_gradients(model, their)
    for name in ("log_odds_ratio", "log_odds_chosen"):
        assert metrics[name] == pytest.approx(their_metrics[name], rel=1e-4)


@pytest.mark.parametrize("name, options, sft", [
    ("cpo", dict(loss_type="sigmoid"), 1.0),
    ("cpo", dict(loss_type="sigmoid", label_smoothing=0.2, cpo_alpha=0.5), 0.5),
    ("simpo", dict(loss_type="simpo", cpo_alpha=0.0, simpo_gamma=0.7), 0.0)])
def test_cpo_and_simpo_are_those_of_cpotrainer(folder, tmp_path, name, options, sft):
    theirs, their, _, batch = experimental("cpo", folder, tmp_path, **options)
    own = {key: value for key, value in options.items() if key in OPTIONS}
    loss, model, _ = ours(folder, {name: 1.0}, OPTIONS | own, groups_of(batch), sft=sft)
    assert loss == pytest.approx(theirs, rel=1e-5)
    assert_same_gradients(model, their)
