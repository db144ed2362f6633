# GRPO in the demo: the finetuned model learns from what its verifier says: bash runs/demo.sh
init_from = "out/demo/sft"
out_dir = "out/demo/grpo"
tasks = "sorting"
questions_per_step = 32
group_size = 8
rollout_batch = 256         # a whole step
lr = 1e-4
max_steps = 40
max_seconds = 65.0
eval_every = 10
pass_k = 0
