#!/usr/bin/env bash
# The whole life cycle on a real machine: public text becomes a base model of 124M or 400M parameters; Alpaca, Dolly and
# GSM8K teach it to answer; HH-RLHF and UltraFeedback train a reward model and DPO, GSM8K trains PPO and GRPO; one table
# scores them all. Run again, it goes on from what is there. docs/pipeline.md: what a step reads, writes and takes.
#   bash runs/pipeline.sh                                       124M parameters on one GPU, data from the hub
#   SIZE=400m NPROC=8 bash runs/pipeline.sh                     400M on eight
#   DATA=FOLDER PRETRAIN_SECONDS=480 STAGE_SECONDS=300 bash runs/pipeline.sh    local files, a small budget
#   DATA=FOLDER SMOKE=1 bash runs/pipeline.sh                   every step cut down to seconds: is all in order?
requirements="requirements.txt"
source "$(dirname "$0")/setup.sh"
SIZE=${SIZE:-124m}                          # 124m or 400m: config/pretrain_$SIZE.py and so on
NPROC=${NPROC:-1}                           # processes, one for each GPU
DATA=${DATA:-}                              # folder with local files, see docs/pipeline.md; empty: the hub
TEXT=${TEXT:-${DATA:+$DATA/text}}           # to pretrain on: sources of data.py, pile, or empty: FineWeb-Edu
TEXT_BYTES=${TEXT_BYTES:-}                  # of it, at most; empty: enough for 20 tokens a parameter
PRETRAIN_SECONDS=${PRETRAIN_SECONDS:-0}     # the decay then ends by the clock; 0: all the steps of the config
STAGE_SECONDS=${STAGE_SECONDS:-0}           # the same for each stage after it
SMOKE=${SMOKE:-}                            # 1: the same configs with tiny models, few rows and two or three steps
seed=${SEED:-1337}
out=${OUT:-out/${SMOKE:+smoke_}$SIZE}       # where everything is written
launch=python
[ "$NPROC" -gt 1 ] && launch="torchrun --standalone --nproc_per_node=$NPROC"
source "$(dirname "$0")/stages.sh"

case $SIZE in
    124m) vocabulary=25600 context=1024 bytes=12000000000 ;;
    400m) vocabulary=47104 context=2048 bytes=38000000000 ;;
    *) echo "SIZE must be 124m or 400m, got $SIZE" >&2; exit 1 ;;
esac
shots=2 held_out=0.001                      # a thousandth of gigabytes is enough to evaluate on
[ -n "$DATA" ] && held_out=0.02
smoke="" base="" chats="" sft="" pairs="" reward="" dpo="" ppo="" grpo="" limit=""
if [ -n "$SMOKE" ]; then
    vocabulary=2048 context=512 bytes=2000000 shots=0
    base="--rows_per_step=4 --micro_rows=1 --n_layer=2 --n_head=2 --n_embd=64"
    base="$base --max_steps=20 --warmup_steps=2 --eval_tokens=8192 --sample_tokens=16"
    chats=--max_examples=600 pairs=--max_examples=600
    smoke="--max_steps=3 --warmup_steps=2 --eval_every=2 --samples=1"
    sft="--rows_per_step=4 --micro_rows=1 --eval_examples=20"
    reward="--pairs_per_step=8 --micro_pairs=4 --eval_pairs=16" dpo=$reward
    answers="--max_new_tokens=16 --eval_questions=4 --pass_k=2"
    ppo="--questions_per_rollout=4 --answers_per_question=2 --micro_questions=1 $answers"
    grpo="--questions_per_step=4 --group_size=4 --micro_questions=2 --beta=0.04 $answers"
    limit="--limit=8 --max_new_tokens=16"
fi

# data NAME OPTION...: writes the folder $out/NAME, unless it is there
data() {
    local name=$1
    shift
    if [ ! -e $out/$name/train.h5 ] && [ ! -e $out/$name/train.jsonl ]; then
        printf '\n== %s\n' "$name"
        python data.py "$@" --out_dir=$out/$name
    fi
}

