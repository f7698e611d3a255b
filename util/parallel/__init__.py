"""What several ranks add: start-up, sharding, dealing, and the faults of a job.

Enters: torchrun's environment. Leaves: a `World`, a sharded model, sums over ranks. With one rank nothing here is
read.

May import: ground, walk, loop, adapters, cost.
"""
