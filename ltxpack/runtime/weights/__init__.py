"""Which weights are where, and how they get there: the plan (without torch), loading, slots, the keeper."""
