# A reward model from the 400M chat model, on HH-RLHF and UltraFeedback: SIZE=400m bash runs/pipeline.sh
pairs_per_step = 64
micro_pairs = 4
lr = 1e-5
epochs = 1.0
warmup_steps = 50
eval_every = 250
eval_pairs = 2_000
