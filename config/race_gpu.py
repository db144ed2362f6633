# The race on tinyshakespeare: 1.4697 nats a character, the best of nanoGPT's GPU run, on two CPU cores (runs/race.sh).
context = 256
rows_per_step = 6
n_layer = 4
n_head = 4
n_embd = 128
lr = 0.008
matrix_lr = 0.02
momentum = 0.9
muon_steps = 4
warmup_steps = 10
decay_fraction = 0.9
max_steps = 1_000_000
max_seconds = 135.0
eval_every = 1_000_000
eval_tokens = 0
sample_tokens = 0
curves = False
