"""What several ranks add: start-up, sharding, dealing, and the faults of a job.

Enters: torchrun's environment. Leaves: a `World`, a sharded model, sums over ranks.
`finetune.py` imports nothing of it.

May import: ground, walk, loop, data, adapters, cost.
"""
