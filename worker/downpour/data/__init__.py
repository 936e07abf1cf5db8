"""Training data split among workers: every sample of a pass goes to exactly one of them."""