# where the rows come from
mkdir -p $out
gsm8k=$out/gsm8k evaluated=hub
instructions=alpaca:hub:tatsu-lab/alpaca,dolly:hub:databricks/databricks-dolly-15k
preferences=hub:Anthropic/hh-rlhf,hub:HuggingFaceH4/ultrafeedback_binarized::train_prefs
[ -z "$TEXT" ] && TEXT=hub:HuggingFaceFW/fineweb-edu:sample-10BT
[ "$TEXT" = pile ] && TEXT=hub:monology/pile-uncopyrighted
if [ -n "$DATA" ]; then
    gsm8k=$DATA/eval/gsm8k evaluated=$DATA/eval
    instructions=$DATA/alpaca,$DATA/dolly preferences=$DATA/hh_rlhf,$DATA/ultrafeedback
elif [ ! -e $gsm8k ]; then
    mkdir -p $gsm8k.unfinished
    python -c "import datasets
for split in ('test', 'train'):
    datasets.load_dataset('openai/gsm8k', 'main', split=split).to_json(f'$gsm8k.unfinished/{split}.jsonl')"
    mv $gsm8k.unfinished $gsm8k
fi

# the base model
data text --sources="$TEXT" --max_bytes=${TEXT_BYTES:-$bytes} --val_fraction=$held_out --vocab_size=$vocabulary \
    --tokenizer_bytes=200000000
stage pretrain pretrain.py config/pretrain_$SIZE.py --data=$out/text --context=$context \
    --max_seconds=$PRETRAIN_SECONDS $base

# the chat model, what people prefer, and what is right
data chats --kind=chats --sources="$instructions,task:gsm8k:$gsm8k" --tokenizer=$out/pretrain --context=$context \
    --show=2 $chats
stage sft sft.py config/sft_$SIZE.py --init_from=$out/pretrain --data=$out/chats --max_seconds=$STAGE_SECONDS \
    $smoke $sft
data pairs --kind=pairs --sources="$preferences" --val_fraction=0.02 --show=1 $pairs
from_sft="--init_from=$out/sft --max_seconds=$STAGE_SECONDS $smoke"
stage reward reward.py config/reward_$SIZE.py --data=$out/pairs $from_sft $reward
stage dpo dpo.py config/dpo_$SIZE.py --data=$out/pairs $from_sft $dpo
stage ppo ppo.py config/ppo_$SIZE.py --path="$gsm8k" $from_sft $ppo
stage grpo grpo.py config/grpo_$SIZE.py --path="$gsm8k" $from_sft $grpo

# evaluation: likelihoods of plain text for all; GSM8K with worked examples for the base model, through the template for
# the others. What table.jsonl holds is skipped; of local files, the tasks that there are are scored
printf '\n== evaluation\n'
tasks=bpb
for task in hellaswag arc_easy arc_challenge; do
    if [ "$evaluated" = hub ] || find "$evaluated" | tr -d '_-' | grep -i ${task/_/} > /dev/null; then
        tasks=$tasks,$task
    fi
done
tuned=$out/sft,$out/dpo,$out/ppo,$out/grpo
score="$launch eval.py --append=$out/table.jsonl $limit"
$score --model=$out/pretrain,$tuned --mode=base --tasks=$tasks --eval_data="$evaluated" --text=text=$out/text \
    --max_text_bytes=2000000
$score --model=$out/pretrain --mode=base --tasks=gsm8k --eval_data="$gsm8k" --shots=$shots --max_batch=128
$score --model=$tuned --mode=chat --tasks=gsm8k --eval_data="$gsm8k" --max_batch=128
python eval.py --table=$out/table.jsonl
echo "talk to it:   source .venv/bin/activate; python chat.py --model=$out/grpo"
