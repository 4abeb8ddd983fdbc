"""The command line, which starts in ``bnguard.cli.main``."""
