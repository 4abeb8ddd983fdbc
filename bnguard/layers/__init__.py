"""BN layers: which modules they are, their moments, and how they are left as found."""
