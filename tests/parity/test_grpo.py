"""GRPO and RLOO: loss and gradient of every form equal trl's on fixed rollouts, from the same weights."""
import pytest
import torch

import grpo
from model import GPT, Config
from packing import pack

trl = pytest.importorskip("trl")
transformers = pytest.importorskip("transformers")
P, G, LONGEST, PAD = 3, 4, 9, 0
ADVANTAGE_A = torch.tensor([1.2, -0.4, 0.3, -1.1, 0.0, 0.0, 0.0, 0.0, -0.7, 0.9, 0.5, -0.7])
TRUNCATED = (1, 6, 10)              # answers without an end
BOUNDS = dict(clip_low=0.2, clip_high=0.25, cispo_cap=1.1)


def rollout():
    """Ragged prompts, each with G ragged answers."""
    generator = torch.Generator().manual_seed(3)

    def ids(low, high):
        length = torch.randint(low, high, (1,), generator=generator).item()
        return torch.randint(3, 60, (length,), generator=generator).tolist()
    return [(ids(2, 7), [ids(1, LONGEST + 1) for _ in range(G)]) for _ in range(P)]


GROUPS = rollout()
ANSWERS = [answer for _, answers in GROUPS for answer in answers]


def padded(rows, left=False):
    longest = max(map(len, rows))
    fill = [[PAD] * (longest - len(row)) for row in rows]
    ones = [[1] * len(row) for row in rows]
    order = (lambda row, more: more + row) if left else (lambda row, more: row + more)
    return (torch.tensor([order(row, more) for row, more in zip(rows, fill)]),
            torch.tensor([order(row, [0] * len(more)) for row, more in zip(ones, fill)]))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Our model and theirs, of the same weights."""
    folder = str(tmp_path_factory.mktemp("grpo"))
    torch.manual_seed(0)
    ours = GPT(Config(64, n_layer=2, n_head=2, n_embd=32, context=64, eos_id=1, pad_id=PAD, qk_norm=False))
    for p in ours.parameters():
        torch.nn.init.normal_(p, mean=1.0 if p.dim() == 1 else 0.0, std=0.2)
    ours.save(folder)
    return ours, folder


def trainer(kind, folder, tmp_path, **options):
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    vocabulary = {"<pad>": 0, "<eos>": 1, "<unk>": 2, **{f"w{i}": i for i in range(3, 64)}}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>")), pad_token="<pad>",
        eos_token="<eos>", unk_token="<unk>")
    config = getattr(trl, kind + "Config")(
        output_dir=str(tmp_path), report_to="none", bf16=False, use_cpu=True, gradient_checkpointing=False,
        save_strategy="no", disable_tqdm=True, num_generations=G, per_device_train_batch_size=P * G,
        max_completion_length=LONGEST, epsilon=BOUNDS["clip_low"], epsilon_high=BOUNDS["clip_high"],
        **{"temperature": 1.0, **options})
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return getattr(trl, kind + "Trainer")(
        model=theirs, args=config, processing_class=tokenizer, reward_funcs=lambda completions, **_: [0.0],
        train_dataset=Dataset.from_dict({"prompt": ["w3"] * P}))


def their_inputs(mask_AL):
    prompt_ids, prompt_mask = padded([prompt for prompt, answers in GROUPS for _ in answers], left=True)
    completion_ids, _ = padded(ANSWERS)
    return dict(prompt_ids=prompt_ids, prompt_mask=prompt_mask, completion_ids=completion_ids,
                completion_mask=mask_AL.long(), advantages=ADVANTAGE_A, num_items_in_batch=mask_AL.sum())


def noise(shape, size, seed):
    return size * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def our_pass(model, temperature, masked):
    packed = pack(GROUPS)
    logp_AL = -packed.by_answer(model(packed.ids, packed.targets, temperature=temperature, **packed.layout))
    mask_AL = packed.mask.clone()
    if masked:
        mask_AL[list(TRUNCATED)] = False
    return logp_AL, mask_AL


def our_loss(model, form, old_AL, reference_AL, beta=0.0, kl_correction=True, temperature=1.0, masked=False,
             correction="none", sampler_AL=None):
    """What grpo.py's "gradients" computes."""
    logp_AL, mask_AL = our_pass(model, temperature, masked)
    old_AL = logp_AL.detach() if old_AL is None else old_AL
    ratio = grpo.ratios(logp_AL, old_AL, mask_AL, form)
    loss_AL = grpo.policy_loss(logp_AL, ratio, ADVANTAGE_A, form, **BOUNDS)
    if correction != "none":
        loss_AL = loss_AL * grpo.correction_weights(old_AL, sampler_AL, mask_AL, correction, 1.05)
    if beta:
        kl_AL = grpo.kl_estimate(logp_AL, reference_AL, "k3")
        loss_AL = loss_AL + beta * (kl_AL * ratio if kl_correction else kl_AL)
    tokens = mask_AL.sum().item()
    return (loss_AL * grpo.token_weights(mask_AL, form, P * G, tokens, LONGEST)).sum()


