"""Our directories open in transformers and theirs here: logits, greedy generations, tokenizer ids, chat templates."""
import gzip
import itertools
import json
import os
from collections import Counter

import pytest
import torch

import chats
import engine
import formats
from model import GPT, Config, ScalarHead
from tokenizer import Tokenizer

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
DATA = os.environ.get("ZERO2CHAT_DATA", os.path.join(os.path.dirname(ROOT), "shared", "data"))
VOCAB = 512
transformers = pytest.importorskip("transformers")


def randomise(model, seed=0):
    torch.manual_seed(seed)
    for p in model.parameters():
        torch.nn.init.normal_(p, mean=1.0 if p.dim() == 1 else 0.0, std=0.15)
    return model


def config(qk_norm, tied, group, **changes):
    shape = dict(vocab_size=VOCAB, n_layer=2, n_head=4, n_kv_head=4 // group, n_embd=64, n_hidden=96, context=256,
                 qk_norm=qk_norm, tied=tied, eos_id=VOCAB - 8, pad_id=VOCAB - 7, rope_theta=5000.0)
    return Config(**shape | changes)


def ids(B=2, T=40, seed=1):
    return torch.randint(0, VOCAB - 8, (B, T), generator=torch.Generator().manual_seed(seed))


def our_logits(model, tokens):
    with torch.no_grad():
        return model.logits(model.forward_hidden(tokens))


def their_logits(model, tokens):
    with torch.no_grad():
        return model.eval()(tokens).logits


KINDS = [(qk_norm, tied, group) for qk_norm in (False, True) for tied in (False, True) for group in (1, 2, 4)]
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}


def load_theirs(path):
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def assert_equal(path, theirs):
    """The directory, opened here, gives their model's logits."""
    torch.testing.assert_close(our_logits(GPT.load(str(path)), ids()), their_logits(theirs, ids()), atol=1e-4, rtol=0)


@pytest.mark.parametrize("qk_norm, tied, group", KINDS)
def test_our_directory_gives_the_same_logits_and_generations_in_transformers(qk_norm, tied, group, tmp_path):
    ours = randomise(GPT(config(qk_norm, tied, group)))
    ours.save(str(tmp_path))
    theirs = load_theirs(tmp_path)
    assert type(theirs).__name__ == ("Qwen3ForCausalLM" if qk_norm else "LlamaForCausalLM")
    torch.testing.assert_close(our_logits(ours, ids()), their_logits(theirs, ids()), atol=1e-4, rtol=0)

    prompts = [row[:n].tolist() for row, n in zip(ids(4, 12, seed=2), (12, 5, 9, 1))]
    samples = engine.generate(ours, prompts, max_new_tokens=64, temperature=0)
    for prompt, sample in zip(prompts, samples):
        out = theirs.generate(torch.tensor([prompt]), max_new_tokens=64, do_sample=False,
                              suppress_tokens=[ours.config.pad_id])
        assert sample.tokens == out[0, len(prompt):].tolist()


@pytest.mark.parametrize("qk_norm, tied, group", KINDS)
def test_their_directory_gives_the_same_logits_here(qk_norm, tied, group, tmp_path):
    kind = "Qwen3" if qk_norm else "Llama"
    hf = config(qk_norm, tied, group).to_hf()
    theirs = getattr(transformers, kind + "ForCausalLM")(getattr(transformers, kind + "Config").from_dict(hf))
    randomise(theirs).save_pretrained(tmp_path)
    assert_equal(tmp_path, theirs)


def test_their_sharded_directory_opens_here(tmp_path):
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig.from_dict(config(False, False, 2).to_hf()))
    randomise(theirs).save_pretrained(tmp_path, max_shard_size="100KB")
    assert not (tmp_path / "model.safetensors").exists() and (tmp_path / "model.safetensors.index.json").exists()
    assert_equal(tmp_path, theirs)


def test_their_bf16_directory_opens_here_with_the_same_weights(tmp_path):
    theirs = transformers.Qwen3ForCausalLM(transformers.Qwen3Config.from_dict(config(True, True, 2).to_hf()))
    randomise(theirs).to(torch.bfloat16).save_pretrained(tmp_path)
    assert GPT.load(str(tmp_path)).lm_head.weight.dtype == torch.float32
    assert_equal(tmp_path, load_theirs(tmp_path))


def test_llama_3s_stretched_rotary_frequencies_in_both_directions(tmp_path):
    """Over a context longer than the original one, where all three bands of wavelengths matter."""
    tokens = ids(1, 200)
    ours = randomise(GPT(config(False, False, 2, rope_scaling=LLAMA3)))
    ours.save(str(tmp_path / "ours"))
    theirs = load_theirs(tmp_path / "ours")
    torch.testing.assert_close(our_logits(ours, tokens), their_logits(theirs, tokens), atol=1e-4, rtol=0)
    plain = randomise(GPT(config(False, False, 2)))
    assert (our_logits(plain, tokens) - our_logits(ours, tokens)).abs().max() > 0.01

    hf = config(False, False, 2).to_hf() | {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5000.0, **LLAMA3}}
    hf.pop("rope_theta")
    theirs = randomise(transformers.LlamaForCausalLM(transformers.LlamaConfig.from_dict(hf)))
    theirs.save_pretrained(tmp_path / "theirs")
    torch.testing.assert_close(our_logits(GPT.load(str(tmp_path / "theirs")), tokens), their_logits(theirs, tokens),
                               atol=1e-4, rtol=0)


