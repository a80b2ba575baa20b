"""Linear layers whose weights are stored in fewer bits than they are computed with."""
