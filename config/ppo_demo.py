# PPO in the demo, with a critic of its own: bash runs/demo.sh
init_from = "out/demo/sft"
out_dir = "out/demo/ppo"
tasks = "sorting"
questions_per_rollout = 32
answers_per_question = 4
rollout_batch = 128         # a whole rollout
kl_coef = 0.0
epochs = 2
lr = 2e-4
max_steps = 60
max_seconds = 70.0
eval_every = 20
pass_k = 0
