"""The model's side: its entries, their names, and what wrappers and PEFT put into them."""
