"""Measurements: each module prints a table and writes JSON. The product never imports them."""
