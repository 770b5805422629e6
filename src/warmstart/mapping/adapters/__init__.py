"""Adapters: how a tensor of one shape becomes an entry of another, declared as small frozen dataclasses."""
