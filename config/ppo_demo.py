# PPO in the demo, with a critic of its own: bash runs/demo.sh
init_from = "out/demo/sft"
out_dir = "out/demo/ppo"
tasks = "sorting=0.5,addition=0.5"
questions_per_rollout = 128
kl_coef = 0.0
epochs = 2
lr = 2e-4
max_steps = 100
max_seconds = 75.0
eval_every = 30
pass_k = 0
