"""The run: which stages there are, what each was made from, and the order in which they happen."""
