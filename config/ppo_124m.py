# PPO of the 124M chat model on GSM8K, with a critic of its own: SIZE=124m bash runs/pipeline.sh
tasks = "gsm8k"
too_long = "drop"
rewards = "verifier=1,format=0.1"
questions_per_rollout = 128
answers_per_question = 4    # 512 answers a rollout
max_new_tokens = 320
rollout_batch = 256
kl_coef = 0.02
epochs = 2
minibatches = 2
micro_questions = 8
lr = 1e-5
critic_lr = 2e-5
max_steps = 400             # 100 rollouts, nearly 2 passes over the questions
eval_every = 40
eval_questions = 200
