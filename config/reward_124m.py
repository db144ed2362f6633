# A reward model from the 124M chat model, on HH-RLHF and UltraFeedback: SIZE=124m bash runs/pipeline.sh
pairs_per_step = 64
micro_pairs = 8
lr = 2e-5
epochs = 1.0
warmup_steps = 50
eval_every = 250
eval_pairs = 2_000
