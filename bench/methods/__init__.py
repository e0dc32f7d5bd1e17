"""The methods against each other, at equal budgets of tokens."""
