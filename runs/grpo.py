"""GRPO on GSM8K's questions: seconds a step of grpo.py beside trl's GRPOTrainer, in turn; peak memory of each.

    python runs/grpo.py all GSM8K_TRAIN [ROUNDS]
    python runs/grpo.py ours 0.04 0             one entry: beta; groups a forward pass of the update, 0: all
    python runs/grpo.py trl 0.04 16             one entry: beta; answers a forward pass of the update, 64: all

Random weights, the same for both (6 layers, 384 wide, 6 heads, 4,096 pieces, 13.8M parameters, context 512), bf16 and
AdamW in both. A step asks the same 8 questions in both, samples 8 answers to each, all of 64 tokens (nothing ends one
in either), and makes one update of them. The first two steps warm up; memory is the most that the process has held.
"""
import functools
import json
import os
import resource
import runpy
import statistics
import subprocess
import sys
import time

import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
WORK = "out/grpo_speed"
PROMPTS = f"{WORK}/prompts.jsonl"
CONTEXT, STEPS, WARMUP = 512, 10, 2
P, G, NEW = 8, 8, 64
LR, SEED = 1e-4, 1337


def vowels(completions, **_):
    """A reward that costs nothing, differs within every group and is the same for both: the answer's vowels."""
    texts = [given if isinstance(given, str) else given[0]["content"] for given in completions]
    return [sum(map(text.count, "aeiou")) / NEW for text in texts]


def setup(gsm8k):
    from generate import save_random_model

    from sources import json_rows
    from tokenizer import Tokenizer
    questions = [row["question"] for row, _, _ in json_rows(gsm8k, "error", {})]
    with open(PROMPTS, "w") as f:
        f.writelines(json.dumps({"prompt": question}) + "\n" for question in questions)
    model = save_random_model(Tokenizer.train(questions, 4096), f"{WORK}/model")
    model.config.context = CONTEXT
    model.save(f"{WORK}/model")


def measured(steps, rollouts, computed, lengths):
    """What an entry prints: lists of seconds, tokens that a step's update computes, of all and of each answer."""
    assert set(lengths) == {NEW}, f"answers of {min(lengths)} to {max(lengths)} tokens"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 2 ** 10)
    return dict(steps=steps[WARMUP:], rollouts=rollouts[WARMUP:], tokens=sum(computed) / len(steps), memory=peak / 1e9)


def ours(beta, micro="0"):
    """grpo.py as it is, but for sampling, which stops at no token: it has no option for that."""
    import engine
    import rollouts
    computed, pack = [], rollouts.pack

    def counted(groups, device):
        packed = pack(groups, device)
        computed.append(packed.ids.numel())
        return packed

    rollouts.pack, engine.generate = counted, functools.partial(engine.generate, stop=())
    sys.argv = ["grpo.py", f"--init_from={WORK}/model", f"--out_dir={WORK}/ours", "--overwrite=true",
                f"--tasks={PROMPTS}", "--too_long=drop", f"--rewards={os.path.abspath(__file__)}:vowels",
                f"--questions_per_step={P}", f"--group_size={G}", f"--rollout_batch={P * G}", f"--seed={SEED}",
                f"--max_new_tokens={NEW}", "--dtype=bf16", f"--beta={beta}", f"--micro_questions={micro}", f"--lr={LR}",
                "--warmup_steps=0", f"--max_steps={STEPS}", "--eval_every=1000", "--eval_questions=1", "--pass_k=0",
                "--samples=0", "--curves=false"]
    silently(runpy.run_path, "grpo.py", run_name="__main__")
    with open(f"{WORK}/ours/log.jsonl") as log:
        records = [record for record in map(json.loads, log) if "loss" in record]
    lengths = [record[f"completions/{kind}_length"] for record in records for kind in ("min", "max")]
    steps, sampling = ([record[name] for record in records] for name in ("step_time", "rollout_seconds"))
    return measured(steps, sampling, computed, lengths)


