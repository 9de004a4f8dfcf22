"""What is known of the techniques and of this installation, as values and as tables."""
