"""What leaves the project: the saved model, exported checkpoints, the hub, trackers.

Enters: a run directory. Leaves: a model in the published format, commits on the hub, metrics in trackers. It all runs
beside the training or after it, and none of it can end a training.

May import: ground, walk, loop, adapters, cost.
"""