def assert_equal(ours, our_value, theirs, their_value):
    for model, value in ((ours, our_value), (theirs, their_value)):
        model.zero_grad()
        value.backward()
    assert our_value.item() == pytest.approx(their_value.item(), abs=1e-5)
    found, largest = dict(theirs.named_parameters()), 0.0
    for name, p in ours.named_parameters():
        torch.testing.assert_close(p.grad, found[name].grad, atol=1e-5, rtol=1e-4, msg=name)
        largest = max(largest, p.grad.abs().max().item())
    assert largest > 1e-3


THEIR_NAMES = dict(gspo=dict(loss_type="grpo", importance_sampling_level="sequence"))
CASES = [dict(), dict(old=True), dict(old=True, beta=0.3), dict(old=True, beta=0.3, kl_correction=False),
         dict(beta=0.3), dict(old=True, temperature=0.7), dict(old=True, masked=True)]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("form", [form for form in grpo.FORMS if form != "rloo"])
def test_loss_and_gradient_equal_trls(form, case, models, tmp_path):
    ours, folder = models
    case = dict(case)
    masked, temperature, beta = case.pop("masked", False), case.pop("temperature", 1.0), case.get("beta", 0.0)
    corrected = case.get("kl_correction", True)
    with torch.no_grad():
        start_AL, mask_AL = our_pass(ours, temperature, masked)
    old_AL = start_AL + noise(start_AL.shape, 0.3, 1) * mask_AL if case.pop("old", False) else None
    reference_AL = start_AL + noise(start_AL.shape, 0.5, 2) * mask_AL
    names = THEIR_NAMES.get(form, dict(loss_type=form))
    theirs = trainer("GRPO", folder, tmp_path, beta=beta, use_bias_correction_kl=corrected, temperature=temperature,
                     **names)
    if form == "cispo":
        theirs.epsilon_high = BOUNDS["cispo_cap"]           # there the cap itself
    inputs = their_inputs(mask_AL)
    inputs |= {} if old_AL is None else {"old_per_token_logps": old_AL}
    inputs |= {"ref_per_token_logps": reference_AL} if beta else {}
    their_value = theirs._compute_loss(theirs.model.eval(), inputs)
    our_value = our_loss(ours, form, old_AL, reference_AL, beta, corrected, temperature, masked)
    assert_equal(ours, our_value, theirs.model, their_value)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_truncated_importance_correction_equals_trls(level, models, tmp_path):
    ours, folder = models
    theirs = trainer("GRPO", folder, tmp_path, loss_type="dapo")
    with torch.no_grad():
        old_AL, mask_AL = our_pass(ours, 1.0, False)
    sampler_AL = old_AL + noise(old_AL.shape, 0.3, 4) * mask_AL
    log_ratio_AL = (old_AL - sampler_AL) * mask_AL          # as in trl's _generate_and_score_completions, mode truncate
    log_ratio_AL = log_ratio_AL if level == "token" else log_ratio_AL.sum(-1, keepdim=True)
    inputs = their_inputs(mask_AL) | {"old_per_token_logps": old_AL,
                                      "importance_sampling_ratio": log_ratio_AL.exp().clamp(max=1.05)}
    theirs.use_vllm = theirs.vllm_importance_sampling_correction = True
    their_value = theirs._compute_loss(theirs.model.eval(), inputs)
    our_value = our_loss(ours, "dapo", old_AL, None, correction=level, sampler_AL=sampler_AL)
    assert_equal(ours, our_value, theirs.model, their_value)


