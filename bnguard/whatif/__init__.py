"""`diagnose`: the model under other statistics, the cause, and the layers to blame."""
