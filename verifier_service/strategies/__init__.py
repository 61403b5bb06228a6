"""How a problem was solved: steps of a solution, their vectors, and how one solution follows another."""
