"""Weights behind URLs."""
