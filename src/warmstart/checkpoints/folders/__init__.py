"""Folders, shards and models of the hub."""
