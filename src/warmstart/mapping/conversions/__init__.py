"""Conversions: many tensors to many, by name templates and a list of invertible ops."""
