"""A BatchNorm tab in the stock TensorBoard.

``writer`` writes into the user's event files, ``loader`` and ``plugin`` serve the tab, and
``log_report`` puts the same page into one file. Reading a log needs neither
torch nor the library that wrote it.
"""
