# DPO in the demo, on pairs that the finetuned model sampled: bash runs/demo.sh
init_from = "out/demo/sft"
data = "out/demo/pairs"
out_dir = "out/demo/dpo"
pairs_per_step = 32
epochs = 3.0
lr = 2e-4
sft_weight = 1.0           # pairs are much alike: without it both answers are unlearnt
eval_every = 20
eval_tasks = "sorting"
eval_questions = 100
max_seconds = 50.0
