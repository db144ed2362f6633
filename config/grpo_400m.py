# GRPO of the 400M chat model on GSM8K: SIZE=400m bash runs/pipeline.sh
tasks = "gsm8k"
too_long = "drop"
rewards = "verifier=1,format=0.1"
questions_per_step = 64
group_size = 8              # 512 answers a step
max_new_tokens = 320
rollout_batch = 128
clip_high = 0.28
micro_questions = 4
lr = 2e-6
max_steps = 200             # nearly 2 passes over the questions
eval_every = 20
eval_questions = 200
