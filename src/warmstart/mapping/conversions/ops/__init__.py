"""The ops of a conversion."""
