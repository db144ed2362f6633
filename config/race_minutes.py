# The race on tinyshakespeare, plain bytes: the best held-out loss in the time that nanoGPT takes (runs/race.sh).
context = 64
rows_per_step = 16
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
max_seconds = 97.0
eval_every = 1_000_000
eval_tokens = 0
sample_tokens = 0
curves = False
