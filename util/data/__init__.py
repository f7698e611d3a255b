"""Where bytes come from: data files, images and videos, local or remote, and the checks of what can be trained on.

Enters: paths and addresses, entries of data files. Leaves: checked messages, open media, decoded frames; DataError for
what cannot be used, with the sample's name. Nothing here loads a model.

May import: ground, vision.
"""
