# The race on tinyshakespeare, plain bytes: 1.8982 nats a character, as fast as possible (runs/race.sh).
context = 64
rows_per_step = 16
n_layer = 1
n_head = 4
n_embd = 128
lr = 0.016
matrix_lr = 0.04
momentum = 0.85
muon_steps = 4
warmup_steps = 1
decay_fraction = 0.8
max_steps = 240
eval_every = 1_000_000
eval_tokens = 0
sample_tokens = 0
curves = False
