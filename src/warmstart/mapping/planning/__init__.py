"""Planning: from the rules, the keys and the model to the plan."""
