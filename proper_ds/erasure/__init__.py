"""Forgetting a user: everything of theirs leaves a run's folder, with proof and a receipt."""
