"""Text to numbers: encoders, text statistics and outcome features."""