def trl(beta, batch="64", dtype="bf16"):
    """GRPOTrainer on the same questions in order, `batch` answers a forward pass of the update."""
    import datasets
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from rollouts import Questions
    from tokenizer import Tokenizer
    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    questions = Questions(PROMPTS, "train", SEED, Tokenizer.load(f"{WORK}/model"), context=CONTEXT, max_new_tokens=NEW,
                          too_long="drop")
    asked = [question for step in range(STEPS) for question in questions(step, P)]
    tokenizer = AutoTokenizer.from_pretrained(f"{WORK}/model")
    theirs = tokenizer.apply_chat_template([question.messages for question in asked], add_generation_prompt=True)
    assert theirs["input_ids"] == [question.prompt_ids for question in asked], "trl's prompts are others than ours"
    steps, rollouts, computed, lengths = [], [], [], []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__):
            self.begin = time.perf_counter()

        def on_step_end(self, *_, **__):
            steps.append(time.perf_counter() - self.begin)

    class Counted(GRPOTrainer):
        def _generate(self, *arguments):
            begin = time.perf_counter()
            generated = super()._generate(*arguments)
            rollouts.append(time.perf_counter() - begin)
            return generated

        def _get_per_token_logps_and_entropies(self, model, input_ids, *arguments, **options):
            if torch.is_grad_enabled():
                computed.append(input_ids.numel())
            return super()._get_per_token_logps_and_entropies(model, input_ids, *arguments, **options)

        def log(self, logs, *arguments, **options):
            super().log(logs, *arguments, **options)
            lengths.extend(value for name, value in logs.items() if name in ("completions/min_length",
                                                                             "completions/max_length"))

    batch = int(batch)
    config = GRPOConfig(output_dir=f"{WORK}/trl", report_to="none", bf16=dtype == "bf16", use_cpu=True, max_steps=STEPS,
                        gradient_checkpointing=False, save_strategy="no", disable_tqdm=True, logging_steps=1,
                        per_device_train_batch_size=batch, gradient_accumulation_steps=P * G // batch,
                        num_generations=G, max_completion_length=NEW, beta=float(beta), shuffle_dataset=False,
                        learning_rate=LR, lr_scheduler_type="constant", adam_beta2=0.95, weight_decay=0.0,
                        max_grad_norm=1.0)
    model = AutoModelForCausalLM.from_pretrained(f"{WORK}/model", dtype=torch.float32)
    trainer = Counted(model=model, args=config, reward_funcs=vowels, processing_class=tokenizer, callbacks=[Clock()],
                      train_dataset=datasets.Dataset.from_list([{"prompt": question.messages} for question in asked]))
    for place in (model.generation_config, trainer.generation_config):      # no stop, and nothing to compute for it
        place.eos_token_id = None
    trainer.generation_kwargs["eos_token_id"], trainer.eos_token_ids = None, [-1]
    silently(trainer.train)
    return measured(steps, rollouts, computed, lengths)


def silently(function, *arguments, **options):
    with open(os.devnull, "w") as silent:
        sys.stdout, before = silent, sys.stdout
        function(*arguments, **options)
        sys.stdout = before


def entry(*arguments):
    output = subprocess.run([sys.executable, __file__, *arguments], cwd=ROOT, capture_output=True, text=True)
    if output.returncode:
        raise SystemExit(f"{' '.join(arguments)} failed:\n{output.stderr}")
    return json.loads(output.stdout.splitlines()[-1])


def main(gsm8k, rounds=1):
    os.makedirs(WORK, exist_ok=True)
    setup(gsm8k)
    for i in range(int(rounds)):
        for beta in ("0", "0.04"):
            print(f"round {i}, beta {beta}: seconds a step, median and best")
            found = {}
            for name, what, size in (("trl, 64 answers at once", "trl", "64"), ("trl, 16 at once", "trl", "16"),
                                     ("ours, all groups at once", "ours", "0"), ("ours, 2 at once", "ours", "2")):
                result = entry(what, beta, size)
                median, best = statistics.median(result["steps"]), min(result["steps"])
                found.setdefault(what, []).append((median, best, result["memory"]))
                print(f"  {name}: {median:.2f} and {best:.2f} ({statistics.median(result['rollouts']):.2f} of them the "
                      f"rollout), {result['memory']:.2f} GB; the update computes {result['tokens']:,.0f} tokens for "
                      f"{P * G * NEW:,} of answers", flush=True)
            least = {what: [min(column) for column in zip(*rows)] for what, rows in found.items()}
            ratios = [mine / theirs for mine, theirs in zip(least["ours"], least["trl"])]
            print("  ours / trl, each at its lowest: median {:.2f}, best {:.2f}, memory {:.2f}".format(*ratios),
                  flush=True)


if __name__ == "__main__":
    what, *arguments = sys.argv[1:] or ["help"]
    if what == "all" and arguments:
        main(*arguments)
    elif what in ("ours", "trl") and arguments:
        print(json.dumps(globals()[what](*arguments)))
    else:
        raise SystemExit("usage: bash runs/grpo.sh GSM8K_TRAIN_JSONL [ROUNDS]")
