"""The console at /console: what a product owner sees and sets."""
