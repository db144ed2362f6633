#!/usr/bin/env bash
# IPO, KTO, ORPO and SimPO beside DPO: on the pairs of the demo (bash runs/demo.sh [SEED] first), with its learning rate
# and epochs and no limit of time, then 1,000 test questions answered greedily.
#   bash runs/family.sh                the demo's seed
#   bash runs/family.sh 1              another one's: out/demo-1
requirements="requirements.txt"
source "$(dirname "$0")/setup.sh"
demo=out/demo${1:+-$1}
out=$demo/family seed=${1:-1337}
source runs/stages.sh
mkdir -p $out

train="dpo.py config/dpo_demo.py --init_from=$demo/sft --data=$demo/pairs --max_seconds=0 --eval_every=1000 --samples=0"
stage dpo $train
stage ipo $train --loss=ipo
stage kto $train --loss=kto
stage orpo $train --loss=orpo --sft_weight=0           # it has a term of its own for the chosen answers
stage simpo $train --loss=simpo --beta=2
python eval.py --append=$out/table.jsonl --mode=chat --tasks=sorting --max_new_tokens=48 --limit=1000 \
    --model=$demo/sft,$out/dpo,$out/ipo,$out/kto,$out/orpo,$out/simpo
python eval.py --table=$out/table.jsonl
