"""``bnguard run``: runs a script that was not changed, and watches what it trains."""
