"""What each stage trains: population, group, users, router, and the small base for offline machines."""
