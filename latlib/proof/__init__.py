"""What of a model latlib computes as the model itself does, and the slower ways for the rest."""