def test_stop_ids_of_a_chat_model_survive_the_way_through_transformers(tmp_path):
    ours = randomise(GPT(config(True, False, 1, end_ids=(VOCAB - 5,))))
    ours.save(str(tmp_path / "ours"))
    theirs = load_theirs(tmp_path / "ours")
    assert set(theirs.generation_config.eos_token_id) == {VOCAB - 5, VOCAB - 8}
    theirs.save_pretrained(tmp_path / "theirs")
    assert set(GPT.load(str(tmp_path / "theirs")).config.stop_ids) == {VOCAB - 5, VOCAB - 8}
    assert GPT.load(str(tmp_path / "ours")).config.end_ids == (VOCAB - 5,)


@pytest.mark.parametrize("qk_norm", [False, True])
def test_a_scalar_head_opens_as_sequence_classification_with_one_label(qk_norm, tmp_path):
    ours = randomise(ScalarHead(config(qk_norm, False, 2)))
    ours.save(str(tmp_path))
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype=torch.float32)
    assert theirs.config.num_labels == 1
    with torch.no_grad():
        torch.testing.assert_close(ours(ids())[:, -1:], theirs.eval()(ids()).logits, atol=1e-4, rtol=0)
        theirs.save_pretrained(tmp_path / "theirs")
        torch.testing.assert_close(ScalarHead.load(str(tmp_path / "theirs"))(ids()), ours(ids()))


# --- tokenizer ---

@pytest.fixture(scope="module")
def lines():
    path = os.path.join(DATA, "text", "books_standardebooks.part.jsonl.gz")
    if not os.path.exists(path):
        pytest.skip(f"needs {path}; name the folder of the data with ZERO2CHAT_DATA")
    with gzip.open(path, "rt", encoding="utf-8") as f:
        texts = [json.loads(line)["text"] for line, _ in zip(f, range(60))]
    return [line for text in texts for line in text.splitlines()][:2000]


def test_ids_of_2000_lines_of_real_text_are_transformers(lines, tmp_path):
    assert len(lines) == 2000
    ours = Tokenizer.train(lines, 1500)
    ours.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    encoded = theirs(lines, add_special_tokens=False)["input_ids"]
    assert [array.tolist() for array in ours.encode_batch(lines)] == encoded
    assert [ours.decode(row) for row in encoded] == lines


def test_chat_templates_give_the_ids_and_trained_tokens_of_500_real_conversations(tmp_path):
    folders = {name: os.path.join(DATA, *name.split("/")) for name in
               ("oasst1/en-validation.threads.jsonl.gz", "alpaca/alpaca_data.jsonl.gz", "dolly/dolly_3k.jsonl.gz")}
    for path in (path for path in folders.values() if not os.path.exists(path)):
        pytest.skip(f"needs {path}; name the folder of the data with ZERO2CHAT_DATA")
    talk = []
    for path, count in zip(folders.values(), (250, 125, 125)):
        [source] = formats.parse_chats(path)
        talk += [messages for messages, *_ in itertools.islice(source.chats(Counter()), count)]
    assert len(talk) == 500 and sum(len(messages) > 3 for messages in talk) > 50
    tokenizer = Tokenizer.train([message["content"] for messages in talk for message in messages], 1500)
    tokenizer.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for messages, (ids, mask) in zip(talk, chats.encode_chats(tokenizer, talk), strict=True):   # as data.py does
        both = theirs.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        assert ids.tolist() == both["input_ids"] and mask.tolist() == both["assistant_masks"]
        assert (ids.tolist(), mask.tolist()) == tokenizer.encode_chat(messages)


def test_chat_templates_render_the_same_string_ids_and_trained_tokens(lines, tmp_path):
    tokenizer = Tokenizer.train(lines, 1500)
    tokenizer.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    talk = [[{"role": role, "content": text} for role, text in zip(("user", "assistant") * 3, lines[i:i + turns])]
            for i in range(0, 400, 8) for turns in (1, 2, 5)]
    talk += [[{"role": "system", "content": lines[9]}, *messages] for messages in talk[:20]]
    talk += [[{"role": "user", "content": " naïve\n\n 你好 👩‍🚀 "}, {"role": "assistant", "content": ""}],
             [{"role": "user", "content": "2+2?"},
              {"role": "assistant", "content": "<think>\n2+2=4\n</think><answer>4</answer>"}]]
    for messages in talk:
        for open_answer in (False, True):
            text = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=open_answer)
            assert tokenizer.chat_text(messages, open_answer) == text
            ids, mask = tokenizer.encode_chat(messages, open_answer)
            both = theirs.apply_chat_template(messages, return_dict=True, add_generation_prompt=open_answer,
                                              return_assistant_tokens_mask=True)
            assert list(ids) == both["input_ids"]
            assert list(mask) == both.get("assistant_masks", [0] * len(ids))
