"""packing.py: prompts and their answers in one row."""
import pytest
import torch

from lora import add
from model import GPT, Config, ScalarHead
from packing import pack
from plain_attention import Documents

SIZE = dict(vocab_size=61, n_layer=2, n_head=4, n_kv_head=2, n_embd=32, context=64)
GROUPS = [([5, 6, 7, 8], [[1, 2, 3], [9], [4, 4, 4, 4, 4, 4]]), ([11], [[12, 13]]), ([20, 21], [[22] * 17, [23, 2]]),
          (list(range(30, 60)), [[3, 1]])]
PAIRS = [(prompt, answer) for prompt, answers in GROUPS for answer in answers]


@pytest.fixture(params=["tied", "untied", "float64"])
def model(request):
    torch.manual_seed(0)
    model = GPT(Config(**SIZE, tied=request.param == "tied"))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    if request.param == "float64":
        model.double()
        model.model.dtype = torch.float64
    return model


def alone(model, prompt, answer):
    """Log-probabilities of an answer's tokens after its prompt, in a row of their own."""
    ids = torch.tensor([prompt + answer])
    return torch.log_softmax(model.logits(model.forward_hidden(ids)), -1)[0, len(prompt) - 1:-1].gather(
        -1, torch.tensor(answer)[:, None]).squeeze(-1)


def test_log_probabilities_equal_those_of_each_answer_alone(model):
    packed = pack(GROUPS)
    logp_AL = -packed.by_answer(model(packed.ids, packed.targets, **packed.layout))
    assert logp_AL.shape == packed.mask.shape == (len(PAIRS), 17)
    for logp_L, mask_L, (prompt, answer) in zip(logp_AL, packed.mask, PAIRS):
        assert mask_L.sum() == len(answer) and not logp_L[len(answer):].any()
        torch.testing.assert_close(logp_L[:len(answer)].float(), alone(model, prompt, answer).float(), atol=2e-5,
                                   rtol=1e-5)


def test_gradients_equal_those_of_each_answer_alone(model):
    weights_AL = torch.randn(len(PAIRS), 17, generator=torch.Generator().manual_seed(1))
    packed = pack(GROUPS)
    (packed.by_answer(model(packed.ids, packed.targets, **packed.layout)) * weights_AL).sum().backward()
    together = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    (-sum((alone(model, *pair) * weights[:len(pair[1])]).sum() for pair, weights in zip(PAIRS, weights_AL))).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(together[name], parameter.grad, atol=1e-4, rtol=1e-4, msg=name)


def test_adapters_take_the_same_row(model):
    add(model, 2, 4, "all")
    packed = pack(GROUPS)
    packed.by_answer(model(packed.ids, packed.targets, **packed.layout)).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_a_prompt_stands_in_the_row_once_but_for_its_last_token():
    packed = pack(GROUPS)
    assert packed.ids.size(1) == sum(len(p) - 1 + sum(len(a) + 1 for a in answers) for p, answers in GROUPS)
    assert packed.ids[0, packed.last].tolist() == [answer[-1] for _, answer in PAIRS]
    assert packed.lengths.tolist() == [len(answer) for _, answer in PAIRS]
    assert packed.positions[0, packed.last].tolist() == [len(prompt) + len(answer) - 1 for prompt, answer in PAIRS]


def test_a_scalar_head_reads_an_answers_last_token_as_in_a_row_of_its_own():
    torch.manual_seed(0)
    head = ScalarHead(Config(**SIZE))
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    packed = pack(GROUPS)
    scores_A = head(packed.ids, **packed.layout)[0, packed.last]
    torch.testing.assert_close(scores_A, torch.stack([head(torch.tensor([p + a]))[0, -1] for p, a in PAIRS]),
                               atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("groups", [[([], [[1]])], [([1], [[]])], [([1], [])]])
def test_nothing_to_predict_is_refused(groups):
    with pytest.raises(ValueError, match="at least one token"):
        pack(groups)


def test_a_token_of_no_document_is_refused():
    with pytest.raises(ValueError, match="1 of 3 tokens"):
        Documents([torch.arange(2).numpy()], 3, "cpu")
