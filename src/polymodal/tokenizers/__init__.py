"""Text and signals to codes and back."""
