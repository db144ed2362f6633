#!/usr/bin/env bash
# From nothing to a model that answers, offline but for the package index: the Python standard library of this machine
# becomes a tokenizer, tokens and a base model; questions that tasks.py makes up teach it to answer; a reward model, DPO,
# PPO and GRPO improve it, and one table scores every stage. Run again, it goes on from what is there.
#   bash runs/demo.sh [SEED]         another seed writes to out/demo-SEED
requirements="requirements.txt"
source "$(dirname "$0")/setup.sh"
demo=out/demo${1:+-$1}
seed=${1:-1337}
out=$demo
source "$(dirname "$0")/stages.sh"

mkdir -p $demo
if [ ! -e $demo/text/train.h5 ]; then
    python data.py --sources=stdlib --vocab_size=4096 --out_dir=$demo/text
fi
stage pretrain pretrain.py config/demo.py --data=$demo/text

# six in ten demonstrations make one systematic mistake on purpose, so that the stages after this one have room
if [ ! -e $demo/chats/train.h5 ]; then
    python data.py --kind=chats --sources=task:sorting --task_examples=8000 --flawed=0.6 --seed=$seed \
        --tokenizer=$demo/pretrain --context=256 --out_dir=$demo/chats --show=2
fi
stage sft sft.py config/sft_demo.py --init_from=$demo/pretrain --data=$demo/chats

if [ ! -e $demo/pairs/train.jsonl ]; then
    printf '\n== pairs, sampled from the finetuned model and ranked by the verifier\n'
    python data.py --kind=pairs --from_model=$demo/sft --task=sorting --questions=1600 --samples=4 --keep=each --val_fraction=0.1 \
        --seed=$seed --out_dir=$demo/pairs --show=2
fi
stage reward reward.py config/reward_demo.py --init_from=$demo/sft --data=$demo/pairs
stage dpo dpo.py config/dpo_demo.py --init_from=$demo/sft --data=$demo/pairs
stage ppo ppo.py config/ppo_demo.py --init_from=$demo/sft
stage grpo grpo.py config/grpo_demo.py --init_from=$demo/sft

printf '\n== evaluation on test questions\n'
trained=$demo/sft,$demo/dpo,$demo/ppo,$demo/grpo
score="python eval.py --append=$demo/table.jsonl --mode=chat --tasks=sorting --max_new_tokens=48"
$score --model=$demo/pretrain --limit=200 > $demo/eval.txt             # it answers nothing, at length
$score --model=$trained --limit=1000 >> $demo/eval.txt
$score --model=$trained --limit=100 --samples=8 --temperature=1 >> $demo/eval.txt
python eval.py --append=$demo/table.jsonl --model=$demo/pretrain,$trained --tasks=bpb --text=python=$demo/text \
    --max_text_bytes=100000 >> $demo/eval.txt
python runs/demo.py $demo

echo "talk to it:   source .venv/bin/activate; python chat.py --model=$demo/grpo"
echo "begin again:  delete $demo;   every option of a stage: python grpo.py --help"