@pytest.mark.parametrize("given", [False, True])
def test_rloos_loss_and_gradient_equal_trls(given, models, tmp_path):
    ours, folder = models
    theirs = trainer("RLOO", folder, tmp_path, beta=0.0)
    with torch.no_grad():
        start_AL, mask_AL = our_pass(ours, 1.0, False)
    old_AL = start_AL + noise(start_AL.shape, 0.05, 1) * mask_AL if given else start_AL
    inputs = their_inputs(mask_AL) | {"old_logps": (old_AL * mask_AL).sum(1)}
    their_value = theirs._compute_loss(theirs.model.eval(), inputs)
    assert_equal(ours, our_loss(ours, "rloo", old_AL, None), theirs.model, their_value)


REWARD_A = torch.tensor([1.0, 0.0, 0.3, 0.0, 0.5, 0.5, 0.5, 0.5, -1.0, 2.0, 0.0, 0.1])


def their_advantages(theirs, kind, monkeypatch):
    """What trl's own scoring makes of REWARD_A: the outputs of its rollout, with fixed answers."""
    prompts = [prompt for prompt, answers in GROUPS for _ in answers]
    texts = ["w3"] * (P * G)
    given = (prompts, ANSWERS, None, texts, None, {}, None, None) if kind == "GRPO" else (prompts, ANSWERS, texts)
    monkeypatch.setattr(theirs, "_generate", lambda *_, **__: given)
    monkeypatch.setattr(theirs, "_calculate_rewards", lambda *_, **__: REWARD_A[:, None].clone())
    theirs.model.train()
    return theirs._generate_and_score_completions([{"prompt": "w3"} for _ in texts])


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages_equal_trls(scale, models, tmp_path, monkeypatch):
    theirs = trainer("GRPO", models[1], tmp_path, scale_rewards=scale)
    found = their_advantages(theirs, "GRPO", monkeypatch)["advantages"]
    torch.testing.assert_close(grpo.advantages(REWARD_A.view(P, G), scale).flatten(), found, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("normalised", [False, True])
def test_leave_one_out_advantages_equal_rloos(normalised, models, tmp_path, monkeypatch):
    theirs = trainer("RLOO", models[1], tmp_path, beta=0.0, normalize_advantages=normalised)
    found = their_advantages(theirs, "RLOO", monkeypatch)["advantages"]
    ours = grpo.advantages(REWARD_A.view(P, G), "batch" if normalised else "none", leave_one_out=True)
    torch.testing.assert_close(ours.flatten(), found, atol=1e-5, rtol=1e-5)


def test_kl_in_the_reward_equals_rloos(models, tmp_path, monkeypatch):
    ours, folder = models
    theirs = trainer("RLOO", folder, tmp_path, beta=0.5)
    with torch.no_grad():
        for p in theirs.ref_model.parameters():
            p.mul_(0.9)
        theirs.ref_model.save_pretrained(tmp_path / "reference")
        found = their_advantages(theirs, "RLOO", monkeypatch)["advantages"]
        (logp_AL, _), (reference_AL, _) = (our_pass(model, 1.0, False)
                                           for model in (ours, GPT.load(str(tmp_path / "reference"))))
    reward_A = REWARD_A - 0.5 * grpo.kl_estimate(logp_AL, reference_AL, "k1").sum(1)
    assert (reward_A - REWARD_A).abs().max() > 0.1
    expected = grpo.advantages(reward_A.view(P, G), "none", leave_one_out=True).flatten()
    torch.testing.assert_close(expected, found, atol=1e-4, rtol=1e-5)
