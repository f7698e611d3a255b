"""What a model answers: held-out loss, answers, scores, reports, and a look at a sample.

Enters: a model and held-out data, or files of answers. Leaves: scores with intervals, answers in files, a report.

May import: ground, walk, loop, data, adapters, cost, publish.
"""
