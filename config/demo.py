# A base model from the standard library's sources, in two minutes on two laptop cores: bash runs/demo.sh
data = "out/demo/text"
out_dir = "out/demo/pretrain"
context = 256
rows_per_step = 8
n_layer = 4
n_head = 4
n_embd = 256
max_steps = 100_000         # the clock ends the run
max_seconds = 110.0
eval_every = 200
eval_tokens = 65_536
