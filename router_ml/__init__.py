"""router-ml: a request router learned from a team's own logged outcomes."""

__version__ = "0.1.0"
