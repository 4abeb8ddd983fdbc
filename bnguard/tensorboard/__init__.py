"""A BatchNorm tab in the stock TensorBoard: what is written, what is read, and the page itself.

``summary`` writes into the user's own event files, ``loader`` and ``plugin`` serve the tab,
``page`` puts the same page into one file. Nothing but ``summary`` needs the training library that
wrote the log, and nothing here imports torch.
"""
