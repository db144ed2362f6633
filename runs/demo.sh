#!/usr/bin/env bash
# From nothing to a model that answers, offline but for the package index: the Python standard library of this machine
# becomes a tokenizer, tokens and a base model; questions that tasks.py makes up then teach it to answer. Run again, it goes
# on from what is there.
requirements="requirements.txt"
source "$(dirname "$0")/setup.sh"
demo=out/demo

# stage NAME SCRIPT [OPTION...]: runs a stage into $demo/NAME, goes on with it, or skips it where it is done
stage() {
    local name=$1 script=$2 resume=false overwrite=false
    shift 2
    [ -e $demo/$name.txt ] && return
    if [ -e $demo/$name/resume/state.pt ]; then resume=true
    elif [ -e $demo/$name/log.jsonl ]; then overwrite=true; fi
    echo "== $name"
    python $script "$@" --out_dir=$demo/$name --resume=$resume --overwrite=$overwrite | tee -i $demo/$name.unfinished
    grep -q "^stopped before" $demo/$name.unfinished && exit 1             # by hand: the next call goes on
    mv $demo/$name.unfinished $demo/$name.txt
}

mkdir -p $demo
if [ ! -e $demo/text/train.h5 ]; then
    python data.py --sources=stdlib --vocab_size=4096 --out_dir=$demo/text
fi
stage pretrain pretrain.py config/demo.py

# six in ten demonstrations make one systematic mistake on purpose, so that the stages after this one have room
if [ ! -e $demo/chats/train.h5 ]; then
    python data.py --kind=chats --sources=task:sorting,task:addition --task_examples=8000 --flawed=0.6 \
        --tokenizer=$demo/pretrain --context=256 --out_dir=$demo/chats --show=2
fi
stage sft sft.py config/sft_demo.py

for model in pretrain sft; do
    python eval.py --model=$demo/$model --mode=chat --tasks=sorting,addition --limit=1000 --append=$demo/table.jsonl
done
python eval.py --table=$demo/table.jsonl

echo
echo "the curves are in $demo/*/curves.png; to begin again, delete $demo"
echo "talk to it:   source .venv/bin/activate; python chat.py --model=$demo/sft"
echo "every option: python sft.py --help"
