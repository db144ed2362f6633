#!/usr/bin/env bash
# What GRPO makes of countdown and of GSM8K at 5M parameters, three seeds each: accuracy and format on dev questions
# over the steps, after finetuning on the tasks' worked answers.
#   bash runs/curves.sh out/rewards/pretrain path/to/gsm8k           (a base model, such as that of runs/rewards.sh)
requirements="requirements.txt"
source "$(dirname "$0")/setup.sh"
if [ $# -ne 2 ]; then
    echo "usage: bash runs/curves.sh BASE_MODEL GSM8K_FOLDER" >&2
    exit 1
fi
out=out/curves base=$1 gsm8k=$2
source runs/stages.sh
mkdir -p $out

for task in countdown gsm8k; do
    seed=1337 source=task:$task flags="--max_new_tokens=64"
    [ $task = gsm8k ] && source=task:gsm8k:$gsm8k flags="--path=$gsm8k --max_new_tokens=160 --too_long=drop"
    [ -e $out/$task-chats/train.h5 ] || python data.py --kind=chats --sources=$source --task_examples=6000 \
        --tokenizer=$base --context=512 --out_dir=$out/$task-chats
    stage $task-sft sft.py --init_from=$base --data=$out/$task-chats --context=512 --rows_per_step=8 --max_steps=100 \
        --lr=1e-3 --eval_every=50
    for seed in 1337 1 2; do
        stage $task-$seed grpo.py --init_from=$out/$task-sft --tasks=$task $flags --rewards=verifier=1,format=0.1 \
            --questions_per_step=16 --max_steps=20 --eval_every=10 --eval_questions=100 --pass_k=0 --samples=1
    done
done
python runs/curves.py $out
