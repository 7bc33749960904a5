"""Input factories, oracles and error budgets for the tests of every package."""
