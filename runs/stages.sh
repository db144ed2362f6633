# Sourced by the chains of stages, after setup.sh. Set before: out, the chain's folder, and seed; $launch, by option, is
# what starts a stage instead of python.

# stage NAME SCRIPT [OPTION...]: runs a stage into $out/NAME, goes on with it, or skips it where it is done
stage() {
    local name=$1 script=$2 resume=false overwrite=false begin=$SECONDS
    shift 2
    [ -e $out/$name.txt ] && return
    if [ -e $out/$name/resume/state.pt ]; then resume=true
    elif [ -e $out/$name/log.jsonl ]; then overwrite=true; fi
    if [ -e $out/table.jsonl ]; then                # figures of an earlier model of this name
        grep -vF "\"model\": \"$out/$name\"" $out/table.jsonl > $out/table.unfinished || true
        mv $out/table.unfinished $out/table.jsonl
    fi
    printf '\n== %s\n' "$name"
    ${launch:-python} $script "$@" --seed=$seed --out_dir=$out/$name --resume=$resume --overwrite=$overwrite |
        tee -i $out/$name.unfinished
    echo $((SECONDS - begin)) >> $out/$name.seconds
    if grep -q "^stopped before" $out/$name.unfinished; then exit 1; fi     # by hand: the next call goes on
    mv $out/$name.unfinished $out/$name.txt
}
