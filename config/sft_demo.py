# From the demo's base model to one that answers questions, in about a minute on two laptop cores: bash runs/demo.sh
init_from = "out/demo/pretrain"
data = "out/demo/chats"
out_dir = "out/demo/sft"
context = 256
rows_per_step = 8
lr = 1e-3
max_steps = 140
max_seconds = 80.0          # on a slow machine the clock ends it first
eval_every = 70
eval_examples = 300
eval_tasks = "sorting"
eval_questions = 100
samples = 2
