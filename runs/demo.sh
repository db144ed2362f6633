#!/usr/bin/env bash
# From nothing to a base model that writes, offline but for the package index: the Python standard library of this
# machine becomes a tokenizer, tokens and a model. Run again, it goes on from what is there.
requirements="requirements.txt"
source "$(dirname "$0")/setup.sh"
demo=out/demo

if [ ! -e $demo/text/train.h5 ]; then
    python data.py --sources=stdlib --vocab_size=4096 --out_dir=$demo/text
fi

if [ ! -e $demo/pretrain.txt ]; then
    resume=false
    [ -e $demo/pretrain/resume/state.pt ] && resume=true
    [ $resume = false ] && [ -e $demo/pretrain/log.jsonl ] && overwrite=true
    python pretrain.py config/demo.py --resume=$resume --overwrite=${overwrite:-false} | tee -i $demo/pretrain.unfinished
    grep -q "held-out text after" $demo/pretrain.unfinished || exit 1      # stopped by hand: the next call goes on
    last=$(grep -n "sample:" $demo/pretrain.unfinished | tail -n 1 | cut -d: -f1)
    tail -n +"$last" $demo/pretrain.unfinished > $demo/pretrain.txt
    rm $demo/pretrain.unfinished
fi

echo
echo "the base model in $demo/pretrain writes:"
cat $demo/pretrain.txt
echo "the curves are in $demo/pretrain/curves.png; to train it again, delete $demo"
echo "talk to it:   source .venv/bin/activate; python chat.py --model=$demo/pretrain"
echo "every option: python pretrain.py --help"
