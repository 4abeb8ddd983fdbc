"""Situations of real people: public reports of trouble with BN, rebuilt small on data of our own.

Each file, but for the frame, is one situation and holds ``SITUATION``. Its docstring names the
public source, as ``owner/name#number``, and what was reported there.
"""
