# GRPO in the demo: the finetuned model learns from what its verifier says: bash runs/demo.sh
init_from = "out/demo/sft"
out_dir = "out/demo/grpo"
tasks = "sorting=0.5,addition=0.5"
questions_per_step = 16
group_size = 8
lr = 2e-4
max_steps = 60
max_seconds = 75.0
eval_every = 20
pass_k = 0
