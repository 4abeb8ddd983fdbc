"""New running statistics from data, as a transaction on the user's model."""
