"""Running programs that nobody vouches for: confined processes, and how they are judged from outside. No torch here."""
