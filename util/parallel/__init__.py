"""What several ranks add: start-up, sharding, dealing, faults of a job. Beside a single rank nothing of it is read,
but for `ranks`, which answers for one process, too.

Enters: torchrun's environment. Leaves: a `World`, a sharded model, sums over ranks.

May import: the ground floor, the walk, the loop, data, cost, adapters, results.
"""
