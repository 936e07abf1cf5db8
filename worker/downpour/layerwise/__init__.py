"""``fetch=layers``: parameters come from the servers layer by layer, and go when they have been used."""
