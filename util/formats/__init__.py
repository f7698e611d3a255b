"""Other people's data: importers of their formats, and ChartQA as published.

Enters: a file in another format. Leaves: entries of this project's own, complete or refused by name. Training
only asks here which format a refused file may have.

May import: ground, conversation, tiny_model, vision, data.
"""
