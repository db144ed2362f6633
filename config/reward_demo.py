# The demo's reward model, from pairs that the finetuned model sampled: bash runs/demo.sh
init_from = "out/demo/sft"
data = "out/demo/pairs"
out_dir = "out/demo/reward"
pairs_per_step = 32
epochs = 3.0
lr = 1e-3
eval_every = 25
max_seconds = 50.0
