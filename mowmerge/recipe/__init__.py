"""Recipes: what to merge, by which method, with which values; read, checked and resolved."""
