"""What packed attention runs on: the kernels, a rule that chooses one for each call, and a stopwatch.

Enters: q, k, v of a packed row and where its pieces begin. Leaves: attention within each piece, by one operator of
torch; and for the plan, in words, which kernel that will be.

May import: ground.
"""
