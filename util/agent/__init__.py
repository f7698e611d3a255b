"""An agent that acts: a model that calls the tools of a user's environment, and sees what comes of it.

Enters: a model, and an environment as a Python file. Leaves: episodes as a data file that can be trained on, a page
that shows them, and the share that reached their goal.

May import: ground, walk, loop, data, adapters, results.
"""
