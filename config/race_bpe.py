# The race on tinyshakespeare, BPE of 1,536 pieces: 2.7386 bits per byte, as fast as possible (runs/race.sh).
context = 64
rows_per_step = 16
n_layer = 2
n_head = 4
n_embd = 128
lr = 0.016
embed_lr = 0.1
matrix_lr = 0.04
momentum = 0.85
muon_steps = 4
warmup_steps = 1
decay_fraction = 0.8
max_steps = 43
eval_every = 1_000_000
eval_tokens = 0
sample_tokens = 0
curves = False
