#!/usr/bin/env bash
# What a reward model of 5M parameters learns from people's preferences, by source, beside length alone and beside the
# same model untrained: HH-RLHF, UltraFeedback and OpenAssistant, a fifth of the prompts held out.
#   bash runs/rewards.sh BASE_TEXT CHATS HH_RLHF ULTRAFEEDBACK OASST [SEED...]     (files; several with commas)
requirements="requirements.txt"
source "$(dirname "$0")/setup.sh"
if [ $# -lt 5 ]; then
    echo "usage: bash runs/rewards.sh BASE_TEXT CHATS HH_RLHF ULTRAFEEDBACK OASST" >&2
    exit 1
fi
out=out/rewards seed=1337
source runs/stages.sh
mkdir -p $out

[ -e $out/text/train.h5 ] || python data.py --sources="$1" --vocab_size=4096 --out_dir=$out/text
stage pretrain pretrain.py --data=$out/text --context=512 --n_layer=4 --n_head=4 --n_embd=256 --rows_per_step=8 \
    --max_steps=500 --eval_every=250
[ -e $out/chats/train.h5 ] || python data.py --kind=chats --sources="$2" --tokenizer=$out/pretrain --context=512 \
    --val_fraction=0.02 --out_dir=$out/chats
stage sft sft.py --init_from=$out/pretrain --data=$out/chats --context=512 --rows_per_step=8 --max_steps=100 \
    --lr=1e-3 --eval_every=100
[ -e $out/pairs/train.jsonl ] || python data.py --kind=pairs --sources="$3,$4,$5" --val_fraction=0.2 --out_dir=$out/pairs
for seed in ${@:6} $([ $# -gt 5 ] || echo 1337); do
    stage reward-$seed reward.py --init_from=$out/sft --data=$out/pairs --context=512 --eval_pairs=0 --epochs=1 --lr=3e-4 \
        --eval_every=50
done
python runs/rewards.py $out
